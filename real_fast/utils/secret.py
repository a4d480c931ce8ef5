"""Passwords and tokens, which no message may show."""

from __future__ import annotations

import os
import re

_HIDDEN = "***"
# Of an address, what stands in front of the host, and its query: either may hold a password or a key.
_USER = re.compile(r"(?<=://)[^\s'\"]*@")
_QUERY = re.compile(r"(://[^\s'\"?#]*)(\?|#(?=[^\s'\"]*=))[^\s'\"]+")
_TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{20,}|(?<=[Bb]earer )\S+")
_NAMES = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|(?:API_?|ACCESS_?|SECRET_?)KEY)$", re.IGNORECASE)
_SHORTEST = 8  # a shorter value could be a word of any message


def masked(text: str) -> str:
    """A text without passwords and queries of addresses, tokens, and what the environment's secrets hold."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAMES.search(name):
            text = text.replace(value, _HIDDEN)
    return _TOKENS.sub(_HIDDEN, _QUERY.sub(rf"\1\2{_HIDDEN}", _USER.sub(f"{_HIDDEN}@", text)))
