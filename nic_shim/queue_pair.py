"""The ingress end of one queue pair: attach, submit, cancel, ping, poll. ctypes over device/ingress_port.cuh.

A `QueuePairPort` belongs to one thread; its heartbeat runs on a native thread that no garbage collection can hold up, for as
long as the owner renews the lease. Called by nic_shim/engine_link.py, `blinkimp doctor` and the tests.
Test: pytest tests/host/test_ingress_port.py

Usage
    port = QueuePairPort.open("main", 0)
    port.attach(timeout_s=5)
    status = port.try_submit(request_id, prompt_ids, sampling_record(temperature=0.7), max_tokens=16)
    for entry in port.poll(): ...
    port.close()
"""

from __future__ import annotations

import ctypes
import enum
import os
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from blinkimp import ring_abi as abi
from blinkimp.host.shared_memory import Region, open_queue_pair
from blinkimp.nic_shim.port_library import port_library

HEARTBEAT_PERIOD_NS = 20_000_000  # a fifth of what ring_abi.h asks for
HEARTBEAT_TIMEOUT_S = 2.0  # an owner whose heartbeat is older is taken over
POLL_ENTRIES = 4096  # completions per poll at most
# RequestOrder of device/ingress_port.cuh, up to its SamplingParams.
_ORDER: Final = struct.Struct("=QQQ QQQ IIII IIII iI")
# One type for all: one made for each would be a cycle.
_OrderBytes: Final = ctypes.c_char * (_ORDER.size + abi.SAMPLING_PARAMS.itemsize)
_NO_IDS: Final = np.zeros(0, dtype=np.uint32)
_NO_BIAS: Final = np.zeros(0, dtype=abi.LOGIT_BIAS)


class PortStatus(enum.IntEnum):
    """What a call on the port came to (PortStatus of device/ingress_port.cuh)."""

    OK = 0
    PENDING = 1  # the director has not answered yet
    BUSY = 2  # another live ingress owns the queue pair
    RING_FULL = 3  # try again later
    ARENA_FULL = 4  # try again later
    TOO_LARGE = 5  # the body can never fit
    DETACHED = 6  # not attached, or dropped: attach again
    STOLEN = 7  # another ingress took the queue pair over
    CORRUPT = 8  # the director's positions make no sense


class WaitEvent(enum.IntFlag):
    COMPLETION = 1
    READABLE = 2
    STATE_CHANGED = 4


class QueuePairError(RuntimeError):
    """The queue pair cannot be used; the message says what, got, expected, remedy."""


class AttachTimeoutError(QueuePairError):
    """No director answered in time."""


class QueuePairBusyError(QueuePairError):
    """Another live ingress owns this queue pair."""


_HEADER_FIELDS = (
    *("", "magic", "abi_version", "header_bytes", "region_bytes", "submission_entry_bytes", "completion_entry_bytes"),
    *("num_submissions", "num_completions", "arena_bytes", "submissions_offset", "completions_offset", "arena_offset"),
)
_POWERS_OF_TWO = frozenset({"num_submissions", "num_completions", "arena_bytes"})


def check_header(region: Region) -> None:
    """Raises QueuePairError unless every header word that the port relies on is sound."""
    got, expected = ctypes.c_uint64(), ctypes.c_uint64()
    field_idx = port_library().bk_port_check_header(
        region.address, region.region_bytes, ctypes.byref(got), ctypes.byref(expected)
    )
    if field_idx:
        field = _HEADER_FIELDS[field_idx]
        wanted = f"a power of two, at least {expected.value:#x}" if field in _POWERS_OF_TWO else f"{expected.value:#x}"
        raise QueuePairError(
            f"queue pair {region.name}: header word {field} is {got.value:#x}, expected {wanted}; "
            "the engine is of another version, or the region is damaged: restart the engine with this version"
        )


def sampling_record(
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    ignore_eos: bool = False,
    min_tokens: int = 0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    num_top_logprobs: int = 0,
) -> npt.NDArray[np.void]:
    """One SamplingParams, as try_submit() takes it. Ranges are the director's to check; the bias list goes to try_submit()."""
    record = np.zeros(1, dtype=abi.SAMPLING_PARAMS)
    record["temperature"], record["top_p"], record["min_p"] = temperature, top_p, min_p
    record["top_k"], record["seed"], record["ignore_eos"] = top_k, seed, int(ignore_eos)
    record["min_tokens"], record["num_top_logprobs"] = min_tokens, num_top_logprobs
    record["repetition_penalty"] = repetition_penalty
    record["presence_penalty"], record["frequency_penalty"] = presence_penalty, frequency_penalty
    return record


def _logit_bias_array(logit_bias: Mapping[int, float]) -> npt.NDArray[np.void]:
    if not logit_bias:
        return _NO_BIAS
    array = np.zeros(len(logit_bias), dtype=abi.LOGIT_BIAS)
    array["token"] = list(logit_bias)
    array["bias"] = list(logit_bias.values())
    return array


class QueuePairPort:
    """The ingress end of one queue pair. Not attached until attach(); close() detaches."""

    def __init__(self, region: Region, *, heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S) -> None:
        check_header(region)
        self.region = region
        header = np.frombuffer(region.buffer, dtype=abi.QUEUE_PAIR_HEADER, count=1)[0]
        self.engine_id = int(header["engine_id"])
        self.queue_pair_idx = int(header["queue_pair_idx"])
        self.max_context = int(header["max_context"])
        self.vocab_size = int(header["vocab_size"])
        self.num_submissions = int(header["num_submissions"])
        self.num_completions = int(header["num_completions"])
        self.arena_bytes = int(header["arena_bytes"])
        self.max_requests = int(header["max_requests"])  # that the director holds of this queue pair; 0 = not said
        self.num_constraint_slots = int(header["num_constraint_slots"])
        self.constraint_slot_bytes = int(header["constraint_slot_bytes"])
        self._heartbeat_timeout_ns = int(heartbeat_timeout_s * 1e9)
        self._library = port_library()
        self._handle: int | None = self._library.bk_port_open(region.address, region.region_bytes, os.getpid())
        if self._handle is None:
            raise QueuePairError(f"queue pair {region.name}: no memory for a port; free some memory and try again")
        self._completions = np.zeros(POLL_ENTRIES, dtype=abi.COMPLETION_ENTRY)
        self._completions_address = self._completions.ctypes.data

    @classmethod
    def open(
        cls, engine_name: str, queue_pair_idx: int, *, heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S
    ) -> QueuePairPort:
        """Maps the queue pair of a running engine. Raises SharedMemoryError where there is none."""
        region = open_queue_pair(engine_name, queue_pair_idx)
        try:
            return cls(region, heartbeat_timeout_s=heartbeat_timeout_s)
        except BaseException:
            region.close()
            raise

    # ---- Attach ----------------------------------------------------------------------------------------------------
    def try_attach(self) -> PortStatus:
        """Takes the queue pair and asks the director for a new epoch: OK (asked; see attach_answered) or BUSY.

        A free place is taken at once; that of a dead process, or of one whose heartbeat is too old, is taken over. Also the
        way to attach again after a drop.
        """
        return PortStatus(self._library.bk_port_try_attach(self._handle, self._heartbeat_timeout_ns))

    def attach_answered(self) -> PortStatus:
        """OK once the director has answered, else PENDING; STOLEN when another ingress took over in between."""
        return PortStatus(self._library.bk_port_attach_answered(self._handle))

    def attach(self, timeout_s: float) -> None:
        """Attaches, waiting for a stale owner to expire and for the director to answer."""
        deadline = time.monotonic() + timeout_s
        status = self.try_attach()
        while status == PortStatus.BUSY and time.monotonic() < deadline:
            time.sleep(0.005)
            status = self.try_attach()
        if status == PortStatus.BUSY:
            raise QueuePairBusyError(
                f"queue pair {self.region.name} belongs to process {self.owner_pid}, which is alive; expected a free queue pair; "
                "choose another index, or stop that ingress"
            )
        while (status := self.attach_answered()) == PortStatus.PENDING and time.monotonic() < deadline:
            time.sleep(0.0005)
            self._library.bk_port_heartbeat(self._handle)
        if status == PortStatus.STOLEN:
            raise QueuePairBusyError(
                f"queue pair {self.region.name} was taken over by process {self.owner_pid} during the attach; "
                "expected to keep it; choose another index"
            )
        if status != PortStatus.OK:
            self.detach()
            raise AttachTimeoutError(
                f"queue pair {self.region.name}: the director did not answer within {timeout_s:g} s; expected an answer "
                "within milliseconds; check that the engine runs (`blinkimp doctor`), and its log"
            )

    def detach(self) -> None:
        """Gives the queue pair back; the director cancels what is unfinished. Harmless when not attached."""
        self._library.bk_port_detach(self._handle)

    def close(self) -> None:
        """Detaches, ends the heartbeat thread and unmaps."""
        if self._handle is None:
            return
        self._library.bk_port_close(self._handle)
        self._handle = None
        self.region.close()

    def __enter__(self) -> QueuePairPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def state(self) -> PortStatus:
        """OK while attached, DETACHED after a drop, STOLEN after a takeover."""
        return PortStatus(self._library.bk_port_state(self._handle))

    @property
    def epoch(self) -> int:
        return int(self._library.bk_port_epoch(self._handle))

    @property
    def owner_pid(self) -> int:
        return int(self._words()["ingress"]["owner_pid"])

    # ---- Heartbeat -------------------------------------------------------------------------------------------------
    def start_heartbeat(self, *, period_ns: int = HEARTBEAT_PERIOD_NS, lease_s: float = 0.0) -> None:
        """Heartbeats on a native thread from now on. With a lease the owner must call renew_lease() or be dropped."""
        self.renew_lease(lease_s)
        error = self._library.bk_port_heartbeat_start(self._handle, period_ns)
        if error:
            raise QueuePairError(
                f"queue pair {self.region.name}: cannot start the heartbeat thread: {os.strerror(error)}; "
                "expected a period below 1 s, no second start, and a thread to be had (ulimit -u)"
            )

    def renew_lease(self, lease_s: float) -> None:
        """Lets the heartbeat thread go on for lease_s seconds from now; 0 is for ever."""
        self._library.bk_port_renew_lease(self._handle, int(lease_s * 1e9))

    def heartbeat(self) -> bool:
        """One heartbeat by hand; False when this port does not own the queue pair."""
        return bool(self._library.bk_port_heartbeat(self._handle))

    # ---- Submissions and completions -------------------------------------------------------------------------------
    def try_submit(
        self,
        request_id: int,
        prompt_ids: npt.NDArray[np.uint32],
        sampling: npt.NDArray[np.void],
        *,
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        logit_bias: Mapping[int, float] | None = None,
        num_prior_outputs: int = 0,
        flags: int = 0,
        priority: int = 0,
        timeout_ns: int = 0,
        cache_salt: int = 0,
        constraint_slot: int | None = None,
        constraint_state: int = 0,
    ) -> PortStatus:
        """Commits one request: OK, RING_FULL, ARENA_FULL, TOO_LARGE, DETACHED, STOLEN or CORRUPT.

        num_prior_outputs: so many of the last prompt ids are outputs of an earlier life of the request; output positions (seed,
        penalties, min_tokens, TOKEN.index) go on from there. flags: REQUEST_NO_PREFIX_CACHE. timeout_ns 0: none. constraint_slot:
        loaded by try_load_constraint() before; constraint_state: where its automaton stands. The other words: device/ring_abi.h.
        """
        if prompt_ids.dtype != np.uint32 or not prompt_ids.flags.c_contiguous:
            raise TypeError(
                f"prompt_ids is {prompt_ids.dtype}, expected contiguous uint32; convert with np.ascontiguousarray"
            )
        if sampling.dtype != abi.SAMPLING_PARAMS or sampling.shape != (1,):
            raise TypeError(f"sampling is {sampling.dtype} {sampling.shape}, expected one record of sampling_record()")
        try:
            stop_array = np.array(stop_ids, dtype=np.uint32) if stop_ids else _NO_IDS
            bias_array = _logit_bias_array(logit_bias) if logit_bias else _NO_BIAS
            words = _ORDER.pack(
                *(stop_array.ctypes.data, bias_array.ctypes.data, prompt_ids.ctypes.data),
                *(request_id, timeout_ns, cache_salt),
                *(len(stop_array), len(bias_array), len(prompt_ids), max_tokens, num_prior_outputs),
                *(flags, 0 if constraint_slot is None else constraint_slot + 1, constraint_state, priority, 0),
            )
        except (struct.error, OverflowError) as error:
            raise ValueError(
                f"a word of the request does not fit: {error}; expected ids and counts of 32 bits, request_id, timeout_ns and "
                "cache_salt of 64 bits, priority of 32 bits signed; check them before they come here"
            ) from error
        order = _OrderBytes.from_buffer_copy(
            words + sampling.tobytes()
        )  # aligned for any type, as all of ctypes' memory is
        return PortStatus(self._library.bk_port_try_submit(self._handle, order))

    def try_load_constraint(self, slot: int, table: bytes, offset: int = 0) -> tuple[PortStatus, int]:
        """Commits pieces of a constraint automaton (nic_shim/constraint_table.py) from `offset` on, as many as there is room for.

        Returns the status and the offset to go on from: (OK, len(table)) when all is committed, (RING_FULL or ARENA_FULL, offset) to
        call again later. A request submitted after the last piece may name the slot. The caller must not load a slot that a live
        request of its own names. Nothing answers: a request that names a slot with a bad automaton is rejected.
        """
        if not 0 <= slot < self.num_constraint_slots or not 0 < len(table) <= self.constraint_slot_bytes:
            raise ValueError(
                f"constraint of {len(table)} bytes for slot {slot}; expected 1 to {self.constraint_slot_bytes} bytes and a slot below "
                f"{self.num_constraint_slots}; simplify the constraint, or start the engine with larger or more slots"
            )
        next_offset = ctypes.c_uint64(offset)
        status = self._library.bk_port_try_load_constraint(
            self._handle, slot, table, len(table), ctypes.byref(next_offset)
        )
        return PortStatus(status), next_offset.value

    def load_constraint(self, slot: int, table: bytes, timeout_s: float = 5.0) -> PortStatus:
        """try_load_constraint() until the whole is committed, or what it came to; sleeps while the director makes room."""
        deadline = time.monotonic() + timeout_s
        status, offset = self.try_load_constraint(slot, table)
        while status in (PortStatus.RING_FULL, PortStatus.ARENA_FULL) and time.monotonic() < deadline:
            time.sleep(0.0002)
            status, offset = self.try_load_constraint(slot, table, offset)
        return status

    def try_cancel(self, request_id: int) -> PortStatus:
        return PortStatus(self._library.bk_port_try_cancel(self._handle, request_id))

    def try_ping(self, request_id: int, client_ns: int) -> PortStatus:
        return PortStatus(self._library.bk_port_try_ping(self._handle, request_id, client_ns))

    def ping(self, request_id: int, *, spin_s: float, timeout_s: float) -> tuple[PortStatus, int, int]:
        """A round trip, timed natively: its status, when it was committed (its client_ns), when a completion was first seen.

        For a port that has nothing else on its way: the answer is left for poll(), and one that is there before is BUSY. PENDING: no
        answer in time. Spins for spin_s, then sleeps between its looks; the GIL is free meanwhile. Times are time.monotonic_ns()'s.
        """
        committed, seen = ctypes.c_uint64(), ctypes.c_uint64()
        status = self._library.bk_port_ping(
            self._handle,
            request_id,
            int(spin_s * 1e9),
            int(timeout_s * 1e9),
            ctypes.byref(committed),
            ctypes.byref(seen),
        )
        return PortStatus(status), committed.value, seen.value

    def poll(self) -> npt.NDArray[np.void]:
        """All completions that are there, POLL_ENTRIES at most. The array is reused: copy what must outlive the next poll."""
        num_read = self._library.bk_port_poll(self._handle, self._completions_address, POLL_ENTRIES)
        return self._completions[:num_read]

    def wait(self, timeout_s: float, fd: int = -1) -> WaitEvent:
        """Sleeps until a completion, input on `fd`, a change of state, or the timeout; the GIL is free meanwhile."""
        return WaitEvent(self._library.bk_port_wait(self._handle, fd, int(timeout_s * 1e9)))

    # ---- For tests and `blinkimp doctor` ---------------------------------------------------------------------------
    def _words(self) -> Any:
        return np.frombuffer(self.region.buffer, dtype=abi.QUEUE_PAIR, count=1)[0]

    def dump(self) -> str:
        """The words of both lines, for a failing test or a bug report."""
        words = self._words()
        lines = [f"queue pair {self.region.name} state={self.state.name} epoch={self.epoch}"]
        for line in ("ingress", "director"):
            fields = [name for name in words[line].dtype.names if name != "reserved"]
            lines.append(f"  {line}: " + " ".join(f"{name}={int(words[line][name])}" for name in fields))
        return "\n".join(lines)
