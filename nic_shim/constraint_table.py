"""From a token automaton, state by state, to the class-compressed table that the sampler walks in device memory.

    table = build_constraint_table(vocab_size, rows, accepting={3}, eos_ids=(2,), max_bytes=port.constraint_slot_bytes)
    port.load_constraint(slot, table.data)

The bytes are those of ConstraintHeader in device/ring_abi.h: header, u16 class_of_token[vocab_size] padded to 4 bytes, u16
next_state[num_states][num_classes]. Tokens that no state tells apart share a class: a JSON schema over 128,256 tokens has some hundred of
them, so a table of a thousand states is a few hundred kilobytes instead of a quarter of a gigabyte.
Called by whoever compiles a regex or a schema. Test: pytest tests/null/test_constraint_table.py
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from blinkimp import ring_abi as abi

MOST_STATES: Final = 0xFFFF  # NO_STATE is no number of a state
MOST_CLASSES: Final = 0x10000  # class_of_token is u16
_MOST_ATTEMPTS: Final = 4

Integers = npt.NDArray[np.integer[Any]]
# What one state allows: token -> next state, as a mapping or as two arrays of equal length.
Row = Mapping[int, int] | tuple[Integers, Integers]


class ConstraintError(ValueError):
    """The automaton cannot be made into a table; the message says what, got, expected, remedy."""


class ConstraintTooLargeError(ConstraintError):
    """The table does not fit into a constraint slot."""


@dataclass(frozen=True)
class ConstraintTable:
    """A table as bytes, and the automaton in it for whoever wants to follow a request on the host."""

    data: bytes
    vocab_size: int
    num_states: int
    num_classes: int

    @classmethod
    def parse(cls, data: bytes) -> ConstraintTable:
        """Reads a table back. Raises ConstraintError where the device would reject it."""
        if len(data) < abi.CONSTRAINT_HEADER.itemsize:
            raise ConstraintError(f"constraint of {len(data)} bytes; expected at least its header; build it again")
        header = np.frombuffer(data, abi.CONSTRAINT_HEADER, count=1)[0]
        sizes = (int(header["vocab_size"]), int(header["num_states"]), int(header["num_classes"]))
        if int(header["total_bytes"]) != len(data) or table_bytes(*sizes) != len(data) or not all(sizes):
            raise ConstraintError(
                f"constraint of {len(data)} bytes with {sizes[1]} states, {sizes[2]} classes, {sizes[0]} tokens; expected "
                f"{table_bytes(*sizes)} bytes; build it again"
            )
        return cls(data, *sizes)

    @property
    def class_of_token(self) -> npt.NDArray[np.uint16]:
        return np.frombuffer(self.data, np.uint16, self.vocab_size, abi.CONSTRAINT_HEADER.itemsize)

    @property
    def next_states(self) -> npt.NDArray[np.uint16]:
        """[num_states, num_classes], NO_STATE where a class is not allowed."""
        begin = abi.CONSTRAINT_HEADER.itemsize + _padded_class_bytes(self.vocab_size)
        return np.frombuffer(self.data, np.uint16, offset=begin).reshape(self.num_states, self.num_classes)

    def next_state(self, state: int, token: int) -> int | None:
        """None: the state does not allow the token."""
        found = int(self.next_states[state, self.class_of_token[token]])
        return None if found == abi.NO_STATE else found

    def allowed_tokens(self, state: int) -> npt.NDArray[np.int64]:
        """[n] token ids, rising."""
        return np.flatnonzero(self.next_states[state][self.class_of_token] != abi.NO_STATE)


def table_bytes(vocab_size: int, num_states: int, num_classes: int) -> int:
    return abi.CONSTRAINT_HEADER.itemsize + _padded_class_bytes(vocab_size) + 2 * num_states * num_classes


def build_constraint_table(
    vocab_size: int,
    rows: Sequence[Row],
    *,
    max_bytes: int,
    accepting: Collection[int] = (),
    eos_ids: Collection[int] = (),
) -> ConstraintTable:
    """rows[state] says what the state allows; state 0 is where a request begins unless it says otherwise.

    eos_ids are allowed in the accepting states on top of their rows, and lead back to the same state. A state that allows nothing is
    refused: a request that gets there could not go on.
    """
    if not rows or len(rows) > MOST_STATES:
        raise ConstraintTooLargeError(
            f"the constraint has {len(rows)} states; expected 1 to {MOST_STATES}; bound its repetitions and lengths, or split it"
        )
    edges = [_edges_of(row, state, vocab_size, len(rows)) for state, row in enumerate(rows)]
    eos = np.array(sorted(set(eos_ids)), dtype=np.int64)
    if eos.size and not 0 <= int(eos[0]) <= int(eos[-1]) < vocab_size:
        raise ConstraintError(f"eos_ids are {eos.tolist()}; expected ids below {vocab_size}; pass those of the model")
    for state in accepting:
        tokens, next_states = edges[state]
        keep = ~np.isin(tokens, eos)
        edges[state] = (
            np.concatenate([tokens[keep], eos]),
            np.concatenate([next_states[keep], np.full(eos.size, state, dtype=np.int64)]),
        )
    stuck = [state for state, (tokens, _) in enumerate(edges) if tokens.size == 0]
    if stuck:
        raise ConstraintError(
            f"states {stuck[:5]} of the constraint allow no token; expected a way on, or EOS, from each; "
            "no text of this vocabulary satisfies the constraint there: change it"
        )
    for attempt in range(_MOST_ATTEMPTS):
        table = _try_build(vocab_size, edges, max_bytes, attempt)
        if table is not None:
            return table
    raise ConstraintError(f"tokens collided in {_MOST_ATTEMPTS} hash attempts; expected none to; this is a bug")


def _padded_class_bytes(vocab_size: int) -> int:
    return (2 * vocab_size + 3) // 4 * 4


def _edges_of(row: Row, state: int, vocab_size: int, num_states: int) -> tuple[Integers, Integers]:
    if isinstance(row, Mapping):
        tokens = np.fromiter(row.keys(), dtype=np.int64, count=len(row))
        next_states = np.fromiter(row.values(), dtype=np.int64, count=len(row))
    else:
        tokens, next_states = (np.asarray(column, dtype=np.int64) for column in row)
        if tokens.shape != next_states.shape or tokens.ndim != 1 or np.unique(tokens).size != tokens.size:
            raise ConstraintError(
                f"state {state} has {tokens.shape} tokens and {next_states.shape} next states; expected two flat arrays of equal "
                "length with each token once; correct the row"
            )
    for what, values, limit in (("token", tokens, vocab_size), ("next state", next_states, num_states)):
        if values.size and (int(values.min()) < 0 or int(values.max()) >= limit):
            wrong = int(values.min()) if int(values.min()) < 0 else int(values.max())
            raise ConstraintError(f"state {state} names {what} {wrong}; expected 0 to {limit - 1}; correct the row")
    return tokens, next_states


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finisher of splitmix64: equal in, equal out, and sums of it collide by chance alone."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _try_build(
    vocab_size: int, edges: Sequence[tuple[Integers, Integers]], max_bytes: int, attempt: int
) -> ConstraintTable | None:
    """Groups tokens by a hash of all their (state, next state), then checks that each group is one: None where chance put two together."""
    signature = np.zeros(vocab_size, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for state, (tokens, next_states) in enumerate(edges):
            key = np.uint64(((attempt << 20) + state + 1) << 32)
            signature[tokens] += _mix((key | next_states.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15))
    _, class_of_token, class_sizes = np.unique(signature, return_inverse=True, return_counts=True)
    num_classes = class_sizes.size
    total_bytes = table_bytes(vocab_size, len(edges), num_classes)
    if num_classes > MOST_CLASSES or total_bytes > max_bytes:
        raise ConstraintTooLargeError(
            f"the constraint has {len(edges)} states and {num_classes} classes of tokens, {total_bytes} bytes; expected at most "
            f"{max_bytes} bytes and {MOST_CLASSES} classes; bound its lengths and repetitions, or start the engine with larger slots"
        )
    table = np.full((len(edges), num_classes), abi.NO_STATE, dtype=np.uint16)
    for state, (tokens, next_states) in enumerate(edges):
        classes = class_of_token[tokens]
        table[state, classes] = next_states
        allowed = table[state] != abi.NO_STATE
        if (table[state, classes] != next_states).any() or int(class_sizes[allowed].sum()) != tokens.size:
            return None
    header = np.zeros(1, dtype=abi.CONSTRAINT_HEADER)
    header["total_bytes"], header["vocab_size"] = total_bytes, vocab_size
    header["num_states"], header["num_classes"] = len(edges), num_classes
    classes_data = class_of_token.astype(np.uint16).tobytes().ljust(_padded_class_bytes(vocab_size), b"\0")
    data = header.tobytes() + classes_data + table.tobytes()
    return ConstraintTable(data, vocab_size, len(edges), num_classes)
