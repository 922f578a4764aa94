"""Right, half-right and wrong submissions for one queue pair, and the check that each gets the answer that ring_abi.h promises.

A fuzzer writes to a ring, reads what comes back, and fails on the first answer that the oracle did not foresee: REJECT without a fitting
reason, a good request that was refused, a token out of order. Used by tools/fuzz_ring.py; test: pytest tests/host/test_fuzz_ring.py
"""

from __future__ import annotations

import collections
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from blinkimp import ring_abi as abi
from blinkimp.nic_shim.constraint_table import build_constraint_table
from tests.host.intake_oracle import Answer, EngineLimits, IntakeOracle
from tests.host.py_ingress import PyIngress
from tests.host.wrong_values import WrongValues

ENTRY_WORDS = tuple(name for name in abi.SUBMISSION_ENTRY.names or () if name != "commit")
EPOCHS_WRONG = 0.02  # of the entries
LONG_TOKENS = 8  # a request that was accepted with more output than that is cancelled soon


class FuzzError(AssertionError):
    """The director's answer is not the one that was foreseen."""


@dataclass
class LiveRequest:
    """An accepted request whose FINISH has not come."""

    num_prior_outputs: int
    max_tokens: int
    num_top: int
    expected: list[int] | None  # the tokens of a good greedy request
    tokens: list[int] = field(default_factory=list)
    num_tops_missing: int = 0


@dataclass
class _Sent:
    """A request that was written and may be accepted."""

    num_prior_outputs: int
    max_tokens: int
    num_top: int
    expected: list[int] | None


class RingFuzzer:
    """Drives one queue pair. step() writes what there is room for; read() checks what came. `prompts`: good prompts, and what a greedy
    request of 4 tokens says to each (None: not known)."""

    def __init__(
        self,
        ingress: PyIngress,
        limits: EngineLimits,
        rng: random.Random,
        prompts: Sequence[tuple[list[int], list[int] | None]],
    ) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.num_entries = 0
        self._ingress = ingress
        self._limits = limits
        self._rng = rng
        self._values = WrongValues(rng)
        self._prompts = prompts
        self._oracle = IntakeOracle(limits, ingress.epoch, ingress.arena_pos, ingress.arena)
        self._awaited: collections.deque[Answer] = collections.deque()
        self._sent: dict[int, collections.deque[_Sent]] = {}  # by request id, in the order of the ring
        self._live: dict[int, LiveRequest] = {}
        self._to_cancel: collections.deque[int] = collections.deque()
        self._tables = list(self._constraint_tables())
        self._pieces: collections.deque[tuple[int, int, bytes]] = (
            collections.deque()
        )  # slot, offset, bytes: a table under way
        self._next_id = rng.getrandbits(40)

    @property
    def is_idle(self) -> bool:
        """Every entry was answered and every request has ended."""
        is_taken = int(self._ingress.words["director"]["submission_consumer_pos"]) == self._ingress.producer_pos
        return is_taken and not self._awaited and not self._live

    # ---- Writing ---------------------------------------------------------------------------------------------------
    def write(self, max_entries: int) -> int:
        """Entries of every kind, as many as there is room for. Returns how many."""
        num_written = 0
        while num_written < max_entries and self._ingress.num_free_entries() > 0:
            if not self._write_one():
                break
            num_written += 1
        self.num_entries += num_written
        return num_written

    def _write_one(self) -> bool:
        if self._to_cancel and self._rng.random() < 0.5:
            return self._commit(abi.SUBMISSION_CANCEL, {"request_id": self._to_cancel.popleft()}, 0)
        kind = self._rng.choices(("good", "bent", "noise", "cancel", "ping", "piece"), (30, 38, 8, 7, 4, 13))[0]
        writer: Any = getattr(self, f"_write_{kind}")
        return bool(writer())

    def _commit(self, op: int, words: dict[str, int], commit_bits: int, sent: _Sent | None = None) -> bool:
        """Writes and judges one entry; what it refers to in the arena is written already."""
        ingress = self._ingress
        even_lap = ingress.producer_pos // ingress.num_submissions % 2 == 0
        entry = np.zeros(1, abi.SUBMISSION_ENTRY)
        entry["epoch"] = ingress.epoch & 0xFFFFFFFF
        for name, value in words.items():
            bits = entry.dtype[name].itemsize * 8
            wrapped = value % (1 << bits)
            entry[name] = wrapped - (1 << bits) if name == "priority" and wrapped >> (bits - 1) else wrapped
        commit = int(even_lap) | (op & 0xFF) << abi.COMMIT_KIND_SHIFT | commit_bits
        entry["commit"] = commit
        answer = self._oracle.judge(entry[0], self._maybe_live)
        place = ingress.submissions[ingress.producer_pos % ingress.num_submissions :][:1]
        place.view(np.uint32)[1:] = entry.view(np.uint32)[1:]
        place.view(np.uint32)[0] = (
            commit  # last: a director that polls meanwhile takes the entry when it sees this word
        )
        ingress.producer_pos += 1
        self.counts[f"entry {answer.kind}"] += 1
        if answer.kind != "none":
            self._awaited.append(answer)
        if answer.kind in ("ack", "either"):
            self._sent.setdefault(answer.request_id, collections.deque()).append(sent or _Sent(0, 1 << 32, 0, None))
        return True

    @property
    def _maybe_live(self) -> set[int]:
        return self._live.keys() | self._sent.keys()

    def _claim(self, num_bytes: int) -> int | None:
        """A place for a body behind everything that was judged, or None: the director has not taken enough yet."""
        arena_bytes = self._limits.arena_bytes
        pos = -(-self._oracle.arena_consumer_pos // abi.ARENA_ALIGN_BYTES) * abi.ARENA_ALIGN_BYTES
        if pos % arena_bytes + num_bytes > arena_bytes:
            pos += arena_bytes - pos % arena_bytes
        taken = int(self._ingress.words["director"]["arena_consumer_pos"])
        return pos if pos + num_bytes - taken <= arena_bytes else None

    def _new_id(self) -> int:
        if self._live and self._rng.random() < 0.02:
            return self._rng.choice(list(self._live))
        self._next_id += 1
        return self._next_id

    # ---- Kinds of entries ------------------------------------------------------------------------------------------
    def _write_good(self) -> bool:
        prompt, expected = self._rng.choice(self._prompts)
        body = self._body()
        max_tokens = self._rng.randint(1, 4)
        raw = body.tobytes() + np.array(prompt, np.uint32).tobytes()
        return self._write_request(raw, len(prompt), max_tokens, {}, abi.SUBMISSION_REQUEST, 0, expected)

    def _body(self) -> npt.NDArray[np.void]:
        body = np.zeros(1, abi.REQUEST_BODY)
        body["sampling"]["top_p"] = 1.0
        body["sampling"]["ignore_eos"] = 1
        return body

    def _write_bent(self) -> bool:
        """A request with a few words of its entry, its body or its lists changed."""
        rng = self._rng
        body = self._body()
        sampling = body["sampling"]
        stop_ids = [rng.randrange(self._limits.vocab) for _ in range(rng.choice((0, 0, 1, 3, 16)))]
        biases = [(rng.randrange(self._limits.vocab), self._values.real()) for _ in range(rng.choice((0, 0, 0, 2, 40)))]
        prompt = list(rng.choice(self._prompts)[0])
        body["num_stop_ids"], sampling["num_logit_bias"] = len(stop_ids), len(biases)
        sampling["temperature"], sampling["seed"] = rng.choice((0.0, 0.8)), rng.getrandbits(64)
        if rng.random() < 0.3:
            body["constraint"] = rng.randint(0, self._limits.num_constraint_slots + 1)
            body["constraint_state"] = rng.choice((0, 0, 1, 5, 0xFFFF, 1 << 31))
        if rng.random() < 0.3:
            sampling["num_top_logprobs"] = rng.choice((1, 3, 20, 21))
        if rng.random() < 0.3:
            body["num_prior_outputs"] = rng.choice((1, len(prompt), len(prompt) + 1))
        words: dict[str, int] = {}
        op, commit_bits = abi.SUBMISSION_REQUEST, 0
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            match rng.randrange(5):
                case 0:
                    words[rng.choice(ENTRY_WORDS)] = self._values.number()
                case 1:
                    name = rng.choice(abi.SAMPLING_PARAMS.names or ())
                    is_float = sampling.dtype[name].kind == "f"
                    sampling[name] = (
                        self._values.real()
                        if is_float
                        else self._values.number() % (1 << 8 * sampling.dtype[name].itemsize)
                    )
                case 2:
                    name = rng.choice([name for name in abi.REQUEST_BODY.names or () if name != "sampling"])
                    body[name] = self._values.number() % (1 << 8 * body.dtype[name].itemsize)
                case 3:
                    prompt[rng.randrange(len(prompt))] = self._values.number() % (1 << 32)
                case _:
                    if rng.random() < 0.5:
                        op = rng.choice((0, 5, 6, 77, 255))
                    else:
                        commit_bits = 1 << rng.choice((1, 4, 7, 16, 23, 31))
        lists = np.array(stop_ids, np.uint32).tobytes() + np.array(biases, abi.LOGIT_BIAS).tobytes()
        raw = body.tobytes() + lists + np.array(prompt, np.uint32).tobytes()
        if rng.random() < 0.1:
            raw = self._values.bent(raw)
        if rng.random() < EPOCHS_WRONG:
            words["epoch"] = self._ingress.epoch + rng.choice((1, -2, 2, 1 << 20))
        return self._write_request(raw, len(prompt), rng.randint(1, 4), words, op, commit_bits, None)

    def _write_request(
        self,
        raw: bytes,
        num_prompt: int,
        max_tokens: int,
        words: dict[str, int],
        op: int,
        commit_bits: int,
        expected: list[int] | None,
    ) -> bool:
        pos = self._claim(len(raw))
        if pos is None:
            return False
        self._ingress.arena[pos % self._limits.arena_bytes :][: len(raw)] = np.frombuffer(raw, np.uint8)
        own: dict[str, int] = {
            "request_id": self._new_id(), "arena_pos": pos, "body_bytes": len(raw), "num_prompt_tokens": num_prompt, "max_tokens": max_tokens
        }  # fmt: skip
        if "arena_pos" in words and self._rng.random() < 0.5:  # near to what is right
            words["arena_pos"] = pos + self._rng.choice(
                (-64, -4, 4, 64, 128, self._limits.arena_bytes, -self._limits.arena_bytes)
            )
        whole = {**own, **words}
        # What an accepted request will bring is in the bytes, wherever the entry says that they are.
        body_at = whole["arena_pos"] % self._limits.arena_bytes
        seen = self._ingress.arena[body_at : body_at + abi.REQUEST_BODY.itemsize].tobytes()
        sent = None
        if len(seen) == abi.REQUEST_BODY.itemsize:
            body = np.frombuffer(seen, abi.REQUEST_BODY)[0]
            tokens_asked = whole["max_tokens"] % (1 << 32)
            known = expected[:tokens_asked] if expected is not None and whole == own else None
            sent = _Sent(int(body["num_prior_outputs"]), tokens_asked, int(body["sampling"]["num_top_logprobs"]), known)
        return self._commit(op, whole, commit_bits, sent)

    def _write_noise(self) -> bool:
        """64 random bytes, now and then with an operation or an epoch that makes them worth a look."""
        rng = self._rng
        words = {name: self._values.number() if rng.random() < 0.5 else rng.getrandbits(64) for name in ENTRY_WORDS}
        if rng.random() < 0.9:
            words["epoch"] = self._ingress.epoch
        op = rng.randint(1, 4) if rng.random() < 0.7 else rng.getrandbits(8)
        if rng.random() < 0.3:
            words["arena_pos"] = self._oracle.arena_consumer_pos // 64 * 64 + 64 * rng.randint(0, 20)
            words["body_bytes"] = rng.randint(0, 600)
        return self._commit(
            op, words, 0 if rng.random() < 0.7 else rng.getrandbits(24) & ~0xFF01 & ~1 | rng.getrandbits(8) << 24
        )

    def _write_cancel(self) -> bool:
        words = {
            "request_id": self._rng.choice(list(self._live))
            if self._live and self._rng.random() < 0.7
            else self._values.number()
        }
        if self._rng.random() < 0.3:
            words[self._rng.choice(ENTRY_WORDS[2:])] = self._values.number()
        return self._commit(abi.SUBMISSION_CANCEL, words, 0)

    def _write_ping(self) -> bool:
        words = {"request_id": self._values.number(), "client_ns": self._values.number()}
        if self._rng.random() < 0.3:
            words[self._rng.choice(("arena_pos", "body_bytes", "max_tokens", "timeout_ns"))] = self._values.number()
        return self._commit(abi.SUBMISSION_PING, words, 0)

    def _write_piece(self) -> bool:
        """The next piece of an automaton, some of them bent on the way."""
        rng = self._rng
        if not self._pieces:
            slot = rng.randrange(self._limits.num_constraint_slots + (rng.random() < 0.1))
            table = rng.choice(self._tables)
            if rng.random() < 0.3:
                table = self._values.bent(table)
            step = rng.choice((len(table), 64, 256, 1024)) or 64
            self._pieces.extend((slot, at, table[at : at + step]) for at in range(0, len(table), step))
        slot, offset, data = self._pieces[0]
        pos = self._claim(len(data))
        if pos is None:
            return False
        self._pieces.popleft()
        self._ingress.arena[pos % self._limits.arena_bytes :][: len(data)] = np.frombuffer(data, np.uint8)
        words = {"request_id": slot, "arena_pos": pos, "body_bytes": len(data), "client_ns": offset}
        if rng.random() < 0.15:
            words[rng.choice(ENTRY_WORDS)] = self._values.number()
        if rng.random() < 0.05:
            self._pieces.clear()
        return self._commit(abi.SUBMISSION_CONSTRAINT, words, 0)

    # ---- Tables ---------------------------------------------------------------------------------------------------------
    def _constraint_tables(self) -> Iterator[bytes]:
        vocab, most = self._limits.vocab, self._limits.constraint_slot_bytes
        for num_states in (1, 2, 6):
            rows = [
                {self._rng.randrange(vocab): self._rng.randrange(num_states) for _ in range(3)}
                for _ in range(num_states)
            ]
            yield build_constraint_table(vocab, rows, max_bytes=most).data

    # ---- Reading ---------------------------------------------------------------------------------------------------
    def read(self) -> int:
        """Checks every completion that has come. Returns how many."""
        found = self._ingress.read()
        for kind, reason, token, request_id, index in found:
            if kind in (abi.COMPLETION_ACK, abi.COMPLETION_REJECT, abi.COMPLETION_PONG):
                self._take_answer(kind, reason, request_id)
            else:
                self._take_output(kind, reason, token, request_id, index)
        return len(found)

    def _take_answer(self, kind: int, reason: int, request_id: int) -> None:
        name = {abi.COMPLETION_ACK: "ack", abi.COMPLETION_REJECT: "reject", abi.COMPLETION_PONG: "pong"}[kind]
        if not self._awaited:
            raise FuzzError(f"{name} of {request_id} (reason {reason}) although every entry was answered")
        expected = self._awaited.popleft()
        is_right = expected.request_id == request_id and (
            expected.kind == name or (expected.kind == "either" and name in ("ack", "reject"))
        )
        if not is_right or (name == "reject" and reason not in expected.reasons):
            raise FuzzError(f"got {name} of {request_id}, reason {reason}; expected {expected}")
        self.counts[f"reject {abi.RejectReason(reason).name.lower()}" if name == "reject" else name] += 1
        if expected.kind not in ("ack", "either"):
            return
        sent = self._sent[request_id].popleft()
        if not self._sent[request_id]:
            del self._sent[request_id]
        if name == "ack":
            self._live[request_id] = LiveRequest(sent.num_prior_outputs, sent.max_tokens, sent.num_top, sent.expected)
            if sent.max_tokens > LONG_TOKENS:
                self._to_cancel.append(request_id)

    def _take_output(self, kind: int, reason: int, token: int, request_id: int, index: int) -> None:
        live = self._live.get(request_id)
        if live is None:
            raise FuzzError(f"completion kind {kind} of request {request_id}, which does not run")
        if kind == abi.COMPLETION_TOKEN:
            if (
                index != live.num_prior_outputs + len(live.tokens)
                or token >= self._limits.vocab
                or live.num_tops_missing
            ):
                raise FuzzError(
                    f"token {token} at {index} of request {request_id}; expected position {len(live.tokens)}: {live}"
                )
            live.tokens.append(token)
            live.num_tops_missing = live.num_top
        elif kind == abi.COMPLETION_TOP:
            if live.num_tops_missing == 0 or token >= self._limits.vocab:
                raise FuzzError(f"alternative {token} of request {request_id} without a token: {live}")
            live.num_tops_missing -= 1
        elif kind == abi.COMPLETION_FINISH:
            self._take_finish(reason, index, request_id, self._live.pop(request_id))
        elif kind != abi.COMPLETION_START:
            raise FuzzError(f"completion kind {kind} of request {request_id}")

    def _take_finish(self, reason: int, num_tokens: int, request_id: int, live: LiveRequest) -> None:
        self.counts[f"finish {abi.FinishReason(reason).name.lower()}"] += 1
        if num_tokens != len(live.tokens) or len(live.tokens) > live.max_tokens or live.num_tops_missing:
            raise FuzzError(f"request {request_id} ended with {num_tokens} tokens: {live}")
        if reason == abi.FINISH_LENGTH and len(live.tokens) != live.max_tokens:
            raise FuzzError(f"request {request_id} ended for its length after {num_tokens} tokens: {live}")
        if live.expected is not None and live.tokens != live.expected[: len(live.tokens)]:
            raise FuzzError(f"request {request_id} is good and said {live.tokens}, expected {live.expected}")
        if live.expected is not None and reason == abi.FINISH_LENGTH:
            self.counts["good request, right output"] += 1
