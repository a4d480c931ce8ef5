"""A model's weights: all of them from its folder, none made up, and every one a number."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from real_fast.errors import ModelError
from real_fast.model.folder import INDEX, SINGLE, read_json, weight_files
from real_fast.runs.progress import no_foreign_bars

logger = logging.getLogger(__name__)


def load_whole(path: Path, trust_remote_code: bool, **how: Any) -> PreTrainedModel:
    """The model with every weight from its folder, none made up. Raises :class:`ModelError`."""
    if (path / SINGLE).is_file() and (path / INDEX).is_file():
        logger.warning("%s has both %s and %s: the first is taken, as Transformers does", path, SINGLE, INDEX)
    try:
        with no_foreign_bars(), _without_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told of below, by name
                **how,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError) as error:
        raise_if_quantised(path, error)
        raise ModelError(
            f"the model in {path} cannot be loaded ({first_line(error)}): config.json may be for another version than "
            f"the installed transformers {transformers.__version__}"
        ) from error
    model: PreTrainedModel = loaded[0]
    found: dict[str, Any] = loaded[1]
    problems = []
    if missing := sorted(found["missing_keys"]):
        problems.append(f"lack {_some(missing)}")
    if wrong := sorted(found["mismatched_keys"]):
        name, has, wants = wrong[0]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        problems.append(f"have another shape in {name}{more} ({list(has)} instead of {list(wants)})")
    if unexpected := sorted(found["unexpected_keys"]):
        problems.append(f"hold {_some(unexpected)}, for which it has no place")
    if problems:
        raise ModelError(
            f"the weights in {path} are not those of a {type(model).__name__}: they {'; they '.join(problems)}. "
            f"{_remedy(missing, unexpected)}"
        )
    return model


def raise_if_quantised(path: Path, error: Exception) -> None:
    """Say of an error that a model raises that the model in `path` is quantised, where its config.json says so.

    Raises:
        ModelError: It does.
    """
    if quantization := read_json(path / "config.json").get("quantization_config"):
        raise ModelError(
            f"the model in {path} is quantised ({quantization.get('quant_method', 'unknown')}) and cannot be loaded "
            f"here ({first_line(error)}): install what is missing, or take the model that it was made from. Where its "
            "weights are no longer quantised (merged, say), take quantization_config out of its config.json"
        ) from error


def check_files(path: Path, trust_remote_code: bool = False) -> None:
    """Check the weights in a model's folder where another library loads them: their names and shapes, their numbers.

    They are read one after the other, at the speed of the disk; a quantised model's are left to that library.

    Raises:
        ModelError: Weights that are missing, of another shape, of no place in the model, NaN or infinite.
    """
    if read_json(path / "config.json").get("quantization_config"):
        return
    # Without accelerate, which the extra vllm brings, they are loaded once more instead of being skipped over.
    how: dict[str, Any] = {"device_map": {"": "meta"}} if importlib.util.find_spec("accelerate") else {"dtype": "auto"}
    load_whole(path, trust_remote_code, **how)
    for file in weight_files(path):
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            check_finite(path, ((name, opened.get_tensor(name)) for name in names))


def check_finite(path: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse weights that are not numbers, at the price of a sum each.

    Raises:
        ModelError: NaN or infinity; the message has the weight's name.
    """
    for name, weight in weights:
        if not weight.is_floating_point() or weight.element_size() == 1:  # quantised
            continue
        total = weight.detach().sum(dtype=torch.promote_types(weight.dtype, torch.float32))
        if not total.isfinite() and not weight.isfinite().all():  # large numbers, too, may add up to infinity
            count = int((~weight.isfinite()).sum())
            raise ModelError(
                f"the model in {path} has {count} of {weight.numel()} numbers NaN or infinite in {name}: the file is "
                "damaged, or the training that wrote it diverged; take an earlier checkpoint, or download it again"
            )


def _remedy(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What may have happened to weights that do not fit, and what to do."""
    for name in unexpected:
        prefix = next((name.removesuffix(other) for other in missing if name.endswith("." + other)), None)
        if prefix:
            return f"Their names begin with {prefix!r}, which a wrapper put there: save the model without the wrapper"
    if any("lora_" in name for name in unexpected):
        return "An adapter was saved along with them: merge it into the model first"
    other_head = any(name.startswith(("score.", "classifier.", "v_head.")) for name in unexpected)
    if other_head or missing == ["lm_head.weight"]:
        return "A reward model or a classifier has another head: take the language model that it was made from"
    return "Check that config.json belongs to these weights, and that they were saved whole"


def _some(names: Sequence[str]) -> str:
    """The first few of some names, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep Transformers' table of weights that do not fit, which an error says here, off the terminal."""
    theirs = logging.getLogger("transformers")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where that says more."""
    first, kind = str(error).strip().partition("\n")[0], type(error).__name__
    return f"{kind} {first}".strip() if isinstance(error, KeyError) or not first else first
