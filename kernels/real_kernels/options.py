"""The options of the public functions, as two frozen records: what the objective is, and how the head computes it.

An operator of ``torch.library`` takes tensors, numbers and strings. So a record goes into one as a string, its `text`,
and `from_text` makes an equal record of it inside, floats to the last bit. The string is made together with the record.
torch.compile takes it for a constant and compiles anew for another one; a record that is made inside compiled code must
be made of constants.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args

Reward = Literal["paper", "authors"]
Baseline = Literal["leave_one_out", "mean"]
LossNorm = Literal["sequence_sum", "token_mean"]
Impl = Literal["auto", "triton", "torch"]
Mode = Literal["auto", "forward", "recompute"]

REWARDS, BASELINES, LOSS_NORMS, IMPLS, MODES = map(get_args, (Reward, Baseline, LossNorm, Impl, Mode))


@dataclass(frozen=True)
class Options:
    """A record that checks itself when it is made, and has a form as a string.

    Attributes:
        text: The record as JSON, for an operator's argument.
    """

    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.check()
        names = [f.name for f in fields(self) if f.init]
        pairs = [f'"{name}": {_json(getattr(self, name))}' for name in names]
        object.__setattr__(self, "text", f"{{{', '.join(pairs)}}}")

    def check(self) -> None:
        """Raise a ValueError that names the first field with a value that does not fit."""

    @classmethod
    @functools.lru_cache(maxsize=256)
    def from_text(cls, text: str) -> Self:
        """The record that `text` was made from."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class RealObjective(Options):
    """What REAL's loss is (arXiv 2603.17145): the reward, the advantages, the weights. :func:`real_kernels.real_loss`.

    Attributes:
        reward: "paper" or "authors" (their code's), see :func:`real_kernels.reward_parts`.
        lam: Weight of the label's (log-)probability in the reward, a finite number.
        beta: Weight of the refinement gradient, a finite number; 1 is the exact gradient, 0 is exploration alone.
        baseline: What a rollout's reward is compared with: "leave_one_out", the mean of the others of its group, or
            "mean", that of the whole group.
        normalize_std: Divide advantages by the standard deviation of their group's rewards.
        advantage_clip: Clip advantages to plus or minus this; 0 for no clipping.
        loss_norm: What the sum over sampled tokens is divided by: "sequence_sum", the number of rollouts, or
            "token_mean", the number of sampled tokens. The refinement part is always a mean over rollouts.
        renormalize: Take the reward from the softmax over the score tokens alone.

    Raises:
        ValueError: A value that does not fit; the message names the field.
    """

    reward: Reward = "paper"
    lam: float = 1.0
    beta: float = 1.0
    baseline: Baseline = "leave_one_out"
    normalize_std: bool = True
    advantage_clip: float = 1.0
    loss_norm: LossNorm = "sequence_sum"
    renormalize: bool = False

    def check(self) -> None:
        """Raise a ValueError that names the first field with a value that does not fit."""
        _one_of("reward", self.reward, REWARDS)
        _demand("lam", self.lam, _is_number(self.lam) and abs(self.lam) < float("inf"), "a finite number")
        _demand("beta", self.beta, _is_number(self.beta) and abs(self.beta) < float("inf"), "a finite number")
        _one_of("baseline", self.baseline, BASELINES)
        _demand("normalize_std", self.normalize_std, isinstance(self.normalize_std, bool), "True or False")
        clip = self.advantage_clip
        _demand("advantage_clip", clip, _is_number(clip) and clip >= 0, "0 or more")
        _one_of("loss_norm", self.loss_norm, LOSS_NORMS)
        _demand("renormalize", self.renormalize, isinstance(self.renormalize, bool), "True or False")


@dataclass(frozen=True)
class HeadOptions(Options):
    """How log-probabilities come out of hidden states and the lm_head's weight.

    Attributes:
        temperature: Divides the logits; above 0 and finite. Of the sampled tokens in :func:`real_kernels.real_loss`,
            which reads the score distribution at 1.
        softcap: Logits become ``softcap * tanh(logits / softcap)``, as in Gemma 2, before the temperature; above 0 and
            finite, None for no cap.
        impl: "triton" (CUDA; float16, bfloat16, float32), "torch" (every device and dtype), or "auto": Triton for
            16-bit tensors on CUDA, PyTorch otherwise.
        mode: Where the gradient is computed, by the functions that have the choice (:func:`real_kernels.real_loss`,
            :func:`real_kernels.weighted_logprob`): "forward" (6 N D V FLOPs) or "recompute" (8 N D V, less memory);
            "auto" takes "forward" unless `chunk_bytes` cuts the rows into chunks too small to be worth it.
        chunk_bytes: Most bytes of logits (or of their gradients) alive at a time, at least 1; one row's always are.
            None for 256 MiB, and 1 GiB for Triton.
        validate: Check values too, such as ids within the vocabulary. All of these checks wait for a GPU once: False
            when the caller has made sure of them.
        unit_gradient: What comes back is the loss, or a term of the sum, that ``backward()`` is called on. Gradients
            that the forward pass has computed are then handed over as they are, instead of being multiplied by an
            upstream gradient that is 1 but has to be read to be known. Any other one is an error.

    Raises:
        ValueError: A value that does not fit; the message names the field.
    """

    temperature: float = 1.0
    softcap: float | None = None
    impl: Impl = "auto"
    mode: Mode = "auto"
    chunk_bytes: int | None = None
    validate: bool = True
    unit_gradient: bool = False

    def check(self) -> None:
        """Raise a ValueError that names the first field with a value that does not fit."""
        _demand("temperature", self.temperature, _is_positive(self.temperature), "above 0 and finite")
        capped = self.softcap is None or _is_positive(self.softcap)
        _demand("softcap", self.softcap, capped, "above 0 and finite, or None")
        _one_of("impl", self.impl, IMPLS)
        _one_of("mode", self.mode, MODES)
        fits = self.chunk_bytes is None or (isinstance(self.chunk_bytes, int) and self.chunk_bytes >= 1)
        _demand("chunk_bytes", self.chunk_bytes, fits, "at least 1, a whole number, or None")
        _demand("validate", self.validate, isinstance(self.validate, bool), "True or False")
        _demand("unit_gradient", self.unit_gradient, isinstance(self.unit_gradient, bool), "True or False")


def _demand(name: str, value: object, fits: bool, must_be: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {must_be}, not {value!r}")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    *others, last = [f'"{choice}"' for choice in known]
    _demand(name, value, value in known, f"{', '.join(others)} or {last}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < float("inf")


def _json(value: Any) -> str:
    """As :func:`json.dumps`, in words that torch.compile can follow. A float's repr is read back to the last bit."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return f'"{value}"' if isinstance(value, str) else repr(float(value)).replace("inf", "Infinity")


# Records cannot change, so that one of each serves as the default of every function.
DEFAULT_OBJECTIVE = RealObjective()
DEFAULT_HEAD = HeadOptions()
