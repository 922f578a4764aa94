"""What device/ring_abi.h says of a submission: an answer for each entry, whatever its bytes are, written without a look at intake.cuh.

An entry that is wrong in several ways may be rejected for any of them, so an answer holds all reasons that fit. Bytes are judged when the
entry is written: the caller gives them to nobody else before the director has taken them.
Used by tests/host/ring_fuzzer.py. Test: pytest tests/host/test_fuzz_ring.py
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blinkimp import ring_abi as abi

WORD_BYTES = 4
LARGEST = float(np.finfo(np.float32).max)
BODY_RESERVED = tuple(name for name in abi.REQUEST_BODY.names or () if name.startswith("reserved"))
CLEAN_COMMIT_BITS = abi.COMMIT_PARITY_MASK | 0xFF << abi.COMMIT_KIND_SHIFT


@dataclass(frozen=True)
class EngineLimits:
    """What entries are measured against."""

    arena_bytes: int
    num_completions: int
    vocab: int
    max_context: int
    num_pages: int
    num_constraint_slots: int
    constraint_slot_bytes: int


class Answer(NamedTuple):
    """What comes back for an entry: kind `none`, `pong`, `ack`, `reject`, or `either` of the last two."""

    kind: str
    request_id: int = 0
    reasons: frozenset[int] = frozenset()


NOTHING = Answer("none")


@dataclass
class _Slot:
    """Bytes of a constraint slot, and how many of them came in order."""

    data: bytearray
    loaded_bytes: int = 0


@dataclass
class IntakeOracle:
    """The reader's state: what is free of the arena, what the constraint slots hold. Entries must be judged in the order of the ring."""

    limits: EngineLimits
    epoch: int
    arena_consumer_pos: int
    arena: npt.NDArray[np.uint8]
    _slots: list[_Slot] = field(init=False)

    def __post_init__(self) -> None:
        self._slots = [
            _Slot(bytearray(self.limits.constraint_slot_bytes)) for _ in range(self.limits.num_constraint_slots)
        ]

    def judge(self, entry: np.void, maybe_live: Container[int]) -> Answer:
        """maybe_live: ids of requests that may not have ended when the director comes to this entry."""
        commit = int(entry["commit"])
        op = commit >> abi.COMMIT_KIND_SHIFT & 0xFF
        is_clean = commit & ~CLEAN_COMMIT_BITS == 0
        request_id = int(entry["request_id"])
        if int(entry["epoch"]) != self.epoch & 0xFFFFFFFF:
            return NOTHING
        if is_clean and op == abi.SUBMISSION_CANCEL:
            return NOTHING
        if is_clean and op == abi.SUBMISSION_CONSTRAINT:
            self._take_piece(entry)
            return NOTHING
        if is_clean and op == abi.SUBMISSION_PING:
            return Answer("pong", request_id)
        body = self._body(entry, abi.REQUEST_BODY.itemsize) if op == abi.SUBMISSION_REQUEST else None
        reasons = self._header_reasons(entry)
        if not is_clean or body is None or len(body) % WORD_BYTES != 0:
            reasons.add(abi.REJECT_MALFORMED)
        else:
            reasons |= self._body_reasons(entry, body)
        if body is not None:
            self.arena_consumer_pos = int(entry["arena_pos"]) + len(body)
        is_duplicate = request_id in maybe_live
        if is_duplicate:
            reasons.add(abi.REJECT_DUPLICATE)
        if not reasons:
            return Answer("ack", request_id)
        is_sure = reasons != {abi.REJECT_DUPLICATE}
        return Answer("reject" if is_sure else "either", request_id, frozenset(reasons))

    # ---- Arena -----------------------------------------------------------------------------------------------------
    def _body(self, entry: np.void, least_bytes: int) -> npt.NDArray[np.uint8] | None:
        """The body, if it lies in the window of the arena that is not free yet, in one piece, aligned."""
        pos, body_bytes, arena_bytes = int(entry["arena_pos"]), int(entry["body_bytes"]), self.limits.arena_bytes
        is_inside = self.arena_consumer_pos <= pos and pos + body_bytes <= self.arena_consumer_pos + arena_bytes
        offset = pos % arena_bytes
        if (
            pos % abi.ARENA_ALIGN_BYTES
            or body_bytes < least_bytes
            or not is_inside
            or offset + body_bytes > arena_bytes
        ):
            return None
        return self.arena[offset : offset + body_bytes]

    # ---- Requests --------------------------------------------------------------------------------------------------
    def _header_reasons(self, entry: np.void) -> set[int]:
        num_prompt, max_tokens = int(entry["num_prompt_tokens"]), int(entry["max_tokens"])
        num_pages = -(-(num_prompt + max_tokens) // abi.PAGE_TOKENS)
        reasons = set()
        if num_prompt == 0:
            reasons.add(abi.REJECT_PROMPT_EMPTY)
        if max_tokens == 0:
            reasons.add(abi.REJECT_BAD_SAMPLING)
        if num_prompt + max_tokens > self.limits.max_context or num_pages > self.limits.num_pages:
            reasons.add(abi.REJECT_TOO_LONG)
        return reasons

    def _body_reasons(self, entry: np.void, raw: npt.NDArray[np.uint8]) -> set[int]:
        body = np.frombuffer(raw[: abi.REQUEST_BODY.itemsize].tobytes(), abi.REQUEST_BODY)[0]
        sampling = body["sampling"]
        num_stop, num_bias, num_prompt = (
            int(body["num_stop_ids"]),
            int(sampling["num_logit_bias"]),
            int(entry["num_prompt_tokens"]),
        )
        words = np.frombuffer(raw[abi.REQUEST_BODY.itemsize :].tobytes(), np.uint32)
        if (
            num_stop > abi.MAX_STOP_IDS
            or num_bias > abi.MAX_LOGIT_BIAS
            or num_stop + 2 * num_bias + num_prompt != len(words)
        ):
            return {abi.REJECT_MALFORMED}  # nothing behind the body means anything
        reasons = set()
        if int(body["num_prior_outputs"]) > num_prompt or int(body["flags"]) & ~abi.REQUEST_NO_PREFIX_CACHE:
            reasons.add(abi.REJECT_MALFORMED)
        if any(int(body[name]) for name in BODY_RESERVED) or int(sampling["reserved0"]) or int(sampling["reserved1"]):
            reasons.add(abi.REJECT_MALFORMED)
        pairs = words[num_stop : num_stop + 2 * num_bias].reshape(-1, 2)
        if not self._is_good_sampling(sampling) or not np.isfinite(pairs[:, 1].copy().view(np.float32)).all():
            reasons.add(abi.REJECT_BAD_SAMPLING)
        ids = np.concatenate([words[:num_stop], pairs[:, 0], words[num_stop + 2 * num_bias :]])
        if (ids >= self.limits.vocab).any():
            reasons.add(abi.REJECT_BAD_TOKEN)
        constraint = int(body["constraint"])
        if constraint and int(body["constraint_state"]) >= self._num_states(constraint):
            reasons.add(abi.REJECT_BAD_CONSTRAINT)
        return reasons

    def _is_good_sampling(self, sampling: Any) -> bool:
        def between(name: str, least: float, most: float) -> bool:
            value = float(sampling[name])
            return not math.isnan(value) and least <= value <= most

        most_top = min(abi.MAX_TOP_LOGPROBS, self.limits.num_completions - 2)
        return (
            between("temperature", 0.0, LARGEST)
            and between("top_p", 0.0, 1.0)
            and float(sampling["top_p"]) > 0.0
            and between("min_p", 0.0, 1.0)
            and int(sampling["ignore_eos"]) <= 1
            and between("repetition_penalty", 0.0, LARGEST)
            and between("presence_penalty", -2.0, 2.0)
            and between("frequency_penalty", -2.0, 2.0)
            and int(sampling["num_top_logprobs"]) <= most_top
        )

    # ---- Constraints -----------------------------------------------------------------------------------------------
    def _take_piece(self, entry: np.void) -> None:
        slot_idx, offset = int(entry["request_id"]), int(entry["client_ns"])
        piece = self._body(entry, 1)
        if piece is not None:
            self.arena_consumer_pos = int(entry["arena_pos"]) + len(piece)
        if slot_idx >= len(self._slots):
            return
        slot = self._slots[slot_idx]
        others = ("num_prompt_tokens", "max_tokens", "priority", "timeout_ns", "cache_salt")
        is_next = offset == 0 or (offset == slot.loaded_bytes and offset % 16 == 0)
        if (
            piece is None
            or not is_next
            or any(int(entry[name]) for name in others)
            or offset + len(piece) > len(slot.data)
        ):
            slot.loaded_bytes = 0
            return
        slot.data[offset : offset + len(piece)] = piece.tobytes()
        slot.loaded_bytes = offset + len(piece)

    def _num_states(self, constraint: int) -> int:
        """Of the automaton in the slot that `constraint` names (slot + 1); 0 where there is none that is well-formed."""
        if constraint > len(self._slots):
            return 0
        slot = self._slots[constraint - 1]
        if slot.loaded_bytes < abi.CONSTRAINT_HEADER.itemsize:
            return 0
        header = np.frombuffer(bytes(slot.data[: abi.CONSTRAINT_HEADER.itemsize]), abi.CONSTRAINT_HEADER)[0]
        total_bytes, vocab, num_states, num_classes = (int(header[name]) for name in abi.CONSTRAINT_HEADER.names or ())
        class_bytes = -(-2 * vocab // 4) * 4
        is_good = (
            vocab == self.limits.vocab
            and 1 <= num_states <= abi.NO_STATE
            and 1 <= num_classes <= 1 << 16
            and total_bytes == slot.loaded_bytes
            and abi.CONSTRAINT_HEADER.itemsize + class_bytes + 2 * num_states * num_classes == total_bytes
        )
        return num_states if is_good else 0
