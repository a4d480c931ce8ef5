"""What is data stays data: no text of a row or of a feedback becomes a control token or a piece of the chat markup.

Prompts are put together with borders around what is data. A control token that data spells (the end of a turn,
``<think>``) is encoded as the plain text that it is, so the judge reads what was written. A piece of markup that is
plain text in the vocabulary (Mistral's ``[/INST]``) has no second encoding: a space is put into it. All other text is
encoded as the tokenizer encodes it.
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NewType

from tokenizers import Tokenizer

from real_fast.errors import PromptError
from real_fast.prompt.markup import END_THINK, THINK, find_markup
from real_fast.score.ending import thought_closings

_ADDED = '"added_tokens":'
Marked = NewType("Marked", str)  # a text with borders around what is data; a text without them would all be trusted
Pieces = list[tuple[str, bool]]  # texts in order, and whether each is data
EncodeFeedback = Callable[[Sequence[str]], list[list[int]]]  # what Guard.encode_feedback is


class Guard:
    """Marks data in texts, and encodes marked texts.

    Control tokens are all added tokens, special or not, but for those that are white space or a plain word, which a
    vocabulary may hold for ordinary text.

    Args:
        tokenizer: A Transformers tokenizer.
        chat_template_kwargs: Further arguments of its chat template.

    Raises:
        PromptError: A chat template that cannot hold a user's message.
    """

    def __init__(self, tokenizer: Any, chat_template_kwargs: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.control = control_tokens(tokenizer)
        self.markup = find_markup(tokenizer, chat_template_kwargs, list(self.control))
        self._closing = dict(thought_closings(tokenizer))[END_THINK] if self.markup.opens_thinking else ()
        # Nobody's data holds these: private characters, drawn anew, which no filter of a template changes.
        secret = "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(5))
        self._open, self._close, self._joint = (secret + mark for mark in "\ue000\ue001\ue002")
        self._borders = re.compile(f"({self._open}|{self._close})")
        self._tokens = _any_of(self.control)
        self._ids = frozenset(self.control.values())
        # Without a Rust tokenizer, control tokens cannot be told apart by where they stand: they are broken up too.
        self._fast = getattr(tokenizer, "is_fast", False)
        broken = self.markup.marks if self._fast else self.markup.marks | set(self.control)
        self._marks = _any_of(broken, spaced=True)
        self._overlapping = re.compile(f"(?=({self._marks.pattern}))")
        self._same_int: dict[int, int] = {}

    def data(self, text: str) -> str:
        """A text with borders around it; white space at its ends stays outside, where templates trim it."""
        core = self._borders.sub("", text).strip()
        if not core:
            return text
        lead, trail = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
        return f"{lead}{self._open}{core}{self._close}{trail}"

    def hidden(self, text: str) -> str:
        """A text whose control tokens a chat template does not see; for templates that take messages apart."""
        return self._tokens.sub(lambda found: found[0][0] + self._joint + found[0][1:], text)

    def count(self, marked: str) -> int:
        """How many pieces of data a marked text has."""
        return marked.count(self._open)

    def shown(self, marked: str) -> str:
        """A marked text as the model reads it.

        Raises:
            PromptError: A template has torn data apart.
        """
        return "".join(text for text, _ in self._pieces(marked))

    def encode(self, marked: Sequence[Marked]) -> list[list[int]]:
        """Token ids of marked texts; many at once use all cores.

        Raises:
            PromptError: Data that this tokenizer cannot encode but as a control token.
        """
        if not marked:
            return []
        pieces = [self._pieces(text) for text in marked]
        texts = ["".join(text for text, _ in some) for some in pieces]
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        same = self._same_int.setdefault  # one int object per id, or a large dataset takes 36 bytes a token, not 8
        for place, ids in enumerate(encoded):
            wanted = [self.control[token] for own, data in pieces[place] if not data for token in self._in(own)]
            if self._fast and [token for token in ids if token in self._ids] != wanted:
                encoded[place] = self._spelled(pieces[place])
        return [[same(token, token) for token in ids] for ids in encoded]

    def encode_feedback(self, feedbacks: Sequence[str]) -> list[list[int]]:
        """Token ids of feedback that is trained on, white space at its ends left out.

        A feedback may begin with a reasoning model's own ``<think>...</think>``, whose two tags are then the model's
        tokens (where the generation prompt has opened the block, the first ``</think>`` closes it). All else is data.
        A feedback that leaves that block open stands behind it: what closes it comes first, or the answer would be a
        thought.

        Raises:
            PromptError: As of :meth:`encode`.
        """
        answers = [self._answer(text.strip()) for text in feedbacks]
        encoded = self.encode([Marked(text) for text, _ in answers])
        return [
            [*self._closing, *ids] if left_open else ids for ids, (_, left_open) in zip(encoded, answers, strict=True)
        ]

    def _answer(self, text: str) -> tuple[str, bool]:
        """A feedback with borders around its data, and whether it leaves the generation prompt's thought open."""
        opening = THINK if text.startswith(THINK) else ""
        thought, closing, rest = text[len(opening) :].partition(END_THINK)
        if not closing or not (opening or self.markup.opens_thinking):
            return self.data(text), self.markup.opens_thinking
        return f"{opening}{self.data(thought)}{closing}{self.data(rest)}", False

    def _in(self, text: str) -> list[str]:
        return self._tokens.findall(text)

    def _spelled(self, pieces: Pieces) -> list[int]:
        """Token ids, with control tokens where no data is and nowhere else."""
        tokenizer, names, ids = _renamed(self.tokenizer)
        text = "".join(own if data else self._tokens.sub(lambda found: names[found[0]], own) for own, data in pieces)
        found = tokenizer.encode(text, add_special_tokens=False).ids
        if made := self._ids.intersection(found) - set(ids):
            token = self.tokenizer.convert_ids_to_tokens(min(made))
            raise PromptError(f"this tokenizer encodes {text[:60]!r}... with a control token that it spells: {token!r}")
        return [ids.get(token, token) for token in found]

    def _pieces(self, marked: str) -> Pieces:
        """What is data in a marked text and what is not, with a space in every mark that data has a part in."""
        pieces: Pieces = []
        depth = 0
        for part in self._borders.split(marked):
            if part in (self._open, self._close):
                depth += 1 if part == self._open else -1
                if depth not in (0, 1):
                    break
            elif part:
                pieces.append((part.replace(self._joint, ""), depth == 1))
        if depth:
            raise PromptError("a template takes the texts of a row apart: it must write them whole")
        return self._broken(pieces)

    def _broken(self, pieces: Pieces) -> Pieces:
        text = "".join(own for own, _ in pieces)
        if not self._marks.search(text):
            return pieces
        starts = list(accumulate((len(own) for own, _ in pieces), initial=0))
        cuts: set[int] = set()
        for match in self._overlapping.finditer(text):
            a, b = match.span(1)
            for place in range(bisect_right(starts, a) - 1, bisect_left(starts, b)):  # the pieces that it runs over
                if pieces[place][1]:
                    cuts.add(max(a + 1, starts[place]))
        ordered = sorted(cuts)
        result: Pieces = []
        for (own, data), at in zip(pieces, starts, strict=False):
            inside = ordered[bisect_left(ordered, at) : bisect_left(ordered, at + len(own))]
            ends = [0, *(cut - at for cut in inside), len(own)]
            result.append((" ".join(own[a:b] for a, b in pairwise(ends)), data))
        return result


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Texts and ids of a tokenizer's control tokens: see :class:`Guard`."""
    special = set(tokenizer.all_special_tokens)
    added = {token.content: (id_, token.special) for id_, token in tokenizer.added_tokens_decoder.items()}
    control = {text: id_ for text, (id_, own) in added.items() if own or text in special or not _ordinary(text)}
    control |= {text: tokenizer.convert_tokens_to_ids(text) for text in special - set(added)}
    return {text: id_ for text, id_ in control.items() if len(text) > 1 and text.strip()}


def _ordinary(text: str) -> bool:
    word = text.strip("▁ \t\r\n")
    return not word or word.isalnum()


def _any_of(texts: Any, spaced: bool = False) -> re.Pattern[str]:
    """Finds the longest of several texts; `spaced`, with any white space where one has some."""
    several = sorted(texts, key=lambda text: (-len(text), text))
    found = (r"\s+".join(map(re.escape, text.split())) if spaced else re.escape(text) for text in several)
    return re.compile("|".join(found) or "(?!)")


@lru_cache(maxsize=2)
def _renamed(tokenizer: Any) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
    """A tokenizer that knows control tokens by secret names alone, those names, and the true ids of its added tokens.

    It takes a second for a large vocabulary, so it is made when data first spells a control token.
    """
    control, secret = control_tokens(tokenizer), secrets.token_hex(8)
    names = {text: f"\ue003{secret}{n:06d}\ue003" for n, text in enumerate(control)}
    settings = tokenizer.backend_tokenizer.to_str()
    start = settings.index(_ADDED) + len(_ADDED)  # the list stands in front of the vocabulary, which is not parsed
    added, end = json.JSONDecoder().raw_decode(settings, start)
    true = {names.get(token["content"], token["content"]): token["id"] for token in added}
    added = [token | {"content": names.get(token["content"], token["content"])} for token in added]
    renamed = Tokenizer.from_str(settings[:start] + json.dumps(added) + settings[end:])
    renamed.no_truncation()
    renamed.no_padding()
    ids = {known: id_ for name, id_ in true.items() if (known := renamed.token_to_id(name)) is not None}
    return renamed, names, ids
