"""A director rig with the memory of the sampling op: biases, counts, constraint slots, top logprobs.

Used by tests/host/test_director_sampling.py, tools/fuzz_ring.py.
"""

from __future__ import annotations

import numpy as np

from blinkimp import ring_abi as abi
from blinkimp.host.sampling_memory import sampling_table_bytes
from tests.host.director_rig import VOCAB, Rig
from tests.host.py_ingress import address_of

SLOT_BYTES = 4096
NUM_SLOTS = 3


class SamplingRig(Rig):
    """A rig with the memory that the sampling op has in a real engine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        params = self.params[0]
        params["num_constraint_slots"], params["constraint_slot_bytes"] = NUM_SLOTS, SLOT_BYTES

        class Sizes:
            num_queue_pairs, num_requests = self.shape.num_queue_pairs, self.shape.num_requests
            max_batch = self.shape.max_batch
            num_constraint_slots, constraint_slot_bytes = NUM_SLOTS, SLOT_BYTES

        self.tables = {name: np.zeros(n, np.uint8) for name, n in sampling_table_bytes(Sizes(), VOCAB).items()}
        for name, table in self.tables.items():
            params[name] = address_of(table)
        # What the sampling op would leave: a rank's token and logprob say where they come from.
        top = self.tables["top_logprobs"][: 2 * self.shape.max_batch * abi.MAX_TOP_LOGPROBS * 8].view(abi.SAMPLE_RESULT)
        self.top = top.reshape(2, self.shape.max_batch, abi.MAX_TOP_LOGPROBS)
        self.top["token"] = np.arange(abi.MAX_TOP_LOGPROBS)
        self.top["logprob"] = -np.arange(abi.MAX_TOP_LOGPROBS)
