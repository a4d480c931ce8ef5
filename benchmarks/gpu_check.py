"""Everything that only a GPU can tell, in one command, without network: ``python -m benchmarks.gpu_check OUT``.

Most important first: the tests marked ``gpu``, the kernels' before the others; what the machine reaches at best; loss
and gradients against the reference's; a LoRA step of the 8B shape with vLLM asleep, beside the plan; the head beside
its peers; the update at real sizes, ours against the reference-style one; profiles. What is done is on disk at once, so
a run that is cut off leaves its first parts. OUT gets ``benchmarks.csv``, ``summary.json``, plots, ``gpu-tests.txt``,
``lora-step.txt`` and ``profile-*.txt``.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 780.0  # seconds for everything
TESTS, LORA, HEAD = 170.0, 220.0, 150.0  # of which the tests, the LoRA step and the head's benchmark take at most
STEPS = 200.0  # what the LoRA step leaves for the updates behind the head's benchmark
# Tests spend their time compiling kernels, a process one at a time.
WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))


@dataclass(frozen=True)
class Case:
    """A Qwen3 shape with random weights, and the settings under which it fits into 80 GB.

    From 4B on, weights are bf16 and activations are recomputed, for both sides; `optimize`: take AdamW's step too.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    tied: bool = True
    half_weights: bool = False
    optimize: bool = True
    vocabulary: int = 151_936
    kv_heads: int = 8
    head_dim: int = 128
    prompts: int = 4
    k: int = 8
    p: int = 1200
    r: int = 250
    budget: int = 6_600
    sequences: int = 4

    def config(self, **more: Any) -> Any:
        """The shape as a Transformers config; `more` goes to it."""
        from transformers import Qwen3Config

        settings: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None} | more
        return Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=self.tied,
            max_position_embeddings=8192,
            **settings,
        )

    def model(self, device: Any) -> Any:
        """The model, on the device."""
        import torch
        from transformers import Qwen3ForCausalLM

        config = self.config()
        torch.manual_seed(0)
        dtype = torch.bfloat16 if self.half_weights else torch.float32
        with torch.device(device):
            model: Any = Qwen3ForCausalLM(config)
        model.to(dtype)
        if self.half_weights:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model


CASES = (
    Case("Qwen3-0.6B", 1024, 28, 16, 3072),
    Case("Qwen3-1.7B", 2048, 28, 16, 6144),
    Case("Qwen3-4B", 2560, 36, 32, 9728, half_weights=True),
    Case("Qwen3-8B", 4096, 36, 32, 12288, tied=False, half_weights=True, optimize=False),
)
SMALL = (
    Case(
        "tiny",
        64,
        2,
        4,
        128,
        vocabulary=512,
        kv_heads=2,
        head_dim=16,
        prompts=2,
        k=4,
        p=48,
        r=16,
        budget=256,
        sequences=2,
    ),
)
# What is timed at every size; at one of the smaller ones, every variant of ours too.
PAIR = ("reference", "ours")


def gpu_test_files() -> list[Path]:
    """Test files that hold a test marked gpu, the kernels' first."""
    found = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    return sorted(found, key=lambda path: path.parent.name != "real_kernels")


def missing_packages() -> list[str]:
    """What the tests or the plots need and this machine lacks."""
    names = ("pytest", "hypothesis", "scipy", "matplotlib", "trl", "liger_kernel")
    return [name for name in names if importlib.util.find_spec(name) is None]


def run_tests(out: Path, seconds: float) -> int:
    """The tests marked gpu, into gpu-tests.txt, several processes at a time. Exit status 1 if one failed."""
    # Without the project's pytest settings, which ask for plugins that may not be there.
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "--import-mode=importlib"]
    command += ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    end = time.monotonic() + seconds
    listed = subprocess.run(
        [*command, "--collect-only", *map(str, gpu_test_files())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    tests = [line for line in listed.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]
    if not tests:
        (out / "gpu-tests.txt").write_text(listed.stdout + listed.stderr)
        return int(listed.returncode not in (0, 5))  # 5: no test was collected
    size = -(-len(tests) // WORKERS)
    running = []
    for i, start in enumerate(range(0, len(tests), size)):
        # Neighbours compile the same kernels, so they go to one process.
        file = (out / f"gpu-tests-{i}.txt").open("w")
        running.append(
            (subprocess.Popen([*command, *tests[start : start + size]], cwd=ROOT, stdout=file, stderr=file), file)
        )
    failed = listed.returncode not in (0, 5)
    for process, file in running:
        try:
            failed |= process.wait(max(1.0, end - time.monotonic())) not in (0, 5)
        except subprocess.TimeoutExpired:
            process.kill()
            file.write(f"\nstopped after {seconds:.0f} s\n")
            failed = True
        file.close()
    report = out / "gpu-tests.txt"
    report.write_text(listed.stderr)
    with report.open("a") as whole:
        for text in sorted(out.glob("gpu-tests-*.txt")):
            whole.write(text.read_text())
            text.unlink()
    return int(failed)


def run_step(case: Case, variant: str, device: Any, roofline: Any, attention: str, left: float) -> Any:
    """Time one contender at one size and record it. Returns the contender, or None where the time does not allow it."""
    import torch

    from benchmarks.machine import PeakMemory
    from benchmarks.phases import Phases
    from benchmarks.record import append
    from benchmarks.steps import OurStep, ReferenceStep
    from benchmarks.trl_step import TrlStep
    from benchmarks.workload import random_workload
    from real_fast.planning.flops import ModelFlops

    scale = five_scores()
    workload = random_workload(case.vocabulary, scale, case.prompts, case.k, case.p, case.r)
    shared, autocast = variant != "no shared prompt", None if case.half_weights else torch.bfloat16
    model = case.model(device)
    flops = ModelFlops.of(model.config).update(workload.groups, shared, case.half_weights)
    work = flops.reference if variant in ("reference", "trl") else flops.ours
    expected = work / (0.3 * roofline.flops)
    rounds = 2 if expected > 2 else 4
    if rounds * expected + 5 > left:
        print(f"{case.name:12} {variant:18} left out: about {rounds * expected:.0f} s, and {left:.0f} s are left")
        return None
    budget = case.budget if shared else case.k * (case.p + case.r)
    measured = []
    with PeakMemory() as peak:
        contender: Any
        if variant == "reference":
            contender = ReferenceStep(model, scale, workload, case.sequences, autocast, case.optimize)
        elif variant == "trl":
            contender = TrlStep(model, word_tokenizer(case.vocabulary), workload, case.sequences, rounds)
        else:
            kind: Any = variant
            contender = OurStep(model, scale, workload, budget, kind, autocast, attention, case.optimize)
        for _ in range(rounds):
            phases = Phases()
            contender.step(phases)
            measured.append(dict(phases.seconds))
    best = min(measured, key=lambda seconds: sum(seconds.values()))
    seconds = sum(best.values())
    values: dict[str, tuple[float | None, str]] = {
        "peak_bytes": (peak.bytes, "B"),
        "seconds": (seconds, "s"),
        "samples_per_s": (len(workload.rollouts) / seconds, "1/s"),
        "body_tokens": (contender.body_tokens, "tokens"),
    }
    rate = ""
    if variant in ("reference", "ours", "no shared prompt"):
        values |= {"flops": (work, "FLOP"), "of_roofline": (work / seconds / roofline.flops, "1")}
        rate = f", {work / seconds / 1e12:.0f} TFLOP/s, {work / seconds / roofline.flops:.0%} of the measured peak"
    values |= {f"seconds/{name}": (s, "s") for name, s in best.items()}
    append("step", case.name, variant, f"random {workload.case}", values)
    print(f"{case.name:12} {variant:18} {seconds:8.3f} s{rate}", flush=True)
    return contender


def run_agreement(case: Case, device: Any, attention: str) -> None:
    """Loss and gradients of ours against the reference's on this device, in fp32 and in bf16 over fp32 weights."""
    import torch

    from benchmarks.record import append
    from benchmarks.steps import OurStep, ReferenceStep, agreement
    from benchmarks.workload import random_workload

    scale = five_scores()
    workload = random_workload(case.vocabulary, scale, 1, 4, min(case.p, 300), min(case.r, 64))
    for autocast in (None, torch.bfloat16):
        model = case.model(device)
        kernel = "sdpa" if autocast is None else attention
        ours = OurStep(model, scale, workload, 4096, "ours", autocast, kernel, optimize=False)
        reference = ReferenceStep(model, scale, workload, 2, autocast, optimize=False)
        difference, cosine = agreement(ours, reference)
        precision = "fp32" if autocast is None else "bf16"
        values = {"loss_difference": (difference, "relative"), "gradient_cosine": (cosine, "1")}
        append("agreement", case.name, "ours", f"{precision} {workload.case}", values)
        print(
            f"{case.name:12} {precision}: loss differs by {difference:.1e}, cosine of gradients {cosine:.6f}",
            flush=True,
        )


def profile_head(path: Path, device: Any) -> None:
    """The kernels of the head in each mode, at the first shape."""
    from benchmarks import head

    class Once:
        def __init__(self, name: str) -> None:
            hidden, weight, targets = head._timed_inputs(head.shapes(device)[0], device)
            self.loss = head.contenders(device)[name](hidden, weight, targets)

        def step(self, _: Any) -> None:
            self.loss().backward()

    for name in ("ours forward", "ours recompute"):
        write_profile(path.with_name(f"{path.stem}-{name.split()[1]}.txt"), Once(name), device)
    head._timed_inputs.cache_clear()


def write_profile(path: Path, contender: Any, device: Any) -> None:
    """The kernels of one step, by time."""
    import torch

    from benchmarks.phases import Phases

    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        contender.step(Phases())
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    path.write_text(trace.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=80))


def five_scores() -> Any:
    """1 to 5, with made-up tokens."""
    from real_fast.score.scale import ScoreScale

    return ScoreScale((1.0, 2.0, 3.0, 4.0, 5.0), tuple("12345"), tuple(range(16, 21)), "score: ", (60, 61), 1)


def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer that TRL accepts, made without a download."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(min(vocabulary, 100))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w3", unk_token="w0")


def main() -> int:
    """Run what fits into the time. Exit status 1 if a test or a benchmark failed."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_check", description="Tests and benchmarks on a GPU.")
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on any device: does the command work?")
    parser.add_argument("--attention", default="auto", choices=("auto", "sdpa", "varlen", "flex"))
    parser.add_argument("--no-tests", action="store_true", help="benchmarks alone")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything (default: %(default)g)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ["REAL_FAST_RESULTS"] = str(arguments.out.resolve())

    import torch

    from benchmarks import head, lora_step, record, report, roofline
    from benchmarks.steps import FASTER, VARIANTS
    from tools import benchmark_tables

    if not torch.cuda.is_available() and not arguments.small:
        print(
            "gpu-check needs a CUDA device, and torch finds none (--small runs tiny shapes anywhere)", file=sys.stderr
        )
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    end, failed = time.monotonic() + arguments.limit, 0
    if missing := missing_packages():
        print(f"not installed here: {', '.join(missing)}", flush=True)

    def attempt(what: str, work: Callable[[], Any]) -> Any:
        """One part; whatever goes wrong in it is said, and the others go on."""
        nonlocal failed
        try:
            return work()
        except Exception as error:
            failed += 1
            print(f"{what} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
        finally:
            gc.collect()
        return None

    def write_report() -> None:
        """What is known so far: written and printed, since the next part may end the command."""
        report.main()
        print(benchmark_tables.text(record.read()), flush=True)

    if not arguments.no_tests and "pytest" not in missing:
        status = attempt("tests", partial(run_tests, arguments.out, TESTS))
        failed += status or 0
        text = arguments.out / "gpu-tests.txt"
        lines = text.read_text().splitlines() if text.is_file() else []
        print("\n".join(x for x in lines if x.startswith(("FAILED", "ERROR", "E  ", "stopped")) or " in " in x)[-4000:])
    peak = attempt("roofline", partial(roofline.measure, device, 0.2 if arguments.small else 2.0))
    if peak is None:
        return 1
    print(f"measured peak: {peak.flops / 1e12:.1f} TFLOP/s, {peak.bandwidth / 1e12:.2f} TB/s", flush=True)
    cases = SMALL if arguments.small else CASES
    attempt("agreement", partial(run_agreement, cases[0], device, arguments.attention))
    left = min(LORA, end - time.monotonic() - HEAD - STEPS)
    status = attempt("LoRA step", partial(lora_step.run, arguments.out, arguments.small, left))
    failed += status or 0
    left = min(end, time.monotonic() + HEAD)
    status = attempt("head", partial(head.run, device, arguments.small, left))
    failed += status or 0
    attempt("report", write_report)
    if not arguments.small:
        attempt("head profile", partial(profile_head, arguments.out / "profile-head.txt", device))
    absent = ["Liger's layers"] if "liger_kernel" in missing or device.type == "cpu" else []
    work = [(case, variant) for case in cases for variant in PAIR]
    work += [(case, v) for case in cases[:2][-1:] for v in (*VARIANTS, *FASTER) if v not in (*PAIR, *absent)]
    if "trl" not in missing:
        work += [(case, "trl") for case in cases[:2]]
    for case, variant in work:
        left = end - time.monotonic()
        contender = attempt(
            f"{case.name} {variant}", partial(run_step, case, variant, device, peak, arguments.attention, left)
        )
        if contender is not None and variant == "ours":
            path = arguments.out / f"profile-{case.name}.txt"
            attempt(f"{case.name} profile", partial(write_profile, path, contender, device))
        del contender
        attempt("report", write_report)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
