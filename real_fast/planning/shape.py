"""A model's shape: what the plan counts of it, and where that comes from.

models.json has the published dimensions of the models that configs/ names and of their siblings, with what
``python -m real_fast.planning.shape`` counted of them, so that their plan needs neither network nor PyTorch.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from real_fast.errors import ModelError
from real_fast.planning.flops import ModelFlops
from real_fast.planning.memory import ModelSizes

TABLE = Path(__file__).with_name("models.json")


@dataclass(frozen=True)
class Shape:
    """What is counted of a model.

    Attributes:
        sizes: Its parameters and activations.
        flops: Its matrices.
        source: Where its dimensions come from, for people.
    """

    sizes: ModelSizes
    flops: ModelFlops
    source: str


def known_models() -> dict[str, Any]:
    """The models of models.json by name, each with "config", "sizes" and "flops"."""
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def shape_of(name: str, trust_remote_code: bool = False) -> Shape:
    """The shape of a model.

    Args:
        name: A folder with a config.json, such a file, a model of models.json, or one on the hub.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ModelError: No config is to be had, or it is of a model whose work is not counted.
    """
    path, known = Path(name).expanduser(), known_models()
    if not path.exists() and (found := known.get(name)):
        source = "its published dimensions, which come with real-fast"
        return Shape(ModelSizes.read(found["sizes"]), ModelFlops(**found["flops"]), source)
    config = _read_config(name, path, known, trust_remote_code)
    source = f"{path if path.is_file() else path / 'config.json'}" if path.exists() else "the hub"
    return counted(name, config, source)


def counted(name: str, config: Any, source: str) -> Shape:
    """The shape of a Transformers config, counted. Raises :class:`ModelError` for one whose work is not counted."""
    try:
        flops = ModelFlops.of(config)  # it refuses more than the other, at once
        return Shape(ModelSizes.of(config), flops, source)
    except (ValueError, AttributeError) as error:
        raise ModelError(f"model {name} cannot be planned: {error}") from error


def _read_config(name: str, path: Path, known: dict[str, Any], trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        close = get_close_matches(name, known, n=1, cutoff=0.7)
        raise ModelError(
            f"the config of model {name} cannot be read ({str(error).strip().splitlines()[0]}): "
            + (f"did you mean {close[0]}? Otherwise g" if close else "g")
            + "ive a folder with its config.json, or that file; without a network there are "
            + ", ".join(known)
        ) from error


def main() -> int:
    """Count every model of models.json anew. Returns the exit status."""
    from transformers import AutoConfig

    table = known_models()
    for model in table.values():
        config = AutoConfig.for_model(**model["config"])
        model["sizes"] = asdict(ModelSizes.of(config))
        model["flops"] = asdict(ModelFlops.of(config))
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
