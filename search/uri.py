"""Addresses fit to be shown: no password and no path of this machine leaves through a tag, a log or an error.

Text in, text out. Knows nothing of what the addresses lead to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

# Greedy up to the last "@": a password with an unescaped "/" or "@" is hidden too; better too much than less.
_USER_INFO = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"<>]*@")
_SECRET_FIELD = re.compile(
    r"(?i)\b((?:ssl)?password|passwd|pwd|[a-z_-]*token|[a-z_-]*secret|api_?key|access_?key|x-amz-signature|sig)"
    r"(\s*[=:]\s*)(?!\*\*\*)[^\s&;,'\"<>]+"
)
_FILE_ADDRESS = re.compile(r"\b((?:sqlite|file)(?:\+\w+)?:)/[^\s'\"<>]*?([^\s'\"<>/]*)(?=[\s'\"<>]|$)")
_POSIX_PATH = re.compile(r"(?<![\w.:/*~-])/(?:[^\s/'\"<>|:,;()\[\]]+/)+([^\s/'\"<>|:,;()\[\]]*)")
_WINDOWS_PATH = re.compile(r"\b[A-Za-z]:\\(?:[^\s\\'\"<>|:]+\\)*([^\s\\'\"<>|:]*)")


def redact(text: str, *addresses: str) -> str:
    """The text without the user names, passwords and tokens of the addresses in it.

    Args:
        addresses: addresses whose password is hidden also where it stands alone, raw or percent-encoded.
    """
    text = _SECRET_FIELD.sub(r"\1\2***", _USER_INFO.sub(r"\1***@", text))
    for address in addresses:
        for secret in _passwords(address):
            text = text.replace(secret, "***")
    return text


def without_paths(text: str) -> str:
    """The text with every absolute path cut to its last part: `/home/me/data.yaml` becomes `data.yaml`."""
    text = _FILE_ADDRESS.sub(r"\1\2", text)
    return _WINDOWS_PATH.sub(r"\1", _POSIX_PATH.sub(r"\1", text))


def publishable(value: Any, *addresses: str) -> Any:
    """A JSON value whose texts, keys left alone, went through `redact` and `without_paths`."""
    if isinstance(value, str):
        return without_paths(redact(value, *addresses))
    if isinstance(value, Mapping):
        return {key: publishable(item, *addresses) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [publishable(item, *addresses) for item in value]
    return value


def _passwords(address: str) -> set[str]:
    try:
        password = urlsplit(address).password
    except ValueError:  # not an address at all; what looks like one was hidden by the patterns
        return set()
    # Replacing a password of one or two letters everywhere would make nonsense of the text.
    return {p for p in (password, unquote(password or "")) if p and len(p) > 2}
