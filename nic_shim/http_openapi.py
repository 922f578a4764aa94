"""The OpenAPI document, generated from the types of http_types.py, and a page that shows it without anything from the network.

Called by nic_shim/http_app.py. Test: pytest tests/null/test_http_types.py
"""

from __future__ import annotations

import html
import json
from typing import Any, Final

import msgspec

from blinkimp import __version__
from blinkimp.nic_shim import http_types as types

REF: Final = "#/components/schemas/{name}"

# path, method, summary, body type, reply type (None: text or a map without a type of its own), needs a key
OPERATIONS: Final[tuple[tuple[str, str, str, Any, Any, bool], ...]] = (
    ("/v1/chat/completions", "post", "Reply to a conversation", types.ChatRequest, types.ChatReply, True),
    ("/v1/completions", "post", "Continue a prompt", types.CompletionRequest, types.CompletionReply, True),
    ("/v1/models", "get", "The models served", None, types.ModelList, True),
    ("/v1/models/{model}", "get", "One model", None, types.Model, True),
    ("/tokenize", "post", "Text or a conversation as token ids", types.TokenizeRequest, types.TokenizeReply, True),
    ("/detokenize", "post", "Token ids as text", types.DetokenizeRequest, types.DetokenizeReply, True),
    ("/health", "get", "Whether the server lives: 503 only when its engine has faulted", None, None, False),
    ("/ready", "get", "Whether a request would be taken now: 200 or 503", None, None, False),
    ("/metrics", "get", "Counters in Prometheus' text format", None, None, False),
    ("/version", "get", "The server's version", None, None, False),
)
_STATUSES: Final = {
    400: "a field is unknown, wrong, or does not fit this model",
    401: "the API key is missing or wrong",
    404: "no such model",
    413: "the body is too large",
    422: "the constraint is too large for this server",
    429: "too many requests; see Retry-After",
    503: "the server is draining, or its engine is down; see Retry-After",
}


def openapi_document() -> bytes:
    struct_types = [kind for operation in OPERATIONS for kind in operation[3:5] if kind is not None]
    struct_types += [types.ErrorReply, types.ChatChunk, types.CompletionChunk]
    _, components = msgspec.json.schema_components(struct_types, ref_template=REF)
    paths: dict[str, Any] = {}
    for path, method, summary, body, reply, is_guarded in OPERATIONS:
        operation: dict[str, Any] = {
            "summary": summary,
            "operationId": f"{method}{path.replace('/', '_')}",
            "responses": {},
        }
        content: dict[str, Any] = {"application/json": {"schema": _ref(reply)}} if reply is not None else {}
        if "completions" in path:
            chunk = types.ChatChunk if "chat" in path else types.CompletionChunk
            content["text/event-stream"] = {"schema": _ref(chunk)}  # one in each event, then [DONE]
        operation["responses"]["200"] = {"description": "the answer", **({"content": content} if content else {})}
        if body is not None:
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
        if "{model}" in path:
            operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
        if is_guarded:
            operation["security"] = [{"key": []}, {}]
            for status, text in _STATUSES.items():
                operation["responses"][str(status)] = {
                    "description": text,
                    "content": {"application/json": {"schema": _ref(types.ErrorReply)}},
                }
        paths.setdefault(path, {})[method] = operation
    document = {
        "openapi": "3.1.0",
        "info": {"title": "blinkimp", "version": __version__, "description": "OpenAI's API, served by blinkimp."},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
    return msgspec.json.encode(document)


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
