"""Parking: sees that somebody wants something of an engine that has parked, and has the device go on.

    doorbell = Doorbell(regions.engine_page, regions.queue_pairs)
    doorbell.is_parked() and doorbell.rings()

A parked device has left the GPU (or sleeps, where it is emulated) with all its state in place; nobody looks at the rings. What rings is what an
ingress does anyway: a submission, an attach, a detach; or a command or new limits (host/tuning.py). WakeThread looks, and calls device.resume().
The host is on the path of the first token after an idle time only; parking is off unless `park_after_s` says so.
Called by host/engine.py (GPU) and host/emulated_process.py. Test: pytest tests/host/test_parking.py
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from blinkimp import ring_abi as abi
from blinkimp.host.shared_memory import Region
from blinkimp.ring_abi import EngineCommand, EngineState

_log = logging.getLogger(__name__)

PARKED_LOOK_S: Final = (
    0.0005  # between looks at a parked engine: the first token after parking is at most this, and a launch, later
)
RUNNING_LOOK_S: Final = 0.01  # between looks whether it has parked: a submission in between waits that much longer


class Doorbell:
    """One engine's words that say whether it is parked and wanted."""

    def __init__(self, engine_page: Region, queue_pairs: Sequence[Region]) -> None:
        page = engine_page.view(abi.ENGINE_PAGE)
        self._state, self._command = page["status"]["state"], page["control"]["command"]
        self._tuning_asked, self._tuning_obeyed = (page[line]["tuning_generation"] for line in ("control", "status"))
        self._queue_pairs = []
        for region in queue_pairs:
            words = region.view(abi.QUEUE_PAIR)
            ingress, director = words["ingress"], words["director"]
            self._queue_pairs.append(
                (
                    ingress["epoch"],
                    director["epoch"],
                    ingress["submission_producer_pos"],
                    director["submission_consumer_pos"],
                )
            )

    def is_parked(self) -> bool:
        return int(self._state[0]) == EngineState.PARKED

    def rings(self) -> bool:
        """Whether there is a submission, an attach, a detach, a command or a generation of limits that the director has not seen."""
        if int(self._command[0]) != EngineCommand.RUN or int(self._tuning_asked[0]) != int(self._tuning_obeyed[0]):
            return True
        for asked, answered, num_submitted, num_taken in self._queue_pairs:
            if int(asked[0]) > int(answered[0]):
                return True
            if int(answered[0]) % 2 == 1 and int(num_submitted[0]) != int(num_taken[0]):
                return True
        return False


class WakeThread:
    """Calls resume() whenever a parked engine is wanted, until close()."""

    def __init__(self, doorbell: Doorbell, resume: Callable[[], None]) -> None:
        self._doorbell, self._resume = doorbell, resume
        self._closing = False
        self.failure: str | None = None  # why it has given up: written once by its thread, read by the watchdog's
        self._thread = threading.Thread(target=self._run, name="blinkimp-wake", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            if not self._doorbell.is_parked():
                time.sleep(RUNNING_LOOK_S)
            elif not self._doorbell.rings():
                time.sleep(PARKED_LOOK_S)
            else:
                try:
                    self._resume()
                except Exception as error:
                    _log.exception("the parked engine could not go on")
                    self.failure = f"the parked engine could not go on: {error}"
                    return
                wait_until_awake(self._doorbell, lambda: self._closing)


def wait_until_awake(doorbell: Doorbell, should_give_up: Callable[[], bool] = lambda: False) -> None:
    """After resume(): the state word says PARKED until the director runs again."""
    while doorbell.is_parked() and not should_give_up():
        time.sleep(PARKED_LOOK_S)
