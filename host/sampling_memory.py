"""Memory of the sampling op beside the logits: biases, penalties' counts, constraint slots, top logprobs.

Layouts: device/program_abi.h, device/penalties.cuh, device/constraint.cuh, device/sample_op.cuh. All of it starts zeroed.
Called by host/memory_plan.py (how much), host/gpu_memory.py and host/emulated_process.py (allocation).
Test: pytest tests/null/test_memory_plan.py
"""

from __future__ import annotations

from typing import Final, Protocol

from blinkimp import ring_abi as abi

COUNTS_TAG_BYTES: Final = 16  # CountsTag
COUNTS_ALIGN_TOKENS: Final = 64
SAMPLE_SPLIT_BYTES: Final = 16  # SampleSplit
CONSTRAINT_ALIGN_BYTES: Final = 64
# Of a slot: the states of its automaton; the classes of the vocabulary come on top.
CONSTRAINT_TABLE_BYTES: Final = {"gpu": 4 << 20, "emulated": 1 << 20}


class SamplingSizes(Protocol):
    """The counts that matter here, of EngineSizes."""

    @property
    def num_queue_pairs(self) -> int: ...
    @property
    def num_requests(self) -> int: ...
    @property
    def max_batch(self) -> int: ...
    @property
    def num_constraint_slots(self) -> int: ...
    @property
    def constraint_slot_bytes(self) -> int: ...


def constraint_slot_bytes_of(asked_bytes: int, kind: str, vocab: int) -> int:
    """Bytes of a slot: what was asked for, or room for the vocabulary's classes and a table of the usual size; aligned."""
    num_bytes = asked_bytes or abi.CONSTRAINT_HEADER.itemsize + 2 * vocab + CONSTRAINT_TABLE_BYTES[kind]
    return -(-num_bytes // CONSTRAINT_ALIGN_BYTES) * CONSTRAINT_ALIGN_BYTES


def sampling_table_bytes(sizes: SamplingSizes, vocab: int) -> dict[str, int]:
    """Bytes of each address in EngineParams that is for sampling, by its name; a name that is missing stays 0."""
    counts_stride = -(-vocab // COUNTS_ALIGN_TOKENS) * COUNTS_ALIGN_TOKENS
    num_slots = sizes.num_queue_pairs * sizes.num_constraint_slots
    alternatives = 2 * sizes.max_batch * abi.MAX_TOP_LOGPROBS * abi.SAMPLE_RESULT.itemsize
    tables = {
        "logit_biases": sizes.num_requests * abi.MAX_LOGIT_BIAS * abi.LOGIT_BIAS.itemsize,
        "token_counts": sizes.max_batch * (COUNTS_TAG_BYTES + 2 * counts_stride),
        "top_logprobs": alternatives + sizes.max_batch * SAMPLE_SPLIT_BYTES,
    }
    if num_slots:
        tables["constraints"] = num_slots * (sizes.constraint_slot_bytes + 8)
    return tables
