from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from real_fast.config import OptimConfig
from real_fast.errors import CheckpointError
from real_fast.model.write import contents_of
from real_fast.runs import checkpoint, writer
from real_fast.runs import parts as parts_module
from real_fast.runs.checkpoint import TrainState
from real_fast.runs.parts import Contents, Part, Shares
from real_fast.runs.parts import files_of as files_of_part
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


def save(folder, parts, step, keep=2, writer=None, idle=0):
    model, optimizer, scheduler = parts
    contents = contents_of(model, NoTokenizer(), {"a.json": "1"}, model.dtype)
    writer = writer or FolderWriter(background="never")
    return checkpoint.save(
        folder, writer, contents, model, optimizer, scheduler, TrainState(step=step, idle_updates=idle), keep
    )


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


def test_updates_that_train_nothing_push_out_no_good_checkpoint(tiny_llama, tmp_path):
    """Step 4 breaks the weights, and all behind it are skipped until the run gives up."""
    parts = make(tiny_llama)
    train(*parts, 1)

    def kept():
        return [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path)]

    for step in (2, 3, 4):
        save(tmp_path, parts, step)
    for idle in range(1, 6):
        save(tmp_path, parts, 4 + idle, idle=idle)
        assert kept() == [3, 4, 4 + idle]
    save(tmp_path, parts, 10)  # it goes on after all
    assert kept() == [9, 10]


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_nothing_of_it(tiny_llama, tmp_path, monkeypatch):
    parts = make(tiny_llama)
    train(*parts, 1)
    save(tmp_path, parts, 1)
    rmtree = shutil.rmtree

    def killed(folder, ignore_errors=False):
        if folder.exists():
            (folder / "trainer_state.json").unlink()
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(CheckpointError, match="killed"):
            save(tmp_path, parts, 2, keep=1)
    assert shutil.rmtree is rmtree and len(list(tmp_path.iterdir())) == 2
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000002"
    checkpoint.tidy(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


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


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(("tied", "limit"), [(True, None), (False, None), (False, 30_000)])
def test_a_model_is_written_as_save_pretrained_does(tiny_llama, tmp_path, monkeypatch, tied, limit):
    model = tiny_llama(tied=tied, vocab_size=385)
    model.register_buffer("extra", torch.ones(3))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit or "5GB")
    if limit:
        monkeypatch.setattr(parts_module, "FILE_BYTES", limit)
    checkpoint.save_model(
        FolderWriter(background="never"), tmp_path / "ours", contents_of(model, NoTokenizer(), {}, torch.float32)
    )
    theirs, ours = files_of(tmp_path / "theirs"), files_of(tmp_path / "ours")
    if limit:  # how many files there are is no part of the format
        assert {name for name in ours.keys() ^ theirs.keys() if "-of-" not in name} == {
            "tokenizer.json",
            "checksums.json",
        }
        index = json.loads(ours["model.safetensors.index.json"])
        assert index["weight_map"].keys() == json.loads(theirs["model.safetensors.index.json"])["weight_map"].keys()
    else:
        assert ours.keys() == theirs.keys() | {"tokenizer.json", "checksums.json"}
        assert {name: ours[name] for name in theirs} == theirs
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_fused_experts_are_written_one_by_one(tmp_path):
    """As their hub's files have them, which other libraries read."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
    )
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs")
    writer = FolderWriter(background="never")
    checkpoint.save_model(writer, tmp_path / "ours", contents_of(model, NoTokenizer(), {}, torch.float32))
    theirs, ours = (load_file(tmp_path / whose / "model.safetensors") for whose in ("theirs", "ours"))
    assert ours.keys() == theirs.keys() and "model.layers.1.mlp.experts.3.up_proj.weight" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_checkpoint_of_an_earlier_version_goes_on(tiny_llama, tmp_path, name):
    """Written by hand as it was: save_pretrained(), one file of moments without metadata, one random state."""
    parts = make(tiny_llama, name=name)
    train(*parts, 3)
    model, optimizer, scheduler = parts
    path = tmp_path / "step-000003"
    model.save_pretrained(path)
    tensors = {"rng:cpu": torch.get_rng_state()}
    for parameter_name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            inner = {part: getattr(value, part) for part in ("codes", "scale", "qmap") if hasattr(value, part)}
            tensors |= {f"{parameter_name}:{key}:{part}": tensor.clone() for part, tensor in inner.items()}
            if not inner:
                tensors[f"{parameter_name}:{key}"] = value.clone()
    save_file(tensors, path / "optimizer.safetensors")
    state = json.dumps(asdict(TrainState(step=3, scheduler={"last_epoch": scheduler.last_epoch})))
    (path / "trainer_state.json").write_text(state, encoding="utf-8")
    train(*parts, 2, start=3)
    again = make(tiny_llama, name=name)
    again[0].load_state_dict(AutoModelForCausalLM.from_pretrained(path).state_dict())
    assert checkpoint.load(checkpoint.newest(tmp_path), *again).step == 3
    train(*again, 2, start=3)
    assert all(torch.equal(a, b) for a, b in zip(again[0].parameters(), model.parameters(), strict=True))


def test_moments_in_several_files_are_read(tiny_llama, tmp_path, monkeypatch):
    parts = make(tiny_llama)
    train(*parts, 1)
    monkeypatch.setattr(parts_module, "FILE_BYTES", 30_000)
    path = save(tmp_path, parts, 1)
    assert len(list(path.glob("optimizer-*-of-*.safetensors"))) > 3
    again = make(tiny_llama)
    checkpoint.load(path, *again)
    for a, b in zip(parts[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(parts[1].state[a]["exp_avg"], again[1].state[b]["exp_avg"])


def test_an_error_in_the_background_is_raised_at_the_next_save(tiny_llama, tmp_path, monkeypatch):
    parts, background = make(tiny_llama), FolderWriter(background="always")
    train(*parts, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", full)
        save(tmp_path, parts, 1, writer=background)
        background._job.wait()
    with pytest.raises(CheckpointError, match=r"step-000001 could not be written: .*No space left"):
        save(tmp_path, parts, 2, writer=background)
    assert list(tmp_path.iterdir()) == []
    save(tmp_path, parts, 3, writer=background)
    background.wait()
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000003"]


@pytest.mark.parametrize(
    ("device", "free", "want"),
    [("cpu", 5.0, True), ("cpu", 3.0, False), ("cuda", 3.0, True), ("cuda", 1.2, False), ("cpu", None, False)],
)
def test_a_copy_is_made_where_there_is_room(tmp_path, monkeypatch, device, free, want):
    part = Part("model", [], nbytes=10**6)
    monkeypatch.setattr(writer, "available_memory", lambda: None if free is None else int(free * 10**6))
    found = FolderWriter(device=torch.device(device))
    assert found._in_background(Contents(lambda _: None, [part])) == want
    for setting in ("always", "never"):
        assert FolderWriter(background=setting)._in_background(Contents(lambda _: None, [part])) == (
            setting == "always"
        )


@pytest.mark.parametrize("at_once", [False, True])
def test_tensors_are_shared_out_alike_on_every_rank(at_once):
    """Those that are converted together are one rank's."""
    tensors = {name: torch.full((size,), float(size)) for name, size in (("a", 9), ("b", 4), ("c", 4), ("d", 1))}
    seen = []

    def convert(given):
        seen.append(set(given))
        return {f"{name}!": tensor for name, tensor in given.items()}

    found = []
    for rank in range(3):
        part = Part("model", tensors.items(), 0, convert=convert, all_at_once=at_once)
        files, counts = files_of_part(part, Shares(3), rank, 3, copy=False), None
        mine = {}
        while counts is None:
            try:
                mine |= next(files).tensors
            except StopIteration as end:
                counts = end.value
        found.append(set(mine))
        assert counts == ([1, 0, 0] if at_once else [1, 1, 1])
    assert found == ([{"a!", "b!", "c!", "d!"}, set(), set()] if at_once else [{"a!"}, {"b!", "d!"}, {"c!"}])
    assert {"a", "b", "c", "d"} in seen if at_once else all(len(given) == 1 for given in seen)
