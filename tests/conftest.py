"""Fixtures that every test may use. The suite needs no network and no GPU."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import tempfile
from pathlib import Path

# Set before anything imports them: no test may wait for a hub, and forked tokenizers only warn.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What a script starts in the background ignores Ctrl-C, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Processes side by side share the cores: two that each take all of them are slower than one. OpenMP reads this when
# torch is imported, which real_fast does too: nothing of it may be imported above.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads))

# Inductor's cache takes kernels made for other instructions as well, where these are switched off (CONTRIBUTING.md).
if "ATEN_CPU_CAPABILITY" in os.environ:
    _cache = Path(tempfile.gettempdir()) / f"torchinductor-{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_cache))

import torch

# Without a GPU the Triton kernels run in Triton's interpreter. It must know before Triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from real_fast.score.phrase import PhraseFinder
from real_fast.score.scale import ScoreScale

TinyLlama = Callable[..., Any]
_ROOT = Path(__file__).resolve().parent.parent
# What `make check` leaves out, by file or by test: whole runs from the command line, kernels in Triton's interpreter or
# compiled, many resamples. Those that start vLLM say so themselves.
E2E = {
    "test_conformance",
    "test_examples",
    "test_experiment",
    "test_golden",
    "test_methods",
    "test_open",
    "test_ref_policy",
    "test_score_edges",
    "test_trackers",
    "test_train",
}
SLOW = {
    "test_bare",
    "test_gpu_lint",
    "test_head",
    "test_ops",
    "test_plots",
    "test_resources",
    "test_triton",
    "test_trl_steps",
    "test_a_method_with_seeds_is_the_mean_of_its_runs",
    "test_gpu_check_goes_on_behind_a_crash",
    "test_greedy_tokens_are_those_of_generate",
    "test_p_values_of_equals_are_spread_over_the_unit_interval",
    "test_smollm2_itself",
    "test_the_body_compiles_in_one_graph",
    "test_weights_are_those_of_the_gguf_file",
    "test_without_vllm_transformers_samples_and_peaks_stand_beside_the_plan",
    "test_the_seeds_of_two_methods_are_drawn_in_pairs",
}

# Times vary on a shared machine, so no test fails for its own; CI draws the same examples every time.
settings.register_profile("real-fast", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("real-fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark whole runs and what is slow; skip tests marked ``gpu`` where there is none; long ones first."""
    for item in items:
        names = {item.path.stem, getattr(item, "originalname", "")}
        if names & E2E:
            item.add_marker(pytest.mark.e2e)
        if names & SLOW:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        items[:] = _long_ones_first(items, workers)


_known = {"modules": 0}


def pytest_runtest_setup() -> None:
    """What imports made is no garbage: of vLLM and all others, a full collection would look at it for half a second."""
    if len(sys.modules) > _known["modules"] + 200:
        gc.collect()
        gc.freeze()
        _known["modules"] = len(sys.modules)


def _long_ones_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Files of long tests at the start of each worker's share (an equal run of tests), so that none ends with one.

    All that starts vLLM is in one share: importing it takes ten seconds.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def has(file: Path, *marks: str) -> bool:
        return any(item.get_closest_marker(mark) for item in files[file] for mark in marks)

    shares: list[list[pytest.Item]] = [[item for f in files if has(f, "vllm") for item in files[f]]]
    shares += [[] for _ in range(workers - 1)]
    for file in [f for f in files if has(f, "e2e", "slow") and not has(f, "vllm")]:
        min(reversed(shares), key=len).extend(files[file])
    short = [item for f in files if not has(f, "vllm", "e2e", "slow") for item in files[f]]
    ordered: list[pytest.Item] = []
    for place, share in enumerate(shares):
        room = max(0, (len(items) - len(ordered)) // (workers - place) - len(share))
        ordered += share + short[:room]
        short = short[room:]
    return ordered


# A figure's cost is its layout and its pixels, which only these tests look at.
DRAWN = {"test_plots", "test_health", "test_compare"}


@pytest.fixture(scope="session", autouse=True)
def _not_rendered() -> Iterator[Callable[..., None]]:
    """Figures are made and written, but as one pixel; yields what renders them."""
    from matplotlib.figure import Figure
    from PIL import Image

    def save(self: Figure, path: Any, **_: Any) -> None:
        Image.new("RGB", (1, 1)).save(path, format="png")

    render = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield render


@pytest.fixture(autouse=True)
def _rendered(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _not_rendered: Callable[..., None]
) -> None:
    """Figures as they are, for the tests that look at them."""
    if request.node.path.stem in DRAWN:
        from matplotlib.figure import Figure

        monkeypatch.setattr(Figure, "savefig", _not_rendered)


@pytest.fixture(scope="session", autouse=True)
def _not_flushed() -> Iterator[None]:
    """No test cuts the power: what is written need not reach the disk at once, and a short run flushes 70 files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct (bf16 safetensors and tokenizer), converted once per machine."""
    from real_fast.errors import WheelMissing
    from real_fast.model.smollm2 import prepare

    try:
        return prepare()
    except WheelMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def smollm2_start(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with the first four of its 30 layers, which are all alike: its tokens, shapes and files in less time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("smollm2") / "start"
    AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=4, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> Any:
    """The tokenizer of SmolLM2. Shared by the session: do not change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def small_tokenizer(smollm2_tokenizer: Any) -> Any:
    """The first 2,048 tokens of SmolLM2: of 49,152, a tiny model would do little but compute, load and save their rows.

    Shared by the session: do not change it.
    """
    from tests.vocabularies import first_tokens

    return first_tokens(smollm2_tokenizer, 2048)


@pytest.fixture(scope="session")
def tiny_llama() -> TinyLlama:
    """Factory of small random Llama models in fp32 and eval mode, the same for the same arguments.

    ``tiny_llama(tied=False, vocab_size=384, hidden_size=32, layers=2, seed=0, **config)`` returns a LlamaForCausalLM
    with 4 heads over 2 key-value heads; ``config`` goes to LlamaConfig. The caller's random state is left as it was.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(
        tied: bool = False, vocab_size: int = 384, hidden_size: int = 32, layers: int = 2, seed: int = 0, **config: Any
    ) -> Any:
        settings: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "dtype": torch.float32,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()

    return make


@pytest.fixture(scope="session")
def golden_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model of the golden trajectories, with a tokenizer of one token a byte."""
    from tests.golden.trajectories import make_model

    return make_model(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="session")
def judge_data() -> Path:
    """Folder with real judge rows: mt_bench.jsonl, vicuna.jsonl, topical_chat.jsonl."""
    folder = Path(os.environ.get("REAL_FAST_DATA") or _ROOT.parent / "shared" / "data")
    for name in ("mt_bench.jsonl", "vicuna.jsonl", "topical_chat.jsonl"):
        if not (folder / name).is_file():
            pytest.skip(f"no {name} in {folder}; set REAL_FAST_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], small_tokenizer: Any) -> Path:
    """A random model with the first of SmolLM2's tokens: everything but the judging, in milliseconds a step."""
    folder = tmp_path_factory.mktemp("tiny_judge")
    tiny_llama(tied=True, vocab_size=len(small_tokenizer), hidden_size=16).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scale(smollm2_tokenizer: Any) -> ScoreScale:
    """1 to 5 after the usual phrase."""
    return ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2, 3, 4, 5], "So the overall score is ")


@pytest.fixture(scope="module")
def finder(smollm2_tokenizer: Any, scale: ScoreScale) -> PhraseFinder:
    """Finds that phrase."""
    return PhraseFinder(smollm2_tokenizer, scale)


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """``vocabulary("qwen3")``: the tokenizer of a family in tests.vocabularies.FAMILIES. Do not change it."""
    from functools import cache

    from tests.vocabularies import tokenizer_of

    return cache(lambda family: tokenizer_of(family, tmp_path_factory.mktemp("vocabulary") / family))


@pytest.fixture
def interpreted_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger in Triton's interpreter, which knows neither floats as arguments nor libdevice."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is here: the tests marked gpu try the kernels themselves")
    pytest.importorskip("liger_kernel", reason="Liger is not installed")
    tl = importlib.import_module("triton.language")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._implicit_cvt

    def with_floats(arg: Any) -> Any:
        if not isinstance(arg, float):
            return convert(arg)
        return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    norms = importlib.import_module("liger_kernel.ops.rms_norm")
    monkeypatch.setattr(norms, "rsqrt", lambda x: tl.rsqrt(x))
