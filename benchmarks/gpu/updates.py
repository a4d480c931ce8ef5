"""The update at real sizes, ours beside the others; loss and gradients of ours against the reference's first."""

from __future__ import annotations

import gc
import importlib.util
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import roofline, trl_async_step, trl_step
from benchmarks.gpu.cases import CASES, SMALL, Case, five_scores, word_tokenizer
from benchmarks.gpu.stages import Check, attempt
from benchmarks.machine import PeakMemory
from benchmarks.phases import Phases
from benchmarks.record import append, append_absence
from benchmarks.steps import FASTER, VARIANTS, OurStep, ReferenceStep, agreement
from benchmarks.workload import Workload, random_workload
from real_fast.planning.flops import ModelFlops

# What is timed at every size; at one of the smaller ones, every variant of ours too.
PAIR = ("reference", "ours")
TRL = ("trl", "trl async")


def cases(check: Check) -> tuple[Case, ...]:
    """The shapes, smallest first."""
    return SMALL if check.small else CASES


def first(check: Check, end: float) -> int:
    """An early stage: whether ours computes what the reference does, and one update, at the smallest size."""
    case = cases(check)[0]
    _, whole = attempt(check, "agreement", lambda: run_agreement(case, check.device, check.attention))
    return int(not whole) + _run(check, end, [(case, "ours")])


def pairs(check: Check, end: float) -> int:
    """Ours and the reference's at every size."""
    return _run(check, end, [(case, variant) for case in cases(check) for variant in PAIR])


def others(check: Check, end: float) -> int:
    """TRL's trainers at the two smallest sizes; ours with one idea switched off, or other layers, at the second."""
    wrong, sizes = 0, cases(check)
    missing = {"trl": trl_step.absent(), "trl async": trl_async_step.absent(check.device)}
    if check.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        here = "needs a CUDA device" if check.device.type != "cuda" else "not installed: liger-kernel"
        missing["Liger's layers"] = here
    work = [(case, variant) for case in sizes[:2] for variant in TRL]
    work += [(case, variant) for case in sizes[:2][-1:] for variant in (*VARIANTS, *FASTER) if variant not in PAIR]
    for name, reason in missing.items():
        if reason:
            print(f"step: {name} left out: {reason}")
            append_absence("step", name, reason)
    wrong += _run(check, end, [(case, variant) for case, variant in work if not missing.get(variant)])
    return wrong


def _run(check: Check, end: float, work: list[tuple[Case, str]]) -> int:
    """Time contenders until `end`. Returns how many failed."""
    peak = check.peak or roofline.measure(check.device)
    wrong = 0
    for case, variant in work:
        name = f"{case.name} {variant}"
        contender, whole = attempt(
            check, name, partial(run_step, case, variant, check.device, peak, check.attention, end - time.monotonic())
        )
        wrong += not whole
        if contender is not None and variant == "ours":
            path = check.details / f"profile-{case.name}.txt"
            wrong += not attempt(check, f"{name}, profile", partial(write_profile, path, contender, check.device))[1]
        del contender
        gc.collect()  # trainers and hooked models hold themselves, and the next model comes before its measurement
    return wrong


def run_step(case: Case, variant: str, device: Any, peak: roofline.Roofline, attention: str, left: float) -> Any:
    """Time one contender at one size and record it. Returns the contender, or None where the time does not allow it."""
    scale = five_scores()
    workload = random_workload(case.vocabulary, scale, case.prompts, case.k, case.p, case.r)
    model = case.model(device)
    flops = ModelFlops.of(model.config).update(workload.groups, variant != "no shared prompt", case.half_weights)
    work = flops.reference if variant in ("reference", "trl") else flops.ours
    expected = work / (0.3 * peak.flops)
    rounds = 2 if expected > 2 else 4
    if rounds * expected + 5 > left:
        print(f"{case.name:12} {variant:18} left out: about {rounds * expected:.0f} s, and {left:.0f} s are left")
        return None
    measured = []
    with PeakMemory() as memory:
        contender = _contender(case, variant, model, workload, attention, rounds)
        for _ in range(rounds):
            phases = Phases()
            contender.step(phases)
            measured.append(dict(phases.seconds))
    if variant in TRL:
        contender.close()
    best = min(measured, key=lambda seconds: sum(seconds.values()))
    seconds = sum(best.values())
    values: dict[str, tuple[float | None, str]] = {
        "peak_bytes": (memory.bytes, "B"),
        "seconds": (seconds, "s"),
        "samples_per_s": (len(workload.rollouts) / seconds, "1/s"),
        "body_tokens": (contender.body_tokens, "tokens"),
    }
    rate = ""
    if variant in ("reference", "ours", "no shared prompt"):
        values |= {"flops": (work, "FLOP"), "of_roofline": (work / seconds / peak.flops, "1")}
        rate = f", {work / seconds / 1e12:.0f} TFLOP/s, {work / seconds / peak.flops:.0%} of the measured peak"
    values |= {f"seconds/{name}": (s, "s") for name, s in best.items()}
    append("step", case.name, variant, f"random {workload.case}", values)
    print(f"{case.name:12} {variant:18} {seconds:8.3f} s{rate}", flush=True)
    return contender


def _contender(case: Case, variant: str, model: Any, workload: Workload, attention: str, rounds: int) -> Any:
    scale, autocast = five_scores(), None if case.half_weights else torch.bfloat16
    if variant == "reference":
        return ReferenceStep(model, scale, workload, case.sequences, autocast, case.optimize)
    if variant == "trl":
        return trl_step.TrlStep(model, word_tokenizer(case.vocabulary), workload, case.sequences, rounds)
    if variant == "trl async":
        tokenizer = word_tokenizer(case.vocabulary)
        return trl_async_step.AsyncTrlStep(model, tokenizer, workload, case.budget, rounds)
    kind: Any = variant
    budget = case.budget if variant != "no shared prompt" else case.k * (case.p + case.r)
    return OurStep(model, scale, workload, budget, kind, autocast, attention, case.optimize)


def run_agreement(case: Case, device: Any, attention: str) -> None:
    """Loss and gradients of ours against the reference's on this device, in fp32 and in bf16 over fp32 weights."""
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


def write_profile(path: Path, contender: Any, device: Any) -> None:
    """The kernels of one step, by time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        contender.step(Phases())
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    path.write_text(trace.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=80), encoding="utf-8")
