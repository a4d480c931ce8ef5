from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from real_kernels import (
    HeadOptions,
    expected_score,
    group_advantages,
    label_weights,
    real_loss,
    reward_parts,
)
from tests.oracles import OPTIONS, make_sequences, naive_advantages, naive_real_loss, pack, records

RECORDS = records(**OPTIONS)


def leaves(sequences, weight):
    return [weight, *[s["hidden"] for s in sequences], *[s["score_hidden"] for s in sequences]]


def gradients(loss, inputs):
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 4),
    size=st.integers(1, 5),
    options=st.fixed_dictionaries(
        {
            "reward": st.sampled_from(["paper", "authors"]),
            "lam": st.sampled_from([0.0, 0.5, 1.0]),
            "beta": st.sampled_from([0.0, 0.3, 1.0]),
            "baseline": st.sampled_from(["leave_one_out", "mean"]),
            "normalize_std": st.booleans(),
            "advantage_clip": st.sampled_from([0.0, 0.5, 1.0]),
            "loss_norm": st.sampled_from(["sequence_sum", "token_mean"]),
            "renormalize": st.booleans(),
            "temperature": st.sampled_from([1.0, 0.6]),
        }
    ),
    invalid=st.booleans(),
)
def test_loss_and_gradients_against_naive(seed, groups, size, options, invalid):
    sequences, weight, score_ids, values = make_sequences(seed, groups, size, invalid=invalid)
    want, advantages = naive_real_loss(sequences, weight, score_ids.tolist(), values.tolist(), **options)
    out = real_loss(
        weight=weight,
        score_ids=score_ids,
        score_values=values,
        **pack(sequences),
        **records(chunk_bytes=23 * 8 * 3, **options),
    )
    torch.testing.assert_close(out.loss, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.advantages, torch.tensor(advantages, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.exploration_loss + out.refinement_loss, out.loss.detach())
    inputs = leaves(sequences, weight)
    for a, b in zip(gradients(out.loss, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), norm=st.sampled_from(["sequence_sum", "token_mean"]))
def test_packing_does_not_change_loss_or_gradients(seed, norm):
    """The reference's mistake 9: its loss weights depend on how micro-batches are packed."""
    sequences, weight, score_ids, values = make_sequences(seed, 4, 3, invalid=True)
    options = records(**OPTIONS | {"loss_norm": norm})
    valid = [s for s in sequences if s["valid"]]
    totals = {"num_rollouts": max(len(valid), 1), "num_tokens": max(sum(len(s["targets"]) for s in valid), 1)}
    inputs = leaves(sequences, weight)

    def run(parts):
        losses = [
            real_loss(weight=weight, score_ids=score_ids, score_values=values, **pack(p), **options, **totals).loss
            for p in parts
        ]
        total = torch.stack(losses).sum()
        return total, gradients(total, inputs)

    groups = [[s for s in sequences if s["group"] == g] for g in range(4)]
    whole = run([sequences])
    for parts in (
        [groups[0] + groups[1], groups[2] + groups[3]],
        groups,
        [groups[3], groups[1] + groups[0] + groups[2]],
    ):
        loss, grads = run(parts)
        torch.testing.assert_close(loss, whole[0], rtol=1e-10, atol=1e-10)
        for a, b in zip(grads, whole[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_permuting_rollouts_changes_nothing(seed):
    """The reference's mistake 3: rows re-sorted by group while rewards keep the old order."""
    sequences, weight, score_ids, values = make_sequences(seed, 3, 4)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [sequences[i] for i in order]
    head = {"weight": weight, "score_ids": score_ids, "score_values": values}
    first, second = real_loss(**pack(sequences), **head, **RECORDS), real_loss(**pack(shuffled), **head, **RECORDS)
    torch.testing.assert_close(second.loss, first.loss, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(second.advantages, first.advantages[order], rtol=1e-11, atol=1e-11)
    inputs = leaves(sequences, weight)
    for a, b in zip(gradients(first.loss, inputs), gradients(second.loss, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_invalid_rollouts_add_nothing_whatever_their_rows_hold():
    """The reference's mistake 5: a truncated answer trained as if its last token were the score."""
    sequences, weight, score_ids, values = make_sequences(3, 2, 4)
    head = {"weight": weight, "score_ids": score_ids, "score_values": values}
    sequences[1]["valid"] = sequences[6]["valid"] = False
    out = real_loss(**pack(sequences), **head, **RECORDS)
    kept = [s for s in sequences if s["valid"]]
    alone = real_loss(**pack(kept), **head, **RECORDS)
    torch.testing.assert_close(out.loss, alone.loss, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(
        out.loss, [sequences[1]["score_hidden"], sequences[6]["score_hidden"]], allow_unused=True
    )
    assert all(g is None or not g.any() for g in grads)
    assert out.advantages[1] == 0 and out.advantages[6] == 0


def test_zero_rows_are_dropped_exactly_and_reported():
    sequences, weight, score_ids, values = make_sequences(11, 3, 3)
    for s in sequences[:3]:  # one group of identical rollouts: no spread, advantage 0
        for key in ("hidden", "targets", "score_hidden"):
            s[key] = sequences[0][key]
    head = {"weight": weight, "score_ids": score_ids, "score_values": values}
    dropped = real_loss(**pack(sequences), **head, **RECORDS)
    kept = real_loss(**pack(sequences), **head, **RECORDS, skip_zero_rows=False)
    torch.testing.assert_close(dropped.loss, kept.loss, rtol=1e-13, atol=1e-13)
    rows = sum(len(s["targets"]) for s in sequences)
    assert kept.computed.all() and int(dropped.computed.sum()) < rows
    assert torch.isnan(dropped.logprobs[~dropped.computed]).all()
    torch.testing.assert_close(dropped.logprobs[dropped.computed], kept.logprobs[dropped.computed])


def test_every_group_of_one_gets_zero_advantage_and_still_refines():
    sequences, weight, score_ids, values = make_sequences(5, 3, 1)
    out = real_loss(**pack(sequences), weight=weight, score_ids=score_ids, score_values=values, **RECORDS)
    assert not out.advantages.any() and out.exploration_loss == 0 and out.refinement_loss != 0


@given(st.lists(st.integers(-5, 20), min_size=2, max_size=8, unique=True), st.floats(0, 1))
def test_label_weights_interpolate(values, place):
    grid = torch.tensor(sorted(values), dtype=torch.float64)
    label = torch.minimum(grid[0] + place * (grid[-1] - grid[0]), grid[-1])
    (q,) = label_weights(label[None], grid)
    assert float((q.sum() - 1).abs()) < 1e-12 and int((q > 0).sum()) <= 2 and float(q.min()) >= 0
    assert float(((q * grid).sum() - label).abs()) < 1e-9


def test_labels_between_scores_are_not_turned_into_zero():
    """The reference's mistake 6: labels other than the integers 1..5 become 0."""
    values = torch.tensor([1.0, 3.0, 5.0])
    q = label_weights(torch.tensor([1.0, 2.0, 3.5, 5.0]), values)
    assert q.tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0, 0.75, 0.25], [0, 0, 1]]
    with pytest.raises(ValueError, match="off the scale"):
        label_weights(torch.tensor([3.0, 0.0]), values)
    with pytest.raises(ValueError, match="off the scale"):
        label_weights(torch.tensor([float("nan")]), values)
    with pytest.raises(ValueError, match="ascending"):
        label_weights(torch.tensor([1.0]), torch.tensor([3.0, 1.0]))


def test_groups_with_equal_samples_but_different_probabilities_still_teach():
    """The reference's mistake 7: a group whose sampled scores are all right is thrown away."""
    logp = torch.log_softmax(torch.tensor([[0.0, 3.0, 0.0], [0.0, 4.0, 0.0]]), 1)
    terms = reward_parts(logp, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0]))
    advantages = group_advantages(terms.reward, torch.tensor([0, 0]))
    assert advantages[0] < 0 < advantages[1]


def test_row_coefficients_of_the_design():
    """u_k = g_y k p_k - lam w q_k, the closed form that faster kernels use."""
    torch.manual_seed(0)
    z = torch.randn(6, 5, dtype=torch.float64)
    logp = (torch.log_softmax(torch.cat([z, torch.randn(6, 9, dtype=torch.float64)], 1), 1)[:, :5]).requires_grad_()
    values = torch.arange(1, 6, dtype=torch.float64)
    labels = torch.tensor([1, 2.25, 3, 4.5, 5, 1.75], dtype=torch.float64)
    lam, w = 0.7, 1 / 6
    terms = reward_parts(logp, values, labels, lam=lam)
    (u,) = torch.autograd.grad(-(terms.refinement.sum() * w), logp)
    p = logp.detach().exp()
    g_y = 2 * w * (expected_score(logp, values).detach() - labels)
    torch.testing.assert_close(
        u, g_y[:, None] * values * p - lam * w * label_weights(labels, values), rtol=1e-13, atol=1e-15
    )


def test_expected_score_is_not_renormalised_by_default():
    logp = torch.log(torch.tensor([[0.1, 0.2, 0.1]]))
    values = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(expected_score(logp, values), torch.tensor([0.8]))
    torch.testing.assert_close(expected_score(logp, values, renormalize=True), torch.tensor([2.0]))


@settings(max_examples=50, deadline=None)
@given(
    rewards=st.lists(st.floats(-20, 2), min_size=1, max_size=9),
    baseline=st.sampled_from(["leave_one_out", "mean"]),
    normalize=st.booleans(),
    clip=st.sampled_from([0.0, 1.0]),
)
def test_advantages_of_one_group(rewards, baseline, normalize, clip):
    got = group_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.zeros(len(rewards), dtype=torch.int64),
        baseline=baseline, normalize_std=normalize, clip=clip,
    )  # fmt: skip
    want = naive_advantages(rewards, baseline, normalize, clip)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-7, atol=1e-7)


def test_rounding_noise_is_not_blown_up():
    rewards = torch.full((8,), -3.0) + torch.linspace(0, 1e-6, 8)
    assert group_advantages(rewards, torch.zeros(8, dtype=torch.int64)).abs().max() < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.float64)}, "labels must have shape"),
        ({"labels": torch.ones(12)}, "labels must be torch.float64"),
        ({"rollout": torch.full((1,), 12)}, "rollout must"),
        ({"group": torch.zeros(5, dtype=torch.int64)}, "group must have shape"),
        ({"rollout_valid": torch.ones(5, dtype=torch.bool)}, "rollout_valid must have shape"),
        ({"score_hidden": torch.zeros(12, 4, dtype=torch.float64)}, "score_hidden has 4 columns"),
        ({"group": torch.zeros(12)}, "group must be int64"),
        ({"group": torch.zeros(11, dtype=torch.int64)}, r"group must have shape \(12,\)"),
        ({"rollout_valid": torch.ones(12)}, "rollout_valid must be torch.bool"),
        ({"score_ids": torch.tensor([3, 4, 3, 5])}, "score_ids must be different tokens"),
        ({"score_ids": torch.tensor([3, 4, 23, 5])}, r"score_ids must lie in 0\.\.22"),
        ({"labels": torch.full((12,), 99.0, dtype=torch.float64)}, "off the scale"),
        ({"labels": torch.full((12,), float("nan"), dtype=torch.float64)}, "off the scale"),
        ({"engine_score_logprobs": torch.zeros(12, 3)}, r"engine_score_logprobs must have shape \(12, 4\)"),
        ({"engine_score_logprobs": torch.zeros(12, 4)}, "engine_score_logprobs must be torch.float64"),
        ({"bias": torch.zeros(22, dtype=torch.float64)}, r"bias must have shape \(23,\)"),
        ({"bias": torch.zeros(23)}, "bias is torch.float32 and weight torch.float64"),
        ({"head": HeadOptions(impl="triton")}, "does not take torch.float64"),
        ({"num_rollouts": 0}, "num_rollouts must be above 0"),
        ({"score_ids": torch.tensor([3, 4, 6, 5], device="meta")}, "score_ids is on meta"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    sequences, weight, score_ids, values = make_sequences(0, 3, 4)
    arguments = pack(sequences) | {"weight": weight, "score_ids": score_ids, "score_values": values}
    with pytest.raises(ValueError, match=message):
        real_loss(**(arguments | change))
