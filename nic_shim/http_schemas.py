"""What a request's JSON schema says beyond the types: the served model's bounds, and which fields go together.

Called by nic_shim/http_openapi.py. Test: pytest tests/null/test_http_types.py, tests/host/test_fuzz_openapi.py

A client that keeps to it is refused only for what no schema can say: a prompt without a token (the tokenizer decides), prompt and
max_tokens that exceed the context together, min_tokens above max_tokens, a constraint that does not compile, or a template that refuses
the conversation. Every rule here stands in http_fields.py or admission.py as well, which have the last word.
"""

from __future__ import annotations

from typing import Any, Final

from blinkimp.nic_shim.http_types import MAX_PROMPTS
from blinkimp.nic_shim.json_schema_regex import integer_range

Schema = dict[str, Any]

NULL: Final[Schema] = {"type": "null"}
CHOICES: Final[Schema] = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
# Field -> what it is where it says nothing. Of either group one at most may say something.
NO_STRUCTURE: Final[dict[str, Schema]] = {
    **dict.fromkeys(("json", "regex", "choice"), NULL),
    "json_object": {"enum": [False, None]},
}
NO_CONSTRAINT: Final[dict[str, Schema]] = {
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice"), NULL),
    "structured_outputs": {"anyOf": [NULL, {"type": "object", "properties": NO_STRUCTURE}]},
    "response_format": {"anyOf": [NULL, {"type": "object", "properties": {"type": {"const": "text"}}}]},
}


def say_more(components: dict[str, Schema], *, vocab_size: int, max_context: int, model_names: tuple[str, ...]) -> None:
    """Edits the schemas that msgspec made of http_types.py."""
    token: Schema = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    prompt: Schema = {"type": "array", "items": token, "minItems": 1, "maxItems": max_context - 1}
    for name in ("CompletionRequest", "ChatRequest"):
        fields = components[name]["properties"]
        for limit in {"max_tokens", "max_completion_tokens", "min_tokens"} & set(fields):
            _given(fields[limit])["maximum"] = max_context - 1
        _given(fields["seed"])["maximum"] = 2**64 - 1
        _given(fields["stop_token_ids"])["items"] = token
        _given(fields["logit_bias"])["propertyNames"] = {"pattern": f"^{integer_range(0, vocab_size - 1)}$"}
        fields["guided_choice"]["anyOf"] = [CHOICES, NULL]
    for name in ("CompletionRequest", "ChatRequest", "TokenizeRequest", "DetokenizeRequest"):
        _given(components[name]["properties"]["model"])["examples"] = list(model_names)
    components["StructuredOutputs"]["properties"]["choice"]["anyOf"] = [CHOICES, NULL]
    components["DetokenizeRequest"]["properties"]["tokens"]["items"] = token
    prompts = components["CompletionRequest"]["properties"]["prompt"]
    prompts["examples"] = ["def read_file(path):"]
    prompts["anyOf"] = [
        {"type": "string"},
        prompt,
        *(
            {"type": "array", "items": item, "minItems": 1, "maxItems": MAX_PROMPTS}
            for item in ({"type": "string"}, prompt)
        ),
    ]
    _say_what_goes_together(components)


def _say_what_goes_together(components: dict[str, Schema]) -> None:
    """dependentSchemas: what holds where the field is there."""
    none_or_some = {"anyOf": [{"type": "integer", "minimum": 1}, NULL]}
    none_or_zero = {"anyOf": [{"type": "integer", "maximum": 0}, NULL]}
    for name, also in (
        ("CompletionRequest", {"max_tokens": _needs("max_tokens", none_or_some, "echo")}),
        ("ChatRequest", {"top_logprobs": _needs("top_logprobs", none_or_zero, "logprobs")}),
    ):
        stream = {"stream_options": _needs("stream_options", NULL, "stream")}
        components[name]["dependentSchemas"] = stream | _at_most_one(NO_CONSTRAINT) | also
    components["StructuredOutputs"]["dependentSchemas"] = _at_most_one(NO_STRUCTURE)
    variables = _given(components["ChatRequest"]["properties"]["chat_template_kwargs"])
    variables["propertyNames"] = {"not": {"enum": ["messages", "add_generation_prompt"]}}
    components["TokenizeRequest"]["anyOf"] = [
        {"properties": {given: {"type": kind}, other: NULL}, "required": [given]}
        for given, kind, other in (("prompt", "string", "messages"), ("messages", "array", "prompt"))
    ]
    components["ResponseFormat"]["anyOf"] = [
        {"properties": {"type": {"enum": ["json_object", "text"]}}},
        {"properties": {"json_schema": {"type": "object"}}, "required": ["json_schema"]},
    ]


def _given(field: Schema) -> Schema:
    """The schema of a field's value where it is not null."""
    given: Schema = field["anyOf"][0]
    return given


def _needs(field: str, without: Schema, flag: str) -> Schema:
    """`field` is `without`, or `flag` is true."""
    return {"anyOf": [{"properties": {field: without}}, {"properties": {flag: {"const": True}}, "required": [flag]}]}


def _at_most_one(unused: dict[str, Schema]) -> dict[str, Schema]:
    """`unused`: the fields, with what each is where it counts for nothing. For each: that is what it is, or what the others are."""
    others = {field: {name: schema for name, schema in unused.items() if name != field} for field in unused}
    return {
        field: {"anyOf": [{"properties": {field: unused[field]}}, {"properties": others[field]}]} for field in unused
    }
