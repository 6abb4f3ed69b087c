"""Secrets are masked where text leaves the process: records, reports, errors, what is printed.

Nothing is ever written about the environment itself. But a URL may hold a password or a signature, a command line a
token, and the error of a library a header; whoever may read a run folder or a log need not be the one who may use them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MASK = "***"
#: Names of settings, flags, parameters of a query and headers that hold a secret. Each word stands for itself: `token`
#: is one, `tokenizer` and `tokens` are not.
_SECRET = (
    r"(?!(?:pad|cls|class|bos|eos|unk|mask|sep|num|max)[-_]token)"
    r"(?:[a-z0-9]+[-_.])*(?:[a-z0-9]*(?:token|secret|password|passwd|passphrase|signature)|pwd|sig|sas|authorization"
    r"|credentials?|cookie|(?:api|access|account|private|secret|storage|encryption)[-_]?key(?:[-_]?id)?)"
)
_NAME = re.compile(_SECRET, re.IGNORECASE)
_SCHEME = r"[a-z][a-z0-9+.-]+:/{1,2}"  # one, where a URL was taken for a path
#: A URL in a text, up to a blank, a quote or a bracket; what follows the last letter of it belongs to the sentence.
_URL = re.compile(rf"({_SCHEME})([^\s\"<>`|]*[^\s\"<>`|.,:;)\]}}'])", re.IGNORECASE)
_WHOLE_URL = re.compile(rf"({_SCHEME})(\S*)", re.IGNORECASE)
#: user@, user:password@ in front of a host; also a password with characters that belong escaped, behind no port.
_USER = re.compile(r"[^/?#]*@|[^/?#@:\[]*:(?!\d*(?:[/?#]|$))\S*@")
#: name=value, and "name": value as JSON, Python or a header writes it; in quotes the value ends where they do.
_NAMED = re.compile(
    rf"(?<![\w-])(-{{0,2}}{_SECRET})((?:\s*=|['\"]\s*:)\s*(?:b(?=['\"]))?)"
    r"(?:(['\"])(?:\\.|(?!\3).)+|(?:(?:Bearer|Basic|Token)\s+)?[^\s'\"&,;)}\]]+)",
    re.IGNORECASE,
)
_HEADER = re.compile(r"\b((?:proxy-)?authorization\s*:\s*(?:\w+\s+)?|Bearer\s+|Basic\s+(?=\S*[0-9=]))[^\s'\",;]+", re.I)
#: Schemes of Azure, where CONTAINER@ACCOUNT is a place.
_PLACES = ("abfs", "abfss", "wasb", "wasbs", "az")
#: fsspec's options of a request whose values are secret under any name.
_REQUEST_OPTIONS = ("headers", "params", "auth", "cookies")
#: Shorter values of the environment are too likely to be a word of a message.
_SHORTEST = 6


def redacted(text: object) -> str:
    """A text with a mask in the place of each secret; a text without one stays as it is.

    Masked are: user and password, query and fragment of a URL; values behind the name of a secret (`token=...`,
    `"api_key": "..."`, `Authorization: ...`); and whatever the environment, or fsspec's configuration, holds under such
    a name.
    """
    found = str(text)
    for secret in sorted(set(_known_secrets()), key=len, reverse=True):
        found = found.replace(secret, MASK)
    whole = _WHOLE_URL.fullmatch(found)
    found = _masked_url(whole) if whole else _URL.sub(_masked_url, found)
    return _HEADER.sub(rf"\g<1>{MASK}", _NAMED.sub(rf"\g<1>\g<2>\g<3>{MASK}", found))


def redacted_words(words: Sequence[str]) -> list[str]:
    """The words of a command, masked; so is the word behind `--token` and the like."""
    masked, named = [], False
    for word in words:
        masked.append(MASK if named and not word.startswith("--") else redacted(word))
        named = word.startswith("-") and _NAME.fullmatch(word.lstrip("-")) is not None
    return masked


def redacted_values(value: Any) -> Any:
    """JSON values, masked: texts, and whatever stands under the name of a secret."""
    if isinstance(value, Mapping):
        return {
            key: MASK if item and isinstance(item, str) and _NAME.fullmatch(str(key)) else redacted_values(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted_values(item) for item in value]
    return redacted(value) if isinstance(value, str) else value


def refuse_secrets(url: str) -> None:
    """Raise ValueError for the URL of a folder with a query or a password, which would be stored with every run, and
    which every user of a machine sees among its processes."""
    found = _WHOLE_URL.fullmatch(url)
    if found is None or found[1].lower().startswith("file:"):
        return
    if _USER.match(found[2]):
        raise ValueError(
            "a URL with a password would be printed and stored with every run: give it without, and the header in "
            'the environment variable FSSPEC_HTTP, as {"headers": {"Authorization": "..."}}'
        )
    if "?" in url or "#" in url:
        raise ValueError(
            f"{redacted(url)}: give the URL of a folder, without '?' and '#'; what every request needs goes into the "
            'environment variable FSSPEC_HTTP, as {"params": {"token": "..."}}'
        )


def _masked_url(found: re.Match[str]) -> str:
    scheme, rest = found[1], found[2]
    user = _USER.match(rest)
    if user and not (scheme.lower().rstrip(":/") in _PLACES and ":" not in user[0]):
        rest = f"{MASK}@{rest[user.end() :]}"
    place = re.match(r"[^?#]*", rest)
    assert place is not None
    mark = rest[place.end() : place.end() + 1]
    return f"{scheme}{place[0]}{mark}{MASK if mark else ''}"


def _known_secrets() -> Iterator[str]:
    """Secrets that this process knows: a library may say them in an error, under no name."""
    for name, value in os.environ.items():
        if _NAME.fullmatch(name) and len(value) >= _SHORTEST and not os.path.exists(value):
            yield value
    configured = sys.modules.get("fsspec.config")
    for options in configured.conf.values() if configured is not None else ():
        yield from _secrets_of(options)


def _secrets_of(options: Any, secret: bool = False) -> Iterator[str]:
    if isinstance(options, Mapping):
        for name, value in options.items():
            below = secret or name in ("key", *_REQUEST_OPTIONS) or _NAME.fullmatch(str(name)) is not None
            yield from _secrets_of(value, below)
    elif isinstance(options, list | tuple):
        for value in options:
            yield from _secrets_of(value, secret)
    elif secret and isinstance(options, str):
        yield from (part for part in (options, options.rpartition(" ")[2]) if len(part) >= _SHORTEST)
