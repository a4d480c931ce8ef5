"""Whole runs on several ranks: the samples, metrics and weights of one process."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch

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
    """2 ranks, then 1 process, then 3 ranks: the weights are those of one process all the way.

    Moments that were lost would be a change of the size of the rate, 1e-4.
    """
    more = ["--objective.normalize_std", "false", "--objective.kl_coef", "0.05", "--optim.lr", "1e-4"]
    assert main(flags(tiny_judge, tmp_path / "one", *more)) == 0
    argv = flags(tiny_judge, tmp_path / "many", *more)
    assert run_ranks(2, main, [*argv, "--train.steps", "2"], group=False, timeout=120) == [0, 0]
    assert main([*argv, "--train.steps", "4", "--resume"]) == 0
    assert run_ranks(3, main, [*argv, "--resume"], group=False, timeout=120) == [0] * 3
    one, many = (TensorFiles((tmp_path / name / "final").glob("*.safetensors")) for name in ("one", "many"))
    assert one.names == many.names
    assert max(float((one.whole(name) - many.whole(name)).abs().max()) for name in one.names) <= 1e-6


def test_a_run_that_resumes_on_as_many_ranks_is_the_same_to_the_last_bit(tiny_judge, tmp_path):
    more = ["--objective.kl_coef", "0.05", "--optim.lr_warmup_steps", "1"]
    assert run_ranks(2, main, flags(tiny_judge, tmp_path / "once", *more), group=False, timeout=120) == [0, 0]
    argv = flags(tiny_judge, tmp_path / "twice", *more)
    assert run_ranks(2, main, [*argv, "--train.steps", "3"], group=False, timeout=120) == [0, 0]
    assert run_ranks(2, main, [*argv, "--resume"], group=False, timeout=120) == [0, 0]
    once, twice = (TensorFiles((tmp_path / name / "final").glob("*.safetensors")) for name in ("once", "twice"))
    assert once.names == twice.names
    assert all(torch.equal(once.whole(name), twice.whole(name)) for name in once.names)


def said(argv):
    with contextlib.redirect_stderr(io.StringIO()) as text:
        status = main(argv)
    return status, text.getvalue()


def test_debug_has_a_row_for_every_rank_and_a_mistake_is_said_once(tiny_judge, tmp_path):
    argv = flags(tiny_judge, tmp_path / "small", "--debug")
    assert run_ranks(3, main, argv, group=False, timeout=120) == [0, 0, 0]
    for mistake, message in (
        (["--rollout.prompts_per_step", "2"], "error: rollout.prompts_per_step is 2, and torchrun started 3 ranks"),
        (["--rollout.group_size", "0"], "error: rollout.group_size is 0"),
    ):
        found = run_ranks(3, said, flags(tiny_judge, tmp_path / "wrong", *mistake), group=False, timeout=60)
        assert [status for status, _ in found] == [2, 2, 2]
        assert "".join(text for _, text in found).count(message) == 1
