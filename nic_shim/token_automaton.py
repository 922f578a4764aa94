"""From a byte automaton (nic_shim/byte_automaton.py) to a token automaton in the bytes of device/ring_abi.h (ConstraintHeader).

Every token walks from every state at once, level by level of the trie of all tokens, in numpy: the cost is trie nodes x states gathers, whatever
the language. Tokens that no state tells apart get one class.
Called by nic_shim/constraint_worker.py. Test: pytest tests/null/test_token_automaton.py

Invariants
I1  Each token that a state allows leads to a state from which the end can be reached by tokens.
I2  EOS is allowed exactly where the text so far is complete, and leads back to the same state.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from blinkimp import ring_abi as abi
from blinkimp.nic_shim.byte_automaton import DEAD, U16, ByteAutomaton, PatternError, json_object_automaton
from blinkimp.nic_shim.constraint_table import ConstraintTable, ConstraintTooLargeError, table_bytes

STATES_PER_PASS: Final = 256  # bounds the memory of a walk


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
