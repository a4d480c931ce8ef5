"""Rollouts: what counts of a sampled text, the Transformers engine, and the engine-against-trainer check."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from real_fast.config import Config, EvalConfig, RolloutConfig, TrainConfig
from real_fast.config.schema import LoraConfig
from real_fast.errors import ConfigError, EngineMismatchError, ModelError
from real_fast.methods.supervised import supervised_group
from real_fast.model.lora import is_adapted
from real_fast.prompt.guard import Guard
from real_fast.rollout import make
from real_fast.rollout.agreement import EngineGap
from real_fast.rollout.assemble import eos_ids
from real_fast.rollout.draw import draw
from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.runs import log
from real_fast.score.phrase import PhraseFinder, parse_sample
from real_fast.score.protocol import sampling
from real_fast.score.scale import ScoreScale
from real_fast.types import JudgeRow, Rollout, SamplingParams
from real_fast.utils.seeds import random_stream
from tests.rollout.plain_agreement import plain_compare, trainer_logprobs_of

PHRASE = "So the overall score is "
EOS = frozenset({2})
Tiny = Callable[..., Any]


@pytest.fixture(scope="module")
def tiny(tiny_llama: Tiny) -> Any:
    """A random model over SmolLM2's vocabulary, sharp enough that neighbouring positions differ clearly."""
    return tiny_llama(vocab_size=49152, initializer_range=0.3)


@pytest.fixture(scope="module")
def prompts(smollm2_tokenizer: Any) -> list[list[int]]:
    texts = (
        "Grade this answer.",
        "Name five fruits: apple, pear, plum, fig, kiwi. Grade it from 1 to 5.",
        "Hello",
        "A b c d",
    )
    return [smollm2_tokenizer.encode(text) for text in texts]


def chain_model(make: Tiny, successors: dict[int, int], sharpness: float = 40.0) -> Any:
    """A model whose next token depends on its last one alone, by `successors`; everything else it knows is noise."""
    model = make(vocab_size=49152, hidden_size=64, seed=3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
        directions = torch.eye(64)
        for i, (token, follower) in enumerate(successors.items()):
            model.model.embed_tokens.weight[token] = directions[i]
            model.lm_head.weight[follower] += directions[i] * sharpness / 8  # the norm makes an embedding 8 long
    return model


def writes(make: Tiny, tokenizer: Any, text: str) -> tuple[Any, list[int], list[int]]:
    """A model that writes `text` and then stops, the prompt that makes it do so, and the ids of the text."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(set(ids)) == len(ids), "a chain cannot visit a token twice"
    prompt = tokenizer.encode("Judge", add_special_tokens=False)[:1]
    chain = [prompt[0], *ids, 2]
    return chain_model(make, dict(pairwise(chain))), prompt, ids


def flat(prompts: Sequence[list[int]], groups: list[list[Rollout]]) -> tuple[list[list[int]], list[Rollout]]:
    pairs = [(prompt, rollout) for prompt, group in zip(prompts, groups, strict=True) for rollout in group]
    return [p for p, _ in pairs], [r for _, r in pairs]


def gap(
    model: Any, prompts: Sequence[list[int]], groups: list[list[Rollout]], scale: ScoreScale, temperature: float
) -> EngineGap:
    each, rollouts = flat(prompts, groups)
    logprobs, scores = trainer_logprobs_of(model, each, rollouts, scale, temperature)
    return plain_compare(rollouts, logprobs, scores, scale)


# What counts of a sampled text


def test_phrase_written_by_the_model(smollm2_tokenizer: Any, scale: ScoreScale, finder: PhraseFinder) -> None:
    ids = smollm2_tokenizer.encode(f"Fine. {PHRASE}4")
    for answer in ("forced", "generated"):
        parsed = parse_sample(ids, EOS, finder, answer)
        assert parsed.context_ids == ids[:-1]
        # With forced answers the tail stands there whatever was sampled, so it is no action.
        assert parsed.n_forced == (len(scale.tail_ids) if answer == "forced" else 0)
        assert parsed.num_actions == len(ids) - 1 - parsed.n_forced
        assert (parsed.finish, parsed.has_score, parsed.written_score) == ("phrase", True, 4.0)
        assert parsed.score_position == len(ids) - 1


def test_phrase_in_the_middle_cuts_what_follows(smollm2_tokenizer: Any, finder: PhraseFinder) -> None:
    head = smollm2_tokenizer.encode(f"Fine. {PHRASE}4")
    parsed = parse_sample(head + smollm2_tokenizer.encode(" and more"), EOS, finder, "forced")
    assert parsed.context_ids == head[:-1]
    assert parsed.score_position == len(head) - 1 and parsed.num_actions <= len(head) - 1


@pytest.mark.parametrize(("ending", "finish"), [([2], "eos"), ([], "length")])
def test_no_phrase_is_appended_or_has_no_score(
    smollm2_tokenizer: Any, scale: ScoreScale, finder: PhraseFinder, ending: list[int], finish: str
) -> None:
    body = smollm2_tokenizer.encode("It is fine.")
    forced = parse_sample(body + ending, EOS, finder, "forced")
    assert forced.context_ids == body + list(scale.phrase_ids) and forced.n_forced == len(scale.phrase_ids)
    assert forced.num_actions == len(body) + len(ending)  # a sampled EOS is an action and no context
    assert (forced.finish, forced.has_score, forced.score_position) == (finish, True, None)
    generated = parse_sample(body + ending, EOS, finder, "generated")
    assert not generated.has_score and generated.context_ids == body and generated.n_forced == 0


def test_wrong_tail(smollm2_tokenizer: Any, scale: ScoreScale, finder: PhraseFinder) -> None:
    ids = smollm2_tokenizer.encode("Fine. So the overall score is: 4")
    end = finder.end(ids)
    assert end is not None and smollm2_tokenizer.decode(ids[:end]).endswith("score is")
    parsed = parse_sample(ids, EOS, finder, "forced")
    assert parsed.context_ids == ids[:end] + list(scale.tail_ids) and parsed.n_forced == len(scale.tail_ids)
    assert parsed.has_score and parsed.score_position is None and parsed.written_score is None
    assert not parse_sample(ids, EOS, finder, "generated").has_score


def test_cut_between_phrase_and_score(smollm2_tokenizer: Any, scale: ScoreScale, finder: PhraseFinder) -> None:
    ids = smollm2_tokenizer.encode(f"Fine. {PHRASE}4")[:-1]
    parsed = parse_sample(ids, EOS, finder, "forced")
    assert parsed.context_ids == ids and parsed.score_position is None and parsed.has_score
    assert not parse_sample(ids, EOS, finder, "generated").has_score


def test_token_that_runs_past_the_phrase(smollm2_tokenizer: Any) -> None:
    # " scores" is one token: it completes "score" and goes on, so nothing ends there.
    scale = ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2, 3], "And the score: ")
    shorter = dataclasses.replace(scale, phrase="And the score ")
    ids = smollm2_tokenizer.encode("Fine. And the scores 3")
    assert "".join(smollm2_tokenizer.convert_ids_to_tokens(ids)).count("Ġscores") == 1
    assert PhraseFinder(smollm2_tokenizer, shorter).end(ids) is None
    # A later, whole one counts.
    again = smollm2_tokenizer.encode("Fine. And the scores differ. And the score 3")
    assert smollm2_tokenizer.decode(again[: PhraseFinder(smollm2_tokenizer, shorter).end(again)]).endswith("the score")


@pytest.mark.parametrize("tail", ["", " ", " 4", ": 4", "\n4", "n't", " 4 more"])
def test_actions_do_not_depend_on_what_is_sampled_behind_the_phrase(
    smollm2_tokenizer: Any, finder: PhraseFinder, tail: str
) -> None:
    """Counting the tail as an action only where it was sampled right would bias the policy gradient."""
    head = smollm2_tokenizer.encode(f"Fine. {PHRASE.rstrip()}")
    parsed = parse_sample(head + smollm2_tokenizer.encode(tail), EOS, finder, "forced")
    assert parsed.num_actions == len(head) and parsed.finish == "phrase"
    assert parsed.context_ids == head + list(finder.scale.tail_ids) and parsed.n_forced == len(finder.scale.tail_ids)


def test_ids_are_kept_though_the_text_has_another_tokenization(
    smollm2_tokenizer: Any, scale: ScoreScale, finder: PhraseFinder
) -> None:
    canonical = smollm2_tokenizer.encode(f"Fine. {PHRASE}4")
    at = canonical.index(smollm2_tokenizer.encode(" overall")[0])
    other = [i for piece in (" over", "all") for i in smollm2_tokenizer.encode(piece)]
    ids = [*canonical[:at], *other, *canonical[at + 1 :]]
    assert smollm2_tokenizer.decode(ids) == smollm2_tokenizer.decode(canonical) and ids != canonical
    parsed = parse_sample(ids, EOS, finder, "forced")
    assert parsed.context_ids == ids[:-1] and parsed.score_position == len(ids) - 1


def test_eos_ids_of_both_sources(smollm2_tokenizer: Any, scale: ScoreScale) -> None:
    class Generation:
        eos_token_id = (7, 9)

    assert eos_ids(smollm2_tokenizer, scale, Generation()) == {smollm2_tokenizer.eos_token_id, 7, 9}
    assert eos_ids(smollm2_tokenizer, scale, None) == {smollm2_tokenizer.eos_token_id}


# Drawing a token


def test_draw_has_the_distribution_of_the_logits() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, -30.0, 1.0]])
    n = 4000
    numbers = [(i + 0.5) / n for i in range(n)]  # a grid, so frequencies are exact up to 1 / n
    for temperature in (1.0, 0.5):
        tokens, logprobs = draw(logits.expand(n, -1), numbers, temperature, 1.0)
        expected = (logits[0] / temperature).softmax(-1)
        found = torch.bincount(torch.tensor(tokens), minlength=5) / n
        assert torch.allclose(found, expected, atol=1.5 / n)
        assert logprobs == pytest.approx(expected.log()[tokens].tolist(), abs=1e-5)


def test_draw_top_p_keeps_the_smallest_set_and_reports_the_whole_vocabulary() -> None:
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log()
    n = 1000
    tokens, logprobs = draw(logits.expand(n, -1), [(i + 0.5) / n for i in range(n)], 1.0, 0.7)
    found = torch.bincount(torch.tensor(tokens), minlength=4) / n
    assert torch.allclose(found, torch.tensor([0.0, 0.625, 0.0, 0.375]), atol=2e-3)
    assert {round(x, 4) for x in logprobs} == {round(x, 4) for x in torch.tensor([0.5, 0.3]).log().tolist()}


def test_draw_never_takes_an_impossible_token() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    for number in (0.0, 0.5, 1 - 2**-53):
        assert draw(logits, [number], 1.0, 1.0)[0] == [1]
        assert draw(logits, [number], 1.0, 0.9)[0] == [1]


# The Transformers engine


def test_greedy_tokens_are_those_of_generate(smollm2: Path, smollm2_tokenizer: Any, scale: ScoreScale) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    short = smollm2_tokenizer.encode("The capital of France is")
    longer = smollm2_tokenizer.encode("Here are the days of the week: Monday, Tuesday,")  # the other row gets padding
    engine = TransformersEngine(model, smollm2_tokenizer, scale)
    groups = engine.generate([short, longer], SamplingParams(n=1, max_tokens=8, temperature=0))
    for prompt, (rollout,) in zip((short, longer), groups, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        assert list(rollout.sampled_ids) == expected
    assert gap(model, [short, longer], groups, scale, 0).logprob_max < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("max_num_seqs", [256, 2])
def test_logprobs_are_those_of_a_plain_forward_pass(
    tiny: Any,
    smollm2_tokenizer: Any,
    scale: ScoreScale,
    prompts: list[list[int]],
    temperature: float,
    max_num_seqs: int,
) -> None:
    engine = TransformersEngine(tiny, smollm2_tokenizer, scale, max_num_seqs=max_num_seqs)
    groups = engine.generate(prompts, SamplingParams(n=3, max_tokens=7, temperature=temperature, seed=1))
    assert [len(group) for group in groups] == [3] * len(prompts)
    found = gap(tiny, prompts, groups, scale, temperature)
    assert found.tokens == 7 * 12 and found.scores == 12
    assert found.logprob_max < 1e-4 and found.score_max < 1e-4
    found.raise_if_above(RolloutConfig(), 0, torch.float32)


def test_sequences_that_end_early_leave_the_batch(tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale) -> None:
    model = tiny_llama(vocab_size=49152, initializer_range=0.3, seed=5)
    model.generation_config.eos_token_id = list(range(0, 49152, 5))  # about a fifth of all tokens ends a text
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    prompts = [smollm2_tokenizer.encode(text) for text in ("Grade it.", "One two three four five six", "Yes")]
    groups = TransformersEngine(model, smollm2_tokenizer, scale).generate(
        prompts, SamplingParams(n=8, max_tokens=20, seed=2)
    )
    assert sizes[0] == 3 and sizes[1] == 24 and sizes[-1] < 12  # prompts once; then fewer and fewer
    rollouts = [rollout for group in groups for rollout in group]
    assert len({len(rollout.sampled_ids) for rollout in rollouts}) > 4
    ended = [rollout for rollout in rollouts if rollout.finish == "eos"]
    assert ended and all(
        r.sampled_ids[-1] % 5 == 0 and r.sampled_ids[-1] not in r.context_ids[: -r.n_forced] for r in ended
    )
    found = gap(model, prompts, groups, scale, 1.0)
    assert found.logprob_max < 1e-4 and found.score_max < 1e-4


def test_a_score_the_model_reached_itself(tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale) -> None:
    model, prompt, ids = writes(tiny_llama, smollm2_tokenizer, f"Fine. {PHRASE}4")
    for answer in ("forced", "generated"):
        engine = TransformersEngine(model, smollm2_tokenizer, scale)
        [[rollout]] = engine.generate([prompt], SamplingParams(n=1, max_tokens=30, temperature=0, answer=answer))
        assert list(rollout.context_ids) == ids[:-1] and rollout.written_score == 4.0
        assert rollout.n_forced == (len(scale.tail_ids) if answer == "forced" else 0)
        assert rollout.finish == "phrase" and rollout.text == f"Fine. {PHRASE}"
        assert rollout.score_logprobs is not None and rollout.score_logprobs[3] == max(rollout.score_logprobs)
        assert gap(model, [prompt], [[rollout]], scale, 0).score_max < 1e-6


def test_a_thought_that_is_cut_off_is_closed_in_front_of_the_phrase(
    tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale
) -> None:
    """And the trainer computes what the engine did: same tokens, same scores, no action among what is appended."""
    model, prompt, ids = writes(tiny_llama, smollm2_tokenizer, "<think> Maybe it was rather good")
    engine = TransformersEngine(model, smollm2_tokenizer, scale)
    for answer in ("forced", "cut"):
        [[rollout]] = engine.generate([prompt], SamplingParams(n=1, max_tokens=6, temperature=0, answer=answer))
        assert list(rollout.sampled_ids) == ids[:6] == list(rollout.context_ids[:6]) and rollout.finish == "length"
        assert rollout.text.startswith("<think>") and rollout.text.endswith(f"\n</think>\n\n {PHRASE}")
        assert rollout.n_forced == len(rollout.context_ids) - 6 > len(scale.phrase_ids)
        assert gap(model, [prompt], [[rollout]], scale, 0).score_max < 1e-6
    opened = [*prompt, *smollm2_tokenizer.encode("<think>\n")]
    [[bare]] = engine.generate([opened], SamplingParams(n=1, max_tokens=1, temperature=0, answer="none"))
    assert bare.text == f"\n</think>\n\n {PHRASE}" and gap(model, [opened], [[bare]], scale, 0).score_max < 1e-6


def test_generation_stops_at_the_score(tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale) -> None:
    model, prompt, ids = writes(tiny_llama, smollm2_tokenizer, f"Fine. {PHRASE}4 and more words that nobody reads")
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    TransformersEngine(model, smollm2_tokenizer, scale).generate(
        [prompt], SamplingParams(n=2, max_tokens=40, temperature=0)
    )
    # The token behind the score is sampled too: it might go on with the number.
    assert len(calls) == ids.index(scale.score_ids[3]) + 2


def test_a_wrong_tail_is_put_right(tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale) -> None:
    model, prompt, ids = writes(tiny_llama, smollm2_tokenizer, "Fine. So the overall score is: good")
    engine = TransformersEngine(model, smollm2_tokenizer, scale)
    [[rollout]] = engine.generate([prompt], SamplingParams(n=1, max_tokens=30, temperature=0))
    assert rollout.text == f"Fine. {PHRASE}" and rollout.n_forced == len(scale.tail_ids)
    assert list(rollout.context_ids[: -rollout.n_forced]) == ids[: len(ids) - 2]
    assert gap(model, [prompt], [[rollout]], scale, 0).score_max < 1e-6
    [[open_]] = engine.generate([prompt], SamplingParams(n=1, max_tokens=30, temperature=0, answer="generated"))
    assert open_.score_logprobs is None and not open_.has_score and open_.written_score is None
    assert list(open_.context_ids) == ids and list(open_.sampled_ids) == [*ids, 2]


@pytest.mark.parametrize("text", ["Fine.\nSo the overall score is: good", f"Fine. {PHRASE}4", "Fine."])
def test_the_score_behind_a_cut_feedback(
    tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale, text: str
) -> None:
    model, prompt, ids = writes(tiny_llama, smollm2_tokenizer, text)
    engine = TransformersEngine(model, smollm2_tokenizer, scale)
    [[rollout]] = engine.generate([prompt], SamplingParams(n=1, max_tokens=30, temperature=0, answer="cut"))
    feedback = smollm2_tokenizer.encode("Fine.")
    assert list(rollout.sampled_ids) == feedback == ids[: len(feedback)]
    assert list(rollout.context_ids) == [*feedback, *scale.phrase_ids] and rollout.n_forced == len(scale.phrase_ids)
    assert gap(model, [prompt], [[rollout]], scale, 0).score_max < 1e-6


@pytest.mark.parametrize("text", [f"Fine. {PHRASE}4", "So", ""])
def test_the_score_without_feedback(tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale, text: str) -> None:
    """Whatever the model would write, its end or the phrase's own first token among it."""
    model, prompt, _ = writes(tiny_llama, smollm2_tokenizer, text)
    how = sampling(EvalConfig(protocol="raft", n=3), RolloutConfig(), seed=0)
    [[rollout]] = TransformersEngine(model, smollm2_tokenizer, scale).generate([prompt], how)
    assert (
        not rollout.sampled_ids
        and list(rollout.context_ids) == list(scale.phrase_ids)
        and rollout.text == smollm2_tokenizer.decode(scale.phrase_ids)
    )
    row = JudgeRow("r", "p", "i", "r", "", "", 3.0, [], [], prompt)
    trained = supervised_group(row, [], 0, Guard(smollm2_tokenizer, {}).encode_feedback, scale).rollouts[
        0
    ]  # by raft with supervised.feedback none
    assert (trained.context_ids, trained.n_forced) == (list(rollout.context_ids), rollout.n_forced)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *scale.phrase_ids]])).logits[0, -1]
    assert rollout.score_logprobs == pytest.approx(logits.log_softmax(-1)[list(scale.score_ids)].tolist(), abs=1e-5)


def test_a_phrase_seen_late_still_gets_the_right_score(
    tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt, ids = writes(tiny_llama, smollm2_tokenizer, f"Fine. {PHRASE}4 and more")
    engine = TransformersEngine(model, smollm2_tokenizer, scale)
    monkeypatch.setattr(engine, "_answered", lambda *_: False)
    [[rollout]] = engine.generate([prompt], SamplingParams(n=1, max_tokens=30, temperature=0))
    assert list(rollout.context_ids) == ids[: ids.index(scale.score_ids[3])]
    assert gap(model, [prompt], [[rollout]], scale, 0).score_max < 1e-6


def test_generated_without_a_score_has_none(
    tiny: Any, smollm2_tokenizer: Any, scale: ScoreScale, prompts: list[list[int]]
) -> None:
    engine = TransformersEngine(tiny, smollm2_tokenizer, scale)
    for rollout in engine.generate(prompts[:1], SamplingParams(n=4, max_tokens=5, answer="generated"))[0]:
        assert rollout.score_logprobs is None and not rollout.has_score
        assert rollout.n_forced == 0 and rollout.context_ids == rollout.sampled_ids


def test_samples_follow_from_seed_and_places(
    tiny: Any, smollm2_tokenizer: Any, scale: ScoreScale, prompts: list[list[int]]
) -> None:
    sampling = SamplingParams(n=4, max_tokens=6, seed=11)

    def ids(settings: SamplingParams, chosen: list[list[int]], max_num_seqs: int = 256) -> list[list[list[int]]]:
        engine = TransformersEngine(tiny, smollm2_tokenizer, scale, max_num_seqs=max_num_seqs)
        return [[rollout.sampled_ids for rollout in group] for group in engine.generate(chosen, settings)]

    first = ids(sampling, prompts)
    state = torch.get_rng_state()
    assert ids(sampling, prompts) == first  # again
    assert torch.equal(torch.get_rng_state(), state)  # and nobody else's random numbers are used up
    assert ids(sampling, prompts, max_num_seqs=3) == first  # other batches
    assert ids(sampling, prompts[:2]) == first[:2]  # other prompts beside them
    assert ids(dataclasses.replace(sampling, n=2), prompts) == [group[:2] for group in first]
    other = ids(dataclasses.replace(sampling, seed=12), prompts)
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert len({tuple(sample) for group in first for sample in group}) == 16
    same_prompt = ids(sampling, [prompts[0], prompts[0]])
    assert same_prompt[0] != same_prompt[1]


def test_random_stream_is_fixed_for_good() -> None:
    assert random_stream(0, 3, 1).random() == random.Random("0 3 1").random() != random_stream(0, 31).random()


def test_model_is_left_as_it_was(tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale) -> None:
    model = tiny_llama(vocab_size=49152).train()
    model.model.norm.eval()  # modes are restored module by module
    model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    engine = TransformersEngine(model, smollm2_tokenizer, scale, dtype=torch.bfloat16)
    [[rollout]] = engine.generate([[5, 6, 7]], SamplingParams(n=1, max_tokens=4))
    assert len(rollout.sampled_ids) == 4
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing and torch.is_grad_enabled()
    assert not model.lm_head._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_dtype_for_the_time_of_a_generation(
    tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale, prompts: list[list[int]]
) -> None:
    model = tiny_llama(vocab_size=49152, tied=True)
    weights = [(weight.data_ptr(), weight.dtype) for weight in model.parameters()]
    seen: list[torch.dtype] = []
    for module in (model.model.embed_tokens, model.model.norm, model.model.layers[1].self_attn.k_proj):
        module.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    engine = TransformersEngine(model, smollm2_tokenizer, scale, dtype=torch.bfloat16)
    groups = engine.generate(prompts, SamplingParams(n=2, max_tokens=4))
    assert set(seen) == {torch.bfloat16}
    assert [(weight.data_ptr(), weight.dtype) for weight in model.parameters()] == weights
    found = gap(model, prompts, groups, scale, 1.0)
    assert 1e-5 < found.logprob_mean < 0.02


def test_quantised_weights_are_left_as_they_are(tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale) -> None:
    """Transformers' 8-bit layers apply their scales to 8-bit weights alone; cast, they would compute nonsense."""
    model = tiny_llama(vocab_size=49152)
    packed = {"fp8": torch.zeros(2, 2, dtype=torch.float8_e4m3fn), "int8": torch.zeros(2, 2, dtype=torch.int8)}
    for name, weight in packed.items():
        model.model.norm.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
    engine = TransformersEngine(model, smollm2_tokenizer, scale, dtype=torch.bfloat16)
    with engine._sampling_mode():
        cast = {name: weight.dtype for name, weight in engine._weights.items()}
    assert not {f"model.norm.{name}" for name in packed} & set(cast)
    assert cast["model.norm.weight"] == torch.bfloat16 and len(cast) == len(list(model.parameters())) - 2
    [[rollout]] = engine.generate([[5, 6, 7]], SamplingParams(n=1, max_tokens=3))
    assert len(rollout.sampled_ids) == 3


def test_sync_of_a_copy(tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale, prompts: list[list[int]]) -> None:
    trainer = tiny_llama(vocab_size=49152, tied=True, initializer_range=0.3)
    engine = TransformersEngine(
        tiny_llama(vocab_size=49152, tied=True, initializer_range=0.3), smollm2_tokenizer, scale
    )
    sampling = SamplingParams(n=2, max_tokens=5, seed=4)
    before = engine.generate(prompts[:2], sampling)
    first = {name: tensor.detach().clone() for name, tensor in trainer.named_parameters()}
    assert "lm_head.weight" not in first
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.mul_(1.3)
    stale = gap(trainer, prompts[:2], before, scale, 1.0)
    with pytest.raises(EngineMismatchError, match=r"step 7: .*sync was missed"):
        stale.raise_if_above(RolloutConfig(), 7, torch.float32)
    engine.sync(trainer.named_parameters())
    after = engine.generate(prompts[:2], sampling)
    assert after != before
    gap(trainer, prompts[:2], after, scale, 1.0).raise_if_above(
        RolloutConfig(check_logprob=1e-4, check_score=1e-4), 8, torch.float32
    )
    engine.sync(first.items())
    assert engine.generate(prompts[:2], sampling) == before


def test_sync_of_the_trainers_own_model_changes_nothing(
    tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale
) -> None:
    model = tiny_llama(vocab_size=49152, tied=True)
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    TransformersEngine(model, smollm2_tokenizer, scale).sync(model.named_parameters())
    assert {name: parameter._version for name, parameter in model.named_parameters()} == versions


def test_sync_errors_name_the_weight(tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale) -> None:
    model = tiny_llama(vocab_size=49152)
    engine = TransformersEngine(model, smollm2_tokenizer, scale)
    weights = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"'model\.layers\.9\.x'"):
        engine.sync([("model.layers.9.x", torch.zeros(1))])
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' as \[3\]"):
        engine.sync([("model.norm.weight", torch.zeros(3))])
    with pytest.raises(ValueError, match=r"1 of the model's weights: lm_head\.weight"):  # not tied here
        engine.sync((name, weight) for name, weight in weights.items() if name != "lm_head.weight")


def test_prompts_that_cannot_be_sampled_from(tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale) -> None:
    model = tiny_llama(vocab_size=49152, max_position_embeddings=64)
    model.register_forward_pre_hook(lambda *_: pytest.fail("work was done before the error"))
    engine = TransformersEngine(model, smollm2_tokenizer, scale)
    with pytest.raises(ValueError, match="prompt 1 has 48 tokens"):
        engine.generate([[5], [5] * 48], SamplingParams(n=1, max_tokens=10))
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        engine.generate([[]], SamplingParams(n=1, max_tokens=10))
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([[5]], SamplingParams(n=1, max_tokens=10))


def test_logits_that_are_not_finite(tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale) -> None:
    model = tiny_llama(vocab_size=49152)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="prompt 0"):
        TransformersEngine(model, smollm2_tokenizer, scale).generate([[5, 6]], SamplingParams(n=1, max_tokens=3))


# Engine against trainer


def test_logprobs_are_never_taken_a_token_early(
    tiny: Any, smollm2_tokenizer: Any, scale: ScoreScale, prompts: list[list[int]]
) -> None:
    """The reference slices a token early: its first value is the last prompt token's, and the last one is lost."""
    groups = TransformersEngine(tiny, smollm2_tokenizer, scale).generate(
        prompts, SamplingParams(n=2, max_tokens=6, seed=3)
    )
    each, rollouts = flat(prompts, groups)
    naive, early, score_rows = [], [], []
    for prompt, rollout in zip(each, rollouts, strict=True):
        whole = [*prompt, *rollout.context_ids]
        rows = []
        for end in range(1, len(whole) + 1):  # row t: behind the first t tokens, nothing else in sight
            with torch.no_grad():
                rows.append(tiny(torch.tensor([whole[:end]])).logits[0, -1].log_softmax(-1))
        ids, start = rollout.sampled_ids, len(prompt)
        naive.append(torch.stack([rows[start + i - 1][token] for i, token in enumerate(ids)]))
        early.append(torch.stack([rows[start + i - 2][whole[start + i - 1]] for i in range(len(ids))]))
        score_rows.append(rows[-1][list(scale.score_ids)])
    plain, scores = trainer_logprobs_of(tiny, each, rollouts, scale, 1.0)
    for a, b in zip(plain, naive, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    for c, d in zip(scores, score_rows, strict=True):
        assert c is not None and torch.allclose(c, d, atol=1e-4)
    assert plain_compare(rollouts, naive, score_rows, scale).logprob_max < 1e-4
    shifted = plain_compare(rollouts, early, score_rows, scale)
    assert shifted.logprob_mean > 0.5
    with pytest.raises(EngineMismatchError):
        shifted.raise_if_above(RolloutConfig(), 0, torch.float32)


def test_token_ids_that_the_model_does_not_have(tiny: Any, smollm2_tokenizer: Any, scale: ScoreScale) -> None:
    engine = TransformersEngine(tiny, smollm2_tokenizer, scale)
    for wrong in (49152, -1):
        with pytest.raises(ValueError, match=rf"prompt 1 has the token id {wrong}, .*0 to 49151"):
            engine.generate([[5], [5, wrong]], SamplingParams(n=1, max_tokens=2))


def test_bounds_of_the_check_follow_the_precision() -> None:
    """What rounding to bf16 explains is a stale weight in fp32; a user's own limit holds in both."""
    found = EngineGap(100, 0.05, 0.2, 10, 0.01, 0.02)
    found.raise_if_above(RolloutConfig(), 0, torch.bfloat16)
    with pytest.raises(EngineMismatchError, match=r"check_logprob allows a mean of 0\.001.*float32 here"):
        found.raise_if_above(RolloutConfig(), 0, torch.float32)
    found.raise_if_above(RolloutConfig(check_logprob=0.06, check_score=0.02), 0, torch.float32)
    with pytest.raises(EngineMismatchError, match=r"0\.04\)"):
        found.raise_if_above(RolloutConfig(check_logprob=0.04), 0, torch.bfloat16)
    # A stale head, as it was found: just under a bound of 0.1 that knew no precision.
    with pytest.raises(EngineMismatchError):
        EngineGap(100, 0.097, 0.3, 0, 0.0, 0.0).raise_if_above(RolloutConfig(), 0, torch.bfloat16)


# Choosing an engine


def config(**rollout: Any) -> Config:
    precision = TrainConfig(precision="bf16")  # on any CPU
    made = Config(model="m", output="o", rollout=RolloutConfig(max_tokens=64, **rollout), train=precision)
    made.prompt.max_tokens = 256
    return made


def test_transformers_by_name(tiny: Any, smollm2_tokenizer: Any, scale: ScoreScale, tmp_path: Path) -> None:
    engine = make.make_engine(config(engine="transformers", max_num_seqs=5), tiny, smollm2_tokenizer, scale, tmp_path)
    assert isinstance(engine, TransformersEngine)
    assert engine.model is tiny and engine.max_num_seqs == 5 and engine.dtype is torch.bfloat16


def test_the_engine_of_a_rank_draws_nothing_for_its_copys_adapters(tiny_judge: Path, tiny: Any) -> None:
    """It is made behind the random states of a checkpoint that a run goes on from."""
    some = dataclasses.replace(config(), train=TrainConfig(lora=LoraConfig(r=2)))
    before = torch.get_rng_state()
    assert is_adapted(make._copy(some, tiny, tiny_judge))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_room_in_the_models_positions(
    tiny_llama: Tiny, smollm2_tokenizer: Any, scale: ScoreScale, tmp_path: Path
) -> None:
    model = tiny_llama(vocab_size=49152, max_position_embeddings=300)
    with pytest.raises(ConfigError, match=r"prompt\.max_tokens 256, rollout\.max_tokens 64 .* 300 positions"):
        make.make_engine(config(engine="transformers"), model, smollm2_tokenizer, scale, tmp_path)


@pytest.mark.parametrize(
    "broken", [None, ImportError("libcudart.so.13"), OSError("libnuma"), RuntimeError("operator nms")]
)
def test_vllm_missing_or_broken(
    tiny: Any,
    smollm2_tokenizer: Any,
    scale: ScoreScale,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: Exception | None,
) -> None:
    log.set_up()
    found = importlib.util.find_spec("json") if broken else None
    monkeypatch.setattr(make.importlib.util, "find_spec", lambda _name: found)

    def fails() -> None:
        assert broken is not None
        raise broken

    monkeypatch.setattr(make, "import_vllm", fails)
    engine = make.make_engine(config(engine="auto"), tiny, smollm2_tokenizer, scale, tmp_path)
    assert engine.name == "transformers"
    why = str(broken) if broken else "not installed"
    assert why in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"rollout.engine is vllm, but .*{why}.*install"):
        make.make_engine(config(engine="vllm"), tiny, smollm2_tokenizer, scale, tmp_path)


def test_vllm_cannot_report_these_logprobs(
    tiny: Any, smollm2_tokenizer: Any, scale: ScoreScale, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.top_p 0\.9 .* rollout\.temperature is 0\.7"):
        make.make_engine(config(engine="vllm", top_p=0.9, temperature=0.7), tiny, smollm2_tokenizer, scale, tmp_path)


def test_without_a_trainer_vllm_alone_holds_the_weights(
    tiny: Any, smollm2_tokenizer: Any, scale: ScoreScale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_pretrained(tmp_path)
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(make, "_obstacle", lambda *_: None)
    monkeypatch.setattr(make, "load_model", lambda *_: pytest.fail("the weights are loaded twice"))
    monkeypatch.setattr(make, "VllmEngine", lambda *args, **kwargs: made.append({"path": args[0], **kwargs}))
    settings = config(engine="auto", max_num_seqs=7)
    settings.model = str(tmp_path)
    make.load_engine(settings, smollm2_tokenizer, scale)
    [engine] = made
    assert (engine["path"], engine["dtype"], engine["max_num_seqs"]) == (tmp_path, torch.bfloat16, 7)
    assert engine["max_model_len"] == 256 + 64 + scale.most_appended + 1 > 256 + 64 + len(scale.phrase_ids) + 1

    def broken(*_: Any, **__: Any) -> None:
        raise AssertionError("no such\nkernel")

    monkeypatch.setattr(make, "VllmEngine", broken)
    with pytest.raises(ConfigError, match=r"vLLM did not start: no such kernel.*rollout\.engine to transformers"):
        make.load_engine(settings, smollm2_tokenizer, scale)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors"):
        make.load_engine(settings, smollm2_tokenizer, scale)


def test_weights_that_vllm_does_not_know_by_name(
    tiny: Any, smollm2_tokenizer: Any, scale: ScoreScale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Foreign:
        name, takes, closed = "vllm", torch.float32, False

        def sync(self, _weights: Any) -> None:
            raise ValueError("sync got the weight 'experts.gate_up_proj'")

        def close(self) -> None:
            Foreign.closed = True

    monkeypatch.setattr(make, "_obstacle", lambda *_: None)
    monkeypatch.setattr(make, "VllmEngine", lambda *_args, **_kwargs: Foreign())
    engine = make.make_engine(config(engine="vllm"), tiny, smollm2_tokenizer, scale, tmp_path)
    with pytest.raises(ConfigError, match=r"gate_up_proj.*rollout\.engine to transformers"):
        make.hand_over(engine, tiny)
    assert Foreign.closed


def test_without_a_trainer_transformers_loads_the_model(
    tiny: Any, smollm2_tokenizer: Any, scale: ScoreScale, tmp_path: Path
) -> None:
    tiny.save_pretrained(tmp_path)
    settings = config(engine="transformers", max_num_seqs=7)
    settings.model, settings.train.device = str(tmp_path), "cpu"
    engine = make.load_engine(settings, smollm2_tokenizer, scale)
    assert isinstance(engine, TransformersEngine) and engine.max_num_seqs == 7
    assert engine.model.dtype is engine.dtype is torch.bfloat16
    with pytest.raises(ModelError, match="does not exist"):
        settings.model = str(tmp_path / "nowhere")
        make.load_engine(settings, smollm2_tokenizer, scale)
