"""vLLM's sleep and adapters, on a fake vLLM that keeps weights as a GPU would: no GPU, and no vLLM, is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from real_fast.config import Config
from real_fast.errors import ConfigError
from real_fast.rollout import adapter_folder as folders
from real_fast.rollout import make, vllm_engine, vllm_sampling
from real_fast.rollout.vllm_engine import VllmEngine
from real_fast.score.scale import ScoreScale
from real_fast.types import SamplingParams

OLD, NEW = torch.zeros(2), torch.ones(2)


class FakeLLM:
    """Weights of vLLM: a sleep of level 1 keeps a copy, which the wake brings back; one of level 2 keeps none."""

    def __init__(self, _path: str, **settings: Any) -> None:
        self.settings = settings
        self.calls: list[Any] = []
        self.weights: Any = OLD
        self.kept: Any = None
        self.adapters: dict[int, Any] = {}
        self.llm_engine = SimpleNamespace(
            add_lora=self.add_lora, remove_lora=self.remove_lora, output_processor=SimpleNamespace(add_request=None)
        )

    def collective_rpc(self, what: Any, kwargs: Any = None) -> list[Any]:
        if what == "reload_weights":
            self.calls.append("reload")
            [(_, self.weights)] = list(kwargs["weights_iterator"])
        return [1000 if what is vllm_engine.held_bytes else False]

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")
        self.kept, self.weights = self.weights if level == 1 else None, None
        self.adapters.clear()

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")
        if "weights" in tags:
            self.weights = torch.full((2,), torch.nan) if self.kept is None else self.kept

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return True

    def add_lora(self, request: Any) -> bool:
        self.calls.append(f"add {request.lora_name} {request.lora_int_id}")
        self.adapters[request.lora_int_id] = load_file(Path(request.lora_path) / "adapter_model.safetensors")["a"]
        return True

    def remove_lora(self, number: int) -> bool:
        self.calls.append(f"remove {number}")
        return self.adapters.pop(number, None) is not None


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """vLLM's modules as far as the engine looks at them, on a GPU; returns its platform."""
    platform = SimpleNamespace(device_type="cuda", is_sleep_mode_available=lambda: True)
    request = SimpleNamespace(LoRARequest=lambda name, number, path: SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path=path
    ))  # fmt: skip
    modules = {
        "vllm": SimpleNamespace(LLM=FakeLLM),
        "vllm.platforms": SimpleNamespace(current_platform=platform),
        "vllm.lora.request": request,
        "vllm.config.lora": SimpleNamespace(MaxLoRARanks=Literal[8, 16, 32]),
    }
    for name, attributes in modules.items():
        module = ModuleType(name)
        vars(module).update(vars(attributes))
        monkeypatch.setitem(sys.modules, name, module)
    return platform


@pytest.fixture
def engine_of(fake_vllm: Any, smollm2_tokenizer: Any, scale: ScoreScale, tiny_judge: Path, monkeypatch: Any) -> Any:
    monkeypatch.setattr(vllm_sampling, "weight_names", lambda _: {"w"})

    def make_one(kind: type[VllmEngine] = VllmEngine, **settings: Any) -> VllmEngine:
        return kind(tiny_judge, smollm2_tokenizer, scale, dtype=torch.float32, max_model_len=64, **settings)

    return make_one


class Swapped(VllmEngine):
    """Wakes behind the sync, as it must not."""

    @contextmanager
    def _woken(self) -> Iterator[None]:
        yield
        if self._asleep:
            self._engine.wake_up(tags=["weights"])
            self._engine.wake_up(tags=["kv_cache"])
            self._asleep = False


def save_adapter(folder: Path) -> None:
    save_file({"a": NEW}, folder / "adapter_model.safetensors")


def test_weights_are_synced_behind_the_wake_and_in_front_of_the_cache(engine_of: Any) -> None:
    engine = engine_of(sleeps=True)
    llm = engine._llm
    assert llm.settings["enable_sleep_mode"] and engine.held_bytes == 1000
    assert engine.sleep() and engine.sleep()
    engine.sync([("w", NEW)])
    assert llm.calls == ["sleep 2", "wake weights", "reload", "wake kv_cache", "reset"]
    assert torch.equal(llm.weights, NEW)
    engine.sync([("w", OLD)])  # awake
    assert llm.calls[5:] == ["reload", "reset"] and torch.equal(llm.weights, OLD)


def test_the_other_way_round_the_sync_is_lost(engine_of: Any) -> None:
    engine = engine_of(Swapped, sleeps=True)
    engine.sleep()
    engine.sync([("w", NEW)])
    assert not torch.equal(engine._llm.weights, NEW)
    engine = engine_of(Swapped, sleeps=True, lora_rank=4)
    engine.sync([("w", NEW)])
    engine.sleep()
    engine.sync([("w", OLD)])
    assert torch.equal(engine._llm.weights, NEW)  # old ones come back


def test_an_adapter_is_synced_behind_the_wake_and_its_base_kept(engine_of: Any) -> None:
    engine = engine_of(sleeps=True, lora_rank=12)
    llm = engine._llm
    assert llm.settings["max_lora_rank"] == 16 and llm.settings["max_loras"] == llm.settings["max_cpu_loras"] == 1
    engine.sync_adapter(save_adapter, 8)
    engine.sleep()
    engine.sync_adapter(save_adapter, 8)
    assert llm.calls == [
        "add version-1 1", "reset", "sleep 1", "wake weights", "remove 1", "add version-2 2", "wake kv_cache", "reset",
    ]  # fmt: skip
    assert torch.equal(llm.weights, OLD) and list(llm.adapters) == [2] and torch.equal(llm.adapters[2], NEW)


def test_the_folder_of_an_adapter_is_gone_when_vllm_has_read_it(
    engine_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "SHARED", tmp_path)
    engine, seen = engine_of(lora_rank=8), []

    def save(folder: Path) -> None:
        seen.append(folder.parent)
        save_adapter(folder)

    engine.sync_adapter(save, 8)
    engine.sync_adapter(save, 2**60)  # no room: among the temporary files
    assert seen[0] == tmp_path != seen[1] and not list(tmp_path.iterdir())
    monkeypatch.setattr(folders, "SHARED", tmp_path / "none")
    engine.sync_adapter(save, 8)
    assert seen[2] == seen[1]


def test_an_engine_that_sleeps_does_not_sample(engine_of: Any) -> None:
    engine = engine_of(sleeps=True)
    engine.sleep()
    with pytest.raises(RuntimeError, match="sleeps: sync it"):
        engine.generate([[1]], SamplingParams(n=1, max_tokens=1))


def test_without_sleep_nothing_is_asked_of_vllm(engine_of: Any) -> None:
    engine = engine_of()
    assert engine.sleep() is False and engine._llm.calls == []
    assert not {"enable_sleep_mode", "enable_lora"} & engine._llm.settings.keys()


def test_a_rank_that_vllm_does_not_have(engine_of: Any) -> None:
    with pytest.raises(ValueError, match=r"up to rank 32, and this one has 33"):
        engine_of(lora_rank=33)


def test_sleep_where_it_is_missing(fake_vllm: SimpleNamespace) -> None:
    """ "auto" goes on without; "always" is refused by name."""
    assert make._sleeps("auto") and make._sleeps("always") and not make._sleeps("never")
    fake_vllm.is_sleep_mode_available, fake_vllm.device_type = (lambda: False), "cpu"
    assert not make._sleeps("auto") and not make._sleeps("never")
    with pytest.raises(ConfigError, match=r"rollout\.sleep is always, and vLLM on a cpu cannot sleep"):
        make._sleeps("always")
    assert Config().rollout.sleep == "auto"
