"""The settings of the commands other than train, whose are in schema.py; ``--help`` is made from the docstrings here.

A setting has one name: evaluate, judge and ``Judge()`` call it by the word that train has it under, without the section
that train needs to tell its own apart (``eval.n`` there, ``n`` here). OTHER_NAMES lets each command take the other's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from real_fast.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    ObjectiveConfig,
    PromptConfig,
    RolloutConfig,
    ScaleConfig,
    TrainConfig,
)
from real_fast.config.validation import above, at_least, check_bounds, share
from real_fast.errors import ConfigError

# With no trainer beside it, vLLM gets nearly all of a GPU.
GPU_SHARE = 0.9


def _alone() -> RolloutConfig:
    return RolloutConfig(gpu_memory_utilization=GPU_SHARE)


@dataclass
class EvaluateConfig:
    """One evaluation.

    Args:
        model: A folder or a model on the Hugging Face hub. Of a folder that real-fast train wrote, scale, prompt,
            answer and protocol are taken over; flags override them.
        data: A source, as real-fast train's data.eval: a file, a pattern, a dataset on the Hugging Face hub; or several
            benchmarks, {mt_bench: a.jsonl, flask: b.jsonl} or a list of files, each reported, and their average.
        split: Split of a hub dataset.
        fields: What the records call a field of ours: --fields.response answer, --fields.score ratings.overall.
        max_rejected: Stop where a larger share of a benchmark's records cannot be used; 1 to go on whatever it is.
        output: Folder for predictions.jsonl, summary.json, rejected.jsonl and the plots.
        n: Feedbacks sampled per row; their expected scores are averaged.
        temperature: Sampling temperature of the feedback; 0 for greedy.
        protocol: How a prediction comes about. "real": the score distribution behind the phrase that the model wrote,
            or as rollout.answer says where it wrote none; "tract": the feedback is cut where the phrase begins, and
            the phrase is appended; "raft": no feedback, the score is read right behind the phrase; "decode": the mean
            of the scores that the model wrote itself.
        bootstrap: Resamples (of whole prompts) for the 95 % intervals.
        seed: Seed of the sampling and of the intervals.
        overwrite: Replace an earlier evaluation in `output`.
        trust_remote_code: Run Python code that comes with the model.
        max_rows: Evaluate on at most this many rows of each benchmark (whole prompts); 0 for all.
        precision: Number format of the weights: "bf16", "fp32", or "auto", which is what is fast here.
        device: "auto" takes CUDA where there is one.
        renormalize: Softmax over the score tokens alone instead of over the whole vocabulary.
        scale: The score scale.
        prompt: How a row becomes a prompt.
        rollout: Sampling of feedback: engine, max_tokens, top_p, answer, and the engine's limits are used.
    """

    model: str = ""
    data: dict[str, Any] | list[Any] | str = ""
    split: str = "test"
    fields: dict[str, str] = field(default_factory=dict)
    max_rejected: float = share(0.2)
    output: str = ""
    n: int = above(0, 1)
    temperature: float = at_least(0, 1.0)
    protocol: Literal["real", "tract", "raft", "decode"] = "real"
    bootstrap: int = above(0, 1000)
    seed: int = 0
    overwrite: bool = False
    trust_remote_code: bool = False
    max_rows: int = at_least(0, 0)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    renormalize: bool = False
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rollout: RolloutConfig = field(default_factory=_alone)

    def full(self) -> Config:
        """The same settings as a checked training config, which the engines and the data loader read."""
        for key in ("model", "data", "output"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is not set: give --{key} or put it into the config file")
        check_bounds(self)
        config = Config(
            model=self.model,
            output=self.output,
            seed=self.seed,
            trust_remote_code=self.trust_remote_code,
            scale=self.scale,
            prompt=self.prompt,
            data=DataConfig(
                train=self.data,
                eval=self.data,
                eval_split=self.split,
                fields=self.fields,
                max_eval=self.max_rows,
                max_rejected=self.max_rejected,
            ),
            rollout=self.rollout,
            objective=ObjectiveConfig(renormalize=self.renormalize),
            train=TrainConfig(precision=self.precision, device=self.device),
            eval=EvalConfig(n=self.n, temperature=self.temperature, protocol=self.protocol, bootstrap=self.bootstrap),
        )
        config.validate()
        return config


@dataclass
class JudgeConfig:
    """Grade JSON lines from standard input (or a file); write them to standard output, each with its grade.

    Args:
        model: A folder or a model on the Hugging Face hub. Of a folder that real-fast train wrote, scale, prompt,
            answer and protocol are taken over; flags override them.
        data: A .jsonl or .jsonl.gz file in place of standard input.
        n: Feedbacks sampled per row; their score distributions are averaged.
        temperature: Sampling temperature of the feedback; 0 for greedy.
        protocol: How a score comes about. "real": the score distribution behind the phrase that the model wrote, or as
            rollout.answer says where it wrote none; "tract": the feedback is cut where the phrase begins, and the
            phrase is appended; "raft": no feedback, the score is read right behind the phrase; "decode": the mean of
            the scores that the model wrote itself.
        key: The field that a grade is written to; rows must not have it yet.
        batch_size: Rows graded and written at a time.
        seed: The same rows, seed and batch_size give the same samples.
        precision: Number format of the weights: "bf16", "fp32", or "auto", which is what is fast here.
        device: "auto" takes CUDA where there is one.
        trust_remote_code: Run Python code that comes with the model.
        renormalize: Softmax over the score tokens alone instead of over the whole vocabulary.
        scale: The score scale.
        prompt: How a row becomes a prompt.
        rollout: Sampling of feedback: engine, max_tokens, top_p, answer, and the engine's limits are used.
    """

    model: str = ""
    data: str = ""
    n: int = above(0, 1)
    temperature: float = at_least(0, 1.0)
    protocol: Literal["real", "tract", "raft", "decode"] = "real"
    key: str = "grade"
    batch_size: int = above(0, 64)
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = False
    renormalize: bool = False
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rollout: RolloutConfig = field(default_factory=_alone)

    def check(self) -> None:
        """Raise :class:`ConfigError` for settings that cannot work; the judge checks the others."""
        if not self.model:
            raise ConfigError("model is not set: give --model or put it into the config file")
        check_bounds(self)
        for name, own in (("temperature", "temperature"), ("group_size", "n")):
            if getattr(self.rollout, name) != getattr(RolloutConfig(), name):
                raise ConfigError(f"rollout.{name} is for training: give --{own}, which is the judge's")


@dataclass
class CompareConfig:
    """A comparison of evaluations.

    Args:
        folders: Runs, folders of real-fast evaluate, or folders of them.
        output: Folder for comparison.md, comparison.csv and comparison.png.
        baseline: Method to compare the others with; without it, the one with the highest Pearson correlation.
        pool_seeds: One line for runs that differ by their seed alone.
        bootstrap: Resamples (of whole prompts) for the 95 % intervals.
        seed: Seed of the resampling.
        overwrite: Replace an earlier comparison in `output`.
    """

    folders: list[str] = field(default_factory=list)
    output: str = "comparison"
    baseline: str | None = None
    pool_seeds: bool = False
    bootstrap: int = above(0, 1000)
    seed: int = at_least(0, 0)
    overwrite: bool = False


@dataclass
class PlanConfig(Config):
    """What to plan: a training run's own settings, and the machine.

    Args:
        model: A folder with a config.json, such a file, a model on the hub, or "smollm2-135m".
        card: What it runs on, for the seconds and, where gpu_memory is not given, for the memory: rtx-4090, rtx-3090,
            a10, l4, rtx-5090, a100-40gb, l40s, h100, a100-80gb, h200 or b200.
        gpus: GPUs of the trainer in all, which weights, gradients and optimiser state are sharded over.
        gpus_per_node: GPUs of a machine; those of one are linked as its card's maker does.
        network: Gbit/s between machines for each GPU; 0 for what the card's maker builds into its own.
        engine_gpus: GPUs of the engines of rollout.engine vllm-server; 0 for those of one engine.
        gpu_memory: Memory of one device in GiB; 0 for the card's, or 80.
        prompt_tokens: P, tokens of a prompt; 0 for the longest that prompt.max_tokens allows.
        response_tokens: R, tokens of a response; 0 for the longest that rollout.max_tokens allows.
    """

    card: str = ""
    gpus: int = above(0, 1)
    gpus_per_node: int = above(0, 8)
    network: float = at_least(0, 0.0)
    engine_gpus: int = at_least(0, 0)
    gpu_memory: float = at_least(0, 0.0)
    prompt_tokens: int = at_least(0, 0)
    response_tokens: int = at_least(0, 0)


@dataclass
class ServeConfig(Config):
    """What to serve: the run's own settings, of which model, scale, prompt, rollout and precision count; and where.

    Args:
        model: A folder or a model on the Hugging Face hub, the one that the run trains.
        host: The address to listen on. Whoever reaches it can replace the weights and use the machine, since vLLM's
            routes for training ask for no password: anything but this machine's own must be in a private network.
        port: The port to listen on; 0 for that of rollout.url, or 8000.
        gpus: GPUs that hold one copy of the model together (tensor parallel).
        copies: Copies of the model, which share the requests (data parallel); `gpus` times `copies` are used.
        transfer: How weights come in: "nccl", between GPUs; "shared-memory", from a trainer on this machine; "auto" is
            nccl on GPUs and shared-memory elsewhere.
    """

    host: str = "127.0.0.1"
    port: int = at_least(0, 0)
    gpus: int = above(0, 1)
    copies: int = above(0, 1)
    transfer: Literal["auto", "nccl", "shared-memory"] = "auto"


@dataclass(frozen=True)
class Command:
    """A command as its user sees it.

    Attributes:
        settings: The dataclass of its settings.
        about: What it does, in a line.
        usage: How it is called.
        main: The settings that ``--help`` shows; ``--help all`` shows the others too.
        other_names: What other commands, and earlier versions, call settings of this one.
        positional: The setting that arguments without a flag belong to.
        unused: Settings that say nothing here, which ``--help`` leaves out; a section ends with a dot.
        asks_model: Whether the model's folder, where real-fast train wrote it, says how to judge with it.
    """

    settings: type
    about: str
    usage: str
    main: tuple[str, ...]
    other_names: dict[str, str]
    positional: str = ""
    unused: tuple[str, ...] = ()
    asks_model: bool = False


# What train calls the settings that evaluate and judge share with it.
_OF_TRAIN = {
    "eval.n": "n",
    "eval.temperature": "temperature",
    "eval.protocol": "protocol",
    "train.precision": "precision",
    "train.device": "device",
    "objective.renormalize": "renormalize",
    "engine": "rollout.engine",
    "max_tokens": "rollout.max_tokens",
}
_OF_EVALUATE = {
    **_OF_TRAIN,
    "eval.bootstrap": "bootstrap",
    "data.eval": "data",
    "data.eval_split": "split",
    "data.max_eval": "max_rows",
    "data.fields": "fields",
    "data.max_rejected": "max_rejected",
}
_OF_OTHERS = {
    "n": "eval.n",
    "protocol": "eval.protocol",
    "bootstrap": "eval.bootstrap",
    "precision": "train.precision",
    "device": "train.device",
    "renormalize": "objective.renormalize",
    "engine": "rollout.engine",
    "split": "data.eval_split",
    "max_rows": "data.max_eval",
    "fields": "data.fields",
    "max_rejected": "data.max_rejected",
}
# Of the sampling, what only training uses.
_TRAINING_ALONE = tuple(
    f"rollout.{name}"
    for name in (
        *("prompts_per_step", "group_size", "temperature", "check_every", "check_logprob", "check_score"),
        *("sleep", "log_every", "log_prompts"),
    )
)

COMMANDS = {
    "train": Command(
        Config,
        "Train a judge by REAL, or by one of the methods that it is compared with.",
        "--config FILE [--SETTING VALUE ...]",
        (
            *("model", "data.train", "data.eval", "output", "method", "resume", "overwrite", "init_from"),
            *("scale.values", "scale.phrase", "prompt.template", "prompt.max_tokens"),
            *("rollout.engine", "rollout.prompts_per_step", "rollout.group_size", "rollout.max_tokens"),
            *("optim.lr", "warmup.steps", "train.steps", "train.micro_batch_tokens", "train.precision"),
            *("train.activation_checkpointing", "eval.every", "save.every", "report_to", "seed", "debug"),
        ),
        _OF_OTHERS,
    ),
    "evaluate": Command(
        EvaluateConfig,
        "Evaluate a judge on a file or a dataset with labels.",
        "--model MODEL --data DATA --output FOLDER [--SETTING VALUE ...]",
        (
            *("model", "data", "split", "output", "overwrite", "max_rows", "n", "temperature", "protocol"),
            *("precision", "device", "seed", "rollout.engine", "rollout.max_tokens", "rollout.answer"),
        ),
        _OF_EVALUATE,
        unused=_TRAINING_ALONE,
        asks_model=True,
    ),
    "judge": Command(
        JudgeConfig,
        "Grade rows: a JSON line in, the same line with its grade out, in order.",
        "--model MODEL [--SETTING VALUE ...] < rows.jsonl > graded.jsonl",
        (
            *("model", "data", "n", "temperature", "protocol", "key", "batch_size", "precision", "device", "seed"),
            *("rollout.engine", "rollout.max_tokens", "rollout.answer"),
        ),
        {**_OF_TRAIN, "data.eval": "data"},
        unused=_TRAINING_ALONE,
        asks_model=True,
    ),
    "compare": Command(
        CompareConfig,
        "Compare the evaluations of runs: one table, with paired tests.",
        "FOLDER ... [--SETTING VALUE ...]",
        ("folders", "output", "baseline", "pool_seeds", "bootstrap", "seed", "overwrite"),
        {"eval.bootstrap": "bootstrap"},
        positional="folders",
    ),
    "plan": Command(
        PlanConfig,
        "Will a run fit, and how much work is it? From the model's shape alone, in seconds.",
        "--config FILE [--gpu_memory GIB] [--SETTING VALUE ...]",
        (
            *("model", "card", "gpu_memory", "gpus", "gpus_per_node", "prompt_tokens", "response_tokens", "method"),
            *("prompt.max_tokens", "rollout.engine", "rollout.prompts_per_step", "rollout.group_size"),
            *("rollout.max_tokens", "rollout.gpu_memory_utilization", "train.micro_batch_tokens"),
            *("train.precision", "train.shared_prompt", "train.activation_checkpointing", "objective.kl_coef"),
            *("train.lora.r", "train.quantization", "optim.name", "optim.offload", "rollout.sleep", "train.steps"),
        ),
        _OF_OTHERS,
        unused=(
            *("output", "init_from", "seed", "resume", "overwrite", "report_to", "run_name", "log_level", "debug"),
            *("profile", "data.", "warmup.", "eval.", "save."),
        ),
    ),
    "serve": Command(
        ServeConfig,
        "Start a vLLM server that samples a run's rollouts, on GPUs or a machine of its own.",
        "--config FILE [--host ADDRESS] [--port N] [--SETTING VALUE ...]",
        (
            *("model", "init_from", "host", "port", "gpus", "copies", "transfer", "train.precision"),
            *("prompt.max_tokens", "rollout.max_tokens", "rollout.top_p", "rollout.max_num_seqs"),
            *("rollout.gpu_memory_utilization", "rollout.url", "seed", "trust_remote_code", "log_level"),
        ),
        _OF_OTHERS,
        unused=(
            *("output", "method", "resume", "allow_changed", "overwrite", "report_to", "run_name", "debug", "profile"),
            *("data.", "objective.", "supervised.", "warmup.", "optim.", "eval.", "save."),
        ),
    ),
}
