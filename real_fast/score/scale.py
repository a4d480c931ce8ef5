"""The score scale: which token ids mean which score, found from the tokenizer in context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from real_fast.errors import ScaleError
from real_fast.score.ending import end_of_turn

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
        end_id: The token that ends an answer behind its score; None where the tokenizer has none.
        held: White space that the last visible token holds itself (":\\n" is one token in many vocabularies).
    """

    values: tuple[float, ...]
    texts: tuple[str, ...]
    score_ids: tuple[int, ...]
    phrase: str
    phrase_ids: tuple[int, ...]
    tail_start: int
    held: str = ""
    end_id: int | None = None

    @property
    def tail_ids(self) -> tuple[int, ...]:
        """Tokens between the phrase's last visible character and the score."""
        return self.phrase_ids[self.tail_start :]

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
    def from_tokenizer(
        cls, tokenizer: Any, values: Sequence[float], phrase: str, labels: Sequence[str] = ()
    ) -> ScoreScale:
        """Find the score tokens by encoding ``feedback + " " + phrase + score`` for every score.

        Every score must be exactly one token after one common prefix, and that prefix must spell the phrase to its last
        character; the family or name of the model plays no part.

        Args:
            tokenizer: A Transformers tokenizer.
            values: At least two different finite numbers.
            phrase: Text in front of the score.
            labels: How each of `values` is written; empty for the numbers themselves.

        Raises:
            ScaleError: A score of several tokens, labels that are not one per score, a tokenizer that merges the
                phrase's end with the score, or two scores with the same token.
        """
        given = tuple(map(float, values))
        if len(set(given)) < 2 or len(set(given)) != len(given):
            raise ScaleError(f"scale.values is {list(values)}: at least two different scores are needed")
        written = list(labels) or [format_score(v) for v in given]
        if len(written) != len(given) or len({text.strip() for text in written} - {""}) != len(written):
            raise ScaleError(
                f"scale.labels is {list(labels)} and scale.values {list(values)}: every score needs a label of its own"
            )
        ordered, texts = (tuple(x) for x in zip(*sorted(zip(given, written, strict=True)), strict=True))
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

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        def tokens(ids: Sequence[int]) -> list[str]:
            return list(tokenizer.convert_ids_to_tokens(list(ids)))

        start = f"{_CONTEXT} {phrase}"
        context = encode(_CONTEXT)
        encoded = [encode(start + text) for text in texts]
        prefix = encoded[0]
        for ids in encoded[1:]:
            same = next(
                (i for i, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), min(len(prefix), len(ids))
            )
            prefix = prefix[:same]
        prefix = prefix[: min(len(ids) for ids in encoded) - 1]

        def spelled(ids: Sequence[int]) -> str:
            return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

        if spelled(prefix) != start and spelled(prefix).lstrip() != start:
            shown = {text: tokens(ids[len(prefix) :]) for text, ids in zip(texts, encoded, strict=True)}
            at = f"the scores' common tokens end with {tokens(prefix[-3:])}"
            raise ScaleError(
                f"this tokenizer merges the end of scale.phrase {phrase!r} with the score, or splits scores in a "
                f"common part: {at}, and the scores follow as {shown}. Choose a scale.phrase whose last character "
                f'stands as a token of its own (such as "score: " or "score="), or other scores: {_WAY_OUT}'
            )
        for text, ids in zip(texts, encoded, strict=True):
            if len(ids) != len(prefix) + 1:
                raise ScaleError(
                    f"score {text} is {len(ids) - len(prefix)} tokens {tokens(ids[len(prefix) :])} after "
                    f"{phrase!r}, and every score must be one: {_WAY_OUT}"
                )
        score_ids = tuple(ids[-1] for ids in encoded)
        if len(set(score_ids)) != len(score_ids):
            raise ScaleError(f"two scores of {list(texts)} have the same token: {tokens(score_ids)}")
        if prefix[: len(context)] != context or len(prefix) == len(context):
            raise ScaleError(
                f"this tokenizer merges the start of scale.phrase {phrase!r} with the feedback before it "
                f"({tokens(prefix[: len(context) + 1])}): choose a phrase that starts with a word"
            )
        phrase_ids = tuple(prefix[len(context) :])
        bare = start.rstrip()
        visible = next(
            (i for i in range(1, len(phrase_ids) + 1) if spelled([*context, *phrase_ids[:i]]).strip() == bare),
            len(phrase_ids),
        )
        held = spelled([*context, *phrase_ids[:visible]])[len(spelled(context)) :].lstrip()[len(phrase.strip()) :]
        return cls(ordered, texts, score_ids, phrase, phrase_ids, visible, held, end_of_turn(tokenizer))
