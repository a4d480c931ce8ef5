"""What vLLM's bookkeeping costs, and its tokens per second: ``python -m benchmarks.vllm_host``.

The bookkeeping is all of a generation but the model's forward passes: scheduling, sampling, log-probabilities, texts,
and our own reading of samples. On a model so small, with so few tokens in its vocabulary, hardly anything else is left;
tokens per second are SmolLM2's.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import append
from real_fast.model.load import load_tokenizer, resolve_model
from real_fast.rollout.vllm_engine import VllmEngine
from real_fast.score.scale import ScoreScale
from real_fast.types import SamplingParams

K, ROUNDS = 8, 3


@dataclass(frozen=True)
class Case:
    """What is sampled: `tokens` of each of K samples of `prompts` prompts; and whether the bookkeeping is measured."""

    name: str
    folder: Path
    tokenizer: Any
    dtype: torch.dtype
    prompts: int
    tokens: int
    bookkeeping: bool


def small_model(folder: Path) -> Any:
    """A random Llama over one token a byte; returns its tokenizer."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(BPE({"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


class Clock:
    """Adds up the seconds inside a method."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds, inner = 0.0, getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(owner, name, timed)


class Steps:
    """Log-probabilities as a dictionary a step, read as flat ones are."""

    def __init__(self, steps: list[Any]) -> None:
        self.start_indices, self.end_indices = range(len(steps)), range(1, len(steps) + 1)
        self.token_ids = self.logprobs = self
        self.steps = steps

    def index(self, token: int, start: int, _end: int) -> tuple[int, int]:
        """Where a token's stands."""
        return start, token

    def __getitem__(self, at: tuple[int, int]) -> float:
        return float(self.steps[at[0]][at[1]].logprob)


class Earlier(VllmEngine):
    """The bookkeeping that there was: a dictionary a step, all of its tokens spelled, score tokens at every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self._llm.llm_engine.output_processor.add_request  # ours, which has the class's behind it

    def _params(self, score_tokens: bool, **kwargs: Any) -> Any:
        from vllm import SamplingParams as Params

        return Params(logprob_token_ids=list(self.scale.score_ids), **kwargs)

    def _run(self, prompts: Any, params: Any) -> Any:
        outputs = super()._run(prompts, params)
        for output in outputs:
            for completion in output.outputs:
                completion.logprobs = Steps(completion.logprobs)
        return outputs


VARIANTS: dict[str, tuple[type[VllmEngine], bool]] = {
    "earlier": (Earlier, True),
    "ours": (VllmEngine, True),
    "ours, scores not read": (VllmEngine, False),
}


def measure(kind: type[VllmEngine], scores: bool, case: Case) -> dict[str, tuple[float, str]]:
    """The best of some rounds: microseconds of a token's bookkeeping, or tokens per second."""
    scale = ScoreScale.from_tokenizer(case.tokenizer, [1, 2, 3, 4, 5], "So the overall score is ")
    engine = kind(
        case.folder, case.tokenizer, scale, dtype=case.dtype, max_model_len=512, max_num_seqs=K * case.prompts
    )
    texts = [f"Name five fruits, attempt {i}: apple, pear, plum, fig, kiwi. Feedback:" for i in range(case.prompts)]
    ids = [case.tokenizer.encode(text) for text in texts]
    sampling = SamplingParams(n=K, max_tokens=case.tokens, seed=1, scores=scores)
    forward = Clock(engine._llm.llm_engine.engine_core.engine_core.model_executor, "execute_model")
    found: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        forward.seconds, started = 0.0, time.perf_counter()
        groups = engine.generate(ids, sampling)
        seconds = time.perf_counter() - started
        sampled = sum(len(r.sampled_ids) for group in groups for r in group)
        found.append((sampled / seconds, 1e6 * (seconds - forward.seconds) / sampled))
    engine.close()
    if case.bookkeeping:
        return {"host_us": (min(f[1] for f in found), "us")}
    return {"tokens_per_s": (max(f[0] for f in found), "1/s")}


def main() -> None:
    """Measure, and append to the CSV."""
    with tempfile.TemporaryDirectory() as folder:
        real = resolve_model("smollm2-135m"), load_tokenizer("smollm2-135m")
        cases = (
            Case("1 layer, 258 tokens", Path(folder), small_model(Path(folder)), torch.float32, 8, 160, True),
            Case("SmolLM2-135M", *real, torch.bfloat16, 2, 64, False),
        )
        for case in cases:
            for name, (kind, scores) in VARIANTS.items():
                values = measure(kind, scores, case)
                append("vllm", case.name, name, f"K={K} prompts={case.prompts} R={case.tokens}", values)
                print(case.name, name, *(f"{value:.1f} {unit}" for value, unit in values.values()))


if __name__ == "__main__":
    main()
