"""Both engines go on where a phrase is no verdict (in a thought, quoted, a longer number), and read the same answer."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.rollout.vllm_engine import VllmEngine
from real_fast.score.phrase import PhraseFinder
from real_fast.score.scale import ScoreScale
from real_fast.types import AnswerMode, Rollout, SamplingParams

PHRASE = "So the overall score is "
PROMPT = "Grade it."
THINKS = "Grade it.\n<think>\n"
EOS = 2

# Prompt, what the model writes, what of it is read, the written score.
ANSWERS = [
    (PROMPT, f"Fine. {PHRASE}4. More, and {PHRASE}1", f"Fine. {PHRASE}4. ", 4.0),
    (PROMPT, f"<think>\nIs {PHRASE}5\n right? {PHRASE}4.\n</think>\n\nFine. {PHRASE}2\nMore", "", 2.0),
    (THINKS, f"Is {PHRASE}5.\n right?\n</think>\n\nFine. {PHRASE}2\nMore", "", 2.0),
    (THINKS, f"Is {PHRASE}5.\n right?", "", None),
    (PROMPT, f"<think>\nIs {PHRASE}5 right?", "", None),
    (PROMPT, f'It asks for "{PHRASE}5" at its end. {PHRASE}2\nMore', "", 2.0),
    (PROMPT, f'It says "fine. {PHRASE}2\nMore, and {PHRASE}1', "", 2.0),
    (PROMPT, f"> {PHRASE}5\nThat is {PHRASE}2. More", "", 2.0),
    (PROMPT, f"Fine. {PHRASE}10", "", None),
    (PROMPT, f"Fine. {PHRASE}4.5", "", None),
    (PROMPT, f"Fine. {PHRASE}4", "", 4.0),
]


def by_transformers(
    make: Callable[..., Any], tokenizer: Any, scale: ScoreScale, prompt: str, text: str, answer: AnswerMode
) -> tuple[Rollout, int]:
    """A rollout of a model that writes `text`, and how many tokens were sampled for it."""
    engine = TransformersEngine(make(vocab_size=49152, hidden_size=16), tokenizer, scale)
    script, forward = [*tokenizer.encode(text), EOS], engine._forward
    steps: list[int] = []

    def written(*args: Any) -> tuple[torch.Tensor, Any]:
        logits, cache = forward(*args)
        if len(steps) < len(script):
            logits = logits.clone()
            logits[:, script[len(steps)]] = 50.0
        steps.append(1)
        return logits, cache

    engine._forward = written  # type: ignore[method-assign]
    sampling = SamplingParams(n=1, max_tokens=200, temperature=0, answer=answer)
    [[rollout]] = engine.generate([tokenizer.encode(prompt)], sampling)
    return rollout, len(steps)


def by_vllm(tokenizer: Any, scale: ScoreScale, prompt: str, text: str, answer: AnswerMode) -> tuple[Rollout, list[Any]]:
    """The same with requests that are answered as vLLM does it, stop strings and all; the requests that sampled."""
    engine = VllmEngine.__new__(VllmEngine)
    engine.tokenizer, engine.scale, engine.finder = tokenizer, scale, PhraseFinder(tokenizer, scale)
    engine.eos_ids, engine.max_model_len, engine._processed = frozenset({EOS}), 1000, True
    engine.vocabulary, engine._asleep = 49152, False
    script, start, asked = [*tokenizer.encode(text), EOS], len(tokenizer.encode(prompt)), []
    every = sorted({*script, *scale.score_ids})

    def flat(steps: int) -> SimpleNamespace:
        """Of each step, every token's log-probability, as vLLM's flat ones lie."""
        starts = [i * len(every) for i in range(steps)]
        ends = [start + len(every) for start in starts]
        tokens, numbers = every * steps, [-1.0] * len(every) * steps
        return SimpleNamespace(start_indices=starts, end_indices=ends, token_ids=tokens, logprobs=numbers)

    def run(prompts: list[list[int]], params: list[Any]) -> list[Any]:
        outputs = []
        for ids, p in zip(prompts, params, strict=True):
            if not hasattr(p, "stop"):  # the score, read behind a context
                outputs.append(SimpleNamespace(outputs=[SimpleNamespace(index=0, token_ids=[EOS], logprobs=flat(1))]))
                continue
            asked.append(p)
            rest: list[int] = []
            for token in script[len(ids) - start :][: p.max_tokens]:
                rest.append(token)
                if token == EOS or any(s in engine.finder.decode(rest) for s in p.stop):
                    break
            completion = SimpleNamespace(index=0, token_ids=rest, logprobs=flat(len(rest)))
            outputs.append(SimpleNamespace(outputs=[completion]))
        return outputs

    engine._run = run  # type: ignore[method-assign]
    engine._params = lambda _, **kwargs: SimpleNamespace(**kwargs)  # type: ignore[method-assign]
    sampling = SamplingParams(n=1, max_tokens=200, temperature=0, answer=answer)
    [[rollout]] = engine.generate([tokenizer.encode(prompt)], sampling)
    return rollout, asked


@pytest.mark.parametrize("answer", ["forced", "generated", "cut"])
@pytest.mark.parametrize(("prompt", "text", "read", "score"), ANSWERS)
def test_both_engines_read_the_same_verdict(
    tiny_llama: Callable[..., Any],
    smollm2_tokenizer: Any,
    scale: ScoreScale,
    prompt: str,
    text: str,
    read: str,
    score: float | None,
    answer: AnswerMode,
) -> None:
    ours, steps = by_transformers(tiny_llama, smollm2_tokenizer, scale, prompt, text, answer)
    theirs, asked = by_vllm(smollm2_tokenizer, scale, prompt, text, answer)
    assert ours.written_score == theirs.written_score == score
    assert (ours.context_ids, ours.sampled_ids, ours.finish) == (theirs.context_ids, theirs.sampled_ids, theirs.finish)
    assert ours.has_score == theirs.has_score == (answer != "generated" or score is not None)
    if ours.has_score:  # what is appended is an answer, in a thought that was cut off too
        finder = PhraseFinder(smollm2_tokenizer, scale)
        assert list(finder.places(ours.context_ids, ours.text, finder.thought(smollm2_tokenizer.encode(prompt))))
    assert len(asked) <= 6
    if score is not None:
        before = text.rpartition(f"{PHRASE}{score:g}")[0]
        assert ours.text == before + PHRASE if answer != "cut" else ours.text.startswith(before.rstrip())
    if "More" in text:  # the engine stopped soon behind the verdict
        assert steps <= len(smollm2_tokenizer.encode(text.partition("More")[0])) + 1


def test_sampling_goes_on_with_seeds_of_its_own(smollm2_tokenizer: Any, scale: ScoreScale) -> None:
    text = f"<think>{PHRASE}5 and {PHRASE}4</think> {PHRASE}2\n"
    _, asked = by_vllm(smollm2_tokenizer, scale, PROMPT, text, "forced")
    # At the first phrase; to the thought's end; to the verdict; a token behind it, which may belong to the number.
    assert [(p.stop[:1], p.max_tokens == 1) for p in asked] == [
        ([PHRASE + "1"], False),
        (["</think>"], False),
        ([PHRASE + "1"], False),
        ([], True),
    ]
    assert len({p.seed for p in asked}) == 4
