"""Real vLLM with a random model of two layers: a sync reaches every weight, and long prompts are computed whole."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from real_fast.config import Config, RolloutConfig, TrainConfig
from real_fast.errors import EngineMismatchError
from real_fast.rollout.agreement import EngineGap
from real_fast.rollout.engine import RolloutEngine
from real_fast.rollout.make import make_engine
from real_fast.score.scale import ScoreScale
from real_fast.types import SamplingParams
from tests.rollout.plain_agreement import plain_compare, trainer_logprobs_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

PROMPTS = [[3, 14, 15, 92], [65, 35, 89, 79, 32, 38]]
# Parts of parameter names, and noise as a share of their own spread: about a hundred updates' worth.
GROUPS = {
    "embedding": ("embed_tokens", 0.1),
    "head": ("lm_head", 0.3),
    "attention": ("self_attn", 0.3),
    "mlp": ("mlp", 0.3),
    "norms": ("norm", 0.3),
}


@pytest.fixture(scope="module", params=[("fp32", True), ("bf16", False)], ids=["fp32-tied", "bf16-untied"])
def pair(
    request: pytest.FixtureRequest,
    tiny_llama: Callable[..., Any],
    golden_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[RolloutEngine, Any, ScoreScale]]:
    """An engine, the trainer that it was made for, and the scale. SmolLM2's engine is the third case, bf16 and tied,
    where the CPU has the instructions.
    """
    from transformers import AutoTokenizer

    precision, tied = request.param
    folder = tmp_path_factory.mktemp("synced")
    tokenizer = AutoTokenizer.from_pretrained(golden_model)
    trainer = tiny_llama(tied, len(tokenizer), 128, head_dim=32, initializer_range=0.08)
    trainer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    scale = ScoreScale.from_tokenizer(tokenizer, [1, 2, 3, 4, 5], "Score: ")
    config = Config(rollout=RolloutConfig(engine="vllm", max_tokens=16), train=TrainConfig(precision=precision))
    config.prompt.max_tokens = 300
    engine = make_engine(config, trainer, tokenizer, scale, folder)
    yield engine, trainer, scale
    engine.close()


def gap(engine: RolloutEngine, trainer: Any, scale: ScoreScale) -> EngineGap:
    groups = engine.generate(PROMPTS, SamplingParams(n=4, max_tokens=16))
    each = [prompt for prompt, group in zip(PROMPTS, groups, strict=True) for _ in group]
    rollouts = [rollout for group in groups for rollout in group]
    return plain_compare(rollouts, *trainer_logprobs_of(trainer, each, rollouts, scale, 1.0), scale)


@pytest.mark.parametrize("group", GROUPS)
def test_a_sync_reaches_each_group_of_weights(pair: tuple[RolloutEngine, Any, ScoreScale], group: str) -> None:
    engine, trainer, scale = pair
    part, share = GROUPS[group]
    chosen = {name: weight for name, weight in trainer.named_parameters() if part in name}
    if not chosen:
        assert group == "head" and trainer.config.tie_word_embeddings
        return
    saved = {name: weight.detach().clone() for name, weight in chosen.items()}
    gap(engine, trainer, scale).raise_if_above(RolloutConfig(), 0, engine.dtype)
    noise = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for weight in chosen.values():
                spread = weight.std() if weight.ndim > 1 else weight.abs().mean()
                weight += share * spread * torch.randn(weight.shape, generator=noise)
        with pytest.raises(EngineMismatchError, match=r"step 1: .*a sync was missed"):
            gap(engine, trainer, scale).raise_if_above(RolloutConfig(), 1, engine.dtype)
        engine.sync(trainer.named_parameters())
        gap(engine, trainer, scale).raise_if_above(RolloutConfig(), 2, engine.dtype)
    finally:
        with torch.no_grad():
            for name, weight in chosen.items():
                weight.copy_(saved[name])
        engine.sync(trainer.named_parameters())


def test_more_prompt_tokens_than_fit_into_a_step(pair: tuple[RolloutEngine, Any, ScoreScale]) -> None:
    """Where vLLM splits a prompt over two steps, seeded sampling on CPU fails."""
    prompts = [([i + 100, 50, 39, 81, 26, 40, 82] * 42)[:290] for i in range(15)]
    assert sum(map(len, prompts)) > 4096
    groups = pair[0].generate(prompts, SamplingParams(n=1, max_tokens=1, answer="generated"))
    assert all(len(group[0].sampled_ids) == 1 for group in groups)
