"""Every argument of a Judge is checked at construction; the message names it and what is allowed."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from real_fast import Judge
from real_fast.config import PromptConfig, RolloutConfig, ScaleConfig
from real_fast.errors import ConfigError
from real_fast.judging.prometheus_eval import VLLM
from tests.judging.fakes import FakeEngine, rollout


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("engine", "vlm", "engine is 'vlm': it must be one of auto, transformers, vllm"),
        ("engine", None, "engine is None: it must be one of"),
        ("precision", "fp16", "precision is 'fp16': it must be one of"),
        ("device", "cuda:1", "device is 'cuda:1': it must be one of auto, cpu, cuda"),
        ("protocol", "reel", "protocol is 'reel': it must be one of real, tract, raft, decode"),
        ("n", 0, "n is 0: it must be above 0"),
        ("n", 2.5, "n is 2.5: it must be a whole number"),
        ("n", True, "n is True: it must be a whole number"),
        ("n", "5", "n is '5': it must be a whole number"),
        ("temperature", -0.1, "temperature is -0.1: it must be 0 or more"),
        ("temperature", float("nan"), "temperature is nan"),
        ("temperature", "hot", "temperature is 'hot': it must be a number"),
        ("renormalize", "no", "renormalize is 'no': it must be True or False"),
        ("trust_remote_code", 1, "trust_remote_code is 1: it must be True or False"),
        ("scale", [3], "scale is [3]: give at least two different numbers"),
        ("scale", [1, 1, 2], "scale is [1, 1, 2]: give at least two different numbers"),
        ("scale", "12345", "scale is '12345'"),
        ("scale", 5, "scale is 5"),
        ("scale", [1, None], "scale is [1, None]"),
        ("scale", [1, float("nan")], "scale is [1, nan]"),
        ("prompt", "short", "prompt is 'short': give a mapping such as {'template': 'short'}, or a PromptConfig"),
        ("prompt", {"max_tokens": 0}, "prompt.max_tokens is 0: it must be above 0"),
        ("prompt", PromptConfig(max_tokens="many"), "prompt.max_tokens is 'many': it must be a whole number"),
        ("rollout", 512, "rollout is 512: give a mapping such as {'max_tokens': 256}, or a RolloutConfig"),
        ("rollout", RolloutConfig(answer="maybe"), "rollout.answer is 'maybe': it must be one of forced, generated"),
        ("rollout", RolloutConfig(max_num_seqs=0), "rollout.max_num_seqs is 0: it must be above 0"),
        ("rollout", {"top_p": 1.5}, "rollout.top_p is 1.5: it must be above 0 and at most 1"),
        ("tokenizer", Path("Qwen"), "tokenizer is PosixPath('Qwen'): give a loaded one"),
        ("tokenizer", "Qwen/Qwen3-0.6B", "tokenizer is 'Qwen/Qwen3-0.6B': give a loaded one"),
    ],
)
def test_what_cannot_be_is_refused_by_name(folder: Path, argument: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Judge(folder, **{argument: value})
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        (
            "max_tokens",
            "did you mean rollout={'max_tokens': ...} or prompt={'max_tokens': ...}? It takes model, scale, ",
        ),
        ("phrase", "did you mean scale=ScaleConfig(phrase=...)? It takes "),
        ("temprature", "did you mean temperature? It takes "),
        ("self_consistency", ". It takes model, scale, engine, n, temperature, protocol, prompt, rollout, "),
    ],
)
def test_an_argument_that_there_is_not_is_refused_by_name(folder: Path, argument: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Judge(folder, **{argument: 8})
    assert str(refused.value).startswith(f"Judge has no argument {argument!r}") and says in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        VLLM("m", **{argument: 8})
    assert str(refused.value).startswith(f"VLLM has no argument {argument!r}")


def test_so_are_those_of_its_calls(with_engine: Callable[..., Judge]) -> None:
    judge: Any = with_engine(FakeEngine([rollout([0.2] * 5)]))
    with pytest.raises(ConfigError, match=r"^grade has no argument 'rubrics': did you mean rubric\? It takes instr"):
        judge.grade("Name a fruit.", "An apple.", rubrics="Is it one?")
    with pytest.raises(ConfigError, match=r"agrade_batch has no argument 'n'. It takes rows, seed$"):
        asyncio.run(judge.agrade_batch([], n=2))
    with pytest.raises(ConfigError, match=r"^absolute_grade has no argument 'response': did you mean responses\?"):
        judge.absolute_grade(instructions=[], response=[])
    assert inspect.iscoroutinefunction(judge.agrade) and "reference_answer" in inspect.signature(judge.grade).parameters


@pytest.mark.parametrize("model", [None, "", 7])
def test_a_model_is_a_name_or_a_model(model: Any) -> None:
    with pytest.raises(ConfigError, match=f"^model is {model!r}: give a folder, a hub name or a loaded"):
        Judge(model)


def test_a_loaded_model_writes_text(tiny_llama: Any, smollm2_tokenizer: Any) -> None:
    other = AutoModelForSequenceClassification.from_config(tiny_llama().config)
    for model, name in ((other, "LlamaForSequenceClassification"), (tiny_llama().model, "LlamaModel")):
        with pytest.raises(ConfigError, match=f"^model is {name}: give a folder, .*AutoModelForCausalLM"):
            Judge(model, tokenizer=smollm2_tokenizer)


def test_what_can_be_is_taken(with_engine: Callable[..., Judge]) -> None:
    judge = with_engine(FakeEngine([]), scale=range(1, 4), n=np.int64(2), temperature=0, protocol="tract")
    assert judge.scale.values == (1, 2, 3) and judge.config.eval.n == 2
    assert with_engine(FakeEngine([]), scale=np.arange(1, 3)).scale.texts == ("1", "2")
    assert with_engine(FakeEngine([]), scale=ScaleConfig([1, 2])).scale.phrase == "So the overall score is "
