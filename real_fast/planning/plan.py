"""A plan: parameters, memory by part, what fits and the work of an update, from a model's shape alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from real_fast.config.commands import PlanConfig
from real_fast.config.schema import Config
from real_fast.config.validation import check_bounds
from real_fast.planning.changes import changed_flags, smallest_change
from real_fast.planning.flops import UpdateFlops
from real_fast.planning.memory import largest
from real_fast.planning.need import GIB, RESERVE, Need, lengths, need, precision_of, smallest_share
from real_fast.planning.shape import Shape, shape_of
from real_fast.planning.share import engine_share


@dataclass(frozen=True)
class Plan:
    """Everything that the report says.

    Attributes:
        shape: The model's.
        need: What a device must hold with the settings as they are.
        flops: The work of an update.
        change: The settings with the smallest change that fits; None where nothing helps.
        device: Where nothing helps, the GiB of the smallest device that does, and the settings for it.
        options: What fits: the engine's share, activation checkpointing, and the tokens of a micro-batch.
    """

    shape: Shape
    need: Need
    flops: UpdateFlops
    change: PlanConfig | None
    device: tuple[int, PlanConfig] | None
    options: list[tuple[float, bool, int]]


def make_plan(config: PlanConfig) -> Plan:
    """Count parameters, memory and operations.

    Raises:
        ConfigError: A setting out of its bounds, or an unknown method.
        ModelError: A model whose shape is not to be had or not counted.
    """
    check_bounds(config)
    uses_rollouts = _uses_rollouts(config)
    shape = shape_of(config.model, precision_of(config), config.trust_remote_code)
    sizes, kl = shape.sizes, uses_rollouts and config.objective.kl_coef > 0
    (p, r), k = lengths(config), config.rollout.group_size
    flops = shape.flops.update_of(
        [(p, [(r - 1, r)] * k)] * config.rollout.prompts_per_step,
        config.train.shared_prompt,
        config.train.activation_checkpointing,
        kl=kl,
        iterations=config.objective.num_iterations if uses_rollouts else 1,
    )
    change, device = smallest_change(config, sizes, kl), None
    if change is None:

        def on(gib: int) -> PlanConfig | None:
            return smallest_change(replace(config, gpu_memory=float(gib)), sizes, kl, free=True)

        least = 2**16 - largest(lambda less: on(2**16 - less) is not None, 2**16 - 1)
        if (settings := on(least)) is not None:
            device = least, settings
    options = []
    for share in dict.fromkeys((engine_share(config.rollout), smallest_share(config, sizes))):
        for checkpointing in (False, True):
            train = replace(config.train, activation_checkpointing=checkpointing)
            start = replace(config, train=train, rollout=replace(config.rollout, gpu_memory_utilization=share))

            def fits(tokens: int, start: PlanConfig = start) -> bool:
                group = need(start, sizes, kl).group
                changed = replace(start, train=replace(start.train, micro_batch_tokens=max(tokens, group)))
                return need(changed, sizes, kl).fits

            options.append((share, checkpointing, largest(fits)))
        if config.rollout.engine == "transformers":
            break
    return Plan(shape, need(config, sizes, kl), flops, change, device, options)


def _uses_rollouts(config: PlanConfig) -> bool:
    """Whether the method samples; the registry, which brings PyTorch along, is asked only where it matters."""
    usual = Config()
    if config.method == usual.method and not config.objective.kl_coef and config.objective.num_iterations == 1:
        return True
    from real_fast.methods.registry import method_class

    return bool(method_class(config).uses_rollouts)


def report(config: PlanConfig, plan: Plan) -> str:
    """The plan for people to read; its last line says whether the run fits."""
    s, n, train, (p, r) = plan.shape.sizes, plan.need, config.train, lengths(config)
    m = n.memory
    recomputed = ", activation checkpointing" if train.activation_checkpointing else ""
    lines = [
        f"{config.model}: {s.parameters / 1e9:.2f} B parameters in {s.layers} layers, "
        f"{'tied' if s.tied else 'untied'} head ({s.head / 1e9:.2f} B), from {plan.shape.source}",
        f"update: {config.rollout.prompts_per_step} prompts x {config.rollout.group_size} rollouts, prompts of {p} "
        f"tokens, responses of {r}; {plan.flops.ours / 1e15:.3g} PFLOP, {plan.flops.ratio:.1f} times less than the "
        f"reference-style update's {plan.flops.reference / 1e15:.3g}",
        "",
        f"memory per device, {config.gpus} x {config.gpu_memory:g} GiB, micro-batches of {train.micro_batch_tokens} "
        f"tokens (one group takes {n.group}){recomputed}",
    ]
    parts = {
        "weights, fp32": m.weights,
        "gradients, fp32": m.gradients,
        "AdamW's moments, fp32": m.moments,
        "16-bit copies of weights": m.copies,
        **({"reference for the KL, frozen": m.reference} if m.reference else {}),
        "activations": m.activations,
        "head (a chunk of logits, fp32 gradients)": m.head,
        f"rollout engine ({config.rollout.engine}, {n.sequences} sequences of {p + r} at a time)": n.engine,
        "context and workspaces": RESERVE,
    }
    width = max(map(len, parts))
    lines += [f"  {name:<{width}} {size / GIB:8.1f} GiB" for name, size in parts.items()]
    lines += [f"  {'all':<{width}} {n.total / GIB:8.1f} GiB", "", "what fits"]
    lines.append("  rollout.gpu_memory_utilization  train.activation_checkpointing  train.micro_batch_tokens")
    for share, checkpointing, tokens in plan.options:
        found = f"up to {tokens}" if tokens >= n.group else "nothing"
        shown = "not used" if config.rollout.engine == "transformers" else f"{share:g}"
        lines.append(f"  {shown:<30}  {str(checkpointing).lower():<29}  {found}")
    return "\n".join([*lines, "", _verdict(config, plan)])


def _verdict(config: PlanConfig, plan: Plan) -> str:
    n, machine = plan.need, f"{config.gpus} x {config.gpu_memory:g} GiB"
    one_device = "; real-fast trains on one device today, so this is arithmetic" if config.gpus > 1 else ""
    if n.fits:
        return f"FITS: {n.total / GIB:.1f} of {config.gpu_memory:g} GiB{one_device}"
    why = f"{n.total / GIB:.1f} GiB of {config.gpu_memory:g}"
    if n.group > n.tokens:
        why = f"one group takes {n.group} tokens, and train.micro_batch_tokens is {n.tokens}"
    elif n.total <= n.room:
        why = f"the rollout engine can decode {n.sequences} sequences at a time, and {n.wanted} are needed"
    if plan.change is not None:
        return f"DOES NOT FIT: {why}. The smallest change that fits: {changed_flags(config, plan.change)}{one_device}"
    if plan.device is None:
        return f"DOES NOT FIT: {why}. No change of settings helps, nor does any device{one_device}"
    gib, settings = plan.device
    held = (n.memory.weights + n.memory.gradients + n.memory.moments) / GIB
    with_flags = f" with {flags}" if (flags := changed_flags(config, settings)) else ""
    return (
        f"DOES NOT FIT {machine} with any settings: weights, gradients and moments alone take {held:.1f} GiB. "
        f"The smallest device that fits: {gib} GiB{with_flags}{one_device}"
    )
