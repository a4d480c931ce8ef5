"""What is read and shown: templates reach texts alone, nothing is unpickled, no secret is written, no page runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from real_fast.config import Config, PromptConfig, RolloutConfig, cli
from real_fast.config.validation import check_url
from real_fast.errors import ConfigError, ModelError, PromptError, UserError, run_command
from real_fast.model.folder import check_folder
from real_fast.model.judge_settings import trained_settings
from real_fast.prompt.builder import PromptBuilder
from real_fast.reports import html
from real_fast.runs import log
from real_fast.score.scale import ScoreScale
from real_fast.types import JudgeTexts
from real_fast.utils.secret import masked
from tests.helpers import flags

ROOT = Path(__file__).resolve().parents[1]
ROW = JudgeTexts("Name a fruit.", "An apple.", "Is it one?", "", extra={"x": "more", "items": "field"})
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}

SECRET = "s3cr3tplantedvalue"
PLANTED = {
    "HF_TOKEN": f"hf_{SECRET}0123456789",
    "WANDB_API_KEY": f"{SECRET}wandb",
    "OPENAI_API_KEY": f"sk-{SECRET}",
    "MY_PASSWORD": f"{SECRET}pw",
    "AWS_SECRET_ACCESS_KEY": f"{SECRET}aws",
}


@pytest.fixture
def build(tmp_path: Path, small_tokenizer: Any, scale: ScoreScale) -> Callable[..., PromptBuilder]:
    def make(source: str, ending: str = ".jinja", tokenizer: Any = small_tokenizer) -> PromptBuilder:
        path = tmp_path / f"template{ending}"
        path.write_text(source)
        return PromptBuilder(PromptConfig(template=str(path)), tokenizer, scale)

    return make


# Templates


@pytest.mark.parametrize(
    "attack",
    [
        "{{ response.__class__ }}",
        "{{ response.__class__.__mro__[1].__subclasses__() }}",
        "{{ response['__class__'] }}",
        "{{ response|attr('__class__') }}",
        "{{ ''|attr('format')('{0.__class__}') }}{{ '{0.__class__.__init__}'.format(response) }}",
        "{% set f = '{0.__class__}'.format %}{{ f(response) }}",
        "{{ ['{0.__class__}']|map('format', response)|list }}{{ '{0.__class__}'|attr('format_map')({}) }}",
        "{{ extra.__class__ }}",
        "{{ extra._fields }}",
        "{{ extra.__getitem__.__func__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ scores.append('9') }}",
        "{{ scores.clear() }}",
        "{% include '/etc/hostname' %}",
        "{% include 'template.jinja' %}",
        "{% import '/etc/hostname' as x %}",
        "{% from '../secret' import x %}",
        "{% extends '/etc/hostname' %}",
        "{{ range(10**9)|list }}",
        "{% for i in range(10**9) %}.{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ [[1]|map(attribute='__class__')|list] }}",
        "{{ response.encode().__reduce__ }}",
    ],
)
def test_a_jinja_template_reaches_nothing_but_texts(attack: str, build: Callable[..., PromptBuilder]) -> None:
    """It is refused, at the latest on the first row, or gives nothing of what it was after."""
    try:
        text = build(attack + "{{ response }}").text(ROW)
    except UserError as error:
        assert "template" in str(error)
        return
    assert not re.search(r"<class|<function|<built-in|<bound|object at|uid=|__", text), text


@pytest.mark.parametrize(
    "attack",
    ["{{ 'x' * 10**18 }}", "{{ '%999999999999999999s' % 'x' }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"],
)
def test_a_template_that_asks_for_more_memory_than_there_is(attack: str, build: Callable[..., PromptBuilder]) -> None:
    with pytest.raises(PromptError, match=r"(Memory|Overflow|Value|Recursion)Error"):
        build(attack + "{{ response }}")


@pytest.mark.parametrize(
    "attack",
    [
        "{response.__class__}",
        "{response[0]}",
        "{response.__class__.__mro__[1]}",
        "{scores[0]}",
        "{0}",
        "{}",
        "{response!r}",
        "{response:>99999999999}",
        "{response:{phrase}}",
        "{extra.__class__}",
        "{extra.x.__class__}",
        "{extra[x]}",
        "{extra}",
        "{phrase.__init__}",
    ],
)
def test_a_txt_template_reaches_neither_attributes_nor_items(attack: str, build: Callable[..., PromptBuilder]) -> None:
    with pytest.raises(PromptError):
        build(attack + " {response}", ".txt").text(ROW)
    assert build("{extra.items}|{response}", ".txt").text(ROW) == "field|An apple."


@pytest.mark.parametrize(
    "attack",
    [
        "{% include '/etc/hostname' %}",
        "{% include 'secret.txt' %}",
        "{% import 'secret.txt' as x %}{{ x }}",
        "{% extends 'secret.txt' %}",
        "{{ messages.__class__.__mro__ }}{{ lipsum.__globals__.os }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ range(10**9)|list }}",
        "{{ 'x' * 10**18 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ tojson.__globals__ }}{{ strftime_now.__globals__ }}",
    ],
)
def test_a_models_chat_template_reads_no_file(
    attack: str, build: Callable[..., PromptBuilder], small_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    import copy

    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("planted")
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.chat_template = attack + "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    try:
        text = build("{{ response }}", tokenizer=tokenizer).chat(ROW)
    except UserError as error:
        assert "chat template" in str(error)
        return
    assert "planted" not in text and not re.search(r"<class|<function|<module|<built-in", text), text


def test_a_template_that_loops_for_ever_can_be_interrupted(tmp_path: Path, tiny_judge: Path) -> None:
    """No limit is set to how long a template takes: Ctrl-C ends it, with nothing begun."""
    (tmp_path / "t.jinja").write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}{{ response }}"
    )
    command = flags(tiny_judge, tmp_path / "run", "--prompt.template", str(tmp_path / "t.jinja"))
    child = subprocess.Popen(
        [sys.executable, "-c", _LOOPS, *command], cwd=ROOT, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "rendering\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and "stopped" in errors, errors
    assert not (tmp_path / "run" / "config.yaml").exists()


_LOOPS = """
import sys
from real_fast.prompt.template import Template
render = Template.render
def said(self, row):
    print("rendering", flush=True)
    return render(self, row)
Template.render = said
from real_fast.train import main
sys.exit(main(sys.argv[1:]))
"""


# Models and settings


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "model.pkl"])
def test_a_folder_with_pickled_weights_alone_is_refused(name: str, tmp_path: Path, tiny_judge: Path) -> None:
    for file in tiny_judge.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelError, match=rf"{re.escape(name)} is pickled"):
        check_folder(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "my_own"])
def test_a_models_own_code_is_not_run(kind: str, tmp_path: Path, tiny_judge: Path) -> None:
    for file in tiny_judge.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {n: "code.X" for n in ("AutoConfig", "AutoModelForCausalLM")}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["code.X", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    from real_fast.model.load import load_model, load_tokenizer

    loads = (load_tokenizer, lambda path: load_model(path, torch.device("cpu"), torch.float32))
    for load in loads:
        try:
            load(str(tmp_path))
        except UserError as error:
            assert "own code" in str(error)
    assert not ran.exists()
    if kind == "my_own":
        with pytest.raises(ModelError, match="own code"):
            check_folder(tmp_path)


@pytest.mark.parametrize("template", ["/etc/hostname", "../secret.txt", "secret.txt", "a/../../secret.jinja", 7])
def test_a_model_names_no_file_but_its_own_as_template(template: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("{response} planted")
    monkeypatch.chdir(tmp_path)
    (folder / "real_fast.json").write_text(json.dumps({"prompt": {"template": template}}))
    with pytest.raises(ConfigError, match="no file beside it"):
        trained_settings(str(folder))
    (folder / "secret.txt").write_text("{response}")
    (folder / "real_fast.json").write_text(json.dumps({"prompt": {"template": "secret.txt"}}))
    assert trained_settings(str(folder))["prompt"]["template"] == str(folder / "secret.txt")


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch RAN']",
        "!!python/name:os.system",
        "!!python/object/new:subprocess.Popen [[touch, RAN]]",
        "!!python/tuple [1, 2]",
        "!include /etc/hostname",
        "!ENV ${HOME}",
    ],
)
def test_settings_have_no_tags(tag: str, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(f"model: {tag}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        cli.load(tmp_path / "c.yaml")
    with pytest.raises(SystemExit):
        cli.parse(Config, "real-fast train", ["--data", f"{{train: {tag}}}"])
    assert not (tmp_path / "RAN").exists() and "error" in capsys.readouterr().err


def test_no_name_of_a_pickle_or_an_unsafe_yaml_reader_stands_in_the_code() -> None:
    """What would unpickle or run what it reads; gloo's objects between the ranks of one run are PyTorch's own."""
    unsafe = r"\b(pickle|marshal|shelve|dill|cloudpickle|joblib)\b\.|torch\.load|yaml\.(load|full_load|unsafe_load)\b"
    unsafe += r"|allow_pickle=True|\beval\(|\bexec\(|weights_only"
    for file in sorted((ROOT / "real_fast").rglob("*.py")):
        found = [line for line in file.read_text().splitlines() if re.search(unsafe, line.partition("#")[0])]
        found = [line for line in found if "_dump_snapshot" not in line and ".eval(" not in line]
        assert not found, f"{file}: {found}"


_WALK = """
import json, sys
opened, unpickled = [], []
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        opened.append(args[0] if isinstance(args[0], str) else args[0].decode(errors="replace"))
    elif event in ("pickle.find_class", "marshal.loads", "marshal.load"):
        import traceback
        unpickled.append([event, str(args)[:80], [f.filename for f in traceback.extract_stack()]])
import torch, transformers, matplotlib.figure, datasets
import real_fast.train, real_fast.evaluate, real_fast.judge, real_fast.compare
sys.addaudithook(hook)
folder, model, calls = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
from real_fast.commands import main
status = [main(call) for call in calls]
json.dump({"opened": opened, "unpickled": unpickled, "status": status}, open(folder + "/walk.json", "w"))
"""


@pytest.mark.e2e
def test_from_training_to_judging_nothing_is_unpickled_and_no_secret_written(tmp_path: Path, tiny_judge: Path) -> None:
    """A whole run, its resume, an evaluation and a judge, with every file that is opened and everything unpickled."""
    run = tmp_path / "run"
    few = ["--train.steps", "2", "--save.every", "1", "--warmup.steps", "1", "--eval.on_start", "false"]
    train = ["train", *flags(tiny_judge, run, *few)]
    few += ["--report_to", "tensorboard"] if importlib.util.find_spec("tensorboard") else []
    rows, engine = str(tiny_judge / "eval.jsonl"), ["--rollout.engine", "transformers"]
    calls = [
        train,
        [*train, "--resume", "--train.steps", "3"],
        [
            "evaluate",
            "--model",
            str(run / "final"),
            "--data",
            rows,
            "--output",
            str(run / "e"),
            "--max_rows",
            "4",
            *engine,
        ],
        ["judge", "--model", str(run / "final"), "--data", rows, "--renormalize", "true", *engine],
        ["compare", str(run)],
    ]
    done = subprocess.run(
        [sys.executable, "-c", _WALK, str(tmp_path), str(tiny_judge), json.dumps(calls)],
        cwd=tmp_path, env=ENVIRONMENT | PLANTED, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    walk = json.loads((tmp_path / "walk.json").read_text())
    assert walk["status"] == [0] * len(calls), done.stderr[-2000:]
    found = [(event, what) for event, what, stack in walk["unpickled"] if event == "pickle.find_class"]
    assert not found, found
    ours = [path for path in walk["opened"] if path.startswith((str(tmp_path), str(tiny_judge)))]
    assert any(path.endswith("model.safetensors") for path in ours) and any("trainer_state" in path for path in ours)
    pickled = [path for path in ours if re.search(r"\.(bin|pt|pth|ckpt|pkl|pickle|npy|npz|joblib|dill)$", path)]
    assert not pickled, pickled
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "report.html", "summary.json", "metrics.jsonl"} <= {path.name for path in files}
    assert SECRET not in done.stdout + done.stderr
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


# The report


class _Page(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


HOSTILE = (
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</pre></td></table><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)><use href="data:image/svg+xml,x"/></svg>',
    "javascript:alert(1)",
    "<a href='javascript:alert(1)'>x</a>",
    "<iframe srcdoc='<script>1</script>'></iframe>",
    "<meta http-equiv=refresh content='0;url=https://x.y'>",
    "<base href=//x.y>",
    "<form action=https://x.y><input name=a></form>",
    "<link rel=stylesheet href=https://x.y>",
    "<!--",
    "<style>@import 'https://x.y'</style>",
    "\u202e<b>\x00\ud800",
    "{{ 7 * 7 }}{% raw %}",
)


def test_whatever_data_holds_is_text_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("\n".join(HOSTILE).encode(errors="replace").decode())
    (tmp_path / "training.png").write_bytes(b"png")
    evaluation = {"n": 2, "pearson": 0.5, "benchmarks": {text: {"n": 1} for text in HOSTILE}}
    summary = {"model": HOSTILE[0], "method": HOSTILE[1], "steps": HOSTILE[2], "train_rows": 1, "seed": 0} | {
        "rejected_rows": 0, "skipped_steps": 0, "eval": {HOSTILE[0]: evaluation}, "x": list(HOSTILE),
    }  # fmt: skip
    rows = [{"id": text, "label": 1.0, "prediction": 2.0, "feedback": [text]} for text in HOSTILE]
    rollouts = [
        {"step": 1, "id": t, "label": 1.0, "expected_score": 1.0, "reward": None, "advantage": None, "text": t}
        | {"distribution": {t: 0.5}}
        for t in HOSTILE
    ]
    html.write(tmp_path, summary, [], rows, rollouts)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
    usual = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "th", "td", "img", "pre"}
    assert {tag for tag, _ in page.tags} == usual
    assert {name for _, attributes in page.tags for name in attributes} <= {
        "lang", "charset", "http-equiv", "content", "class", "alt", "src",
    }  # fmt: skip
    assert all(a["src"].startswith("data:image/png;base64,") for t, a in page.tags if t == "img")  # type: ignore[union-attr]
    assert "&lt;script&gt;" in text and "49" not in re.findall(r"\{\{.*?\}\}|49", text)


def test_the_report_stands_under_a_policy_that_its_own_style_meets(tmp_path: Path) -> None:
    import base64
    import hashlib

    summary = {"model": "m", "method": "real", "steps": 1, "train_rows": 1, "seed": 0, "rejected_rows": 0}
    html.write(tmp_path, summary | {"skipped_steps": 0, "eval": {}}, [], [], [])
    text = (tmp_path / "report.html").read_text()
    head = text.partition("<title>")[0]
    [policy] = [a["content"] or "" for t, a in _Page(head).tags if a.get("http-equiv") == "Content-Security-Policy"]
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert parts == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert "style=" not in text


# Secrets


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{SECRET}@127.0.0.1:8000",
        f"http://:{SECRET}@127.0.0.1:8000",
        f"http://{SECRET}@127.0.0.1:8000",
        f"http://user:pa/{SECRET}@127.0.0.1:8000",
        f"http://user:{SECRET}@127.0.0.1:port",
        f"http://127.0.0.1:8000?api_key={SECRET}",
        f"http://127.0.0.1:8000/v1?token={SECRET}#x",
        f"http://127.0.0.1:8000/#token={SECRET}",
        f"ftp://user:{SECRET}@host",
    ],
)
@pytest.mark.parametrize("engine", ["vllm-server", "transformers"])
def test_an_address_with_a_password_is_refused_and_not_repeated(engine: Any, url: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.url") as caught:
        check_url(RolloutConfig(engine=engine, url=url))
    assert SECRET not in str(caught.value) and "://" in str(caught.value)


def test_messages_are_masked_and_nothing_else_of_them_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHORT_TOKEN", "word")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    text = f"a word of {PLANTED['HF_TOKEN']} at https://u:{SECRET}@h/p?key={SECRET} falsefalse: docs/a.md?b"
    assert masked(text) == "a word of *** at https://***@h/p?*** falsefalse: docs/a.md?b"
    for plain in ("http://127.0.0.1:8000/v1", "see a@b.c", "hf_hub_download", "", "100 % of 3 // 4 ? yes"):
        assert masked(plain) == plain


@pytest.mark.parametrize(
    "name",
    [
        "DB_PASS",
        "MYSQL_PWD",
        "PGPASSWORD",
        "SMTP_PW",
        "AWS_CREDENTIALS",
        "REGISTRY_AUTH",
        "SSH_PRIVATE_KEY",
        "HF_TOKEN_1",
        "HF_TOKEN2",
        "MY_TOKEN_OLD",
        "GITHUB_TOKENS",
        "azure_storage_key",
        "GPG_PASSPHRASE",
        "CI_JOB_JWT",
        "API_KEY_2",
    ],
)
def test_the_names_of_secrets_are_known(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "planted-value")
    assert masked("said planted-value") == "said ***"


def test_what_only_looks_like_a_secrets_name_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PWD", "OLDPWD", "GIT_ASKPASS", "SSH_AUTH_SOCK", "TOKENIZERS_PARALLELISM", "COMPASS", "MONKEY"):
        monkeypatch.setenv(name, "/plain/folder")
    assert masked("in /plain/folder") == "in /plain/folder"


def test_a_secret_that_begins_with_another_is_masked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "planted-value")
    monkeypatch.setenv("B_TOKEN", "planted-value-longer")
    assert masked("said planted-value-longer") == "said ***"


def test_no_error_and_no_log_shows_a_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)

    def fails() -> int:
        log.logging.getLogger("real_fast.x").warning("a library said %s", PLANTED["WANDB_API_KEY"])
        try:
            raise OSError(f"401 for https://u:{SECRET}@hub/x")
        except OSError as error:
            log.logging.getLogger("real_fast.x").warning("failed", exc_info=True)
            raise ModelError(f"cannot load: {error}, {PLANTED['HF_TOKEN']}") from error

    log.set_up()
    assert run_command("real-fast train", fails, "stopped") == 2
    for flag in (
        ["--model", f"https://u:{SECRET}@h/x", "--seed", f"{PLANTED['OPENAI_API_KEY']}"],
        [f"--{PLANTED['HF_TOKEN']}"],
    ):
        with pytest.raises(SystemExit):
            cli.parse(Config, "real-fast train", flag)
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err and said.err.count("error: ") == 3 and "***" in said.err
