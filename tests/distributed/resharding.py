"""A tiny model that is trained by made-up gradients on any number of ranks, saved and resumed."""

from __future__ import annotations

import os
import signal
import threading
import weakref

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from real_fast.config import LoraConfig, OptimConfig
from real_fast.distributed import shard as sharding
from real_fast.distributed.ranks import Ranks
from real_fast.distributed.shard import whole
from real_fast.distributed.world import ALONE
from real_fast.errors import CheckpointError, ElsewhereError
from real_fast.model import lora
from real_fast.model.write import contents_of
from real_fast.runs import checkpoint, parts
from real_fast.runs import writer as writing
from real_fast.runs.checkpoint import TrainState
from real_fast.runs.writer import FolderWriter
from real_fast.training.optim import build_optimizer, build_scheduler

RATE = 1e-3


class NoTokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


def world_of(replicas=1):
    alone = not torch.distributed.is_initialized()
    return ALONE if alone else Ranks(torch.device("cpu"), replicas)


def tiny(tied=False, vocabulary=385, hidden=32, seed=0, **changes):
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        **{"num_hidden_layers": 2} | changes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


class Run:
    """Of this rank: a model, sharded where there are several ranks, its optimiser and its schedule."""

    def __init__(self, model, world, name="adamw"):
        self.model, self.world, self.step = model, world, 0
        if world.size > 1 and not lora.is_adapted(model):
            sharding.shard(model, model.model.layers, world.mesh)
        config = OptimConfig(lr=RATE, name=name, schedule="cosine", lr_warmup_steps=2)
        self.optimizer = build_optimizer(model, config)
        self.scheduler = build_scheduler(self.optimizer, config, 20)

    def train(self, steps):
        """The same gradients on any number of ranks, so that every number of a step is the same."""
        for _ in range(steps):
            drawn = torch.Generator().manual_seed(self.step)
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.grad = spread_like(torch.randn(parameter.shape, generator=drawn), parameter)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.step += 1

    def save(self, folder, writer=None):
        writer = writer or FolderWriter(self.world, "never")
        contents = contents_of(self.model, NoTokenizer(), {"a.json": "1"}, self.model.dtype)
        state = TrainState(step=self.step)
        return checkpoint.save(folder, writer, contents, self.model, self.optimizer, self.scheduler, state, keep=2)

    def weights(self):
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        return {name: whole(p).clone() for name, p in trained}


def spread_like(tensor, like):
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def fresh(kind):
    if kind == "lora":
        model = tiny()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            lora.add_adapters(model, LoraConfig(r=4), "base")
        return model
    if kind == "adamw8bit":
        return tiny(vocabulary=384, hidden=64)
    return tiny(tied=kind == "tied")


def optimizer_of(kind):
    return "adamw8bit" if kind == "adamw8bit" else "adamw"


def saved(folder, kind, replicas=1, background="never"):
    """Weights as saved, and two steps on; what is drawn next; the most bytes of whole tensors held."""
    run = Run(fresh(kind), world_of(replicas), optimizer_of(kind))
    run.train(3)
    torch.manual_seed(7 + run.world.rank)
    at_save, held = run.weights(), Held()
    writer = FolderWriter(run.world, background)
    with held:
        run.save(folder, writer)
    writer.wait()
    drawn = torch.rand(3)
    run.train(2)
    return at_save, run.weights(), drawn, held.peak


def resumed(folder, kind, replicas=1):
    """Weights as read, and two steps on; what is drawn next."""
    path = checkpoint.newest(folder)
    if kind == "lora":
        model = fresh(kind)
        lora.read_adapters(model, path)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    run = Run(model, world_of(replicas), optimizer_of(kind))
    at_load = run.weights()
    state = checkpoint.load(path, run.model, run.optimizer, run.scheduler, run.world)
    run.step = state.step
    drawn = torch.rand(3)
    run.train(2)
    return at_load, run.weights(), drawn


def saved_by_two_writers(folder):
    """Both ranks' errors where rank 1's disk is full, now and in a thread; then the checkpoint that follows."""
    run = Run(tiny(), world_of())
    run.train(1)
    run.save(folder)
    said = []
    real = writing.save_file

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for background in ("never", "always"):
        writer = FolderWriter(run.world, background)
        run.train(1)
        writing.save_file = full if run.world.rank == 1 else real
        try:
            run.save(folder, writer)
            writer.wait()
        except (CheckpointError, ElsewhereError) as error:
            said.append((type(error).__name__, str(error), sorted(p.name for p in folder.iterdir())))
        writing.save_file = real
        torch.distributed.barrier()
        writer.wait()  # it is raised once
    run.save(folder, writer)
    writer.wait()
    return said


def saved_while_training(folder):
    """Weights as saved; files were written behind two further steps."""
    run = Run(tiny(), world_of())
    run.train(3)
    at_save, go_on, real = run.weights(), threading.Event(), writing.save_file

    def later(*arguments, **options):
        go_on.wait(30)
        real(*arguments, **options)

    writing.save_file = later
    writer = FolderWriter(run.world, "always")
    run.save(folder, writer)
    run.train(2)
    before = checkpoint.complete(folder)
    go_on.set()
    writer.wait()
    writing.save_file = real
    return at_save, run.weights(), before


def killed_while_writing(folder):
    """Never returns."""
    run = Run(tiny(), world_of())
    run.train(1)
    run.save(folder)
    real = writing.save_file

    def killed(tensors, path, **options):
        real(tensors, path, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    writing.save_file = killed
    run.train(1)
    run.save(folder)


def exported(folder, dtype, kind):
    """A model without its optimiser, merged where there are adapters."""
    run = Run(fresh(kind), world_of())
    run.train(2)
    writer = FolderWriter(run.world, "never")
    contents = contents_of(run.model, NoTokenizer(), {}, dtype, merge=kind == "lora")
    checkpoint.save_model(writer, folder / "final", contents)


class Held:
    """Counts the bytes of whole tensors, and of copies of them, that are alive at once."""

    def __init__(self):
        self.now = self.peak = 0
        self.ids = set()

    def __enter__(self):
        self.old = parts.on_host, DTensor.full_tensor
        parts.on_host, DTensor.full_tensor = map(self.counted, self.old)
        return self

    def __exit__(self, *_):
        parts.on_host, DTensor.full_tensor = self.old

    def counted(self, make):
        def made(*args, **options):
            found = make(*args, **options)
            storage = found.untyped_storage()
            place, nbytes = storage.data_ptr(), storage.nbytes()
            if place not in self.ids:
                self.ids.add(place)
                self.now += nbytes
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, place, nbytes)
            return found

        return made

    def gone(self, place, nbytes):
        self.ids.discard(place)
        self.now -= nbytes
