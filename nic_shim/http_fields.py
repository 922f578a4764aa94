"""From a body of the HTTP API to the sampling fields that the engine knows: defaults, names, what does not go together.

Called by nic_shim/http_app.py and http_ingress.py. Test: pytest tests/null/test_http_types.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import msgspec

from blinkimp.complaints import Complaint, complaint_of, known_at
from blinkimp.nic_shim.http_errors import HttpError, bad_field
from blinkimp.nic_shim.http_neutral import without_neutral
from blinkimp.nic_shim.http_types import (
    MAX_PROMPTS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationFields,
    ResponseFormat,
    TokenizeRequest,
)
from blinkimp.protocol import Constraint, Sampling

DEFAULT_COMPLETION_TOKENS: Final = 16  # OpenAI's and vLLM's, of /v1/completions; a chat reply may fill the context

Body = TypeVar("Body", CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
Prompt = str | list[int]


# ---- Decoding -------------------------------------------------------------------------------------------------------
def decode_body(payload: bytes, body_type: type[Body]) -> Body:
    """Raises HttpError 400 that names the field."""
    try:
        return msgspec.json.decode(payload, type=body_type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = error.with_traceback(None)  # which holds this frame, which holds the error
    try:
        content = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        complaint = Complaint("", "the body is not JSON", f"{len(payload)} bytes: {error}", "one JSON object", None)
    else:
        content = without_neutral(_with_whole_numbers(content))
        try:
            return msgspec.convert(content, type=body_type, str_keys=True)
        except msgspec.ValidationError as error:
            problem = error.with_traceback(None)
        complaint = complaint_of(problem, content, lambda path: tuple(sorted(known_at(body_type, path))))
    remedy = "correct the field, or leave it out; nic_shim/HTTP.md lists what is supported"
    raise bad_field(complaint.field, complaint.what, complaint.got, complaint.expected, remedy) from None


def _with_whole_numbers(body: Any) -> Any:
    """The body with 16 for 16.0, which is an integer to JSON Schema and to vLLM, in its fields, and in lists of those, and in lists of such
    lists: token ids. Not in maps: those are schemas and a template's variables, whose numbers are the client's business."""
    return {name: _whole(value, 2) for name, value in body.items()} if isinstance(body, dict) else body


def _whole(value: Any, depth: int) -> Any:
    if isinstance(value, list) and depth:
        return [_whole(item, depth - 1) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**64 else value


# ---- Defaults -------------------------------------------------------------------------------------------------------
class GenerationDefaults(msgspec.Struct, frozen=True):
    """The checkpoint's generation_config.json, as far as vLLM honours it."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """Raises ValueError where the file cannot be used."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults()
    try:
        return msgspec.convert(json.loads(path.read_bytes()), GenerationDefaults)
    except (ValueError, msgspec.ValidationError) as error:
        raise ValueError(
            f"{path} cannot be used: {error}; expected generation settings as JSON; fetch the file again"
        ) from error


# ---- Sampling -------------------------------------------------------------------------------------------------------
def sampling_of(
    body: GenerationFields, defaults: GenerationDefaults, *, max_tokens: int, num_top_logprobs: int
) -> Sampling:
    """Body over generation_config.json over vLLM's defaults. Raises HttpError 400."""
    return Sampling(
        temperature=_first(body.temperature, defaults.temperature, 1.0),
        top_k=max(0, _first(body.top_k, defaults.top_k, 0)),
        top_p=_first(body.top_p, defaults.top_p, 1.0),
        min_p=_first(body.min_p, defaults.min_p, 0.0),
        seed=None if body.seed is None else body.seed % 2**64,
        max_tokens=max_tokens,
        stop_token_ids=body.stop_token_ids or [],
        ignore_eos=bool(body.ignore_eos),
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
        min_tokens=body.min_tokens or 0,
        repetition_penalty=_first(body.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias or {},
        top_logprobs=num_top_logprobs,
    )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def check_combinations(body: CompletionRequest | ChatRequest) -> None:
    """What msgspec's types cannot say. Raises HttpError 400."""
    if body.seed is not None and body.seed >= 2**64:
        raise bad_field("seed", "seed cannot be used", str(body.seed), "int from -2^63 to 2^64 - 1", "choose another")
    if body.stream_options is not None and not body.stream:
        raise bad_field(
            "stream_options",
            "stream_options cannot be used",
            "stream false",
            "stream true",
            "set stream, or leave it out",
        )
    if isinstance(body, CompletionRequest):
        if body.max_tokens == 0 and not body.echo:
            raise bad_field("max_tokens", "max_tokens cannot be used", "0", "int >= 1, or echo beside it", "raise it")
        return
    if body.top_logprobs and not body.logprobs:
        raise bad_field(
            "top_logprobs", "top_logprobs cannot be used", "logprobs false", "logprobs true", "set logprobs"
        )


def constraint_of(body: GenerationFields) -> Constraint | None:
    """The one constraint of a request. Raises HttpError 400 where there are several."""
    found: dict[str, Constraint] = {}
    if body.guided_json is not None:
        found["guided_json"] = _schema(body.guided_json)
    if body.guided_regex is not None:
        found["guided_regex"] = Constraint("regex", body.guided_regex)
    if body.guided_choice is not None:
        found["guided_choice"] = Constraint("choice", body.guided_choice)
    if body.structured_outputs is not None:
        outputs = body.structured_outputs
        if outputs.json is not None:
            found["structured_outputs.json"] = _schema(outputs.json)
        if outputs.regex is not None:
            found["structured_outputs.regex"] = Constraint("regex", outputs.regex)
        if outputs.choice is not None:
            found["structured_outputs.choice"] = Constraint("choice", outputs.choice)
        if outputs.json_object:
            found["structured_outputs.json_object"] = Constraint("json_object")
    if body.response_format is not None and body.response_format.type != "text":
        found["response_format"] = _response_format(body.response_format)
    if len(found) > 1:
        first, second, *_ = found
        raise bad_field(
            first.partition(".")[0], f"{first} cannot be used", f"{second} beside it", "one constraint", "leave one out"
        )
    return next(iter(found.values()), None)


def _schema(schema: str | dict[str, Any]) -> Constraint:
    return Constraint("json_schema", schema if isinstance(schema, str) else msgspec.json.encode(schema).decode())


def _response_format(wanted: ResponseFormat) -> Constraint:
    if wanted.type == "json_object":
        return Constraint("json_object")
    if wanted.json_schema is None:
        raise bad_field(
            "response_format",
            "json_schema is missing in response_format",
            "type json_schema",
            "the field json_schema",
            "send it",
        )
    return _schema(wanted.json_schema.schema)


def prompts_of(body: CompletionRequest) -> list[Prompt]:
    """The prompts of a completion: text, list of text, token ids, list of token ids. Raises HttpError 400."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [cast(list[int], prompt)]
    if len(kinds) != 1:
        expected = "text, token ids, a list of text or a list of token ids"
        got = "an empty list" if not kinds else "a list of " + " and ".join(sorted(kind.__name__ for kind in kinds))
        raise bad_field("prompt", "prompt cannot be used", got, expected, "send one kind")
    if len(prompt) > MAX_PROMPTS:
        raise bad_field(
            "prompt", "there are too many prompts", str(len(prompt)), f"at most {MAX_PROMPTS}", "send several requests"
        )
    return [item for item in prompt if isinstance(item, str | list)]


def check_model(name: str | None, served: tuple[str, ...]) -> None:
    """Raises HttpError 404."""
    if name is not None and name not in served:
        raise HttpError(
            404,
            f"the model `{name[:200]}` does not exist: expected one of {', '.join(served)}; `GET /v1/models` lists them",
            code="model_not_found",
            param="model",
        )
