"""Secrets are refused where they come in, and masked where run.json is written and errors are printed.

Others than the owner of a token may read a run folder or a log: secrets belong in the environment.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

MASK = "***"
#: Names of settings and environment variables that hold a secret: `api_key` and `HF_TOKEN` do, `tokenizer`
#: does not.
SECRET = re.compile(
    r"(?i)(?:.*[_.-])?(?:token|secret|passw(?:or)?d|credentials?|api_?key|access_?key(?:_id)?|sas)"
)
#: User and password before the host of a URL, also of one without a scheme; its query and fragment. Bounded,
#: so that a long text costs linear time.
_USER = re.compile(r"((?:^|[\s'\"(=,]|:)/{1,2})[^\s/?#@]{1,200}@(?=[^\s/]{1,200})")
#: The same as scp and rsync write it. Names of models may have a colon and an @ too, and say nothing secret.
_LOGIN = re.compile(
    r"(?<![\w.:/-])(?!timm:|hf-hub:|open_clip:)[\w.+-]{1,64}:[^\s/?#@:]{1,200}@(?=[\w.-]{1,200})"
)
_QUERY = re.compile(r"(://[^\s?#'\"]{1,2000})[?#][^\s'\"]{1,4000}")
_SHORTEST = 6  #: letters; shorter values of the environment are too likely to be a word of a message


def redacted(text: object) -> str:
    """A text with a mask in the place of passwords and queries of URLs, and of secrets that this process
    knows.
    """
    # Values of the environment and texts in fsspec's configuration, which an error of a library may show.
    known = [value for name, value in os.environ.items() if SECRET.fullmatch(name)]
    options = [getattr(sys.modules.get("fsspec.config"), "conf", None)]
    while options:
        value = options.pop()
        if isinstance(value, Mapping):
            options += value.values()
        elif isinstance(value, list | tuple):
            options += value
        elif isinstance(value, str):
            known += [value, value.rpartition(" ")[2]]  # of "Bearer abc" the second word, too
    masked = str(text)
    secrets = {secret for secret in known if len(secret) >= _SHORTEST}
    for secret in sorted(secrets, key=len, reverse=True):  # one may be a part of another
        masked = masked.replace(secret, MASK)
    masked = _USER.sub(rf"\1{MASK}@", masked)
    masked = _LOGIN.sub(f"{MASK}@", masked)
    return _QUERY.sub(rf"\1?{MASK}", masked)


def visible(text: str) -> str:
    """A text for a terminal: signs that would move its cursor, colour it or turn its direction are escapes.

    Ends of lines stay: messages of several lines have them.
    """
    signs = []
    for sign in text:
        is_harmless = sign.isprintable() or sign == "\n"
        signs.append(sign if is_harmless else ascii(sign)[1:-1])
    return "".join(signs)


def redacted_values(value: Any) -> Any:
    """JSON values with their texts masked."""
    if isinstance(value, Mapping):
        secret = {key for key, item in value.items() if item and SECRET.fullmatch(str(key))}
        return {key: MASK if key in secret else redacted_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_values(item) for item in value]
    return redacted(value) if isinstance(value, str) else value


def refuse_secrets(url: str) -> str:
    """The URL of a folder. Raises ValueError for a password or a query, which would be stored with each
    run.
    """
    is_remote = "://" in url and not url.lower().startswith("file:")
    if is_remote and (_USER.search(url) or "?" in url or "#" in url):
        raise ValueError(
            "URLs must not contain credentials, query strings or fragments (run.json would store them); use "
            "FSSPEC_HTTP for headers"
        )
    return url
