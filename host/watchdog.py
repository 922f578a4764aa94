"""Sees that the device lives: its process or kernel, its heartbeat, its fault record; and puts what it sees into words.

    watchdog = Watchdog(engine_page, device, stall_timeout_s=5)
    verdict = watchdog.check()     # several times a second; None while all is well

The host only looks. A device that is slow, or a host that was stopped for an hour (SIGSTOP), is no fault: only time in which
the watchdog itself was looking counts. Called by host/engine.py. Test: pytest tests/host/test_faults.py tests/null/test_watchdog.py
"""

from __future__ import annotations

import enum
import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import blinkimp
from blinkimp import ring_abi as abi
from blinkimp.host.shared_memory import Region
from blinkimp.ring_abi import EngineState, FaultCode, OpKind

MAX_LOOK_GAP_S: Final = 0.5  # a longer gap between two looks counts as this much: the host itself stood still

_FAULT_MEANINGS: Final = {
    FaultCode.SPIN_EXPIRED: "a wait outlived its budget",
    FaultCode.INTEGRITY: "an integrity check failed",
    FaultCode.BAD_PROGRAM: "an op that the interpreter does not know",
}


class Symptom(enum.StrEnum):
    """How a fault shows."""

    FAULT_RECORD = "fault_record"  # the device says so itself
    HEARTBEAT_STALL = "heartbeat_stall"  # it hangs
    DEVICE_DEATH = "device_death"  # its process has ended, or its kernel has left, without a word
    CUDA_ERROR = "cuda_error"  # the driver says so: the context is lost, and the process that owns it with it
    HOST_DEATH = "host_death"  # the engine's own process has ended (host/engine_slot.py sees that)


@dataclass(frozen=True)
class Verdict:
    """What is wrong, and in words for the operator."""

    symptom: Symptom
    text: str


class WatchedDevice(Protocol):
    """The part of device_protocol.Device that is watched."""

    def is_alive(self) -> bool: ...

    def fault(self) -> str | None: ...


@functools.cache
def fault_site_names() -> dict[int, str]:
    """kSite* of device/fault.cuh, by number: the header is the only list of them."""
    header = Path(blinkimp.__file__).parent / "device" / "fault.cuh"
    sites = re.findall(r"^\s*(kSite\w+)\s*=\s*(\d+)", header.read_text(), flags=re.MULTILINE)
    return {int(number): name for name, number in sites}


def state_name(state: int) -> str:
    """Of a word that a broken device may have written."""
    return {one.value: one.name for one in EngineState}.get(state, f"unknown ({state})")


def describe_fault(record: Any) -> str:
    """A FaultRecord (one numpy record) in words."""
    code, site = int(record["code"]), int(record["site"])
    try:
        fault = FaultCode(code)
        meaning = f"{fault.name} ({_FAULT_MEANINGS.get(fault, 'no fault')})"
    except ValueError:
        meaning = f"unknown fault code {code}"
    site_name = fault_site_names().get(site, "unknown site")
    return (
        f"{meaning} at {site_name} (site {site}), block {int(record['block_idx'])} thread {int(record['thread_idx'])}, "
        f"step {int(record['step'])}{op_words(record)}: expected {int(record['expected']):#x}, seen {int(record['seen']):#x}, "
        f"device time {int(record['device_ns'])} ns"
    )


def op_words(record: Any) -> str:
    """Which op of the program it was, where the site tells."""
    if fault_site_names().get(int(record["site"])) != "kSiteEmulatedOp":
        return ""
    kinds = {one.value: one.name for one in OpKind}
    op_idx, kind = int(record["expected"]), int(record["seen"])
    return f", op {op_idx} ({kinds.get(kind, f'unknown kind {kind}')})"


class Watchdog:
    """One look at a time; keeps what it saw last."""

    def __init__(
        self,
        engine_page: Region,
        device: WatchedDevice,
        stall_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._page = engine_page.view(abi.ENGINE_PAGE)
        self._device = device
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._heartbeat = -1
        self._looked_at = clock()
        self._stalled_s = 0.0

    def check(self) -> Verdict | None:
        """What is wrong, or None. The first of fault record, death and stall: it is the best explanation."""
        status = self._page["status"][0]
        state = int(status["state"])
        # A record is whole once its code is not 0: the device writes the code last, in release order.
        if state == EngineState.FAULTED or int(self._page["fault"]["code"][0]):
            text = f"the device reported a fault: {describe_fault(self._page['fault'][0])}"
            return Verdict(Symptom.FAULT_RECORD, text)
        if not self._device.is_alive():
            if state == EngineState.STOPPED:
                return None
            reason = self._device.fault() or "the device ended without a word"
            symptom = Symptom.CUDA_ERROR if "CUDA_ERROR_" in reason else Symptom.DEVICE_DEATH
            return Verdict(
                symptom,
                f"{reason}; the last state was {state_name(state)}, step {int(status['step'])}",
            )
        return self._check_heartbeat(int(status["heartbeat"]), state, int(status["step"]))

    def _check_heartbeat(self, heartbeat: int, state: int, step: int) -> Verdict | None:
        now = self._clock()
        gap_s, self._looked_at = min(now - self._looked_at, MAX_LOOK_GAP_S), now
        if heartbeat != self._heartbeat or state in (EngineState.STOPPED, EngineState.PARKED):
            self._heartbeat, self._stalled_s = heartbeat, 0.0
            return None
        self._stalled_s += gap_s
        if self._stalled_s < self._stall_timeout_s:
            return None
        return Verdict(
            Symptom.HEARTBEAT_STALL,
            f"the device's heartbeat stands at {heartbeat} for {self._stalled_s:.1f} s, expected a change within "
            f"{self._stall_timeout_s:g} s; state {state_name(state)}, step {step}: it hangs without a fault record",
        )
