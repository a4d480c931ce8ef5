"""Rollouts: prompts in; token ids, their log-probabilities and the score's log-probabilities out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from real_fast.scale import ScoreScale

Answer = Literal["forced", "generated", "cut", "none"]
Finish = Literal["phrase", "eos", "length"]


@dataclass(frozen=True)
class Sampling:
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
    """

    n: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    answer: Answer = "forced"
    seed: int = 0


@dataclass
class Rollout:
    """One sampled feedback with its score distribution.

    The context that the score is read from is ``prompt + context_ids``; the distribution over the score tokens is the
    model's next-token distribution after it. ``context_ids`` are the sampled ids as they are (never decoded and
    re-encoded), without a final EOS, followed by ``n_forced`` appended phrase tokens.

    Attributes:
        sampled_ids: Tokens that the model sampled and that count as its actions: the feedback, the part of the phrase
            that it wrote itself up to its last visible character, a final EOS. The score is not among them (it is
            integrated out). With "cut", the feedback alone.
        sampled_logprobs: Log-probability of each at the sampling temperature, from the engine, float.
        context_ids: See above. ``sampled_ids[i]`` is predicted at position ``len(prompt) + i - 1``.
        n_forced: Number of tokens at the end of ``context_ids`` that are no actions: appended ones, and (if answers
            are forced) the phrase's trailing white space, which stands there whatever the model samples.
        finish: Why sampling stopped: the phrase was written, EOS, or the length limit.
        score_logprobs: K log-probabilities of the score tokens (full softmax, temperature 1), or None where a
            generated answer has no score.
        written_score: The score that the model wrote itself after its own phrase, or None.
        text: ``context_ids`` decoded, for people to read.
        outcome: Place on the scale of a score drawn from the distribution, K for anything off the scale; None where
            the method draws none.
    """

    sampled_ids: list[int]
    sampled_logprobs: list[float]
    context_ids: list[int]
    n_forced: int
    finish: Finish
    score_logprobs: list[float] | None
    written_score: float | None
    text: str = ""
    outcome: int | None = None

    @property
    def has_score(self) -> bool:
        """Whether a score distribution belongs to this rollout."""
        return self.score_logprobs is not None


@dataclass
class Parsed:
    """A sampled text taken apart; see :func:`parse_sample`. `keep` sampled tokens count as actions."""

    keep: int
    context_ids: list[int]
    n_forced: int
    finish: Finish
    has_score: bool
    score_position: int | None
    written_score: float | None = None


class RolloutEngine(Protocol):
    """What the trainer needs from an engine."""

    name: str

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Rollout]]:
        """Sample ``sampling.n`` rollouts for every prompt (token ids); one list per prompt, in order."""

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over the trainer's weights, under their Transformers names."""

    def close(self) -> None:
        """Free what the engine holds."""


class PhraseFinder:
    """Finds the phrase in sampled ids by decoding them, and never changes an id."""

    def __init__(self, tokenizer: Any, scale: ScoreScale) -> None:
        self.tokenizer = tokenizer
        self.scale = scale
        self.phrase = scale.phrase.strip()

    def end(self, ids: Sequence[int]) -> int | None:
        """Number of tokens up to and including the one that completes the first phrase, or None.

        A token that completes the phrase and goes on behind it ("isn't") completes nothing.
        """
        return next((end for _, end, whole in self._places(ids, self._decode(ids)) if whole), None)

    def before(self, ids: Sequence[int]) -> int:
        """Number of tokens in front of the first phrase, or of all; white space at their end does not count.

        Here a token may complete the phrase and go on behind it, unless it makes another word ("scores") of it. A token
        that runs from the feedback into the phrase goes with the phrase.
        """
        text = self._decode(ids)
        behind = len(self.phrase)
        places = (at for at, _, end in self._places(ids, text) if end or not text[at + behind :][:1].isalpha())
        feedback = text[: next(places, None)].rstrip()
        tokens = self._shortest(ids, feedback)
        return tokens if self._decode(ids[:tokens]).rstrip() == feedback else tokens - 1

    def _places(self, ids: Sequence[int], text: str) -> Iterator[tuple[int, int, bool]]:
        """Of every phrase in `text`: its first character, the tokens up to its end, and whether they end with it."""
        at = text.find(self.phrase)
        while at >= 0:
            whole = text[: at + len(self.phrase)]
            end = self._shortest(ids, whole)
            yield at, end, self._decode(ids[:end]) == whole
            at = text.find(self.phrase, at + 1)

    def _shortest(self, ids: Sequence[int], text: str) -> int:
        """Fewest of the `ids` whose text goes up to the end of `text`."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            if self._decode(ids[:middle]).startswith(text):
                high = middle
            else:
                low = middle + 1
        return low

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def parse_sample(ids: Sequence[int], eos_ids: frozenset[int], finder: PhraseFinder, answer: Answer) -> Parsed:
    """Take a sampled sequence apart into actions, forced tokens and the place of the score.

    Args:
        ids: Sampled ids as the engine returned them, possibly with the score and more behind the phrase.
        eos_ids: Ids that end a generation.
        finder: Finds the phrase.
        answer: See :class:`Sampling`.

    Returns:
        What counts. In ``score_position`` stands the index in `ids` of the token sampled where the score belongs, if
        the model got that far on its own (its log-probabilities are then those of the score); otherwise None.
    """
    scale = finder.scale
    if answer == "none":
        return Parsed(0, list(scale.phrase_ids), len(scale.phrase_ids), "phrase", True, None)
    stop = next((i for i, token in enumerate(ids) if token in eos_ids), None)
    body = list(ids[:stop])
    end = finder.end(body)
    written = None
    if end is not None:
        tail = list(scale.tail_ids)
        score_at = end + len(tail)
        if body[end:score_at] == tail and score_at < len(ids):
            token = ids[score_at]
            written = scale.values[scale.score_ids.index(token)] if token in scale.score_ids else None
            if answer == "forced":
                return Parsed(end, body[:score_at], len(tail), "phrase", True, score_at, written)
            if answer == "generated" and written is not None:
                return Parsed(score_at, body[:score_at], 0, "phrase", True, score_at, written)
        if answer == "forced":
            # Counting the tail where it was sampled, and not where it was put right, would bias the policy gradient.
            return Parsed(end, body[:end] + tail, len(tail), "phrase", True, None)
    finish: Finish = "length" if stop is None else "eos"
    if answer == "cut":
        cut = finder.before(body)
        context = [*body[:cut], *scale.phrase_ids]
        place = len(context) if len(context) < len(ids) and list(ids[: len(context)]) == context else None
        found: Finish = finish if end is None else "phrase"
        return Parsed(cut, context, len(scale.phrase_ids), found, True, place, written)
    keep = len(ids) if stop is None else stop + 1
    if answer == "forced":
        forced = list(scale.phrase_ids)
        return Parsed(keep, body + forced, len(forced), finish, True, None)
    return Parsed(keep, body, 0, finish, False, None)
