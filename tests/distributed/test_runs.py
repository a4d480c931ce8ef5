"""Whole runs on several ranks: the samples, metrics and weights of one process."""

from __future__ import annotations

import pytest

from real_fast.train import main
from real_fast.utils.jsonio import read_jsonl
from tests.distributed.ranks import run_ranks
from tests.helpers import SUPERVISED, flags, metric_lines

CLOSE = {"rel": 1e-3, "abs": 1e-4, "nan_ok": True}


def same(found, want, path=""):
    if isinstance(want, dict):
        assert found.keys() == want.keys(), path
        for key in want:
            same(found[key], want[key], f"{path}/{key}")
    elif isinstance(want, float | list):
        assert found == pytest.approx(want, **CLOSE), path
    else:
        assert found == want, path


def texts(output):
    return [(line["step"], line["id"], line["rollout"], line["text"]) for line in read_jsonl(output / "rollouts.jsonl")]


KINDS = {
    "real": [],
    "kl": ["--objective.kl_coef", "0.1", "--objective.num_iterations", "2", "--train.shared_prompt", "false"],
    "lora": ["--train.lora.r", "4", "--objective.kl_coef", "0.1"],
    "tract": ["--method", "tract", *SUPERVISED, "--debug"],
    "binary_rl": ["--method", "binary_rl", "--train.activation_checkpointing", "true"],
}


@pytest.mark.parametrize(("kind", "ranks"), [("real", 3), ("kl", 2), ("lora", 2), ("tract", 2), ("binary_rl", 2)])
def test_a_run_on_ranks_is_that_of_one_process(tiny_judge, tmp_path, kind, ranks):
    more = ["--rollout.log_every", "1", "--rollout.log_prompts", "9", "--objective.normalize_std", "false"]
    more += KINDS[kind]
    assert main(flags(tiny_judge, tmp_path / "one", *more)) == 0
    argv = flags(tiny_judge, tmp_path / "many", *more)
    assert run_ranks(ranks, main, argv, group=False, timeout=120) == [0] * ranks
    assert texts(tmp_path / "many") == texts(tmp_path / "one")
    for found, want in zip(metric_lines(tmp_path / "many"), metric_lines(tmp_path / "one"), strict=True):
        same(found, want)
