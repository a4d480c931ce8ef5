"""Finding the verdict in sampled tokens, and taking a sample apart: actions, forced tokens, the place of the score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from real_fast.score.scale import ScoreScale
from real_fast.score.spelling import Spelling
from real_fast.score.verdict import Place, Written, phrases_outside, thought_cut_off, thought_left_open, written_behind
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
    """Finds the phrase in sampled ids by decoding them, whatever tokens spell it, and never changes an id."""

    def __init__(self, tokenizer: Any, scale: ScoreScale) -> None:
        self.spelling = Spelling(tokenizer)
        self.scale = scale
        self.phrase = scale.phrase.strip()
        self._stem = self.phrase + scale.held
        self.space = scale.phrase[len(scale.phrase.rstrip()) :]

    def thought(self, prompt_ids: Sequence[int]) -> str:
        """What closes the thought that a prompt leaves open, as templates of reasoning models do; empty for none."""
        return thought_left_open(self.decode(prompt_ids[-8:]))

    def closing(self, text: str, thought: str) -> tuple[int, ...]:
        """Tokens that close the thought in which `text` was cut off, so that what is appended is an answer."""
        return dict(self.scale.closings).get(thought_cut_off(text, self.phrase, thought), ())

    def end(self, ids: Sequence[int]) -> int | None:
        """Number of tokens up to and including the one that completes the first verdict's phrase, or None.

        A token that completes the phrase and goes on behind it ("isn't") completes nothing.
        """
        text = self.decode(ids)
        ends = (self.ending(ids, text[: place.at] + self._stem) for place in self.places(ids, text))
        return next((end for end in ends if end is not None), None)

    def before(self, ids: Sequence[int]) -> int:
        """Number of tokens in front of the first verdict's phrase, or of all; white space at their end does not count.

        A token that runs from the feedback into the phrase goes with the phrase.
        """
        text = self.decode(ids)
        first = next(self.places(ids, text), None)
        return self.feedback(ids, text if first is None else text[: first.at])

    def settled(self, ids: Sequence[int], answer: AnswerMode, thought: str = "") -> bool:
        """Whether the verdict is written, and nothing that may be sampled behind `ids` changes what it is.

        The place of the score has then been sampled or missed, and what follows it shows where a number ends.
        Arguments as of :func:`parse_sample`.
        """
        text = self.decode(ids)
        for place in self.places(ids, text, thought):
            written = self.written(text, place)
            if place.sure and written.sure and (answer != "generated" or written.score is not None):
                return True
            if answer != "generated":
                return False  # the first one decides
        return False

    def waits_for(self, ids: Sequence[int], thought: str = "") -> str:
        """What has to be sampled before `ids` may be settled.

        "number": a token behind the score; a string that ends a thought or a quotation; "" for a verdict.
        """
        text = self.decode(ids)
        found = [self.written(text, place) for place in self.places(ids, text, thought)]
        if any(written.score is not None and not written.sure for written in found):
            return "number"
        return phrases_outside(text, self.phrase, thought)[1]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, special tokens included."""
        return self.spelling.text(ids)

    def places(self, ids: Sequence[int], text: str, thought: str = "") -> Iterator[Place]:
        """Verdicts' places in `text`, which is that of `ids`, but for tokens that make another word of the phrase."""
        for place in phrases_outside(text, self.phrase, thought)[0]:
            behind = place.at + len(self.phrase)
            goes_on = self.phrase[-1].isalnum() and text[behind : behind + 1].isalnum()
            if not goes_on or self.ending(ids, text[:behind]) is not None:
                yield place

    def written(self, text: str, place: Place) -> Written:
        """The score behind a phrase of `text`."""
        return written_behind(text, place.at + len(self.phrase), self.space, self.scale.texts)

    def ending(self, ids: Sequence[int], text: str) -> int | None:
        """Fewest of the `ids` whose text is `text`; None where none ends there."""
        tokens, exactly = self.spelling.shortest(ids, text)
        return tokens if exactly else None

    def feedback(self, ids: Sequence[int], text: str) -> int:
        """Number of tokens of a feedback: `text`, the beginning of what `ids` spell."""
        feedback = text.rstrip()
        tokens, exactly = self.spelling.shortest(ids, feedback)
        if exactly:
            return tokens
        return tokens if self.decode(ids[:tokens]).rstrip() == feedback else tokens - 1

    def phrase_from(self, ids: Sequence[int], feedback: str) -> tuple[int, int]:
        """How the context goes on behind a feedback: ``ids[:kept] + phrase_ids[own:]``, as much as possible of `ids`.

        All of the phrase's own tokens but its tail are kept where `ids` spell it and end there (in other tokens too).
        """
        end = self.ending(ids, feedback + self._stem)
        if end is not None:
            return end, self.scale.tail_start
        for own in range(self.scale.tail_start - 1, 0, -1):
            kept = self.ending(ids, feedback + self.decode(self.scale.phrase_ids[:own]).lstrip())
            if kept is not None:
                return kept, own
        return self.feedback(ids, feedback), 0


def parse_sample(
    ids: Sequence[int], eos_ids: frozenset[int], finder: PhraseFinder, answer: AnswerMode, thought: str = ""
) -> Parsed:
    """Take a sampled sequence apart into actions, forced tokens and the place of the score.

    Args:
        ids: Sampled ids as the engine returned them, possibly with the score and more behind the phrase.
        eos_ids: Ids that end a generation.
        finder: Finds the phrase.
        answer: See :class:`SamplingParams`. With "generated" the last phrase with a score behind it is the verdict, and
            with "forced" and "cut" the first phrase: an answer ends there, whatever was sampled behind it. Where there
            is none, one is appended, and what closes a thought in front of it.
        thought: What :meth:`PhraseFinder.thought` says of the prompt.

    Returns:
        What counts. In ``score_position`` stands the index in `ids` of the token sampled where the score belongs, if
        the model got that far on its own (its log-probabilities are then those of the score); otherwise None.
    """
    scale = finder.scale
    if answer == "none":
        appended = [*finder.closing("", thought), *scale.phrase_ids]
        return Parsed(0, appended, len(appended), "phrase", True, None)
    stop = None if eos_ids.isdisjoint(ids) else next(i for i, token in enumerate(ids) if token in eos_ids)
    body = ids if stop is None else ids[:stop]
    num_actions = len(ids) if stop is None else stop + 1
    finish: Finish = "length" if stop is None else "eos"
    text = finder.decode(body)
    found = [(place, finder.written(text, place)) for place in finder.places(body, text, thought)]
    if answer == "generated":
        scored = [(place, written.score) for place, written in found if written.score is not None]
        if not scored:
            return Parsed(num_actions, list(body), 0, finish, False, None)
        place, score = scored[-1]
        at = finder.ending(body, text[: place.at] + finder.phrase + finder.space)
        if at is None or at >= len(body) or body[at] != scale.score_ids[score]:  # in tokens that are not the scale's
            return Parsed(num_actions, list(body), 0, finish, False, None, scale.values[score])
        return Parsed(at, list(body[:at]), 0, "phrase", True, at, scale.values[score])
    value, closing = None, () if found else finder.closing(text, thought)
    if found:
        place, written = found[0]
        finish, feedback = "phrase", text[: place.at]
        value = None if written.score is None else scale.values[written.score]
        kept, own = finder.phrase_from(body, feedback) if answer == "forced" else (finder.feedback(body, feedback), 0)
        # Counting the tail where it was sampled, and not where it was put right, would bias the policy gradient. A
        # token that completes the phrase and runs on behind it is an action, and gives way to the phrase's own.
        num_actions = kept + (answer == "forced" and own < scale.tail_start)
    elif answer == "forced":
        kept, own = len(body), 0
    else:
        kept = num_actions = finder.feedback(body, text)
        own = 0
    context = [*body[:kept], *closing, *scale.phrase_ids[own:]]
    there = len(context) < len(ids) and list(ids[kept : len(context)]) == context[kept:]
    n_forced = len(context) - kept
    return Parsed(num_actions, context, n_forced, finish, True, len(context) if there else None, value)
