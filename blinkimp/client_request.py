"""What callers give the clients, looked at before anything of it is registered or sent: what comes out of here can be encoded.

Called by blinkimp/client_core.py, client.py and async_client.py. Test: pytest tests/null/test_client_request.py

Invariant
R1  A Submit that submit_of() returns can be encoded, now and again when it is resumed: one bad request never harms another.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any, Final

import msgspec

from blinkimp.client_errors import BadRequestError
from blinkimp.complaints import quote
from blinkimp.protocol import Sampling, Submit, encode_client_message

REQUEST_FIELDS: Final = (
    "priority",
    "timeout_s",
    "cache_salt",
    "prefix_cache",
)  # of Submit, that callers give beside the sampling
MAX_TOKEN_ID: Final = 2**32 - 1
MAX_INT: Final = 2**64 - 1  # of msgpack


def submit_of(
    request_id: int, prompt: str | Sequence[int], sampling: Mapping[str, Any], *, stream: bool, detokenize: bool
) -> tuple[Submit, bytes]:
    """The message, and its encoding. Raises BadRequestError for a prompt that is none, and for a field of Sampling, or one of
    REQUEST_FIELDS, that does not exist or cannot be."""
    options = {name: value for name, value in sampling.items() if name in REQUEST_FIELDS}
    fields = {"stream": stream, "detokenize": detokenize, **options}
    try:
        checked = msgspec.convert(
            {name: value for name, value in sampling.items() if name not in REQUEST_FIELDS}, Sampling
        )
        submit: Submit = msgspec.convert({"type": "submit", "id": request_id, "prompt": "", **fields}, Submit)
    except msgspec.ValidationError as error:
        raise _refusal(error, {**sampling, **fields}) from None
    except UnicodeEncodeError:  # in the name of a field
        raise BadRequestError(
            f"sampling: got {quote(dict(sampling))}, expected names that are UTF-8; correct it"
        ) from None
    submit.prompt, submit.sampling = prompt_of(prompt), checked
    try:
        return submit, encode_client_message(submit)
    except (UnicodeEncodeError, OverflowError, TypeError) as error:
        given = {"prompt": submit.prompt, **sampling}
        path, value = next(_unsendable(given, ""), ("the request", given))
        raise BadRequestError(
            f"{path}: got {quote(value)} ({error}), expected text that is UTF-8, and numbers of at most 64 bits; correct it"
        ) from None


def prompt_of(prompt: str | Sequence[int]) -> str | list[int]:
    """Text as it is; token ids, of any integer type, as plain ints."""
    if isinstance(prompt, str):
        return prompt
    expected = f"expected text, or token ids (ints of 0 to {MAX_TOKEN_ID})"
    try:
        if isinstance(prompt, bytes | bytearray | memoryview | Mapping | Set):
            raise TypeError
        tokens: list[Any] = list(prompt)
    except TypeError:
        raise BadRequestError(
            f"prompt: got {quote(prompt)} ({type(prompt).__name__}), {expected}; correct it"
        ) from None
    ids: list[int] = []
    for position, token in enumerate(tokens):
        try:
            token_id = operator.index(token)
        except TypeError:
            token_id = -1
        if not 0 <= token_id <= MAX_TOKEN_ID or isinstance(token, bool):
            raise BadRequestError(f"prompt[{position}]: got {quote(token)}, {expected}; correct it")
        ids.append(token_id)
    return ids


def deadline_of(deadline_s: float | None, now: float) -> float | None:
    """When a request must have ended; None: whenever it does. Negative seconds, left over from a budget of the caller, are over."""
    return None if deadline_s is None else now + _seconds("deadline_s", deadline_s, -math.inf)


def timeout_of(timeout_s: float) -> float:
    return _seconds("timeout_s", timeout_s, 0.0)


def _seconds(name: str, value: Any, least: float) -> float:
    try:
        seconds = float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        seconds = math.nan
    if not seconds >= least:
        kind = "a number" if least < 0 else f"a number of at least {least:g}"
        raise BadRequestError(f"{name}: got {quote(value)}, expected {kind}, of seconds; correct it")
    return seconds


def _refusal(error: msgspec.ValidationError, given: Mapping[str, Any]) -> BadRequestError:
    """In this project's words, what msgspec says of a field."""
    expected, _, path = str(error).partition(" - at ")
    name = path.rstrip("`").rpartition("$")[2].lstrip(".")  # "`key` in `$.logit_bias`" speaks of a key
    if name:
        value = given.get(name.partition("[")[0])
        words = expected[0].lower() + expected[1:].replace("`", "")
        return BadRequestError(f"{name}: got {value!r}, {words}; correct it")
    known = (*Sampling.__struct_fields__, *REQUEST_FIELDS)
    unknown = [field for field in given if field not in (*known, "stream", "detokenize")]
    return BadRequestError(
        f"sampling: got {', '.join(unknown)}; {error}; expected fields out of {', '.join(known)}; correct it"
    )


def _unsendable(value: Any, path: str) -> Any:
    """(path, value) of what msgpack has no room for: text with half a surrogate pair, and integers of more than 64 bits."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            yield path, value
    elif isinstance(value, int):
        if value > MAX_INT:
            yield path, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _unsendable(inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            yield from _unsendable(inner, f"{path}[{position}]")
