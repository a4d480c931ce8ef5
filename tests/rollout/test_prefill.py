"""Prompts of about one length, and beginnings that are shared: what comes of it is what one pass over all gives."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPTNeoConfig, LlamaConfig, MistralConfig, Qwen2Config
from transformers.cache_utils import DynamicCache, DynamicLayer

from real_fast.attention.interface import NAME
from real_fast.rollout import prefill, transformers_engine
from real_fast.rollout.prefill import beginnings, by_beginning, can_join, join, keeps_all, left_padded, parts
from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.score.scale import ScoreScale
from real_fast.types import SamplingParams


@pytest.fixture(scope="module")
def small_scale(small_tokenizer):
    return ScoreScale.from_tokenizer(small_tokenizer, [1, 2, 3, 4, 5], "So the overall score is ")


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=60).map(lambda some: sorted(some, reverse=True)))
def test_parts_cover_all_and_hold_little_padding(lengths):
    found = parts(lengths)
    assert [place for part in found for place in range(len(lengths))[part]] == list(range(len(lengths)))
    for part in found:
        most = max(prefill._PADDING * lengths[part][0], prefill._FEW)
        assert lengths[part][0] - lengths[part][-1] <= most


def model_of(kind, **more):
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2}
    config = kind(**sizes, num_attention_heads=6, num_key_value_heads=2, head_dim=8, **more)
    return AutoModelForCausalLM.from_config(config).double().eval()


LENGTHS = (200, 180, 110, 60, 58, 1)


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 2000, (length,), generator=generator).tolist() for length in LENGTHS]


def test_joined_caches_decode_as_one(monkeypatch):
    """Logits behind the prompts and behind two more tokens, against a cache for each prompt alone, in float64."""
    model, rows = model_of(LlamaConfig), prompts()
    caches = []
    with torch.no_grad():
        for part in parts(LENGTHS):
            ids, mask = left_padded(rows[part])
            out = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
            assert can_join(out.past_key_values)
            caches.append(out.past_key_values)
        assert len(caches) == 4 and caches[0].layers[0].keys.shape[:3] == (2, 2, 200)
        cache, mask = join(caches), left_padded(rows)[1]
        for step in range(2):
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            feed = torch.full((len(rows), 1), 7 + step)
            where = torch.tensor(LENGTHS)[:, None] + step
            got = model(feed, attention_mask=mask, position_ids=where, past_key_values=cache).logits[:, -1]
            for row, logits in zip(rows, got, strict=True):
                alone = model(torch.tensor([[*row, 7, 8][: len(row) + 1 + step]])).logits[0, -1]
                torch.testing.assert_close(logits, alone, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("kind", "more"), [(LlamaConfig, {}), (MistralConfig, {"sliding_window": 16})])
def test_samples_are_those_of_one_pass(kind, more, small_tokenizer, small_scale, monkeypatch):
    """With a window, whose cache cannot be joined, all prompts go through one pass."""
    model, sampling = model_of(kind, **more), SamplingParams(n=2, max_tokens=12, seed=3)
    samples, passes = [], []
    model.register_forward_pre_hook(lambda _m, _a, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True)
    for padding in (1.0, 0.2):
        monkeypatch.setattr(prefill, "_PADDING", padding)
        engine = TransformersEngine(model, small_tokenizer, small_scale)
        passes.clear()
        for _ in range(2):
            samples.append([r for group in engine.generate(prompts(), sampling) for r in group])
        shapes = [shape for shape in passes if shape[1] > 1]
        assert sum(rows * tokens for rows, tokens in shapes) < 2 * 700 or kind is MistralConfig or padding == 1.0
    for other in samples[1:]:
        for one, two in zip(samples[0], other, strict=True):
            assert (one.sampled_ids, one.text) == (two.sampled_ids, two.text)
            got, want = (torch.tensor(x.score_logprobs) for x in (one, two))
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_positions_that_depend_on_the_batch_get_one_pass(small_tokenizer, small_scale):
    """Parts of their own would have other frequencies than the cache that they are joined in."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
    model, passes = model_of(LlamaConfig, rope_parameters=rope, max_position_embeddings=512), []
    model.register_forward_pre_hook(lambda _m, _a, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True)
    engine = TransformersEngine(model, small_tokenizer, small_scale)
    engine.generate(prompts(), SamplingParams(n=1, max_tokens=1, seed=3, answer="none"))
    assert [tuple(shape) for shape in passes if shape[1] > 9] == [(6, 200)]


@pytest.mark.parametrize("told", [True, False])
def test_a_cache_with_windows_is_not_joined(told, small_tokenizer, small_scale, monkeypatch):
    """Its config tells; where one does not, the first caches do, once."""
    model, passes = model_of(MistralConfig, sliding_window=16), []
    model.register_forward_pre_hook(lambda _m, _a, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True)
    if not told:
        monkeypatch.setattr(transformers_engine, "keeps_all", lambda _: True)
    engine = TransformersEngine(model, small_tokenizer, small_scale)
    for _ in range(2):
        engine.generate(prompts(), SamplingParams(n=1, max_tokens=1, seed=3, answer="none"))
    before = [] if told else [(2, 200), (1, 110), (2, 60)]
    assert [tuple(shape) for shape in passes if shape[1] > 9] == [*before, (6, 200), (6, 200)]


@pytest.mark.parametrize(
    ("config", "keeps"),
    [
        (LlamaConfig(), True),
        (MistralConfig(sliding_window=None), True),
        (MistralConfig(sliding_window=16), False),
        (Qwen2Config(use_sliding_window=True, sliding_window=16, max_window_layers=1, num_hidden_layers=2), False),
        (Qwen2Config(sliding_window=16), True),
        (Gemma3TextConfig(num_hidden_layers=2), False),
    ],
)
def test_what_a_config_says_of_the_cache(config, keeps):
    """As Transformers' own cache for it has it."""
    assert keeps_all(config) == keeps == all(type(x) is DynamicLayer for x in DynamicCache(config=config).layers)


def begun(*lengths, of=(), seed=2):
    """Prompts that go on from `of`."""
    generator = torch.Generator().manual_seed(seed)
    return [[*of, *torch.randint(3, 2000, (length,), generator=generator).tolist()] for length in lengths]


def most_saved(rows):
    """Plainly: what all of the rows begin with, or the best of those that go on alike; what is no row's end alone."""
    if len(rows) < 2:
        return 0
    tokens = 0
    while len({tuple(row[: tokens + 1]) for row in rows}) == 1 and min(map(len, rows)) > tokens + 1:
        tokens += 1
    own = tokens * (len(rows) - 1)
    nexts = {tuple(row[: tokens + 1]) for row in rows if len(row) > tokens + 1}
    inner = sum(
        most_saved([row for row in rows if tuple(row[: tokens + 1]) == n and len(row) > tokens + 1]) for n in nexts
    )
    return own if own > max(inner, prefill._FEW) else inner


def saved(found):
    return sum(one.tokens * (len(one.places) - 1) for one in found)


bits = st.lists(st.integers(0, 1), min_size=1, max_size=9)


@given(st.lists(bits, min_size=1, max_size=12), st.integers(0, 9))
def test_beginnings_save_the_most_tokens(prompts, few):
    with mock.patch.multiple(prefill, _FEW=few, _WORTHWHILE={"cpu": 0}):
        found = beginnings(prompts, "cpu")
        places = [place for one in found for place in one.places]
        assert len(set(places)) == len(places) <= len(prompts)
        for one in found:
            assert len({tuple(prompts[place][: one.tokens]) for place in one.places}) == 1 < len(one.places)
            assert 0 < one.tokens < min(len(prompts[place]) for place in one.places)
        for one in found:  # nobody else begins so
            begin = prompts[one.places[0]][: one.tokens]
            assert len(one.places) == sum(p[: one.tokens] == begin and len(p) > one.tokens for p in prompts)
        assert saved(found) == most_saved(prompts)


def test_what_is_shared_by_few_and_what_is_short_is_not_worth_a_pass():
    some = begun(30, 31, 32, of=range(9))
    assert beginnings(some, "cpu") == []
    more = begun(30, 31, 32, of=range(100))
    (found,) = beginnings(more, "cpu")
    assert (found.tokens, sorted(found.places)) == (100, [0, 1, 2]) and beginnings(more, "cuda") == []


def test_the_beginning_that_saves_more_is_taken():
    first, second = begun(60)[0], begun(80, seed=7)[0]
    inner = [*begun(9, 8, of=[*first, *second]), *begun(9, of=first, seed=3)]
    (found,) = beginnings(inner, "cpu")  # 140 tokens once, or 60 twice
    assert (found.tokens, sorted(found.places)) == (140, [0, 1])
    outer = [*inner, *begun(5, 6, 7, of=first, seed=9)]
    (found,) = beginnings(outer, "cpu")
    assert (found.tokens, sorted(found.places)) == (60, [0, 1, 2, 3, 4, 5])


def test_many_prompts_take_no_time():
    """Steps grow with the prompts and not with their square."""
    first = begun(900)[0]
    prompts = [[*first[: 900 - i % 7], i, *range(i % 50)] for i in range(3000)]
    compared = 0

    def count(one, other):
        nonlocal compared
        compared += 1
        return alike(one, other)

    alike = prefill._alike
    with mock.patch.object(prefill, "_alike", count):
        found = beginnings(prompts, "cpu")
    assert compared == 2999 and sum(len(one.places) for one in found) == 3000


def test_those_that_begin_alike_are_neighbours():
    found = by_beginning(FAMILIES, beginnings(FAMILIES, "cpu"))
    assert sorted(found) == list(range(len(FAMILIES)))
    # Families by their longest prompt: 230 tokens, 190, 120 and 60 alone, three times the same.
    assert found == [6, 5, 4, 2, 0, 1, 3, 8, 9, 10, 11, 7]
    assert by_beginning(prompts(), beginnings(prompts(), "cpu")) == list(range(len(LENGTHS)))


FAMILIES = [
    *begun(40, 7, 90, 1, of=begun(100)[0]),
    *begun(25, 30, 80, of=begun(150, seed=3)[0], seed=4),
    *begun(60, 120, seed=5),
    *[begun(70, seed=6)[0]] * 3,  # the same one thrice
]


@pytest.mark.parametrize(("n", "at_once"), [(1, 256), (3, 256), (1, 5), (3, 2), (2, 1)])
@pytest.mark.parametrize("some", [FAMILIES, begun(20, 20, 20, of=range(7, 90)), FAMILIES[:1] * 2])
def test_samples_are_those_without_shared_beginnings(some, n, at_once, small_tokenizer, small_scale, monkeypatch):
    """Families in a batch or cut by it, suffixes of one length, one prompt twice; more samples than go at once."""
    model, sampling = model_of(LlamaConfig), SamplingParams(n=n, max_tokens=12, seed=3)
    passes, samples, computed = [], [], []
    model.register_forward_pre_hook(lambda _m, _a, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True)
    engine = TransformersEngine(model, small_tokenizer, small_scale, max_num_seqs=at_once)
    for worthwhile in (10**9, 30):
        monkeypatch.setitem(prefill._WORTHWHILE, "cpu", worthwhile)
        passes.clear()
        samples.append([r for group in engine.generate(some, sampling) for r in group])
        computed.append(sum(rows * tokens for rows, tokens in passes if tokens > 1))
    assert len(samples[0]) == n * len(some)
    assert computed[1] < 0.7 * computed[0] or at_once <= 2 * n
    for one, two in zip(*samples, strict=True):
        assert (list(one.sampled_ids), one.text) == (list(two.sampled_ids), two.text)
        for name in ("sampled_logprobs", "score_logprobs"):
            got, want = (torch.tensor(getattr(x, name)) for x in (one, two))
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_passes_are_few(small_tokenizer, small_scale):
    """Beginnings go through a pass together, and so does what follows them."""
    model, passes = model_of(LlamaConfig), []
    model.register_forward_pre_hook(lambda _m, _a, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True)
    pairs = [row for seed in range(20) for row in begun(9, 30, of=begun(70, seed=seed)[0], seed=50 + seed)]
    engine = TransformersEngine(model, small_tokenizer, small_scale)
    engine.generate(pairs, SamplingParams(n=1, max_tokens=1, seed=3, answer="none"))
    assert [tuple(shape) for shape in passes if shape[1] > 1] == [(20, 70), (40, 30)]


def test_attention_that_counts_keys_shares_no_beginnings(small_tokenizer, small_scale):
    """GPT-Neo's windows are by the key's index in the cache; padding behind a beginning would push keys out of them."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=2048,
        hidden_size=48,
        num_heads=6,
        num_layers=2,
        window_size=24,
        attention_types=[[["global", "local"], 1]],
    )
    model, passes = AutoModelForCausalLM.from_config(config).double().eval(), []
    model.register_forward_pre_hook(lambda _m, _a, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True)
    engine = TransformersEngine(model, small_tokenizer, small_scale)
    engine.generate(FAMILIES[:4], SamplingParams(n=1, max_tokens=1, seed=3, answer="none"))
    assert sum(rows * tokens for rows, tokens in passes) >= sum(map(len, FAMILIES[:4]))


def test_a_beginning_whose_cache_cannot_be_joined_is_computed_once_in_vain(small_tokenizer, small_scale, monkeypatch):
    model, passes = model_of(MistralConfig, sliding_window=16), []
    model.register_forward_pre_hook(lambda _m, _a, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True)
    monkeypatch.setattr(transformers_engine, "keeps_all", lambda _: True)
    engine = TransformersEngine(model, small_tokenizer, small_scale)
    for _ in range(2):
        engine.generate(FAMILIES[:4], SamplingParams(n=1, max_tokens=1, seed=3, answer="none"))
    assert [tuple(shape) for shape in passes if shape[1] > 9] == [(1, 100), (4, 190), (4, 190)]


def test_keys_are_read_once_a_decoding_step_and_the_model_is_as_it_was(small_tokenizer, small_scale):
    """As :func:`real_fast.attention.interface.attend` does; Transformers' SDPA would copy them for each query head."""
    model, seen = model_of(LlamaConfig), set()
    model.register_forward_pre_hook(lambda *_: seen.add(model.config._attn_implementation))
    engine = TransformersEngine(model, small_tokenizer, small_scale)
    engine.generate(prompts(), SamplingParams(n=1, max_tokens=4, seed=3))
    assert seen == {NAME} and model.config._attn_implementation == "sdpa"
