"""Adapters in vLLM itself, on a CPU: each version is what the trainer has, and the base is never written to."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile

from real_fast.config import RolloutConfig
from real_fast.errors import EngineMismatchError
from real_fast.model.lora import adapters_off, merged_tensors
from real_fast.rollout.agreement import EngineGap
from real_fast.rollout.vllm_engine import VllmEngine, import_vllm
from real_fast.rollout.vllm_inside import share_one_adapter
from real_fast.score.scale import ScoreScale
from real_fast.types import SamplingParams
from tests.rollout.plain_agreement import plain_compare, trainer_logprobs_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed"),
]

PROMPTS = [[3, 14, 15, 92] * 34, [65, 35, 89, 79, 32, 38]]  # the first is a block of vLLM's prefix cache, and more


@pytest.fixture(scope="module")
def adapted(
    tiny_llama: Callable[..., Any],
    golden_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[VllmEngine, Any]]:
    """An engine and a peft model of the same base, with adapters on all of its linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(golden_model)
    base = tiny_llama(True, len(tokenizer), 128, head_dim=32, initializer_range=0.08)
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    scale = ScoreScale.from_tokenizer(tokenizer, [1, 2, 3, 4, 5], "Score: ")
    engine = VllmEngine(folder, tokenizer, scale, dtype=torch.float32, max_model_len=192, max_num_seqs=8, lora_rank=3)
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    yield engine, get_peft_model(base, config)
    engine.close()


def gap(engine: VllmEngine, trainer: Any) -> EngineGap:
    groups = engine.generate(PROMPTS, SamplingParams(n=4, max_tokens=12))
    each = [prompt for prompt, group in zip(PROMPTS, groups, strict=True) for _ in group]
    rollouts = [rollout for group in groups for rollout in group]
    return plain_compare(rollouts, *trainer_logprobs_of(trainer, each, rollouts, engine.scale, 1.0), engine.scale)


def base_of(engine: VllmEngine) -> str:
    def digest(worker: Any) -> str:
        found = hashlib.sha256()
        for parameter in worker.get_model().parameters():
            found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    [found] = engine._llm.collective_rpc(digest)  # type: ignore[union-attr]
    return str(found)


def test_every_version_is_the_trainers_and_the_base_stays(adapted: tuple[VllmEngine, Any]) -> None:
    engine, trainer = adapted
    core, before, names = engine._llm.llm_engine, base_of(engine), set()  # type: ignore[union-attr]
    gap(engine, trainer).raise_if_above(RolloutConfig(), 0, engine.dtype)  # B is 0
    for version in (1, 2, 3):
        noise = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for name, parameter in trainer.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=noise))
        with pytest.raises(EngineMismatchError):
            gap(engine, trainer).raise_if_above(RolloutConfig(), version, engine.dtype)
        if version < 3:
            engine.sync_adapter(trainer.save_pretrained, 2**20)
        else:  # as our own trainer does
            engine.sync_adapters(trainer.base_model.model)
        found = gap(engine, trainer)
        found.raise_if_above(RolloutConfig(), version, engine.dtype)
        assert found.scores == 8
        assert core.list_loras() == {version} and engine._adapter.lora_int_id == version
        names.add(engine._adapter.lora_name)
        assert not Path(engine._adapter.lora_path).exists()
    assert len(names) == 3 and base_of(engine) == before


def test_another_base_is_synced_under_adapters(adapted: tuple[VllmEngine, Any]) -> None:
    """As one in 4 bits is, whose weights are not those of its folder."""
    engine, trainer = adapted
    model, noise = trainer.base_model.model, torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj.base_layer" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=noise))
    engine.sync_adapters(model)
    with pytest.raises(EngineMismatchError):
        gap(engine, trainer).raise_if_above(RolloutConfig(), 1, engine.dtype)
    engine.sync(merged_tensors(model, adapters_too=False))
    with adapters_off(model):
        gap(engine, trainer).raise_if_above(RolloutConfig(), 2, engine.dtype)
    engine.sync_adapters(model)
    gap(engine, trainer).raise_if_above(RolloutConfig(), 3, engine.dtype)


def test_one_adapter_for_all_tokens_is_multiplied_by_and_not_copied() -> None:
    """What vLLM's own functions for a CPU compute, which copy the adapter out for every token."""
    import_vllm()
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    own = importlib.util.find_spec("vllm.lora.ops.torch_ops.lora_ops")
    assert own is not None and own.loader is not None
    plain = importlib.util.module_from_spec(own)
    own.loader.exec_module(plain)  # unchanged, whatever an engine made of the module that is imported
    share_one_adapter()
    torch.manual_seed(0)
    indices = torch.zeros(7, dtype=torch.long)
    for places in (1, 2):
        x, a, b = torch.randn(7, 12), torch.randn(places, 1, 3, 12), torch.randn(places, 1, 5, 3)
        found, want = torch.zeros(7, 3), torch.zeros(7, 3)
        punica_cpu.bgmv_shrink(x, a, found, indices, 0.5)
        plain.bgmv_shrink(x, a, want, indices, 0.5)
        torch.testing.assert_close(found, want)
        for add in (True, False):
            out, expected = torch.ones(7, 9), torch.ones(7, 9)
            lora_ops.bgmv_expand_slice(found, b, out, indices, 2, 5, add)
            plain.bgmv_expand_slice(want, b, expected, indices, 2, 5, add)
            torch.testing.assert_close(out, expected)
    many = torch.randn(1, 1, 512, 512)
    with profile(profile_memory=True) as measured:
        lora_ops.bgmv_shrink(torch.randn(64, 512), many, torch.zeros(64, 512), torch.zeros(64, dtype=torch.long))
    largest = max(e.nbytes() for e in measured.profiler.kineto_results.events() if e.name() == "[memory]")
    assert largest <= 2 * many.nbytes  # and not one for each of 64 tokens
