"""Fifty JSON schemas as people send them, within what the ingress compiles.

Used by tests/host/test_constraints.py and tests/null/test_json_schema_regex.py.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
INT: Schema = {"type": "integer", "minimum": 0, "maximum": 999}
WORD: Schema = {"type": "string", "pattern": "^[a-z]{1,8}$"}
SHORT: Schema = {"type": "string", "maxLength": 12}
FLAG: Schema = {"type": "boolean"}


def record(required: list[str] | None = None, **properties: Schema) -> Schema:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def many(items: Schema, low: int = 0, high: int = 4) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


SCHEMAS: list[Schema] = [
    record(name=SHORT, age=INT),
    record(["id"], id=INT, note=SHORT, done=FLAG),
    record([], a=INT, b=FLAG, c=WORD),
    record(["b"], a=INT, b=FLAG, c=WORD),
    record(["c"], a=INT, b=FLAG, c=WORD),
    record(name={"enum": ["red", "green", "blue"]}, level={"enum": [1, 2.5, None, True]}),
    record(kind={"const": "point"}, x=INT, y=INT),
    record(tags=many(WORD, 1, 3)),
    record(matrix=many(many(INT, 2, 2), 2, 2)),
    record(child=record(child=record(child=record(value=INT)))),
    record(
        user=record(name=SHORT, mail={"type": "string", "format": "email"}), when={"type": "string", "format": "date"}
    ),
    record(at={"type": "string", "format": "date-time"}),
    record(at={"type": "string", "format": "time"}, ip={"type": "string", "format": "ipv4"}),
    record(id={"type": "string", "format": "uuid"}),
    record(value={"anyOf": [INT, WORD, {"type": "null"}]}),
    record(value={"oneOf": [INT, WORD, FLAG]}),
    record(shape={"oneOf": [{"const": "circle"}, {"const": "square"}]}),
    record(value={"type": ["integer", "null"]}),
    record(value={"type": ["boolean", "null"]}, other={"type": "null"}),
    record(n={"type": "integer", "minimum": -5, "maximum": 5}),
    record(n={"type": "integer", "minimum": 100}),
    record(n={"type": "integer", "maximum": -7}),
    record(n={"type": "integer", "minimum": 17, "maximum": 17}),
    record(n={"type": "integer", "minimum": 99, "maximum": 10001}),
    record(price={"type": "number", "minimum": 0}),
    record(ratio={"type": "number"}, delta={"type": "integer"}),
    {"type": "array", "prefixItems": [INT, WORD, FLAG], "minItems": 3, "maxItems": 3},
    many(record(a=INT), 0, 2),
    many({"anyOf": [INT, FLAG]}, 3, 3),
    many(INT, 0, 0),
    many(WORD, 0, 1),
    {"type": "object", "additionalProperties": False},
    {"type": "string", "minLength": 3, "maxLength": 6},
    {"type": "string", "minLength": 2, "maxLength": 2},
    {"enum": ['a "quoted" text', "back\\slash", "line\nbreak", "日本", "a.b*c"]},
    {"enum": [{"nested": [1, 2, {"deep": None}]}, [], {}]},
    {"const": {"x": 1.5, "y": ["z"]}},
    {"type": "boolean"},
    {"type": "null"},
    INT,
    record(**{"odd name": INT, 'a"b': FLAG, "naïve": WORD, "$ref.": INT}),
    {
        "$ref": "#/$defs/item",
        "$defs": {"item": record(name=WORD, next={"$ref": "#/$defs/leaf"}), "leaf": record(n=INT)},
    },
    {"type": "object", "properties": {"p": {"$ref": "#/definitions/pair"}}, "definitions": {"pair": many(INT, 2, 2)}},
    {
        "title": "Person",
        "description": "who",
        **record(name={**SHORT, "title": "Name", "examples": ["x"]}, age={**INT, "default": 3}),
    },
    record(plate={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"}),
    record(hex={"type": "string", "pattern": "^#([0-9a-f]{3}|[0-9a-f]{6})$"}),
    record(phone={"type": "string", "pattern": "^\\+?[0-9]{3,9}( [0-9]{2})?$"}),
    record(steps=many(record(action={"enum": ["go", "stop"]}, seconds=INT), 1, 3), final=WORD),
    record(
        weather=record(city=WORD, celsius={"type": "integer", "minimum": -60, "maximum": 60}), sources=many(WORD, 0, 2)
    ),
    {"anyOf": [record(ok={"const": True}, value=INT), record(ok={"const": False}, error=WORD)]},
    record(["a", "c"], a=INT, b=INT, c=INT, d=INT, e=INT),
    record(x={"type": "integer", "enum": [1, 2, 3]}, y={"type": "string", "enum": ["p", "q"]}),
]
