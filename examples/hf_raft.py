"""RAFT in Transformers' `Trainer`: squared error of the expected score ŷ = Σ k·p_k, read behind the phrase.

Without feedback in the data (no chain of thought) the phrase follows the prompt; with it, the prompt and the feedback.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from common import PHRASE, SCORES, add_head_argument, load
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from real_fast.config import PromptConfig
from real_fast.data.dataset import check_enough_rows, load_rows
from real_fast.prompt.builder import PromptBuilder
from real_fast.score.scale import ScoreScale
from real_kernels import expected_score, score_logprobs


class RaftTrainer(Trainer):
    """Squared error on the expected score. Batches: ``input_ids``, ``attention_mask`` (right-padded) and ``label``."""

    def __init__(self, model: Any, scale: ScoreScale, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                "Trainer would use DataParallel: start with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        add_head_argument(self.model)
        self.scale = scale
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by the whole batch's rows, so Trainer does not

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of an update, and how many rows they have over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = torch.tensor(sum(len(batch["label"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(rows).sum()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Mean of (ŷ − y)² over the rows of the update, or of the batch; ŷ is what ``predict`` returns."""
        label, mask = inputs["label"], inputs["attention_mask"]
        last = mask.sum(1) - 1  # the phrase's last token
        ids, values = self.scale.ids_tensor(label.device), self.scale.values_tensor(label.device)

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            rows = hidden[torch.arange(len(last), device=last.device), last]
            return expected_score(score_logprobs(rows, weight, ids), values)

        y_hat = model(input_ids=inputs["input_ids"], attention_mask=mask, head=head)
        error = (y_hat - label).square()
        loss = error.mean()
        if num_items_in_batch is not None:  # DDP divides by the number of processes
            loss = error.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, {"loss": loss, "y_hat": y_hat}) if return_outputs else loss


@dataclass
class Collator:
    """Pads on the right, so that the score position is the last token of each row."""

    pad: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Put rows together."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad),
            "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
            "label": torch.tensor([row["label"] for row in rows]),
        }


def examples_from(source: str, tokenizer: Any, scale: ScoreScale, max_tokens: int = 2048) -> list[dict[str, Any]]:
    """Token ids up to the phrase's last token, and the label, of each row of a JSONL (see docs/data.md)."""
    builder, rejected = PromptBuilder(PromptConfig(template="short", system=""), tokenizer, scale), []
    rows = load_rows(source, "train", builder, scale, max_tokens, rejected)
    check_enough_rows(rows, 1, source, rejected)
    examples = []
    for row in rows:
        text, label = (row.feedbacks[0], row.feedback_labels[0]) if row.feedbacks else ("", row.label)
        given = builder.guard.encode_feedback([text])[0]
        examples.append({"input_ids": [*row.prompt_ids, *given, *scale.phrase_ids], "label": float(label)})
    return examples


def rmse(prediction: Any) -> dict[str, float]:
    """Root mean squared error, for ``compute_metrics``."""
    return {"rmse": float(((prediction.predictions - prediction.label_ids) ** 2).mean() ** 0.5)}


def main(argv: list[str] | None = None) -> RaftTrainer:
    """Train, save, print the error on the training rows before and after, and return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder; a tiny random model without it")
    parser.add_argument(
        "--data", default="synthetic:train", help="JSONL with instruction, response, rubric, label, ..."
    )
    parser.add_argument("--rows", type=int, default=64, help="use at most this many")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-3, help="for the tiny model; 1e-6 for a real one")
    parser.add_argument("--output", default="runs/hf-raft")
    arguments = parser.parse_args(argv)
    model, tokenizer = load(arguments.model)
    scale = ScoreScale.from_tokenizer(tokenizer, SCORES, PHRASE)
    data = examples_from(arguments.data, tokenizer, scale)[: arguments.rows]
    config = TrainingArguments(
        output_dir=arguments.output,
        per_device_train_batch_size=8,
        learning_rate=arguments.lr,
        max_steps=arguments.steps,
        bf16=torch.cuda.is_available(),
        label_names=["label"],
        remove_unused_columns=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    # No token to pad with is needed: what stands behind a row's end is masked.
    collator = Collator(tokenizer.pad_token_id or 0)
    trainer = RaftTrainer(
        model, scale, args=config, train_dataset=data, eval_dataset=data, data_collator=collator, compute_metrics=rmse
    )
    before = trainer.evaluate()["eval_rmse"]
    trainer.train()
    trainer.save_model()
    print(f"rmse {before:.3f} before, {trainer.evaluate()['eval_rmse']:.3f} after {arguments.steps} steps")
    return trainer


if __name__ == "__main__":
    main()
