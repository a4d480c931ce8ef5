"""The vLLM engine with real vLLM and SmolLM2: one engine for the whole file."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from real_fast.config import Config, RolloutConfig
from real_fast.errors import ConfigError, EngineError, EngineMismatchError, ModelError
from real_fast.model.precision import dtype_of, resolve
from real_fast.rollout.agreement import EngineGap, limits
from real_fast.rollout.checked import sample
from real_fast.rollout.make import make_engine
from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.rollout.vllm_engine import VllmEngine
from real_fast.score.scale import ScoreScale
from real_fast.types import Rollout, SamplingParams
from tests.rollout.plain_agreement import plain_compare, trainer_logprobs_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

# The engine computes in what `train.precision: auto` takes here (bf16 without the instructions is six times slower
# than fp32; test_vllm_sync.py has both everywhere), the trainer in fp32, from the same weights: what rounding explains
# is the default of the check. Noise of a tenth of their spread in the last layer's weights alone, which the engine does
# not know of, makes 0.19 to 0.32.
PRECISION = resolve("auto", torch.device("cpu"))
DTYPE = dtype_of(PRECISION)
CHECK = RolloutConfig(check_score=0.02 if PRECISION == "bf16" else None)  # the trainer does not round here
STALE = 2 * limits(CHECK, torch.bfloat16)[0]


@dataclasses.dataclass
class Setup:
    engine: VllmEngine
    trainer: Any
    tokenizer: Any
    scale: ScoreScale
    state_before: dict[str, Any]
    state_after: dict[str, Any]

    def gap(self, prompts: list[list[int]], groups: list[list[Rollout]], temperature: float) -> EngineGap:
        pairs = [(prompt, rollout) for prompt, group in zip(prompts, groups, strict=True) for rollout in group]
        rollouts = [rollout for _, rollout in pairs]
        found = trainer_logprobs_of(self.trainer, [p for p, _ in pairs], rollouts, self.scale, temperature)
        return plain_compare(rollouts, *found, self.scale)


def sampled(groups: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[list(rollout.sampled_ids) for rollout in group] for group in groups]


def process_state() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "cores": os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
    }


@pytest.fixture(scope="module")
def setup(smollm2: Path, smollm2_tokenizer: Any) -> Iterator[Setup]:
    from transformers import AutoModelForCausalLM

    scale = ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2, 3, 4, 5], "So the overall score is ")
    trainer = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    config = Config(model="m", output="o", rollout=RolloutConfig(engine="vllm", max_tokens=64, max_num_seqs=32))
    config.prompt.max_tokens, config.train.precision = 300, PRECISION
    before = process_state()
    engine = make_engine(config, trainer, smollm2_tokenizer, scale, smollm2)
    after = process_state()
    assert isinstance(engine, VllmEngine)
    yield Setup(engine, trainer, smollm2_tokenizer, scale, before, after)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([[1]], SamplingParams(n=1, max_tokens=1))


@pytest.fixture(scope="module")
def examples(setup: Setup) -> list[list[int]]:
    """Prompts whose examples make the model write the phrase itself, most of the time."""
    shown = (
        ("apple, pear", "Both are fruits.", 5),
        ("apple, chair", "One is no fruit.", 3),
        ("car, chair", "None is.", 1),
    )
    head = "".join(f"Answer: {a}. Feedback: {f} So the overall score is {s}\n\n" for a, f, s in shown)
    return [setup.tokenizer.encode(f"{head}Answer: {answer}. Feedback:") for answer in ("plum, stone", "kiwi, fig")]


@pytest.fixture(scope="module")
def stories(setup: Setup) -> list[list[int]]:
    return [setup.tokenizer.encode(text) for text in ("Once upon a time", "The weather in the north of the country is")]


def test_the_process_is_left_as_it_was(setup: Setup) -> None:
    assert setup.state_after == setup.state_before


def test_generating_uses_up_no_random_numbers_of_ours(setup: Setup, stories: list[list[int]]) -> None:
    before = process_state()
    setup.engine.generate(stories, SamplingParams(n=1, max_tokens=2))
    assert process_state() == before


def test_what_other_threads_draw_meanwhile_is_not_drawn_again(
    setup: Setup, stories: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    llm = setup.engine._llm

    def generate(*args: Any, **kwargs: Any) -> Any:
        drawn.append((random.random(), np.random.random()))
        return type(llm).generate(llm, *args, **kwargs)

    monkeypatch.setattr(llm, "generate", generate)
    for _ in range(2):
        setup.engine.generate(stories, SamplingParams(n=1, max_tokens=2))
    assert all(first != second for first, second in zip(*drawn[:2], strict=True))


def test_an_interrupted_generation_leaves_nothing_for_the_next(
    setup: Setup, stories: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(n=2, max_tokens=6, seed=3)
    want = setup.engine.generate(stories, sampling)
    core = setup.engine._llm.llm_engine
    step, steps = core.step, []

    def interrupted() -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setup.engine.generate(stories, sampling)
    assert not core.has_unfinished_requests()
    found = setup.engine.generate(stories, sampling)
    assert [[r.sampled_ids for r in g] for g in found] == [[r.sampled_ids for r in g] for g in want]


def test_greedy_tokens_are_those_of_the_other_engine_and_of_generate(setup: Setup) -> None:
    prompt = setup.tokenizer.encode("The capital of France is")
    sampling = SamplingParams(n=1, max_tokens=6, temperature=0)
    [[ours]] = setup.engine.generate([prompt], sampling)
    [[theirs]] = TransformersEngine(setup.trainer, setup.tokenizer, setup.scale).generate([prompt], sampling)
    plain = setup.trainer.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
    assert list(ours.sampled_ids) == list(theirs.sampled_ids) == plain
    assert ours.context_ids == theirs.context_ids and ours.text == theirs.text


def test_rounding_stays_below_the_bound_and_one_stale_layer_does_not(setup: Setup, stories: list[list[int]]) -> None:
    groups = setup.engine.generate(stories, SamplingParams(n=2, max_tokens=24))
    setup.gap(stories, groups, 1).raise_if_above(CHECK, 0, DTYPE)
    last = setup.trainer.model.layers[-1]
    saved = {name: parameter.detach().clone() for name, parameter in last.named_parameters()}
    noise = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in last.parameters():
                parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=noise)
        assert setup.gap(stories, groups, 1).logprob_mean > STALE
    finally:
        with torch.no_grad():
            for name, parameter in last.named_parameters():
                parameter.copy_(saved[name])


def test_scores_from_the_pass_that_sampled_them(
    setup: Setup, examples: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[Any]] = []
    run = setup.engine._run

    def recorded(prompts: Any, params: Any) -> Any:
        passes.append(run(prompts, params))
        return passes[-1]

    monkeypatch.setattr(setup.engine, "_run", recorded)
    groups = setup.engine.generate(examples, SamplingParams(n=8, max_tokens=48, answer="generated", seed=1))
    scored = [[rollout for rollout in group if rollout.has_score] for group in groups]
    assert sum(map(len, scored)) >= 4
    # Prompts; one token behind each score, which might go on as a longer number; no pass to read scores alone.
    assert len(passes[0]) == 2 and passes[-1] == []
    assert all(len(output.outputs[0].token_ids) == 1 for output in passes[1])
    raw = [list(completion.token_ids) for output in passes[0] for completion in output.outputs]
    for rollout in (rollout for group in scored for rollout in group):  # generation stopped at the score's token
        assert any(list(rollout.context_ids[: len(r) - 1]) == r[:-1] for r in raw)
    for rollout in (rollout for group in scored for rollout in group):
        assert rollout.written_score in setup.scale.values and rollout.finish == "phrase" and rollout.n_forced == 0
        assert tuple(rollout.context_ids[-1:]) == setup.scale.tail_ids and rollout.text.endswith("score is ")
        assert rollout.sampled_ids == rollout.context_ids[: len(rollout.sampled_ids)]
    setup.gap(examples, scored, 1.0).raise_if_above(CHECK, 0, DTYPE)
    for rollout in (rollout for group in groups for rollout in group if not rollout.has_score):
        assert rollout.score_logprobs is None and rollout.written_score is None


def test_scores_that_nobody_reads_are_not_asked_for(
    setup: Setup, stories: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(n=2, max_tokens=10, seed=2)
    want = setup.engine.generate(stories, sampling)
    passes: list[tuple[Any, Any]] = []
    run = setup.engine._run

    def recorded(prompts: Any, params: Any) -> Any:
        passes.append((params, run(prompts, params)))
        return passes[-1][1]

    monkeypatch.setattr(setup.engine, "_run", recorded)
    found = setup.engine.generate(stories, dataclasses.replace(sampling, scores=False))
    assert sampled(found) == sampled(want) and len(passes[0][0]) == 2 and [p for p, _ in passes[1:]] == [[]]
    assert all(params.logprob_token_ids is None for params in passes[0][0])
    for rollout, scored in zip(found[0] + found[1], want[0] + want[1], strict=True):
        assert rollout.score_logprobs is None and rollout.has_score and rollout.unread
        assert scored.has_score and not scored.unread and rollout.context_ids == scored.context_ids
        assert np.abs(np.subtract(rollout.sampled_logprobs, scored.sampled_logprobs)).max() < 1e-3
    for output in passes[0][1]:
        for completion in output.outputs:
            assert set(completion.logprobs.decoded_tokens) == {None}  # no token was spelled
            assert len(completion.logprobs.logprobs) == len(completion.token_ids)


def test_forced_scores(setup: Setup, stories: list[list[int]]) -> None:
    groups = setup.engine.generate(stories, SamplingParams(n=3, max_tokens=10, seed=2))
    for rollout in (rollout for group in groups for rollout in group):
        assert rollout.finish == "length" and list(rollout.context_ids) == [
            *rollout.sampled_ids,
            *setup.scale.phrase_ids,
        ]
        assert rollout.score_logprobs is not None and rollout.n_forced == len(setup.scale.phrase_ids)
    found = setup.gap(stories, groups, 1.0)
    assert found.tokens == 60 and found.scores == 6
    found.raise_if_above(CHECK, 0, DTYPE)


def test_scores_behind_cut_feedback(setup: Setup, examples: list[list[int]]) -> None:
    groups = setup.engine.generate(examples, SamplingParams(n=4, max_tokens=24, answer="cut"))
    phrase = list(setup.scale.phrase_ids)
    rollouts = [rollout for group in groups for rollout in group]
    assert all(list(rollout.context_ids) == [*rollout.sampled_ids, *phrase] for rollout in rollouts)
    assert any(rollout.finish == "phrase" for rollout in rollouts)
    setup.gap(examples, groups, 1.0).raise_if_above(CHECK, 0, DTYPE)


def test_scores_without_feedback(setup: Setup, examples: list[list[int]]) -> None:
    groups = setup.engine.generate(examples, SamplingParams(n=1, max_tokens=1, answer="none"))
    assert all(not r.sampled_ids and list(r.context_ids) == list(setup.scale.phrase_ids) for [r] in groups)
    assert setup.gap(examples, groups, 1.0).scores == len(examples)
    setup.gap(examples, groups, 1.0).raise_if_above(CHECK, 0, DTYPE)


def test_eos_is_an_action_and_no_context(setup: Setup) -> None:
    prompt = setup.tokenizer.encode("<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n")
    groups = setup.engine.generate([prompt], SamplingParams(n=8, max_tokens=40, seed=3))
    ended = [rollout for rollout in groups[0] if rollout.finish == "eos"]
    assert ended
    for rollout in ended:
        assert rollout.sampled_ids[-1] in setup.engine.eos_ids
        assert list(rollout.context_ids) == [*rollout.sampled_ids[:-1], *setup.scale.phrase_ids]
    setup.gap([prompt], [ended], 1.0).raise_if_above(CHECK, 0, DTYPE)


def test_another_temperature(setup: Setup, examples: list[list[int]]) -> None:
    """Sampled tokens at the sampling temperature, scores at 1."""
    groups = setup.engine.generate(examples, SamplingParams(n=4, max_tokens=40, temperature=0.5, seed=4))
    rollouts = [rollout for group in groups for rollout in group]
    prompts = [prompt for prompt, group in zip(examples, groups, strict=True) for _ in group]
    logprobs, scores = trainer_logprobs_of(setup.trainer, prompts, rollouts, setup.scale, 0.5)
    plain_compare(rollouts, logprobs, scores, setup.scale).raise_if_above(CHECK, 0, DTYPE)
    with pytest.raises(EngineMismatchError):
        setup.gap(examples[:1], groups[:1], 1.0).raise_if_above(CHECK, 0, DTYPE)
    own = [pair for pair in zip(rollouts, scores, strict=True) if pair[0].written_score is not None]
    assert own
    for rollout, score in own:
        assert score is not None
        assert (torch.tensor(rollout.score_logprobs) - score).abs().max() < 0.25


def test_samples_follow_from_the_seed(setup: Setup, stories: list[list[int]]) -> None:
    sampling = SamplingParams(n=3, max_tokens=8, seed=5)

    def ids(s: SamplingParams) -> list[list[list[int]]]:
        return sampled(setup.engine.generate(stories, s))

    first = ids(sampling)
    assert ids(sampling) == first
    assert ids(dataclasses.replace(sampling, seed=6)) != first
    assert len({tuple(sample) for group in first for sample in group}) == 6


def test_sync_and_stale_weights(setup: Setup, stories: list[list[int]]) -> None:
    stories = [stories[0], (stories[1] * 40)[:290]]  # two blocks of vLLM's prefix cache, which must not outlive a sync
    sampling = SamplingParams(n=1, max_tokens=12, temperature=0)
    before = setup.engine.generate(stories, sampling)
    saved = {name: tensor.detach().clone() for name, tensor in setup.trainer.named_parameters()}
    try:
        with torch.no_grad():
            for parameter in setup.trainer.model.layers[-4:].parameters():
                parameter.mul_(0.5)
        # The engine has a copy: what the trainer does to its weights in place is not in it yet.
        still = setup.engine.generate(stories, sampling)
        assert sampled(still) == sampled(before)
        with pytest.raises(EngineMismatchError, match="step 3"):
            setup.gap(stories, still, 0).raise_if_above(RolloutConfig(), 3, setup.engine.dtype)
        setup.engine.sync(setup.trainer.state_dict().items())  # the tied head may come along
        changed = setup.engine.generate(stories, sampling)
        assert sampled(changed) != sampled(before)
        setup.gap(stories, changed, 0).raise_if_above(CHECK, 4, DTYPE)
    finally:
        with torch.no_grad():
            for name, parameter in setup.trainer.named_parameters():
                parameter.copy_(saved[name])
        setup.engine.sync(setup.trainer.named_parameters())
    again = setup.engine.generate(stories, sampling)
    assert sampled(again) == sampled(before)


def test_sync_errors_name_the_weight(setup: Setup) -> None:
    weights = dict(setup.trainer.named_parameters())
    try:
        with pytest.raises(ValueError, match=r"'model\.layers\.99\.x'"):
            setup.engine.sync([("model.layers.99.x", torch.zeros(1))])
        with pytest.raises(ValueError, match=r"1 of the model's weights: model\.norm\.weight"):
            setup.engine.sync((name, weight) for name, weight in weights.items() if name != "model.norm.weight")
    finally:
        setup.engine.sync(weights.items())


def test_what_cannot_be_done_is_refused_before_work(
    setup: Setup, stories: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.engine, "_run", lambda *_: pytest.fail("work was done before the error"))
    limit = 300 + 64 + setup.scale.most_appended + 1
    with pytest.raises(ValueError, match=f"prompt 1 has 301 tokens, and a sequence may have {limit}"):
        setup.engine.generate([stories[0], [5] * 301], SamplingParams(n=1, max_tokens=64))
    with pytest.raises(ValueError, match=r"it is 0\.001"):
        setup.engine.generate(stories, SamplingParams(n=1, max_tokens=4, temperature=0.001))
    with pytest.raises(ValueError, match=r"top_p 0\.9"):
        setup.engine.generate(stories, SamplingParams(n=1, max_tokens=4, top_p=0.9))
    monkeypatch.setattr(setup.engine, "_processed", False)  # as an engine made for top_p below 1
    with pytest.raises(ValueError, match=r"the temperature is 0\.7"):
        setup.engine.generate(stories, SamplingParams(n=1, max_tokens=4, top_p=0.9, temperature=0.7))


def test_what_vllm_mixes_up_leaves_out_or_breaks_off_is_refused(
    setup: Setup, stories: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling, names = SamplingParams(n=2, max_tokens=8, seed=4), [f"row-{i}" for i in range(len(stories))]
    want, llm = sampled(sample(setup.engine, stories, sampling, setup.scale, names)), setup.engine._llm
    generate = llm.generate

    def changed(change: Any) -> Any:
        return lambda *args, **kwargs: change(generate(*args, **kwargs))

    def less(outputs: Any) -> Any:
        outputs[0].outputs.pop()
        return outputs

    def emptied(outputs: Any) -> Any:
        outputs[0].outputs[1].token_ids = []
        return outputs

    def dies(*_: Any) -> Any:
        raise RuntimeError("EngineCore encountered an issue")

    for where, name, wrong, message in (
        (llm, "generate", changed(lambda outputs: outputs[::-1]), "row 'row-.': .* the answer to another prompt"),
        (llm, "generate", changed(lambda outputs: outputs[:-1]), "vllm failed while it sampled .*'row-0'"),
        (llm, "generate", changed(less), r"row 'row-.': .* samples \[0\], where 0 to 1 were asked for"),
        (llm, "generate", changed(emptied), "row 'row-.': .* an empty text"),
        (llm.llm_engine, "step", dies, "vllm failed while it sampled .*RuntimeError: EngineCore encountered"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, wrong)
            with pytest.raises(EngineError, match=message):
                sample(setup.engine, stories, sampling, setup.scale, names)
    assert sampled(setup.engine.generate(stories, sampling)) == want


def test_a_folder_without_safetensors(smollm2_tokenizer: Any, setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither"):
        VllmEngine(tmp_path, smollm2_tokenizer, setup.scale, dtype=torch.bfloat16, max_model_len=128)


def test_a_first_pass_that_fails_is_one_sentence() -> None:
    """A head of 4 numbers, which vLLM's attention on a CPU has no code for, shows no earlier."""

    class Broken:
        def __init__(self) -> None:
            self.llm_engine = self.output_processor = self
            self.request_states: dict[str, Any] = {}

        def generate(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("Unsupported CPU attention configuration:\n head_dim=4")

        def abort_request(self, *_: Any, **__: Any) -> None:
            pass

    engine = object.__new__(VllmEngine)
    engine._llm, engine._has_run, engine._adapter = Broken(), False, None
    with pytest.raises(ConfigError, match=r"cannot compute this model here: Unsupported .* head_dim=4.*transformers"):
        engine._run([[1]], [None])
    engine._has_run = True
    with pytest.raises(RuntimeError, match=r"^Unsupported"):
        engine._run([[1]], [None])
    engine._llm = None
