"""What the engine says to a server, and what it says of one that is wrong: on a fake server, without vLLM."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from real_fast.errors import RolloutServerError
from real_fast.rollout import adapter_folder, vllm_transfer
from real_fast.rollout.vllm_server import VllmServerEngine
from real_fast.rollout.vllm_transfer import buckets, transfer_of
from real_fast.score.scale import ScoreScale
from real_fast.types import SamplingParams
from tests.helpers import free_port
from tests.rollout.fake_server import FakeServer, failed

PROMPTS = [[8, 9], [5, 6, 7]]  # in another order than the engine sends them in
SAMPLING = SamplingParams(n=2, max_tokens=32)


def test_rollouts_are_what_the_server_sampled(engine: VllmServerEngine, fake: FakeServer, scale: ScoreScale) -> None:
    groups = engine.generate(PROMPTS, SAMPLING)
    assert [len(group) for group in groups] == [2, 2] and engine.sleep() is False
    for rollout, text in [(r, fake.text[1:]) for r in groups[0]] + [(r, fake.text) for r in groups[1]]:
        kept = len(rollout.sampled_ids)
        assert rollout.finish == "phrase" and list(rollout.sampled_ids) == text[:kept] and rollout.written_score == 4
        assert list(rollout.sampled_logprobs) == [-0.5 - place for place in range(kept)]
        written = scale.score_ids[scale.values.index(4)]
        at = text.index(written)
        assert rollout.score_logprobs == [-0.5 - at if i == written else -2.0 - i for i in scale.score_ids]


def test_a_forced_score_is_read_in_full(engine: VllmServerEngine, fake: FakeServer, scale: ScoreScale) -> None:
    fake.text = fake.text[:4]
    for rollout in (rollout for group in engine.generate(PROMPTS, SAMPLING) for rollout in group):
        assert rollout.n_forced == len(scale.phrase_ids)
        assert rollout.score_logprobs == [-2.0 - i for i in scale.score_ids]


def test_no_server_is_said_with_what_to_start(engine_of: Callable[..., VllmServerEngine]) -> None:
    port = free_port()
    with pytest.raises(RolloutServerError, match=rf"no rollout server answers .*127\.0\.0\.1:{port} .*real-fast serve"):
        engine_of(f"http://127.0.0.1:{port}")


def test_another_kind_of_server_is_said(engine_of: Callable[..., VllmServerEngine], fake: FakeServer) -> None:
    for answer in (lambda _: (404, {}), lambda _: failed("has no attribute real_fast_state"), lambda _: (200, {})):
        fake.answers["collective_rpc"] = answer
        with pytest.raises(RolloutServerError, match=r"not started for rollouts.*real-fast serve"):
            engine_of()
    fake.answers["collective_rpc"] = lambda _: (200, b"<html>")
    with pytest.raises(RolloutServerError, match="is no vLLM server"):
        engine_of()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("shape", {"vocab_size": 7}, "has another model .*vocab_size 7 there and .* here"),
        ("dtype", "float32", r"computes in float32, and this run needs bfloat16: set train\.precision"),
        ("head_dtype", "bfloat16", "has its head in bfloat16, and this run needs float32"),
        ("logprobs_mode", "raw_logprobs", r"reports raw_logprobs, .* rollout\.top_p"),
        ("max_model_len", 95, "takes sequences of 95 tokens, and this run's have up to 96"),
        ("transfer", "ipc", "takes weights by ipc"),
        ("transfer", "nccl", "by NCCL, and the trainer is on a cpu: .* --transfer shared-memory"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(
    engine_of: Callable[..., VllmServerEngine], fake: FakeServer, key: str, value: Any, message: str
) -> None:
    fake.state[key] = fake.state[key] | value if isinstance(value, dict) else value
    with pytest.raises(RolloutServerError, match=message):
        engine_of()


def test_a_server_elsewhere_cannot_take_shared_memory(
    engine_of: Callable[..., VllmServerEngine], fake: FakeServer
) -> None:
    fake.answers["init_weight_transfer_engine"] = lambda _: failed("is not on the server's machine")
    with pytest.raises(RolloutServerError, match=r"cannot read the trainer's .* --transfer nccl"):
        engine_of()


def test_a_sync_hands_over_every_weight_under_a_new_label(
    engine: VllmServerEngine, fake: FakeServer, tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(adapter_folder, "SHARED", tmp_path)
    monkeypatch.setattr(vllm_transfer, "_BUCKET", 4096)
    for again in (2, 3):
        fake.weights.clear(), fake.calls.clear(), fake.files.clear()
        engine.sync([*tensors.items(), ("lm_head.weight", torch.zeros(1))])  # tied: it may come along
        assert fake.weights.keys() == tensors.keys()
        assert all(torch.equal(fake.weights[name], tensor.bfloat16()) for name, tensor in tensors.items())
        assert max(fake.files) <= max(tensor.numel() * 2 for tensor in tensors.values()) and len(fake.files) > 3
        label = f"{engine._run_name}-{again}"
        first, last = fake.calls[1], fake.calls[-1]
        assert first == ("update_weight_version", {"new_version": f"{label} unfinished"})
        assert last == ("update_weight_version", {"new_version": label}) and fake.label == label
        assert [c for c in fake.calls if isinstance(c, str) and c != "update_weights"] == [
            *("weight_info", "start_weight_update", "finish_weight_update", "collective_rpc", "reset_prefix_cache")
        ]
    assert not list(tmp_path.iterdir())


def test_at_most_one_large_tensor_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_transfer, "_BUCKET", 400)
    alive: list[weakref.ref[torch.Tensor]] = []

    def held() -> int:
        gc.collect()
        return sum(one.nbytes for ref in alive if (one := ref()) is not None)

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        for i, numbers in enumerate([10, 50, 60, 10, 200, 300, 300, 20, 100, 5]):
            assert held() <= 400  # the small ones that wait, and no large one
            one = torch.zeros(numbers)
            alive.append(weakref.ref(one))
            yield str(i), one
            del one

    names: list[str] = []
    for part in buckets(made()):
        assert held() <= 400 + 1200
        assert sum(t.nbytes for t in part.values()) <= 400 or len(part) == 1
        names += part
        part.clear()
    assert names == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("label", "why"),
    [
        ("default", "it was started anew"),
        ("{own}-1 unfinished", "a sync was missed or did not come to its end"),
        ("{own}-0", "a sync was missed"),
        ("real-fast-0-1", "another run has put its weights into it"),
    ],
)
def test_other_weights_than_the_last_syncs_are_found_out(
    engine: VllmServerEngine, fake: FakeServer, label: str, why: str
) -> None:
    fake.label = label.format(own=engine._run_name)
    with pytest.raises(RolloutServerError, match=f"has the weights .*{why}.*--resume"):
        engine.generate(PROMPTS, SAMPLING)
    assert "inference_v1_generate" not in fake.calls

    def restarted(body: Any) -> tuple[int, Any]:
        fake.label = "default"
        return fake.inference_v1_generate(body)

    fake.label, fake.answers["inference_v1_generate"] = engine._label, restarted
    with pytest.raises(RolloutServerError, match="started anew"):  # between the samples
        engine.generate(PROMPTS, SAMPLING)


def test_a_restarted_server_is_synced_and_another_runs_is_not(
    engine: VllmServerEngine, fake: FakeServer, tensors: dict[str, torch.Tensor]
) -> None:
    fake.label, fake.weights = "default", {}
    engine.sync(tensors.items())
    assert fake.calls.count("init_weight_transfer_engine") == 2 and len(fake.weights) == len(tensors)
    assert engine.generate(PROMPTS, SAMPLING)
    fake.label, fake.weights = "real-fast-0-1", {}
    with pytest.raises(RolloutServerError, match="another run"):
        engine.sync(tensors.items())
    assert not fake.weights


def test_before_a_sync_nothing_is_sampled(engine_of: Callable[..., VllmServerEngine]) -> None:
    with pytest.raises(RuntimeError, match="sync it first"):
        engine_of().generate(PROMPTS, SAMPLING)


def test_a_sync_that_breaks_off_leaves_no_update_open(
    engine: VllmServerEngine, fake: FakeServer, tensors: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"'model\.x'"):
        engine.sync([*tensors.items(), ("model.x", torch.zeros(1))])
    assert not fake.active and fake.label.endswith("unfinished")
    with pytest.raises(ValueError, match=r"1 of the model's weights: model\.norm\.weight"):
        engine.sync((name, tensor) for name, tensor in tensors.items() if name != "model.norm.weight")
    with pytest.raises(RolloutServerError, match="did not come to its end"):
        engine.generate(PROMPTS, SAMPLING)
    fake.active = True  # as a trainer leaves it that dies in the middle
    engine.sync(tensors.items())
    assert engine.generate(PROMPTS, SAMPLING)
    fake.answers["reset_prefix_cache"] = lambda _: (200, {"success": False})
    with pytest.raises(RolloutServerError, match="did not drop its prefix cache"):
        engine.sync(tensors.items())
    fake.answers["update_weights"] = lambda _: failed("shapes differ")
    with pytest.raises(RolloutServerError, match=r"answered /update_weights with 500: .*shapes differ"):
        engine.sync(tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda choices: choices[:1], "gave 1 samples of a prompt where 2 were asked for"),
        (lambda choices: [c | {"token_ids": [], "logprobs": {"content": []}} for c in choices], "or an empty one"),
        (lambda choices: [c | {"logprobs": None} for c in choices], "in a way that is not known"),
        (lambda choices: [c | {"token_ids": c["token_ids"][:-1]} for c in choices], "in a way that is not known"),
        (lambda choices: [c | {"token_ids": c["token_ids"][::-1]} for c in choices], "in a way that is not known"),
    ],
)
def test_samples_that_are_not_all_there(
    engine: VllmServerEngine, fake: FakeServer, change: Callable[[Any], Any], message: str
) -> None:
    fake.answers["inference_v1_generate"] = lambda body: (
        200,
        {"choices": change(fake.inference_v1_generate(body)[1]["choices"])},
    )
    with pytest.raises(RolloutServerError, match=message):
        engine.generate(PROMPTS, SAMPLING)


def test_more_rollouts_than_the_server_decodes(engine: VllmServerEngine, fake: FakeServer) -> None:
    with pytest.raises(ValueError, match=r"9 rollouts of a prompt, .* decodes 8 .*rollout\.max_num_seqs"):
        engine.generate(PROMPTS, SamplingParams(n=9, max_tokens=4))


def test_a_dropped_connection_is_tried_again_and_a_dead_server_is_said(
    engine: VllmServerEngine, fake: FakeServer
) -> None:
    want = engine.generate(PROMPTS, SAMPLING)
    fake.drop = 2
    assert engine.generate(PROMPTS, SAMPLING) == want
    fake.drop = 100
    with pytest.raises(RolloutServerError, match="no rollout server answers"):
        engine.generate(PROMPTS, SAMPLING)


def test_a_server_that_hangs_is_said(
    engine: VllmServerEngine, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    monkeypatch.setattr(engine, "_timeout", 0.2)
    fake.answers["inference_v1_generate"] = lambda body: (free.wait(20), fake.inference_v1_generate(body))[1]
    with pytest.raises(RolloutServerError, match=r"did not answer /inference/v1/generate within 0\.2 seconds"):
        engine.generate(PROMPTS, SAMPLING)
    free.set()


def test_one_failure_ends_all_requests_at_once(engine: VllmServerEngine, fake: FakeServer) -> None:
    free = threading.Event()

    def answer(body: Any) -> tuple[int, Any]:
        if body["token_ids"] == PROMPTS[0]:
            time.sleep(0.1)
            return failed("out of memory")
        free.wait(20)
        return fake.inference_v1_generate(body)

    fake.answers["inference_v1_generate"] = answer
    start = time.monotonic()
    with pytest.raises(RolloutServerError, match="out of memory"):
        engine.generate(PROMPTS, SAMPLING)
    assert time.monotonic() - start < 10
    free.set()


def test_nccl_is_for_gpus() -> None:
    assert transfer_of("nccl", 2, torch.device("cuda"), "u").backend == "nccl"
