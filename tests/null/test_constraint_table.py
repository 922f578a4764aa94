"""nic_shim/constraint_table.py: the table says what the rows said, whatever they are; what does not fit is refused by name.

Run: pytest tests/null/test_constraint_table.py
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blinkimp import ring_abi as abi
from blinkimp.nic_shim.constraint_table import (
    ConstraintError,
    ConstraintTable,
    ConstraintTooLargeError,
    build_constraint_table,
    table_bytes,
)

PLENTY = 1 << 24


@st.composite
def automata(draw: st.DrawFn) -> tuple[int, list[dict[int, int]]]:
    vocab_size = draw(st.integers(1, 60))
    num_states = draw(st.integers(1, 8))
    edges = st.dictionaries(st.integers(0, vocab_size - 1), st.integers(0, num_states - 1), min_size=1)
    return vocab_size, draw(st.lists(edges, min_size=num_states, max_size=num_states))


@settings(max_examples=300, deadline=None)
@given(automata())
def test_table_says_what_the_rows_said(automaton: tuple[int, list[dict[int, int]]]) -> None:
    vocab_size, rows = automaton
    table = build_constraint_table(vocab_size, rows, max_bytes=PLENTY)
    for state, row in enumerate(rows):
        assert {token: table.next_state(state, token) for token in range(vocab_size)} == {
            token: row.get(token) for token in range(vocab_size)
        }
        assert table.allowed_tokens(state).tolist() == sorted(row)
    columns = {tuple(row.get(token) for row in rows) for token in range(vocab_size)}
    assert table.num_classes == len(columns), "tokens that no state tells apart share a class"
    assert ConstraintTable.parse(table.data) == table
    assert len(table.data) == table_bytes(vocab_size, len(rows), table.num_classes)


def test_bytes_are_those_of_the_header_comment() -> None:
    table = build_constraint_table(3, [{0: 1, 1: 1}, {2: 0}], max_bytes=PLENTY)
    words = np.frombuffer(table.data[:16], np.uint32).tolist()
    assert words == [len(table.data), 3, 2, 2]
    classes = np.frombuffer(table.data[16:22], np.uint16)
    assert classes[0] == classes[1] != classes[2]
    next_state = np.frombuffer(table.data[24:], np.uint16).reshape(2, 2)  # 6 bytes of classes are padded to 8
    assert next_state[0, classes[0]] == 1 and next_state[0, classes[2]] == abi.NO_STATE
    assert next_state[1, classes[2]] == 0 and next_state[1, classes[0]] == abi.NO_STATE


def test_arrays_are_rows_too() -> None:
    rows = [{4: 1, 2: 0}, {0: 0}]
    arrays = [(np.array([2, 4]), np.array([0, 1])), (np.array([0]), np.array([0]))]
    assert build_constraint_table(5, rows, max_bytes=PLENTY) == build_constraint_table(5, arrays, max_bytes=PLENTY)


def test_eos_is_allowed_where_the_automaton_accepts() -> None:
    table = build_constraint_table(6, [{1: 1}, {}], max_bytes=PLENTY, accepting={1}, eos_ids=(5, 4))
    assert table.allowed_tokens(0).tolist() == [1]
    assert table.allowed_tokens(1).tolist() == [4, 5] and table.next_state(1, 5) == 1


def test_many_states_over_a_large_vocabulary_stay_small() -> None:
    rng = np.random.default_rng(3)
    vocab_size, num_states = 128_256, 200
    kinds = [np.sort(rng.choice(vocab_size, 40_000, replace=False)) for _ in range(6)]
    rows = [
        (kind := kinds[state % 6], np.full(kind.size, (state + 1) % num_states, dtype=np.int64))
        for state in range(num_states)
    ]
    table = build_constraint_table(vocab_size, rows, max_bytes=1 << 20)
    assert table.num_classes <= 64
    assert np.array_equal(table.allowed_tokens(7), kinds[1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{0: 0}, {}], r"states \[1\] of the constraint allow no token"),
        ([{9: 0}], "state 0 names token 9; expected 0 to 7"),
        ([{0: 1}], "state 0 names next state 1; expected 0 to 0"),
        ([{0: -1}], "state 0 names next state -1"),
        ([(np.array([1, 1]), np.array([0, 0]))], "each token once"),
    ],
)
def test_bad_rows_are_refused_by_name(rows: list[dict[int, int]], message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        build_constraint_table(8, rows, max_bytes=PLENTY)


def test_what_does_not_fit_is_refused_with_its_size() -> None:
    rows = [{token: token % 50 for token in range(state, 100)} for state in range(50)]
    size = len(build_constraint_table(100, rows, max_bytes=PLENTY).data)
    assert len(build_constraint_table(100, rows, max_bytes=size).data) == size
    with pytest.raises(ConstraintTooLargeError, match=f"{size} bytes; expected at most {size - 1} bytes"):
        build_constraint_table(100, rows, max_bytes=size - 1)
    with pytest.raises(ConstraintTooLargeError, match="65536 states"):
        build_constraint_table(2, [{0: 0}] * 0x10000, max_bytes=PLENTY)


@pytest.mark.parametrize("damage", ["short", "longer", "states", "nothing"])
def test_damaged_table_is_not_parsed(damage: str) -> None:
    data = build_constraint_table(9, [{1: 0}], max_bytes=PLENTY).data
    words = np.frombuffer(data, np.uint8).copy()
    if damage == "states":
        words[:16].view(np.uint32)[2] = 7
    damaged = {"short": data[:-1], "longer": data + b"\0\0", "states": words.tobytes(), "nothing": b""}[damage]
    with pytest.raises(ConstraintError):
        ConstraintTable.parse(damaged)
