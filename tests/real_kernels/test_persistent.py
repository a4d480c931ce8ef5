"""The kernel whose programs go from tile to tile, against the one with a program per tile and against float64."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here (it has no wheel for this platform)", allow_module_level=True)

from real_kernels import HeadOptions, linear_logprob, logprob_and_entropy, tiles, triton_head, weighted_logprob
from real_kernels.rows import Rows
from real_kernels.tiles import Tile
from real_kernels.triton_head import TritonHead
from tests.real_kernels.hard_rows import DEVICE, eager, error, exact, fused, make

ARCH = tiles.architecture(DEVICE)
if DEVICE.type == "cuda":
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(ARCH != "sm_90", reason=f"the persistent kernel is for sm_90, and this is {ARCH}"),
    ]
# Of the card, or small ones for the interpreter.
PERSISTENT = next((t for t in tiles.TILES.get(ARCH, ()) if t.persistent), Tile(32, 64, 32, 1, 4, 2, persistent=True))
BF16, BN = torch.bfloat16, PERSISTENT.columns
# Rows, D, V: one tile; less than half a tile; odd columns; several groups of row tiles, and a tile that is left over.
SHAPES = [(64, 32, BN), (7, 40, BN // 2 - 3), (33, 24, 3 * BN + 11), (200, 64, 5 * BN + BN // 2 + 1)]


@contextmanager
def only(tile):
    """Take this tile alone; yields a list that gets the grid of each launch of the persistent kernel."""
    grids, kernel = [], triton_head.persistent_kernel

    class Noted:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    with (
        mock.patch.multiple(tiles, INTERPRETED=(tile,), TILES={**tiles.TILES, ARCH: (tile,)}),
        mock.patch.multiple(triton_head, BASE_ROWS=1, persistent_kernel=Noted()),
    ):
        yield grids


def kept(persistent, hidden, weight, targets, temperature):
    """What the forward pass saves."""
    head = TritonHead(weight.detach(), None, None, 2**30)
    with only(PERSISTENT._replace(persistent=persistent)) as grids:
        rows = Rows(hidden.detach(), targets, False, temperature)
        saved = head.keep(rows, head.buffer(rows.n))
    assert bool(grids) == persistent
    return saved


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_same_bits_as_with_a_program_per_tile(shape, temperature):
    """But for the sums of exponentials, which are added in another order. Some rows are far from their base."""
    hidden, weight, targets, _ = make(*shape, BF16, torch.linspace(-60, 12, shape[0]))
    with torch.no_grad():  # in the first and the last column, in both halves of tiles, and one nowhere
        targets[:6] = torch.tensor([0, shape[2] - 1, BN // 2 - 4, shape[2] // 2, 1, -1], device=DEVICE)
    one, other = (kept(persistent, hidden, weight, targets, temperature) for persistent in (True, False))
    assert torch.equal(one.buffer, other.buffer)
    assert torch.equal(one.extra[0], other.extra[0]) and torch.equal(one.extra[2], other.extra[2])
    known = targets >= 0
    for name in ("row_max", "log_sum", "logp"):
        mine, theirs = (getattr(saved.stats, name)[known] for saved in (one, other))
        torch.testing.assert_close(mine, theirs, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_as_exact_as_with_a_program_per_tile(shape):
    """All rows at once, and in chunks."""
    made = make(*shape, BF16, torch.linspace(-6, 12, shape[0]))
    want = exact(*made)
    for chunk_bytes in (2**30, (shape[0] // 3 + 1) * 2 * (shape[2] + 64)):
        with only(PERSISTENT) as grids:
            got = fused(*made, chunk_bytes=chunk_bytes)
        with only(PERSISTENT._replace(persistent=False)):
            other = fused(*made, chunk_bytes=chunk_bytes)
        assert error(got[0], want[0]) < 1e-5
        for g, o, w in zip(got[1:], other[1:], want[1:], strict=True):
            assert error(g, w) <= 1.01 * error(o, w)
    assert len(grids) > 1


def test_no_less_exact_than_eager():
    """From hopeless targets to nearly certain ones, with room to spare, as test_row_base.py has them."""
    lse = float(torch.log(torch.tensor(1024.0))) + 2
    made = make(128, 32, 1024, BF16, lse + torch.rand(128, generator=torch.Generator().manual_seed(1)) * 10 - 5)
    want, slow = exact(*made), eager(*made)
    with only(PERSISTENT) as grids:
        got = fused(*made)
    assert grids and error(got[0], want[0]) < 1e-6
    for g, s, w in zip(got[1:], slow[1:], want[1:], strict=True):
        assert error(g, w) < 0.9 * error(s, w)


def test_there_are_no_more_programs_than_tiles():
    with only(PERSISTENT) as grids:
        fused(*make(7, 32, BN // 2, BF16, torch.zeros(7)))
    assert grids == [(1,)]


def test_nan_stays_in_its_row():
    hidden, weight, targets, u = make(40, 32, 3 * BN, BF16, torch.zeros(40))
    with torch.no_grad():
        hidden[3] = float("nan")
    with only(PERSISTENT):
        logp, dh, _ = fused(hidden, weight, targets, u)
    assert logp.isnan().nonzero().flatten().tolist() == [3]
    assert dh.isnan().any(1).nonzero().flatten().tolist() == [3]


def plain(**options):
    return lambda h, w, t: weighted_logprob(h, w, t, torch.ones(len(t), device=DEVICE), **options)[0]


KEPT = HeadOptions(impl="triton", mode="forward")
# What the kernel is not for, by the function that asks for it.
OTHERS = {
    "recomputed": (BF16, 32, lambda h, w, t: linear_logprob(h, w, t, head=HeadOptions(impl="triton")).sum()),
    "entropy": (BF16, 32, lambda h, w, t: logprob_and_entropy(h, w, t, head=HeadOptions(impl="triton"))[0].sum()),
    "bias": (BF16, 32, lambda h, w, t: plain(bias=torch.zeros(len(w), dtype=BF16, device=DEVICE), head=KEPT)(h, w, t)),
    "float16": (torch.float16, 32, plain(head=KEPT)),
    "float32": (torch.float32, 32, plain(head=KEPT)),
    "rows off 16 bytes": (BF16, 33, plain(head=KEPT)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_it_is_not_for_takes_a_program_per_tile(name):
    dtype, d, call = OTHERS[name]
    hidden, weight, targets, _ = make(40, d, 2 * BN, dtype, torch.zeros(40))
    want = torch.autograd.grad(call(hidden, weight, targets), (hidden, weight))
    with only(PERSISTENT) as grids:
        got = torch.autograd.grad(call(hidden, weight, targets), (hidden, weight))
    assert not grids
    for g, w in zip(got, want, strict=True):
        assert error(g, w.double()) < 0.01


def test_no_default_is_persistent():
    """Its gain is a prediction; it is for who times the set (REAL_KERNELS_AUTOTUNE=1)."""
    assert not any(of_arch[0].persistent for of_arch in tiles.TILES.values())
    assert any(tile.persistent for tile in tiles.TILES["sm_90"])
