"""A plan as text, for people to read."""

from __future__ import annotations

from real_fast.config.commands import PlanConfig
from real_fast.planning.cards import BANDWIDTH, COMPUTE, HOP, LINKS, OVERLAP
from real_fast.planning.changes import changed_flags
from real_fast.planning.links import Links
from real_fast.planning.need import GIB, Need, lengths, training_of
from real_fast.planning.plan import Plan
from real_fast.planning.ranks import Ranks

_ENGINES = {"transformers": "Transformers", "vllm-server": "vLLM servers"}


def report(config: PlanConfig, plan: Plan) -> str:
    """The plan for people to read; its last line says whether the run fits."""
    s, n, train, (p, r) = plan.shape.sizes, plan.need, config.train, lengths(config)
    lines = [
        f"{config.model}: {s.parameters / 1e9:.2f} B parameters in {s.layers} layers, "
        f"{'tied' if s.tied else 'untied'} head ({s.head / 1e9:.2f} B), from {plan.shape.source}",
        f"update: {config.rollout.prompts_per_step} prompts x {config.rollout.group_size} rollouts, prompts of {p} "
        f"tokens, responses of {r}; {plan.flops.ours / 1e15:.3g} PFLOP, {plan.flops.ratio:.1f} times less than the "
        f"reference-style update's {plan.flops.reference / 1e15:.3g}",
        "",
        f"memory per device, {config.gpus} x {config.gpu_memory:g} GiB, micro-batches of {train.micro_batch_tokens} "
        f"tokens (one group takes {n.group})" + ", activation checkpointing" * train.activation_checkpointing,
        *_spread_over(config),
        *_memory(config, plan),
        "",
        *_what_fits(plan),
        "",
        *_time(config, plan),
        *_more_gpus(plan),
        _verdict(config, plan),
    ]
    return "\n".join(lines)


def _spread_over(config: PlanConfig) -> list[str]:
    """How the GPUs are shared out; nothing of one."""
    ranks = Ranks.of(config)
    if ranks.gpus == 1 and not ranks.apart:
        return []
    machines = f"{ranks.nodes} machine{'s' * (ranks.nodes > 1)} of {min(ranks.gpus, ranks.per_node)}"
    copies = f"{ranks.replicas} replicas of the model" if ranks.replicas > 1 else "the model"
    of_own = " of their own" * ranks.apart
    return [
        f"  {machines}, {copies} sharded over {ranks.shards} GPUs; {ranks.engines} engines on {ranks.tensor_parallel} "
        f"GPU{'s' * (ranks.tensor_parallel > 1)} each{of_own}; the busiest rank trains on "
        f"{ranks.of_rank(config.rollout.prompts_per_step)} prompts"
    ]


def _memory(config: PlanConfig, plan: Plan) -> list[str]:
    """A line per part."""
    n, m, t, (p, r) = plan.need, plan.need.memory, training_of(config), lengths(config)
    weights = f"weights, {'fp32' if t.weights == 'fp32' else 'bf16'}"
    if t.rank:
        weights = f"weights, {'nf4' if t.nf4 else t.precision}, frozen, and adapters (rank {t.rank})"
    moments = "AdamW's moments, " + ("8 bits" if t.optimizer == "adamw8bit" else "fp32")
    step = max(0.0, m.step - m.copies - m.activations - m.head - m.summed)
    engine, held = _ENGINES.get(config.rollout.engine, "vLLM"), not n.apart
    copies = "16-bit copies of weights" if config.gpus == 1 else "weights gathered: two layers, embedding, head"
    sampling = f"{engine}, {n.sequences} sequences of {p + r} at a time"
    parts: dict[str, tuple[float, float]] = {  # during the update, and while feedback is sampled
        weights: (m.weights, held * m.weights),
        "gradients": (m.gradients, 0.0),
        moments: (m.moments, held * m.moments),
        copies: (m.copies, 0.0),
        **({"a gathered gradient, before it is shared out": (m.summed, 0.0)} if m.summed else {}),
        **({"reference for the KL, frozen": (m.reference, held * m.reference)} if m.reference else {}),
        "activations": (m.activations, 0.0),
        "head (a chunk of logits, hidden states' gradients)": (m.head, 0.0),
        **({"more in the optimiser's step, when those three are gone": (step, 0.0)} if step else {}),
        f"rollout engine ({sampling})": (n.beside, n.engine),
        "context and workspaces" + ", NCCL" * (config.gpus > 1): (n.reserve, n.reserve),
        "all": (n.update, n.rollouts),
    }
    width = max(map(len, parts))
    lines = [f"  {'GiB':<{width}} {'update':>8} {'rollouts':>8}"]
    lines += [f"  {name:<{width}} {a / GIB:8.1f} {b / GIB:8.1f}" for name, (a, b) in parts.items()]
    return lines + [f"  in the host's memory: {n.host / GIB:.1f} GiB"] * (n.host > 0)


def _what_fits(plan: Plan) -> list[str]:
    """A line per rung."""
    head = ("trained", "optimiser", "offload", "samples", "checkpointing", "micro-batch", "GiB", "GiB host", "s/update")
    rows: list[tuple[str, ...]] = [head]
    for rung in plan.rungs:
        t, n = training_of(rung.config), rung.need
        what = f"adapters of rank {t.rank}" + " over nf4" * t.nf4 if t.rank else "all weights"
        found: tuple[str, ...] = ("-", "-", "nothing", "", "", "")
        if rung.tokens:
            tokens = f"up to {rung.tokens}"
            checkpointing = "yes" if rung.config.train.activation_checkpointing else "no"
            took = f"{rung.seconds.total:.0f}" + " <" * (rung is plan.cheapest)
            engine = _ENGINES.get(rung.config.rollout.engine, "vLLM")
            found = (engine, checkpointing, tokens, f"{n.update / GIB:.1f}", f"{n.host / GIB:.1f}", took)
        rows.append((what, t.optimizer, t.offload, *found))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return ["what fits, with the GiB of its update (< the cheapest)", *(line.rstrip() for line in lines)]


def _time(config: PlanConfig, plan: Plan) -> list[str]:
    """Seconds of an update, and the cheapest settings that fit; nothing where nothing does."""
    card, s, steps, cheapest = plan.card, plan.seconds, config.train.steps, plan.cheapest
    lines = []
    if plan.change is not None:
        change = "" if plan.need.fits else ", with the smallest change that fits"
        over = ", those two side by side" * s.ahead
        others = f"{s.moving:.0f} to the host and back"
        if config.gpus > 1 or s.sync:
            others = f"{s.waiting:.1f} waiting for other GPUs, {s.sync:.1f} new weights to the engines"
        lines += [
            f"seconds per update: {s.total:.0f} ({s.update:.0f} forward and backward, {s.rollouts:.0f} rollouts{over}, "
            f"{others}){change}; {steps} updates in {s.total * steps / 3600:.0f} h",
            f"  arithmetic, not measured: {COMPUTE:.0%} of the {card.flops / 1e12:.0f} TFLOP/s and {BANDWIDTH:.0%} of "
            f"the {card.bandwidth / 1e12:g} TB/s published of {card.name}, every prompt and response as long as above",
        ]
        if config.gpus > 1 or s.sync:
            network = Links.of(card, Ranks.of(config), config.network).network
            lines += [
                f"  and {LINKS:.0%} of {card.link / 1e9:g} GB/s between GPUs of a machine and of {network * 8e-9:g} "
                f"Gbit/s a GPU between machines, {HOP * 1e6:g} us a hop, {OVERLAP:.0%} of it beside the computing",
            ]
    if cheapest is not None:
        flags = changed_flags(config, cheapest.config) or "as they are"
        lines.append(f"cheapest settings that fit: {flags} ({cheapest.seconds.total:.0f} s per update)")
    return lines


def _more_gpus(plan: Plan) -> list[str]:
    """A line per number of GPUs and way to share the model out; nothing where the run is on one."""
    if not plan.spread:
        return []
    head = ("GPUs", "replicas", "prompts", "update", "waiting", "rollouts", "sync", "s/update", "efficiency", "")
    rows: list[tuple[str, ...]] = [head]
    for point in plan.spread:
        s, ranks = point.seconds, Ranks.of(point.config)
        parts = [f"{x:.1f}" for x in (s.update, s.waiting, s.rollouts, s.sync, s.total)]
        prompts = f"{ranks.of_rank(point.config.rollout.prompts_per_step)}"
        fits = "" if point.fits else "does not fit"
        rows.append((f"{ranks.gpus}", f"{ranks.replicas}", prompts, *parts, f"{point.efficiency:.0%}", fits))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    what = (
        "the same update on more GPUs: prompts a GPU, seconds by part, updates a second and GPU over the first line's"
    )
    return [what, *(line.rstrip() for line in lines)]


def _verdict(config: PlanConfig, plan: Plan) -> str:
    n, machine = plan.need, f"{config.gpus} x {config.gpu_memory:g} GiB"
    many = "; arithmetic, on several GPUs nothing has been measured" if config.gpus > 1 else ""
    if n.fits:
        engine = f", {n.share:.2f} of the device vLLM's share" if n.share else ""
        both = f"the update takes {n.update / GIB:.1f} of {config.gpu_memory:g} GiB, sampling {n.rollouts / GIB:.1f}"
        return f"FITS: {both}{engine}{many}"
    why = why_not(n)
    if plan.change is not None:
        return f"DOES NOT FIT: {why}. The smallest change that fits: {changed_flags(config, plan.change)}{many}"
    if plan.device is None:
        return f"DOES NOT FIT: {why}. No change of settings helps, nor does any device{many}"
    gib, settings = plan.device
    held = (n.memory.weights + n.memory.gradients + n.memory.moments) / GIB
    with_flags = f" with {flags}" if (flags := changed_flags(config, settings)) else ""
    return (
        f"DOES NOT FIT {machine} with any settings: weights, gradients and moments alone take {held:.1f} GiB. "
        f"The smallest device that fits: {gib} GiB{with_flags}{many}"
    )


def why_not(n: Need) -> str:
    """What of the settings does not fit."""
    if n.group > n.tokens:
        return f"one group takes {n.group} tokens, and train.micro_batch_tokens is {n.tokens}"
    if n.total > n.room:
        what = "the update" if n.update >= n.rollouts else "sampling"
        return f"{what} takes {n.total / GIB:.1f} GiB of {n.room / GIB:.4g}"
    return f"the rollout engine can decode {n.sequences} sequences at a time, and {n.wanted} are needed"
