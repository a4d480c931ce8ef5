"""Passwords and tokens, which no message may show."""

from __future__ import annotations

import os
import re

_HIDDEN = "***"
# Of an address, what stands in front of the host, and its query: either may hold a password or a key.
_USER = re.compile(r"(?<=://)[^\s'\"]*@")
_QUERY = re.compile(r"(://[^\s'\"?#]*)(\?|#(?=[^\s'\"]*=))[^\s'\"]+")
_TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{20,}|(?<=[Bb]earer )\S+")
_NAMES = re.compile(  # of variables; PWD alone is the working folder, and SSH_ASKPASS a program
    r"(?:TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?|(?:^|_)(?:PASS|AUTH|CREDS?|JWT)|_PWD?"
    r"|(?:API|ACCESS|SECRET|PRIVATE|ACCOUNT|STORAGE|SIGNING|ENCRYPTION|MASTER|DEPLOY|SSH)_?KEYS?)"
    r"(?:_?[0-9]+|_(?:OLD|NEW|DEV|TEST|PROD|BACKUP))?$",
    re.IGNORECASE,
)
_SHORTEST = 8  # a shorter value could be a word of any message


def masked(text: str) -> str:
    """A text without passwords and queries of addresses, tokens, and what the environment's secrets hold."""
    known = [value for name, value in os.environ.items() if len(value) >= _SHORTEST and _NAMES.search(name)]
    for value in sorted(known, key=len, reverse=True):  # one may begin with another
        text = text.replace(value, _HIDDEN)
    return _TOKENS.sub(_HIDDEN, _QUERY.sub(rf"\1\2{_HIDDEN}", _USER.sub(f"{_HIDDEN}@", text)))
