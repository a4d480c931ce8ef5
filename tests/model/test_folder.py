"""Model folders that cannot be used: each is refused by name, with a remedy, before anything slow starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from real_fast import Judge, evaluate, train
from real_fast.errors import ModelError
from real_fast.model.folder import check_as_written, check_folder, model_alone, weight_files, weight_names
from real_fast.model.load import load_model, load_tokenizer
from real_fast.model.weights import check_files
from real_fast.runs.sealed import writing_folder
from real_fast.training.preflight import check_trainable

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ATTENTION = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path, golden_model: Path) -> Path:
    """A whole model's folder, to be spoiled: 2 layers, a head of its own."""
    return Path(shutil.copytree(golden_model, tmp_path / "model"))


def spoil(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def refused(folder: Path) -> str:
    """What the trainer's loading says, which must be what vLLM's says."""
    with pytest.raises(ModelError) as trainer:
        load_model(str(folder), CPU, torch.float32)
    with pytest.raises(ModelError) as vllm:
        check_files(folder)
    assert str(trainer.value) == str(vllm.value)
    assert "Traceback" not in str(trainer.value) and "\n" not in str(trainer.value)
    return str(trainer.value)


def flip(file: Path) -> None:
    """Change a bit at the end: of the last weight, or of the last character."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def edited(file: Path) -> None:
    """As somebody does who wants another phrase."""
    file.write_text(file.read_text().replace("score", "grade"), encoding="utf-8")


@pytest.fixture
def written(folder: Path) -> Path:
    """A judge's folder as real-fast train writes it."""
    settings = {"scale": {"phrase": "So the overall score is "}, "prompt": {"template": "short"}}
    with writing_folder(folder.parent / "final") as target:
        shutil.copytree(folder, target, dirs_exist_ok=True)
        (target / "real_fast.json").write_text(json.dumps(settings), encoding="utf-8")
        (target / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        (target / "optimizer.safetensors").write_bytes(b"of a checkpoint")
    return folder.parent / "final"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", flip),
        ("tokenizer.json", lambda file: file.write_text(file.read_text() + " ", encoding="utf-8")),
        ("real_fast.json", edited),
        ("chat_template.jinja", Path.unlink),
        ("chat_template.jinja", flip),
        ("checksums.json", lambda file: file.write_text(file.read_text()[:-20], encoding="utf-8")),
    ],
)
def test_a_folder_that_is_not_as_it_was_written_names_the_file(
    written: Path, tmp_path: Path, name: str, change: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    load_tokenizer(str(written))
    change(written / name)
    told = []
    with pytest.raises(ModelError) as refused:
        Judge(written, engine="transformers")
    told.append(str(refused.value))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "response": "b", "rubric": "c", "score": 3}\n', encoding="utf-8")
    output = ["--output", str(tmp_path / "out"), "--rollout.engine", "transformers"]
    assert evaluate.main(["--model", str(written), "--data", str(rows), *output]) == 2
    told.append(capsys.readouterr().err)
    more = ["--data.train", "synthetic:train", "--init_from", str(written), "--model", "m"]
    assert train.main([*output, *more, "--data.max_train", "20", "--rollout.prompts_per_step", "1"]) == 2
    told.append(capsys.readouterr().err)
    for message in told:
        assert name in message and str(written) in message, message
        if name != "checksums.json":
            assert f"If you changed it, remove {written / 'checksums.json'}" in message
            assert message.count("not as it was written" if (written / name).exists() else "is missing") == 1
    if name in ("real_fast.json", "tokenizer.json"):  # on purpose
        (written / "checksums.json").unlink()
        load_tokenizer(str(written))


def test_what_is_of_no_model_or_of_another_program_is_not_looked_at(written: Path) -> None:
    (written / "optimizer.safetensors").unlink()  # of a checkpoint, whose weights alone are taken
    (written / "README.md").write_text("mine", encoding="utf-8")
    check_as_written(written, weights=True)
    flip(written / "model.safetensors")
    check_as_written(written, weights=False)
    (written / "checksums.json").write_text('{"model.safetensors": {"md5": "0"}}', encoding="utf-8")
    check_as_written(written, weights=True)


def test_checksums_that_name_nothing_pass_nothing(written: Path) -> None:
    (written / "checksums.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"checksums\.json does not name config\.json.*model\.safetensors"):
        check_as_written(written, weights=True)


def rename(weights: Weights, name: Callable[[str], str]) -> None:
    for key in list(weights):
        weights[name(key)] = weights.pop(key)


def without_layer(weights: Weights) -> None:
    for key in [key for key in weights if ".layers.1." in key]:
        del weights[key]


def test_a_whole_folder_passes(folder: Path) -> None:
    load_tokenizer(str(folder))
    load_model(str(folder), CPU, torch.float32)
    check_files(folder)


# Weights that would be made up


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("lm_head.weight"), ["lack lm_head.weight", "another head"]),
        (without_layer, ["lack model.layers.1.input_layernorm.weight", "and 6 more", "belongs to these weights"]),
        (lambda w: rename(w, "module.{}".format), ["hold module.lm_head.weight", "'module.'", "without the wrapper"]),
        (lambda w: w.update({ATTENTION: w[ATTENTION][:-1].clone()}), [f"another shape in {ATTENTION}", "instead of"]),
        (lambda w: w.update({"score.weight": torch.ones(1, 2)}), ["hold score.weight", "no place", "reward model"]),
        (lambda w: w.update({"x.lora_A.weight": torch.ones(2)}), ["hold x.lora_A.weight", "merge"]),
        (lambda w: w[ATTENTION][0, 0].fill_(float("nan")), ["1 of", "NaN or infinite", ATTENTION]),
        (lambda w: w[ATTENTION].fill_(-float("inf")), ["NaN or infinite", ATTENTION]),
    ],
    ids=["head", "layer", "prefix", "shape", "reward", "adapter", "nan", "inf"],
)
def test_weights_that_are_not_the_models_are_named(
    folder: Path, change: Callable[[Weights], object], said: list[str]
) -> None:
    spoil(folder, change)
    message = refused(folder)
    for part in said:
        assert part in message
    assert str(folder) in message


def test_what_is_known_to_be_left_out_or_left_over_passes(folder: Path, tiny_llama: Any, tmp_path: Path) -> None:
    spoil(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_model(str(folder), CPU, torch.float32)
    check_files(folder)
    tied = tmp_path / "tied"
    tiny_llama(tied=True).save_pretrained(tied)  # the head is not in the file
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    load_model(str(tied), CPU, torch.float32)
    check_files(tied)


def test_large_numbers_are_numbers(folder: Path) -> None:
    """The sum of these is infinite in fp32, and each of them finite."""
    spoil(folder, lambda w: w["model.layers.1.mlp.up_proj.weight"].fill_(1e38))
    check_files(folder)
    with pytest.raises(ModelError, match=r"logits that are NaN or infinite"):
        load_model(str(folder), CPU, torch.float32)


# Tokens


def add_tokens(folder: Path, **tokens: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(tokens)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_tokens_that_the_model_has_no_embedding_for(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    while len(tokenizer := add_tokens(folder)) < rows:  # the embedding may have a few more rows than tokens
        tokenizer.add_tokens([f"<spare{i}>" for i in range(rows - len(tokenizer))])
        tokenizer.save_pretrained(folder)
    add_tokens(folder, pad_token="<newpad>")
    with caplog.at_level("WARNING", "real_fast"):
        loaded = load_tokenizer(str(folder))
    assert "'<newpad>'" in caplog.text and loaded.pad_token_id == loaded.eos_token_id < rows
    add_tokens(folder, eos_token="<neweos>")
    with pytest.raises(ModelError, match=rf"'<neweos>', id {rows + 1}, and the model has {rows} embeddings"):
        load_tokenizer(str(folder))


# Files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_pointers_and_cut_files_are_named(folder: Path, name: str) -> None:
    path = folder / name
    if not path.is_file():
        path.write_text(json.dumps({"eos_token_id": [1, 2]}))
    whole = path.read_bytes()
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(ModelError, match=rf"{name} is a git-LFS pointer .*git lfs pull"):
        load_tokenizer(str(folder))
    path.write_bytes(whole[: len(whole) // 2])
    where = "tokenizer in" if name == "tokenizer.json" else name
    with pytest.raises(ModelError, match=rf"{where} .*(cut short|damaged).*download"):
        load_tokenizer(str(folder))


def test_a_tokenizer_of_another_version(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": {"type": "Unheard", "vocab": {}}}))
    with pytest.raises(ModelError, match=r"tokenizer in .*tokenizers \d.* upgrade"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "llama9", "transformers_version": "9.1"}, r"model_type 'llama9'.*written by 9\.1.*upgrade"),
        ({"model_type": None}, "no model_type"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "trust_remote_code"),
        ({"num_hidden_layers": "two"}, r"config\.json cannot be used .*num_hidden_layers"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification, which writes no text"),
        ({"architectures": ["BertForMaskedLM"]}, "causal language model"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_configs_of_other_versions_and_other_kinds(folder: Path, settings: dict[str, Any], said: str) -> None:
    configure(folder, **settings)
    with pytest.raises(ModelError, match=said):
        load_tokenizer(str(folder))


def test_a_setting_that_this_version_does_not_know(folder: Path) -> None:
    configure(folder, hidden_act="swoosh")
    assert "'swoosh'" in refused(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_quantised_models_without_their_package(folder: Path, method: str) -> None:
    configure(folder, quantization_config={"quant_method": method, "bits": 4, "group_size": 128, "load_in_4bit": True})
    with pytest.raises(ModelError, match=rf"quantised \({method}\) and cannot be loaded here .*install"):
        load_model(str(folder), CPU, torch.float32)


def test_a_quantised_model_is_not_trained(tiny_llama: Any) -> None:
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ModelError, match=r"quantised \(fp8\).*cannot be trained"):
        check_trainable(model)


def test_folders_that_lack_something(folder: Path) -> None:
    hidden = {path.name: path.read_bytes() for path in folder.glob("tokenizer*")}
    for name in hidden:
        (folder / name).unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer \(tokenizer\.json\): copy it"):
        load_tokenizer(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"neither model\.safetensors .*pytorch_model\.bin is pickled"):
        load_tokenizer(str(folder))
    (folder / "pytorch_model.bin").rename(folder / "model-Q4.gguf")
    with pytest.raises(ModelError, match="GGUF"):
        load_tokenizer(str(folder))
    (folder / "model-Q4.gguf").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors .*: copy or download"):
        load_tokenizer(str(folder))


def test_a_missing_shard(tiny_llama: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="50KB")
    sorted(tmp_path.glob("model-*"))[1].unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of the \d files .*model-00002-of"):
        load_model(str(tmp_path), CPU, torch.float32)


def test_other_weights_beside_the_models_are_not_read(
    folder: Path, tiny_llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def read(where: Path) -> set[str]:
        with model_alone(where) as alone:
            assert {file.name for file in alone.iterdir()} >= {"config.json", "tokenizer.json"}
            return {file.name for file in alone.glob("*.safetensors*")}

    with model_alone(folder) as alone:
        assert alone == folder
    save_file({"rng:cpu": torch.zeros(2)}, folder / "optimizer.safetensors")
    assert read(folder) == {"model.safetensors"}
    # A single file and several with an index, of other weights: one choice, which is Transformers'.
    tiny_llama(seed=1).save_pretrained(tmp_path / "other", max_shard_size="50KB")
    for file in (tmp_path / "other").glob("*.safetensors*"):
        shutil.copy(file, folder)
    whole = load_file(folder / "model.safetensors")
    assert not caplog.text
    assert torch.equal(load_model(str(folder), CPU, torch.float32).get_parameter(ATTENTION), whole[ATTENTION])
    assert read(folder) == {"model.safetensors"} and weight_names(folder) == whole.keys()
    assert "has both model.safetensors and model.safetensors.index.json: the first is taken" in caplog.text
    check_files(folder)
    (folder / "model.safetensors").unlink()
    with model_alone(folder) as alone:  # vLLM goes by the index, too
        assert alone == folder and len(weight_files(folder)) > 1


def test_the_folder_of_a_run_says_where_its_model_is(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ModelError, match=r"holds no config\.json: it is not a Hugging Face model folder"):
        check_folder(run)
    for place, said in (("checkpoints/step-000010", "not come to its end; its newest"), ("final", "a run's, whose")):
        shutil.copytree(folder, run / place)
        with pytest.raises(ModelError, match=rf"{said} .*{place}"):
            check_folder(run)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_beside_a_model_or_without_weights(folder: Path, whole: bool) -> None:
    config = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if not whole:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
    said = "a whole model's weights too" if whole else r"no adapter_model\.safetensors"
    with pytest.raises(ModelError, match=rf"adapter .*org/base.*{said}"):
        load_tokenizer(str(folder))


def test_an_encoder_under_another_name(tiny_llama: Any, tmp_path: Path) -> None:
    """Nothing in the folder says so: the model is asked."""
    from real_fast.model.load import check_head

    model = tiny_llama()
    model.model.layers[0].register_forward_hook(lambda _module, _inputs, out: out + out.mean(1, keepdim=True))
    with pytest.raises(ModelError, match="see those behind it"):
        check_head(model)


def test_a_mixture_of_experts_says_what_is_not_trained(tiny_llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    check_trainable(model)
    assert not caplog.text
    model.config.num_local_experts, model.config.router_aux_loss_coef = 8, 0.02
    with caplog.at_level("WARNING", "real_fast"):
        check_trainable(model)
    assert "router's load-balancing loss (router_aux_loss_coef in its config.json: 0.02)" in caplog.text
