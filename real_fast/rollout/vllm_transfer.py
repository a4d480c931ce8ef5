"""How weights get from the trainer to a server: through shared memory on one machine, or by NCCL between GPUs."""

from __future__ import annotations

import math
import secrets
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from real_fast.errors import RolloutServerError
from real_fast.rollout.adapter_folder import adapter_folder
from real_fast.rollout.vllm_client import ServerClient

# Of a model's text config: what says that two models' weights fit each other.
SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
_BUCKET = 2**25  # bytes; small tensors travel together, a larger one alone


class Transfer(Protocol):
    """A way for weights, named as vLLM's ``weight_transfer_config`` names its backend."""

    backend: str

    def open(self, client: ServerClient) -> None:
        """Make contact. Raises :class:`RolloutServerError`."""

    def send(self, client: ServerClient, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Hand over some weights, within an update, as `dtype`. Raises :class:`RolloutServerError`."""


class SharedMemory:
    """Files in /dev/shm (or among temporary files), each gone when the server has read it."""

    backend = "real-fast-shared-memory"

    def open(self, client: ServerClient) -> None:
        """Have the server read a file. Raises :class:`RolloutServerError`."""
        with adapter_folder(2**20) as folder:
            path, text = folder / "probe", secrets.token_hex(8)
            path.write_text(text, encoding="utf-8")
            try:
                client.post("/init_weight_transfer_engine", {"init_info": {"path": str(path), "text": text}})
            except RolloutServerError as error:
                raise RolloutServerError(
                    f"the rollout server {client.url} takes weights through shared memory and cannot read the "
                    f"trainer's ({error}). Start it on the trainer's machine, as the same user, or on GPUs with "
                    "--transfer nccl"
                ) from error

    @torch.no_grad()
    def send(self, client: ServerClient, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Have the server read a file of `weights`. Raises :class:`RolloutServerError`."""
        size = sum(tensor.numel() for tensor in weights.values()) * dtype.itemsize
        with adapter_folder(size) as folder:
            path = str(folder / "weights")
            for (_, place), tensor in zip(tensors_in(path, _described(weights, dtype)), weights.values(), strict=True):
                place.copy_(tensor)  # casts, and comes from a GPU too: the file is the only copy
            client.post("/update_weights", {"update_info": {"path": path, **_described(weights, dtype)}})


class Nccl:
    """vLLM's own NCCL engine: one group of the trainer (rank 0) and all of the server's workers; a broadcast a tensor.

    Args:
        workers: How many workers the server has.
    """

    backend = "nccl"

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._group: Any = None

    def open(self, client: ServerClient) -> None:
        """Make the group. Raises :class:`RolloutServerError`."""
        from real_fast.rollout.vllm_engine import import_vllm

        import_vllm()
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        with socket.create_connection((client.host, client.port), timeout=30) as reached:
            address = reached.getsockname()[0]  # ours, in the network that the server is in
        with socket.create_server((address, 0)) as free:
            port = free.getsockname()[1]
        info = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": 1 + self._workers}
        with ThreadPoolExecutor(1) as beside:  # both sides must enter together
            answer = beside.submit(client.post, "/init_weight_transfer_engine", {"init_info": info})
            group = StatelessProcessGroup.create(address, port, rank=0, world_size=1 + self._workers)
            self._group = PyNcclCommunicator(group, device=torch.device("cuda", torch.cuda.current_device()))
            answer.result()

    def send(self, client: ServerClient, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Broadcast `weights`. Raises :class:`RolloutServerError`."""
        tensors = [tensor.to("cuda", dtype).contiguous() for tensor in weights.values()]
        with ThreadPoolExecutor(1) as beside:
            answer = beside.submit(client.post, "/update_weights", {"update_info": _described(weights, dtype)})
            for tensor in tensors:
                self._group.broadcast(tensor, src=0, stream=torch.cuda.current_stream())
            answer.result()
        torch.cuda.current_stream().synchronize()


def _described(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Names, dtypes and shapes, as vLLM's NCCL engine wants them."""
    name = str(dtype).removeprefix("torch.")
    return {
        "names": list(weights),
        "dtype_names": [name for _ in weights],
        "shapes": [list(tensor.shape) for tensor in weights.values()],
    }


def tensors_in(path: str, described: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """The tensors in a file of one after the other, of one dtype, mapped and not read; the file is made to their size.

    Args:
        path: The file.
        described: Their names, dtype_names and shapes.
    """
    [name] = set(described["dtype_names"])
    sizes = [math.prod(shape) for shape in described["shapes"]]
    whole = torch.from_file(path, shared=True, size=sum(sizes), dtype=getattr(torch, name))
    parts = whole.split(sizes)
    views = [part.view(shape) for part, shape in zip(parts, described["shapes"], strict=True)]
    return list(zip(described["names"], views, strict=True))


def transfer_of(backend: str, workers: int, device: torch.device, url: str) -> Transfer:
    """The way that a server was started with.

    Args:
        backend: What it says of itself.
        workers: How many workers it has.
        device: The trainer's.
        url: The server's, for messages.

    Raises:
        RolloutServerError: Not one of ours, or NCCL and a trainer without a GPU.
    """
    if backend == SharedMemory.backend:
        return SharedMemory()
    if backend != Nccl.backend:
        raise RolloutServerError(
            f"the rollout server {url} takes weights by {backend or 'nothing'}, and the trainer sends them through "
            "shared memory or by NCCL: start it with `real-fast serve`"
        )
    if device.type != "cuda":
        raise RolloutServerError(
            f"the rollout server {url} takes weights by NCCL, and the trainer is on a {device.type}: start the server "
            "on this machine with --transfer shared-memory"
        )
    return Nccl(workers)


def buckets(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Weights in parts of 32 MiB, or of one larger tensor; what is done with a part is cleared before the next."""
    part: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        if part and sum(one.nbytes for one in part.values()) + tensor.nbytes > _BUCKET:
            yield part
            part = {}
        part[name] = tensor
        if tensor.nbytes >= _BUCKET:
            del tensor
            yield part
            part = {}
    if part:
        yield part
