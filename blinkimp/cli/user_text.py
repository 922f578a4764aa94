"""Text from the command line and from stdin: whether it is UTF-8.

Python hides bytes of an argument that are not in half surrogate pairs, which nothing can send; on stdin it raises, and the rest of what was
read is lost. So stdin hides them too, and each text is looked at before it is used.
Called by blinkimp/cli/generate.py and chat.py; blinkimp/cli/__init__.py has the exit status. Test: pytest tests/host/test_cli.py
"""

from __future__ import annotations

import io
import sys

from blinkimp.complaints import quote


class NotUtf8Error(ValueError):
    """Wrong usage where nobody catches it. The message says what, got, expected, remedy."""


def hide_bad_bytes() -> None:
    """From now on reading stdin raises nothing; checked() does."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def checked(what: str, text: str) -> str:
    """The text itself, as it came from one of both. Raises NotUtf8Error."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = quote(text.encode(errors="surrogateescape"))
        raise NotUtf8Error(
            f"{what}: got {got}, whose character {error.start} is not UTF-8; expected UTF-8 text; convert it, as `iconv -t UTF-8` does"
        ) from None
    return text
