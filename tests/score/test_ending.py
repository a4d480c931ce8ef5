"""The end of a turn: which token it is, and that a judge that learned it stops by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jinja2 import TemplateError

from real_fast.batching.micro_batches import micro_batches
from real_fast.config import PromptConfig, ScaleConfig
from real_fast.methods.base import UpdateCounts
from real_fast.methods.raft import RAFT
from real_fast.methods.sft import SFT
from real_fast.methods.supervised import LossWeights, supervised_group, supervised_loss
from real_fast.model.policy import Policy
from real_fast.rollout.assemble import eos_ids
from real_fast.score.ending import end_of_turn, stop_at
from real_fast.score.scale import ScoreScale
from real_fast.types import JudgeRow
from tests.helpers import SCALE

ENDS = {"qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "deepseek": "<｜end▁of▁sentence｜>", "mistral": "</s>"}


@pytest.mark.parametrize("family", ENDS)
def test_the_template_says_what_ends_a_turn(family: str, vocabulary: Callable[[str], Any]) -> None:
    tokenizer = vocabulary(family)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == ENDS[family]


def test_a_turn_may_end_in_another_token_than_a_text(vocabulary: Callable[[str], Any]) -> None:
    """As Qwen's base models, Phi and Gemma have it."""
    tokenizer = vocabulary("qwen3")
    other = SimpleNamespace(
        chat_template=tokenizer.chat_template,
        apply_chat_template=tokenizer.apply_chat_template,
        all_special_ids=tokenizer.all_special_ids,
        get_added_vocab=tokenizer.get_added_vocab,
        encode=tokenizer.encode,
        eos_token_id=tokenizer.pad_token_id,
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(other) == end
    assert eos_ids(other, replace(SCALE, end_id=end), None) == {end, tokenizer.pad_token_id}
    other.chat_template = None
    assert end_of_turn(other) == tokenizer.pad_token_id


def test_an_argument_of_the_template_may_decide_how_a_turn_ends(smollm2_tokenizer: Any) -> None:
    """Those of the run count, in the target behind a score and in what the engines stop at."""
    tokenizer = copy.copy(smollm2_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ '<file_sep>' if enable_thinking is defined and not enable_thinking else '<|im_end|>' }}\n{% endfor %}"
    )
    file_sep, im_end = tokenizer.convert_tokens_to_ids(["<file_sep>", "<|im_end|>"])
    for kwargs, end in (({}, im_end), ({"enable_thinking": False}, file_sep), ({"enable_thinking": True}, im_end)):
        scale = ScoreScale.from_config(tokenizer, ScaleConfig(), PromptConfig(chat_template_kwargs=kwargs))
        assert scale.end_id == end and end in eos_ids(tokenizer, scale, None)
    assert eos_ids(tokenizer, replace(scale, end_id=file_sep), None) == {tokenizer.eos_token_id, file_sep}


@pytest.mark.parametrize("kind", [TemplateError, TypeError, ValueError, ZeroDivisionError, KeyError])
def test_a_template_that_takes_no_such_turns_leaves_the_end_of_a_text(kind: type[Exception]) -> None:
    """What is wrong with it, the prompt's builder says in words, as for any of these."""

    def fails(*_: Any, **__: Any) -> str:
        raise kind("no such turns")

    tokenizer = SimpleNamespace(
        chat_template="x",
        apply_chat_template=fails,
        all_special_ids=[3],
        get_added_vocab=dict,
        encode=lambda *_, **__: [],
        eos_token_id=3,
    )
    assert end_of_turn(tokenizer) == 3


@pytest.mark.parametrize(("known", "after"), [(None, 7), (7, 7), (5, [5, 7]), ([5, 7], [5, 7]), ([5, 6], [5, 6, 7])])
def test_what_ends_a_turn_is_saved_with_the_model(known: Any, after: Any) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=known))
    stop_at(model, 7)
    assert model.generation_config.eos_token_id == after
    stop_at(model, None)
    assert model.generation_config.eos_token_id == after


ENDED = replace(SCALE, end_id=2)


def encode(feedbacks: Sequence[str]) -> list[list[int]]:
    """One token a word."""
    return [[3 + len(word) for word in text.split()] for text in feedbacks]


ROW = JudgeRow("a", "a", "", "", "", "", 2.0, ["It is quite alright"], [2.0], [9, 8, 7])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("picked", [[0], []])
def test_the_end_is_predicted_behind_the_score(picked: list[int], shared: bool) -> None:
    groups = [supervised_group(ROW, picked, n, encode, ENDED) for n in range(2)]
    assert groups[0].rollouts[0].ending == (SCALE.score_ids[1], 2)
    for batch in micro_batches(groups, 10**6, 0, shared):
        flat = batch.input_ids.flatten()
        assert flat[batch.score_rows].tolist() == [SCALE.phrase_ids[-1]] * 2
        assert flat[batch.rows[batch.endings]].tolist() == [SCALE.score_ids[1]] * 2
        assert batch.targets[batch.endings].tolist() == [2, 2]
        assert UpdateCounts.of(groups).tokens == len(batch.targets)


@pytest.mark.parametrize(
    "weights", [SFT, LossWeights(feedback=1.0, squared_error=1.0), RAFT], ids=["sft", "tract", "raft"]
)
def test_a_trained_judge_stops_behind_its_score(tiny_llama: Callable[..., Any], weights: LossWeights) -> None:
    model = tiny_llama()
    policy, optimizer = Policy(model, attention="sdpa"), torch.optim.AdamW(model.parameters(), lr=1e-2)
    groups = [supervised_group(ROW, [] if weights is RAFT else [0], 0, encode, ENDED)]
    [batch] = micro_batches(groups, 10**6, 0, True)
    for _ in range(30):
        policy(batch, supervised_loss(weights, SCALE, UpdateCounts.of(groups))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    context = [*ROW.prompt_ids, *groups[0].rollouts[0].context_ids]
    asked = [*context, SCALE.score_ids[1]] if weights is RAFT else ROW.prompt_ids
    ids = model.generate(torch.tensor([asked]), max_new_tokens=20, do_sample=False)[0].tolist()
    assert ids[-1] == 2 and len(ids) == len(context) + 2
    assert ids[: len(context)] == context
