"""A slice of tools/fuzz_openapi.py: the same seed each time. tools/results/fuzz_openapi.json has the last long run, with another.

Run: pytest tests/host/test_fuzz_openapi.py
"""

from __future__ import annotations

import pytest

from blinkimp.nic_shim.http_openapi import OPERATIONS
from tests.support import load_tool

NUM_INPUTS = 1800  # each field's bounds are some 1,300 of them

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "positive_data_acceptance",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
)


def test_server_and_openapi_document_agree() -> None:
    result = load_tool("fuzz_openapi").run(NUM_INPUTS, 1)
    assert result["inputs"] == sum(sum(statuses.values()) for statuses in result["answers"].values()) >= NUM_INPUTS
    assert set(result["answers"]) == {f"{method.upper()} {path}" for path, method, *_ in OPERATIONS}
    for label, statuses in result["answers"].items():
        assert statuses["200"] and statuses["405"], label
    for label in ("POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize", "POST /detokenize"):
        assert result["answers"][label]["200"] > 20 and result["answers"][label]["400"] > 20, label
    assert result["streams"] > 20 and result["stream events"] > 500
    assert result["data"]["positive"] > 300 and result["data"]["negative"] > 300
    assert min(result["checks passed"][name] for name in CHECKS) > 1000
    assert sum(result["right refusals of what keeps to the document"].values()) < result["data"]["positive"] // 4


def test_a_document_that_says_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the other test does not pass for want of eyes."""
    tool = load_tool("fuzz_openapi")
    monkeypatch.setattr(tool, "MOST_FAILURES", 10_000)
    monkeypatch.setattr(tool, "NUM_DRAWN", 1)
    monkeypatch.setattr(tool, "NUM_DRAWN_OF", {"/v1/chat/completions": 40})  # streams are among the drawn ones
    with tool.serving() as server:
        document = server.get("/openapi.json").json
        schemas = document["components"]["schemas"]
        schemas["ChatChunk"]["required"].append("nothing")
        schemas["TokenizeReply"]["properties"]["count"] = {"type": "string"}
        schemas["TokenizeRequest"]["properties"]["model"] = {"type": "integer"}
        schemas["DetokenizeRequest"]["required"].append("model")
        del document["paths"]["/detokenize"]["post"]["responses"]["400"]
        failures = tool.fuzz(server, document, 1400, 1).failures
    found = {tuple(failure.split(": ")[:2]) for failure in failures}
    assert found >= {
        ("POST /v1/chat/completions", "JsonSchemaError"),
        ("POST /tokenize", "JsonSchemaError"),
        ("POST /tokenize", "RejectedPositiveData"),
        ("POST /detokenize", "AcceptedNegativeData"),
        ("POST /detokenize", "UndefinedStatusCode"),
    }
    assert all("\n    curl -X POST " in failure for failure in failures)
