"""Builds the parts of a run, in the order in which what can be wrong is cheapest to find out."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedModel

from real_fast.attention.interface import pick_backend
from real_fast.attention.support import check_span
from real_fast.config import Config, LoraConfig
from real_fast.config.debug import EVAL_ROWS
from real_fast.data.dataset import Dataset, first_of_each, load_train_eval, write_rejected
from real_fast.data.sampler import PromptSampler
from real_fast.data.sources import describe
from real_fast.distributed.ranks import Ranks
from real_fast.distributed.world import ALONE, World
from real_fast.errors import ConfigError
from real_fast.methods.base import Method
from real_fast.methods.registry import check_config
from real_fast.model import liger, lora, nf4
from real_fast.model.compiled import CompiledLayers, check_compiler
from real_fast.model.folder import ADAPTER_CONFIG, check_as_written, is_adapter, read_json
from real_fast.model.load import base_folder, load_model, load_tokenizer, pick_device, resolve_model
from real_fast.model.masters import WorkingWeights
from real_fast.model.policy import Policy
from real_fast.model.precision import dtype_of, resolve, rounded_weights
from real_fast.model.sharded import empty_model, read_weights, spread, try_small_twin
from real_fast.model.smollm2 import SMOLLM2
from real_fast.planning.fit import with_share
from real_fast.prompt.builder import PromptBuilder
from real_fast.prompt.guard import EncodeFeedback
from real_fast.reports import report
from real_fast.rollout.make import hand_over, make_engine
from real_fast.runs import checkpoint, logged, trackers
from real_fast.runs.checkpoint import TrainState
from real_fast.runs.folder import RunFolder, settings_in
from real_fast.runs.run import Run
from real_fast.score.ending import stop_at
from real_fast.score.scale import ScoreScale
from real_fast.training.adamw import adamw
from real_fast.training.groups import GroupSource
from real_fast.training.identity import check_same_run, fingerprints_of
from real_fast.training.optim import build_optimizer, build_scheduler
from real_fast.training.peak_memory import PeakMemory
from real_fast.training.preflight import (
    check_memory,
    check_ranks,
    check_rates,
    check_rows_fit,
    check_trainable,
    warn_if_asked_otherwise,
)
from real_fast.training.saving import Saver
from real_fast.training.timer import Timer
from real_fast.training.trial import check_faster
from real_fast.training.update import Updater
from real_fast.training.warmup import SftOrder, sft_order
from real_fast.utils.machine import gpu_memory

logger = logging.getLogger(__name__)


@dataclass
class Parts:
    """What a trainer is made of.

    Attributes:
        world: The run's processes.
        state: Where the run is.
        timer: Seconds by phase.
        tokenizer: The model's tokenizer.
        scale: The score scale.
        data: Training and evaluation rows, and those that were rejected.
        sft_order: What the warm-up trains on.
        encode_feedback: Gives the token ids of feedback texts.
        method: The training method.
        policy: The model that is trained.
        updater: Micro-batches, optimiser and schedule.
        groups: The groups of one update after another.
        run: The run's folder and trackers.
        saver: Writes checkpoints and final/.
        resume_from: The checkpoint that the run goes on from, None for a run from its start.
    """

    world: World
    state: TrainState
    timer: Timer
    tokenizer: Any
    scale: ScoreScale
    data: Dataset
    sft_order: SftOrder
    encode_feedback: EncodeFeedback
    method: Method
    policy: Policy
    updater: Updater
    groups: GroupSource
    run: Run
    saver: Saver
    resume_from: Path | None


def settled(config: Config, world: World = ALONE) -> Config:
    """The same settings with ``train.precision`` decided, so that config.yaml says what a run was made in.

    A resumed run stays at the precision that it was started in. Ranks take what the first one does. Raises
    :class:`ConfigError`.
    """
    wanted: Literal["auto", "bf16", "fp32"] = config.train.precision
    if wanted == "auto" and config.resume:
        wanted = settings_in(Path(config.output).expanduser()).get("train.precision", wanted)
    precision = world.main(resolve(wanted, pick_device(config.train.device)))
    return replace(config, train=replace(config.train, precision=precision))


def build(config: Config, world: World = ALONE) -> Parts:
    """Check the settings, load rows, model and engine, and take over the run's folder.

    What is wrong on one rank stops all of them, before the folder is touched.

    Args:
        config: The settings.
        world: The run's ranks.

    Raises:
        UserError: Something that is missing, wrong or does not fit together; nothing of an earlier run was touched.
    """
    state = TrainState()
    timer = Timer(state.seconds)
    with timer("load"), world.together():
        method_class = check_config(config)
        trackers.check_installed(config)
        adamw(config.optim.name)
        if config.train.lora is not None:
            lora.import_peft()
        if config.train.quantization == "nf4":
            nf4.quantization(torch.float32)  # raises where what it needs is missing
        if config.train.compile:
            check_compiler(pick_device(config.train.device))
        if config.train.liger:
            liger.import_liger(pick_device(config.train.device))
        check_ranks(config, method_class.prompts_per_step(config), world.size)
        folder = RunFolder(config)
        found = checkpoint.newest(folder.checkpoints) if folder.resumed and world.is_main else None
        if found:
            logged.check(folder.path, found)
    resume_from = world.main(found)  # which has read it whole
    with timer("load"), world.together():
        folder.check_extends(config.train.steps, checkpoint.step_of(resume_from) if resume_from else None)
        logger.info("loading %s", resume_from or config.initial_weights)
        tokenizer = load_tokenizer(config.initial_weights, config.trust_remote_code)
        if not resume_from and world.is_main:  # a checkpoint has been checked, whole
            check_as_written(resolve_model(config.initial_weights), weights=True)
        scale = ScoreScale.from_config(tokenizer, config.scale, config.prompt)
        builder = PromptBuilder(config.prompt, tokenizer, scale)
        warn_if_asked_otherwise(config, builder.source)
        encode_feedback = builder.guard.encode_feedback
        method = method_class(config, encode_feedback, scale)
        key, prompts_per_step = method_class.prompts_per_step(config)
        data = load_train_eval(config.data, config.prompt.max_tokens, builder, scale, prompts_per_step, key)
        method.use_rows(data)
        if config.debug:
            data.eval = first_of_each(data.eval, EVAL_ROWS)
        identity = fingerprints_of(config, data, tokenizer, builder)
        if resume_from:
            check_same_run(resume_from, identity, config)
        longest = check_rows_fit(data.train, method, config, encode_feedback, scale)
        base = base_folder(resolve_model(config.initial_weights))
        share = None
        if gpu := gpu_memory(pick_device(config.train.device)):
            model_config = AutoConfig.from_pretrained(base, trust_remote_code=config.trust_remote_code)
            share = check_memory(data.train, method, config, longest, model_config, gpu, world)
        order = sft_order(data.train, config.warmup, describe(config.data.train), config.seed)

        torch.manual_seed(config.seed)
        policy = load_policy(config, resume_from) if world.size == 1 else spread_policy(config, resume_from, world)
        model = policy.model
        stop_at(model, scale.end_id)
        whole = model.num_parameters() if config.save.merge else 0
        trained = model.num_parameters(only_trainable=True)
        folder.check_space(trained, config.save.keep, method.keeps_ref_policy, resume_from, whole)
        if policy.attention:
            check_span(model, longest)
        check_faster(policy, tokenizer.pad_token_id)
        optimizer = build_optimizer(model, config.optim)
        scheduler = build_scheduler(optimizer, config.optim, config.train.steps * method.iterations)
        if resume_from:
            state = checkpoint.load(resume_from, model, optimizer, scheduler, world)
            timer.run = state.seconds
    with timer("load"):
        if resume_from:
            method.resume(policy, folder.path, world)
        # vLLM's own start waits for other ranks: one that fails ends with its message, and torchrun ends the others.
        engine = make_engine(with_share(config, share), model, tokenizer, scale, base, world)
        hand_over(engine, model)
    updater = Updater(
        policy, optimizer, scheduler, config.optim, config.train, tokenizer.pad_token_id, world, timer, state
    )
    sampler = PromptSampler(data.train, prompts_per_step, config.seed)
    resumed_step = state.step if resume_from else None
    with world.together():
        followed = trackers.Trackers(config if world.is_main else replace(config, report_to=[]), folder, resumed_step)
        run = Run(folder, followed, world.is_main)
        run.claim(config, resumed_step)
        if world.is_main:
            write_rejected(folder.path / "rejected.jsonl", data.rejected)
    groups = GroupSource(method, sampler, engine, timer, PeakMemory(policy.device), config.rollout.check_every)
    if config.rollout.ahead and method.uses_rollouts:
        groups.sample_ahead(config.train.steps, resume_from)
    groups.rest()
    saver = Saver(folder, updater, tokenizer, config, builder.source, identity)
    if world.is_main:
        report.start(config, data, scale, policy, engine.name, state.step)
    return Parts(
        world,
        state,
        timer,
        tokenizer,
        scale,
        data,
        order,
        encode_feedback,
        method,
        policy,
        updater,
        groups,
        run,
        saver,
        resume_from,
    )


def load_policy(config: Config, resume_from: Path | None) -> Policy:
    """The model in ``train.weights``, its products in ``train.precision``, ready for shared prompts where they are on.

    With ``optim.offload: all`` its weights are in the host's memory, and on the device while an update lasts. With
    ``train.lora`` the adapters are in float32, and the other weights are kept in what they are computed in.

    Args:
        config: The settings.
        resume_from: A checkpoint; None for the start weights.

    Raises:
        ConfigError: bf16 weights with products in fp32, or with a learning rate that they would round away;
            ``train.lora`` that does not fit the model.
        ModelError: The model cannot be loaded or trained.
    """
    device, train, everything = pick_device(config.train.device), config.train, config.optim.offload == "all"
    precision = resolve(train.precision, device)
    if (train.weights, precision) == ("bf16", "fp32"):
        raise ConfigError("train.weights is bf16 and train.precision fp32: set one to the other's")
    if config.optim.offload != "none" and device.type == "cpu":
        logger.warning("optim.offload is %s, and the model computes in the host's memory anyhow", config.optim.offload)
    dtype = dtype_of(precision)
    if train.lora is None:
        home = torch.device("cpu") if everything else device
        source = str(resume_from or config.initial_weights)
        model = load_model(source, home, dtype_of(train.weights), config.trust_remote_code)
        if lora.is_adapted(model):  # a run behind one that trained adapters
            lora.merge(model)
        check_trainable(model)
    else:
        half = dtype if dtype != torch.float32 else None
        model = _with_adapters(config, train.lora, resume_from, half, device)
    check_rates(model, {"optim.lr": config.optim.lr} | ({"warmup.lr": config.warmup.lr} if config.warmup.steps else {}))
    if train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    half = dtype if dtype != model.dtype else None
    fused = train.head_gradient == "fused" or (train.head_gradient == "auto" and device.type == "cuda")
    fused = fused and train.weights == "fp32"
    work = None
    if train.lora is None and (half or everything or fused):  # beside adapters the rest is kept as it is computed with
        work = WorkingWeights(model, device, half, everything, fused)
    attention = pick_backend(train.attention, device, dtype)
    policy = Policy(model, half, attention if train.shared_prompt else None, work)
    if train.compile or train.liger:  # behind the trials of a loaded model, which run its own code
        policy.faster = CompiledLayers(model) if train.compile else liger.LigerLayers(model)
    return policy


def spread_policy(config: Config, resume_from: Path | None, world: World) -> Policy:
    """As :func:`load_policy`, spread over ranks, each of which reads its part of the weights.

    Weights are kept in float32 and gathered in ``train.precision``; on a CPU, whose head computes in float32 in any
    case, embedding, last norm and head are gathered in float32, too. Beside adapters, which every rank has whole, the
    model's own weights are kept in what they are computed in.

    Raises:
        ConfigError: Adapters as start weights of a run that trains all.
        ModelError: The model cannot be loaded, trained or spread.
    """
    assert isinstance(world, Ranks)
    device, train, lora_settings = world.device, config.train, config.train.lora
    dtype = dtype_of(resolve(train.precision, device))
    half = dtype if dtype != torch.float32 else None
    start = resolve_model(config.initial_weights)
    if lora_settings is None and is_adapter(start):
        raise ConfigError(
            f"{config.initial_weights} holds adapters, and a run on several ranks that trains all weights starts from "
            "a whole model: write one on one GPU (save.merge), or train adapters (train.lora)"
        )
    base = base_folder(start)
    model = empty_model(base, config.trust_remote_code)
    check_trainable(model)
    attention = pick_backend(train.attention, device, dtype) if train.shared_prompt else None
    if world.is_main:  # which tells the others
        try_small_twin(model, attention, device)
    kept: dict[str, torch.dtype] = {}
    if lora_settings is not None:
        model.requires_grad_(False)
        rounded = rounded_weights(model, half, device)
        kept = {name: half for name, p in model.named_parameters() if half is not None and id(p) in rounded}
    policy = Policy(model, half, attention, tried=True)
    layers = half if lora_settings is None else None
    spread(policy, world.mesh, layers, layers if device.type == "cuda" else None)
    if lora_settings is None:
        read_weights(model, resume_from or base, device)
    else:
        read_weights(model, base, device, kept)
        _put_adapters(model, config, lora_settings, resume_from, start, base)
    if train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy


def _with_adapters(
    config: Config, settings: LoraConfig, resume_from: Path | None, half: torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    """The model with adapters: fresh ones, or those of a checkpoint or of the start weights."""
    packed = nf4.quantization(half or torch.float32) if config.train.quantization == "nf4" else None
    start = resolve_model(config.initial_weights)
    base = base_folder(start)
    where = device if packed else torch.device("cpu")
    dtype: torch.dtype | Literal["auto"] = torch.float32 if half is None else "auto"
    model = load_model(str(base), where, dtype, config.trust_remote_code, packed)
    if not packed:
        check_trainable(model)
    elif half is not None:
        nf4.answer_in(model, half)
    rounded = rounded_weights(model, half, device)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(half if id(parameter) in rounded else torch.float32)
    _put_adapters(model, config, settings, resume_from, start, base)
    if not packed:
        model.to(device)  # type: ignore[arg-type]
    return model


def _put_adapters(
    model: PreTrainedModel, config: Config, settings: LoraConfig, resume_from: Path | None, start: Path, base: Path
) -> None:
    """Fresh adapters, or those of a checkpoint or of the start weights, on a model that has its own weights."""
    named = (
        read_json(start / ADAPTER_CONFIG)["base_model_name_or_path"] if is_adapter(start) else config.initial_weights
    )
    local = Path(named).expanduser().is_dir() or named == SMOLLM2
    lora.add_adapters(model, settings, str(base.resolve()) if local else named)
    if adapters := resume_from or (start if is_adapter(start) else None):
        lora.read_adapters(model, adapters)
