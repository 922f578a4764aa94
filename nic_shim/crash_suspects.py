"""Which requests may be what brings the engine down: so that one bad request does not do so for ever, and no good one fails for it.

    suspects.note_crash(on_ring, num_in_engine)     requests to fail; the others go on
    suspects.hold(request)                          whether it must wait for its turn

Problem   After a fault every unfinished request is submitted again. If one of them is what the engine cannot run, that never ends.
Rule      A crash counts against each request on the ring. It counts no more once the request has got CLEAR_TOKENS beyond the place where the
          crash met it: what a request does there is the same in each life, so it was not this one. Two crashes: the request runs on
          probation, with no other suspect beside it. It fails after MAX_CRASHES, or MAX_CRASHES_ALONE while it was all that the engine had.
Hazard    Only this ingress's requests are seen here; another ingress does the same with its own.
Called by nic_shim/engine_link.py. Test: pytest tests/null/test_crash_suspects.py tests/host/test_recovery.py
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from blinkimp.nic_shim.live_request import LiveRequest

CLEAR_TOKENS: Final = 16
PROBATION_CRASHES: Final = 2
MAX_CRASHES: Final = 3
MAX_CRASHES_ALONE: Final = 2


class CrashSuspects:
    """Requests on probation: at most one is on the ring, the others wait here."""

    def __init__(self) -> None:
        self._held: list[LiveRequest] = []
        self._running: LiveRequest | None = None

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(self._held)

    def note_crash(self, on_ring: Collection[LiveRequest], num_in_engine: int) -> list[LiveRequest]:
        """The engine has crashed with these on the ring. num_in_engine: requests of all ingresses that it said it had."""
        self._running = None
        is_alone = len(on_ring) == 1 and num_in_engine <= 1
        guilty = []
        for request in on_ring:
            if self._is_clear(request):
                request.num_crashes = request.num_crashes_alone = 0
            request.num_crashes += 1
            request.num_crashes_alone += is_alone
            request.crash_position = len(request.output_ids)
            if request.num_crashes >= MAX_CRASHES or request.num_crashes_alone >= MAX_CRASHES_ALONE:
                guilty.append(request)
        return guilty

    def hold(self, request: LiveRequest) -> bool:
        """Of a request that is about to be submitted: takes it, where another suspect is on probation."""
        if request.num_crashes < PROBATION_CRASHES or request is self._running:
            return False
        if self._running is None:
            self._running = request
            return False
        self._held.append(request)
        return True

    def next(self) -> LiveRequest | None:
        """The next one to submit, once the one before has ended or is clear."""
        running = self._running
        if running is not None and running.end is None and not self._is_clear(running):
            return None
        self._running = None
        return self._held.pop(0) if self._held else None

    def remove(self, request: LiveRequest) -> bool:
        """False where it is not held."""
        if request not in self._held:
            return False
        self._held.remove(request)
        return True

    def release(self) -> list[LiveRequest]:
        """All that wait, in order."""
        held, self._held, self._running = self._held, [], None
        return held

    @staticmethod
    def _is_clear(request: LiveRequest) -> bool:
        return len(request.output_ids) >= request.crash_position + CLEAR_TOKENS
