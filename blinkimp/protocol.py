"""The messages between clients and the ZeroMQ ingress; a message that is none of them is explained (blinkimp/complaints.py).

Client to server: one msgpack map per ZeroMQ message. Server to client: one msgpack array of maps per ZeroMQ message. The field
`type` says which struct a map is. nic_shim/PROTOCOL.md is the whole description for writers of other clients.
Used by blinkimp/client_core.py and nic_shim/. Test: pytest tests/null/test_protocol.py
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from blinkimp.complaints import complaint_of, known_at

PROTOCOL_VERSION = 1
MAX_STOP_TOKEN_IDS = 16  # kMaxStopIds of device/ring_abi.h; a test compares
MAX_TOP_LOGPROBS = 20  # kMaxTopLogprobs, likewise
MAX_LOGIT_BIAS = 512  # kMaxLogitBias, likewise
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
_REMEDY = "correct the message as nic_shim/PROTOCOL.md describes it"

U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Id = Annotated[int, Meta(ge=0)]  # u64: msgpack has no larger integer

# Ranges of the fields that both ingresses take: nic_shim/http_types.py names the same types.
Temperature = Annotated[float, Meta(ge=0.0, le=100.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
MinP = Annotated[float, Meta(ge=0.0, le=1.0)]
Seed = Annotated[int, Meta(ge=0)]
MaxTokens = Annotated[int, Meta(ge=1, le=2**32 - 1)]
StopTokenIds = Annotated[list[U32], Meta(max_length=MAX_STOP_TOKEN_IDS)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_STRING_CHARS)]
StopStrings = Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
RepetitionPenalty = Annotated[float, Meta(gt=0.0, le=100.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
LogitBias = Annotated[
    dict[Annotated[int, Meta(ge=0, le=2**32 - 1)], Annotated[float, Meta(ge=-100.0, le=100.0)]],
    Meta(max_length=MAX_LOGIT_BIAS),
]
NumTopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
TimeoutS = Annotated[float, Meta(gt=0.0, le=86400.0 * 365)]
CacheSalt = Annotated[str, Meta(max_length=1024)]


class Constraint(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the output must look like. The server makes a token automaton of it, which the sampler walks."""

    kind: Literal["json_schema", "json_object", "regex", "choice"]
    value: str | list[str] = ""  # the schema as JSON text; nothing; the expression; the texts to choose from


class Sampling(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """How tokens are chosen and when to stop. The defaults are vLLM's."""

    temperature: Temperature = 1.0  # 0 is greedy
    top_k: U32 = 0  # 0 is off
    top_p: TopP = 1.0  # 1 is off
    min_p: MinP = 0.0  # 0 is off
    seed: Seed | None = None  # u64; absent: the server draws one and reports it in `finish`
    max_tokens: MaxTokens = 16
    stop_token_ids: StopTokenIds = []
    ignore_eos: bool = False
    stop: StopStrings = []  # text that ends the request; it is not part of the output
    min_tokens: U32 = 0  # no end-of-sequence, stop id or stop string before so many output tokens
    repetition_penalty: RepetitionPenalty = 1.0  # 1 is off
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = {}  # by token id
    top_logprobs: NumTopLogprobs = 0  # alternatives reported with each token
    constraint: Constraint | None = None


# For programs; PROTOCOL.md says when each is sent.
ErrorCode = Literal[
    "bad_message",
    "bad_sampling",
    "too_large",
    "prompt_empty",
    "prompt_too_long",
    "bad_token",
    "bad_prompt",
    "bad_constraint",
    "constraint_too_large",
    "duplicate_id",
    "too_many_requests",
    "busy",
    "draining",
    "rejected",
    "engine_lost",
    "engine_error",
    "internal_error",
]


# ---- Client to server ------------------------------------------------------------------------------------------------
class Submit(msgspec.Struct, tag="submit", tag_field="type", forbid_unknown_fields=True, omit_defaults=True):
    """Start a request. `id` is the client's choice, unique among its unfinished requests."""

    id: Id
    prompt: str | list[U32]  # text, or token ids taken as they are
    sampling: Sampling = Sampling()
    stream: bool = True  # false: one `tokens` message at the end
    detokenize: bool = True  # false: token ids only
    delivered_ids: list[U32] = []  # output that the client has already (it resumes after a lost connection)
    priority: Priority = 0  # lower runs first
    timeout_s: TimeoutS | None = None  # then the request ends with reason `timeout`; nil: never
    cache_salt: CacheSalt = ""  # prompts share pages of the prefix cache only under the same salt
    prefix_cache: bool = True  # false: neither takes pages from the prefix cache nor leaves any there


class Cancel(msgspec.Struct, tag="cancel", tag_field="type", forbid_unknown_fields=True):
    """Stop a request; it ends with `finish`, reason "cancelled". An unknown id is ignored: it may have just finished."""

    id: Id


class Alive(msgspec.Struct, tag="alive", tag_field="type", forbid_unknown_fields=True, omit_defaults=True):
    """The client lives, and believes these requests to be unfinished."""

    ids: list[Id] = []


class GetStats(msgspec.Struct, tag="stats", tag_field="type", forbid_unknown_fields=True):
    id: Id


class GetHealth(msgspec.Struct, tag="health", tag_field="type", forbid_unknown_fields=True):
    id: Id


ClientMessage = Submit | Cancel | Alive | GetStats | GetHealth


# ---- Server to client ------------------------------------------------------------------------------------------------
class Tokens(msgspec.Struct, tag="tokens", tag_field="type", omit_defaults=True, gc=False):
    """Output of a request. Text lags behind ids where a character is not complete yet; ids may be empty when it catches up."""

    id: int
    index: int  # output position of the first id
    token_ids: list[int]
    logprobs: list[float]  # natural log, one per id
    text: str
    # For each id its top_logprobs likeliest alternatives, [token id, logprob], likeliest first. Absent where none were asked for.
    top: list[list[tuple[int, float]]] = []


class Finish(msgspec.Struct, tag="finish", tag_field="type", omit_defaults=True):
    """The last message of a request that was accepted."""

    id: int
    reason: str  # eos, stop_id, stop, length, cancelled, timeout, constraint, draining
    num_prompt_tokens: int
    num_output_tokens: int
    seed: int
    accepted_ns: int  # the device's clock; 0 where it did not come to that
    first_token_ns: int
    finished_ns: int
    ingress_ns: int  # the ingress's clock, from the arrival of `submit` to this message
    started_ns: int = 0  # the device's clock: when the prompt's computation began
    num_cached_tokens: int = 0  # of the prompt, that the prefix cache had
    stop: str | int | None = None  # the stop string or stop token id that ended it


class Error(msgspec.Struct, tag="error", tag_field="type"):
    """Something was refused or has failed. `id` is nil where the message did not tell one."""

    id: int | None
    code: str  # ErrorCode; a newer server may have others
    what: str
    got: str
    expected: str
    remedy: str
    final: bool  # true: request `id` has ended with this, there will be no `finish`


class AliveReply(msgspec.Struct, tag="alive", tag_field="type"):
    """The server lives. `unknown_ids`: of the ids in `alive`, those that this server does not (or no longer) run."""

    unknown_ids: list[int]


class Stats(msgspec.Struct, tag="stats", tag_field="type"):
    id: int
    engine: dict[str, int]  # StatusLines of device/ring_abi.h
    ingress: dict[str, int]


class Health(msgspec.Struct, tag="health", tag_field="type"):
    id: int
    status: str  # ok, starting, draining, engine_lost, engine_faulted
    protocol_version: int
    queue_pair_idx: int
    engine_state: str
    engine_heartbeat_age_ms: int
    max_context: int
    vocab_size: int
    eos_ids: list[int]


ServerMessage = Tokens | Finish | Error | AliveReply | Stats | Health

_encoder = msgspec.msgpack.Encoder()
_client_decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_server_decoder: msgspec.msgpack.Decoder[list[ServerMessage]] = msgspec.msgpack.Decoder(list[ServerMessage])


def encode_client_message(message: ClientMessage) -> bytes:
    return _encoder.encode(message)


def encode_server_messages(messages: list[ServerMessage]) -> bytes:
    return _encoder.encode(messages)


def decode_server_messages(payload: bytes) -> list[ServerMessage]:
    """Raises msgspec.DecodeError for what no server of this version sends."""
    return _server_decoder.decode(payload)


class BadMessageError(Exception):
    """A client's message that cannot be understood; `error` is the reply to it."""

    def __init__(self, error: Error) -> None:
        super().__init__(f"{error.what}: got {error.got}, expected {error.expected}; {error.remedy}")
        self.error = error


def decode_client_message(payload: bytes) -> ClientMessage:
    """Raises BadMessageError, which holds the reply."""
    try:
        return _client_decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessageError(_explain(payload, error)) from None


def _known_in_message(message_type: str | None, path: str) -> tuple[str, ...]:
    structs = {"submit": Submit, "cancel": Cancel, "alive": Alive, "stats": GetStats, "health": GetHealth}
    struct = structs.get(message_type or "")
    return known_at(struct, path) if struct is not None else ()


def _explain(payload: bytes, error: Exception) -> Error:
    try:
        content: Any = msgspec.msgpack.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, TypeError):
        return Error(
            id=None,
            code="bad_message",
            what="the message is not valid msgpack",
            got=f"{len(payload)} bytes: {error}",
            expected="one msgpack map",
            remedy=_REMEDY,
            final=False,
        )
    message_type = content.get("type") if isinstance(content, dict) else None
    message_id = content.get("id") if isinstance(content, dict) else None
    known_type = message_type if isinstance(message_type, str) else None
    complaint = complaint_of(error, content, lambda path: _known_in_message(known_type, path))
    return Error(
        id=message_id if type(message_id) is int and 0 <= message_id < 2**64 else None,
        code="bad_sampling" if complaint.path.startswith("sampling") else "bad_message",
        what=complaint.what,
        got=complaint.got,
        expected="one of submit, cancel, alive, stats, health" if complaint.path == "type" else complaint.expected,
        remedy=_REMEDY,
        final=message_type == "submit",
    )
