"""What makes a run this run and no other: its settings, and the contents of all that they name."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from real_fast.config import Config
from real_fast.data.dataset import Dataset
from real_fast.model.load import base_folder, resolve_model
from real_fast.prompt.builder import PromptBuilder
from real_fast.runs import fingerprints
from real_fast.runs.fingerprints import Fingerprints, settings_of
from real_fast.score.ending import end_of_turn
from real_fast.types import JudgeRow

logger = logging.getLogger(__name__)

# Of a row: what has a digest of its own, and its id, which is made of the file's name where the row has none.
_APART = ("label", "feedbacks", "feedback_labels", "prompt_ids", "id")
# Of a model's config.json: what says nothing about the model.
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
_PIECE = 2**16


def fingerprints_of(config: Config, data: Dataset, tokenizer: Any, builder: PromptBuilder) -> Fingerprints:
    """Fingerprints of a run about to start, some seconds for a million rows.

    Args:
        config: The settings.
        data: The rows, with the prompts' token ids.
        tokenizer: The model's.
        builder: Has the template's text as the run uses it.
    """
    settings = {key: setting.value for key, setting in settings_of(config).items()}
    folder = resolve_model(config.initial_weights)
    base = base_folder(folder)
    model = json.loads((base / "config.json").read_text(encoding="utf-8"))
    vocabulary = [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))]
    contents = {
        **_of_rows("training rows", data.train),
        **_of_rows("held-out rows", data.eval),
        "the text of prompt.template": _digest([builder.source]),
        "the tokenizer's vocabulary": f"{len(tokenizer)} tokens, {_digest([_json(vocabulary)])}",
        "the token that ends a text": f"{tokenizer.eos_token!r}, an answer {end_of_turn(tokenizer)}",
        "the model's chat template": _digest([_json(getattr(tokenizer, "chat_template", None))]),
        "the model's config.json": _digest([_json({k: v for k, v in model.items() if k not in _VOLATILE})]),
        "the start weights": _digest(_samples(folder)),
    }
    if base != folder:
        contents["the weights of the adapters' model"] = _digest(_samples(base))
    return Fingerprints(json.loads(json.dumps(settings)), contents)


def check_same_run(resume_from: Path, identity: Fingerprints, config: Config) -> None:
    """Refuse to go on from a checkpoint of another run; one of an earlier version has nothing to compare with.

    Raises:
        CheckpointError: Something has changed that must not, and ``allow_changed`` is off.
    """
    known = fingerprints.read(resume_from)
    if known is None:
        logger.warning(
            "%s was written by a version that kept no fingerprints: that data, template, tokenizer and settings are "
            "still the same is not checked",
            resume_from.name,
        )
        return
    fingerprints.check(known, identity, settings_of(config), config.allow_changed)


def _of_rows(name: str, rows: Sequence[JudgeRow]) -> dict[str, str]:
    """Digests of rows, part by part, so that it can be said which part has changed; the order counts."""
    texts = ({key: value for key, value in vars(r).items() if key not in _APART} for r in rows)
    tokens = (array("q", r.prompt_ids).tobytes() for r in rows)
    return {
        f"the {name}": f"{len(rows)} rows, {_digest(map(_json, texts))}",
        f"the labels of the {name}": _digest(_json(r.label) for r in rows),
        f"the feedback of the {name}": _digest(_json([r.feedbacks, r.feedback_labels]) for r in rows),
        f"the prompts' tokens of the {name}": _digest(tokens),
    }


def _samples(folder: Path) -> Iterator[bytes]:
    """Of every file of weights, its name, its size and three pieces: training changes a tensor nearly everywhere."""
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        yield f"{file.name} {size}".encode()
        with file.open("rb") as handle:
            for place in (size // 3, 2 * size // 3, max(size - _PIECE, 0)):
                handle.seek(place)
                yield handle.read(_PIECE)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)  # further fields of a row may be dates and the like


def _digest(parts: Iterable[str | bytes]) -> str:
    """16 hexadecimal digits of a SHA-256; the parts' borders count."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:16]
