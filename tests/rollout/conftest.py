"""A fake rollout server, and engines that talk to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from real_fast.rollout import vllm_client, vllm_transfer
from real_fast.rollout.vllm_server import VllmServerEngine
from real_fast.rollout.vllm_transfer import SharedMemory
from real_fast.score.scale import ScoreScale
from tests.rollout.fake_server import FakeServer


@pytest.fixture
def tensors(tiny_judge: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(tiny_judge / "model.safetensors")


@pytest.fixture
def fake(tiny_judge: Path, smollm2_tokenizer: Any, scale: ScoreScale) -> Iterator[FakeServer]:
    config = json.loads((tiny_judge / "config.json").read_text())
    state = {
        "model": str(tiny_judge),
        "shape": {key: config[key] for key in vllm_transfer.SHAPE},
        "dtype": "bfloat16",
        "head_dtype": "float32",
        "logprobs_mode": "processed_logprobs",
        "max_model_len": 128,
        "max_num_seqs": 8,
        "transfer": SharedMemory.backend,
        "workers": 1,
        "tied": True,
    }
    server = FakeServer(state, smollm2_tokenizer.encode(" It is good. So the overall score is 4"))
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def engine_of(
    fake: FakeServer, tiny_judge: Path, smollm2_tokenizer: Any, scale: ScoreScale, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., VllmServerEngine]:
    monkeypatch.setattr(vllm_client, "_PAUSES", (0.01, 0.02))

    def make_one(url: str = "", **changed: Any) -> VllmServerEngine:
        settings: dict[str, Any] = {"dtype": torch.bfloat16, "max_model_len": 96, "device": torch.device("cpu")}
        settings |= changed
        return VllmServerEngine(url or fake.url, tiny_judge, smollm2_tokenizer, scale, **settings)

    return make_one


@pytest.fixture
def engine(engine_of: Callable[..., VllmServerEngine], tensors: dict[str, torch.Tensor]) -> VllmServerEngine:
    """With its weights at the server."""
    one = engine_of()
    one.vocabulary = 49152  # the fake writes with all of SmolLM2's tokens
    one.sync(tensors.items())
    return one
