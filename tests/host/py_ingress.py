"""The ingress end of one queue pair in Python, for tests that call the director step by step in the same thread.

It may misbehave on purpose: malformed entries, no reading, no heartbeat. The real one is nic_shim/queue_pair.py.
Used by tests/host/director_rig.py and the tests on top of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from blinkimp import ring_abi as abi


class Completion(NamedTuple):
    kind: int
    reason: int
    token: int
    request_id: int
    output_idx: int


def address_of(array: np.ndarray[Any, Any]) -> int:
    return int(array.ctypes.data)


class PyIngress:
    """The ingress end of one queue pair. Whatever it does wrong it does because a test asks for it."""

    def __init__(self, queue_pair_idx: int, num_submissions: int, num_completions: int, arena_bytes: int) -> None:
        self.num_submissions, self.num_completions, self.arena_bytes = num_submissions, num_completions, arena_bytes
        submissions_offset = abi.QUEUE_PAIR.itemsize
        completions_offset = submissions_offset + num_submissions * abi.SUBMISSION_ENTRY.itemsize
        arena_offset = (completions_offset + num_completions * abi.COMPLETION_ENTRY.itemsize + 63) // 64 * 64
        region_bytes = arena_offset + arena_bytes
        self.memory = np.zeros(region_bytes + 128, np.uint8)
        start = -address_of(self.memory) % 128
        self.region = self.memory[start : start + region_bytes]
        self.words = self.region[: abi.QUEUE_PAIR.itemsize].view(abi.QUEUE_PAIR)[0]
        self.submissions = self.region[submissions_offset:completions_offset].view(abi.SUBMISSION_ENTRY)
        completions_end = completions_offset + num_completions * abi.COMPLETION_ENTRY.itemsize
        self.completions = self.region[completions_offset:completions_end].view(abi.COMPLETION_ENTRY)
        self.arena = self.region[arena_offset:]
        header = self.words["header"]
        header["magic"] = abi.QUEUE_PAIR_MAGIC
        header["abi_version"] = abi.ABI_VERSION
        header["header_bytes"] = abi.QUEUE_PAIR.itemsize
        header["region_bytes"] = region_bytes
        header["submission_entry_bytes"] = abi.SUBMISSION_ENTRY.itemsize
        header["num_submissions"] = num_submissions
        header["completion_entry_bytes"] = abi.COMPLETION_ENTRY.itemsize
        header["num_completions"] = num_completions
        header["arena_bytes"] = arena_bytes
        header["submissions_offset"] = submissions_offset
        header["completions_offset"] = completions_offset
        header["arena_offset"] = arena_offset
        header["queue_pair_idx"] = queue_pair_idx
        self.num_cached_tokens: dict[int, int] = {}  # by request id, as its last FINISH said
        self.epoch = 0
        self.producer_pos = 0
        self.arena_pos = 0
        self.consumer_pos = 0

    # ---- Attach --------------------------------------------------------------------------------------------------
    def ask_attach(self) -> None:
        asked, answered = int(self.words["ingress"]["epoch"]), int(self.words["director"]["epoch"])
        self.epoch = ((asked if 0 <= asked - answered < abi.MOST_EPOCHS_AHEAD else answered) + 1) | 1
        self.words["ingress"]["epoch"] = self.epoch
        self.beat()

    def finish_attach(self) -> bool:
        director = self.words["director"]
        if int(director["epoch"]) != self.epoch:
            return False
        self.producer_pos = int(director["submission_consumer_pos"])
        self.arena_pos = (int(director["arena_consumer_pos"]) + 63) // 64 * 64
        self.consumer_pos = int(director["completion_producer_pos"])
        self.words["ingress"]["completion_consumer_pos"] = self.consumer_pos
        return True

    def detach(self) -> None:
        self.words["ingress"]["epoch"] = self.epoch + 1

    def beat(self) -> None:
        self.words["ingress"]["heartbeat_ns"] += 1

    @property
    def is_attached(self) -> bool:
        return self.epoch % 2 == 1 and int(self.words["director"]["epoch"]) == self.epoch

    # ---- Submissions ---------------------------------------------------------------------------------------------
    def num_free_entries(self) -> int:
        return self.num_submissions - (self.producer_pos - int(self.words["director"]["submission_consumer_pos"]))

    def write_entry(self, op: int, request_id: int, commit_bits: int = 0, **words: int) -> None:
        """One committed entry, as it is asked for; the caller has looked for room."""
        entry = np.zeros(1, abi.SUBMISSION_ENTRY)[0]
        entry["epoch"] = self.epoch & 0xFFFFFFFF
        entry["request_id"] = request_id
        for name, value in words.items():
            entry[name] = value
        even_lap = self.producer_pos // self.num_submissions % 2 == 0
        entry["commit"] = int(even_lap) | op << abi.COMMIT_KIND_SHIFT | commit_bits
        self.submissions[self.producer_pos % self.num_submissions] = entry
        self.producer_pos += 1

    def claim_arena(self, body_bytes: int) -> int | None:
        """Position of a free, aligned, unbroken piece of the arena."""
        claimed = (body_bytes + 63) // 64 * 64
        pos = self.arena_pos
        if pos % self.arena_bytes + claimed > self.arena_bytes:
            pos += self.arena_bytes - pos % self.arena_bytes
        if pos + claimed - int(self.words["director"]["arena_consumer_pos"]) > self.arena_bytes:
            return None
        self.arena_pos = pos + claimed
        return pos

    def write_body(
        self,
        pos: int,
        prompt: Sequence[int],
        stop_ids: Sequence[int] = (),
        sampling: dict[str, Any] | None = None,
        **words: int,
    ) -> int:
        """Returns body_bytes."""
        body = np.zeros(1, abi.REQUEST_BODY)
        body[0]["sampling"]["top_p"] = 1.0
        for name, value in (sampling or {}).items():
            body[0]["sampling"][name] = value
        body[0]["num_stop_ids"] = len(stop_ids)
        for name, value in words.items():
            body[0][name] = value
        ids = np.array([*stop_ids, *prompt], np.uint32)
        raw = body.tobytes() + ids.tobytes()
        offset = pos % self.arena_bytes
        self.arena[offset : offset + len(raw)] = np.frombuffer(raw, np.uint8)
        return len(raw)

    def submit(
        self,
        request_id: int,
        prompt: Sequence[int],
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        sampling: dict[str, Any] | None = None,
        body: dict[str, int] | None = None,
        **entry: int,
    ) -> bool:
        """False: no entry or no arena bytes are free."""
        body_bytes = abi.REQUEST_BODY.itemsize + 4 * (len(stop_ids) + len(prompt))
        if self.num_free_entries() == 0 or (pos := self.claim_arena(body_bytes)) is None:
            return False
        self.write_body(pos, prompt, stop_ids, sampling, **(body or {}))
        words = {
            "arena_pos": pos, "body_bytes": body_bytes, "num_prompt_tokens": len(prompt), "max_tokens": max_tokens, **entry
        }  # fmt: skip
        self.write_entry(abi.SUBMISSION_REQUEST, request_id, **words)
        return True

    # ---- Completions ---------------------------------------------------------------------------------------------
    def read(self, max_entries: int | None = None) -> list[Completion]:
        found: list[Completion] = []
        while max_entries is None or len(found) < max_entries:
            entry = self.completions[self.consumer_pos % self.num_completions]
            commit = int(entry["commit"])
            if commit & abi.COMMIT_PARITY_MASK != int(self.consumer_pos // self.num_completions % 2 == 0):
                break
            kind, reason = commit >> abi.COMMIT_KIND_SHIFT & 0xFF, commit >> abi.COMMIT_REASON_SHIFT & 0xFF
            assert commit >> 24 == 0 and commit & 0xFE == 0, hex(commit)
            found.append(Completion(kind, reason, int(entry["token"]), int(entry["request_id"]), int(entry["index"])))
            if kind == abi.COMPLETION_FINISH:
                self.num_cached_tokens[int(entry["request_id"])] = int(entry["logprob"])
            self.consumer_pos += 1
        self.words["ingress"]["completion_consumer_pos"] = self.consumer_pos
        return found
