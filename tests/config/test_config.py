from __future__ import annotations

import pytest
import yaml

from real_fast.config import Config, cli
from real_fast.config.commands import COMMANDS
from real_fast.errors import ConfigError
from real_fast.methods.registry import check_config


def parse(*argv):
    return cli.parse(COMMANDS["train"], "real-fast train", list(argv))


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def good(**changes):
    config = Config(model="m", output="o")
    config.data.train = "rows.jsonl"
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        setattr(getattr(config, section) if section else config, name, value)
    return config


def test_command_line_overrides_the_file(tmp_path):
    path = write(tmp_path, "model: a\nrollout:\n  group_size: 4\n  max_tokens: 99\n")
    config = parse(
        "--config", path, "--rollout.group_size", "6", "--data.train", "x.jsonl", "--scale.values", "[1, 2.5]"
    )
    assert (config.model, config.rollout.group_size, config.rollout.max_tokens) == ("a", 6, 99)
    assert config.data.train == "x.jsonl" and config.scale.values == [1, 2.5]


def test_switches_need_no_value():
    assert parse("--resume", "--model", "m").resume and parse("--overwrite").overwrite
    assert not parse("--resume", "false").resume


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--rollout.group_siz", "3"], "rollout.group_siz"),
        (["--rollout.group_size", "many"], "rollout.group_size"),
        (["--rollout.engine", "sglang"], "rollout.engine"),
        (["--optim.lr", "fast"], "optim.lr"),
    ],
)
def test_wrong_flags_are_named_in_one_line(argv, named, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and named in error and len(error) < 600


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rollout: {foo: 1}", "foo"),
        ("modle: x", "modle"),
        ("optim: {lr: [1]}", "lr"),
        ("scale: {values: five}", "values"),
    ],
)
def test_wrong_keys_in_a_file_are_named(tmp_path, text, named, capsys):
    path = write(tmp_path, text)
    with pytest.raises(SystemExit) as stop:
        parse("--config", path)
    assert stop.value.code == 2 and named in capsys.readouterr().err
    with pytest.raises(ConfigError, match=named):
        cli.load(path)


def test_print_config_is_a_config(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--rollout.group_size", "5", "--print-config")
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert cli.load(write(tmp_path, printed)).rollout.group_size == 5


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        parse("--help", "all")
    text = capsys.readouterr().out
    for words in ("rollouts per prompt", "--objective.lam", "default: forced", "Peak learning rate"):
        assert words in text


def test_dump_and_load_round_trip(tmp_path):
    config = good(rollout__group_size=3, data__eval="e.jsonl")
    cli.dump(config, tmp_path / "c.yaml")
    assert cli.load(tmp_path / "c.yaml") == config
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["rollout"]["group_size"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model is not set"),
        ({"output": ""}, "output is not set"),
        ({"data__train": ""}, "data.train is not set"),
        ({"rollout__group_size": 1}, "rollout.group_size is 1.*leave_one_out"),
        ({"rollout__group_size": 0}, "rollout.group_size is 0"),
        ({"rollout__top_p": 0.0}, "rollout.top_p"),
        ({"rollout__temperature": 0.0}, "rollout.temperature"),
        ({"optim__lr": -1.0}, "optim.lr"),
        ({"objective__kl_coef": -0.1}, "objective.kl_coef is -0.1: it must be 0 or more"),
        ({"objective__kl_every": -1}, "objective.kl_every"),
        ({"objective__num_iterations": 0}, "objective.num_iterations is 0: it must be above 0"),
        ({"objective__epsilon": 0.0}, "objective.epsilon is 0.0: it must lie between 0 and 1"),
        ({"objective__epsilon": 1.0}, "objective.epsilon"),
        ({"train__steps": -1}, "train.steps"),
        ({"data__eval_fraction": 1.0}, "data.eval_fraction"),
        ({"scale__values": [1.0]}, "scale.values"),
        ({"scale__values": [1.0, float("inf")]}, "scale.values"),
        ({"scale__phrase": " "}, "scale.phrase"),
        ({"objective__lam": float("nan")}, "objective.lam is nan: it must be a finite number"),
        ({"optim__lr": float("nan")}, "optim.lr is nan"),
        ({"warmup__steps": 1, "warmup__batch_size": 0}, "warmup.batch_size is 0: it must be above 0"),
        ({"debug": True, "resume": True}, "debug makes small runs of its own"),
        ({"rollout__engine": "vllm-server"}, r"rollout\.url is '', .* http://HOST:PORT"),
        ({"rollout__engine": "vllm-server", "rollout__url": "127.0.0.1:8000"}, r"rollout\.url is '127"),
        ({"rollout__engine": "vllm-server", "rollout__url": "http://h:port"}, r"rollout\.url is 'http://h:port'"),
        ({"rollout__engine": "vllm-server", "rollout__url": "http://me:pw@h:1"}, r"rollout\.url is"),
        ({"rollout__url": "http://h:1"}, r"rollout\.engine is auto, which needs no server"),
        ({"method": "reel"}, "method is 'reel': did you mean real"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config(good(**changes))


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "https://engines.local", "http://[::1]:80/", "http://h"])
def test_addresses_of_a_rollout_server(url):
    check_config(good(rollout__engine="vllm-server", rollout__url=url))


def test_one_rollout_is_fine_without_leave_one_out():
    check_config(good(rollout__group_size=1, objective__baseline="mean"))


def test_a_warm_up_of_no_steps_is_not_looked_at():
    check_config(good(warmup__batch_size=0, warmup__lr=0.0))
