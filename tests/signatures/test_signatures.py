"""Our calls into PyTorch and vLLM fit the oldest versions that are supported and the installed ones.

What a version takes stands in table.json, read from its files: vLLM 0.26 and PyTorch 2.11 are not installed here.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from real_fast.rollout.vllm_inside import llm_settings
from tests.signatures import record
from tests.signatures.calls import Call, calls, calls_in
from tests.signatures.sources import Sources

TABLE = record.table()
VERSIONS = [(package, version) for package, versions in TABLE.items() for version in versions]


def takes(signature: str) -> inspect.Signature:
    return inspect.signature(eval(f"lambda {signature}: None"))


def problem(call: Call, signatures: list[str]) -> str | None:
    """Why a call does not fit any of the overloads, or None."""
    if not signatures:
        return f"{call.place}: there is no {call.name}"
    why = ""
    for text in signatures:
        signature = takes(text)
        bind = signature.bind_partial if call.open else signature.bind
        try:
            bind(*[None] * call.positional, **dict.fromkeys(call.keywords))
        except TypeError as error:
            why = why or str(error)
        else:
            return None
    return f"{call.place}: {call.name}({signatures[0]}) {why}"


@pytest.mark.parametrize(("package", "version"), VERSIONS)
def test_every_call_fits(package, version):
    known = TABLE[package][version]
    missing = {call.name for call in calls(package)} - known.keys()
    assert not missing, f"new in our code: {sorted(missing)}; see tests/signatures/record.py for both versions"
    found = [p for call in calls(package) if (p := problem(call, known[call.name]))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", record.OLDEST)
def test_the_oldest_version_is_recorded_and_every_name_is_used(package):
    assert record.OLDEST[package] in TABLE[package]
    for version, known in TABLE[package].items():
        assert sorted(known) == record.needed(package), version
        assert all(known.values()), f"{version} lacks {[name for name, found in known.items() if not found]}"


@pytest.mark.parametrize("package", record.OLDEST)
def test_the_installed_version_is_as_recorded(package):
    here = record.installed(package)
    if here is None:
        pytest.skip(f"{package} is not installed")
    version, folder = here
    if version not in TABLE[package]:
        pytest.skip(f"no signatures of {package} {version} are recorded: python -m tests.signatures.record")
    now = record.read(package, folder)
    changed = [name for name, want in TABLE[package][version].items() if now[name] != want]
    assert not changed, f"{package} {version} has other signatures than recorded of {changed}"


def parameters(version: str, name: str) -> set[str]:
    """Names that a vLLM version takes."""
    return {p for text in TABLE["vllm"][version][name] for p in takes(text).parameters}


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("version", TABLE["vllm"])
def test_what_vllm_is_started_with(version, on_cpu):
    """Settings that are put together elsewhere; what vllm.LLM does not know itself, it hands on to EngineArgs."""
    settings = llm_settings(
        dtype=torch.bfloat16,
        max_model_len=64,
        max_num_seqs=8,
        gpu_memory_utilization=0.5,
        processed=True,
        seed=0,
        trust_remote_code=False,
        on_cpu=on_cpu,
    )
    given = {*settings, "enable_sleep_mode", "quantization", "enable_lora", "max_lora_rank", "max_loras"}
    given |= {"max_cpu_loras"}
    assert given <= parameters(version, "vllm.LLM") | parameters(version, "vllm.engine.arg_utils.EngineArgs")


@pytest.mark.parametrize("version", TABLE["vllm"])
def test_what_a_request_is_made_of(version):
    """The keywords that VllmSampling hands to _params under vLLM's names."""
    file = record.FILE.parents[2] / "real_fast" / "rollout" / "vllm_sampling.py"
    text = file.read_text(encoding="utf-8").replace("self._params(", "vllm.SamplingParams(")
    given = {k for call in calls_in(text, "real_fast/rollout/vllm_sampling.py", "vllm") for k in call.keywords}
    assert {"n", "temperature", "max_tokens"} <= given
    given |= {"logprob_token_ids", "logprobs", "flat_logprobs", "detokenize"}
    assert given <= parameters(version, "vllm.SamplingParams")


@pytest.mark.parametrize("version", TABLE["vllm"])
def test_what_vllm_calls_of_ours(version):
    """Functions that stand in for vLLM's, and methods of the weight transfer, take what those take."""
    ours = {
        "lora_ops.bgmv_shrink": ("inputs, weights, out, indices, scaling=...", 5),
        "lora_ops.bgmv_expand_slice": ("inputs, weights, out, indices, start, size, add_inputs=...", 7),
        "WeightTransferEngine.init_transfer_engine": ("init_info", 1),
        "WeightTransferEngine.start_weight_update": ("", 0),
        "WeightTransferEngine.receive_weights": ("update_info", 1),
        "WeightTransferEngine.finish_weight_update": ("", 0),
        "WeightTransferEngine.shutdown": ("", 0),
    }
    for end, (text, count) in ours.items():
        [name] = [n for n in TABLE["vllm"][version] if n.endswith(end)]
        [theirs] = TABLE["vllm"][version][name]
        assert len(takes(theirs).parameters) == len(takes(text).parameters) == count, name
        assert theirs.count("=...") == text.count("=..."), name
    assert "weights_iterator" in parameters(version, "vllm.v1.worker.gpu_model_runner.GPUModelRunner.reload_weights")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("torch.mm(a, b, out_type=c)", "unexpected keyword"),
        ("torch.mm(a, b, c, d)", "too many positional"),
        ("torch.mm(a)", "missing a required argument"),
        ("torch.cuda.mem_get_inf(a)", "there is no"),
        ("torch.distributed.fsdp.fully_shard(a, mesh=m, reshard=True)", "unexpected keyword"),
        ("torch.mm(*both, out_type=c)", "unexpected keyword"),
    ],
)
def test_a_wrong_call_is_found(line, reason):
    known = TABLE["torch"]["2.11.0"]
    [call] = calls_in(f"import torch\n{line}", "x.py", "torch")
    assert reason in (problem(call, known.get(call.name, [])) or "")


def test_calls_are_found_however_a_name_is_imported():
    text = """
import torch.distributed as dist
from torch.nn.functional import pad as padded
from torch import nn
def f():
    from torch import mm
    dist.new_group([0]); padded(x, (1, 0)); nn.utils.clip_grad_norm_(*a); mm(a, b, out=c); other.mm(d)
"""
    found = {c.name: (c.positional, c.keywords, c.open) for c in calls_in(text, "x.py", "torch")}
    assert found == {
        "torch.distributed.new_group": (1, (), False),
        "torch.nn.functional.pad": (2, (), False),
        "torch.nn.utils.clip_grad_norm_": (0, (), True),
        "torch.mm": (2, ("out",), False),
    }


def test_signatures_are_read_through_imports_bases_and_overloads(tmp_path: Path):
    package = tmp_path / "p"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text('from .sub import A as B\nfrom .sub.c import *\nLAZY = {"L": ".sub.c:C"}\n')
    (package / "sub" / "__init__.py").write_text("from p.sub.c import C\nclass A(C):\n    def go(self, *, k): ...\n")
    (package / "sub" / "c.py").write_text(
        "class C:\n    def __init__(self, a, b=1): ...\n    def on(self, x, /, *y, **z): ...\n"
        "    @staticmethod\n    def make(q): ...\n"
        "class D:\n    late: int = 1\n    first: str\n"
        "if x:\n    pass\nelse:\n    @overload\n    def f(a): ...\n    @overload\n    def f(b, c): ...\n"
        "    def f(*a): ...\n"
    )
    sources = Sources(tmp_path)
    assert sources.signatures("p.B") == ["a, b=..."] == sources.signatures("p.L")
    assert sources.signatures("p.B.go") == ["*, k"]
    assert sources.signatures("p.B.on") == ["x, /, *y, **z"]
    assert sources.signatures("p.B.make") == ["q"]
    assert sources.signatures("p.D") == ["first, late=..."]
    assert sources.signatures("p.f") == ["a", "b, c"]
    assert sources.signatures("p.nothing") == []


def test_a_changed_signature_is_found(monkeypatch):
    now = dict(TABLE["torch"]["2.11.0"], **{"torch.mm": ["input, mat2"]})
    monkeypatch.setattr(record, "installed", lambda _: ("2.11.0", Path("nowhere")))
    monkeypatch.setattr(record, "read", lambda *_: now)
    with pytest.raises(AssertionError, match=r"other signatures than recorded of \['torch.mm'\]"):
        test_the_installed_version_is_as_recorded("torch")
