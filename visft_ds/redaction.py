"""Secrets are refused where they come in, and masked where run.json is written and errors are printed.

A run folder and a log may be read by others than who may use a token: it belongs into the environment.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"
#: Names of settings and environment variables that hold a secret: `api_key` and `HF_TOKEN` do, `tokenizer` does not.
_SECRET = re.compile(r"(?i)(?:.*[_.-])?(?:token|secret|passw(?:or)?d|credentials?|api_?key|access_?key(?:_id)?|sas)")
#: User and password before the host of a URL; its query and fragment. Bounded, so that a long text costs linear time.
_USER = re.compile(r"(:/{1,2})[^\s/?#@]{1,200}@(?=[^\s/]{1,200})")
_QUERY = re.compile(r"(://[^\s?#'\"]{1,2000})[?#][^\s'\"]{1,4000}")
_SHORTEST = 6  #: letters; shorter values of the environment are too likely to be a word of a message


def redacted(text: object) -> str:
    """A text with a mask in the place of passwords and queries of URLs, and of secrets that this process knows."""
    found = str(text)
    for secret in sorted(set(_known_secrets()), key=len, reverse=True):
        found = found.replace(secret, MASK)
    return _QUERY.sub(rf"\1?{MASK}", _USER.sub(rf"\1{MASK}@", found))


def redacted_values(value: Any) -> Any:
    """JSON values with their texts masked."""
    if isinstance(value, Mapping):
        return {key: MASK if item and is_secret(str(key)) else redacted_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_values(item) for item in value]
    return redacted(value) if isinstance(value, str) else value


def is_secret(name: str) -> bool:
    """Return True for the name of a setting or variable that holds a secret."""
    return _SECRET.fullmatch(name) is not None


def refuse_secrets(url: str) -> str:
    """The URL of a folder. Raises ValueError for a password or a query, which would be stored with each run."""
    if "://" in url and not url.lower().startswith("file:") and (_USER.search(url) or "?" in url or "#" in url):
        raise ValueError(
            "a URL may have no password, query or fragment, which each run would record; headers go into FSSPEC_HTTP"
        )
    return url


def _known_secrets() -> Iterator[str]:
    """Values of the environment and of fsspec's configuration, which an error of a library may show."""
    yield from (value for name, value in os.environ.items() if is_secret(name) and len(value) >= _SHORTEST)
    yield from _texts(getattr(sys.modules.get("fsspec.config"), "conf", None))


def _texts(options: Any) -> Iterator[str]:
    if isinstance(options, Mapping | list | tuple):
        for value in options.values() if isinstance(options, Mapping) else options:
            yield from _texts(value)
    elif isinstance(options, str):
        yield from (part for part in (options, options.rpartition(" ")[2]) if len(part) >= _SHORTEST)
