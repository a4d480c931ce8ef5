"""Saved logits relative to one base per row, against float64, against eager, and against those of tiles' maxima."""

from __future__ import annotations

import importlib.util
from unittest import mock

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here (it has no wheel for this platform)", allow_module_level=True)

from real_kernels import HeadOptions, real_loss, tiles, triton_head, weighted_logprob
from real_kernels.rows import Rows
from real_kernels.tiles import Tile
from real_kernels.triton_head import TritonHead
from tests.oracles import OPTIONS, make_sequences, pack, records
from tests.real_kernels.hard_rows import DEVICE, eager, error, exact, fused, make

if torch.cuda.is_available():
    pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]
TILES_MAXIMA = 10**9  # rows from which on there is a base: never


def launched(call):
    """Names of the kernels that prepare dL/dz in a call."""
    names = []
    kernels = ("base_kernel", "common_base_kernel", "dlogits_kernel")

    def noted(name, kernel):
        class Noted:
            def __getitem__(self, grid):
                names.append(name)
                return kernel[grid]

        return Noted()

    with mock.patch.multiple(triton_head, **{name: noted(name, getattr(triton_head, name)) for name in kernels}):
        call()
    return names


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_hopeless_targets_to_nearly_certain_ones(dtype):
    """As benchmarks/head.py has them. In bfloat16 the errors stay below eager's with room to spare."""
    lse = float(torch.log(torch.tensor(1024.0))) + 2
    made = make(128, 32, 1024, dtype, lse + torch.rand(128, generator=torch.Generator().manual_seed(1)) * 10 - 5)
    want, slow = exact(*made), eager(*made)
    with mock.patch.object(tiles, "INTERPRETED", (Tile(64, 256, 32, 1, 4, 2),)):
        got, before = fused(*made), fused(*made, base_rows=TILES_MAXIMA)
    if dtype == torch.float32:
        assert max(map(error, got, want)) < 1e-5
        return
    assert error(got[0], want[0]) < 1e-6
    # One rounding of each operand: sqrt(2) of one alone, where eager's logits are off in their exponents too.
    for g, s, b, w in zip(got[1:], slow[1:], before[1:], want[1:], strict=True):
        assert error(g, w) < 0.9 * error(s, w) and error(g, w) < 1.5 * error(b, w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_targets_of_any_probability(dtype, temperature):
    """From certain to e^-1000: tiles within reach of the base and out of it, in one block of rows; row by row."""
    logits = torch.tensor([30.0, 12.0, 5.0, -5.0, -20.0, -26.0, -28.0, -35.0, -60.0, -90.0, -1000.0, 0.0] * 3)
    made = make(36, 24, 300, dtype, logits)
    want = exact(*made, temperature)
    assert float(want[0].min()) < -900 and float(want[0].max()) > -1e-5
    logp, dh, dw = fused(*made, temperature=temperature)
    assert error(logp, want[0]) < 1e-5
    near = 2e-5 if dtype == torch.float32 else 2**-7
    # float32's rounding of a probability near 1, times the target's weight: all there is of a certain row's gradient.
    rounding = 3e-7 * made[3].abs() * made[1].detach()[made[2]].norm(dim=1)
    off = (dh.double() - want[1]).norm(dim=1) - rounding
    assert (off < near * want[1].norm(dim=1)).all(), off / want[1].norm(dim=1)
    assert error(dw, want[2]) < near
    assert torch.isfinite(dh).all() and torch.isfinite(dw).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 0.99999])
def test_near_certainty(dtype, p):
    """The target's column is all cancellation near p = 1."""
    v = 50
    weight = torch.zeros(v, 16, device=DEVICE)
    weight[7, 0] = float(torch.log(torch.tensor(p / (1 - p) * (v - 1), dtype=torch.float64)))
    weight = weight.to(dtype).requires_grad_()
    hidden = torch.eye(1, 16, device=DEVICE, dtype=dtype).requires_grad_()
    made = hidden, weight, torch.tensor([7], device=DEVICE), torch.ones(1, device=DEVICE)
    logp, _, dw = fused(*made)
    want = exact(*made)
    # In bfloat16 the column, the hidden state times the row's factor, and the result are rounded.
    rounding = 0.0 if dtype == torch.float32 else 3 * 2**-9 * abs(float(want[2][7, 0]))
    assert abs(float(dw[7, 0]) - float(want[2][7, 0])) < 4e-7 + rounding
    assert abs(float(logp[0] - want[0][0])) < 4e-7 and float(logp[0]) <= 0


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_bias_chunks_and_what_is_frozen(needs, scale):
    """A bias that masks tokens, a target among them; hidden states far apart; several chunks, the last one small."""
    n, d, v = 41, 24, 203
    hidden, weight, targets, u = make(n, d, v, torch.float32, torch.zeros(n))
    bias = torch.randn(v, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    bias[64:128] = -torch.inf
    targets = torch.where((targets >= 64) & (targets < 128), 5, targets)
    targets[3] = 70
    hidden = (hidden.detach() * scale).requires_grad_(needs[0])
    weight, bias = weight.detach().requires_grad_(needs[1]), bias.requires_grad_(needs[2])
    u[3] = 0.0  # its log-probability is -inf, which has no gradient
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    others = torch.arange(n, device=DEVICE) != 3
    logp = torch.log_softmax(wide[0] @ wide[1].t() + wide[2], 1).gather(1, targets[:, None])[:, 0]
    want = torch.autograd.grad((logp * u.double())[others].sum(), wide)
    head = HeadOptions(impl="triton", mode="forward", chunk_bytes=256 * 4 * 15)
    with mock.patch.object(triton_head, "BASE_ROWS", 12):
        total, got = weighted_logprob(hidden, weight, targets, u, bias=bias, head=head)
    assert float(got[3]) == -torch.inf
    assert error(got[others], logp.detach()[others]) < 1e-5
    leaves = [x for x, needed in zip((hidden, weight, bias), needs, strict=True) if needed]
    expected = [x for x, needed in zip(want, needs, strict=True) if needed]
    for a, b in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        assert error(a, b) < 2e-5


def test_who_has_a_base():
    """64 rows and more, but neither score rows nor float16; the others have the pass that makes dL/dz."""
    new, old = ["base_kernel", "common_base_kernel"], ["dlogits_kernel"]
    for n, dtype, names in ((64, torch.bfloat16, new), (63, torch.bfloat16, old), (64, torch.float16, old)):
        made = make(n, 16, 70, dtype, torch.zeros(n))
        assert launched(lambda made=made: fused(*made, base_rows=64)) == names
    assert triton_head.BASE_ROWS == 64
    hidden, weight, _, _ = make(70, 16, 70, torch.float32, torch.zeros(70))
    head = TritonHead(weight.detach(), None, None, 1 << 30)
    rows = Rows(hidden.detach(), torch.tensor([3, 5], device=DEVICE), True)
    kept = head.keep(rows, head.buffer(70))
    assert head.dlogits_(kept, torch.ones(70, 2, device=DEVICE)) is None


def test_stored_times_factor_is_the_gradient_of_the_logits():
    """E and c of one chunk as triton_base.py has them, padded columns and rows out of reach of their base included."""
    logits = torch.tensor([0.0, -40.0, 20.0, -300.0, 3.0] * 14)
    hidden, weight, targets, u = make(70, 16, 139, torch.float32, logits)
    head = TritonHead(weight.detach(), None, None, 1 << 30)
    buffer = head.buffer(70)
    saved = head.keep(Rows(hidden.detach(), targets, False, 0.8), buffer)
    factor = head.dlogits_(saved, u[:, None])
    z = (hidden.detach().double() @ weight.detach().double().t()).requires_grad_()
    logp = torch.log_softmax(z / 0.8, 1).gather(1, targets[:, None])[:, 0]
    want = torch.autograd.grad((logp * u.double()).sum(), z)[0]
    assert error(buffer.double() * factor[:, None].double(), want) < 1e-5
    # A logit may be 2^40 above its base, and so few more in the sum.
    assert float(buffer.abs().max()) < 2.0**50


def test_an_id_outside_the_vocabulary_reads_and_writes_nothing_outside():
    """With validate=False nothing has looked at it; what a row like this gets is undefined, the others are as ever."""
    made = make(64, 16, 70, torch.float32, torch.zeros(64))
    want = fused(*made, validate=False)[1]
    ids = made[2].clone()
    ids[5], ids[6] = -100, 10**9
    got = fused(made[0], made[1], ids, made[3], validate=False)[1]
    others = (torch.arange(64, device=DEVICE) - 5.5).abs() > 1
    assert torch.equal(got[others], want[others])


def test_the_same_bits_again():
    made = make(70, 24, 139, torch.bfloat16, torch.linspace(-50, 20, 70, dtype=torch.float64))
    for a, b in zip(fused(*made), fused(*made), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [5, 1000])
def test_score_rows_beside_rows_with_a_base(rows):
    """Both in one chunk, and in several: the score rows' factor is 1. Against the way that stores nothing."""
    sequences, weight, score_ids, values = make_sequences(5, 3, 4, longest=6)
    packed = {k: t.detach().float() if t.is_floating_point() else t for k, t in pack(sequences).items()}
    packed = {name: t.to(DEVICE) for name, t in packed.items()}
    found = []
    for mode in ("forward", "recompute"):
        leaves = [packed[name].requires_grad_() for name in ("hidden", "score_hidden")]
        leaves.append(weight.detach().float().to(DEVICE).requires_grad_())
        options = records(impl="triton", mode=mode, chunk_bytes=64 * 4 * rows, **OPTIONS)
        scores = {"score_ids": score_ids.to(DEVICE), "score_values": values.float().to(DEVICE)}
        with mock.patch.object(triton_head, "BASE_ROWS", 1):
            out = real_loss(weight=leaves[2], **scores, **packed, **options)
        found.append(torch.autograd.grad(out.loss, leaves))
    for got, want in zip(*found, strict=True):
        assert error(got, want.double()) < 1e-5
