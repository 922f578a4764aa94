"""What msgspec finds wrong with a message, in words that help its sender: what, got, expected, and what may stand there instead.

    complaint_of(error, content, lambda path: known_at(Submit, path))

Used by blinkimp/protocol.py (messages over ZeroMQ), nic_shim/http_fields.py (bodies over HTTP), blinkimp/client_request.py and whoever quotes.
Test: pytest tests/null/test_protocol.py
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from msgspec import inspect as types

_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING_FIELD = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_WRONG_VALUE = re.compile(r"Expected (.*?)(?:, got `.*`)?$", re.DOTALL)
_PATH_STEP = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)|\[(\d+)\]")
MAX_QUOTED_CHARS = 200


def quote(value: object) -> str:
    """A value from outside, short enough for an error message."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[:MAX_QUOTED_CHARS]}... ({len(text)} characters)"


class Complaint(NamedTuple):
    """What msgspec found wrong with a message, in this project's words."""

    path: str  # of the value, as in `sampling.stop[0]`; empty: the message itself, or a field that is unknown or missing in it
    what: str
    got: str
    expected: str
    field: str | None  # the first step of the path, or the field that is unknown or missing


def complaint_of(error: Exception, content: Any, known: Callable[[str], Sequence[str]]) -> Complaint:
    """`content`: the message, decoded. known(path): the fields of the struct, or the words, that may stand there."""
    complaint, _, path = str(error).partition(" - at `")
    complaint = complaint.removesuffix(" - at")
    path = path.rstrip("`").rpartition("$")[2].lstrip(".")  # "key` in `$.logit_bias" speaks of a key
    where = path or "the message"
    what, expected, got = f"{where} cannot be used", complaint, quote(_value_at(content, path))
    field: str | None = re.split(r"[.\[]", path, maxsplit=1)[0] or None
    if match := _UNKNOWN_FIELD.match(complaint):
        what, got = f"unknown field in {where}", quote(match[1])
        expected, field = "one of " + ", ".join(known(path)), field or match[1]
    elif match := _MISSING_FIELD.match(complaint):
        what, got, expected = f"a field is missing in {where}", f"no field {match[1]!r}", f"the field {match[1]!r}"
        field = field or match[1]
    elif complaint.startswith("Invalid enum value"):
        expected = "one of " + ", ".join(known(path))
    elif match := _WRONG_VALUE.match(complaint):
        expected = match[1].replace("`", "")
    return Complaint(path, what, got, expected, field)


@functools.cache
def _type_info(root: Any) -> types.Type:
    return types.type_info(root)


def known_at(root: Hashable, path: str) -> tuple[str, ...]:
    """What may stand at msgspec's path in a message of type `root`: the fields of a struct, or the words of an enumeration."""
    found = [_type_info(root)]
    for field, _ in _PATH_STEP.findall(path):
        found = [step for kind in found for step in _inside(kind, field)]
    words: list[str] = []
    for kind in _alternatives(found):
        if isinstance(kind, types.StructType):
            words += [entry.encode_name for entry in kind.fields]
        elif isinstance(kind, types.LiteralType):
            words += [str(value) for value in kind.values]
    return tuple(words)


def _alternatives(kinds: Sequence[types.Type]) -> list[types.Type]:
    return [
        inner
        for kind in kinds
        for inner in (_alternatives(kind.types) if isinstance(kind, types.UnionType) else [kind])
    ]


def _inside(kind: types.Type, field: str) -> list[types.Type]:
    """One step of a path: a field of a struct, or (no field) an element of an array."""
    inner: list[types.Type] = []
    for one in _alternatives([kind]):
        if field and isinstance(one, types.StructType):
            inner += [entry.type for entry in one.fields if entry.encode_name == field]
        elif not field and isinstance(one, types.ListType):
            inner.append(one.item_type)
    return inner


def _value_at(content: Any, path: str) -> Any:
    """What stands at msgspec's path; the whole content where the path cannot be followed (`[...]` steps)."""
    for field, index in _PATH_STEP.findall(path):
        try:
            content = content[field] if field else content[int(index)]
        except (KeyError, IndexError, TypeError):
            break
    return content
