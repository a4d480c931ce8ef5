"""A model spread over ranks: losses, gradients, steps and metrics are those of one process."""

from __future__ import annotations

import pytest
import torch

from real_fast.config import OptimConfig, TrainConfig
from real_fast.config.schema import ObjectiveConfig
from real_fast.distributed.ranks import Ranks
from real_fast.distributed.shard import whole, whole_bytes
from real_fast.distributed.world import ALONE
from real_fast.methods.base import UpdateCounts
from real_fast.model.policy import Policy
from real_fast.model.ref_policy import RefPolicy
from real_fast.model.sharded import spread
from real_fast.model.waiting import Waiting
from real_fast.runs.checkpoint import TrainState
from real_fast.training.optim import build_optimizer, build_scheduler
from real_fast.training.step_metrics import StepMetrics
from real_fast.training.timer import Timer
from real_fast.training.update import Updater
from tests.distributed import resharding
from tests.distributed.ranks import run_ranks
from tests.helpers import SCALE, make_groups, make_method

CPU = torch.device("cpu")


def tiny(tied, vocabulary=301, dtype=torch.float32, **changes):
    return resharding.tiny(tied, vocabulary, **changes).to(dtype)


def updater_of(policy, world, lr=1e-3, budget=100, shared=True, name="adamw", steps=3):
    optim = OptimConfig(lr=lr, name=name)
    optimizer = build_optimizer(policy.model, optim)
    train = TrainConfig(micro_batch_tokens=budget, shared_prompt=shared)
    scheduler = build_scheduler(optimizer, optim, steps)
    return Updater(policy, optimizer, scheduler, optim, train, 0, world, Timer({}), TrainState())


def one_update(policy, updater, world, groups, method, step=True):
    """Metrics, gradients (None behind a step) and what the loss saw."""
    counts, metrics, seen = UpdateCounts.of(groups), StepMetrics(groups, SCALE, world), []
    policy.train()
    batches = updater.micro_batches(groups)
    old = [None] * len(batches)
    for iteration in range(method.iterations):
        for i, batch in enumerate(batches):
            inner = method.loss(counts, old[i], compare=True)

            def loss(hidden, weight, given, inner=inner):
                seen.append((type(weight).__name__, tuple(weight.shape), given.labels.tolist(), given.labels.dtype))
                return inner(hidden, weight, given)

            with updater.accumulate(last=i == len(batches) - 1):
                out = policy(batch, loss)
                out.loss.backward()
            old[i] = metrics.add(batch, out, iteration)
        if iteration == 0:
            metrics.compare_engine()
        gradients = {name: whole(p.grad).double() for name, p in policy.model.named_parameters()}
        if step:
            updater.step()
    return metrics.result() | updater.metrics(), gradients, seen


def far(found, want):
    """The largest relative error of a tensor."""
    return max(
        float((whole(found[k]).double() - want[k].double()).norm() / want[k].double().norm().clamp_min(1e-30))
        for k in want
    )


def on_ranks(kind, tied, shared, checkpointing, replicas, dtype, steps, groups, options, optimizer):
    """On every rank: how far it is from one process, which each rank also is beside."""
    world = Ranks(CPU, replicas)
    method = make_method(kind, options)
    found = {}
    alone = Policy(tiny(tied, dtype=dtype), None, "sdpa" if shared else None)
    model = tiny(tied, dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    many = Policy(model, None, "sdpa" if shared else None)
    spread(many, world.mesh)
    ours = updater_of(many, world, shared=shared, name=optimizer)
    theirs = updater_of(alone, ALONE, shared=shared, name=optimizer)
    for n in range(steps):
        some = make_groups(seed=n, n=groups, missing=True)
        metrics, gradients, seen = one_update(many, ours, world, some, method, step=steps > 1)
        want, one, _ = one_update(alone, theirs, ALONE, some, method, step=steps > 1)
        found.setdefault("gradients", far(gradients, one))
        found.setdefault("metrics", (metrics, want))
        found.setdefault("seen", seen)
    weights = dict(alone.model.named_parameters())
    found["weights"] = max(
        float((whole(p) - weights[name]).abs().max().detach()) for name, p in many.model.named_parameters()
    )
    found["held"] = whole_bytes(many)
    many.eval()
    with torch.no_grad():
        many(ours.micro_batches(make_groups())[0], lambda hidden, weight, batch: hidden.sum())
    found["held behind a forward pass"] = whole_bytes(many)
    found["norms"] = world.gather(metrics["grad_norm"]) if steps > 1 else []
    return found


PLAIN = ObjectiveConfig(normalize_std=False)


@pytest.mark.parametrize(
    ("ranks", "replicas", "kind", "tied", "shared", "checkpointing"),
    [
        (2, 1, "real", False, True, False),
        (2, 1, "real", True, True, True),
        (3, 1, "binary_rl", True, False, False),
        (3, 1, "sft", False, True, False),
        (2, 2, "real", False, True, False),
        (4, 2, "tract", True, True, False),
    ],
)
def test_gradients_and_metrics_are_those_of_one_process(ranks, replicas, kind, tied, shared, checkpointing):
    args = (kind, tied, shared, checkpointing, replicas, torch.float64, 1, 5, PLAIN, "adamw")
    for found in run_ranks(ranks, on_ranks, *args):
        assert found["gradients"] <= 1e-10
        ours, theirs = found["metrics"]
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"body/tokens", "body/padding"}:  # of padded rows, as they are put together
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-9, nan_ok=True), name
        assert found["held"] == found["held behind a forward pass"] == 0


def test_labels_reach_the_loss_as_they_are():
    given = sorted(label for g in make_groups(n=5) for label in [g.label] * len(g.rollouts))
    seen = [
        one
        for found in run_ranks(2, on_ranks, "real", False, True, False, 1, torch.float32, 1, 5, PLAIN, "adamw")
        for one in found["seen"]
    ]
    assert {(kind, dtype) for kind, _, _, dtype in seen} == {("Parameter", torch.float32)}
    assert {shape for _, shape, _, _ in seen} == {(301, 32)}
    assert sorted(label for _, _, labels, _ in seen for label in labels)[-len(given) :] == given


@pytest.mark.parametrize("ranks", [2, 3])
def test_steps_in_float32(ranks):
    for found in run_ranks(ranks, on_ranks, "real", True, True, False, 1, torch.float32, 3, 7, PLAIN, "adamw"):
        assert found["gradients"] <= 1e-5
        assert found["weights"] <= 1e-6
        assert len(set(found["norms"])) == 1


def test_fewer_groups_than_ranks():
    for found in run_ranks(3, on_ranks, "real", False, True, False, 1, torch.float64, 1, 1, PLAIN, "adamw"):
        assert found["gradients"] <= 1e-10


def on_one_rank():
    world = Ranks(CPU)
    method, found = make_method("real", ObjectiveConfig()), []
    alone, one = Policy(tiny(True), None, "sdpa"), Policy(tiny(True), None, "sdpa")
    spread(one, world.mesh)
    for policy, speaker in ((alone, ALONE), (one, world)):
        updater = updater_of(policy, speaker)
        metrics = [one_update(policy, updater, speaker, make_groups(seed=n, n=5), method)[0] for n in range(3)]
        found.append((metrics, {name: whole(p).clone() for name, p in policy.model.named_parameters()}))
    return found


def test_one_rank_computes_the_same_bits():
    [(plain, sharded)] = run_ranks(1, on_one_rank)
    assert plain[0] == sharded[0]
    assert all(torch.equal(plain[1][name], sharded[1][name]) for name in plain[1])


def eight_bits():
    """The largest difference of weights after 3 steps, in updates, and the kinds of state that were kept."""
    world = Ranks(CPU)
    method = make_method("real", PLAIN)
    alone, many = Policy(tiny(True, 512), None, "sdpa"), Policy(tiny(True, 512), None, "sdpa")
    spread(many, world.mesh)
    updaters = [updater_of(p, w, lr=1e-3, name="adamw8bit") for p, w in ((alone, ALONE), (many, world))]
    for n in range(3):
        for policy, speaker, updater in zip((alone, many), (ALONE, world), updaters, strict=True):
            one_update(policy, updater, speaker, make_groups(seed=n, n=5), method)
    weights = dict(alone.model.named_parameters())
    far_off = [(whole(p) - weights[name]).abs().mean() for name, p in many.model.named_parameters()]
    state = updaters[1].optimizer.state[many.model.get_input_embeddings().weight]
    return float(max(far_off)) / 3e-3, type(state["exp_avg"].to_local()).__name__


def test_moments_in_8_bits():
    for far_off, kind in run_ranks(2, eight_bits):
        assert far_off <= 0.01 and kind == "OptimState8bit"


def in_16_bits():
    """Relative errors of a bf16 gradient, against float32's: by one process, and on ranks."""
    world, method, groups = Ranks(CPU), make_method("real", PLAIN), make_groups(n=5)
    deep = {"num_hidden_layers": 12}
    exact, alone, many = (Policy(tiny(False, **deep), half, "sdpa") for half in (None, torch.bfloat16, torch.bfloat16))
    spread(many, world.mesh, torch.bfloat16)
    found = []
    for policy, speaker in ((exact, ALONE), (alone, ALONE), (many, world)):
        updater = updater_of(policy, speaker)
        found.append(one_update(policy, updater, speaker, groups, method, step=False)[1])
    want = torch.cat([found[0][name].flatten() for name in found[0]])
    return [float((torch.cat([g[n].flatten() for n in found[0]]) - want).norm() / want.norm()) for g in found[1:]]


def test_16_bits_are_as_exact_as_on_one_process():
    for one, many in run_ranks(2, in_16_bits):
        assert 0.001 < one < 0.1 and many < 1.1 * one


def reference():
    """How far a sharded reference's log-probabilities are from a whole one's, before and behind a wait elsewhere."""
    world = Ranks(CPU)
    alone, many = Policy(tiny(False, 303), None, "sdpa"), Policy(tiny(False, 303), None, "sdpa")
    spread(many, world.mesh)
    batches = updater_of(many, world).micro_batches(make_groups(n=5))
    want = torch.cat(RefPolicy(alone, 1.0, True).logprobs(batches))
    ref = RefPolicy(many, 1.0, False)
    here = torch.cat(ref.logprobs(batches))
    ref.waiting = Waiting(ref._tensors, CPU, in_place=True)  # as where the policy is on a GPU
    held = sum(part.untyped_storage().nbytes() for part in ref._tensors())
    behind = torch.cat(ref.logprobs(batches))
    return float((here - want).abs().max()), torch.equal(here, behind), held


def test_the_reference_of_the_kl_leaves_the_device_and_comes_back():
    for off, same, held in run_ranks(2, reference):
        assert off < 1e-6 and same and held == 0
