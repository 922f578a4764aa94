"""Sees that the device lives: its process or kernel, its heartbeat, its fault record; and puts what it sees into words.

    watchdog = Watchdog(engine_page, device, stall_timeout_s=5)
    report = watchdog.check()      # several times a second; None while all is well

The host only looks. A device that is slow, or a host that was stopped for an hour (SIGSTOP), is no fault: only time in which
the watchdog itself was looking counts. Called by host/engine.py. Test: pytest tests/host/test_faults.py tests/null/test_watchdog.py
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

import blinkimp
from blinkimp import ring_abi as abi
from blinkimp.host.shared_memory import Region
from blinkimp.ring_abi import EngineState, FaultCode

MAX_LOOK_GAP_S: Final = 0.5  # a longer gap between two looks counts as this much: the host itself stood still

_FAULT_MEANINGS: Final = {
    FaultCode.SPIN_EXPIRED: "a wait outlived its budget",
    FaultCode.INTEGRITY: "an integrity check failed",
    FaultCode.BAD_PROGRAM: "an op that the interpreter does not know",
}


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
        f"step {int(record['step'])}: expected {int(record['expected']):#x}, seen {int(record['seen']):#x}, "
        f"device time {int(record['device_ns'])} ns"
    )


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

    def check(self) -> str | None:
        """What is wrong, for the operator, or None."""
        status = self._page["status"][0]
        state = int(status["state"])
        # A record is whole once its code is not 0: the device writes the code last, in release order.
        if state == EngineState.FAULTED or int(self._page["fault"]["code"][0]):
            return f"the device reported a fault: {describe_fault(self._page['fault'][0])}; restart the engine and report this line"
        if not self._device.is_alive():
            if state == EngineState.STOPPED:
                return None
            reason = self._device.fault() or "the device ended without a word"
            return f"{reason}; the last state was {EngineState(state).name}, step {int(status['step'])}; restart the engine"
        return self._check_heartbeat(int(status["heartbeat"]), state, int(status["step"]))

    def _check_heartbeat(self, heartbeat: int, state: int, step: int) -> str | None:
        now = self._clock()
        gap_s, self._looked_at = min(now - self._looked_at, MAX_LOOK_GAP_S), now
        if heartbeat != self._heartbeat or state in (EngineState.STOPPED, EngineState.PARKED):
            self._heartbeat, self._stalled_s = heartbeat, 0.0
            return None
        self._stalled_s += gap_s
        if self._stalled_s < self._stall_timeout_s:
            return None
        return (
            f"the device's heartbeat stands at {heartbeat} for {self._stalled_s:.1f} s, expected a change within "
            f"{self._stall_timeout_s:g} s; state {EngineState(state).name}, step {step}: it hangs without a fault record; "
            "restart the engine"
        )
