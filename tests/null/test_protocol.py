"""The wire messages: what is refused and how it is explained, and that PROTOCOL.md's bytes are the truth.

Run: pytest tests/null/test_protocol.py
"""

from __future__ import annotations

import re
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blinkimp import protocol, ring_abi
from blinkimp.complaints import quote
from blinkimp.protocol import BadMessageError, Submit, decode_client_message
from tests.support import ROOT

encode = msgspec.msgpack.encode


def refusal(payload: bytes) -> protocol.Error:
    with pytest.raises(BadMessageError) as caught:
        decode_client_message(payload)
    assert all(
        (caught.value.error.what, caught.value.error.got, caught.value.error.expected, caught.value.error.remedy)
    )
    return caught.value.error


def test_submit_with_defaults_is_vllms() -> None:
    message = decode_client_message(encode({"type": "submit", "id": 7, "prompt": "hi"}))
    assert isinstance(message, Submit) and message.stream and message.detokenize
    sampling = message.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sampling.max_tokens, sampling.seed, sampling.stop_token_ids, sampling.ignore_eos) == (16, None, [], False)


def test_stop_id_limit_is_the_abis() -> None:
    assert protocol.MAX_STOP_TOKEN_IDS == ring_abi.MAX_STOP_IDS


def test_largest_id_and_seed() -> None:
    content = {"type": "submit", "id": 2**64 - 1, "prompt": [2**32 - 1], "sampling": {"seed": 2**64 - 1}}
    message = decode_client_message(encode(content))
    assert isinstance(message, Submit)
    assert (message.id, message.prompt, message.sampling.seed) == (2**64 - 1, [2**32 - 1], 2**64 - 1)


def test_unknown_sampling_field_is_named() -> None:
    error = refusal(encode({"type": "submit", "id": 3, "prompt": "a", "sampling": {"temprature": 0}}))
    assert (error.id, error.code, error.got, error.final) == (3, "bad_sampling", "'temprature'", True)
    assert error.what == "unknown field in sampling"
    assert "temperature" in error.expected and "ignore_eos" in error.expected


def test_unknown_field_of_the_message_is_named() -> None:
    error = refusal(encode({"type": "cancel", "id": 3, "why": 1}))
    assert (error.id, error.code, error.got, error.expected) == (3, "bad_message", "'why'", "one of id")
    assert not error.final


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", -0.5, "float >= 0.0"),
        ("temperature", float("nan"), "float >= 0.0"),
        ("temperature", float("inf"), "float <= 100.0"),
        ("top_p", 0.0, "float > 0.0"),
        ("top_p", 1.5, "float <= 1.0"),
        ("min_p", 2, "float <= 1.0"),
        ("top_k", -1, "int >= 0"),
        ("top_k", 1.5, "int"),
        ("max_tokens", 0, "int >= 1"),
        ("seed", -1, "int >= 0"),
        ("seed", "x", "int | null"),
        ("stop_token_ids", list(range(17)), "array of length <= 16"),
        ("ignore_eos", 1, "bool"),
    ],
)
def test_sampling_ranges(field: str, value: Any, expected: str) -> None:
    error = refusal(encode({"type": "submit", "id": 1, "prompt": "a", "sampling": {field: value}}))
    assert error.code == "bad_sampling" and field in error.what
    assert error.expected == expected and error.got == quote(value)


@pytest.mark.parametrize(
    ("content", "what", "got", "expected"),
    [
        ({"type": "submit", "id": 1}, "a field is missing in the message", "no field 'prompt'", "the field 'prompt'"),
        ({"id": 1}, "a field is missing in the message", "no field 'type'", "the field 'type'"),
        ({"type": "sumbit", "id": 1}, "type cannot be used", "'sumbit'", "one of submit, cancel, alive, stats, health"),
        ({"type": "submit", "id": "x", "prompt": ""}, "id cannot be used", "'x'", "int"),
        ({"type": "submit", "id": -1, "prompt": ""}, "id cannot be used", "-1", "int >= 0"),
        ({"type": "submit", "id": 1, "prompt": 5}, "prompt cannot be used", "5", "str | array"),
        ({"type": "submit", "id": 1, "prompt": [1, "a"]}, "prompt[1] cannot be used", "'a'", "int"),
        ({"type": "submit", "id": 1, "prompt": [2**32]}, "prompt[0] cannot be used", "4294967296", "int <= 4294967295"),
        ([1, 2], "the message cannot be used", "[1, 2]", "object"),
        (None, "the message cannot be used", "None", "object"),
    ],
)
def test_wrong_types(content: Any, what: str, got: str, expected: str) -> None:
    error = refusal(encode(content))
    assert (error.what, error.got, error.expected) == (what, got, expected)


@pytest.mark.parametrize(
    "payload", [b"", b"\x81", b"\xc1", b"\xdf\xff\xff\xff\xff", b"\x91" * 100_000, b"\xa2\xff\xfe"]
)
def test_bytes_that_are_no_msgpack(payload: bytes) -> None:
    error = refusal(payload)
    assert (error.id, error.code) == (None, "bad_message")


def test_every_truncation_is_refused() -> None:
    payload = encode({"type": "submit", "id": 1, "prompt": "text", "sampling": {"seed": 5}})
    for num_bytes in range(len(payload)):
        assert refusal(payload[:num_bytes]).code == "bad_message"
    assert refusal(payload + b"\xc0").code == "bad_message"


def test_long_values_are_shortened_in_the_reply() -> None:
    error = refusal(encode({"type": "submit", "id": 1, "prompt": "a", "sampling": "x" * 1_000_000}))
    assert len(error.got) < 300 and "1000002 characters" in error.got


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_an_explained_refusal(payload: bytes) -> None:
    try:
        decode_client_message(payload)
    except BadMessageError as error:
        protocol.encode_server_messages([error.error])


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=8,
)
names = st.sampled_from([*Submit.__struct_fields__, *protocol.Sampling.__struct_fields__, "type", "junk"])


@settings(deadline=None)
@given(st.dictionaries(names, values), st.sampled_from(["submit", "cancel", "alive", "stats", "health", "nothing"]))
def test_any_map_is_a_message_or_an_explained_refusal(content: dict[str, Any], message_type: str) -> None:
    try:
        decode_client_message(encode(content | {"type": message_type}))
    except BadMessageError as error:
        protocol.encode_server_messages([error.error])


# ---- PROTOCOL.md -----------------------------------------------------------------------------------------------------
def document() -> str:
    return (ROOT / "nic_shim" / "PROTOCOL.md").read_text()


def examples() -> list[tuple[str, bytes, Any]]:
    """Blocks of the form: `client:` or `server:` and JSON on one line, then hex lines."""
    found = []
    for direction, json_text, hex_text in re.findall(
        r"^(client|server): (.*)\n((?:    [0-9a-f ]+\n)+)", document(), re.M
    ):
        found.append((direction, bytes.fromhex(hex_text), msgspec.json.decode(json_text)))
    return found


def test_documented_bytes_are_what_the_code_reads_and_writes() -> None:
    assert len(examples()) >= 10
    for direction, payload, content in examples():
        assert msgspec.msgpack.decode(payload) == content
        if direction == "client":
            decode_client_message(payload)
        else:
            messages = protocol.decode_server_messages(payload)
            assert msgspec.to_builtins(messages) == content  # every field is in the example


def test_every_message_type_and_field_is_documented() -> None:
    text = document()
    shown = {
        message["type"]
        for direction, _, content in examples()
        for message in ([content] if direction == "client" else content)
    }
    assert shown == {"submit", "cancel", "alive", "stats", "health", "tokens", "finish", "error"}
    for struct in (Submit, protocol.Sampling, protocol.Tokens, protocol.Finish, protocol.Error, protocol.Health):
        for name in struct.__struct_fields__:
            assert f"`{name}`" in text, f"{struct.__name__}.{name} is not documented"


def test_every_error_code_is_documented() -> None:
    for code in get_args(protocol.ErrorCode):
        assert f"| `{code}` |" in document(), f"error code {code} is not documented"
