"""What ranks agree on, and launches that are refused before work starts."""

from __future__ import annotations

import signal

import pytest
import torch

from real_fast.commands import run
from real_fast.config import Config, ObjectiveConfig, OptimConfig, RolloutConfig, TrainConfig
from real_fast.distributed.launch import launched
from real_fast.distributed.ranks import Ranks, joined
from real_fast.distributed.world import OneProcess
from real_fast.errors import ConfigError, DataError, ElsewhereError
from real_fast.runs.stop import Stopped, StopSignal
from real_fast.training.optim import build_optimizer, clip_and_step
from real_fast.training.preflight import check_ranks
from tests.distributed.ranks import run_ranks


class Two(OneProcess):
    """The other rank's gradient is not finite."""

    size = 2

    def all(self, flag):
        return False


def test_a_gradient_that_is_not_finite_elsewhere_is_skipped_here_too(tiny_llama):
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    norm, stepped = clip_and_step(model, build_optimizer(model, OptimConfig(lr=1.0)), 1.0, Two())
    assert norm > 0 and not stepped
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())


def agreed():
    world = Ranks(torch.device("cpu"))
    found = {
        "any": world.any(world.rank == 1),
        "none": world.any(False),
        "all": world.all(True),
        "not all": world.all(world.rank == 0),
        "gather": world.gather({"rank": world.rank}),
        "main": world.main(world.rank),
    }
    tensors = [torch.full((2, 2), 1.0 + world.rank), torch.ones(3, dtype=torch.float64), torch.zeros(0)]
    world.add_up(tensors)
    return found | {"add_up": tensors}


def test_what_ranks_agree_on():
    for found in run_ranks(2, agreed):
        assert found["any"] and not found["none"] and found["all"] and not found["not all"]
        assert found["gather"] == [{"rank": 0}, {"rank": 1}] and found["main"] == 0
        assert [t.sum().item() for t in found["add_up"]] == [12.0, 6.0, 0.0]


def failing(ranks):
    world = Ranks(torch.device("cpu"))
    try:
        with world.together():
            if world.rank in ranks:
                raise DataError(f"rank {world.rank} has no rows")
    except (DataError, ElsewhereError) as error:
        return type(error).__name__, str(error), world.gather(1)
    return None


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_an_error_on_one_rank_is_raised_on_all(ranks):
    first = min(ranks)
    for rank, (kind, message, gathered) in enumerate(run_ranks(2, failing, ranks)):
        assert kind == ("DataError" if rank == first else "ElsewhereError")
        assert f"rank {first} has no rows" in message and gathered == [1, 1]


def stopping(signalled):
    world = Ranks(torch.device("cpu"))
    stop = StopSignal(world)
    seen = []
    for step in range(3):
        if step == 1 and world.rank == signalled:
            stop._handle(15, None)
        seen.append(stop.requested)
    try:
        stop.check()
    except Stopped:
        return seen
    return None


def test_a_signal_to_one_rank_stops_all_at_the_same_step():
    assert run_ranks(3, stopping, 2) == [[False, True, True]] * 3


def test_a_sigterm_that_comes_twice_at_once_is_one():
    stop = StopSignal()
    stop._handle(signal.SIGTERM, None)
    stop._handle(signal.SIGTERM, None)
    assert stop.requested
    stop._at -= 60
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGTERM, None)
    stop._at += 60
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGINT, None)


TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.fixture
def environment(monkeypatch):
    for name in [*TORCHRUN, "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]:
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_one_process_is_alone(environment):
    with joined("cpu") as world:
        assert world.size == 1 and world.is_main
    environment(**TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"})
    assert launched() == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 processes"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes"),
        ({"PMI_SIZE": "4"}, "mpiexec started 4 processes"),
        ({"RANK": "0"}, "RANK is set, and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, and RANK is not"),
        ({**TORCHRUN, "LOCAL_RANK": None}, "LOCAL_RANK is not set"),
        ({**TORCHRUN, "MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({**TORCHRUN, "RANK": "2"}, "RANK is '2'"),
    ],
)
def test_launches_that_cannot_work(environment, variables, message):
    environment(**{name: value for name, value in variables.items() if value is not None})
    with pytest.raises(ConfigError, match=message):
        launched()


@pytest.mark.parametrize("command", ["evaluate", "plan", "compare"])
def test_other_commands_are_one_process(environment, capsys, command):
    environment(**TORCHRUN | {"RANK": "0"})
    arguments = {"evaluate": ["--model", "m", "--data.eval", "e.jsonl"], "plan": ["--model", "smollm2-135m"]}
    assert run(command, arguments.get(command, ["runs"])) == 2
    assert f"torchrun started 2 processes, and real-fast {command} is one" in capsys.readouterr().err


def test_more_ranks_than_gpus(environment, monkeypatch):
    environment(**TORCHRUN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="started 2 ranks on this machine, and it has 1 GPU"), joined("auto"):
        pass


@pytest.mark.parametrize(
    ("settings", "ranks", "message"),
    [
        ({"train": TrainConfig(replicas=2)}, 1, "train.replicas is 2, and there is 1 rank"),
        ({"train": TrainConfig(replicas=2)}, 3, "train.replicas is 2, and there are 3 ranks"),
        ({"rollout": RolloutConfig(tensor_parallel=4)}, 2, "rollout.tensor_parallel is 4, and there are 2 ranks"),
        ({"rollout": RolloutConfig(prompts_per_step=4)}, 5, "prompts_per_step is 4, and torchrun started 5 ranks: 1"),
        ({"train": TrainConfig(compile=True)}, 2, "train.compile is true"),
        ({"train": TrainConfig(quantization="nf4")}, 2, "train.quantization is nf4"),
        ({"train": TrainConfig(head_gradient="fused")}, 2, "train.head_gradient is fused"),
        ({"optim": OptimConfig(offload="all")}, 2, "optim.offload is all"),
    ],
)
def test_settings_that_ranks_cannot_use(settings, ranks, message):
    config = Config(objective=ObjectiveConfig(), **settings)
    with pytest.raises(ConfigError, match=message):
        check_ranks(config, ("rollout.prompts_per_step", config.rollout.prompts_per_step), ranks)


def test_as_many_ranks_as_rows():
    check_ranks(Config(), ("rollout.prompts_per_step", 2), 2)
