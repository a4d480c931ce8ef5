"""The command line of every command: what it takes, what it says of mistakes, and that this comes before PyTorch."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from real_fast.commands import main
from real_fast.config import Config, LoraConfig, cli
from real_fast.config.commands import COMMANDS
from real_fast.config.keys import keys_of
from real_fast.errors import ConfigError
from real_fast.judging.judge import Judge
from real_fast.model.load import resolve_model
from real_fast.prompt.template import template_path


def parse(command, *argv):
    return cli.parse(COMMANDS[command], f"real-fast {command}", list(argv))


def mistake(capsys, *argv):
    """The one line that a command says of a mistake before it ends with status 2."""
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and len(err.splitlines()) == 1, (status, out, err)
    start = f"real-fast {argv[0]}: error: " if argv[0] in COMMANDS else "real-fast: error: "
    assert err.startswith(start), err
    return err.removeprefix(start).strip()


def shown(capsys, *argv):
    """What a command prints before it ends with status 0."""
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    out = capsys.readouterr().out
    assert status == 0
    return out


def test_help_version_and_mistakes_need_neither_pytorch_nor_transformers():
    code = """
import io, sys
from contextlib import redirect_stderr, redirect_stdout
from real_fast.commands import main
from real_fast.config.commands import COMMANDS
for command in COMMANDS:
    for argv in ("--help", "--help all", "--version", "--print_config", "--nonsense 1", "--seed x"):
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            try:
                main([command, *argv.split()])
            except SystemExit:
                pass
print([heavy for heavy in ("torch", "transformers", "scipy", "matplotlib", "datasets", "vllm") if heavy in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout


@pytest.mark.parametrize("module", ["real_fast", *(f"real_fast.{command}" for command in COMMANDS)])
def test_every_module_runs_as_a_command(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("real-fast 0.") and "torch 2." in done.stdout and "transformers 5." in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_all_is_all(command, capsys):
    row = COMMANDS[command]
    short, full = shown(capsys, command, "--help"), shown(capsys, command, "--help", "all")
    assert short.startswith(f"usage: real-fast {command} ") and len(short.splitlines()) < 95
    assert set(row.main) <= set(keys_of(row.settings))
    for name, key in keys_of(row.settings).items():
        assert key.help, f"{name} is not explained"
        assert (f"--{name} " in full or f"--{name}\n" in full) == (not name.startswith(row.unused or "?"))
    assert all(f"--{name}" in short for name in row.main)


def test_help_of_a_section_and_of_a_setting(capsys):
    section = shown(capsys, "train", "--help", "rollout")
    assert "--rollout.group_size N" in section and "--optim.lr" not in section
    assert shown(capsys, "train", "--help", "optim.lr").endswith("Peak learning rate. (default: 1e-06)\n")
    assert "did you mean rollout?" in mistake(capsys, "train", "--help", "rolout")
    assert shown(capsys, "--help", "plan") == shown(capsys, "plan", "--help")
    assert all(command in shown(capsys) for command in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "command is 'trian': did you mean train?"),
        (["train", "--methd", "x"], "--methd is no setting; did you mean --method?"),
        (["train", "--rollout.group_siz", "3"], "did you mean --rollout.group_size?"),
        (["train", "--max_tokens", "3"], "did you mean --prompt.max_tokens or --rollout.max_tokens?"),
        (["train", "--learning_rate", "1"], "did you mean --optim.lr?"),
        (["train", "--num_generations", "1"], "did you mean --rollout.group_size?"),
        (["train", "--train.precision", "bf61"], "it must be one of auto, bf16, fp32; did you mean bf16?"),
        (["train", "--report_to", "wandbb"], "did you mean wandb?"),
        (["train", "--optim.lr", "fast"], "--optim.lr is 'fast': it must be a number"),
        (["train", "--rollout.max_tokens", "3.5"], "--rollout.max_tokens is '3.5': it must be a whole number"),
        (["train", "--scale.values", "one", "2"], "it must be a list, each a number"),
        (["train", "--resume", "maybe"], "'maybe' stands behind --resume, a switch"),
        (["train", "--optim.lr"], "--optim.lr needs a value"),
        (["train", "--optim.lr", "--resume"], "--optim.lr needs a value"),
        (["train", "--rollout", "5"], "rollout is 5: it is a section"),
        (["train", "--rollout", "{max_token: 5}"], "rollout.max_token is no setting; did you mean rollout.max_tokens?"),
        (["train", "extra"], "'extra' stands alone"),
        (["train", "--config", "quikstart"], "did you mean quickstart?"),
        (["train", "--config", "/"], "config / is a folder"),
        (["judge", "--tempereture", "1"], "did you mean --temperature?"),
        (["evaluate", "--optim.lr", "1"], "--optim.lr is no setting"),
        (["compare", "--pool-sedes"], "did you mean --pool_seeds?"),
        (["plan", "--gpu-memroy", "1"], "did you mean --gpu_memory?"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_was_meant(argv, message, capsys):
    assert message in mistake(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("model: a\noptim:\n\tlr: 1\n", 3, "a tab stands here"),
        ("model: a\nmethod: sft\nmodel: b\n", 3, "model is given twice, first in line 1"),
        ("optim:\n  lr: 1\n  eps: 1\n  lr: 2\n", 4, "optim.lr is given twice, first in line 2"),
        ("model: a\nrollout: [1, 2]\n", 2, "rollout is [1, 2]: it is a section"),
        ("model: a\nrollout: fast\n", 2, "rollout is 'fast': it is a section"),
        ("- model: a\n", 1, "this is a list"),
        ("just words\n", 1, "this is a single value"),
        ("model: a\nmodle: b\n", 2, "modle is no setting; did you mean model?"),
        ("rollout:\n  group_size: 4\n  max_token: 3\n", 3, "did you mean rollout.max_tokens?"),
        ("rollout:\n\n  engine: vlm\n", 3, "did you mean vllm?"),
        ("optim:\n  lr: [1]\n", 2, "optim.lr is [1]: it must be a number"),
        ("# a comment\nseed: 1.5\n", 2, "seed is 1.5: it must be a whole number"),
        ("run_name: 2024\n", 1, "run_name is 2024: it must be text (put it into quotes)"),
        ("model: a\nresume: maybe\n", 2, "resume is 'maybe': it must be true or false"),
        ("model: a\noutput: !!python/object:os.system x\n", 2, "is a tag that settings do not have"),
        ("model: !env NAME\n", 1, "is a tag that settings do not have"),
        ("model: a\nscale: {values: [1, 2\n", 3, "this is no YAML"),
        ("model: *unknown\n", 1, "this is no YAML"),
        ("a: &a\n  b: *a\n", 2, "a.b refers to what it stands in"),
        ("model: a\n---\nmodel: b\n", 2, "this is no YAML"),
        ("model: a\n? [x]\n: y\n", 2, "a name is expected here"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_file_and_line(text, line, message, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    found = mistake(capsys, "train", "--config", str(path))
    assert found.startswith(f"{path}:{line}: ") and message in found, found
    with pytest.raises(ConfigError) as error:
        cli.load(path)
    assert str(error.value).startswith(f"{path}:{line}: ")


def test_files_that_are_no_settings(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"model: caf\xe9\n")
    assert "no text in UTF-8" in mistake(capsys, "train", "--config", str(path))
    path.write_bytes(b"PK\x03\x04\x00\x00")
    assert "no text in UTF-8" in mistake(capsys, "train", "--config", str(path))
    assert "there is no such file" in mistake(capsys, "train", "--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "rollout:\n  # nothing here yet\n", "﻿model: ''\n"])
def test_an_empty_file_or_section_says_nothing(text, tmp_path):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert parse("train", "--config", str(tmp_path / "run.yaml")) == Config()


def test_yaml_as_people_write_it(tmp_path):
    path = tmp_path / "run.yaml"
    text = "optim: &b {lr: 1e-5}\nwarmup:\n  <<: *b\n  steps: 3\nrollout.max_tokens: 7\n"
    path.write_text(text, encoding="utf-8")
    config = parse("train", "--config", str(path), "--optim.eps", "1e-7")
    assert (config.optim.lr, config.warmup.lr, config.warmup.steps, config.rollout.max_tokens) == (1e-5, 1e-5, 3, 7)
    assert config.optim.eps == 1e-7


def test_switches_lists_dashes_and_mappings():
    config = parse(
        *(
            "train",
            "--resume",
            "--train.activation_checkpointing",
            "--no-train.shared_prompt",
            "--eval.on_start",
            "false",
        ),
        *("--scale.values", "1", "2", "3", "--report-to", "wandb", "tensorboard", "--rollout.group-size=6"),
        *("--prompt.chat_template_kwargs.enable_thinking", "false", "--rollout", "{max_tokens: 9}"),
    )
    assert config.resume and config.train.activation_checkpointing and not config.train.shared_prompt
    assert (
        not config.eval.on_start and config.scale.values == [1, 2, 3] and config.report_to == ["wandb", "tensorboard"]
    )
    assert (config.rollout.group_size, config.rollout.max_tokens) == (6, 9)
    assert config.prompt.chat_template_kwargs == {"enable_thinking": False}
    assert not parse("train", "--resume", "--no-resume").resume
    assert not parse("train", "--no-overwrite").overwrite
    assert not parse("train", "--train.no-shared_prompt").train.shared_prompt


def test_flags_override_files_wherever_they_stand_and_later_files_earlier_ones(tmp_path):
    for name, text in (("a", "seed: 1\nmodel: a\n"), ("b", "seed: 2\n")):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    assert (parse("train", *files).seed, parse("train", *files).model) == (2, "a")
    assert parse("train", "--seed", "3", *files).seed == 3


def test_names_of_a_mapping_add_to_those_of_the_files_and_of_the_models_folder(tmp_path):
    """A flag for one of them loses none of the others."""
    file = tmp_path / "a.yaml"
    text = "data: {fields: {response: answer}, eval: {a: a.jsonl}}\nprompt: {chat_template_kwargs: {x: 1, y: 1}}\n"
    file.write_text(text, encoding="utf-8")
    flags = ("--data.fields.score", "rating", "--data.eval.b", "b.jsonl", "--prompt.chat_template_kwargs.y", "2")
    config = parse("train", *flags, "--config", str(file))
    assert config.data.fields == {"response": "answer", "score": "rating"}
    assert config.data.eval == {"a": "a.jsonl", "b": "b.jsonl"}
    assert config.prompt.chat_template_kwargs == {"x": 1, "y": 2}
    assert parse("train", "--config", str(file), "--data.eval", "c.jsonl").data.eval == "c.jsonl"
    folder = {"prompt": {"chat_template_kwargs": {"x": 1, "y": 1}}}
    settings = cli.parse(COMMANDS["judge"], "judge", list(flags[4:]), lambda given: folder)
    assert settings.prompt.chat_template_kwargs == {"x": 1, "y": 2}


def test_a_section_that_need_not_be_there(tmp_path, capsys):
    """It is there as soon as a setting of it is, or it says true; null, false and none take it away again."""
    file, later = tmp_path / "run.yaml", tmp_path / "later.yaml"
    file.write_text("train: {lora: {r: 8, targets: [q_proj, v_proj]}}\n", encoding="utf-8")
    later.write_text("train: {lora: {r: 4}}\n", encoding="utf-8")
    run = ("train", "--config", str(file))
    assert parse("train").train.lora is None
    assert parse(*run).train.lora == LoraConfig(r=8, targets=["q_proj", "v_proj"])
    assert parse(*run, "--train.lora.alpha", "4").train.lora == LoraConfig(8, 4.0, targets=["q_proj", "v_proj"])
    assert parse("train", "--train.lora", "true").train.lora == LoraConfig()
    assert parse("train", "--train.lora.targets", "q_proj", "k_proj").train.lora == LoraConfig(
        targets=["q_proj", "k_proj"]
    )
    for off in ("null", "false", "none"):
        assert parse(*run, "--train.lora", off).train.lora is None
    assert parse(*run, "--config", str(later)).train.lora == LoraConfig(r=4, targets=["q_proj", "v_proj"])
    file.write_text("train: {lora: null}\n", encoding="utf-8")
    assert parse(*run).train.lora is None and parse(*run, "--config", str(later)).train.lora == LoraConfig(r=4)
    for config in (parse(*run), parse(*run, "--train.lora", "{}")):
        cli.dump(config, tmp_path / "written.yaml")
        assert cli.load(tmp_path / "written.yaml") == config
    assert "train.lora is 16: it is a section" in mistake(capsys, "train", "--train.lora", "16")
    assert mistake(capsys, "train", "--lora_alpha", "16").endswith(
        "did you mean --train.lora.alpha? (--help lists the settings)"
    )
    assert "--train.lora.r N" in shown(capsys, "train", "--help", "train")


def test_a_setting_has_one_name_and_every_command_knows_the_others(capsys):
    """The judging commands and Judge() share names; each takes train's, and train takes theirs."""
    own = {command: set(keys_of(row.settings)) for command, row in COMMANDS.items()}
    shared = {"n", "temperature", "protocol", "precision", "device", "renormalize", "trust_remote_code", "model"}
    assert shared <= own["evaluate"] & own["judge"] & set(inspect.signature(Judge.__init__).parameters)
    for command in ("evaluate", "judge"):
        config = parse(
            command, "--eval.n", "3", "--train.precision", "fp32", "--objective.renormalize", "--eval.protocol", "tract"
        )
        assert (config.n, config.precision, config.renormalize, config.protocol) == (3, "fp32", True, "tract")
        assert "note: --eval.n is called n here" in capsys.readouterr().err
    for command in ("train", "plan"):
        config = parse(
            command, "--precision", "fp32", "--n", "3", "--device=cpu", "--engine", "vllm", "--max-rows", "5"
        )
        assert (config.train.precision, config.eval.n, config.train.device) == ("fp32", 3, "cpu")
        assert (config.rollout.engine, config.data.max_eval) == ("vllm", 5)
    for command, row in COMMANDS.items():
        assert set(row.other_names.values()) <= own[command] and not set(row.other_names) & own[command]
    unsectioned = {c: {n for n in names if "." not in n} for c, names in own.items()}
    assert "bootstrap" in unsectioned["evaluate"] & unsectioned["compare"]


def test_other_names_work_in_files_too(tmp_path, capsys):
    path = tmp_path / "eval.yaml"
    path.write_text("data: {eval: bench.jsonl, max_eval: 7}\neval: {n: 4, bootstrap: 20}\n", encoding="utf-8")
    found = parse("evaluate", "--config", str(path))
    assert (found.data, found.max_rows, found.n, found.bootstrap) == ("bench.jsonl", 7, 4, 20)
    assert f"note: {path}:2: eval.n is called n here" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_configuration_is_found_by_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("train", "--config", name).model == "smollm2-135m"
    Path("configs").mkdir()
    Path("configs/quickstart.yaml").write_text("model: mine\n", encoding="utf-8")
    assert parse("train", "--config", "configs/quickstart.yaml").model == "mine"


@pytest.mark.parametrize("name", ["paper/qwen3-8b-raft", "configs/paper/qwen3-8b-raft.yaml"])
def test_so_is_a_row_of_the_paper(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert parse("train", "--config", name).method == "raft"
    for wrong in ("qwen3-8b-raft", "other/quickstart", "../configs/quickstart"):
        with pytest.raises(SystemExit):
            parse("train", "--config", wrong)
        assert "there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_print_config_is_what_config_takes(command, tmp_path, capsys):
    printed = shown(capsys, command, "--print_config")
    (tmp_path / "all.yaml").write_text(printed, encoding="utf-8")
    assert parse(command, "--config", str(tmp_path / "all.yaml")) == COMMANDS[command].settings()
    assert yaml.safe_load(printed).keys() == {name.partition(".")[0] for name in keys_of(COMMANDS[command].settings)}


def test_a_folder_with_settings_that_do_not_exist_is_named(tmp_path, capsys):
    (tmp_path / "real_fast.json").write_text(json.dumps({"rollout": {"max_tokens": "many"}}), encoding="utf-8")
    found = mistake(capsys, "judge", "--model", str(tmp_path))
    assert "rollout.max_tokens is 'many': it must be a whole number" in found and "model's folder" in found


def test_names_that_are_nearly_right(tmp_path):
    with pytest.raises(ValueError, match="did you mean short"):
        template_path("shrt")
    with pytest.raises(ValueError, match="did you mean smollm2-135m"):
        resolve_model("smollm-135m")


def test_docs_name_commands_as_they_are_called():
    root = Path(__file__).resolve().parents[2]
    for page in (root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        for command in COMMANDS:
            told = text.replace("`python -m real_fast.train` do", "")
            assert not re.search(rf"python -m real_fast\.{command}\b", told), page.name
