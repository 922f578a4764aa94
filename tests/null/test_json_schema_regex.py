"""Schemas as expressions: what matches validates, what should not match does not, and ranges of integers are exact.

Run: pytest tests/null/test_json_schema_regex.py
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blinkimp.nic_shim.json_schema_regex import SchemaError, integer_range, schema_regex
from tests.json_schemas import SCHEMAS


def matches(schema: Any, text: str) -> bool:
    return re.fullmatch(schema_regex(schema, lambda _: True), text) is not None


@given(st.integers(-(10**6), 10**6), st.integers(0, 10**6), st.integers(-2, 2), st.sampled_from([0, 1]))
@settings(deadline=None)
def test_a_range_holds_its_integers_and_no_others(low: int, width: int, offset: int, end: int) -> None:
    pattern = re.compile(integer_range(low, low + width))
    value = low + end * width + offset
    assert bool(pattern.fullmatch(str(value))) == (low <= value <= low + width)


def test_every_schema_compiles_to_an_expression() -> None:
    for schema in SCHEMAS:
        re.compile(schema_regex(schema, lambda _: True))


@pytest.mark.parametrize(
    ("properties", "required", "yes", "no"),
    [
        ("ab", "ab", ['{"a": 1,"b": 1}', '{"a":1, "b":1 }'], ["{}", '{"a": 1}', '{"b": 1,"a": 1}']),
        ("ab", "b", ['{"b": 1}', '{"a": 1,"b": 1}'], ["{}", '{"a": 1}', '{,"b": 1}']),
        ("abc", "b", ['{"b": 1}', '{"b": 1,"c": 1}', '{"a": 1,"b": 1,"c": 1}'], ['{"a": 1,"c": 1}']),
        ("abc", "", ["{}", '{"a": 1}', '{"c": 1}', '{"a": 1,"c": 1}'], ['{"c": 1,"a": 1}', '{"a": 1,}']),
    ],
)
def test_commas_of_optional_properties(properties: str, required: str, yes: list[str], no: list[str]) -> None:
    schema = {"type": "object", "properties": {name: {"const": 1} for name in properties}, "required": list(required)}
    assert all(matches(schema, text) and json.loads(text) is not None for text in yes)
    assert not any(matches(schema, text) for text in no)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (True, "expected a map"),
        ({}, "type is None"),
        ({"type": "strin"}, "expected one or several"),
        ({"type": "object"}, "an object of anything"),
        ({"type": "array"}, "an array of anything"),
        ({"type": "string", "minimum": 3}, "minimum is not supported for string"),
        ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, "uniqueItems is not supported"),
        ({"not": {"type": "string"}}, "type is None"),
        ({"type": "string", "format": "hostname"}, "expected one of date"),
        ({"type": "string", "pattern": "a"}, "begins with"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "above"),
        ({"type": "integer", "minimum": 1.5}, "expected an integer"),
        ({"type": "number", "minimum": 1}, "expected 0"),
        ({"$ref": "#/$defs/x"}, "leads nowhere"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}, "recursive"),
        ({"$ref": "http://x"}, "within the schema"),
        ({"enum": []}, "at least one"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "satisfy two"),
        ({"oneOf": [{"const": 1}, {"type": "integer"}]}, "satisfy two"),
        ({"oneOf": [{"type": "string"}, {"enum": [2, "a"]}]}, "satisfy two"),
        ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "satisfy two"),
        ({"oneOf": [{"const": {"a": [1]}}, {"const": {"a": [1.0]}}]}, "satisfy two"),
        ({"oneOf": [{"const": 1, "type": 5}]}, "type is 5; expected one or several"),
        ({"const": 1, "type": "string"}, "no value is of type 'string'"),
        ({"type": "object", "properties": {}, "required": ["z"]}, "not among the properties"),
        ({"const": 1, "minimum": 0}, "expected it alone"),
    ],
)
def test_what_would_not_be_honoured_is_refused_by_name(schema: Any, words: str) -> None:
    with pytest.raises(SchemaError, match=re.escape(words)):
        schema_regex(schema, lambda _: True)


ALTERNATIVES = [
    {"const": 1}, {"const": 1.0}, {"const": 1.5}, {"const": True}, {"const": [1]}, {"const": [True]}, {"const": None}, {"const": "a"},
    {"enum": [0, "a"], "type": "integer"}, {"enum": [2, "b"]},
    {"type": "integer"}, {"type": "number"}, {"type": "string"}, {"type": "boolean"}, {"type": ["null", "integer"]},
]  # fmt: skip
PROBES = [0, 1, 2, 1.0, 1.5, True, False, None, "a", "b", "c", [1], [True]]


def test_one_of_holds_what_it_says_or_is_refused() -> None:
    """Any two alternatives: what the expression lets through is valid under one of them alone, as jsonschema has it; and nothing else is refused."""
    for first, second in itertools.product(ALTERNATIVES, repeat=2):
        schema = {"oneOf": [first, second]}
        validator = jsonschema.Draft202012Validator(schema)
        is_ambiguous = any(
            all(jsonschema.Draft202012Validator(one).is_valid(probe) for one in (first, second)) for probe in PROBES
        )
        try:
            pattern = re.compile(schema_regex(schema, lambda _: True))
        except SchemaError:
            assert is_ambiguous, f"{schema} could have been honoured"
            continue
        for probe in PROBES:
            if pattern.fullmatch(json.dumps(probe)):
                assert validator.is_valid(probe), f"{schema} lets {probe!r} through"


def test_a_deep_schema_is_refused() -> None:
    schema: Any = {"type": "null"}
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    with pytest.raises(SchemaError, match="deeper"):
        schema_regex(schema, lambda _: True)
