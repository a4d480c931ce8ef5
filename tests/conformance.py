"""What every method has to keep, as functions of its class: for the registry's methods, new ones, and wrong ones."""

from __future__ import annotations

from dataclasses import replace

import torch

from real_fast.batching.micro_batches import micro_batches
from real_fast.config import Config, ObjectiveConfig, RolloutConfig
from real_fast.methods.base import UpdateCounts
from real_fast.methods.supervised import supervised_group
from real_fast.model.policy import Policy
from real_fast.types import JudgeRow
from tests.helpers import EOS, LONG, SCALE, make_groups

KL = {"kl_coef": 0.1, "loss_norm": "token_mean"}

FURTHER = {"num_iterations": 2, "epsilon": 0.9}  # so wide that nothing is clipped


def letters(texts):
    """Token ids of several texts, one token a letter."""
    return [[3 + ord(letter) % 300 for letter in text] for text in texts]


def float64_policy(tiny_llama):
    """A model whose loss is a function in float64, with a gradient for every weight.

    Llama's norms go through float32 even in a float64 model, which would hide what is smaller than 1e-7; and
    Transformers starts the padding token's embedding at 0, where the norm bends the most, and gives it no gradient,
    where that token is in a prompt too.
    """
    model = tiny_llama().double()
    embeddings = model.get_input_embeddings()
    embeddings.weight.data[embeddings.padding_idx] = embeddings.weight.data.flip(0)[embeddings.padding_idx]
    embeddings.padding_idx = None
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            model.set_submodule(name, norm)  # its weights are 1, as the model's are
    return Policy(model, attention="sdpa")


def groups_for(method, seed=3):
    """Groups of unequal lengths, as the method trains on them."""
    if method.uses_rollouts:
        groups = make_groups(seed, n=5, k=4, missing=True)
        for group in groups:
            for place, rollout in enumerate(group.rollouts):
                rollout.outcome = (place + group.index) % 4 if rollout.has_score else None  # 3: off the scale
                rollout.sampled_logprobs = [-5.5 - 0.1 * (token % 7) for token in rollout.sampled_ids]  # of any sampler
        return groups
    texts = ["Right.", "Partly so, not all of it.", "No", "It follows the rubric, but says nothing of why.", "Hm, well"]
    groups = []
    for n in range(5):
        feedbacks, labels = [texts[(n + i) % 5] for i in range(1 + n % 3)], [1.0, 2.5, 3.0][: 1 + n % 3]
        prompt = [(7 * n + i) % 300 + 3 for i in range(4 + 3 * n)]
        row = JudgeRow(str(n), str(n), "", "", "", "", 2.0, feedbacks, labels, prompt)
        groups.append(supervised_group(row, range(len(feedbacks)), n, letters, replace(SCALE, end_id=EOS)))
    return groups


def make(method, changes, ahead=0):
    config = Config(method=method.name, objective=ObjectiveConfig(**changes), rollout=RolloutConfig(ahead=ahead))
    return method(config, letters, SCALE)


def batches_of(method, groups, budget=LONG, shared=True):
    batches = micro_batches(groups, budget, 0, shared)
    for batch in batches:
        if method.config.objective.kl_coef:
            batch.ref_logprobs = -5.5 - 0.1 * (batch.targets % 7)  # of any reference
    return batches


def total(policy, method, groups, batches, old=None):
    """Loss and gradients of an update, and what its micro-batches returned."""
    policy.zero_grad()
    counts, outputs = UpdateCounts.of(groups), []
    for i, batch in enumerate(batches):
        out = policy(batch, method.loss(counts, None if old is None else old[i]))
        if torch.is_grad_enabled():
            out.loss.backward()
        outputs.append(out)
    loss = sum(out.loss.detach() for out in outputs)
    return loss, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}, outputs


def assert_close(grads, want, rtol=1e-9):
    assert grads.keys() == want.keys()
    assert any(grad.abs().max() > 1e-4 for grad in grads.values())
    scale = max(float(grad.abs().max()) for grad in want.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name], rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}")


def assert_independent_of_micro_batches(policy, cls, changes, ahead=0):
    """One loss and one gradient, however the groups of an update are packed and in whatever order."""
    method, groups = make(cls, changes, ahead), groups_for(cls)
    widest = max(group.shared_tokens for group in groups)
    padded = max(len(group.rollouts) * group.longest for group in groups)
    mixed = [groups[i] for i in (3, 0, 4, 1, 2)]
    layouts = [
        batches_of(method, some, budget, shared)
        for some, budget, shared in [
            (groups, LONG, True), (mixed, LONG, True), (groups, widest, True), (mixed, widest, True),
            (groups[::-1], widest, True), (groups, LONG, False), (mixed, padded, False),
        ]
    ]  # fmt: skip
    assert len(layouts[0]) == 1 and all(len(layouts[i]) > 1 for i in (2, 3, 4, 6))
    found = []
    for batches in layouts:
        losses, grads, old = [], {}, None
        for iteration in range(method.iterations):
            loss, its_grads, outputs = total(policy, method, groups, batches, old)
            old = old or outputs  # further iterations start from what the first returned
            losses.append(loss)
            grads |= {f"{name}, iteration {iteration}": grad for name, grad in its_grads.items()}
        found.append((torch.stack(losses), grads))
    for losses, grads in found[1:]:
        torch.testing.assert_close(losses, found[0][0], rtol=1e-9, atol=1e-11)
        assert_close(grads, found[0][1])


def with_constant_weights(method):
    """The method with importance weights that stay as they first were: no gradient goes through them."""
    made = {}
    if importance := getattr(method, "importance", None):
        method.importance = lambda logp, rows, batch, *more: made.setdefault(
            (id(batch), more[-1] is None), importance(logp, rows, batch, *more)
        )
    return method


def assert_gradient_is_the_slope(policy, cls, changes):
    """The gradient against central differences of the loss along random directions of all weights.

    A policy gradient's first loss is no function whose slope its gradient is: the advantages would move with the
    weights. That of a further iteration is one, since it keeps the first's advantages, and at the first's weights,
    where every ratio is 1, both have one gradient; the first's, with the gradient in the head's forward pass, is
    compared with it.
    """
    further, groups = with_constant_weights(make(cls, changes | FURTHER)), groups_for(cls)
    batches = batches_of(further, groups, budget=max(group.shared_tokens for group in groups))
    _, grads, outputs = total(policy, further, groups, batches)
    old = outputs if further.iterations > 1 else None
    if old is not None:
        first = grads
        _, grads, _ = total(policy, further, groups, batches, old)
        assert_close(first, grads)
        single = make(cls, changes)
        assert single.iterations == 1
        assert_close(total(policy, single, groups, batches)[1], grads)
    parameters = dict(policy.named_parameters())
    start = {name: p.detach().clone() for name, p in parameters.items()}
    generator, step = torch.Generator().manual_seed(1), 1e-6
    for _ in range(3):
        direction = {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in parameters.items()
        }
        values = []
        with torch.no_grad():
            for side in (step, -step):
                for name, p in parameters.items():
                    p.copy_(start[name] + side * direction[name])
                values.append(total(policy, further, groups, batches, old)[0])
            for name, p in parameters.items():
                p.copy_(start[name])
        slope = (values[0] - values[1]) / (2 * step)
        want = sum((grads[name] * direction[name]).sum() for name in grads)
        torch.testing.assert_close(slope, want, rtol=1e-7, atol=1e-7)
