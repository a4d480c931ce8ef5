"""Two updates of adapters on a random model, by the trainer itself, its peaks beside the plan: the inside of lora_step.

python -m benchmarks.lora_run FOLDER FACTS ENGINE [--small] [--others BYTES]

The model, its rows and the run go into FOLDER; each fact is a line of JSON in FACTS as soon as it is known, so that an
end of this process, however sudden, takes none of them along.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu.cases import CASES, Case

UPDATES = 2
# As configs/qwen3-8b-lora-80gb.yaml has it, with fewer prompts and shorter responses: two micro-batches of four groups.
LARGE = replace(CASES[-1], prompts=8, k=8, p=2_000, r=256, budget=20_736)
SMALL = Case(
    "tiny", 128, 2, 4, 256, tied=False, vocabulary=512, kv_heads=2, head_dim=32, prompts=2, k=3, p=900, r=8,
    budget=1_100,
)  # fmt: skip
EVALUATED = 2  # rows, behind the last update
# Far above what anyone would train with, so that a sync that was lost shows in the second update's check.
RATE = 3e-2

# What is measured and planned, by the facts' names.
PEAKS = {
    "trainer_update": "trainer's tensors, update",
    "card_update": "card, update",
    "beside_update": "card without them, update (libraries, sleeping engine)",
    "card_rollouts": "card, rollouts",
    "engine": "engine's weights and cache, rollouts",
}


class Facts:
    """Lines of JSON about a run, in a file that outlives it.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def tell(self, **fact: Any) -> None:
        """Write one down at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fact) + "\n")

    def begin(self, phase: str) -> None:
        """What is about to be done, and what went wrong if nothing follows."""
        self.tell(what="begin", phase=phase)
        print(f"--- {phase}", flush=True)


def run_config(folder: Path, case: Case, engine: Any, device: Any) -> Any:
    """The run's settings.

    Args:
        folder: Has model/, train.jsonl and eval.jsonl, and gets run/.
        case: The model's shape; prompts, rollouts of each, tokens of a prompt and of a response, micro-batch.
        engine: As ``rollout.engine``.
        device: On a CPU it computes in float32.
    """
    from real_fast.config import Config, LoraConfig

    config = Config(model=str(folder / "model"), output=str(folder / "run"))
    config.data = replace(config.data, train=str(folder / "train.jsonl"), eval=str(folder / "eval.jsonl"))
    config.prompt = replace(config.prompt, max_tokens=case.p)
    config.rollout = replace(
        config.rollout,
        engine=engine,
        prompts_per_step=case.prompts,
        group_size=case.k,
        max_tokens=case.r,
        check_every=1,
    )
    config.optim = replace(config.optim, lr=RATE, weight_decay=0.0)
    config.train = replace(
        config.train,
        steps=UPDATES,
        micro_batch_tokens=case.budget,
        precision="bf16" if device.type == "cuda" else "fp32",
        activation_checkpointing=True,
        lora=LoraConfig(r=16, alpha=32.0),
    )
    config.eval = replace(config.eval, on_start=False, bootstrap=10)
    config.save = replace(config.save, every=0, keep=1)
    return config


def write_rows(config: Any, case: Case) -> None:
    """Rows for training and evaluation, each with a prompt as long as the case says."""
    from real_fast.data.synthetic import generate
    from real_fast.model.load import load_tokenizer
    from real_fast.prompt.builder import PromptBuilder
    from real_fast.score.scale import ScoreScale
    from real_fast.utils.jsonio import write_jsonl

    tokenizer = load_tokenizer(config.model)
    scale = ScoreScale.from_config(tokenizer, config.scale, config.prompt)
    builder = PromptBuilder(config.prompt, tokenizer, scale)
    for path, count, which in (
        (config.data.train, case.prompts * UPDATES, "train"),
        (config.data.eval, EVALUATED, "eval"),
    ):
        rows: list[dict[str, Any]] = generate(count, 1, seed=0, which=which)
        for row in rows:
            missing = case.p - len(builder.ids(SimpleNamespace(messages=[], extra={}, **row)))  # a token is a letter
            text = row["response"]
            row["response"] = text + (f" {text}" * (missing // len(text) + 1))[:missing].rstrip()
        write_jsonl(Path(path), rows)


def planned(config: Any, sizes: Any, lengths: tuple[int, int], batch: dict[str, int], room: float) -> dict[str, float]:
    """What the plan says for a run's settings and its largest micro-batch, bytes by the names of PEAKS.

    Args:
        config: The run's settings.
        sizes: The model's.
        lengths: Tokens of the longest prompt and of the longest response.
        batch: Tokens of the micro-batch, and its "rows" through the head.
        room: Bytes of the device's memory.
    """
    from real_fast.config.commands import PlanConfig
    from real_fast.planning.memory import update_memory
    from real_fast.planning.need import ENGINE_WORK, GIB, RESERVE, need, training_of

    p, r = lengths
    plan = PlanConfig(**vars(config), gpu_memory=room / GIB, prompt_tokens=p, response_tokens=r)
    training = replace(training_of(plan), device="cuda" if config.train.precision == "bf16" else "cpu")
    memory = update_memory(
        sizes,
        batch["tokens"],
        training,
        head_rows=batch["rows"],
        checkpointing=config.train.activation_checkpointing,
    )
    found = replace(need(plan, sizes, kl=False), memory=memory)
    at_work = ENGINE_WORK if found.share else found.engine  # Transformers' copies and cache come and go
    return {
        "trainer_update": memory.total,
        "card_update": found.update,
        "beside_update": RESERVE + found.beside,
        "card_rollouts": found.rollouts,
        "engine": max(0.0, found.engine - at_work),
    }


class Above:
    """Context manager: ``bytes`` is the most memory in tensors inside, above what there was at its start.

    A GPU's allocator is left as it is, so that the card's peak is a user's. On a CPU the resident set counts; None
    where it cannot be read.
    """

    bytes: int | None = None

    def __init__(self, device: Any) -> None:
        from benchmarks.machine import PeakMemory

        self._host = PeakMemory() if device.type == "cpu" else None
        self._before = 0

    def __enter__(self) -> Above:
        import torch

        if self._host:
            self._host.__enter__()
        else:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        if self._host:
            self._host.__exit__()
            self.bytes = self._host.bytes
        else:
            self.bytes = torch.cuda.max_memory_allocated() - self._before


def measured_trainer(config: Any, facts: Facts, others: int) -> Any:
    """The trainer of ``real-fast train``, which also tells what each update took, beside the plan.

    Args:
        config: Its settings.
        facts: Where it tells.
        others: Bytes of the card that other processes hold.
    """
    import torch

    from real_fast.batching.micro_batches import micro_batches
    from real_fast.planning.memory import ModelSizes
    from real_fast.train import Trainer
    from real_fast.training.peak_memory import GIB

    class Measured(Trainer):
        """Tells before it acts."""

        def __init__(self) -> None:
            super().__init__(config)
            self.sizes = ModelSizes.of(self.policy.model.config)
            self.trainer_peak: float | None = None
            self.batch: dict[str, int] = {}
            rows, device = self.parts.data.train, self.policy.device
            appended = self.parts.scale.most_appended
            self.lengths = max(len(row.prompt_ids) for row in rows), config.rollout.max_tokens + appended
            host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            self.room = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else host

        def step(self) -> dict[str, Any]:
            name = f"update {self.state.step + 1}"
            facts.begin(f"{name}: wake, sync and rollouts")
            record = super().step()
            plan = planned(self.config, self.sizes, self.lengths, self.batch, self.room)

            def card(phase: str) -> float | None:
                gib = record.get(f"memory/{phase}_gib")
                return None if gib is None else gib * GIB - others

            update = card("update")
            beside = None if update is None or self.trainer_peak is None else update - self.trainer_peak
            found = {
                "trainer_update": self.trainer_peak,
                "card_update": update,
                "beside_update": beside,
                "card_rollouts": card("rollout"),
                "engine": record["memory/engine_gib"] * GIB,
            }
            facts.tell(
                what="update",
                step=record["step"],
                engine=self.groups.engine.name,
                asleep=record["memory/engine_update_gib"] == 0 < record["memory/engine_gib"],
                case=case_of(self.config, self.lengths),
                bytes={name: [found[name], plan[name]] for name in PEAKS},
                seconds={k.removeprefix("time/"): v for k, v in record.items() if _is_time(k)},
                gap=record.get("sampling/sampling_logp_difference/mean"),
                room=self.room,
                others=others,
                **self.batch,
            )
            return record

        def update(self, groups: Any, metrics: Any) -> None:
            facts.begin(f"update {self.state.step + 1}: forward, backward and optimiser")
            train = self.config.train
            batches = micro_batches(groups, train.micro_batch_tokens, self.updater.pad_id, train.shared_prompt)
            largest = max(batches, key=lambda batch: batch.input_ids.numel())
            self.batch = {
                "tokens": largest.input_ids.numel(),
                "rows": len(largest.targets),
            }
            held = held_bytes(self.policy, self.updater.optimizer)
            with Above(self.policy.device) as above:
                super().update(groups, metrics)
            self.trainer_peak = None if above.bytes is None else held + above.bytes

    return Measured()


def case_of(config: Any, lengths: tuple[int, int]) -> str:
    """The case, as other suites write theirs."""
    rollout = config.rollout
    return f"K={rollout.group_size} P={lengths[0]} R={lengths[1]} prompts={rollout.prompts_per_step}"


def _is_time(name: str) -> bool:
    return name == "step_time" or (name.startswith("time/") and "rollout_" not in name)


def held_bytes(policy: Any, optimizer: Any) -> int:
    """Bytes of the trainer's weights, buffers and moments, each storage once."""
    import torch

    tensors = [*policy.parameters(), *policy.buffers()]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def run(folder: Path, facts: Facts, engine: str, case: Case, others: int) -> None:
    """Make the model and its rows, train, and tell."""
    import torch

    from benchmarks.random_model import parameters, write_model
    from real_fast.runs import log

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log.set_up("info")

    def timed(phase: str, work: Any) -> Any:
        facts.begin(phase)
        started = time.perf_counter()
        done = work()
        facts.tell(what="seconds", phase=phase, seconds=time.perf_counter() - started)
        return done

    timed(f"write a model of {parameters(case) / 1e9:.1f} B", lambda: write_model(folder / "model", case, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the random numbers took is not the run's
    config = run_config(folder, case, engine, device)
    write_rows(config, case)
    trainer = timed("load the model and start the engine", lambda: measured_trainer(config, facts, others))
    finished = trainer.fit()
    facts.begin("close")
    trainer.groups.engine.close()
    if not finished:
        raise RuntimeError("the run was stopped by a signal")
    facts.tell(what="done")


def main() -> int:
    """The command line. Exit status 1 if something went wrong, which is then a fact too."""
    parser = argparse.ArgumentParser(prog="benchmarks.lora_run")
    parser.add_argument("folder", type=Path)
    parser.add_argument("facts", type=Path)
    parser.add_argument("engine", choices=("vllm", "transformers"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--others", type=int, default=0)
    arguments = parser.parse_args()
    facts = Facts(arguments.facts)
    try:
        case = SMALL if arguments.small else LARGE
        run(arguments.folder, facts, arguments.engine, case, arguments.others)
    except Exception as error:
        traceback.print_exc()
        said = " ".join(str(error).split())[:400]
        facts.tell(what="error", error=f"{type(error).__name__}: {said}", card=_card())
        return 1
    return 0


def _card() -> str:
    """What the card holds at this moment, for the message of an error."""
    import torch

    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    highest = torch.cuda.max_memory_allocated()
    return f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB in use, {highest / 2**30:.1f} in tensors at most"


if __name__ == "__main__":
    sys.exit(main())
