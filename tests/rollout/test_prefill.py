"""Prompts of about one length are computed together: what comes of it is what one pass over all of them gives."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config
from transformers.cache_utils import DynamicCache, DynamicLayer

from real_fast.attention.interface import NAME
from real_fast.rollout import prefill, transformers_engine
from real_fast.rollout.prefill import can_join, groups, join, keeps_all, left_padded, parts
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
    """Its config tells; where one does not, the first cache does, once."""
    model, passes = model_of(MistralConfig, sliding_window=16), []
    model.register_forward_pre_hook(lambda _m, _a, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True)
    if not told:
        monkeypatch.setattr(transformers_engine, "keeps_all", lambda _: True)
    engine = TransformersEngine(model, small_tokenizer, small_scale)
    for _ in range(2):
        engine.generate(prompts(), SamplingParams(n=1, max_tokens=1, seed=3, answer="none"))
    before = [] if told else [(2, 200)]
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


def tokens_of(prompts, found):
    return sum(shared + sum(len(prompts[place]) - shared for place in places) for shared, places in found)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=7), st.integers(0, 6))
def test_groups_take_the_fewest_tokens(prompts, a_pass):
    """Of all ways to cut the sorted prompts into groups, a shared beginning counting as a pass more."""
    with mock.patch.dict(prefill._A_PASS, cpu=a_pass):
        found = groups(prompts, "cpu")
    assert sorted(place for _, places in found for place in places) == list(range(len(prompts)))
    for shared, places in found:
        assert len({tuple(prompts[place][:shared]) for place in places}) == 1
        lengths = [len(prompts[place]) for place in places]
        assert lengths == sorted(lengths, reverse=True) and shared < lengths[-1] and (not shared or len(places) > 1)
    rows, least = sorted(prompts), float("inf")
    for cuts in itertools.product([False, True], repeat=len(rows) - 1):
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(rows)]
        total = 0
        for some in (rows[a:b] for a, b in itertools.pairwise(ends)):
            alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*some, strict=False))
            shared = min([len(list(alike)), *(len(row) - 1 for row in some)])
            alone = sum(map(len, some))
            total += min(alone, alone - (len(some) - 1) * shared + a_pass) if shared else alone
        least = min(least, total)
    passes = sum(a_pass for shared, _ in found if shared)
    assert tokens_of(prompts, found) + passes == least


def test_few_shared_tokens_are_not_worth_a_pass():
    some = begun(30, 31, 32, of=range(9))
    assert groups(some, "cpu") == [(0, [2, 1, 0])]
    more = begun(30, 31, 32, of=range(100))
    assert groups(more, "cpu") == [(100, [2, 1, 0])] and groups(more, "cuda") == [(0, [2, 1, 0])]


FAMILIES = [
    *begun(40, 7, 90, 1, of=begun(100)[0]),
    *begun(25, 30, 80, of=begun(150, seed=3)[0], seed=4),
    *begun(60, 120, seed=5),
    *[begun(70, seed=6)[0]] * 3,  # the same one thrice
]


@pytest.mark.parametrize("n", [1, 3])
def test_samples_are_those_without_shared_beginnings(n, small_tokenizer, small_scale, monkeypatch):
    model, sampling = model_of(LlamaConfig), SamplingParams(n=n, max_tokens=12, seed=3)
    passes, samples, computed = [], [], []
    model.register_forward_pre_hook(lambda _m, _a, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True)
    engine = TransformersEngine(model, small_tokenizer, small_scale)
    for a_pass in (10**9, 30):
        monkeypatch.setitem(prefill._A_PASS, "cpu", a_pass)
        passes.clear()
        samples.append([r for group in engine.generate(FAMILIES, sampling) for r in group])
        computed.append(sum(rows * tokens for rows, tokens in passes if tokens > 1))
    assert len(samples[0]) == n * len(FAMILIES) and computed[1] < 0.6 * computed[0]
    for one, two in zip(*samples, strict=True):
        assert (list(one.sampled_ids), one.text) == (list(two.sampled_ids), two.text)
        for name in ("sampled_logprobs", "score_logprobs"):
            got, want = (torch.tensor(getattr(x, name)) for x in (one, two))
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


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
