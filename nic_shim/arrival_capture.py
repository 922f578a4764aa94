"""Writes down what an ingress is asked and what it answers, for a replay (blinkimp/trace/arrivals.py). Prompts and all: only where the operator
asked for it (`blinkimp serve --capture-arrivals FOLDER`), to files that only the owner can read.

    link.capture_arrivals(folder)        # from then on each request is a line, and its end another

Output is not written, only a digest of its token ids: enough to tell whether a replay says the same.
A full disk ends the capture, not the service.
Called by nic_shim/engine_link.py, from its thread. Test: pytest tests/host/test_replay.py
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.protocol import Error
from blinkimp.trace.arrivals import Arrival, Captured, Outcome, output_digest

_log = logging.getLogger("blinkimp.ingress")

LOOK_PERIOD_S: Final = 0.05  # between looks for ended requests, and writes


class ArrivalCapture:
    """One file. Raises OSError, in words, where it cannot be made; where it cannot be written to later it says so once and captures no more."""

    def __init__(self, folder: Path, engine_name: str, queue_pair_idx: int) -> None:
        name = f"arrivals.{engine_name}.qp{queue_pair_idx}.{os.getpid()}.{time.monotonic_ns()}.jsonl"
        self.path = folder / name
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise OSError(
                f"capture_arrivals: got {folder} ({error.strerror}), expected a folder that can be made and written to; choose another"
            ) from error
        self._file = os.fdopen(fd, "wb", buffering=1 << 20)
        self._live: dict[LiveRequest, tuple[int, int]] = {}  # its number, and how many output tokens it had before
        self._next_number = 0
        self._look_at = 0.0

    def arrived(self, request: LiveRequest) -> None:
        """Before it goes to the ring."""
        if self._file.closed:  # it failed
            return
        number, self._next_number = self._next_number, self._next_number + 1
        delivered = request.output_ids.tolist()
        arrival = Arrival(
            at_ns=request.received_ns,
            num_prompt_tokens=len(request.prompt_ids),
            sampling=msgspec.structs.replace(request.sampling, seed=request.seed),
            prompt_ids=request.prompt_ids.tolist(),
            priority=request.priority,
            timeout_s=request.timeout_s,
            # The salt's hash in place of the salt: prompts share pages as they did.
            cache_salt=f"{request.cache_salt:016x}" if request.cache_salt else "",
            prefix_cache=request.uses_prefix_cache,
            stream=request.stream,
            detokenize=request.shows_text,
            delivered_ids=delivered,
        )
        self._live[request] = number, len(delivered)
        with self._ends_where_it_cannot_write():
            self._write(Captured(number, arrival=arrival))

    def look(self, now: float) -> None:
        """Each turn of the loop: every LOOK_PERIOD_S it writes what has ended."""
        if self._file.closed or now < self._look_at:
            return
        self._look_at = now + LOOK_PERIOD_S
        with self._ends_where_it_cannot_write():
            self._write_ended()
            self._file.flush()

    def close(self) -> None:
        self._look_at = 0.0
        self.look(time.monotonic())
        with self._ends_where_it_cannot_write():
            self._file.close()

    # ---- Inside ------------------------------------------------------------------------------------------------------
    def _write_ended(self) -> None:
        ended = [request for request in self._live if request.end is not None]
        for request in ended:
            number, num_before = self._live.pop(request)
            assert request.end is not None, "chosen so"
            output = request.output_ids[num_before:]
            reason = request.end.code if isinstance(request.end, Error) else request.end.reason
            self._write(Captured(number, outcome=Outcome(reason, len(output), output_digest(output))))

    def _write(self, line: Captured) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")

    @contextlib.contextmanager
    def _ends_where_it_cannot_write(self) -> Iterator[None]:
        """Requests are not to fail for want of a record of them."""
        try:
            yield
        except OSError as error:
            self._live.clear()
            with contextlib.suppress(OSError):  # it tries once more to write what is left, and closes in any case
                self._file.close()
            _log.error(
                "capture_arrivals: writing to %s failed (%s), expected a file that can grow; requests go on and are captured no more, a replay "
                "can use those captured until now; make room there, and start the ingress again to capture",
                self.path,
                error.strerror,
            )
