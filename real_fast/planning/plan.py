"""A plan: parameters, memory by part, what fits and the work of an update, from a model's shape alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from real_fast.config.commands import PlanConfig
from real_fast.config.schema import Config
from real_fast.config.validation import check_bounds
from real_fast.planning.cards import BANDWIDTH, COMPUTE, Card, card_of
from real_fast.planning.changes import (
    changed_flags,
    largest_micro_batch,
    optimisers,
    rounded,
    smallest_change,
    with_adapters,
    with_micro_batch,
)
from real_fast.planning.flops import UpdateFlops
from real_fast.planning.memory import largest
from real_fast.planning.need import GIB, RESERVE, Need, lengths, need, training_of
from real_fast.planning.seconds import Seconds, seconds
from real_fast.planning.shape import Shape, shape_of

# Most tokens of a micro-batch that are looked at.
_MOST = 2**20

_ENGINES = {"transformers": "Transformers", "vllm-server": "a server"}


@dataclass(frozen=True)
class Rung:
    """One way to train, and whether it fits.

    Attributes:
        config: The settings.
        tokens: Most tokens of a micro-batch that fit; 0 if not even a group does.
        need: What the settings need with a micro-batch as asked for, or as large as fits.
        seconds: Of an update.
    """

    config: PlanConfig
    tokens: int
    need: Need
    seconds: Seconds


@dataclass(frozen=True)
class Plan:
    """Everything that the report says.

    Attributes:
        shape: The model's.
        need: What a device must hold with the settings as they are.
        flops: The work of an update.
        seconds: Of an update, with the settings as they are or, where they do not fit, with the smallest change.
        card: What the seconds are of.
        change: The settings with the smallest change that fits; None where nothing helps.
        device: Where nothing helps, the GiB of the smallest device that does, and the settings for it.
        rungs: Ways to train, with what fits.
        adapters: Whether the settings train adapters.
    """

    shape: Shape
    need: Need
    flops: UpdateFlops
    seconds: Seconds
    card: Card
    change: PlanConfig | None
    device: tuple[int, PlanConfig] | None
    rungs: list[Rung]
    adapters: bool

    @property
    def cheapest(self) -> Rung | None:
        """Of what fits and trains the same weights as the settings, the fastest; else the fastest of all that fits."""
        fitting = [rung for rung in self.rungs if rung.tokens]
        same = [rung for rung in fitting if (rung.config.train.lora is not None) == self.adapters]
        return min(same or fitting, key=lambda rung: rung.seconds.total, default=None)


def settled(config: PlanConfig) -> PlanConfig:
    """The settings with ``gpu_memory`` set: the card's, where only that was given. Raises :class:`ConfigError`."""
    if config.gpu_memory:
        return config
    return replace(config, gpu_memory=card_of(config.card).memory)


def make_plan(config: PlanConfig) -> Plan:
    """Count parameters, memory and operations.

    Args:
        config: The run and the machine, :func:`settled`.

    Raises:
        ConfigError: A setting out of its bounds, or an unknown method or card.
        ModelError: A model whose shape is not to be had or not counted.
    """
    check_bounds(config)
    samples = _uses_rollouts(config)
    shape, card = shape_of(config.model, config.trust_remote_code), card_of(config.card, config.gpu_memory)
    sizes, kl = shape.sizes, samples and config.objective.kl_coef > 0

    def need_of(changed: PlanConfig) -> Need:
        return need(changed, sizes, kl)

    def flops_of(changed: PlanConfig) -> UpdateFlops:
        (p, r), k = lengths(changed), changed.rollout.group_size
        return shape.flops.update_of(
            [(p, [(r - 1, r)] * k)] * changed.rollout.prompts_per_step,
            changed.train.shared_prompt,
            changed.train.activation_checkpointing,
            kl=kl,
            iterations=changed.objective.num_iterations if samples else 1,
            adapters=training_of(changed).adapters(sizes),
        )

    def seconds_of(changed: PlanConfig) -> Seconds:
        return seconds(changed, sizes, need_of(changed), flops_of(changed), card, samples)

    def rung(start: PlanConfig) -> Rung:
        engines = dict.fromkeys((start.rollout.engine, "transformers"))
        for engine, checkpointing in product(engines, (False, True)):
            train = replace(start.train, activation_checkpointing=checkpointing)
            changed = replace(start, train=train, rollout=replace(start.rollout, engine=engine))
            tokens, group = largest_micro_batch(changed, need_of, _MOST), need_of(changed).group
            if tokens >= group:
                break
        # Of sizes that fit, the one that was asked for.
        changed = with_micro_batch(changed, max(group, rounded(tokens, start.train.micro_batch_tokens)))
        return Rung(changed, tokens if tokens >= group else 0, need_of(changed), seconds_of(changed))

    change, device = smallest_change(config, sizes, kl), None
    if change is None:
        change_on = partial(smallest_change, sizes=sizes, kl=kl, free=True)

        def fits_on(gib: int) -> bool:
            return change_on(replace(config, gpu_memory=float(gib))) is not None

        least = 2**12 - largest(lambda less: fits_on(2**12 - less), 2**12 - 1)
        if (settings := change_on(replace(config, gpu_memory=float(least)))) is not None:
            device = least, settings
    return Plan(
        shape,
        need_of(config),
        flops_of(config),
        seconds_of(config if change is None else change),
        card,
        change,
        device,
        [rung(start) for start in _ladder(config)],
        config.train.lora is not None,
    )


def _ladder(config: PlanConfig) -> Iterator[PlanConfig]:
    """Every way to train, whichever the settings are: all weights, with less and less on the device, then adapters."""
    whole = replace(config, train=replace(config.train, lora=None, quantization="none"))
    for optim in optimisers(config):
        yield replace(whole, optim=optim)
    yield with_adapters(config, "none")
    yield with_adapters(config, "nf4")


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
    lines = [
        f"{config.model}: {s.parameters / 1e9:.2f} B parameters in {s.layers} layers, "
        f"{'tied' if s.tied else 'untied'} head ({s.head / 1e9:.2f} B), from {plan.shape.source}",
        f"update: {config.rollout.prompts_per_step} prompts x {config.rollout.group_size} rollouts, prompts of {p} "
        f"tokens, responses of {r}; {plan.flops.ours / 1e15:.3g} PFLOP, {plan.flops.ratio:.1f} times less than the "
        f"reference-style update's {plan.flops.reference / 1e15:.3g}",
        "",
        f"memory per device, {config.gpus} x {config.gpu_memory:g} GiB, micro-batches of {train.micro_batch_tokens} "
        f"tokens (one group takes {n.group})" + ", activation checkpointing" * train.activation_checkpointing,
        *_memory(config, plan),
        "",
        *_what_fits(plan),
        "",
        *_time(config, plan),
        _verdict(config, plan),
    ]
    return "\n".join(lines)


def _memory(config: PlanConfig, plan: Plan) -> list[str]:
    """A line per part."""
    n, m, t, (p, r) = plan.need, plan.need.memory, training_of(config), lengths(config)
    weights = f"weights, {'fp32' if t.weights == 'fp32' else 'bf16'}"
    if t.rank:
        weights = f"weights, {'nf4' if t.nf4 else t.precision}, frozen, and adapters (rank {t.rank})"
    moments = "AdamW's moments, " + ("8 bits" if t.optimizer == "adamw8bit" else "fp32")
    step = max(0.0, m.step - m.copies - m.activations - m.head)
    engine = _ENGINES.get(config.rollout.engine, "vLLM")
    sampling = f"{engine}, {n.sequences} sequences of {p + r} at a time"
    parts: dict[str, tuple[float, float]] = {  # during the update, and while feedback is sampled
        weights: (m.weights, m.weights),
        "gradients": (m.gradients, 0.0),
        moments: (m.moments, m.moments),
        "16-bit copies of weights": (m.copies, 0.0),
        **({"reference for the KL, frozen": (m.reference, m.reference)} if m.reference else {}),
        "activations": (m.activations, 0.0),
        "head (a chunk of logits, hidden states' gradients)": (m.head, 0.0),
        **({"more in the optimiser's step, when those three are gone": (step, 0.0)} if step else {}),
        f"rollout engine ({sampling})": (n.beside, n.engine),
        "context and workspaces": (RESERVE, RESERVE),
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
        lines += [
            f"seconds per update: {s.total:.0f} ({s.update:.0f} forward and backward, {s.rollouts:.0f} rollouts, "
            f"{s.moving:.0f} to the host and back){change}; {steps} updates in {s.total * steps / 3600:.0f} h",
            f"  arithmetic, not measured: {COMPUTE:.0%} of the {card.flops / 1e12:.0f} TFLOP/s and {BANDWIDTH:.0%} of "
            f"the {card.bandwidth / 1e12:g} TB/s published of {card.name}, every prompt and response as long as above",
        ]
    if cheapest is not None:
        flags = changed_flags(config, cheapest.config) or "as they are"
        lines.append(f"cheapest settings that fit: {flags} ({cheapest.seconds.total:.0f} s per update)")
    return lines


def _verdict(config: PlanConfig, plan: Plan) -> str:
    n, machine = plan.need, f"{config.gpus} x {config.gpu_memory:g} GiB"
    one_device = "; real-fast trains on one device today, so this is arithmetic" if config.gpus > 1 else ""
    if n.fits:
        engine = f", {n.share:.2f} of the device vLLM's share" if n.share else ""
        both = f"the update takes {n.update / GIB:.1f} of {config.gpu_memory:g} GiB, sampling {n.rollouts / GIB:.1f}"
        return f"FITS: {both}{engine}{one_device}"
    why = why_not(n)
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


def why_not(n: Need) -> str:
    """What of the settings does not fit."""
    if n.group > n.tokens:
        return f"one group takes {n.group} tokens, and train.micro_batch_tokens is {n.tokens}"
    if n.total > n.room:
        what = "the update" if n.update >= n.rollouts else "sampling"
        return f"{what} takes {n.total / GIB:.1f} GiB of {n.room / GIB:.4g}"
    return f"the rollout engine can decode {n.sequences} sequences at a time, and {n.wanted} are needed"
