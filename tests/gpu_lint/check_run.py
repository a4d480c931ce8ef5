"""A run from the command line on a pretended CUDA device; see test_gpu_lint.py, which runs this file.

What an update is made of has the other checks. This one goes through what stands around it: loading, the warm-up, the
reference, sampling, the engine's check, evaluation, checkpoints, a resume, and the model that is written.
"""

from __future__ import annotations

from unittest.mock import patch

import torch
from safetensors.torch import load_file

from real_fast.train import main
from tests.golden.trajectories import make_model, run_flags
from tests.gpu_lint.launches import checked_launches
from tests.gpu_lint.pretend import cuda_device
from tests.helpers import metric_lines

SHORT = ["--rollout.group_size", "2", "--rollout.prompts_per_step", "2", "--rollout.max_tokens", "4"]
SHORT += ["--warmup.steps", "1", "--eval.on_start", "false", "--save.every", "1", "--objective.kl_coef", "0.1"]
# Beyond what rounding explains, as this model's weights are large.
ON_A_GPU = [*SHORT, "--train.device", "cuda", "--train.precision", "bf16", "--rollout.check_logprob", "0.5"]


def test_a_run_and_its_resume(tmp_path):
    model, output = make_model(tmp_path / "model"), tmp_path / "run"
    # Whether it fits is counted without a device, layer by layer, which takes longer than the run.
    without_a_plan = patch("real_fast.training.setup.gpu_memory", lambda _: None)
    with cuda_device(), checked_launches() as launched, without_a_plan:
        assert main(run_flags(model, output, *ON_A_GPU, "--train.steps", "1")) == 0
        assert main(run_flags(model, output, *ON_A_GPU, "--train.steps", "2", "--resume")) == 0
    lines = [line for line in metric_lines(output) if line["phase"] == "real"]
    assert [line["step"] for line in lines] == [1, 2] and launched["logits_kernel"]
    weights = load_file(output / "final" / "model.safetensors")
    assert all(x.isfinite().all() for x in weights.values())
    start = load_file(model / "model.safetensors")
    assert any(not torch.equal(weights[name], start[name]) for name in weights)
