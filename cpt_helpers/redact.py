"""Credentials in text: found where they must not be given, hidden where text is shown or kept."""

from __future__ import annotations

import re

# Tokens by their prefix (hf_hub_token is a key, no token), and ``user:password@`` of a URI, in
# which RFC 3986 allows no "/" or "@".
SECRET = re.compile(
    r"\bhf_(?=\w*\d|[A-Za-z]{30})\w{8,}|\bdapi[0-9a-f]{16,}|\bAKIA[0-9A-Z]{16}\b|\bsk-\w{16,}"
    r"|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"
)
_USER = re.compile(r"(?<=://)[^\s/@]+(?=@)")  # a user's name alone can be a token
_QUERY = re.compile(
    r"([?&][\w.-]*(?:password|pwd|token|secret|sig|signature|key)=)[^&\s'\"]+", re.I
)


def redact(text: object) -> str:
    """Hides tokens and the credentials of URIs; the rest of the text is unchanged.

    Args:
        text: A URI, or text that may quote one, such as an exception of ``requests``.
    """
    return _QUERY.sub(r"\1***", SECRET.sub("***", _USER.sub("***", str(text))))
