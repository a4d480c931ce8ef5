"""The groups of rollouts that every step is timed on: real judge prompts and feedback texts, or random ids."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from real_fast.config import Config
from real_fast.data.dataset import load_train_eval
from real_fast.prompt.builder import PromptBuilder
from real_fast.score.scale import ScoreScale
from real_fast.types import Group, JudgeRow, Rollout

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Workload:
    """Groups and what they are.

    Attributes:
        groups: One group per prompt.
        source: Where prompts and texts come from.
    """

    groups: list[Group]
    source: str

    @property
    def k(self) -> int:
        """Rollouts per prompt."""
        return len(self.groups[0].rollouts)

    @property
    def rollouts(self) -> list[Rollout]:
        """All rollouts."""
        return [rollout for group in self.groups for rollout in group.rollouts]

    @property
    def prompt_tokens(self) -> float:
        """P, the mean length of a prompt."""
        return sum(len(group.prompt_ids) for group in self.groups) / len(self.groups)

    @property
    def response_tokens(self) -> float:
        """R, the mean length of a response, phrase included."""
        return sum(len(r.context_ids) for r in self.rollouts) / len(self.rollouts)

    @property
    def case(self) -> str:
        """For the CSV."""
        return f"K={self.k} P={self.prompt_tokens:.0f} R={self.response_tokens:.0f} prompts={len(self.groups)}"


def judge_rows(tokenizer: Any, scale: ScoreScale, name: str = "vicuna") -> tuple[list[JudgeRow], str]:
    """Rows of a real judge benchmark, or of the generator where the data is not there, and the source's name.

    The folder is $REAL_FAST_DATA, or ../shared/data beside the project.
    """
    folder = Path(os.environ.get("REAL_FAST_DATA") or _ROOT.parent / "shared" / "data")
    path = folder / f"{name}.jsonl"
    config = Config(model="smollm2-135m", output="unused")
    config.prompt.max_tokens = 2048
    config.data.train = str(path) if path.is_file() else "synthetic:train"
    config.data.max_rejected = 1
    builder = PromptBuilder(config.prompt, tokenizer, scale)
    data = load_train_eval(config.data, config.prompt.max_tokens, builder, scale, 1, "the benchmark")
    rows = sorted([*data.train, *data.eval], key=lambda row: (len(row.prompt_ids), row.id))
    return rows, path.name if path.is_file() else "synthetic"


def real_workload(
    tokenizer: Any, scale: ScoreScale, prompts: int, k: int, name: str = "vicuna", responses: int | None = None
) -> Workload:
    """Prompts spread evenly over the data's lengths; each group's K texts are feedback texts of the same data.

    Args:
        tokenizer: The model's tokenizer.
        scale: The score scale.
        prompts: Number of groups.
        k: Rollouts per group.
        name: Which data set gives the prompts. Texts come from "vicuna" where it has none.
        responses: Cut or repeat every text to so many tokens; as they come by default.
    """
    rows, source = judge_rows(tokenizer, scale, name)
    written = [row for row in rows if row.feedbacks] or [
        row for row in judge_rows(tokenizer, scale)[0] if row.feedbacks
    ]
    texts = [tokenizer.encode(text.strip(), add_special_tokens=False) for row in written for text in row.feedbacks]
    draw = Random(0)
    groups = []
    for place in range(prompts):
        row = rows[(2 * place + 1) * len(rows) // (2 * prompts)]
        rollouts = []
        for _ in range(k):
            ids = draw.choice(texts)
            if responses is not None:
                n = responses - len(scale.phrase_ids)
                ids = (ids * (n // len(ids) + 1))[:n]
            rollouts.append(_rollout(ids, scale))
        groups.append(Group(place, row.prompt_ids, row.label, rollouts))
    return Workload(groups, source)


def random_workload(vocabulary: int, scale: ScoreScale, prompts: int, k: int, p: int, r: int) -> Workload:
    """Random ids of given lengths."""
    draw = Random(0)

    def ids(n: int) -> list[int]:
        return [draw.randrange(100, vocabulary) for _ in range(n)]

    n = r - len(scale.phrase_ids)
    groups = [
        Group(place, ids(p), draw.choice(scale.values), [_rollout(ids(n), scale) for _ in range(k)])
        for place in range(prompts)
    ]
    return Workload(groups, "random ids")


def _rollout(ids: list[int], scale: ScoreScale) -> Rollout:
    """A feedback that wrote the phrase itself, up to the trailing white space, which is forced as in training."""
    acted = [*ids, *scale.phrase_ids[: len(scale.phrase_ids) - len(scale.tail_ids)]]
    scores = [-1.6] * len(scale.values)
    return Rollout(acted, [0.0] * len(acted), [*acted, *scale.tail_ids], len(scale.tail_ids), "phrase", scores, None)
