"""Golden trajectories: a few updates of every method on a tiny seeded model, written down and held to.

``make golden`` runs :func:`record` for every case and writes ``tests/golden/CASE.json``; test_golden.py runs them again
and compares. A change that means to leave the numbers alone must leave the files alone; one that means to change them
rewrites the files and says why.

Everything is made here (model, tokenizer) or generated (``synthetic:train``), in fp32 on the CPU with one thread.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from real_fast.utils.jsonio import read_jsonl

FOLDER = Path(__file__).parent
STEPS = 5

# Settings of all cases; flags of one case follow.
_SETTINGS = """
data: {train: "synthetic:train", eval: "synthetic:eval", max_train: 40, max_eval: 4}
prompt: {template: short, system: Grade.}
rollout: {engine: transformers, prompts_per_step: 3, group_size: 4, max_tokens: 24, check_logprob: 0.01}
supervised: {prompts_per_step: 4, feedbacks_per_prompt: 2}
warmup: {steps: 2, batch_size: 4, lr: 1.0e-3}
optim: {lr: 3.0e-4, lr_warmup_steps: 1, schedule: cosine, eps: 1.0e-3}
train: {steps: 5, precision: fp32, micro_batch_tokens: 1400}
eval: {bootstrap: 10, on_start: false}
save: {every: 0, keep: 1}
"""
_GIVEN = ("--warmup.steps", "0")

CASES: dict[str, tuple[str, ...]] = {
    "sft": ("--method", "sft", *_GIVEN),
    "raft": ("--method", "raft", *_GIVEN),
    "raft-no-feedback": ("--method", "raft", "--supervised.feedback", "none", "--eval.protocol", "raft", *_GIVEN),
    "tract": ("--method", "tract", *_GIVEN),
    "binary_rl": ("--method", "binary_rl"),
    "binary_rl-kl-iterations": (
        "--method", "binary_rl", "--objective.kl_coef", "0.1", "--objective.num_iterations", "2", "--seed", "1",
    ),
    "real": (),
    "real-kl": ("--objective.kl_coef", "0.1"),
    "real-iterations": ("--objective.num_iterations", "2", "--objective.epsilon", "0.01"),
    "real-kl-iterations": (
        "--objective.kl_coef", "0.1", "--objective.num_iterations", "2", "--objective.reward", "reference",
        "--objective.loss_norm", "token_mean",
    ),
    "real-reference-reward": ("--objective.reward", "reference", "--objective.lam", "0.5"),
    "real-token-mean": ("--objective.loss_norm", "token_mean", "--objective.beta", "0.5"),
    "real-separate-prompts": (
        "--train.shared_prompt", "false", "--train.micro_batch_tokens", "6000", "--objective.baseline", "mean",
        "--objective.advantage_clip", "0",
    ),
    "real-engine-reward": ("--objective.reward_from", "engine", "--objective.renormalize", "true"),
}  # fmt: skip

# Of a line of metrics.jsonl: what the update computed, and nothing that depends on the clock.
_KEPT = (
    "loss",
    "reward",
    "grad_norm",
    "learning_rate",
    "advantage_std",
    "kl",
    "score/rmse",
    "score_loss",
    "num_tokens",
    "nll",
)
_KEPT += ("ratio/mean", "clip_ratio/region_mean", "completions/mean_length")


def machine() -> dict[str, str]:
    """What the last bits depend on: the processor and what it can do, and the versions."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        info = [platform.processor()]
    kind = [line for line in info if line.split("\t")[0].strip() in ("cpu family", "model", "model name", "flags")]
    return {
        "cpu": hashlib.sha256("\n".join(kind).encode()).hexdigest()[:16],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def make_model(folder: Path) -> Path:
    """A random Llama with a tokenizer of one token a byte, saved as a Hugging Face folder.

    The vocabulary is small, so that random text now and then ends by itself (TRACT trains on what has ended). Scores
    are likely where they belong, so that the binary reward is not always 0; the weights are large, so that rewards
    differ clearly within a group: its standard deviation divides, and would blow up the rounding of small differences.
    """
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {letter: n for n, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=ByteLevelBPETokenizer(vocab=words, merges=[])._tokenizer,
        bos_token="<s>", eos_token="</s>", pad_token="<pad>",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            initializer_range=0.3,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype=torch.float32,
        )
        model = LlamaForCausalLM(config)
    # What the last layer gives behind the phrase, for one response: scores point that way.
    ids = tokenizer.encode("The response follows the rubric. So the overall score is ")
    with torch.no_grad():
        state = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        for place, letter in enumerate("12345"):
            model.lm_head.weight[words[letter]] += (0.4 + 0.02 * (place % 2)) * state
    model.save_pretrained(folder)
    return folder


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums are then made in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_flags(model: Path, output: Path, *more: str) -> list[str]:
    """The command line of a run with the settings of all cases, and more."""
    settings = output.parent / f"{output.name}.yaml"
    settings.write_text(_SETTINGS, encoding="utf-8")
    return ["--config", str(settings), "--model", str(model), "--output", str(output), *more]


def record(case: str, model: Path, output: Path) -> dict[str, Any]:
    """Run a case and return what the file of it holds.

    Args:
        case: One of :data:`CASES`.
        model: As :func:`make_model` gives it.
        output: Folder of the run, which must not exist.
    """
    from real_fast.train import main

    every_rollout = ("--rollout.log_every", "1", "--rollout.log_prompts", "99")  # changes nothing but what is written
    flags = run_flags(model, output, *every_rollout, *CASES[case])
    with one_thread():
        if main(flags) != 0:
            raise RuntimeError(f"the run {case} failed: real_fast.train {' '.join(flags)}")
    found: dict[str, Any] = {"machine": machine(), "flags": list(CASES[case])}
    stages = {"stage1": output / "stage1", "stage2": output} if case == "tract" else {"run": output}
    for name, folder in stages.items():
        found[name] = {"updates": _updates(folder), "weights": _weights(folder / "final")}
    if case == "tract":
        found["generated"] = _hash((output / "self_generated.jsonl").read_bytes())
    return found


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _updates(run: Path) -> list[dict[str, Any]]:
    """A line per update; `sampled` stands for the texts of its rollouts."""
    texts: dict[int, str] = {}
    for rollout in read_jsonl(run / "rollouts.jsonl"):
        texts[rollout["step"]] = texts.get(rollout["step"], "") + rollout["text"] + "\n"
    return [
        {"phase": m["phase"], "step": m["step"]}
        | {key: value for key, value in m.items() if key in _KEPT or key.startswith("loss/")}
        | ({"sampled": _hash(texts[m["step"]].encode())} if m["phase"] != "warmup" else {})
        for m in read_jsonl(run / "metrics.jsonl")
        if m["phase"] != "eval"
    ]


def _weights(folder: Path) -> dict[str, Any]:
    """A hash of all weights and, for other machines, each tensor's norm and its product with a fixed wave."""
    tensors = dict(sorted(load_file(folder / "model.safetensors").items()))
    digest, parts = hashlib.sha256(), {}
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        flat = tensor.double().flatten()
        wave = torch.cos(torch.arange(len(flat), dtype=torch.float64) * 0.7)
        parts[name] = [float(flat.norm()), float(flat @ wave)]
    return {"sha256": digest.hexdigest(), "norm_and_wave": parts}


_CLIPPED = 0.01  # two tokens of a golden update's 200 and more


def differences(want: dict[str, Any], got: dict[str, Any], relative: float = 1e-5) -> list[str]:
    """What differs, a line each: any bit on the machine that wrote `want`, more than `relative` elsewhere.

    Elsewhere a draw may fall on the other side of a rounding: another token, and so another run from there on. What
    comes behind the first such update is then not compared.
    """
    exact = want["machine"] == got["machine"]
    if not exact:
        want, got = _up_to_another_draw(want, got)
    found: list[str] = []

    def compare(where: str, a: Any, b: Any, scale: float = 0.0) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            if a.keys() != b.keys():
                found.append(f"{where}: {sorted(a.keys() ^ b.keys())} on one side alone")
            for key in sorted(a.keys() & b.keys()):
                compare(f"{where}.{key}", a[key], b[key], _terms(a, key) if "loss" in a else scale)
        elif isinstance(a, list) and isinstance(b, list):
            if len(a) != len(b):
                found.append(f"{where}: {len(a)} entries, now {len(b)}")
            for place, pair in enumerate(zip(a, b, strict=False)):
                compare(f"{where}[{place}]", *pair, a[0] if ".norm_and_wave." in where else 0.0)
        elif exact and ".norm_and_wave." in where:
            pass  # the hash says more
        elif isinstance(a, float) and isinstance(b, float) and not exact:
            # A share of tokens: the ratio of one or two may lie on the clip itself.
            room = _CLIPPED if ".clip_ratio/" in where else relative * scale
            if not math.isclose(a, b, rel_tol=relative, abs_tol=room):
                found.append(f"{where}: {a!r}, now {b!r}")
        elif a != b and (exact or not where.endswith(".sha256")):
            found.append(f"{where}: {a!r}, now {b!r}")

    for stage in sorted(want.keys() - {"machine"}):
        compare(stage, want[stage], got[stage])
    return found


def _up_to_another_draw(want: dict[str, Any], got: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both without what follows from tokens that were sampled differently."""
    want, got = copy.deepcopy(want), copy.deepcopy(got)
    if want.get("generated") != got.get("generated"):  # the second stage's training data
        for side in (want, got):
            del side["generated"], side["stage2"]
    for stage in ("run", "stage1", "stage2"):
        if stage not in want or stage not in got:
            continue
        pairs = zip(want[stage]["updates"], got[stage]["updates"], strict=False)
        place = next((n for n, (a, b) in enumerate(pairs) if a.get("sampled") != b.get("sampled")), None)
        if place is not None:
            for side in (want, got):
                side[stage] = {"updates": side[stage]["updates"][:place]}
    return want, got


def _terms(update: dict[str, Any], key: str) -> float:
    """How large the terms are of which a number is the difference; 0 for one that is no difference.

    A policy gradient's loss is made of log-probabilities of whole rollouts, and k3 of d and expm1(d), about d^2 / 2.
    """
    if key in ("kl", "loss/kl"):
        return math.sqrt(2 * update["kl"])
    if not key.startswith("loss") or "reward" not in update:
        return 0.0
    # No token was computed, and so none has an nll, where all rewards of all groups were alike.
    return (update["nll"] or 0.0) * update["completions/mean_length"]


def main(cases: Sequence[str]) -> int:
    """Write the files of the given cases, or of all; say what changed."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        for case in cases or CASES:
            got = record(case, model, Path(folder) / case)
            file = FOLDER / f"{case}.json"
            changed = differences(json.loads(file.read_text(encoding="utf-8")), got) if file.is_file() else ["new"]
            file.write_text(json.dumps(got, indent=1) + "\n", encoding="utf-8")
            print(f"{file.name}: {'; '.join(changed[:3]) or 'the same'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
