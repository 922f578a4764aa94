"""The OpenAPI document, generated from the types of http_types.py, and a page that shows it without anything from the network.

Called by nic_shim/http_app.py. Test: pytest tests/null/test_http_types.py, tests/host/test_fuzz_openapi.py (what is served, against it)

OpenAPI 3.2, as that is the first one with a word for a stream: `itemSchema`, of one event.
"""

from __future__ import annotations

import html
import json
from typing import Any, Final

import msgspec

from blinkimp import __version__
from blinkimp.nic_shim import http_types as types
from blinkimp.nic_shim.http_schemas import say_more

REF: Final = "#/components/schemas/{name}"

# path, method, summary, body type, reply type (None: text), needs a key
OPERATIONS: Final[tuple[tuple[str, str, str, Any, Any, bool], ...]] = (
    ("/v1/chat/completions", "post", "Reply to a conversation", types.ChatRequest, types.ChatReply, True),
    ("/v1/completions", "post", "Continue a prompt", types.CompletionRequest, types.CompletionReply, True),
    ("/v1/models", "get", "The models served", None, types.ModelList, True),
    ("/v1/models/{model}", "get", "One model", None, types.Model, True),
    ("/tokenize", "post", "Text or a conversation as token ids", types.TokenizeRequest, types.TokenizeReply, True),
    ("/detokenize", "post", "Token ids as text", types.DetokenizeRequest, types.DetokenizeReply, True),
    ("/health", "get", "Whether the server answers", None, types.ServerStatus, False),
    ("/ready", "get", "Whether a request would be taken now: 200 or 503", None, types.ServerStatus, False),
    ("/metrics", "get", "Counters in Prometheus' text format", None, None, False),
    ("/version", "get", "The server's version", None, types.ServerVersion, False),
)
_STATUSES: Final = {
    400: "a field is unknown, wrong, or does not fit this model",
    401: "the API key is missing or wrong",
    404: "no such model",
    413: "the body is too large",
    422: "the constraint is too large for this server, or there is no room for a prompt's log-probabilities",
    429: "too many requests; see Retry-After",
    503: "the server is draining, or its engine is down; see Retry-After",
}

_UNREAD: Final = "no byte of the request came for too long; the connection is closed"
_TIMED_OUT: Final = "the request's own timeout is over, and its prompt's log-probabilities (echo) are not complete"
_TEXT: Final = {media: {"schema": {"type": "string"}} for media in ("text/plain", "application/openmetrics-text")}
_REQUEST_ID: Final = {"X-Request-Id": {"required": True, "schema": {"type": "string"}}}
_RETRY_AFTER: Final = {"Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}}}


def openapi_document(*, vocab_size: int, max_context: int, model_names: tuple[str, ...]) -> bytes:
    """Of the model that is served."""
    struct_types = [kind for operation in OPERATIONS for kind in operation[3:5] if kind is not None]
    struct_types += [types.ErrorReply, types.ChatChunk, types.CompletionChunk]
    _, components = msgspec.json.schema_components(struct_types, ref_template=REF)
    say_more(components, vocab_size=vocab_size, max_context=max_context, model_names=model_names)
    paths: dict[str, Any] = {}
    for path, method, summary, body, reply, is_guarded in OPERATIONS:
        operation: dict[str, Any] = {
            "summary": summary,
            "operationId": f"{method}{path.replace('/', '_')}",
            "responses": {"200": _response("the answer", _json_content(reply) if reply is not None else _TEXT)},
        }
        if "completions" in path:
            chunk = types.ChatChunk if "chat" in path else types.CompletionChunk
            operation["responses"]["200"]["content"]["text/event-stream"] = {"itemSchema": _event(chunk)}
        if body is not None:
            operation["requestBody"] = {"required": True, "content": _json_content(body)}
        if "{model}" in path:
            model = {"type": "string", "examples": list(model_names)}
            operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": model}]
        if is_guarded:
            operation["security"] = [{"key": []}, {}]
            statuses = _STATUSES | ({504: _TIMED_OUT} if path == "/v1/completions" else {})
            for status, text in statuses.items():
                operation["responses"][str(status)] = _response(
                    text, _json_content(types.ErrorReply), _RETRY_AFTER if status in (429, 503) else {}
                )
        elif path == "/ready":
            operation["responses"]["503"] = _response("no request would be taken", _json_content(reply))
        # Whatever is asked for: it is answered before that is known, and so has no id.
        operation["responses"]["408"] = {"description": _UNREAD, "content": _json_content(types.ErrorReply)}
        paths.setdefault(path, {})[method] = operation
    document = {
        "openapi": "3.2.0",
        "info": {"title": "blinkimp", "version": __version__, "description": "OpenAI's API, served by blinkimp."},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
    return msgspec.json.encode(document)


def _response(description: str, content: dict[str, Any], headers: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": description, "headers": _REQUEST_ID | (headers or {}), "content": content}


def _json_content(kind: Any) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(kind)}}


def _event(chunk: Any) -> dict[str, Any]:
    """One server-sent event: a chunk, the error that ended the stream, or the word that it is over."""
    payload = {
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(chunk), _ref(types.ErrorReply)]},
    }
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "string", "anyOf": [{"const": "[DONE]"}, payload]}},
    }


def _ref(kind: Any) -> dict[str, str]:
    return {"$ref": REF.format(name=kind.__name__)}


def docs_page(document: bytes) -> str:
    """Plain HTML: each operation with its fields."""
    content = json.loads(document)
    schemas = content["components"]["schemas"]
    parts = [
        "<!doctype html><meta charset=utf-8><title>blinkimp</title><style>body{font:15px sans-serif;max-width:60em;margin:2em auto}"
        "code,pre{font:13px monospace}td{padding:.1em .8em;vertical-align:top}</style><h1>blinkimp</h1>"
        "<p>The same as <a href=/openapi.json>OpenAPI</a>.</p>"
    ]
    for path, methods in content["paths"].items():
        for method, operation in methods.items():
            parts.append(
                f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(operation['summary'])}</p>"
            )
            if "requestBody" not in operation:
                continue
            name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            required = set(schemas[name].get("required", ()))
            rows = []
            for field, schema in schemas[name]["properties"].items():
                note = " (required)" if field in required else ""
                rows.append(f"<tr><td><code>{field}</code>{note}<td><code>{html.escape(_words(schema))}</code>")
            parts.append(f"<table>{''.join(rows)}</table>")
    return "".join(parts)


def _words(schema: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in schema.items() if key != "default"})
