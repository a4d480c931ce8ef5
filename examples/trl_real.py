"""REAL in TRL: a subclass of `RLOOTrainer` with the fused head, the REAL reward and both of its gradients.

TRL samples, accumulates, logs and saves. Its reward functions, its log-probability pass and its own loss are not used.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import PHRASE, SCORES, add_head_argument, load, toy_rows
from datasets import Dataset, load_dataset
from torch.nn.utils.rnn import pad_sequence
from trl import RLOOConfig, RLOOTrainer

from real_fast.score.phrase import PhraseFinder, parse_sample
from real_fast.score.scale import ScoreScale
from real_kernels import HeadOptions, RealObjective, real_loss


class RealTrainer(RLOOTrainer):
    """REAL on TRL's rollouts. The dataset has the columns ``prompt`` (text or messages) and ``label`` (a score).

    The answer is forced: where a completion has no phrase, the phrase is appended. Appended tokens are context for the
    score and no targets. `objective` says what the loss is: ``RealObjective(lam=..., beta=..., reward=...)``.
    """

    _tag_names = ["trl", "real"]  # noqa: RUF012 (TRL's own attribute)
    _name = "REAL"
    _paper = {"title": "Regression-Aware Reinforcement Learning for LLM-as-a-Judge", "id": "2603.17145"}  # noqa: RUF012

    def __init__(
        self,
        model: Any,
        args: RLOOConfig,
        *,
        phrase: str = PHRASE,
        objective: RealObjective | None = None,
        **kwargs: Any,
    ) -> None:
        if args.beta:
            raise ValueError(f"RLOOConfig.beta is {args.beta}: REAL has no KL term, set beta=0.0")
        if args.per_device_train_batch_size % args.num_generations:
            raise ValueError(
                f"per_device_train_batch_size ({args.per_device_train_batch_size}) must be a multiple of "
                f"num_generations ({args.num_generations}): a micro-batch holds whole groups"
            )
        if args.num_iterations != 1 or args.steps_per_generation != args.gradient_accumulation_steps:
            raise ValueError(
                "REAL is on-policy: set num_iterations=1, and leave steps_per_generation and generation_batch_size out"
            )
        super().__init__(model=model, reward_funcs=[], args=args, **kwargs)
        add_head_argument(self.model)
        self.objective = objective or RealObjective()
        self.scale = ScoreScale.from_tokenizer(self._tokenizer, SCORES, phrase)
        self.finder = PhraseFinder(self._tokenizer, self.scale)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """TRL's rollouts as right-padded tensors [groups, K, ...]: TRL shuffles and splits them by whole groups."""
        k = self.num_generations if self.model.training else self.num_generations_eval
        if len(inputs) % k:
            raise ValueError(f"a batch of {len(inputs)} rows holds no whole groups of {k}: set another batch size")
        if "label" not in inputs[0]:
            raise ValueError(f'the dataset needs the column "label", and it has {sorted(inputs[0])}')
        prompts, completions, _ = self._generate([row["prompt"] for row in inputs])
        input_ids, targets, forced = [], [], []
        for prompt, ids in zip(prompts, completions, strict=True):
            thought = self.finder.thought(prompt)
            sample = parse_sample(ids, frozenset(self.eos_token_ids), self.finder, "forced", thought)
            sequence = torch.tensor([*prompt, *sample.context_ids])
            # At every position the token that was sampled there, -100 where none was. An EOS is a target too, although
            # the phrase takes its place in the input.
            target = torch.full_like(sequence, -100)
            target[len(prompt) - 1 :][: sample.num_actions] = torch.tensor(ids[: sample.num_actions])
            input_ids.append(sequence)
            targets.append(target)
            forced.append(float(sample.finish != "phrase"))
        lengths = torch.tensor([len(s) for s in input_ids])
        batch = {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self._tokenizer.pad_token_id),
            "targets": pad_sequence(targets, batch_first=True, padding_value=-100),
            "lengths": lengths,
            "forced": torch.tensor(forced),
            "labels": torch.tensor([float(row["label"]) for row in inputs]),
        }
        # Of the whole update, over micro-batches and processes: what the loss is a mean over.
        sampled = self.accelerator.gather((batch["targets"] != -100).sum().to(self.accelerator.device)).sum()
        batch["num_tokens"] = torch.full_like(lengths, max(int(sampled), 1))
        batch["num_rollouts"] = torch.full_like(lengths, len(inputs) * self.accelerator.num_processes)
        return {name: t.unflatten(0, (-1, k)).to(self.accelerator.device) for name, t in batch.items()}

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        groups, k = inputs["labels"].shape
        input_ids, targets, lengths, forced, labels = (
            inputs[name].flatten(0, 1) for name in ("input_ids", "targets", "lengths", "forced", "labels")
        )
        device, sampled = labels.device, targets != -100
        num_rollouts, num_tokens = (int(inputs[name][0, 0]) for name in ("num_rollouts", "num_tokens"))
        rollout = torch.arange(groups * k, device=device)

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
            out = real_loss(
                hidden[sampled],
                weight,
                targets[sampled],
                sampled.nonzero()[:, 0],
                hidden[rollout, lengths - 1],  # the phrase's last token
                self.scale.ids_tensor(device),
                self.scale.values_tensor(device),
                labels,
                rollout // k,
                num_rollouts=num_rollouts,
                num_tokens=num_tokens,
                objective=self.objective,
                head=HeadOptions(temperature=self.temperature),
            )
            return vars(out)  # a dict: DDP and FSDP find the tensors in it

        mask = (torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long()
        out = model(input_ids=input_ids, attention_mask=mask, head=head)

        gather, metrics = self.accelerator.gather, self._metrics["train" if self.model.training else "eval"]
        rewards, error = gather(out["rewards"]), gather(out["expected_score"] - labels)
        metrics["reward"].append(rewards.mean().item())
        metrics["reward_std"].append(rewards.std().item())
        spread = rewards.view(-1, k).std(1, correction=0)
        metrics["frac_reward_zero_std"].append((spread < 1e-6).float().mean().item())
        metrics["score/mean"].append(gather(out["expected_score"]).mean().item())
        metrics["score/mse"].append(error.square().mean().item())  # TRL averages over micro-batches: no root
        metrics["score/off_scale_mass"].append(gather(out["off_scale_mass"]).mean().item())
        metrics["score/forced"].append(gather(forced).mean().item())
        # A part of the update's mean: Trainer divides by the number of micro-batches, and DDP by that of processes.
        parts = self.current_gradient_accumulation_steps if self.model.training else 1
        return out["loss"] * parts * self.accelerator.num_processes


def main(argv: list[str] | None = None) -> RealTrainer:
    """Train, save, and return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder; a tiny random model without it")
    parser.add_argument("--data", help="JSONL with prompt and label; prompts about fruits without it")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-2, help="for the tiny model; 1e-6 for a real one")
    parser.add_argument("--max-completion-length", type=int, default=16)
    parser.add_argument("--output", default="runs/trl-real")
    arguments = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    config = RLOOConfig(
        output_dir=arguments.output,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=arguments.max_completion_length,
        learning_rate=arguments.lr,
        lr_scheduler_type="constant",
        max_steps=arguments.steps,
        beta=0.0,
        bf16=cuda,
        gradient_checkpointing=cuda,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    model, tokenizer = load(arguments.model)
    if arguments.data:
        data = load_dataset("json", data_files=arguments.data, split="train")
    else:
        data = Dataset.from_list(toy_rows())
    trainer = RealTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
