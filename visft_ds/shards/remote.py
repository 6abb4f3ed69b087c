"""Places that fsspec knows: how to reach them, and what their errors are.

Credentials, endpoints and proxies are the business of fsspec and its protocol packages: their own environment variables
and configuration files hold (https://filesystem-spec.readthedocs.io/en/latest/features.html#configuration).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from visft_ds.config.preflight import is_url
from visft_ds.redaction import redacted

#: Exceptions of protocol packages that are no OSError; a package that is not loaded cannot raise them.
_FOREIGN_ERRORS = (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError"))


def short_name(text: str | Path) -> str:
    """The last part of a path or URL: what is stored, since folders differ from machine to machine."""
    place = urlsplit(str(text)).path if is_url(text) else str(text).partition("?")[0]
    return place.rstrip("/").rpartition("/")[2]


def open_url(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it).

    Raises:
        ValueError: an unknown protocol, or one whose package is not installed.
    """
    from fsspec.core import url_to_fs  # loaded only where there is something remote

    try:
        with readable_errors(url):
            filesystem, path = url_to_fs(url)
    except ImportError as error:
        raise ValueError(
            f"{redacted(url)} needs a package that is not installed ({error}); pip install 'visft_ds[remote]' brings "
            "those for http, s3, gs and hf"
        ) from error
    except ValueError as error:
        raise ValueError(f"{redacted(url)}: {redacted(error)}") from error
    return filesystem, str(path)


@contextmanager
def readable_errors(where: str) -> Iterator[None]:
    """Turn what protocol packages raise into OSError, with the place in its text."""
    foreign = tuple(getattr(sys.modules[name], kind) for name, kind in _FOREIGN_ERRORS if name in sys.modules)
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{redacted(where)} does not exist") from error
    except (OSError, TimeoutError, *foreign) as error:
        why = redacted(error) or type(error).__name__
        raise OSError(f"{redacted(where)} cannot be reached: {why}") from error
