"""Byte automata: of a regular expression, by outlines-core's determiniser (Rust) over a vocabulary of the 256 bytes; or of JSON objects of bounded
depth, built by hand.

    byte_automaton("[a-z]+").next_state[state, byte]

Called by nic_shim/constraint_worker.py and token_automaton.py. Test: pytest tests/null/test_token_automaton.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from blinkimp.nic_shim.constraint_table import MOST_STATES, ConstraintTooLargeError

DEAD: Final = 0xFFFF  # in byte automata, as NO_STATE in tables
_BYTE_EOS: Final = 256
# outlines-core means a search, from anywhere to the first match: "x{0,n}" costs 2^n states where x may hold what the whole begins with, and
# "ab|abc" finds ab only. Between two characters that the expression does not hold there is one beginning and one end. (A noncharacter;
# [^a] still holds it, and may still be costly.)
_MARK: Final = chr(0x10FFFF)

U16 = npt.NDArray[np.uint16]


class PatternError(ValueError):
    """The regular expression cannot be used."""


@dataclass(frozen=True)
class ByteAutomaton:
    """next_state[state, byte], DEAD where there is none; state 0 is the first."""

    next_state: U16  # [num_states, 256]
    is_accepting: npt.NDArray[np.bool_]  # [num_states]


def byte_automaton(regex: str) -> ByteAutomaton:
    """Raises PatternError, ConstraintTooLargeError."""
    from outlines_core import Index, Vocabulary

    try:
        vocabulary = Vocabulary(_BYTE_EOS, {bytes([byte]): [byte] for byte in range(256)})
        index = Index(f"{_MARK}(?:{regex}){_MARK}", vocabulary)
    except (ValueError, TypeError, RuntimeError) as error:
        raise PatternError(f"the regular expression cannot be compiled: {str(error)[:300]}") from None
    transitions: dict[int, dict[int, int]] = index.get_transitions()
    finals = set(index.get_final_states())

    def behind_mark(state: int) -> int:
        for byte in _MARK.encode():
            state = transitions.get(state, {}).get(byte, -1)
        return state

    first = behind_mark(index.get_initial_state())
    names = {first: 0}
    frontier = [first]
    while frontier:
        for byte, target in transitions.get(frontier.pop(), {}).items():
            if byte != _BYTE_EOS and target not in names:
                names[target] = len(names)
                frontier.append(target)
    if len(names) >= MOST_STATES:
        raise ConstraintTooLargeError(
            f"the constraint has {len(names)} states; expected fewer than {MOST_STATES}; bound its repetitions"
        )
    next_state = np.full((len(names), 256), DEAD, dtype=np.uint16)
    is_accepting = np.zeros(len(names), dtype=bool)
    for state, name in names.items():
        for byte, target in transitions.get(state, {}).items():
            if byte != _BYTE_EOS:
                next_state[name, byte] = names[target]
    for state, name in names.items():
        is_accepting[name] = behind_mark(state) in finals
    return ByteAutomaton(next_state, is_accepting)


def json_object_automaton(depth: int) -> ByteAutomaton:
    """Any JSON object with at most `depth` objects and arrays inside of each other; at most one space between its tokens."""
    return _JsonBuilder(depth).build()


_Edges = dict[int, tuple[str, str]]  # byte -> (open brackets, place)


class _JsonBuilder:
    """States are (open brackets, place); made as they are reached."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._names: dict[tuple[str, str], int] = {}
        self._edges: list[_Edges] = []

    def build(self) -> ByteAutomaton:
        self._name(("", "start"))
        done = 0
        keys: list[tuple[str, str]] = []
        while done < len(self._edges):
            keys = list(self._names)
            self._edges[done] = self._out(*keys[done])
            for target in list(self._edges[done].values()):
                self._name(target)
            done += 1
        next_state = np.full((len(self._edges), 256), DEAD, dtype=np.uint16)
        for state, row in enumerate(self._edges):
            for byte, target in row.items():
                next_state[state, byte] = self._names[target]
        is_accepting = np.array([place == "end" for _, place in self._names], dtype=bool)
        return ByteAutomaton(next_state, is_accepting)

    def _name(self, key: tuple[str, str]) -> int:
        if key not in self._names:
            self._names[key] = len(self._names)
            self._edges.append({})
        return self._names[key]

    def _out(self, stack: str, place: str) -> _Edges:
        """Edges of one state. stack: { and [ from the outside in."""
        kind, _, rest = place.partition(":")
        if kind == "start":
            return {ord("{"): ("{", "open")}
        if kind == "end":
            return {}
        if kind == "open":  # behind { or [
            return {ord(" "): (stack, "open2")} | self._out(stack, "open2")
        if kind == "open2":
            first = {ord('"'): (stack, "str:key")} if stack[-1] == "{" else self._value(stack)
            return first | self._close(stack)
        if kind == "key":  # behind a comma in an object
            return {ord(" "): (stack, "key2"), ord('"'): (stack, "str:key")}
        if kind == "key2":
            return {ord('"'): (stack, "str:key")}
        if kind == "colon":
            return {ord(":"): (stack, "value")}
        if kind == "value":
            return {ord(" "): (stack, "value2")} | self._value(stack)
        if kind == "value2":
            return self._value(stack)
        if kind == "after":
            return {ord(" "): (stack, "after2")} | self._after(stack)
        if kind == "after2":
            return self._close(stack)
        if kind in ("str", "esc", "hex", "u"):
            return self._string(stack, kind, rest)
        if kind == "word":
            word, _, position = rest.partition(",")
            at = int(position)
            return {ord(word[at]): (stack, "after" if at + 1 == len(word) else f"word:{word},{at + 1}")}
        return self._number(stack, kind)

    def _after(self, stack: str) -> _Edges:
        """What may follow a value."""
        return {ord(","): (stack, "key" if stack[-1] == "{" else "value")} | self._close(stack)

    def _close(self, stack: str) -> _Edges:
        bracket = ord("}") if stack[-1] == "{" else ord("]")
        return {bracket: (stack[:-1], "after" if len(stack) > 1 else "end")}

    def _value(self, stack: str) -> _Edges:
        edges = {ord('"'): (stack, "str:value"), ord("-"): (stack, "minus"), ord("0"): (stack, "zero")}
        edges |= dict.fromkeys(b"123456789", (stack, "int"))
        edges |= {ord(word[0]): (stack, f"word:{word},1") for word in ("true", "false", "null")}
        if len(stack) < self._depth:
            edges |= {ord("{"): (stack + "{", "open"), ord("["): (stack + "[", "open")}
        return edges

    def _string(self, stack: str, kind: str, role: str) -> _Edges:
        inside = (stack, f"str:{role}")
        if kind == "esc":
            edges = dict.fromkeys(b'"\\/bfnrt', inside)
            return edges  # \\u is left out: its surrogates would have to come in pairs
        if kind == "u":  # bytes of a character: role is ROLE,LOW,HIGH,LEFT
            own, low, high, left = role.split(",")
            target = f"str:{own}" if left == "1" else f"u:{own},128,191,{int(left) - 1}"
            return dict.fromkeys(range(int(low), int(high) + 1), (stack, target))
        edges = {byte: inside for byte in range(0x20, 0x7F) if byte not in b'"\\'}
        edges[0x7F] = inside
        edges[ord("\\")] = (stack, f"esc:{role}")
        edges[ord('"')] = (stack, "colon" if role == "key" else "after")
        for first, last, low2, high2, num_left in _UTF8:
            edges |= dict.fromkeys(range(first, last + 1), (stack, f"u:{role},{low2},{high2},{num_left}"))
        return edges

    def _number(self, stack: str, place: str) -> _Edges:
        digits = b"0123456789"
        if place == "minus":
            return {ord("0"): (stack, "zero")} | dict.fromkeys(b"123456789", (stack, "int"))
        end = {ord(" "): (stack, "after2")} | self._after(stack)
        fraction, exponent = {ord("."): (stack, "point")}, dict.fromkeys(b"eE", (stack, "exp"))
        if place == "zero":
            return end | fraction | exponent
        if place == "int":
            return end | fraction | exponent | dict.fromkeys(digits, (stack, "int"))
        if place == "point":
            return dict.fromkeys(digits, (stack, "frac"))
        if place == "frac":
            return end | exponent | dict.fromkeys(digits, (stack, "frac"))
        if place == "exp":
            return dict.fromkeys(b"+-", (stack, "sign")) | dict.fromkeys(digits, (stack, "power"))
        if place == "sign":
            return dict.fromkeys(digits, (stack, "power"))
        if place == "power":  # two digits at most: a float must be able to hold it
            return end | dict.fromkeys(digits, (stack, "power2"))
        assert place == "power2", place
        return end


# First byte from, to; second byte from, to; bytes that follow. Unicode's table of well-formed UTF-8.
_UTF8: Final = (
    (0xC2, 0xDF, 0x80, 0xBF, 1),
    (0xE0, 0xE0, 0xA0, 0xBF, 2),
    (0xE1, 0xEC, 0x80, 0xBF, 2),
    (0xED, 0xED, 0x80, 0x9F, 2),
    (0xEE, 0xEF, 0x80, 0xBF, 2),
    (0xF0, 0xF0, 0x90, 0xBF, 3),
    (0xF1, 0xF3, 0x80, 0xBF, 3),
    (0xF4, 0xF4, 0x80, 0x8F, 3),
)
