"""TRL's trainers as contenders of the update: on a CPU, a tiny model, plain products for FlashAttention."""

from __future__ import annotations

import importlib
import importlib.util
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from benchmarks import trl_async_step, trl_step
from benchmarks.gpu.cases import SMALL, five_scores, word_tokenizer
from benchmarks.phases import Phases
from benchmarks.workload import random_workload

CASE = SMALL[0]
NEEDS_TRL = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


@pytest.fixture
def workload():
    return random_workload(CASE.vocabulary, five_scores(), 2, 3, 20, 10)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(trl_step.importlib.util, "find_spec", lambda _: None)
    assert trl_step.absent().startswith("not installed: trl")
    assert trl_async_step.absent(torch.device("cpu")).startswith("not installed: trl")


@NEEDS_TRL
def test_without_a_card_there_is_no_flash_attention_3():
    assert "needs a CUDA device" in trl_async_step.absent(torch.device("cpu"))


@NEEDS_TRL
def test_without_network_or_package_there_is_none_either(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    packing = importlib.import_module("trl.experimental.async_grpo.packing")

    def no_network():
        raise OSError("no network\nmore")

    monkeypatch.setattr(packing, "_flash_attn", no_network)
    reason = trl_async_step.absent(torch.device("cuda"))
    assert reason.startswith("not installed: ") and reason.endswith("OSError: no network")


def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, softmax_scale, causal, window_size):
    """FlashAttention 3's function as TRL calls it; queries and keys are aligned at their ends."""
    assert causal and window_size == (-1, -1)
    assert longest_q == int(starts_q.diff().max()) and longest_k == int(starts_k.diff().max())
    parts = []
    for (a, b), (c, d) in zip(pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True):
        keys, values = (x[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1).float() for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), keys) * softmax_scale
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(2), values))
    return torch.cat(parts).to(q.dtype)


@NEEDS_TRL
@pytest.mark.timeout(300)
def test_the_async_trainer_takes_given_rollouts_step_by_step(workload, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    packing = importlib.import_module("trl.experimental.async_grpo.packing")
    monkeypatch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=varlen))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "none")  # asked for a rate that is only logged
    rows = []
    pack = packing.TreeRow.pack
    monkeypatch.setattr(packing.TreeRow, "pack", lambda self: rows.append(pack(self)) or rows[-1])
    model = CASE.model("cpu")
    step = trl_async_step.AsyncTrlStep(model, word_tokenizer(CASE.vocabulary), workload, 10_000, 2)
    before = {name: p.detach().clone() for name, p in step.trainer.model.named_parameters()}
    seconds = []
    for _ in range(2):
        phases = Phases()
        step.step(phases)
        seconds.append(phases.seconds["step"])
    after = dict(step.trainer.model.named_parameters())
    step.close()
    assert len(seconds) == 2 and all(s > 0 for s in seconds) and not step.thread.is_alive()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # One pass an update, with both groups, each prompt once.
    assert len(rows[0]["token_index"]) == sum(len(r.context_ids) for r in workload.rollouts)
    assert (
        len(rows[0]["input_ids"])
        == step.body_tokens
        < sum(len(g.prompt_ids) + len(r.context_ids) for g in workload.groups for r in g.rollouts)
    )


@NEEDS_TRL
def test_groups_of_a_pass_are_within_the_budget():
    fits = trl_async_step._fits
    assert fits(1, 3200, 100, 4) and fits(2, 3200, 6600, 4) and not fits(2, 3400, 6600, 4) and not fits(3, 1, 6600, 4)


@NEEDS_TRL
def test_a_trainer_that_asks_for_more_ends(workload):
    worker = trl_async_step._Rollouts(trl_async_step.samples(workload, 1))
    assert worker.rollout_buffer.qsize() == 2 * len(workload.rollouts)
    with pytest.raises(RuntimeError, match="more rollouts than there are"):
        worker.check_health(1.0)
