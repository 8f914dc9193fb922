"""Credentials in text: finds them in parameters, and hides them in output and files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# Tokens by their prefix (hf_hub_token is a key, not a token), and ``user:password@`` of a URI,
# where RFC 3986 allows no "/" or "@".
SECRET = re.compile(
    r"\bhf_(?=\w*\d|[A-Za-z]{30})\w{8,}|\bdapi[0-9a-f]{16,}|\bAKIA[0-9A-Z]{16}\b|\bsk-\w{16,}"
    r"|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"
)
_USER = re.compile(r"(?<=://)[^\s/@]+(?=@)")  # a user's name alone can be a token
_QUERY = re.compile(
    r"([?&][\w.-]*(?:password|pwd|token|secret|sig|signature|key)=)[^&\s'\"]+", re.I
)


def redact(text: object) -> str:
    """Replaces tokens and the credentials of URIs in a text by ``***``."""
    return _QUERY.sub(r"\1***", SECRET.sub("***", _USER.sub("***", str(text))))


def has_token(value: Any) -> bool:
    """Returns whether a string inside a value looks like an access token."""
    return any(SECRET.search(text) for _, text in strings(value))


def strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields each string in nested values, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from strings(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner, key)
