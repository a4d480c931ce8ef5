"""The ratios that get published: from lines of the CSV to summary.json and tables."""

from __future__ import annotations

from benchmarks.report import newest, summarize
from tools.benchmark_tables import rollout_table, step_table, sweep_table

CASE = "vicuna K=8 P=1000 R=100 prompts=1"


def line(variant, metric, value, run="1", case=CASE, suite="step", machine="m", model="s"):
    return {
        "run": run, "machine": machine, "model": model, "suite": suite, "variant": variant, "case": case,
        "metric": metric, "value": str(value), "unit": "",
    }  # fmt: skip


def contender(variant, seconds, run="1", flops=None, **more):
    values = {"seconds": seconds, "samples_per_s": 8 / seconds, "body_tokens": 1800, "peak_bytes": 2**30 * seconds}
    values |= {} if flops is None else {"flops": flops}
    return [line(variant, metric, value, run, **more) for metric, value in values.items()]


def test_ratios_are_taken_within_one_run():
    lines = [*contender("reference", 50, flops=600), *contender("trl", 60), *contender("ours", 10, flops=100)]
    lines += contender("ours", 2, run="2", flops=100)  # later, alone: no comparison
    lines += contender("reference", 8, run="0", flops=600) + contender("ours", 1, run="0", flops=100)
    place = summarize(lines)["step_speedup"]["m"]["s"]["8"]
    assert (place["over_reference"], place["over_trl"], place["predicted_by_flops"]) == (5, 6, 6)
    assert place["memory_over_reference"] == 5 and place["seconds"] == 10


def test_the_newest_of_equal_runs_counts():
    lines = []
    for run, seconds in (("1", 50), ("3", 30), ("2", 40)):
        lines += contender("reference", seconds, run, flops=600) + contender("ours", 10, run, flops=100)
    assert newest(lines, "step")["m", "s", CASE]["reference"]["seconds"] == 30


def test_a_case_without_ours_and_other_suites_make_no_row():
    lines = [*contender("reference", 50, flops=600), line("ours", "gradient_cosine", 1, suite="agreement")]
    assert summarize(lines) == {"step_speedup": {}, "step_cases": [], "head_cases": [], "lora_steps": []}
    assert "reference" not in sweep_table(lines) and step_table(lines) == ""


def test_tables():
    lines = [*contender("reference", 50, flops=600), *contender("ours", 10, flops=100)]
    lines += contender("ours and rollouts", 25)
    table = step_table(lines)
    assert "| reference-style | 50.0 | 0.16 | 1,800 | 50.0 GiB | 5.0 × |" in table and "1 prompt a step" in table
    assert "| vicuna | 8 | 1000 | 100 | 10.0 | 5.0 × | 6.0 × | - |" in sweep_table(lines)
    rollouts = [line("ours", "tokens_per_s", 52.3, suite="rollout"), line("ours", "peak_bytes", 2**30, suite="rollout")]
    assert "| 52 | 1.0 GiB |" in rollout_table(rollouts)
