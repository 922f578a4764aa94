"""The process that compiles constraints: it may take all the time and memory of its limits, and be killed, without harm to a stream.

    python -m blinkimp.nic_shim.constraint_worker TOKENIZER VOCAB_SIZE EOS_ID,EOS_ID MAX_BYTES

Started by nic_shim/constraint_compiler.py. Over stdin and stdout: a u32 length and that many bytes of msgpack, a Constraint in, a
Compiled out; a length of 0 at the start says that it is ready. Test: pytest tests/host/test_constraints.py
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
from typing import BinaryIO, Final

import msgspec

from blinkimp.nic_shim.byte_automaton import DEAD, PatternError, byte_automaton
from blinkimp.nic_shim.constraint_table import ConstraintError, ConstraintTable, ConstraintTooLargeError
from blinkimp.nic_shim.json_schema_regex import SchemaError, escaped, schema_regex
from blinkimp.nic_shim.token_automaton import TokenTrie, deepest_json_object, token_table
from blinkimp.nic_shim.tokenizer import Tokenizer
from blinkimp.protocol import Constraint

MEMORY_BYTES: Final = 6 << 30  # address space
MOST_SECONDS: Final = 60  # of one compilation; the ingress gives up long before
JSON_DEPTH: Final = 6  # of json_object at most; less where the slot is small
LENGTH: Final = struct.Struct("<I")


class Compiled(msgspec.Struct):
    """The answer: a table, or what is wrong (code: an ErrorCode)."""

    table: bytes = b""
    code: str = ""
    problem: str = ""


class Compiler:
    """Constraints of one model."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: list[int], max_bytes: int) -> None:
        names = tokenizer.token_bytes
        self._trie = TokenTrie({token: text for token in range(vocab_size) if (text := names.of(token))})
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._max_bytes = max_bytes

    def compile(self, constraint: Constraint) -> Compiled:
        try:
            return Compiled(self._table(constraint).data)
        except ConstraintTooLargeError as error:
            return Compiled(code="constraint_too_large", problem=str(error))
        except (SchemaError, PatternError, ConstraintError) as error:
            return Compiled(code="bad_constraint", problem=str(error))
        except (MemoryError, RecursionError) as error:
            return Compiled(
                code="constraint_too_large", problem=f"compiling it takes too much memory ({type(error).__name__})"
            )

    def _table(self, constraint: Constraint) -> ConstraintTable:
        if constraint.kind == "json_object":
            return deepest_json_object(self._trie, self._vocab_size, self._eos_ids, self._max_bytes, JSON_DEPTH)
        if isinstance(constraint.value, list):
            regex = "(" + "|".join(escaped(choice) for choice in constraint.value) + ")"
        elif constraint.kind == "json_schema":
            try:
                schema = json.loads(constraint.value)
            except ValueError as error:
                raise SchemaError(f"the schema is not JSON: {error}") from None
            regex = schema_regex(schema, _is_safe_pattern)
        else:
            regex = constraint.value
        return token_table(byte_automaton(regex), self._trie, self._vocab_size, self._eos_ids, self._max_bytes)


def _is_safe_pattern(regex: str) -> bool:
    """Whether no text that matches holds what JSON strings must escape."""
    escapes = [*range(0x20), ord('"'), ord("\\")]
    return bool((byte_automaton(regex).next_state[:, escapes] == DEAD).all())


def read_exactly(stream: BinaryIO, num_bytes: int) -> bytes:
    data = stream.read(num_bytes)
    if len(data) != num_bytes:
        raise EOFError
    return data


def main() -> int:
    tokenizer, vocab_size, eos_ids, max_bytes = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    compiler = Compiler(
        Tokenizer(tokenizer), int(vocab_size), [int(token) for token in eos_ids.split(",")], int(max_bytes)
    )
    sys.stdout.buffer.write(LENGTH.pack(0))  # ready
    sys.stdout.buffer.flush()
    while True:
        try:
            (num_bytes,) = LENGTH.unpack(read_exactly(sys.stdin.buffer, LENGTH.size))
            request = msgspec.msgpack.decode(read_exactly(sys.stdin.buffer, num_bytes), type=Constraint)
        except EOFError:  # the ingress has ended
            return 0
        signal.alarm(MOST_SECONDS)  # where the ingress was killed and nobody else stops this
        answer = msgspec.msgpack.encode(compiler.compile(request))
        signal.alarm(0)
        sys.stdout.buffer.write(LENGTH.pack(len(answer)) + answer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
