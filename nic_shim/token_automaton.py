"""From a regular expression, or JSON of bounded depth, to a token automaton in the bytes of device/ring_abi.h (ConstraintHeader).

Two steps. A byte automaton: outlines-core's determiniser (Rust) over a vocabulary of the 256 bytes, or built by hand for JSON. Then every token
walks from every state at once, level by level of the trie of all tokens, in numpy: the cost is trie nodes x states gathers, whatever the
language. Tokens that no state tells apart get one class.
Called by nic_shim/constraint_worker.py. Test: pytest tests/null/test_token_automaton.py

Invariants
I1  Each token that a state allows leads to a state from which the end can be reached by tokens.
I2  EOS is allowed exactly where the text so far is complete, and leads back to the same state.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from blinkimp import ring_abi as abi
from blinkimp.nic_shim.constraint_table import MOST_STATES, ConstraintTable, ConstraintTooLargeError, table_bytes

DEAD: Final = 0xFFFF  # in byte automata, as NO_STATE in tables
STATES_PER_PASS: Final = 256  # bounds the memory of a walk
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


# ---- Tokens ---------------------------------------------------------------------------------------------------------
class TokenTrie:
    """All tokens of a vocabulary by their bytes, level by level. Built once for a tokenizer."""

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        nodes: dict[bytes, int] = {b"": 0}  # a node's number within its level
        self.levels: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]] = []  # (parent in the level above, byte)
        self.tokens: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []  # of each level: (token, node)
        longest = max(map(len, token_bytes.values()), default=0)
        by_length: list[list[tuple[int, bytes]]] = [[] for _ in range(longest + 1)]
        prefixes: list[set[bytes]] = [set() for _ in range(longest + 1)]
        for token, text in token_bytes.items():
            by_length[len(text)].append((token, text))
            for length in range(len(text), 0, -1):
                if text[:length] in prefixes[length]:
                    break
                prefixes[length].add(text[:length])
        for length in range(1, longest + 1):
            ordered = sorted(prefixes[length])
            parents = np.array([nodes[text[:-1]] for text in ordered], dtype=np.int64)
            nodes = {text: idx for idx, text in enumerate(ordered)}
            self.levels.append((parents, np.array([text[-1] for text in ordered], dtype=np.uint8)))
            pairs = by_length[length]
            tokens = np.array([token for token, _ in pairs], dtype=np.int64)
            self.tokens.append((tokens, np.array([nodes[text] for _, text in pairs], dtype=np.int64)))

    def walk(self, automaton: ByteAutomaton, states: npt.NDArray[np.int64], vocab_size: int) -> U16:
        """[len(states), vocab_size]: where each token leads from each state; DEAD for tokens without bytes."""
        padded = np.vstack([automaton.next_state, np.full((1, 256), DEAD, dtype=np.uint16)])  # row of DEAD
        last = len(automaton.next_state)
        result = np.full((len(states), vocab_size), DEAD, dtype=np.uint16)
        at = states.astype(np.uint16)[:, None]
        for (parents, byte), (tokens, nodes) in zip(self.levels, self.tokens, strict=True):
            rows = np.minimum(at[:, parents], last)
            at = padded[rows, byte[None, :]]
            result[:, tokens] = at[:, nodes]
        return result


def token_table(
    automaton: ByteAutomaton, trie: TokenTrie, vocab_size: int, eos_ids: Sequence[int], max_bytes: int
) -> ConstraintTable:
    """The table for the device. Raises ConstraintTooLargeError, PatternError where no text of these tokens satisfies it."""
    num_states = len(automaton.next_state)
    if table_bytes(vocab_size, num_states, 2) > max_bytes:
        raise _too_large(vocab_size, num_states, 2, max_bytes)
    alive = _alive(automaton)
    pruned = automaton.next_state.copy()
    pruned[(pruned != DEAD) & ~np.append(alive, False)[np.minimum(pruned, num_states)]] = DEAD
    pruned_automaton = ByteAutomaton(pruned, automaton.is_accepting)
    # Tokens are alike where every state sends them the same way: compare the sums of a random word for each (state, next state).
    signature = np.zeros(vocab_size, dtype=np.uint64)
    passes = range(0, num_states, STATES_PER_PASS)
    for begin in passes:
        states = np.arange(begin, min(begin + STATES_PER_PASS, num_states))
        walked = trie.walk(pruned_automaton, states, vocab_size)
        for state, row in zip(states, walked, strict=True):
            allowed = row != DEAD
            signature[allowed] += _mixed(int(state), row[allowed])
    signature[list(eos_ids)] = _mixed(num_states, np.zeros(len(eos_ids), dtype=np.uint16))
    _, representative, class_of_token = np.unique(signature, return_index=True, return_inverse=True)
    num_classes = len(representative)
    if table_bytes(vocab_size, num_states, num_classes) > max_bytes:
        raise _too_large(vocab_size, num_states, num_classes, max_bytes)
    table = np.empty((num_states, num_classes), dtype=np.uint16)
    for begin in passes:
        states = np.arange(begin, min(begin + STATES_PER_PASS, num_states))
        table[states] = trie.walk(pruned_automaton, states, vocab_size)[:, representative]
    eos_class = class_of_token[eos_ids[0]]
    table[:, eos_class] = np.where(automaton.is_accepting, np.arange(num_states), DEAD)
    _check_ways_on(table)
    header = np.zeros(1, dtype=abi.CONSTRAINT_HEADER)
    header["vocab_size"], header["num_states"], header["num_classes"] = vocab_size, num_states, num_classes
    header["total_bytes"] = table_bytes(vocab_size, num_states, num_classes)
    classes = class_of_token.astype(np.uint16).tobytes()
    return ConstraintTable.parse(header.tobytes() + classes.ljust((len(classes) + 3) // 4 * 4, b"\0") + table.tobytes())


def _alive(automaton: ByteAutomaton) -> npt.NDArray[np.bool_]:
    """The states from which an accepting one can be reached."""
    alive = automaton.is_accepting.copy()
    while True:
        reaches = np.append(alive, False)[np.minimum(automaton.next_state, len(alive))].any(axis=1) | alive
        if (reaches == alive).all():
            return alive
        alive = reaches


def _check_ways_on(table: U16) -> None:
    """I1, for the states that a request can get to."""
    reached, frontier = {0}, [0]
    while frontier:
        row = table[frontier.pop()]
        targets = np.unique(row[row != DEAD])
        if not targets.size:
            raise PatternError(
                "no text of this model's tokens satisfies the constraint: at some place no token is allowed"
            )
        new = [int(state) for state in targets if int(state) not in reached]
        reached.update(new)
        frontier += new


def _too_large(vocab_size: int, num_states: int, num_classes: int, max_bytes: int) -> ConstraintTooLargeError:
    total_bytes = table_bytes(vocab_size, num_states, num_classes)
    return ConstraintTooLargeError(
        f"the constraint has {num_states} states and {num_classes} classes of tokens, {total_bytes} bytes or more; expected at most "
        f"{max_bytes} bytes; bound its lengths and repetitions, or start the engine with larger slots (--constraint-slot-bytes)"
    )


def _mixed(state: int, next_states: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """splitmix64's finisher over (state, next state)."""
    with np.errstate(over="ignore"):
        values = (next_states.astype(np.uint64) + np.uint64((state + 1) << 20)) * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(values ^ (values >> np.uint64(31)))


def deepest_json_object(
    trie: TokenTrie, vocab_size: int, eos_ids: Sequence[int], max_bytes: int, most: int
) -> ConstraintTable:
    """The table of the deepest JSON objects, `most` levels at most, that fits."""
    for depth in itertools.count(most, -1):
        try:
            return token_table(json_object_automaton(depth), trie, vocab_size, eos_ids, max_bytes)
        except ConstraintTooLargeError:
            if depth == 1:
                raise
    raise AssertionError("unreachable")
