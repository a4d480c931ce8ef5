"""What is wrong with a model's folder, found in its small files and in the headers of its large ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from real_fast.errors import ModelError
from real_fast.runs.sealed import CHECKSUMS, damage
from real_fast.utils.jsonio import parse

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_POINTER = b"version https://git-lfs"
# A model that can write says so by one of these; names of other heads are refused, names that nobody knows are not.
_OTHER_HEADS = (
    "Classification",
    "MaskedLM",
    "QuestionAnswering",
    "PreTraining",
    "RewardModel",
    "SentencePrediction",
)
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_AGAIN = "download it again"
# What Transformers raises for a config.json whose values cannot be.
_UNUSABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError, RecursionError)


def check_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """Refuse a folder that no causal language model, or adapter of one, can be loaded from; nothing large is read.

    Args:
        folder: A Hugging Face model folder, or one of peft's; the model that an adapter belongs to is not looked at.
        trust_remote_code: Whether the model may be of a kind that comes with its own code.

    Raises:
        ModelError: A file that is missing, a git-LFS pointer, damaged or cut short, or written for another library or
            version; an adapter of another kind than LoRA, or beside a whole model; another kind of model. The message
            names the file and the remedy.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".model", ".txt", ".jinja") and _is_pointer(file):
            raise ModelError(
                f"{file} is a git-LFS pointer and not the file itself: run `git lfs pull` in its folder, or {_AGAIN}"
            )
    if is_adapter(folder):
        _check_adapter(folder)
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder} holds no config.json: {_within(folder)}")
    _check_config(folder / "config.json", trust_remote_code)
    if (folder / "generation_config.json").is_file():  # Transformers passes over a damaged one, and its stop tokens
        read_json(folder / "generation_config.json")
    weight_names(folder)


def is_adapter(folder: Path) -> bool:
    """Whether a folder is peft's, with an adapter and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def _check_adapter(folder: Path) -> None:
    config = read_json(folder / ADAPTER_CONFIG)
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    what = f"{folder} holds an adapter ({ADAPTER_CONFIG}) of the model {base}"
    merge = "merge the two with peft's merge_and_unload(), save the result and give that folder"
    if kind != "LORA":
        raise ModelError(f"{what} of the kind {kind}, and LORA alone is read: {merge}")
    if not base or not isinstance(base, str):
        raise ModelError(f"{folder / ADAPTER_CONFIG} does not name its model (base_model_name_or_path): write it there")
    if whole := config.get("modules_to_save"):
        raise ModelError(
            f"{what} with whole copies of {whole} beside it (modules_to_save), which are not read: {merge}"
        )
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        raise ModelError(
            f"{what} and a whole model's weights too: move one elsewhere, since which is meant cannot be told"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{what} and no {ADAPTER_WEIGHTS}: {_instead(folder)}")
    _names_in(folder / ADAPTER_WEIGHTS)


def check_as_written(folder: Path, weights: bool) -> None:
    """Refuse a folder of which a file is not as real-fast train wrote it; one without its checksums passes.

    Args:
        folder: Of a model.
        weights: Read the weights too, as fast as the disk and SHA-256 are (1.5 GB a second and core, files side by
            side); else the small files alone.

    Raises:
        ModelError: The message names every file that was damaged or changed, and what to do in either case.
    """
    sums = folder / CHECKSUMS
    if not sums.is_file():
        return
    found = read_json(sums).values()
    if not all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in found):
        return  # another program's
    if problem := damage(folder, skip="optimizer*.safetensors" if weights else "*.safetensors"):
        raise ModelError(
            f"{folder} has changed since it was written: {problem}. If nobody meant to change it, it is damaged: copy "
            f"it again from where it was made, or take an earlier checkpoint. If you changed it, remove {sums}, and "
            "nothing in this folder is compared any more"
        )


def _check_config(path: Path, trust_remote_code: bool) -> None:
    config = read_json(path)
    kind = config.get("model_type")
    heads = config.get("architectures") or []
    if not isinstance(heads, list) or not all(isinstance(name, str) for name in heads):
        raise ModelError(f"{path} has architectures {str(heads)[:60]!r}, and names are expected: {_AGAIN}")
    if not isinstance(kind, str):
        raise ModelError(f"{path} has no model_type, so it is not a Transformers model's: convert the model first")
    if kind not in CONFIG_MAPPING and "auto_map" in config and not trust_remote_code:
        raise ModelError(
            f"{path}: the model {kind!r} comes with its own code, which is not run unless trust_remote_code says so"
        )
    if kind not in CONFIG_MAPPING and "auto_map" not in config:
        written = config.get("transformers_version")
        raise ModelError(
            f"{path} has model_type {kind!r}, which the installed transformers {transformers.__version__} does not know"
            + (f" (the file was written by {written})" if written else "")
            + ": upgrade transformers, or choose another model"
        )
    if "auto_map" not in config:
        try:
            AutoConfig.from_pretrained(path.parent)
        except (*_UNUSABLE, StrictDataclassError) as error:
            raise ModelError(
                f"{path} cannot be used ({' '.join(str(error).split())}): it is damaged, or for another version than "
                f"the installed transformers {transformers.__version__}"
            ) from error
    for name in heads:
        if any(head in name for head in _OTHER_HEADS):
            raise ModelError(
                f"{path} says that the model is a {name}, which writes no text: a judge needs a causal language model "
                "(...ForCausalLM)"
            )
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{path} is an encoder-decoder's ({kind}): a judge needs a causal language model")


def _within(folder: Path) -> str:
    """What a folder without a config.json is, where it is known."""
    if (folder / "final" / "config.json").is_file():
        return f"it is a run's, whose model is in {folder / 'final'}"
    if checkpoints := sorted(folder.glob("checkpoints/step-*/config.json")):
        return f"it is a run's that has not come to its end; its newest checkpoint is {checkpoints[-1].parent}"
    return "it is not a Hugging Face model folder"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder; of a single file and several with an index, the single one.

    That is Transformers' choice. What else lies there (an optimiser's, a copy) is no part of the model.

    Raises:
        ModelError: There are none, or one that the index names is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise ModelError(f"{folder} has neither {SINGLE} nor {INDEX}: {_instead(folder)}")
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ModelError(f"{folder / INDEX} has no weight_map: {_AGAIN}")
    if wrong := [name for name in where.values() if not isinstance(name, str) or Path(name).name != name]:
        raise ModelError(f"{folder / INDEX} names {wrong[0]!r}, which is no file beside it: {_AGAIN}")
    files = [folder / name for name in sorted(set(where.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the {len(files)} files that {INDEX} names ({missing[0]}): "
            "download the model again"
        )
    return files


@contextmanager
def model_alone(folder: Path) -> Iterator[Path]:
    """A folder with the model's weights and no others, for a library that loads every safetensors file there is.

    It is `folder` itself where there are no others, else a temporary one of links.
    """
    others = {*folder.glob("*.safetensors"), folder / INDEX} - {*weight_files(folder)}
    if not (folder / SINGLE).is_file() or not any(file.is_file() for file in others):
        yield folder
        return
    with TemporaryDirectory() as links:
        for file in folder.iterdir():
            if file not in others:
                (Path(links) / file.name).symlink_to(file.resolve())
        yield Path(links)


def weight_names(folder: Path) -> set[str]:
    """Names of the weights in a model folder's safetensors, by the headers of the files.

    Raises:
        ModelError: As :func:`weight_files` does, or a file is damaged or cut short.
    """
    found: set[str] = set()
    for file in weight_files(folder):
        found |= _names_in(file)
    return found


def _names_in(file: Path) -> set[str]:
    """Names of a file's tensors. Raises :class:`ModelError` where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise ModelError(f"{file} ({size:,} bytes) is damaged or cut short ({error}): {_AGAIN}") from error


def _instead(folder: Path) -> str:
    """What a folder without safetensors has in their place, and what to do about it."""
    pickled = [file.name for pattern in _PICKLED for file in sorted(folder.glob(pattern))]
    if pickled:
        return (
            f"{pickled[0]} is pickled, and nothing is unpickled here; have its owner save it anew with "
            "save_pretrained(), which writes safetensors"
        )
    if any(folder.glob("*.gguf")):
        return "convert the GGUF file to safetensors first (from_pretrained(..., gguf_file=...), save_pretrained())"
    return "copy or download the weights into it"


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file of a model. Raises :class:`ModelError` where it is none."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise ModelError(f"{path} cannot be read as JSON ({error}): it is damaged or cut short; {_AGAIN}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__} and not an object: {_AGAIN}")
    return value


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER
