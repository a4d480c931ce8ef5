"""What a rank reads of a tensor is what it holds of it: against the whole tensor, distributed by torch."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from real_fast.distributed.slices import TensorFiles, local_part
from tests.distributed.ranks import RankError, run_ranks


def tensors():
    g = torch.Generator().manual_seed(0)
    shapes = {"even": (6, 4), "odd": (7, 3), "few": (1, 5), "vector": (5,), "none": (0, 4), "cube": (5, 3, 2)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()} | {"one": torch.tensor(3.0)}


def read_on_a_rank(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    files = TensorFiles(sorted(folder.glob("*.safetensors")))
    size = torch.distributed.get_world_size()
    flat = init_device_mesh("cpu", (size,))
    layouts = [(flat, [Shard(0)]), (flat, [Replicate()]), (flat, [Shard(1)])]
    if size == 4:
        square = init_device_mesh("cpu", (2, 2))
        layouts += [(square, [Replicate(), Shard(0)]), (square, [Shard(0), Shard(1)]), (square, [Shard(0), Shard(0)])]
    checked = 0
    for name, whole in tensors().items():
        for mesh, placements in layouts:
            if any(p.is_shard() and p.dim >= whole.dim() for p in placements):
                continue
            like = distribute_tensor(whole, mesh, placements)
            found = files.local(name, like)
            assert torch.equal(found, like.to_local()) and found.shape == like.to_local().shape, (name, placements)
            assert files.local(name, like, torch.bfloat16).dtype == torch.bfloat16
            checked += 1
    with pytest.raises(ValueError, match=r"odd has the shape \[7, 3\]"):
        files.local("odd", distribute_tensor(torch.zeros(8, 3), flat, [Shard(0)]))
    return checked


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_reads_what_it_holds(tmp_path, size):
    both = list(tensors().items())
    save_file(dict(both[:3]), tmp_path / "a.safetensors")
    save_file(dict(both[3:]), tmp_path / "b.safetensors")
    counts = run_ranks(size, read_on_a_rank, tmp_path)
    assert counts == [18 if size == 2 else 35] * size


def test_one_process_has_all(tmp_path):
    save_file(tensors() | {"bytes": torch.arange(5, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    files = TensorFiles([tmp_path / "a.safetensors"])
    assert files.names == {*tensors(), "bytes"}
    for name, whole in tensors().items():
        assert torch.equal(files.local(name, whole), whole) and files.shape(name) == tuple(whole.shape)
        assert local_part(whole) == (tuple(whole.shape), (0,) * whole.dim())
        assert torch.equal(files.whole(name), whole)
    assert files.dtype("bytes") == torch.uint8
    with pytest.raises(ValueError, match="is not in it"):
        files.block("odd", (2, 3), (6, 0))


def fail_on_one():
    if torch.distributed.get_rank() == 1:
        raise ValueError("this rank has had enough")
    torch.distributed.barrier()


def test_a_ranks_error_is_told():
    with pytest.raises(RankError, match="this rank has had enough"):
        run_ranks(2, fail_on_one)
