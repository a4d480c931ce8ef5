from __future__ import annotations

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from real_fast.config import OptimConfig
from real_fast.errors import CheckpointError
from real_fast.model.write import contents_of
from real_fast.runs import checkpoint, writer
from real_fast.runs.checkpoint import TrainState
from real_fast.runs.writer import FolderWriter
from real_fast.training.optim import build_optimizer, build_scheduler, clip_and_step


class NoTokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


def make(tiny_llama, tied=True, **optim):
    config = OptimConfig(lr=1e-2, schedule="cosine", lr_warmup_steps=2, **optim)
    model = tiny_llama(tied=tied, hidden_size=64 if optim else 32)  # matrices from 4096 numbers on are kept in 8 bits
    optimizer = build_optimizer(model, config)
    return model, optimizer, build_scheduler(optimizer, config, 20)


def train(model, optimizer, scheduler, steps, start=0):
    for step in range(start, start + steps):
        ids = torch.randint(384, (2, 9), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        clip_and_step(model, optimizer, 1.0)
        scheduler.step()


def save(folder, parts, step, keep=2, writer=None):
    model, optimizer, scheduler = parts
    contents = contents_of(model, NoTokenizer(), {"a.json": "1"}, model.dtype)
    writer = writer or FolderWriter(background="never")
    return checkpoint.save(folder, writer, contents, model, optimizer, scheduler, TrainState(step=step), keep)


@pytest.mark.parametrize("optim", [{}, {"name": "adamw8bit", "offload": "moments"}])
@pytest.mark.parametrize("tied", [True, False])
def test_resumed_weights_are_bitwise_equal(tiny_llama, tmp_path, tied, optim):
    parts = make(tiny_llama, tied, **optim)
    train(*parts, 5)
    path = save(tmp_path, parts, 5)
    torch.rand(3)  # the saved random state must not depend on what comes after
    random = torch.rand(4)
    train(*parts, 4, start=5)

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = OptimConfig(lr=1e-2, schedule="cosine", lr_warmup_steps=2, **optim)
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, 20)
    state = checkpoint.load(path, model, optimizer, scheduler)
    torch.rand(3)
    assert state.step == 5 and torch.equal(torch.rand(4), random)
    train(model, optimizer, scheduler, 4, start=5)
    for (name, a), b in zip(model.named_parameters(), parts[0].parameters(), strict=True):
        assert torch.equal(a, b), name
    assert scheduler.get_last_lr() == parts[2].get_last_lr()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_only_safetensors_and_json_are_written(tiny_llama, tmp_path, name):
    parts = make(tiny_llama, name=name)
    train(*parts, 1)
    path = save(tmp_path, parts, 1)
    codes = [key for key in load_file(path / "optimizer.safetensors") if key.endswith(":exp_avg:codes")]
    assert len(codes) == (5 * 2 + 1 if name == "adamw8bit" else 0)  # not the keys' and values' matrices, and no norm
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_newest_complete_is_found_and_half_written_ignored(tiny_llama, tmp_path):
    parts = make(tiny_llama)
    train(*parts, 1)
    for step in (1, 2, 10):
        save(tmp_path, parts, step)
    (tmp_path / "step-000011.tmp").mkdir()
    (tmp_path / "step-000012").mkdir()  # killed before its state was written by some other tool
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000002", "step-000010"]  # keep=2 removed step 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_keeps_the_old_checkpoint(tiny_llama, tmp_path, monkeypatch, error):
    parts = make(tiny_llama)
    train(*parts, 1)
    save(tmp_path, parts, 1)

    def full(*_, **__):
        raise error

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*--resume"):
        save(tmp_path, parts, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_a_folder_that_cannot_be_written_is_a_clear_error(tiny_llama, tmp_path):
    parts = make(tiny_llama)
    (tmp_path / "out").write_text("a file where the folder should be", encoding="utf-8")  # root may write anywhere else
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "out", parts, 1)
    with pytest.raises(CheckpointError, match="could not be written"):
        contents = contents_of(parts[0], NoTokenizer(), {}, torch.float32)
        checkpoint.save_model(FolderWriter(), tmp_path / "out" / "final", contents)


def test_a_checkpoint_of_another_model_is_refused(tiny_llama, tmp_path):
    parts = make(tiny_llama)
    train(*parts, 1)
    path = save(tmp_path, parts, 1)
    other = tiny_llama(layers=3)
    optimizer = build_optimizer(other, OptimConfig())
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load(path, other, optimizer, build_scheduler(optimizer, OptimConfig(), 5))


@pytest.mark.parametrize("tied", [True, False])
def test_final_folder_is_a_normal_model_in_bf16(tiny_llama, tmp_path, tied):
    model = tiny_llama(tied=tied)
    texts = {"real_fast.json": "{}"}
    writer = FolderWriter()
    checkpoint.save_model(writer, tmp_path / "final", contents_of(model, NoTokenizer(), texts, torch.bfloat16))
    writer.wait()
    stored = load_file(tmp_path / "final" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16} and ("lm_head.weight" in stored) == (not tied)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert loaded.dtype == torch.bfloat16
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(loaded.float()(ids).logits, model(ids).logits, rtol=0.05, atol=0.02)
    assert model.dtype == torch.float32 and "float32" in str(model.config.dtype)
    assert json.loads((tmp_path / "final" / "real_fast.json").read_text()) == {}


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_llama):
    model, optimizer, scheduler = make(tiny_llama)
    train(model, optimizer, scheduler, 2)
    before = [p.detach().clone() for p in model.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    ids = torch.arange(5, 15)[None]
    (model(input_ids=ids, labels=ids).loss * float("inf")).backward()
    norm, stepped = clip_and_step(model, optimizer, 1.0)
    assert (not stepped and norm != norm) or norm == float("inf")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, optimizer.state[p]["exp_avg"]) for a, p in zip(moments, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_weight_decay_is_for_matrices_alone(tiny_llama):
    optimizer = build_optimizer(tiny_llama(), OptimConfig(weight_decay=0.1))
    assert {(p.dim() > 1, g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]} == {
        (True, 0.1),
        (False, 0.0),
    }


def test_a_changed_learning_rate_is_taken_on_resume(tiny_llama, tmp_path):
    parts = make(tiny_llama)
    train(*parts, 3)
    path = save(tmp_path, parts, 3)
    config = OptimConfig(lr=5e-3, schedule="cosine", lr_warmup_steps=2)
    optimizer = build_optimizer(parts[0], config)
    scheduler = build_scheduler(optimizer, config, 20)
    checkpoint.load(path, parts[0], optimizer, scheduler)
    assert scheduler.get_last_lr()[0] == pytest.approx(parts[2].get_last_lr()[0] / 2)
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
