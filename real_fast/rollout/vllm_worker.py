"""What a server's vLLM loads into each of its workers: how it takes weights over, and what it is made of.

vLLM imports this module by name (``worker_extension_cls``); nothing else does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine

from real_fast.rollout.vllm_inside import held_bytes, repack_tied_heads
from real_fast.rollout.vllm_transfer import SHAPE, SharedMemory, tensors_in


class Extension:
    """Methods that every worker has besides vLLM's, for the server's route /collective_rpc."""

    def real_fast_state(self: Any) -> dict[str, Any]:
        """What a trainer must know of the server before it trusts its samples; JSON values alone."""
        model, parallel = self.vllm_config.model_config, self.vllm_config.parallel_config
        config, transfer = model.hf_text_config, self.vllm_config.weight_transfer_config
        return {
            "model": str(model.model),
            "shape": {key: getattr(config, key, None) for key in SHAPE},
            "dtype": str(model.dtype).removeprefix("torch."),
            "head_dtype": str(model.head_dtype).removeprefix("torch."),
            "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
            "max_model_len": int(model.max_model_len),
            "max_num_seqs": int(self.vllm_config.scheduler_config.max_num_seqs),
            "transfer": transfer.backend if transfer is not None else "",
            "workers": int(parallel.world_size_across_dp),
            "tied": self.real_fast_repack_tied_heads(),
            "held_bytes": held_bytes(self),
        }

    def real_fast_repack_tied_heads(self: Any) -> bool:
        """Make a tied head anew behind a change of its embedding. Returns whether there is one."""
        return repack_tied_heads(self)


@dataclass
class Probe:
    """Of a first contact: a file, and what the trainer has written into it."""

    path: str
    text: str


@dataclass
class WeightFile:
    """Of an update: a file of weights, one after the other, and what they are under their Transformers names."""

    path: str
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class SharedMemoryEngine(WeightTransferEngine[Any, Any]):
    """Takes weights out of files that a trainer on this machine writes into shared memory, on any device."""

    init_info_cls, update_info_cls = Probe, WeightFile
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: Probe) -> None:
        """Raise :class:`ValueError` where the trainer's files are not to be seen from here."""
        path = Path(init_info.path)
        if not path.is_file() or path.read_text(encoding="utf-8") != init_info.text:
            raise ValueError(f"{path} of the trainer is not on the server's machine")

    def start_weight_update(self) -> None:
        """As vLLM's other engines do."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    @torch.no_grad()
    def receive_weights(self, update_info: WeightFile) -> None:
        """Load what a file holds."""
        info = asdict(update_info)
        found = tensors_in(info.pop("path"), info)
        model: Any = self.model
        model.load_weights(iter([(name, tensor.to(self.device)) for name, tensor in found]))

    def finish_weight_update(self) -> None:
        """As vLLM's other engines do."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """There is nothing to let go of."""


if SharedMemory.backend not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(SharedMemory.backend, SharedMemoryEngine)
