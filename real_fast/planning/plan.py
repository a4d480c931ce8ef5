"""A plan: parameters, memory by part, what fits and the work of an update, from a model's config alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import AutoConfig

from real_fast.config.commands import PlanConfig
from real_fast.config.validation import check_bounds
from real_fast.errors import ModelError, WheelMissing
from real_fast.methods.registry import method_class
from real_fast.model.smollm2 import SMOLLM2, prepare
from real_fast.planning.flops import ModelFlops, UpdateFlops
from real_fast.planning.memory import ModelSizes, UpdateMemory, largest, update_memory
from real_fast.types import Group, Rollout

GIB = 2**30


# The CUDA context, libraries' workspaces and what the allocator cannot use.
RESERVE = 2 * GIB


# Tokens of "So the overall score is " where no tokenizer is at hand.
PHRASE_TOKENS = 6


@dataclass(frozen=True)
class Plan:
    """Everything that the report says; see :func:`make_plan`."""

    sizes: ModelSizes
    p: int
    r: int
    k: int
    prompts: int
    memory: UpdateMemory
    rollout_bytes: float
    rollout_sequences: int
    flops: UpdateFlops
    options: list[tuple[bool, bool, int, int]]

    @property
    def total(self) -> float:
        """Bytes on a device during the update, the rollout engine included."""
        return self.memory.total + self.rollout_bytes + RESERVE

    def fits(self, gpu_memory: float) -> bool:
        """Whether the update fits into so many GiB, and the rollout engine can decode at least one sequence."""
        return self.total <= gpu_memory * GIB and self.rollout_sequences > 0


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """A model's config. Raises :class:`ModelError`."""
    try:
        return AutoConfig.from_pretrained(prepare() if name == SMOLLM2 else name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, WheelMissing) as error:
        raise ModelError(f"the config of model {name} cannot be read: {str(error).strip().splitlines()[0]}") from error


def make_plan(config: PlanConfig, model_config: Any) -> Plan:
    """Count parameters, memory and operations.

    Args:
        config: The run and the machine.
        model_config: The model's Transformers config.

    Raises:
        ConfigError: A machine without devices or memory.
    """
    check_bounds(config)
    sizes, train = ModelSizes.of(model_config, config.train.precision), config.train
    p = config.prompt_tokens or config.prompt.max_tokens
    r = config.response_tokens or config.rollout.max_tokens + PHRASE_TOKENS
    k, prompts = config.rollout.group_size, config.rollout.prompts_per_step
    method = method_class(config)
    kl = method.uses_rollouts and config.objective.kl_coef > 0

    def memory(tokens: int, checkpointing: bool, shared: bool) -> UpdateMemory:
        group = p + k * r if shared else k * (p + r)
        groups = max(tokens // group, 1)
        return update_memory(
            sizes,
            tokens,
            head_rows=groups * k * r,
            precision=train.precision,
            checkpointing=checkpointing,
            gpus=config.gpus,
            repeated_keys=groups * k * p if shared else 0,
            kl=kl,
        )

    engine, sequences = _rollout(config, sizes, p, r)
    room = config.gpu_memory * GIB - RESERVE - engine

    def fit(checkpointing: bool, shared: bool, tokens: int) -> bool:
        return memory(tokens, checkpointing, shared).total <= room

    options = []
    for shared in (True, False):
        for checkpointing in (False, True):
            fits = largest(partial(fit, checkpointing, shared))
            options.append((shared, checkpointing, p + k * r if shared else k * (p + r), fits))
    rollout = Rollout([0] * (r - 1), [], [0] * r, 1, "phrase", None, None)
    groups = [Group(i, range(p), 0.0, [rollout] * k) for i in range(prompts)]
    flops = ModelFlops.of(model_config).update(
        groups,
        train.shared_prompt,
        train.activation_checkpointing,
        kl=kl,
        iterations=config.objective.num_iterations if method.uses_rollouts else 1,
    )
    return Plan(
        sizes=sizes,
        p=p,
        r=r,
        k=k,
        prompts=prompts,
        memory=memory(train.micro_batch_tokens, train.activation_checkpointing, train.shared_prompt),
        rollout_bytes=engine,
        rollout_sequences=sequences,
        flops=flops,
        options=options,
    )


def _rollout(config: PlanConfig, sizes: ModelSizes, p: int, r: int) -> tuple[float, int]:
    """Bytes that the rollout engine holds on a device during the update, and sequences it can decode at a time."""
    weights, per_token = 2.0 * sizes.parameters, 2.0 * sizes.kv_width * sizes.layers
    if config.rollout.engine == "transformers":
        # Its 16-bit weights and its cache live only while it samples, when the update's activations do not.
        free = config.gpu_memory * GIB - RESERVE - 16.0 * sizes.parameters / config.gpus - weights
        return 0.0, max(0, min(config.rollout.max_num_seqs, int(free / (per_token * (p + r)))))
    held = config.rollout.gpu_memory_utilization * config.gpu_memory * GIB
    cache = held - weights / config.gpus
    # Sharded over the devices, each sequence's cache is as well.
    return held, max(0, int(cache * config.gpus / (per_token * (p + r))))


def report(config: PlanConfig, plan: Plan) -> str:
    """The plan for people to read."""
    s, m, train = plan.sizes, plan.memory, config.train
    billions = s.parameters / 1e9
    knobs = ", activation checkpointing" if train.activation_checkpointing else ""
    lines = [
        f"{config.model}: {billions:.2f} B parameters in {s.layers} layers, {'tied' if s.tied else 'untied'} head "
        f"({s.head / 1e9:.2f} B)",
        f"update: {plan.prompts} prompts x {plan.k} rollouts, prompts of {plan.p} tokens, responses of {plan.r}",
        "",
        f"memory per device, {config.gpus} x {config.gpu_memory:g} GiB, micro-batches of {train.micro_batch_tokens} "
        f"tokens{knobs}",
    ]
    length = plan.p + plan.r
    engine = f"rollout engine ({config.rollout.engine}, {plan.rollout_sequences} sequences of {length} at a time)"
    parts = {
        "weights, fp32": m.weights,
        "gradients, fp32": m.gradients,
        "AdamW's moments, fp32": m.moments,
        "16-bit copies of weights": m.copies,
        **({"reference for the KL, frozen": m.reference} if m.reference else {}),
        "activations": m.activations,
        "head (a chunk of logits, fp32 gradients)": m.head,
        engine: plan.rollout_bytes,
        "context and workspaces": RESERVE,
    }
    width = max(map(len, parts))
    lines += [f"  {name:<{width}} {size / GIB:8.1f} GiB" for name, size in parts.items()]
    verdict = "fits" if plan.fits(config.gpu_memory) else "DOES NOT FIT"
    lines += [f"  {'all':<{width}} {plan.total / GIB:8.1f} GiB: {verdict}", "", "what fits"]
    for shared, checkpointing, group, fits in plan.options:
        knobs = f"shared_prompt {str(shared).lower():<5}  activation_checkpointing {str(checkpointing).lower():<5}"
        if fits >= group:
            lines.append(f"  {knobs}  micro_batch_tokens up to {fits} (one group takes {group})")
        else:
            lines.append(f"  {knobs}  nothing: one group takes {group} tokens, {fits} fit")
    lines += [
        "",
        f"work per update: {plan.flops.ours / 1e15:.3g} PFLOP, {plan.flops.ratio:.1f} times less than the "
        f"reference-style update's {plan.flops.reference / 1e15:.3g}",
    ]
    if config.gpus > 1:
        lines += [
            "",
            f"real_fast.train runs on one device today: --gpus {config.gpus} is the arithmetic of sharding weights, "
            "gradients and optimiser state.",
        ]
    return "\n".join(lines)
