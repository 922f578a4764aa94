"""What an ingress sees of its engine: the status page's counters, and whether its heart beats.

Called by nic_shim/engine_link.py and nic_shim/message_handler.py. Test: pytest tests/host/test_zmq_ingress.py
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from blinkimp import ring_abi as abi
from blinkimp.host.shared_memory import Region, SharedMemoryError, open_engine_page

HEARTBEAT_TIMEOUT_S = 2.0  # a status page that stands still for longer: the engine is lost


class EngineWatch:
    """Reads the engine page of `engine_name`; sees an engine that was started anew under the same name."""

    def __init__(self, engine_name: str) -> None:
        self.engine_name = engine_name
        self._region: Region | None = None
        self._page: Any = None
        self._heartbeat = -1
        self._heartbeat_changed_at = time.monotonic()
        self.reopen()

    def reopen(self) -> bool:
        """Maps the page that has the engine's name now. False where there is none."""
        try:
            region = open_engine_page(self.engine_name)
        except SharedMemoryError:
            return False
        self.close()
        self._region = region
        self._page = np.frombuffer(region.buffer, dtype=abi.ENGINE_PAGE, count=1)[0]
        self._heartbeat = -1
        self.look()
        return True

    def close(self) -> None:
        self._page = None
        if self._region is not None:
            self._region.close()
            self._region = None

    def look(self) -> None:
        """Notes whether the heart has beaten. To be called several times a second."""
        heartbeat = int(self._page["status"]["heartbeat"]) if self._page is not None else self._heartbeat
        if heartbeat != self._heartbeat or self.state == abi.EngineState.PARKED:  # a parked heart need not beat
            self._heartbeat = heartbeat
            self._heartbeat_changed_at = time.monotonic()

    @property
    def heartbeat_age_s(self) -> float:
        return time.monotonic() - self._heartbeat_changed_at

    @property
    def state(self) -> abi.EngineState:
        if self._page is None:
            return abi.EngineState.STOPPED
        try:
            return abi.EngineState(int(self._page["status"]["state"]))
        except ValueError:  # a damaged page
            return abi.EngineState.FAULTED

    @property
    def is_lost(self) -> bool:
        """No heartbeat for too long, or the engine says itself that it has ended."""
        return self.heartbeat_age_s > HEARTBEAT_TIMEOUT_S or self.state in (
            abi.EngineState.STOPPED,
            abi.EngineState.FAULTED,
        )

    @property
    def num_restarts(self) -> int:
        """Engines of this name that faulted before this one, under the same supervisor."""
        return int(self._page["header"]["num_restarts"]) if self._page is not None else 0

    def counters(self) -> dict[str, int]:
        """StatusLines, by name."""
        if self._page is None:
            return {}
        status = self._page["status"]
        return {name: int(status[name]) for name in status.dtype.names if name != "reserved"}
