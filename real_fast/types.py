"""What flows through the house: a row, how to sample, a rollout, a group of rollouts, a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from real_fast.attention.layout import Layout


@dataclass
class JudgeRow:
    """One response to grade, with its label.

    Attributes:
        id: Unique within a loaded file.
        prompt_id: Rows with the same one belong together in a split.
        instruction: What the response answers.
        response: The text to grade.
        rubric: How to grade it; may be empty where the template does not use one.
        reference_answer: Empty where there is none.
        label: The true score, on the scale, not necessarily one of its values.
        feedbacks: Worked feedback, without the phrase and the score; may be empty.
        feedback_labels: One per feedback: its own rater's score, the row's label where the file gives none.
        prompt_ids: The prompt's token ids, filled in by ``load_rows``.
        messages: A prompt that comes ready made, {"role": ..., "content": ...} each; it takes the place of the template
            and of ``prompt.system``. Empty for a prompt that is built of the texts.
        extra: The record's further fields, by name, for templates that use them.
        benchmark: Name of the benchmark that the row is of, where there are several; empty otherwise.
    """

    id: str
    prompt_id: str
    instruction: str
    response: str
    rubric: str
    reference_answer: str
    label: float
    feedbacks: list[str]
    feedback_labels: list[float]
    prompt_ids: list[int] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    benchmark: str = ""


@dataclass
class JudgeTexts:
    """What a prompt is made of: see :class:`JudgeRow`."""

    instruction: str
    response: str
    rubric: str
    reference_answer: str
    messages: list[dict[str, str]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


AnswerMode = Literal["forced", "generated", "cut", "none"]

Finish = Literal["phrase", "eos", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    Attributes:
        n: Rollouts per prompt.
        max_tokens: Longest sampled text in tokens.
        temperature: 0 for greedy.
        top_p: Nucleus; 1 for none.
        answer: "forced": a phrase that was not sampled is appended; "generated": nothing is appended; "cut": the text
            is cut where the phrase begins and the phrase appended in its own tokens, so that the score is a function
            of the feedback alone; "none": there is no feedback, the phrase stands right behind the prompt. The last
            two are for evaluation; the trainer uses the first two.
        seed: Every sample is a function of (seed, prompt's place, sample's place), so a resumed run repeats it.
        alone: Every prompt is sampled as the first of a call is, so that its samples do not depend on the others.
        scores: Whether somebody reads the score log-probabilities; without, an engine may leave them out.
        texts: Whether somebody reads the rollouts' texts; without, an engine leaves them out.
        places: The prompts' places, where a call gets some of the prompts of a larger one; None for 0, 1, 2, ...
    """

    n: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    answer: AnswerMode = "forced"
    seed: int = 0
    alone: bool = False
    scores: bool = True
    texts: bool = True
    places: tuple[int, ...] | None = None

    def place(self, prompt: int) -> int:
        """The place that a prompt's samples are a function of, for the one at `prompt` in its call."""
        if self.alone:
            return 0
        return prompt if self.places is None else self.places[prompt]


@dataclass
class Rollout:
    """One sampled feedback with its score distribution.

    The context that the score is read from is ``prompt + context_ids``; the distribution over the score tokens is the
    model's next-token distribution after it. ``context_ids`` are the sampled ids as they are (never decoded and
    re-encoded), without a final EOS, followed by ``n_forced`` appended phrase tokens.

    Ids and log-probabilities are arrays ("q" and "d") where an engine gives them, and lists elsewhere: the numbers of
    an array are copied at once, where each of a list is an object to look at.

    Attributes:
        sampled_ids: Tokens that the model sampled and that count as its actions: the feedback, the part of the phrase
            that it wrote itself up to its last visible character, a final EOS. The score is not among them (it is
            integrated out). With "cut", the feedback alone.
        sampled_logprobs: Log-probability of each at the sampling temperature, from the engine.
        context_ids: See above. ``sampled_ids[i]`` is predicted at position ``len(prompt) + i - 1``.
        n_forced: Number of tokens at the end of ``context_ids`` that are no actions: appended ones, and (if answers
            are forced) the phrase's trailing white space, which stands there whatever the model samples.
        finish: Why sampling stopped: the phrase was written, EOS, or the length limit.
        score_logprobs: K log-probabilities of the score tokens (full softmax, temperature 1), or None where a
            generated answer has no score or the engine was not asked for them.
        written_score: The score that the model wrote itself after its own phrase, or None.
        text: ``context_ids`` decoded, for people to read; empty where the engine was not asked for it.
        ending: Of a given answer, the score's token and the one that ends the answer behind it, which is a target; None
            where there is none. Both stand behind the score's place, and the first is input.
        outcome: Place on the scale of a score drawn from the distribution, K for anything off the scale; None where
            the method draws none.
        unread: Whether it has a score whose log-probabilities the engine was not asked for.
    """

    sampled_ids: Sequence[int]
    sampled_logprobs: Sequence[float]
    context_ids: Sequence[int]
    n_forced: int
    finish: Finish
    score_logprobs: list[float] | None
    written_score: float | None
    text: str = ""
    ending: tuple[int, int] | None = None
    outcome: int | None = None
    unread: bool = False

    @property
    def input_ids(self) -> Sequence[int]:
        """What the model is given behind the prompt: the context, and the score where an end is learned behind it."""
        return self.context_ids if self.ending is None else [*self.context_ids, self.ending[0]]

    @property
    def targets(self) -> Sequence[int]:
        """What it learns to write: the sampled (or given) tokens, and the end of an answer."""
        return self.sampled_ids if self.ending is None else [*self.sampled_ids, self.ending[1]]

    @property
    def has_score(self) -> bool:
        """Whether a score distribution belongs to this rollout."""
        return self.score_logprobs is not None or self.unread


@dataclass
class Group:
    """The rollouts of one prompt.

    Attributes:
        index: The group's place in the update.
        prompt_ids: Token ids of the prompt.
        label: Label on the scale.
        rollouts: K rollouts.
        labels: A label for each rollout, where they differ (feedback by several raters).
        row_id: Id of the row that it was made of.
    """

    index: int
    prompt_ids: Sequence[int]
    label: float
    rollouts: Sequence[Rollout]
    labels: Sequence[float] | None = None
    row_id: str = ""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt included."""
        return len(self.prompt_ids) + max(len(r.input_ids) for r in self.rollouts)

    @property
    def shared_tokens(self) -> int:
        """Tokens of the prompt, once, and of all responses."""
        return len(self.prompt_ids) + sum(len(r.input_ids) for r in self.rollouts)


@dataclass
class Batch:
    """One micro-batch. Rows are flat positions in [B * T]; a row predicts the token after it.

    Attributes:
        input_ids: [B, T] int64: one packed row (B = 1), or one right-padded sequence per rollout.
        position_ids: [B, T] int64.
        layout: Segments of the packed row, on the CPU; None for padded sequences.
        attention_mask: [B, T] int64, 1 on tokens; None for a packed row, which has no padding.
        rows: [N] int64, positions before each sampled token.
        targets: [N] int64, the sampled tokens (a sampled EOS is a target although it is not in the input), and behind
            those of a given answer the token that ends it.
        sampled_logprobs: [N] float64, the engine's log-probabilities of `targets` at the sampling temperature, in nats,
            of the weights that sampled them; 0 for given tokens and for ends of answers. Sums over a rollout are
            compared, so they are as exact as the engine gave them.
        rollout: [N] int64 in 0..M-1.
        score_rows: [M] int64, the last context token of each rollout, where the score distribution is read.
        labels: [M] float32.
        group: [M] int64, the group's place in the update.
        rollout_valid: [M] bool, rollouts that have a score.
        engine_score_logprobs: [M, K] float32, the engine's log-probabilities of the score tokens; 0 where there is no
            score (K is 0 where no rollout has one).
        outcome: [M] int64, the drawn score's place on the scale, K for off the scale, -1 where none was drawn.
        endings: [E] int64, places in [N] of the targets behind a score, which end a given answer. How many there are is
            known on the host, so that nobody has to ask the device.
        ref_logprobs: [N] float32, the reference policy's log-probabilities of `targets`, in nats; None where not
            asked for.
        placeholder: Whether it holds no group, and only keeps step with the micro-batches of other ranks.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: Layout | None
    attention_mask: torch.Tensor | None
    rows: torch.Tensor
    targets: torch.Tensor
    sampled_logprobs: torch.Tensor
    rollout: torch.Tensor
    score_rows: torch.Tensor
    labels: torch.Tensor
    group: torch.Tensor
    rollout_valid: torch.Tensor
    engine_score_logprobs: torch.Tensor
    outcome: torch.Tensor
    endings: torch.Tensor
    ref_logprobs: torch.Tensor | None = None
    placeholder: bool = False

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        tensors: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, torch.Tensor)
        }
        return replace(self, **tensors)
