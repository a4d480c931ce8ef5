"""The score scale: which token ids mean which score, found from the tokenizer in context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any

import torch

from real_fast.config import PromptConfig, ScaleConfig
from real_fast.errors import ScaleError
from real_fast.score.ending import end_of_turn, thought_closings

# Text that stands before the phrase while its tokens are looked up; a sentence's end, as in a real feedback.
_CONTEXT = "The response follows the rubric."


_WAY_OUT = (
    "choose scale.values that this tokenizer writes in one token (such as 0 to 9), or let a label stand for each, for "
    """example --scale.phrase "Score:" --scale.labels '[" A", " B", ...]' """
    '(docs/methods.md, "Scores of several tokens")'
)


def format_score(value: float) -> str:
    """A score as the model writes it: 4.0 is "4", 4.5 is "4.5"."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


@dataclass(frozen=True)
class _Words:
    """A tokenizer's encoding of plain text, for looking up a phrase and its scores."""

    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return list(self.tokenizer.convert_ids_to_tokens(list(ids)))

    def spelled(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


@cache
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@dataclass(frozen=True)
class ScoreScale:
    """Scores, their token ids, and the phrase in front of them.

    Attributes:
        values: K scores, ascending.
        texts: How each is written: as a number, or by its label.
        score_ids: K distinct token ids.
        phrase: The text in front of a score, its trailing space included.
        phrase_ids: The phrase's tokens after a feedback; the score distribution is read at the last of them.
        tail_start: ``phrase_ids[tail_start:]`` are the tokens that only hold the phrase's trailing white space.
        held: White space that the last visible token holds itself (":\\n" is one token in many vocabularies).
        end_id: The token that ends an answer behind its score; None where the tokenizer has none.
        closings: By the tag that ends a thought, the tokens that are put there in front of an appended phrase.
    """

    values: tuple[float, ...]
    texts: tuple[str, ...]
    score_ids: tuple[int, ...]
    phrase: str
    phrase_ids: tuple[int, ...]
    tail_start: int
    held: str = ""
    end_id: int | None = None
    closings: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def tail_ids(self) -> tuple[int, ...]:
        """Tokens between the phrase's last visible character and the score."""
        return self.phrase_ids[self.tail_start :]

    @property
    def most_appended(self) -> int:
        """Most tokens that are appended to a sampled text: what closes a thought, and the phrase."""
        return max((len(ids) for _, ids in self.closings), default=0) + len(self.phrase_ids)

    @property
    def names(self) -> tuple[str, ...]:
        """The scores as numbers, for people and files."""
        return tuple(map(format_score, self.values))

    @property
    def shown(self) -> tuple[str, ...]:
        """How a prompt names the scores: "4", or "A (for 4)" where a label stands for it."""
        pairs = zip(self.texts, self.names, strict=True)
        return tuple(name if text == name else f"{text.strip()} (for {name})" for text, name in pairs)

    @property
    def span(self) -> float:
        """Largest minus smallest score."""
        return self.values[-1] - self.values[0]

    def contains(self, label: float) -> bool:
        """Whether a label lies between the smallest and the largest score."""
        return self.values[0] <= label <= self.values[-1]

    def values_tensor(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """[K] float32 scores, made once per device: do not change them."""
        return _on_device(self.values, torch.float32, str(device))

    def ids_tensor(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """[K] int64 token ids, made once per device: do not change them."""
        return _on_device(self.score_ids, torch.int64, str(device))

    @classmethod
    def from_config(cls, tokenizer: Any, scale: ScaleConfig, prompt: PromptConfig) -> ScoreScale:
        """That of a run's settings; see :meth:`from_tokenizer`. Raises :class:`ScaleError`."""
        kwargs = prompt.chat_template_kwargs
        return cls.from_tokenizer(tokenizer, scale.values, scale.phrase, scale.labels, kwargs)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        values: Sequence[float],
        phrase: str,
        labels: Sequence[str] = (),
        chat_template_kwargs: Mapping[str, Any] = {},
    ) -> ScoreScale:
        """Find the score tokens by encoding ``feedback + " " + phrase + score`` for every score.

        Every score must be exactly one token after one common prefix, and that prefix must spell the phrase to its last
        character; the family or name of the model plays no part.

        Args:
            tokenizer: A Transformers tokenizer.
            values: At least two different finite numbers.
            phrase: Text in front of the score.
            labels: How each of `values` is written; empty for the numbers themselves.
            chat_template_kwargs: Arguments of the chat template, which may decide how a turn ends.

        Raises:
            ScaleError: A score of several tokens, labels that are not one per score, a tokenizer that merges the
                phrase's end with the score, or two scores with the same token.
        """
        ordered, texts = _scores(values, labels)
        _check_phrase(phrase)
        words = _Words(tokenizer)
        prefix, score_ids = _split(words, phrase, texts)
        phrase_ids = _behind_feedback(words, phrase, prefix)
        visible, held = _visible(words, phrase, phrase_ids)
        end = end_of_turn(tokenizer, chat_template_kwargs)
        closings = thought_closings(tokenizer)
        return cls(ordered, texts, score_ids, phrase, phrase_ids, visible, held, end, closings)


def _scores(values: Sequence[float], labels: Sequence[str]) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """The scores in ascending order, and how each is written. Raises :class:`ScaleError`."""
    given = tuple(map(float, values))
    if len(set(given)) < 2 or len(set(given)) != len(given):
        raise ScaleError(f"scale.values is {list(values)}: at least two different scores are needed")
    written = list(labels) or [format_score(v) for v in given]
    if len(written) != len(given) or len({text.strip() for text in written} - {""}) != len(written):
        raise ScaleError(
            f"scale.labels is {list(labels)} and scale.values {list(values)}: every score needs a label of its own"
        )
    pairs = sorted(zip(given, written, strict=True))
    return tuple(value for value, _ in pairs), tuple(text for _, text in pairs)


def _check_phrase(phrase: str) -> None:
    """Refuse a phrase behind which no score can be read, whatever the tokenizer. Raises :class:`ScaleError`."""
    if phrase and not phrase.strip():
        raise ScaleError(
            f"scale.phrase {phrase!r} is white space alone, which an answer holds everywhere: put words before "
            'the score, such as "Score: "'
        )
    if not phrase or phrase[-1].isalnum():
        raise ScaleError(
            f"scale.phrase {phrase!r} ends in a letter or digit: end it with the space (or sign) before the "
            "score, or the model's probability goes to that space instead of the scores"
        )


def _split(words: _Words, phrase: str, texts: Sequence[str]) -> tuple[list[int], tuple[int, ...]]:
    """The tokens of context and phrase, which every score has in front of it, and the one token of each score.

    Raises:
        ScaleError: The common tokens do not spell the phrase to its end, or a score is not one token of its own.
    """
    start = f"{_CONTEXT} {phrase}"
    encoded = [words.encode(start + text) for text in texts]
    prefix = _common(encoded)
    if words.spelled(prefix) != start and words.spelled(prefix).lstrip() != start:
        shown = {text: words.tokens(ids[len(prefix) :]) for text, ids in zip(texts, encoded, strict=True)}
        at = f"the scores' common tokens end with {words.tokens(prefix[-3:])}"
        raise ScaleError(
            f"this tokenizer merges the end of scale.phrase {phrase!r} with the score, or splits scores in a "
            f"common part: {at}, and the scores follow as {shown}. Choose a scale.phrase whose last character "
            f'stands as a token of its own (such as "score: " or "score="), or other scores: {_WAY_OUT}'
        )
    for text, ids in zip(texts, encoded, strict=True):
        if len(ids) != len(prefix) + 1:
            raise ScaleError(
                f"score {text} is {len(ids) - len(prefix)} tokens {words.tokens(ids[len(prefix) :])} after "
                f"{phrase!r}, and every score must be one: {_WAY_OUT}"
            )
    score_ids = tuple(ids[-1] for ids in encoded)
    if len(set(score_ids)) != len(score_ids):
        raise ScaleError(f"two scores of {list(texts)} have the same token: {words.tokens(score_ids)}")
    return prefix, score_ids


def _common(encoded: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all of several texts begin with, and which leave each at least one of its own."""
    longest = min(len(ids) for ids in encoded) - 1
    same = (len(set(column)) == 1 for column in zip(*encoded, strict=False))
    return list(encoded[0][: sum(takewhile(bool, same))])[:longest]


def _behind_feedback(words: _Words, phrase: str, prefix: Sequence[int]) -> tuple[int, ...]:
    """The phrase's own tokens, of those of context and phrase. Raises :class:`ScaleError`."""
    context = words.encode(_CONTEXT)
    if prefix[: len(context)] != context or len(prefix) == len(context):
        raise ScaleError(
            f"this tokenizer merges the start of scale.phrase {phrase!r} with the feedback before it "
            f"({words.tokens(prefix[: len(context) + 1])}): choose a phrase that starts with a word"
        )
    return tuple(prefix[len(context) :])


def _visible(words: _Words, phrase: str, phrase_ids: Sequence[int]) -> tuple[int, str]:
    """How many of the phrase's tokens spell what is visible of it, and the white space that the last of them holds."""
    context, bare = words.encode(_CONTEXT), f"{_CONTEXT} {phrase}".rstrip()
    count = next(
        (i for i in range(1, len(phrase_ids) + 1) if words.spelled([*context, *phrase_ids[:i]]).strip() == bare),
        len(phrase_ids),
    )
    spelled = words.spelled([*context, *phrase_ids[:count]])[len(words.spelled(context)) :]
    return count, spelled.lstrip()[len(phrase.strip()) :]
