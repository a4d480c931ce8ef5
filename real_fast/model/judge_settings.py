"""What a model folder that real-fast train wrote says of how to judge with it (its real_fast.json)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from real_fast.config.commands import GPU_SHARE
from real_fast.errors import ConfigError
from real_fast.utils.jsonio import parse

if TYPE_CHECKING:
    from real_fast.score.protocol import ProtocolName


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
        from real_fast.model.load import resolve_model  # which brings PyTorch along, and a folder here needs none

        folder = resolve_model(model, ("real_fast.json", "*.jinja", "*.j2", "*.txt"))
    path = folder / "real_fast.json"
    if not path.is_file():
        return {}
    try:
        saved = parse(path.read_text(encoding="utf-8"))
        found = {key: dict(saved[key]) for key in ("scale", "prompt", "rollout") if key in saved}
        for section, key in (("objective", "renormalize"), ("eval", "protocol")):
            if key in saved.get(section, {}):
                found[key] = saved[section][key]
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not what real-fast train writes ({error}): mend it or remove it") from error
    if template := found.get("prompt", {}).get("template", ""):
        beside = isinstance(template, str) and Path(template).name == template
        if beside and (folder / template).is_file():
            found["prompt"]["template"] = str(folder / template)
        elif not beside or Path(template).suffix:  # a model has no say in which of this machine's files are read
            raise ConfigError(f"{path} has prompt.template {template!r}, which is no file beside it: put it there")
    if "rollout" in found:  # the engine and its limits belong to the machine, not to the model
        found["rollout"] = {k: v for k, v in found["rollout"].items() if k in ("answer", "max_tokens", "top_p")}
    return found


def defaults_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder of the ``model`` among `given` settings says, for a command whose settings these are.

    Raises as :func:`trained_settings` does.
    """
    model = given.get("model")
    return trained_settings(model) if model else {}


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
        scale = known if scale is None else replace(known, values=list(scale), labels=[])
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
