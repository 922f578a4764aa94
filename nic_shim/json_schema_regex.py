"""A JSON schema as a regular expression over its compact JSON texts: what an automaton can promise, and refusal of the rest by name.

Objects hold the schema's properties in the schema's order; between tokens at most one space. Every text that matches parses and validates.
Called by nic_shim/constraint_worker.py. Test: pytest tests/null/test_json_schema_regex.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final

SPACE: Final = " ?"
CHARACTER: Final = r'([^"\\\x00-\x1f]|\\["\\/bfnrt])'
STRING: Final = f'"{CHARACTER}*"'
INTEGER: Final = "-?(0|[1-9][0-9]{0,17})"
UNSIGNED: Final = "(0|[1-9][0-9]{0,17})"
FRACTION: Final = r"(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?"
TYPES: Final = ("string", "number", "integer", "boolean", "null", "object", "array")
MOST_DEPTH: Final = 32
MOST_REPEATS: Final = 4096
ANNOTATIONS: Final = frozenset(
    {
        "title",
        "description",
        "default",
        "examples",
        "example",
        "$schema",
        "$id",
        "$comment",
        "$defs",
        "definitions",
        "deprecated",
    }
)
OF_TYPE: Final[Mapping[str, frozenset[str]]] = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset({"minimum", "maximum"}),
    "number": frozenset({"minimum"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
SUPPORTED: Final = sorted({"type", "enum", "const", "anyOf", "oneOf", "$ref", *frozenset().union(*OF_TYPE.values())})
_DAY: Final = r"[1-9][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"  # no day that a month may lack
_TIME: Final = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?"
_ZONE: Final = r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE: Final = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
FORMATS: Final = {
    "date": _DAY,
    "time": _TIME + _ZONE,
    "date-time": f"{_DAY}T{_TIME}{_ZONE}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "email": r"[a-z0-9]{1,16}([._+-][a-z0-9]{1,16}){0,3}@[a-z0-9]{1,16}(\.[a-z0-9]{2,16}){1,3}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
}
_SPECIAL: Final = re.compile(r"([\\.+*?()|\[\]{}^$#&\-~/])")


class SchemaError(ValueError):
    """The schema cannot be compiled; the message says where, what, got, expected."""


def escaped(text: str) -> str:
    """A regex for exactly this text."""
    return "".join(
        f"\\x{ord(character):02x}" if ord(character) < 0x20 else _SPECIAL.sub(r"\\\1", character) for character in text
    )


def schema_regex(schema: Any, is_safe_pattern: Callable[[str], bool]) -> str:
    """is_safe_pattern(regex): whether it matches nothing that a JSON string must escape. Raises SchemaError."""
    return _Compiler(schema, is_safe_pattern).regex(schema, "$", 0)


class _Compiler:
    def __init__(self, root: Any, is_safe_pattern: Callable[[str], bool]) -> None:
        self._root = root
        self._is_safe_pattern = is_safe_pattern
        self._open_refs: list[str] = []

    def regex(self, schema: Any, where: str, depth: int) -> str:
        if depth > MOST_DEPTH:
            raise SchemaError(f"{where}: the schema is nested deeper than {MOST_DEPTH}")
        if not isinstance(schema, dict):
            raise SchemaError(
                f"{where}: got {schema!r:.80}, expected a map; true and false are not supported as schemas"
            )
        keywords = schema.keys() - ANNOTATIONS
        for exclusive in ("$ref", "const", "enum", "anyOf", "oneOf"):
            if exclusive in keywords:
                others = keywords - {exclusive, *(("type",) if exclusive in ("const", "enum") else ())}
                if others:
                    raise SchemaError(
                        f"{where}: {exclusive} beside {', '.join(sorted(others))} is not supported; expected it alone"
                    )
                return str(getattr(self, f"_{exclusive.lstrip('$').lower()}")(schema, f"{where}.{exclusive}", depth))
        types = self._types(schema, where, [kind for kind in TYPES if OF_TYPE[kind] & keywords])
        known = frozenset({"type"}).union(*(OF_TYPE[kind] for kind in types))
        if unknown := sorted(keywords - known):
            raise SchemaError(
                f"{where}: {', '.join(unknown)} is not supported for {'/'.join(types)}; supported: {', '.join(SUPPORTED)}"
            )
        return "(" + "|".join(str(getattr(self, f"_{kind}")(schema, where, depth)) for kind in types) + ")"

    @staticmethod
    def _types(schema: dict[str, Any], where: str, default: list[str]) -> list[str]:
        types = schema.get("type", default)
        types = [types] if isinstance(types, str) else types
        if (
            not isinstance(types, list)
            or not types
            or not all(isinstance(kind, str) and kind in TYPES for kind in types)
        ):
            raise SchemaError(
                f"{where}: type is {schema.get('type')!r:.80}; expected one or several of {', '.join(TYPES)}"
            )
        return types

    # ---- Any type --------------------------------------------------------------------------------------------------
    def _ref(self, schema: dict[str, Any], where: str, depth: int) -> str:
        reference = schema["$ref"]
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise SchemaError(
                f"{where}: got {reference!r:.80}, expected a reference within the schema, as #/$defs/name"
            )
        if reference in self._open_refs or reference == "#":
            raise SchemaError(
                f"{where}: {reference} is recursive; an automaton cannot count levels: write out the levels you need"
            )
        target = self._root
        for step in reference[2:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or step not in target:
                raise SchemaError(f"{where}: {reference[:80]} leads nowhere; expected a path into this schema")
            target = target[step]
        self._open_refs.append(reference)
        result = self.regex(target, reference, depth + 1)
        self._open_refs.pop()
        return result

    def _const(self, schema: dict[str, Any], where: str, _: int) -> str:
        return self._literal(self._constants(schema, where)[0])

    def _enum(self, schema: dict[str, Any], where: str, _: int) -> str:
        return "(" + "|".join(self._literal(value) for value in self._constants(schema, where)) + ")"

    def _constants(self, schema: dict[str, Any], where: str) -> list[Any]:
        """Values of a const or enum, less those that a type beside it forbids; at least one."""
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list) or not values:
            raise SchemaError(f"{where}: got {values!r:.80}, expected a list of at least one value")
        if "type" in schema:
            allowed = _narrowed(self._types(schema, where, []))
            values = [value for value in values if _type_of(value) in allowed]
            if not values:
                raise SchemaError(f"{where}: no value is of type {schema['type']!r:.80}")
        return values

    def _literal(self, value: Any) -> str:
        try:
            return escaped(json.dumps(value, ensure_ascii=False, separators=(",", ": "), allow_nan=False))
        except ValueError as error:
            raise SchemaError(f"{value!r:.80} is no JSON value: {error}") from None

    def _anyof(self, schema: dict[str, Any], where: str, depth: int) -> str:
        alternatives = schema.get("anyOf", schema.get("oneOf"))
        if not isinstance(alternatives, list) or not alternatives:
            raise SchemaError(f"{where}: expected a list of at least one schema")
        return (
            "(" + "|".join(self.regex(one, f"{where}[{idx}]", depth + 1) for idx, one in enumerate(alternatives)) + ")"
        )

    def _oneof(self, schema: dict[str, Any], where: str, depth: int) -> str:
        """Only where a value cannot satisfy two: types that differ, and constants of other types and values."""
        types: set[str] = set()
        constants: dict[Hashable, str] = {}  # by value, their types
        for idx, one in enumerate(schema["oneOf"] if isinstance(schema["oneOf"], list) else ()):
            found = self._kinds(one, f"{where}[{idx}]")
            if (
                found is None
                or types & (found[0] | {*found[1].values()})
                or found[0] & {*constants.values()}
                or constants.keys() & found[1].keys()
            ):
                raise SchemaError(
                    f"{where}: a value might satisfy two of the alternatives; expected types and constants that differ; use anyOf"
                )
            types |= found[0]
            constants |= found[1]
        return self._anyof(schema, where, depth)

    def _kinds(self, schema: Any, where: str) -> tuple[frozenset[str], dict[Hashable, str]] | None:
        """Types of which any value might satisfy the schema, and single values, with their types; None: nobody knows."""
        if not isinstance(schema, dict):
            return None
        if "const" in schema or "enum" in schema:
            values = self._constants(schema, where)
            return frozenset(), {_identity(value): _type_of(value) for value in values}
        if "type" not in schema:
            return None
        return _narrowed(self._types(schema, where, [])), {}

    # ---- By type ---------------------------------------------------------------------------------------------------
    def _string(self, schema: dict[str, Any], where: str, _: int) -> str:
        given = [name for name in ("pattern", "format") if name in schema]
        if given and (len(given) > 1 or "minLength" in schema or "maxLength" in schema):
            raise SchemaError(f"{where}: {given[0]} beside pattern, format, minLength or maxLength is not supported")
        if "format" in schema:
            if schema["format"] not in FORMATS:
                raise SchemaError(f"{where}.format: got {schema['format']!r:.80}, expected one of {', '.join(FORMATS)}")
            return f'"{FORMATS[schema["format"]]}"'
        if "pattern" in schema:
            return f'"({self._pattern(schema["pattern"], where)})"'
        low, high = self._bounds(schema, where, "minLength", "maxLength")
        return f'"{CHARACTER}{_repeats(low, high)}"'

    def _pattern(self, pattern: Any, where: str) -> str:
        if (
            not isinstance(pattern, str)
            or not pattern.startswith("^")
            or not pattern.endswith("$")
            or pattern.endswith("\\$")
        ):
            raise SchemaError(
                f"{where}.pattern: got {pattern!r:.80}, expected a text that begins with ^ and ends with $"
            )
        inner = f"({pattern[1:-1]})"
        if not self._is_safe_pattern(inner):
            raise SchemaError(
                f"{where}.pattern: {pattern!r:.80} could match a quote, a backslash or a control character, which JSON escapes; "
                'expected a pattern that cannot, such as [a-z]+ or [^"\\\\\\x00-\\x1f]* in place of .*'
            )
        return inner

    def _integer(self, schema: dict[str, Any], where: str, _: int) -> str:
        low, high = schema.get("minimum"), schema.get("maximum")
        if low is None and high is None:
            return INTEGER
        for name, value in (("minimum", low), ("maximum", high)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 10**15):
                raise SchemaError(f"{where}.{name}: got {value!r:.80}, expected an integer of at most 15 digits")
        low, high = -(10**15) + 1 if low is None else low, 10**15 - 1 if high is None else high
        if low > high:
            raise SchemaError(f"{where}: minimum {low} is above maximum {high}")
        return integer_range(low, high)

    def _number(self, schema: dict[str, Any], where: str, _: int) -> str:
        if "minimum" not in schema:
            return INTEGER + FRACTION
        if schema["minimum"] != 0:
            raise SchemaError(
                f"{where}.minimum: got {schema['minimum']!r:.80}, expected 0 for a number; other bounds only for integers"
            )
        return UNSIGNED + FRACTION

    def _boolean(self, schema: dict[str, Any], where: str, _: int) -> str:
        return "(true|false)"

    def _null(self, schema: dict[str, Any], where: str, _: int) -> str:
        return "null"

    def _array(self, schema: dict[str, Any], where: str, depth: int) -> str:
        prefix = schema.get("prefixItems", [])
        if not isinstance(prefix, list):
            raise SchemaError(f"{where}.prefixItems: expected a list of schemas")
        low, high = self._bounds(schema, where, "minItems", "maxItems")
        if prefix:
            if (
                ("items" in schema and schema["items"] is not False)
                or low not in (0, len(prefix))
                or high not in (None, len(prefix))
            ):
                raise SchemaError(f"{where}: prefixItems beside items or another number of items is not supported")
            items = [self.regex(one, f"{where}.prefixItems[{idx}]", depth + 1) for idx, one in enumerate(prefix)]
            return rf"\[{SPACE}" + f",{SPACE}".join(items) + rf"{SPACE}\]"
        if "items" not in schema:
            raise SchemaError(f"{where}: an array of anything is not supported; expected items")
        if high == 0:
            return rf"\[{SPACE}\]"
        item = self.regex(schema["items"], f"{where}.items", depth + 1)
        more = _repeats(max(0, low - 1), None if high is None else high - 1)
        some = f"{item}(,{SPACE}{item}){more}"
        return rf"\[{SPACE}" + (some if low else f"({some})?") + rf"{SPACE}\]"

    def _object(self, schema: dict[str, Any], where: str, depth: int) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        more = schema.get("additionalProperties")
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise SchemaError(f"{where}: expected properties as a map and required as a list")
        if missing := [name for name in required if name not in properties]:
            raise SchemaError(f"{where}.required: {missing[0]!r:.80} is not among the properties")
        if not properties:
            if not isinstance(more, dict):
                if more is False:
                    return rf"\{{{SPACE}\}}"
                raise SchemaError(
                    f"{where}: an object of anything is not supported; expected properties, or additionalProperties with a type"
                )
            pair = f"{STRING}:{SPACE}" + self.regex(more, f"{where}.additionalProperties", depth + 1)
            # Keys may repeat; JSON allows that, the last one counts.
            return rf"\{{{SPACE}({pair}(,{SPACE}{pair})*)?{SPACE}\}}"
        pairs = [
            f"{self._literal(name)}:{SPACE}" + self.regex(one, f"{where}.{name}"[:200], depth + 1)
            for name, one in properties.items()
        ]
        return rf"\{{{SPACE}" + _members(pairs, [name in required for name in properties]) + rf"{SPACE}\}}"

    def _bounds(self, schema: dict[str, Any], where: str, low_name: str, high_name: str) -> tuple[int, int | None]:
        low, high = schema.get(low_name, 0), schema.get(high_name)
        for name, value in ((low_name, low), (high_name, high)):
            is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_REPEATS
            if value is not None and not is_count:
                raise SchemaError(f"{where}.{name}: got {value!r:.80}, expected an integer from 0 to {MOST_REPEATS}")
        if high is not None and low > high:
            raise SchemaError(f"{where}: {low_name} {low} is above {high_name} {high}")
        return low, high


def _type_of(value: Any) -> str:
    """The narrowest one: 1.0 is an integer."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    names = {str: "string", int: "integer", type(None): "null", dict: "object", list: "array"}
    return names.get(type(value), "")


def _narrowed(types: Sequence[str]) -> frozenset[str]:
    """What _type_of() may say of values of these types."""
    return frozenset(types) | ({"integer"} if "number" in types else frozenset())


def _identity(value: Any) -> Hashable:
    """Equal where JSON schema takes two values for the same: 1 and 1.0, but not 1 and true."""
    if isinstance(value, list):
        return "array", tuple(map(_identity, value))
    if isinstance(value, dict):
        return "object", frozenset((name, _identity(one)) for name, one in value.items())
    return isinstance(value, bool), value


def _repeats(low: int, high: int | None) -> str:
    if high is None:
        return "*" if low == 0 else f"{{{low},}}"
    return f"{{{low},{high}}}"


def _members(pairs: Sequence[str], is_required: Sequence[bool]) -> str:
    """The pairs in order, optional ones left out at will, with commas in between."""
    comma = f",{SPACE}"
    if not any(is_required):
        alternatives = [
            pair + "".join(f"({comma}{later})?" for later in pairs[idx + 1 :]) for idx, pair in enumerate(pairs)
        ]
        return "(" + "|".join(alternatives) + ")?"
    first = list(is_required).index(True)
    parts = [f"({pair}{comma})?" for pair in pairs[:first]] + [pairs[first]]
    for pair, needed in zip(pairs[first + 1 :], is_required[first + 1 :], strict=True):
        parts.append(comma + pair if needed else f"({comma}{pair})?")
    return "".join(parts)


def integer_range(low: int, high: int) -> str:
    """A regex for the integers from low to high, without leading zeros."""
    parts = []
    if low < 0:
        parts.append("-(" + _magnitudes(max(1, -high), -low) + ")")
    if high >= 0:
        parts.append("(" + _magnitudes(max(0, low), high) + ")")
    return "(" + "|".join(parts) + ")"


def _magnitudes(low: int, high: int) -> str:
    parts = []
    while low <= high:
        # The largest block of equal length that begins at low: a fixed head, one digit's range, free digits behind it.
        num_free = 0
        while low and low % 10 ** (num_free + 1) == 0 and low + 10 ** (num_free + 1) - 1 <= high:
            num_free += 1
        block = 10**num_free
        digit = low // block % 10
        last = digit
        while last < 9 and low + (last - digit + 2) * block - 1 <= high:
            last += 1
        head = str(low // block)[:-1]
        free = f"[0-9]{{{num_free}}}" if num_free else ""
        parts.append(f"{head}[{digit}-{last}]{free}")
        low += (last - digit + 1) * block
    return "|".join(parts)
