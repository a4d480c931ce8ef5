"""A real vLLM server on the CPU, started as its users start it, with a random model of two layers."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from real_fast.config import Config, LoraConfig, RolloutConfig, TrainConfig
from real_fast.config.cli import dump
from real_fast.errors import EngineMismatchError, RolloutServerError
from real_fast.model.lora import add_adapters, merge
from real_fast.rollout import vllm_client
from real_fast.rollout.agreement import EngineGap, limits
from real_fast.rollout.engine import publish
from real_fast.rollout.make import hand_over, load_engine, make_engine
from real_fast.rollout.vllm_client import ServerClient
from real_fast.rollout.vllm_server import VllmServerEngine
from real_fast.score.scale import ScoreScale
from real_fast.train import main
from real_fast.types import Rollout, SamplingParams
from tests.helpers import flags, free_port, metric_lines
from tests.rollout.plain_agreement import plain_compare, trainer_logprobs_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),  # the server imports vLLM three times, once for each of its processes
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="vLLM's server is not installed"),
]

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[3, 14, 15, 92], [65, 35, 89, 79, 32, 38] * 30]  # the second is a block of vLLM's prefix cache, and more
SAMPLING = SamplingParams(n=4, max_tokens=16, seed=3)
# As in test_vllm_sync.py: parts of parameter names, and noise as a share of their own spread.
GROUPS = {"embed_tokens": 0.1, "self_attn": 0.3, "mlp": 0.3, "norm": 0.3}


@dataclass
class Served:
    config: Config
    folder: Path
    trainer: Any
    tokenizer: Any
    scale: ScoreScale
    engine: VllmServerEngine
    server: subprocess.Popen[bytes]

    def gap(self) -> EngineGap:
        groups = self.engine.generate(PROMPTS, SAMPLING)
        each = [prompt for prompt, group in zip(PROMPTS, groups, strict=True) for _ in group]
        rollouts = [rollout for group in groups for rollout in group]
        return plain_compare(rollouts, *trainer_logprobs_of(self.trainer, each, rollouts, self.scale, 1.0), self.scale)

    def check(self) -> None:
        self.gap().raise_if_above(self.config.rollout, 0, self.engine.dtype)


@pytest.fixture(scope="module")
def served(
    tiny_llama: Callable[..., Any], golden_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("served")
    tokenizer = AutoTokenizer.from_pretrained(golden_model)
    trainer = tiny_llama(True, len(tokenizer), 128, head_dim=32, initializer_range=0.08)
    trainer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    url = f"http://127.0.0.1:{free_port()}"
    rollout = RolloutConfig(engine="vllm-server", url=url, max_tokens=16, max_num_seqs=8)
    config = Config(model=str(folder), output="o", rollout=rollout, train=TrainConfig(precision="fp32", device="cpu"))
    config.prompt.max_tokens, config.scale.phrase = 2048, "Score: "
    dump(config, folder / "run.yaml")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "real_fast", "serve", "--config", str(folder / "run.yaml")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(url, server, folder / "log")
        scale = ScoreScale.from_config(tokenizer, config.scale, config.prompt)
        engine = make_engine(config, trainer, tokenizer, scale, folder)
        assert isinstance(engine, VllmServerEngine)
        hand_over(engine, trainer)
        yield Served(config, folder, trainer, tokenizer, scale, engine, server)
        engine.close()
        if server.poll() is None:  # no test has killed it
            server.terminate()
            assert server.wait(timeout=60) == 0, (folder / "log").read_text(errors="replace")[-2000:]
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    parts = url.removeprefix("http://").split(":")
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with socket.create_connection((parts[0], int(parts[1])), timeout=1):
                ServerClient(url).get("/weight_info")
                return
        except (OSError, RolloutServerError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start: {log.read_text(errors='replace')[-3000:]}")


def ids(groups: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[list(rollout.sampled_ids) for rollout in group] for group in groups]


def test_samples_are_those_of_vllm_in_process(served: Served) -> None:
    config = replace(served.config, rollout=replace(served.config.rollout, engine="vllm", url=""))
    inside = make_engine(config, served.trainer, served.tokenizer, served.scale, served.folder)
    hand_over(inside, served.trainer)
    try:
        for sampling in (SAMPLING, replace(SAMPLING, temperature=0.7), replace(SAMPLING, temperature=0.0)):
            want, found = inside.generate(PROMPTS, sampling), served.engine.generate(PROMPTS, sampling)
            assert ids(found) == ids(want)
            pairs = [pair for w, f in zip(want, found, strict=True) for pair in zip(w, f, strict=True)]
            for w, f in pairs:
                torch.testing.assert_close(list(f.sampled_logprobs), list(w.sampled_logprobs), atol=1e-4, rtol=0)
                torch.testing.assert_close(f.score_logprobs, w.score_logprobs, atol=1e-4, rtol=0)
                assert (f.context_ids, f.finish, f.text) == (w.context_ids, w.finish, w.text)
    finally:
        inside.close()


@pytest.mark.parametrize("group", GROUPS)
def test_a_sync_reaches_each_group_of_weights(served: Served, group: str) -> None:
    chosen = {name: weight for name, weight in served.trainer.named_parameters() if group in name}
    saved = {name: weight.detach().clone() for name, weight in chosen.items()}
    served.check()
    noise = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for weight in chosen.values():
                spread = weight.std() if weight.ndim > 1 else weight.abs().mean()
                weight += GROUPS[group] * spread * torch.randn(weight.shape, generator=noise)
        stale = served.gap()
        with pytest.raises(EngineMismatchError, match=r"step 1: .*a sync was missed"):
            stale.raise_if_above(served.config.rollout, 1, served.engine.dtype)
        served.engine.sync(served.trainer.named_parameters())
        found = served.gap()
        assert found.scores == 8 and found.logprob_mean <= limits(RolloutConfig(), torch.float32)[0] <= 0.05
        assert stale.logprob_mean >= 2 * 0.05
    finally:
        with torch.no_grad():
            for name, weight in chosen.items():
                weight.copy_(saved[name])
        served.engine.sync(served.trainer.named_parameters())


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_adapters_go_over_merged(served: Served, tiny_llama: Callable[..., Any]) -> None:
    adapted = tiny_llama(True, len(served.tokenizer), 128, head_dim=32, initializer_range=0.08)
    add_adapters(adapted, LoraConfig(r=3), str(served.folder))
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=noise))
    try:
        publish(served.engine, adapted)
        with pytest.raises(EngineMismatchError):
            served.check()
        plain, served.trainer = served.trainer, merge(adapted)
        served.check()
        served.trainer = plain
    finally:
        served.engine.sync(served.trainer.named_parameters())
    served.check()


def test_what_the_server_shows_behind_a_restart_or_a_lost_sync_is_refused(served: Served) -> None:
    client, label = served.engine._client, served.engine._label
    for found, why in (
        ("default", "started anew"),
        (f"{label} unfinished", "a sync was missed or did not come to its end"),
        ("real-fast-ffffffff-1", "another run has put its weights into it"),
    ):
        client.post("/update_weight_version", {"new_version": found})
        with pytest.raises(RolloutServerError, match=why):
            served.engine.generate(PROMPTS, SAMPLING)
    client.post("/update_weight_version", {"new_version": "default"})
    served.engine.sync(served.trainer.named_parameters())
    served.check()


def test_a_sync_that_breaks_off_is_followed_by_one_that_works(served: Served) -> None:
    weights = dict(served.trainer.named_parameters())
    with pytest.raises(ValueError, match=r"'model\.layers\.99\.x'"):
        served.engine.sync([*list(weights.items())[:3], ("model.layers.99.x", torch.zeros(1))])
    with pytest.raises(RolloutServerError, match="did not come to its end"):
        served.engine.generate(PROMPTS, SAMPLING)
    with pytest.raises(ValueError, match=r"1 of the model's weights: model\.norm\.weight"):
        served.engine.sync((name, weight) for name, weight in weights.items() if name != "model.norm.weight")
    served.engine._client.post("/start_weight_update")  # as a trainer leaves it that dies in the middle
    served.engine.sync(weights.items())
    served.check()


def test_what_is_too_long_for_the_server_is_said_before_work(served: Served) -> None:
    config = replace(served.config, rollout=replace(served.config.rollout, max_tokens=64))
    with pytest.raises(RolloutServerError, match=r"takes sequences of .* start it with the run's prompt\.max_tokens"):
        make_engine(config, served.trainer, served.tokenizer, served.scale, served.folder)
    config = replace(served.config, train=TrainConfig(precision="bf16", device="cpu"))
    with pytest.raises(RolloutServerError, match="computes in float32, and this run needs bfloat16"):
        make_engine(config, served.trainer, served.tokenizer, served.scale, served.folder)


def test_a_judge_brings_its_own_weights(served: Served, tmp_path: Path) -> None:
    """Another run takes the server over, and the one before is told so."""
    with torch.no_grad():
        served.trainer.model.norm.weight.mul_(1.3)
    served.trainer.save_pretrained(tmp_path)
    served.tokenizer.save_pretrained(tmp_path)
    config = replace(served.config, model=str(tmp_path))
    judge = load_engine(config, served.tokenizer, served.scale)
    with pytest.raises(RolloutServerError, match="another run has put its weights into it"):
        served.engine.generate(PROMPTS, SAMPLING)
    served.engine = judge  # type: ignore[assignment]
    served.check()


def test_a_run_trains_with_it(served: Served, tmp_path: Path) -> None:
    rollout = ["--rollout.engine", "vllm-server", "--rollout.url", served.config.rollout.url]
    few = ["--train.steps", "2", "--warmup.steps", "1", "--data.max_eval", "4", "--rollout.check_every", "1"]
    phrase = ["--scale.phrase", "Score: ", "--train.device", "cpu"]
    assert main(flags(served.folder, tmp_path / "run", *rollout, *few, *phrase)) == 0
    steps = [line for line in metric_lines(tmp_path / "run") if line["phase"] == "real"]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["sampling/sampling_logp_difference/mean"] < 1e-3 for line in steps)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["eval"]["after"]["n"] == 4


def test_a_server_that_hangs_and_one_that_is_killed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last test here: it leaves no server."""
    monkeypatch.setattr(vllm_client, "_PAUSES", (0.1, 0.2))
    engine = make_engine(served.config, served.trainer, served.tokenizer, served.scale, served.folder)
    assert isinstance(engine, VllmServerEngine)
    hand_over(engine, served.trainer)
    want = engine.generate(PROMPTS, SAMPLING)
    engine._timeout, group = 2.0, os.getpgid(served.server.pid)
    os.killpg(group, signal.SIGSTOP)
    try:
        with pytest.raises(RolloutServerError, match=r"did not answer /inference/v1/generate within 2 seconds"):
            super(VllmServerEngine, engine).generate(PROMPTS, SAMPLING)
    finally:
        os.killpg(group, signal.SIGCONT)
    engine._timeout = 60.0
    assert ids(engine.generate(PROMPTS, SAMPLING)) == ids(want)  # what was left there comes out of no later call
    os.killpg(group, signal.SIGKILL)
    served.server.wait(timeout=30)
    with pytest.raises(RolloutServerError, match=r"no rollout server answers at rollout\.url .* with --resume"):
        engine.generate(PROMPTS, SAMPLING)
    engine.close()
