"""Shared prompts by varlen kernels, plain ones in the place of those of a GPU, against dense attention in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from real_fast.attention import flash
from real_fast.attention.key_copies import KeyCopies
from real_fast.attention.layout import Layout
from real_fast.attention.varlen import VarlenAttention
from tests.attention.dense import CPU, GROUPS, check, dense, gradients, states
from tests.attention.plain_flash import plain_flash


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """PyTorch's operators, by plain products on the CPU."""
    monkeypatch.setattr(flash, "_flash_attn_varlen_forward", None)
    monkeypatch.setattr(flash, "_flash_attn_varlen_backward", None)
    with plain_flash() as calls:
        yield calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 12, 100])
def test_varlen_against_dense_attention(dtype, window, plain):
    layout = Layout.of_groups(GROUPS)
    inputs = states(layout.tokens, dtype)
    want = dense(layout, *inputs, 0.3, window)
    got = VarlenAttention(layout, CPU)(*inputs, 0.3, window)
    check(got, want, dtype)
    for mine, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        check(mine, theirs, dtype)
    # Keys are laid out once, but for a window that cuts.
    cut = window is not None and window < layout.longest
    copied = layout.tokens + int(layout.segments[:, 3].sum())
    assert plain == ([(layout.tokens, copied)] if cut else [(layout.tokens, layout.tokens), (18, 12)]) * 2


@given(
    groups=st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 7), max_size=4)), min_size=1, max_size=4),
    window=st.one_of(st.none(), st.integers(1, 12)),
)
def test_varlen_on_any_layout(groups, window):
    layout = Layout.of_groups(groups)
    inputs = states(layout.tokens, torch.float64, heads=2, kv_heads=1, size=8)
    want, got = dense(layout, *inputs, 0.5, window), VarlenAttention(layout, CPU)(*inputs, 0.5, window)
    check(got, want, torch.float64)
    for mine, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        check(mine, theirs, torch.float64)


def test_merging_in_bf16_costs_little():
    """Beside one call over all keys, whose output is rounded once: as good, but for one more rounding."""
    layout = Layout.of_groups(((40, (12, 30, 21)), (25, (18, 9))))
    inputs = states(layout.tokens, torch.bfloat16)
    want = dense(layout, *inputs, 0.3, None)
    errors = []
    for window in (None, layout.longest - 1):  # which cuts off one key, and so has them copied
        truth = want if window is None else dense(layout, *inputs, 0.3, window)
        got = VarlenAttention(layout, CPU)(*inputs, 0.3, window)
        found = [(got, truth), *zip(gradients(got, inputs), gradients(truth, inputs), strict=True)]
        errors.append([float((a.double() - b.double()).detach().norm() / b.double().detach().norm()) for a, b in found])
    merged, alone = errors
    assert all(mine < 1.5 * theirs for mine, theirs in zip(merged, alone, strict=True)), errors


def test_a_row_without_responses():
    layout = Layout.of_groups([(5, ()), (3, (0,))])
    attention = VarlenAttention(layout, CPU)
    inputs = states(layout.tokens, torch.float64)
    assert attention.shared is None
    check(attention(*inputs, 0.3, None), dense(layout, *inputs, 0.3, None), torch.float64)


def test_pytorchs_own_operators_take_what_they_are_given():
    """By their shape functions, which exist without a GPU."""
    q, k = (
        torch.empty(20, 6, 16, dtype=torch.bfloat16, device="meta"),
        torch.empty(9, 2, 16, dtype=torch.bfloat16, device="meta"),
    )
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    segments, pattern = flash.Segments(starts, starts, 12, 6), flash.Pattern(0.3, False)
    out, lse = flash.forward(q, k, k, segments, pattern)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (6, 20), torch.float32)
    grads = flash.backward(out, q, k, k, out, lse, segments, pattern)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


def test_flash_attn_is_called_by_its_names(monkeypatch):
    """The functions of flash-attn since 2.7, its arguments' names and order, by the same plain products."""

    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        assert not softcap and alibi_slopes is None and not return_softmax
        out, lse, *rest = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, False,
            scale=softmax_scale, window_size_left=window_size_left, window_size_right=window_size_right,
        )  # fmt: skip
        return out, lse, *rest[:2]

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        assert deterministic and not softcap and alibi_slopes is None and rng_state is None
        grads = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal,
            torch.zeros(2), torch.zeros(0), scale=softmax_scale, window_size_left=window_size_left,
            window_size_right=window_size_right,
        )  # fmt: skip
        for place, made in zip((dq, dk, dv), grads, strict=True):
            place.copy_(made)

    monkeypatch.setattr(flash, "_flash_attn_varlen_forward", forward)
    monkeypatch.setattr(flash, "_flash_attn_varlen_backward", backward)
    layout = Layout.of_groups(GROUPS)
    for window in (None, 4):
        inputs = states(layout.tokens, torch.float64)
        want, got = dense(layout, *inputs, 0.3, window), VarlenAttention(layout, CPU)(*inputs, 0.3, window)
        check(got, want, torch.float64)
        for mine, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
            check(mine, theirs, torch.float64)


def test_copies_of_keys_are_what_the_varlen_kernel_reads():
    layout = Layout.of_groups(GROUPS)
    segments, copies = VarlenAttention(layout, CPU).windowed
    keys = states(layout.tokens, torch.float64)[1][0].transpose(0, 1)
    spread = copies.spread(keys)
    assert segments.queries.tolist()[-1] == layout.tokens and segments.longest_key == layout.longest
    for i, (start, length, prompt, before) in enumerate(layout.segments.tolist()):
        assert segments.queries[i + 1] - segments.queries[i] == length
        want = torch.cat([keys[prompt : prompt + before], keys[start : start + length]])
        assert torch.equal(spread[segments.keys[i] : segments.keys[i + 1]], want)
    (mine,) = gradients(spread, [keys])
    (theirs,) = gradients(keys[copies.source], [keys])
    check(mine, theirs, torch.float64)


def test_gradients_of_copied_keys_add_up_in_float32():
    """In bf16, 256 + 1 is 256: adding 65 copies one by one would lose them all."""
    layout = Layout.of_groups([(1, (1,) * 65)])
    keys = torch.zeros(layout.tokens, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    copies = KeyCopies(layout, CPU)
    upstream = torch.ones(len(copies.source), 1, 1, dtype=torch.bfloat16)
    upstream[copies.own[0]] = 256
    copies.spread(keys).backward(upstream)
    assert keys.grad[0].item() == torch.tensor(256.0 + 65).bfloat16().item()
    assert keys.grad[1:].eq(1).all()
