"""Finding the phrase in sampled tokens, and taking a sample apart: actions, forced tokens, the place of the score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from real_fast.score.scale import ScoreScale
from real_fast.types import AnswerMode, Finish


@dataclass
class Parsed:
    """A sampled text taken apart; see :func:`parse_sample`. The first `num_actions` sampled tokens count as actions."""

    num_actions: int
    context_ids: list[int]
    n_forced: int
    finish: Finish
    has_score: bool
    score_position: int | None
    written_score: float | None = None


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


def parse_sample(ids: Sequence[int], eos_ids: frozenset[int], finder: PhraseFinder, answer: AnswerMode) -> Parsed:
    """Take a sampled sequence apart into actions, forced tokens and the place of the score.

    Args:
        ids: Sampled ids as the engine returned them, possibly with the score and more behind the phrase.
        eos_ids: Ids that end a generation.
        finder: Finds the phrase.
        answer: See :class:`SamplingParams`.

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
    num_actions = len(ids) if stop is None else stop + 1
    if answer == "forced":
        forced = list(scale.phrase_ids)
        return Parsed(num_actions, body + forced, len(forced), finish, True, None)
    return Parsed(num_actions, body, 0, finish, False, None)
