"""Rollouts by a vLLM server (``real-fast serve``), on this machine's other GPUs or on another machine."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from real_fast.config import RolloutConfig
from real_fast.errors import RolloutServerError
from real_fast.model.lora import merged_tensors
from real_fast.rollout.vllm_client import HOW_TO_START, ServerClient
from real_fast.rollout.vllm_sampling import VllmSampling
from real_fast.rollout.vllm_transfer import SHAPE, Transfer, buckets, transfer_of
from real_fast.score.scale import ScoreScale
from real_fast.types import Rollout, SamplingParams

logger = logging.getLogger(__name__)

_UNTOUCHED = "default"  # vLLM's label of the weights that a server started with
_AT_A_TIME = 256  # requests under way


@dataclass
class _Flat:
    """Log-probabilities of a completion, as vLLM's FlatLogprobs has them: those of step i from start to end."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)


@dataclass
class _Completion:
    index: int
    token_ids: list[int]
    logprobs: _Flat


@dataclass
class _Output:
    outputs: list[_Completion]


class VllmServerEngine(VllmSampling):
    """Samples with a vLLM server, and hands it the trainer's weights through vLLM's weight-transfer interface.

    Every sync gives the server's weights a label of its own. Samples count only if the server has that label before and
    behind them: one that was started anew, or that another run has put its weights into, is found out.

    Args:
        url: The server's, http://HOST:PORT.
        model_path: The folder of the model that is synced, as of :class:`VllmSampling`, like the following.
        tokenizer: Its tokenizer.
        scale: The score scale.
        dtype: What the trainer computes in; the server must too.
        max_model_len: Longest sequence, which the server must allow.
        device: The trainer's.
        top_p: The smallest that will be sampled with.
        timeout: Seconds that a request may take, waiting for room at the server included.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ModelError: The folder has no safetensors that can be read.
        RolloutServerError: No server answers; it was not started for rollouts; or it has another model, another dtype,
            a rounded head, other log-probabilities or too short a context.
    """

    name = "vllm-server"
    beside_training = True  # its samples and the update have devices of their own
    held_bytes = 0  # on the trainer's device

    def __init__(
        self,
        url: str,
        model_path: Path,
        tokenizer: Any,
        scale: ScoreScale,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        device: torch.device,
        top_p: float = 1.0,
        timeout: float = RolloutConfig.timeout,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(
            model_path,
            tokenizer,
            scale,
            dtype=dtype,
            max_model_len=max_model_len,
            top_p=top_p,
            trust_remote_code=trust_remote_code,
        )
        self._client, self._timeout = ServerClient(url), timeout
        self._run_name, self._syncs = f"real-fast-{secrets.token_hex(4)}", 0
        self._label = ""  # of the weights that the server must have; none before the first sync
        state = self._state()
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code).get_text_config()
        self._check(state, {key: getattr(config, key, None) for key in SHAPE})
        self._tied = bool(state["tied"])
        self._transfer: Transfer = transfer_of(state["transfer"], state["workers"], device, self._client.url)
        self._transfer.open(self._client)

    def _state(self) -> dict[str, Any]:
        """What the server says of itself."""
        try:
            found = self._client.post("/collective_rpc", {"method": "real_fast_state"}, timeout=60.0)["results"]
            state: dict[str, Any] = found[0]
        except (RolloutServerError, KeyError, IndexError, TypeError) as error:
            if isinstance(error, RolloutServerError) and not error.status:
                raise
            raise RolloutServerError(
                f"the server at rollout.url {self._client.url} was not started for rollouts ({error}): {HOW_TO_START}"
            ) from error
        return state

    def _check(self, state: dict[str, Any], shape: dict[str, Any]) -> None:
        """Raise :class:`RolloutServerError` where the server cannot sample for this trainer."""
        url, mode = self._client.url, "processed_logprobs" if self._processed else "raw_logprobs"
        if other := [key for key in SHAPE if state["shape"].get(key) != shape[key]]:
            said = ", ".join(f"{key} {state['shape'].get(key)} there and {shape[key]} here" for key in other)
            raise RolloutServerError(
                f"the rollout server {url} has another model ({state['model']}: {said}): start it with this run's "
                "config file, or set rollout.url to the server of this model"
            )
        wanted = str(self.dtype).removeprefix("torch.")
        for what, found, must, mend in (
            ("computes in", state["dtype"], wanted, "set train.precision to the same for both"),
            ("has its head in", state["head_dtype"], "float32", "start it with `real-fast serve`"),
            ("reports", state["logprobs_mode"], mode, "start it with the run's rollout.top_p"),
        ):
            if found != must:
                raise RolloutServerError(f"the rollout server {url} {what} {found}, and this run needs {must}: {mend}")
        if state["max_model_len"] < self.max_model_len:
            raise RolloutServerError(
                f"the rollout server {url} takes sequences of {state['max_model_len']} tokens, and this run's have up "
                f"to {self.max_model_len}: start it with the run's prompt.max_tokens and rollout.max_tokens"
            )
        self._most = int(state["max_num_seqs"])

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        """As :meth:`VllmSampling.generate`.

        Raises:
            RolloutServerError: The server does not answer, or has other weights than those of the last sync.
            ValueError: As :meth:`VllmSampling.generate` says; or more rollouts of a prompt than the server takes.
        """
        if not self._label:
            raise RuntimeError("the rollout server has not been given this run's weights yet: sync it first")
        if sampling.n > self._most:
            raise ValueError(
                f"{sampling.n} rollouts of a prompt, and the rollout server decodes {self._most} sequences at a time: "
                "start it with a larger rollout.max_num_seqs"
            )
        self._check_label()
        rollouts = super().generate(prompts, sampling)
        self._check_label()
        return rollouts

    def _weights_label(self) -> str:
        return str(self._client.get("/weight_info")["weight_version"])

    def _check_label(self) -> None:
        found = self._weights_label()
        if found == self._label:
            return
        if found == _UNTOUCHED:
            why = "it was started anew since the last sync and has the weights that it started with"
        elif found.startswith(self._run_name):
            why = "a sync was missed or did not come to its end"
        else:
            why = "another run has put its weights into it: each run needs a server of its own"
        raise RolloutServerError(
            f"the rollout server {self._client.url} has the weights {found!r}, and this run's newest are "
            f"{self._label!r}: {why}. Go on with --resume, which syncs it"
        )

    def _params(self, score_tokens: bool, **kwargs: Any) -> dict[str, Any]:
        # The server gives as many of a step's as were asked for, the sampled token's first: the last one is cut off.
        ids = [*self.scale.score_ids, self.scale.score_ids[0]]
        wanted = {"logprobs": len(ids), "logprob_token_ids": ids} if score_tokens else {"logprobs": 0}
        return {"detokenize": bool(kwargs.get("stop")), **wanted, **kwargs}

    def _run(self, prompts: Sequence[Sequence[int]], params: list[Any]) -> list[Any]:
        # Those with a common beginning one after the other, as in one process.
        order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
        bodies = [{"token_ids": list(prompts[i]), "sampling_params": params[i]} for i in order]
        answers = self._client.post_all("/inference/v1/generate", bodies, _AT_A_TIME, self._timeout)
        outputs: list[Any] = [None] * len(prompts)
        for i, answer in zip(order, answers, strict=True):
            outputs[i] = self._read(answer, int(params[i].get("n", 1)))
        return outputs

    def _read(self, answer: Any, n: int) -> _Output:
        """A request's samples. Raises :class:`RolloutServerError` where they are not all there."""
        try:
            output = _Output([_completion(choice) for choice in answer["choices"]])
        except (KeyError, TypeError, ValueError) as error:
            raise RolloutServerError(
                f"the rollout server {self._client.url} answered in a way that is not known ({error!r}): its vLLM may "
                "be too new or too old; docs/vllm-server.md has the version that was tested"
            ) from error
        if len(output.outputs) != n or not all(completion.token_ids for completion in output.outputs):
            raise RolloutServerError(
                f"the rollout server {self._client.url} gave {len(output.outputs)} samples of a prompt where {n} were "
                "asked for, or an empty one: see its log, and go on with --resume"
            )
        return output

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hand the trainer's weights to the server, a few tensors at a time, and drop what is cached of earlier ones.

        Beside the trainer's own there is a copy of one tensor (or of 32 MiB) at a time on the way. Until the end the
        server's weights have a label that :meth:`generate` refuses.

        Raises:
            RolloutServerError: The server does not answer, cannot take the weights, or has another run's.
            ValueError: A name that is not in the model folder's safetensors, or a weight of it that was left out.
        """
        client, given = self._client, set[str]()
        found = self._weights_label()
        if found == _UNTOUCHED and self._label:
            logger.warning("the rollout server %s was started anew: it gets all weights again", client.url)
            self._transfer.open(client)
        elif not found.startswith(self._run_name):
            if self._label:
                self._check_label()
            elif found != _UNTOUCHED:
                logger.warning("the rollout server %s has another run's weights; it gets this run's now", client.url)
        self._syncs += 1
        self._label = f"{self._run_name}-{self._syncs}"
        client.post("/update_weight_version", {"new_version": f"{self._label} unfinished"})
        self._start()
        try:
            for part in buckets(self._to_send(named_tensors, given)):
                self._transfer.send(client, part, self.dtype)
                part.clear()
        except BaseException:
            with suppress(RolloutServerError):  # the next sync is to find no update under way
                client.post("/finish_weight_update")
            raise
        client.post("/finish_weight_update")
        self._check_given(given)
        client.post("/collective_rpc", {"method": "real_fast_repack_tied_heads"})
        if not client.post("/reset_prefix_cache")["success"]:
            raise RolloutServerError(
                f"the rollout server {client.url} did not drop its prefix cache after the sync, since others' requests "
                "use it: each run needs a server of its own"
            )
        client.post("/update_weight_version", {"new_version": self._label})

    def _start(self) -> None:
        """Begin an update; one that a run before this one left open is closed first."""
        try:
            self._client.post("/start_weight_update")
        except RolloutServerError as error:
            if "already active" not in str(error):
                raise
            self._client.post("/finish_weight_update")
            self._client.post("/start_weight_update")

    def sleep(self) -> bool:
        """Nothing: what the server holds is not on the trainer's device."""
        return False

    def sync_adapters(self, model: Any) -> None:
        """Hand over the weights that a model's adapters make, merged out of place, a tensor at a time.

        Raises:
            RolloutServerError: As :meth:`sync` does, like ValueError.
        """
        self.sync(merged_tensors(model))

    def close(self) -> None:
        """Close connections; the server goes on."""
        self._client.close()


def _completion(choice: dict[str, Any]) -> _Completion:
    """A sample out of JSON. Raises KeyError, TypeError or ValueError where something is missing."""
    flat, ids = _Flat(), [int(token) for token in choice["token_ids"]]
    for token, step in zip(ids, choice["logprobs"]["content"], strict=True):
        if int(step["token_id"]) != token:
            raise ValueError(f"token {token} with the log-probability of {step['token_id']}")
        flat.start_indices.append(len(flat.token_ids))
        flat.token_ids.append(token)
        flat.logprobs.append(float(step["logprob"]))
        for other in step["top_logprobs"]:
            flat.token_ids.append(int(other["token_id"]))
            flat.logprobs.append(float(other["logprob"]))
        flat.end_indices.append(len(flat.token_ids))
    return _Completion(int(choice["index"]), ids, flat)
