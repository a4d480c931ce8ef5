"""The command that evaluates a judge on a file or a dataset:

python -m real_fast.evaluate --model runs/x/final --data bench.jsonl --output runs/x/eval
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from real_fast import config as configs
from real_fast.config import EvalConfig, PromptConfig, RolloutConfig, ScaleConfig, cli
from real_fast.data.dataset import Rejected, check_enough_rows, load_rows, write_rejected
from real_fast.data.splits import limit_by_prompt
from real_fast.errors import (
    ConfigError,
    OutputError,
    run_command,
)
from real_fast.evaluation.metrics import table
from real_fast.evaluation.run import evaluate
from real_fast.model import judge_settings
from real_fast.model.load import load_tokenizer
from real_fast.prompt.builder import PromptBuilder
from real_fast.reports import plots
from real_fast.reports.health import evaluation_warnings
from real_fast.rollout.make import load_engine
from real_fast.runs import log
from real_fast.runs.folder import check_writable, writing
from real_fast.runs.progress import progress_bar
from real_fast.score.scale import ScoreScale
from real_fast.utils.jsonio import clean, write_json, write_jsonl

PROG = "real_fast.evaluate"
# As in training: which rows max_rows takes does not depend on the run's seed.
_LIMIT_SEED = 0


@dataclass
class EvaluateConfig:
    """One evaluation.

    Args:
        model: A folder or a model on the Hugging Face hub. Of a folder that real_fast.train wrote, scale, prompt,
            answer and protocol are taken over; flags override them.
        data: A JSONL or Parquet file, or a dataset on the Hugging Face hub.
        split: Split of a hub dataset.
        output: Folder for predictions.jsonl, summary.json, rejected.jsonl and the plots.
        seed: Seed of the sampling and of the intervals.
        overwrite: Replace an earlier evaluation in `output`.
        trust_remote_code: Run Python code that comes with the model.
        max_rows: Evaluate on at most this many rows (whole prompts); 0 for all.
        precision: Number format of the weights: "bf16", "fp32", or "auto", which is what is fast here.
        device: "auto" takes CUDA where there is one.
        renormalize: Softmax over the score tokens alone instead of over the whole vocabulary.
        scale: The score scale.
        prompt: How a row becomes a prompt.
        rollout: Sampling of feedback: engine, max_tokens, top_p, answer, and the engine's limits are used.
        eval: The protocol, how many feedbacks, how warm, how many resamples.
    """

    model: str = ""
    data: str = ""
    split: str = "test"
    output: str = ""
    seed: int = 0
    overwrite: bool = False
    trust_remote_code: bool = False
    max_rows: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    renormalize: bool = False
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rollout: RolloutConfig = field(
        default_factory=lambda: RolloutConfig(gpu_memory_utilization=judge_settings.GPU_SHARE)
    )
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
    """Parse the command line; what the model's folder says about judging comes first, so flags win."""
    config: EvaluateConfig = judge_settings.parse(EvaluateConfig, PROG, "Evaluate a judge.", argv)
    return config


def prepare_output(folder: Path, overwrite: bool) -> None:
    """Make the folder and try to write to it, before anything slow starts.

    Raises:
        OutputError: It holds an evaluation, and `overwrite` is off; or it cannot be written to.
    """
    if (folder / "summary.json").exists() and not overwrite:
        raise OutputError(f"output {folder} already holds a summary.json: take another --output, or --overwrite")
    check_writable(folder)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate as configured, write the files and return the summary. Raises :class:`UserError`."""
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
    check_enough_rows(rows, 1, config.data, rejected)
    rows = limit_by_prompt(rows, config.max_rows, _LIMIT_SEED)

    engine = load_engine(full, tokenizer, scale)
    try:
        with progress_bar("evaluate", len(rows), "row") as bar:
            result = evaluate(
                engine, rows, scale, config.eval, config.rollout, config.seed, bar.update, config.renormalize
            )
    finally:
        engine.close()

    about = {
        "model": config.model,
        "data": config.data,
        "split": config.split,
        "engine": engine.name,
        "rejected": len(rejected),
    }
    summary: dict[str, Any] = clean({**about, **result.summary})
    with writing(folder):
        cli.dump(config, folder / "config.yaml")
        write_jsonl(folder / "predictions.jsonl", result.predictions)
        name = Path(config.data).name
        plots.before_after({name: result.predictions}, folder / "scatter.png")
        plots.calibration_plot({name: result.predictions}, folder / "calibration.png")
        write_json(folder / "summary.json", summary)  # last: it marks a complete evaluation
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 2 for a mistake of the user's, 130 for Ctrl-C."""
    log.set_up()
    return run_command(PROG, lambda: _main(argv), "stopped before the end: no evaluation was written")


def _main(argv: Sequence[str] | None) -> int:
    config = parse(list(sys.argv[1:] if argv is None else argv))
    summary = run(config)
    print(table(summary))
    for warning in evaluation_warnings(summary):
        print(f"warning: {warning}")
    if summary["rejected"]:
        print(f"{summary['rejected']} records were not used: see {config.output}/rejected.jsonl")
    print(f"written to {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
