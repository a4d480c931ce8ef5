"""A checkpoint does not depend on the number of ranks that wrote it, nor on that of those that go on from it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from real_fast.runs import checkpoint
from real_fast.runs.sealed import seal
from tests.distributed.ranks import RankError, run_ranks
from tests.distributed.resharding import (
    RATE,
    exported,
    killed_while_writing,
    resumed,
    saved,
    saved_by_two_writers,
    saved_while_training,
)


def far(found, want):
    assert found.keys() == want.keys()
    return max(float((found[name].detach() - want[name].detach()).abs().max()) for name in want)


@pytest.fixture(autouse=True)
def random_state():
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("kind", ["tied", "untied", "adamw8bit", "lora"])
def test_two_ranks_go_on_as_any_number(tmp_path, kind):
    first, second = run_ranks(2, saved, tmp_path, kind)
    at_save, end = first[:2]
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]
    for ranks in (2, 1, 3):
        found = run_ranks(ranks, resumed, tmp_path, kind) if ranks > 1 else [resumed(tmp_path, kind)]
        at_load, later, drawn = found[0]
        assert far(at_load, at_save) == 0
        # Parts of other sizes are kept in 8 bits or are not; with equal ones, every number is the same.
        assert far(later, end) <= (0.15 * RATE if kind == "adamw8bit" and ranks != 2 else 0)
        assert torch.equal(drawn, first[2])
        if ranks > 1:
            assert torch.equal(found[1][2], second[2])
        if ranks == 3:
            assert not torch.equal(found[2][2], drawn) and not torch.equal(found[2][2], second[2])


@pytest.mark.parametrize("kind", ["untied", "adamw8bit"])
def test_one_process_goes_on_as_two(tmp_path, kind):
    at_save, end, drawn, _ = saved(tmp_path, kind)
    assert (tmp_path / "step-000003" / "optimizer.safetensors").is_file()
    for at_load, later, own in run_ranks(2, resumed, tmp_path, kind)[:1]:
        assert far(at_load, at_save) == 0 and torch.equal(own, drawn)
        assert far(later, end) <= (0.15 * RATE if kind == "adamw8bit" else 0)


def test_moments_of_an_earlier_version_go_on_as_two(tmp_path):
    """Which did not say that they are in 8 bits; the parts of some are too small for that."""
    _, end, _, _ = saved(tmp_path, "adamw8bit")
    path = tmp_path / "step-000003" / "optimizer.safetensors"
    save_file(load_file(path), path)
    sums = json.loads((path.parent / "checksums.json").read_text())
    sums[path.name] = seal(path)
    (path.parent / "checksums.json").write_text(json.dumps(sums))
    assert far(run_ranks(2, resumed, tmp_path, "adamw8bit")[0][1], end) <= 0.15 * RATE


def test_replicas_of_shards_go_on_as_two(tmp_path):
    at_save, end, _, _ = run_ranks(4, saved, tmp_path, "untied", 2)[3]
    at_load, later, _ = run_ranks(2, resumed, tmp_path, "untied")[0]
    assert far(at_load, at_save) == 0 and far(later, end) == 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_no_rank_holds_the_whole(tmp_path, ranks):
    peaks = [found[3] for found in run_ranks(ranks, saved, tmp_path, "untied", 1, "always")]
    tensors = [t for file in tmp_path.glob("*/*.safetensors") for t in load_file(file).values()]
    sizes = sorted(t.numel() * t.element_size() for t in tensors)
    assert all(0.9 * sum(sizes) / ranks <= peak <= sum(sizes) / ranks + 2 * sizes[-1] for peak in peaks)


def test_the_folder_is_hugging_faces(tmp_path):
    at_save = run_ranks(3, saved, tmp_path, "untied")[0][0]
    folder = tmp_path / "step-000003"
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *(f"{part}-0000{i}-of-00003.safetensors" for part in ("model", "optimizer") for i in (1, 2, 3)),
        *("model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json", "a.json"),
        *("trainer_state.json", "checksums.json"),
    }
    assert json.loads((folder / "checksums.json").read_text()).keys() == names - {"checksums.json"}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = {name: (file.name, t) for file in folder.glob("model-*") for name, t in load_file(file).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in stored.items()}
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for _, t in stored.values())
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and far(dict(model.named_parameters()), at_save) == 0


@pytest.mark.parametrize(
    ("kind", "dtype"), [("untied", torch.bfloat16), ("tied", torch.float32), ("lora", torch.bfloat16)]
)
def test_an_export_is_that_of_one_process(tmp_path, kind, dtype):
    run_ranks(2, exported, tmp_path / "two", dtype, kind)
    exported(tmp_path / "one", dtype, kind)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / ranks / "final") for ranks in ("one", "two"))
    assert one.dtype == two.dtype == dtype
    assert far(dict(two.named_parameters()), dict(one.named_parameters())) == 0
    assert ("lm_head.weight" in load_file(tmp_path / "one" / "final" / "model.safetensors")) == (kind != "tied")


def test_a_full_disk_on_one_rank_is_told_on_all(tmp_path):
    first, second = run_ranks(2, saved_by_two_writers, tmp_path)
    for (kind, text, left), (elsewhere, other, _) in zip(second, first, strict=True):
        assert (kind, elsewhere) == ("CheckpointError", "ElsewhereError")
        assert "on rank 1: [Errno 28] No space left on device" in text and "on rank 1: [Errno 28]" in other
        assert "step-000001 is kept: go on with --resume" in text and left == ["step-000001"]
    assert len(first) == 2 and checkpoint.newest(tmp_path).name == "step-000003"


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_written_in_a_thread_is_what_was_saved(tmp_path, ranks):
    found = run_ranks(2, saved_while_training, tmp_path)[0] if ranks == 2 else saved_while_training(tmp_path)
    at_save, end, before = found
    assert before == []
    assert far(at_save, end) > RATE
    at_load, later, _ = resumed(tmp_path, "untied")
    assert far(at_load, at_save) == 0 and far(later, end) == 0


def test_a_kill_leaves_the_checkpoint_before(tmp_path):
    with pytest.raises(RankError, match="died without a word"):
        run_ranks(2, killed_while_writing, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002.tmp"]
    assert checkpoint.newest(tmp_path).name == "step-000001"
    checkpoint.tidy(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
