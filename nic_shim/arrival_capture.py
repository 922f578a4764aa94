"""Writes down what an ingress is asked and what it answers, for a replay (blinkimp/trace/arrivals.py). Prompts and all: only where the operator
asked for it (`blinkimp serve --capture-arrivals FOLDER`), to files that only the owner can read.

    link.capture_arrivals(folder)        # from then on each request is a line, and its end another

Output is not written, only a digest of its token ids: enough to tell whether a replay says the same.
Called by nic_shim/engine_link.py, from its thread. Test: pytest tests/host/test_replay.py
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

import msgspec

from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.protocol import Error
from blinkimp.trace.arrivals import Arrival, Captured, Outcome, output_digest

LOOK_PERIOD_S: Final = 0.05  # between looks for ended requests, and writes


class ArrivalCapture:
    """One file. Raises OSError, in words, where it cannot be made."""

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
        self._write(Captured(number, arrival=arrival))
        self._live[request] = number, len(delivered)

    def look(self, now: float) -> None:
        """Each turn of the loop: every LOOK_PERIOD_S it writes what has ended."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_PERIOD_S
        ended = [request for request in self._live if request.end is not None]
        for request in ended:
            number, num_before = self._live.pop(request)
            assert request.end is not None, "chosen so"
            output = request.output_ids[num_before:]
            reason = request.end.code if isinstance(request.end, Error) else request.end.reason
            self._write(Captured(number, outcome=Outcome(reason, len(output), output_digest(output))))
        self._file.flush()

    def close(self) -> None:
        self._look_at = 0.0
        self.look(time.monotonic())
        self._file.close()

    def _write(self, line: Captured) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")
