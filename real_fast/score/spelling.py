"""What token ids spell, as the tokenizer's ``decode`` says, quickly: it is asked some times for every sampled text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_UNREADABLE = "\ufffd"  # in place of bytes that are no character


class Spelling:
    """Texts of ids, special tokens included.

    Where the tokenizer's decoder is byte-level BPE's (Qwen, Llama 3, DeepSeek, GPT-2 and most others), a text is the
    bytes of its tokens, one behind the other, which takes a tenth of the time of a call; others are asked as they are.

    Args:
        tokenizer: A Transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._pieces = _pieces(tokenizer.backend_tokenizer) if _is_byte_level(tokenizer) else None
        self._read: tuple[list[int], bytes] = [], b""

    def text(self, ids: Sequence[int]) -> str:
        """What `ids` spell."""
        if self._pieces is not None:
            return self._bytes(self._pieces, ids).decode("utf-8", "replace")
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def shortest(self, ids: Sequence[int], text: str) -> tuple[int, bool]:
        """Fewest of the `ids` whose text begins with `text`, and whether it is `text`; all where that of none does."""
        if self._pieces is not None and _UNREADABLE not in text:
            whole, wanted = self._bytes(self._pieces, ids), text.encode()
            if not whole.startswith(wanted):
                return len(ids), False
            return self._pieces.up_to(ids, len(whole), len(wanted))
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            if self.text(ids[:middle]).startswith(text):
                high = middle
            else:
                low = middle + 1
        return low, self.text(ids[:low]) == text

    def _bytes(self, pieces: _Pieces, ids: Sequence[int]) -> bytes:
        """Of all tokens; the last ones are remembered, as a text is looked at several times."""
        read = self._read  # another thread may put its own there meanwhile
        if read[0] != ids:
            self._read = read = list(ids), pieces.joined(ids)
        return read[1]


class _Pieces:
    """Tokens' bytes, looked up when they are first wanted; none for an id that is no token's."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        # By id: a list is read in half the time of a dictionary, whose entries lie further apart in memory.
        self._known: list[bytes | None] = []

    def joined(self, ids: Sequence[int]) -> bytes:
        """The tokens' bytes, one behind the other."""
        if len(ids) > 1:  # for one, itemgetter gives no tuple
            try:
                return b"".join(itemgetter(*ids)(self._known))
            except (TypeError, IndexError):  # a token that was not wanted before, or none
                pass
        return b"".join(map(self._piece, ids))

    def up_to(self, ids: Sequence[int], size: int, wanted: int) -> tuple[int, bool]:
        """Fewest of the `ids`, which are `size` bytes together, that are `wanted` bytes at least, and whether exactly.

        From the end: what is looked for, a verdict, is there.
        """
        tokens = len(ids)
        while tokens and (before := size - len(self._piece(ids[tokens - 1]))) >= wanted:
            tokens, size = tokens - 1, before
        return tokens, size == wanted

    def _piece(self, token: int) -> bytes:
        known = self._known[token] if 0 <= token < len(self._known) else None
        if known is not None:
            return known
        written = self._backend.id_to_token(token)
        if written is None:
            return b""
        plain = all(letter in _BYTES for letter in written)  # else it is an added token, as it is written
        piece = bytes(_BYTES[letter] for letter in written) if plain else written.encode()
        self._known += [None] * (token + 1 - len(self._known))
        self._known[token] = piece
        return piece


@lru_cache(4)  # whoever spells by the same tokenizer: engines, and the log of rollouts
def _pieces(backend: Any) -> _Pieces:
    return _Pieces(backend)


def _letters() -> dict[str, int]:
    """GPT-2's letters of bytes: what is printable stands for itself, the others are numbered from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _letters()


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether its texts come from the backend's decoder as they are, and that one puts bytes together."""
    kind = type(tokenizer)
    own = isinstance(tokenizer, PreTrainedTokenizerFast) and kind.decode is PreTrainedTokenizerBase.decode
    own = own and kind._decode is PreTrainedTokenizerFast._decode
    return own and isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel)
