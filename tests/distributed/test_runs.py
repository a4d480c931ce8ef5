"""Whole runs on several ranks: the samples, metrics and weights of one process."""

from __future__ import annotations

import pytest

from real_fast.distributed.slices import TensorFiles
from real_fast.train import main
from tests.distributed.ranks import run_ranks
from tests.helpers import SUPERVISED, about_the_same, flags, metric_lines, rollout_texts

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
    assert rollout_texts(tmp_path / "many") == rollout_texts(tmp_path / "one")
    for found, want in zip(metric_lines(tmp_path / "many"), metric_lines(tmp_path / "one"), strict=True):
        about_the_same(found, want)


def test_a_run_goes_on_with_another_number_of_ranks(tiny_judge, tmp_path):
    """2 ranks, then 1 process, then 3 ranks: the weights are those of one process all the way."""
    more = ["--objective.normalize_std", "false", "--objective.kl_coef", "0.05"]
    assert main(flags(tiny_judge, tmp_path / "one", *more)) == 0
    argv = flags(tiny_judge, tmp_path / "many", *more)
    assert run_ranks(2, main, [*argv, "--train.steps", "2"], group=False, timeout=120) == [0, 0]
    assert main([*argv, "--train.steps", "4", "--resume"]) == 0
    assert run_ranks(3, main, [*argv, "--resume"], group=False, timeout=120) == [0] * 3
    one, many = (TensorFiles((tmp_path / name / "final").glob("*.safetensors")) for name in ("one", "many"))
    assert one.names == many.names
    assert max(float((one.whole(name) - many.whole(name)).abs().max()) for name in one.names) <= 1e-6
