"""What a model folder that real_fast.train wrote says of how to judge with it (its real_fast.json)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from real_fast.config import (
    Config,
    DataConfig,
    EvalConfig,
    ObjectiveConfig,
    PromptConfig,
    RolloutConfig,
    ScaleConfig,
    cli,
)
from real_fast.errors import ConfigError
from real_fast.model.load import resolve_model
from real_fast.score.protocol import ProtocolName

# With no trainer beside it, vLLM gets nearly all of a GPU.
GPU_SHARE = 0.9


def trained_settings(model: str) -> dict[str, Any]:
    """What judging shares with training: scale, prompt, rollout (answer and lengths), renormalize, the eval's protocol.

    Args:
        model: A folder or a hub name, as :func:`real_fast.model.load.resolve_model` takes them. One without
            real_fast.json gives {}; of a hub model, nothing large is fetched.

    Raises:
        ConfigError: A real_fast.json that the trainer did not write.
        ModelError: Neither a folder nor to be had from the hub.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = resolve_model(model, ("real_fast.json", "*.jinja", "*.txt"))
    path = folder / "real_fast.json"
    if not path.is_file():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        found = {key: dict(saved[key]) for key in ("scale", "prompt", "rollout") if key in saved}
        for section, key in (("objective", "renormalize"), ("eval", "protocol")):
            if key in saved.get(section, {}):
                found[key] = saved[section][key]
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not what real_fast.train writes ({error}): mend it or remove it") from error
    template = found.get("prompt", {}).get("template", "")
    if template and (folder / template).is_file():
        found["prompt"]["template"] = str(folder / template)
    if "rollout" in found:  # the engine and its limits belong to the machine, not to the model
        found["rollout"] = {k: v for k, v in found["rollout"].items() if k in ("answer", "max_tokens", "top_p")}
    return found


def parse(config_class: type, prog: str, description: str, argv: list[str]) -> Any:
    """Parse a command line into a `config_class`, on top of what the folder of its ``model`` says.

    Flags and the ``--config`` file override the folder. A wrong key or value ends the process with status 2 and a
    message that names the key, as :func:`real_fast.config.cli.parse` does. Raises as :func:`trained_settings` does.
    """
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--model")
    first.add_argument("--config")
    known = first.parse_known_args(argv)[0]
    model = known.model
    if model is None and known.config and Path(known.config).is_file():
        try:
            values = yaml.safe_load(Path(known.config).read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError):
            values = None  # the parser below says what is wrong with the file
        model = values.get("model") if isinstance(values, dict) else None
    defaults = trained_settings(model) if isinstance(model, str) and model else {}
    if "protocol" in defaults and not hasattr(config_class, "protocol"):
        defaults["eval"] = {"protocol": defaults.pop("protocol")}
    argv = [*(["--config", json.dumps(defaults)] if defaults else []), *argv]
    return cli.parse(config_class, prog, description, argv)


def judge_config(
    name: str,
    scale: Sequence[float] | ScaleConfig | None,
    prompt: PromptConfig | Mapping[str, Any] | None,
    rollout: RolloutConfig | Mapping[str, Any] | None,
    renormalize: bool | None,
    protocol: ProtocolName | None,
    evaluation: EvalConfig,
) -> Config:
    """The settings of a judge that is called, in the form that the engines read; what is None is the folder's.

    Raises as :func:`trained_settings` does, and ConfigError for settings that do not exist or are of another type.
    """
    taken = trained_settings(name) if name else {}
    if not isinstance(scale, ScaleConfig):
        known: ScaleConfig = cli.from_namespace(ScaleConfig, taken.get("scale", {}))
        scale = known if scale is None else replace(known, values=list(scale))
    alone = {"gpu_memory_utilization": GPU_SHARE}
    return Config(
        model=name or "(loaded)",
        output="(none)",
        scale=scale,
        prompt=_over(PromptConfig, taken.get("prompt", {}), prompt),
        data=DataConfig(train="(requests)", eval="(requests)"),
        rollout=_over(RolloutConfig, alone | taken.get("rollout", {}), rollout),
        objective=ObjectiveConfig(renormalize=taken.get("renormalize", False) if renormalize is None else renormalize),
        eval=replace(evaluation, protocol=protocol or taken.get("protocol", evaluation.protocol)),
    )


def _over(kind: type, taken: Mapping[str, Any], given: Any) -> Any:
    """What a caller gave: a whole `kind`, or settings over those of `taken`."""
    if isinstance(given, kind):
        return given
    return cli.from_namespace(kind, {**taken, **(given or {})})
