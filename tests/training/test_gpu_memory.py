"""A GPU that cannot hold the run: its memory is a number here, and the model lies on the CPU."""

from __future__ import annotations

import pytest

from real_fast.train import main
from real_fast.training import setup
from tests.helpers import flags

MIB = 2**20


@pytest.mark.parametrize("method", ["real", "sft"])
def test_a_run_that_does_not_fit_is_refused_before_its_model_is_loaded(
    tiny_judge, tmp_path, monkeypatch, capsys, method
):
    def loaded(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(setup, "gpu_memory", lambda _: (20 * MIB, 24 * MIB))
    monkeypatch.setattr(setup, "load_policy", loaded)
    assert main([*flags(tiny_judge, tmp_path / "run"), "--method", method]) == 2
    said = capsys.readouterr().err
    assert "does not fit the GPU, which has 0.0 GiB free: the update takes" in said and "Traceback" not in said
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_share_that_is_left_goes_to_the_engine(tiny_judge, tmp_path, monkeypatch):
    found = []

    def engine(config, *_):
        found.append(config.rollout.gpu_memory_utilization)
        raise SystemExit

    monkeypatch.setattr(setup, "gpu_memory", lambda _: (70 * 1024 * MIB, 80 * 1024 * MIB))
    monkeypatch.setattr(setup, "make_engine", engine)
    for share in ("auto", "0.3"):
        with pytest.raises(SystemExit):
            main(
                [
                    *flags(tiny_judge, tmp_path / share),
                    "--rollout.engine",
                    "vllm",
                    "--rollout.gpu_memory_utilization",
                    share,
                ]
            )
    assert 0 < found[0] < 1 and found[1] == 0.3
