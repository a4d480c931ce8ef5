"""The two records: what they refuse, what they are as strings, and how torch.compile takes them."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import real_kernels
from real_kernels import HeadOptions, RealObjective, linear_logprob, real_loss
from tests.oracles import make_sequences, pack

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@pytest.mark.parametrize(
    ("record", "field", "value", "message"),
    [
        (RealObjective, "reward", "accuracy", 'reward must be "paper" or "authors"'),
        (RealObjective, "lam", math.nan, "lam must be a finite number"),
        (RealObjective, "lam", math.inf, "lam must be a finite number"),
        (RealObjective, "lam", "1", "lam must be a finite number, not '1'"),
        (RealObjective, "beta", math.nan, "beta must be a finite number"),
        (RealObjective, "beta", None, "beta must be a finite number"),
        (RealObjective, "baseline", "none", 'baseline must be "leave_one_out" or "mean"'),
        (RealObjective, "normalize_std", "no", "normalize_std must be True or False"),
        (RealObjective, "advantage_clip", -1.0, "advantage_clip must be 0 or more"),
        (RealObjective, "advantage_clip", math.nan, "advantage_clip must be 0 or more"),
        (RealObjective, "loss_norm", "mean", 'loss_norm must be "sequence_sum" or "token_mean"'),
        (RealObjective, "renormalize", 2, "renormalize must be True or False"),
        (HeadOptions, "temperature", 0.0, "temperature must be above 0 and finite"),
        (HeadOptions, "temperature", math.nan, "temperature must be above 0"),
        (HeadOptions, "temperature", math.inf, "temperature must be above 0"),
        (HeadOptions, "softcap", 0.0, "softcap must be above 0"),
        (HeadOptions, "softcap", math.nan, "softcap must be above 0"),
        (HeadOptions, "impl", "cuda", 'impl must be "auto", "triton" or "torch", not \'cuda\''),
        (HeadOptions, "mode", "backward", 'mode must be "auto", "forward" or "recompute"'),
        (HeadOptions, "chunk_bytes", 0, "chunk_bytes must be at least 1"),
        (HeadOptions, "chunk_bytes", 1e6, "chunk_bytes must be at least 1, a whole number"),
        (HeadOptions, "validate", None, "validate must be True or False"),
        (HeadOptions, "unit_gradient", 1, "unit_gradient must be True or False"),
    ],
)
def test_bad_values_are_refused_by_name(record, field, value, message):
    with pytest.raises(ValueError, match=message):
        record(**{field: value})
    with pytest.raises(ValueError, match=message):
        replace(record(), **{field: value})


@given(
    st.builds(
        RealObjective,
        reward=st.sampled_from(["paper", "authors"]),
        lam=finite | st.integers(-9, 9),
        beta=finite,
        baseline=st.sampled_from(["leave_one_out", "mean"]),
        normalize_std=st.booleans(),
        advantage_clip=st.floats(min_value=0),
        loss_norm=st.sampled_from(["sequence_sum", "token_mean"]),
        renormalize=st.booleans(),
    )
    | st.builds(
        HeadOptions,
        temperature=positive,
        softcap=st.none() | positive,
        impl=st.sampled_from(["auto", "triton", "torch"]),
        mode=st.sampled_from(["auto", "forward", "recompute"]),
        chunk_bytes=st.none() | st.integers(1, 2**62),
        validate=st.booleans(),
    )
)
def test_a_record_comes_back_from_its_text_to_the_bit(record):
    names = [f.name for f in fields(record) if f.init]
    assert json.loads(record.text) == {name: getattr(record, name) for name in names}
    back = type(record).from_text(record.text)
    assert back == record and back.text == record.text and hash(back) == hash(record)
    # -0.0 equals 0.0: the sign is kept too.
    signs = [[math.copysign(1, x) for x in vars(r).values() if isinstance(x, float)] for r in (record, back)]
    assert signs[0] == signs[1]
    assert type(record).from_text(record.text) is back


def test_records_do_not_change():
    head = HeadOptions(temperature=0.7)
    with pytest.raises(FrozenInstanceError):
        head.temperature = 1.0
    assert replace(head, temperature=1.0) == HeadOptions() and "0.7" in head.text
    assert replace(head, temperature=1.0).text == HeadOptions().text


def test_former_names_are_the_same_things():
    assert real_kernels.RewardTerms is real_kernels.RewardParts
    assert real_kernels.reward_terms is real_kernels.reward_parts
    assert all(hasattr(real_kernels, name) for name in real_kernels.__all__)


def compilations(function):
    """The function compiled, and a list that grows with each compilation."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    return torch.compile(function, backend=backend, fullgraph=True), graphs


def test_another_record_is_another_graph_and_the_right_one():
    hidden, weight = torch.randn(4, 3), torch.randn(7, 3)
    targets = torch.tensor([1, 2, 3, 0])
    compiled, graphs = compilations(lambda head: linear_logprob(hidden, weight, targets, head=head))
    for temperature in (0.7, 0.8, 0.1 + 0.2, 0.8):
        head = HeadOptions(temperature=temperature)
        assert torch.equal(compiled(head), linear_logprob(hidden, weight, targets, head=head))
    assert len(graphs) == 3


def test_counts_of_the_update_do_not_compile_anew():
    sequences, weight, score_ids, values = make_sequences(4, 3, 3)
    packed = pack(sequences)

    def loss(num_rollouts, num_tokens):
        return real_loss(
            **packed,
            weight=weight,
            score_ids=score_ids,
            score_values=values,
            num_rollouts=num_rollouts,
            num_tokens=num_tokens,
            objective=RealObjective(loss_norm="token_mean"),
        ).loss

    compiled, graphs = compilations(loss)
    for step in range(1, 9):
        assert torch.equal(compiled(8 + step, 100 + 7 * step), loss(8 + step, 100 + 7 * step))
    assert len(graphs) <= 2
