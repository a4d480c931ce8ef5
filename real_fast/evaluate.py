"""Evaluation: sample feedback, read the score distribution, compare with the labels.

A library (:func:`evaluate`, which the trainer calls too) and a command:

    python -m real_fast.evaluate --model runs/x/final --data bench.jsonl --output runs/x/eval
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from tqdm import tqdm

from real_fast import config as configs
from real_fast import plots
from real_fast.config import ConfigError, EvalConfig, PromptConfig, RolloutConfig, ScaleConfig
from real_fast.data import DataError, JudgeRow, Rejected, limit_by_prompt, load_rows, require_rows, write_rejected
from real_fast.jsonio import clean, write_json, write_jsonl
from real_fast.metrics import calibration, summarize, table
from real_fast.model import ModelError, load_model, load_tokenizer, resolve_model
from real_fast.prompt import PromptBuilder, PromptError
from real_fast.rollout.base import Rollout, RolloutEngine, Sampling
from real_fast.rollout.select import make_engine
from real_fast.run_folder import OutputError
from real_fast.scale import ScaleError, ScoreScale

PROG = "real_fast.evaluate"
KNOWN_ERRORS = (ConfigError, DataError, FloatingPointError, ModelError, OutputError, PromptError, ScaleError)
_SEQUENCES_PER_CALL = 64
# As in training: which rows max_rows takes does not depend on the run's seed.
_LIMIT_SEED = 0


@dataclass
class EvalResult:
    """An evaluation: one dictionary a row in `predictions` (in the order of the rows), and their `summary`."""

    predictions: list[dict[str, Any]]
    summary: dict[str, Any]


def evaluate(
    engine: RolloutEngine,
    rows: Sequence[JudgeRow],
    scale: ScoreScale,
    config: EvalConfig,
    rollout: RolloutConfig,
    seed: int,
    progress: Callable[[int], object] | None = None,
    renormalize: bool = False,
) -> EvalResult:
    """Sample ``config.n`` feedbacks a row and predict its score in two ways, side by side.

    RAIL: the expected score y_hat = sum_k k * p_k (arXiv 2603.17145), p the softmax over the whole vocabulary at the
    score's position, averaged over the feedbacks that have one. Decoded: the mean of the scores that the model wrote
    itself. Where there is none, the prediction is None, never a made-up number.

    Args:
        engine: Samples; it decides how many sequences run at a time.
        rows: Rows with their `prompt_ids`.
        scale: The score scale.
        config: n, temperature, resamples.
        rollout: max_tokens, top_p and answer are used.
        seed: The same seed gives the same samples and intervals.
        progress: Called with the number of rows that were just finished.
        renormalize: Divide p by its sum, as training with ``objective.renormalize`` does.

    Returns:
        `predictions` with id, prompt_id, label, prediction (y_hat), distribution ({score text: p}), off_scale_mass
        (1 - sum of p as the model gave it), decoded, feedback (a text, a list of texts for n > 1) and n.
        `summary` with the keys of :func:`real_fast.metrics.summarize` for RAIL and, under ``decoded``, for the written
        scores; off_scale_mass, label_probability and calibration_error (:func:`real_fast.metrics.calibration`);
        mean_length (sampled tokens a feedback), truncated (share of feedbacks cut at max_tokens), not_finite (feedbacks
        whose probabilities are NaN, which count as without a score), tokens_per_second and seconds of the sampling.

    Raises:
        ValueError: No rows, or a row without `prompt_ids`.
    """
    if not rows:
        raise ValueError("there are no rows to evaluate")
    for row in rows:
        if not row.prompt_ids:
            raise ValueError(f"row {row.id!r} has no prompt_ids: build its prompt first")
    rollouts: list[list[Rollout]] = []
    start = time.perf_counter()
    step = max(1, _SEQUENCES_PER_CALL // config.n)
    for at in range(0, len(rows), step):
        some = rows[at : at + step]
        sampling = Sampling(
            n=config.n,
            max_tokens=rollout.max_tokens,
            temperature=config.temperature,
            top_p=rollout.top_p,
            answer=rollout.answer,
            seed=_call_seed(seed, at),
        )
        rollouts.extend(engine.generate([row.prompt_ids for row in some], sampling))
        if progress is not None:
            progress(len(some))
    seconds = time.perf_counter() - start

    predictions = [_predict(row, group, scale, renormalize) for row, group in zip(rows, rollouts, strict=True)]
    flat = [r for group in rollouts for r in group]
    tokens = sum(len(r.sampled_ids) for r in flat)
    summary = _summary(predictions, scale, config.bootstrap, seed) | {
        "mean_length": tokens / len(flat),
        "truncated": sum(r.finish == "length" for r in flat) / len(flat),
        "not_finite": sum(r.has_score and _probabilities(r) is None for r in flat),
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "seconds": seconds,
    }
    return EvalResult(predictions, summary)


def _call_seed(seed: int, at: int) -> int:
    """31-bit seed of the call whose first row is `at`: an engine numbers the prompts of each call from 0."""
    return int(np.random.SeedSequence([seed % 2**32, at]).generate_state(1)[0]) >> 1


def _probabilities(rollout: Rollout) -> NDArray[np.float64] | None:
    """[K] float64 full-softmax probabilities of the scores, None where there is no score or it is NaN."""
    if rollout.score_logprobs is None:
        return None
    p = np.exp(np.asarray(rollout.score_logprobs, dtype=np.float64))
    return p if np.isfinite(p).all() else None


def _predict(row: JudgeRow, rollouts: Sequence[Rollout], scale: ScoreScale, renormalize: bool) -> dict[str, Any]:
    found = [p for p in map(_probabilities, rollouts) if p is not None and (p.sum() > 0 or not renormalize)]
    written = [r.written_score for r in rollouts if r.written_score is not None]
    texts = [r.text for r in rollouts]
    prediction = distribution = off_scale = None
    if found:
        p = np.mean([p / p.sum() for p in found] if renormalize else found, axis=0)
        prediction = float(p @ np.asarray(scale.values))
        distribution = dict(zip(scale.texts, p.tolist(), strict=True))
        off_scale = max(0.0, 1.0 - float(np.mean([p.sum() for p in found])))
    return {
        "id": row.id,
        "prompt_id": row.prompt_id,
        "label": row.label,
        "prediction": prediction,
        "distribution": distribution,
        "off_scale_mass": off_scale,
        "decoded": float(np.mean(written)) if written else None,
        "feedback": texts[0] if len(texts) == 1 else texts,
        "n": len(rollouts),
    }


def _summary(predictions: list[dict[str, Any]], scale: ScoreScale, bootstrap: int, seed: int) -> dict[str, Any]:
    labels = [p["label"] for p in predictions]
    prompts = [p["prompt_id"] for p in predictions]
    scored = [p for p in predictions if p["distribution"] is not None]
    calibrated = calibration(
        [list(p["distribution"].values()) for p in scored], scale.values, [p["label"] for p in scored]
    )
    return {
        **summarize([p["prediction"] for p in predictions], labels, prompts, bootstrap, seed),
        "off_scale_mass": float(np.mean([p["off_scale_mass"] for p in scored])) if scored else None,
        "label_probability": calibrated["label_probability"],
        "calibration_error": calibrated["error"],
        "decoded": summarize([p["decoded"] for p in predictions], labels, prompts, bootstrap, seed),
    }


@dataclass
class EvaluateConfig:
    """One evaluation.

    Args:
        model: A folder or a model on the Hugging Face hub. Of a folder that real_fast.train wrote, scale, prompt and
            answer are taken over; flags override them.
        data: A JSONL or Parquet file, or a dataset on the Hugging Face hub.
        split: Split of a hub dataset.
        output: Folder for predictions.jsonl, summary.json, rejected.jsonl and the plots.
        seed: Seed of the sampling and of the intervals.
        overwrite: Replace an earlier evaluation in `output`.
        trust_remote_code: Run Python code that comes with the model.
        max_rows: Evaluate on at most this many rows (whole prompts); 0 for all.
        precision: Number format of the weights.
        device: "auto" takes CUDA where there is one.
        renormalize: Softmax over the score tokens alone instead of over the whole vocabulary.
        scale: The score scale.
        prompt: How a row becomes a prompt.
        rollout: Sampling of feedback: engine, max_tokens, top_p, answer, and the engine's limits are used.
        eval: How many feedbacks, how warm, how many resamples.
    """

    model: str = ""
    data: str = ""
    split: str = "test"
    output: str = ""
    seed: int = 0
    overwrite: bool = False
    trust_remote_code: bool = False
    max_rows: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    renormalize: bool = False
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def full(self) -> configs.Config:
        """The same settings as a checked training config, which the engines and the data loader read."""
        for key in ("model", "data", "output"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is not set: give --{key} or put it into the config file")
        if self.max_rows < 0:
            raise ConfigError(f"max_rows is {self.max_rows}: it must be 0 or more")
        config = configs.Config(
            model=self.model,
            output=self.output,
            seed=self.seed,
            trust_remote_code=self.trust_remote_code,
            scale=self.scale,
            prompt=self.prompt,
            data=configs.DataConfig(train=self.data, eval=self.data, eval_split=self.split, max_eval=self.max_rows),
            rollout=self.rollout,
            objective=configs.ObjectiveConfig(renormalize=self.renormalize),
            train=configs.TrainConfig(precision=self.precision, device=self.device),
            eval=self.eval,
        )
        config.validate()
        return config


def parse(argv: list[str]) -> EvaluateConfig:
    """Parse the command line; what the model's folder says about scale, prompt and answer comes first, so flags win."""
    first = argparse.ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False)
    first.add_argument("--model")
    first.add_argument("--config")
    known = first.parse_known_args(argv)[0]
    model = known.model
    if model is None and known.config and Path(known.config).is_file():
        try:
            values = yaml.safe_load(Path(known.config).read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError):
            values = None  # the parser below says what is wrong with the file
        model = values.get("model") if isinstance(values, dict) else None
    defaults = _trained_with(Path(model)) if isinstance(model, str) and model else {}
    argv = [*(["--config", json.dumps(defaults)] if defaults else []), *argv]
    config: EvaluateConfig = configs.parse(EvaluateConfig, PROG, "Evaluate a judge.", argv)
    return config


def _trained_with(folder: Path) -> dict[str, Any]:
    """Settings in a folder that the trainer wrote, reduced to those that an evaluation must share with training."""
    path = folder / "real_fast.json"
    if not path.is_file():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        found = {key: dict(saved[key]) for key in ("scale", "prompt", "rollout") if key in saved}
        if "renormalize" in saved.get("objective", {}):
            found["renormalize"] = saved["objective"]["renormalize"]
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not what real_fast.train writes ({error}): mend it or remove it") from error
    template = found.get("prompt", {}).get("template", "")
    if template and (folder / template).is_file():
        found["prompt"]["template"] = str(folder / template)
    if "rollout" in found:  # the engine and its limits belong to the machine, not to the model
        found["rollout"] = {k: v for k, v in found["rollout"].items() if k in ("answer", "max_tokens", "top_p")}
    return found


def prepare_output(folder: Path, overwrite: bool) -> None:
    """Make the folder and try to write to it, before anything slow starts.

    Raises:
        OutputError: It holds an evaluation, and `overwrite` is off; or it cannot be written to.
    """
    if (folder / "summary.json").exists() and not overwrite:
        raise OutputError(f"output {folder} already holds a summary.json: take another --output, or --overwrite")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(b"0")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an OSError (read-only, disk full, ...) into an :class:`OutputError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"output {folder} cannot be written: {error.strerror or error}") from error


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate as configured, write the files and return the summary. Raises one of `KNOWN_ERRORS`."""
    full = config.full()
    folder = Path(config.output).expanduser()
    prepare_output(folder, config.overwrite)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    scale = ScoreScale.from_tokenizer(tokenizer, config.scale.values, config.scale.phrase)
    builder = PromptBuilder(config.prompt, tokenizer, scale)
    rejected: list[Rejected] = []
    rows = load_rows(config.data, config.split, builder, scale, config.prompt.max_tokens, rejected)
    with writing(folder):
        write_rejected(folder / "rejected.jsonl", rejected)
    require_rows(rows, 1, config.data, rejected)
    rows = limit_by_prompt(rows, config.max_rows, _LIMIT_SEED)

    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = load_model(config.model, device, dtype, config.trust_remote_code)
    engine = make_engine(full, model, tokenizer, scale, resolve_model(config.model))
    del model  # vLLM has its own copy
    try:
        with tqdm(total=len(rows), desc="evaluate", unit="row") as bar:
            result = evaluate(
                engine, rows, scale, config.eval, config.rollout, config.seed, bar.update, config.renormalize
            )
    finally:
        engine.close()

    about = {"model": config.model, "data": config.data, "engine": engine.name, "rejected": len(rejected)}
    summary: dict[str, Any] = clean({**about, **result.summary})
    with writing(folder):
        configs.dump(config, folder / "config.yaml")
        write_jsonl(folder / "predictions.jsonl", result.predictions)
        name = Path(config.data).name
        plots.before_after({name: result.predictions}, folder / "scatter.png")
        plots.calibration_plot({name: result.predictions}, folder / "calibration.png")
        write_json(folder / "summary.json", summary)  # last: it marks a complete evaluation
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 2 for a mistake of the user's, 130 for Ctrl-C."""
    try:
        config = parse(list(sys.argv[1:] if argv is None else argv))
        summary = run(config)
    except KNOWN_ERRORS as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before the end: no evaluation was written", file=sys.stderr)
        return 130
    print(table(summary))
    if summary["rejected"]:
        print(f"{summary['rejected']} records were not used: see {config.output}/rejected.jsonl")
    print(f"written to {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
