"""Records a running engine: the device's events, those of every ingress, samples of rings, batch and pages, and pings that align the clocks.

    with Recorder("blinkimp", Path("run.trace")) as recorder:
        recorder.run(10.0)

Attaches from outside, reads shared memory and writes a file; the engine does not notice, but for the pings: those go over a queue pair that no
ingress uses, ten a second and only while requests run, so that an engine may park. Called by blinkimp/cli/trace.py.
Test: pytest tests/host/test_trace_recorder.py
"""

from __future__ import annotations

import datetime
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.host.shared_memory import (
    SharedMemoryError,
    engine_is_alive,
    open_engine_page,
    open_ingress_trace,
    open_queue_pair,
    open_trace,
)
from blinkimp.host.trace_info import read_engine_info
from blinkimp.host.trace_reader import TraceReader
from blinkimp.nic_shim.queue_pair import PortStatus, QueuePairError, QueuePairPort
from blinkimp.ring_abi import EngineState, TraceKind
from blinkimp.trace.clock import PING_BIT
from blinkimp.trace.file import Lost, Metadata, TraceFileWriter, make_events

READ_PERIOD_S: Final = 0.002  # 100,000 events a second fill a ring of 65,536 in 0.6 s
SAMPLE_PERIOD_S: Final = 0.005
ALIVE_PERIOD_S: Final = 0.5
PING_PERIOD_S: Final = 0.1
PING_TIMEOUT_S: Final = 0.05  # a step of a large batch may be that long
PING_SPIN_S: Final = 0.0001  # an idle director answers within microseconds; a sleep would be most of what is measured
CLOCK_GRAIN_NS: Final = 2_000  # a GPU's SMs may see its clock change by so much at different moments
FIRST_PINGS: Final = 20
LAST_PINGS: Final = 5
ATTACH_TIMEOUT_S: Final = 2.0


class Pinger:
    """Round trips on a queue pair of our own. Each leaves the device's POLLED event and ours of the answer (blinkimp/trace/clock.py)."""

    def __init__(self, port: QueuePairPort) -> None:
        self.port = port
        self.num_pings = 0
        # Of other recorders', which the director tells of in the same trace, ours are told by these bits.
        self._first_id = int(PING_BIT) | secrets.randbits(30) << 32

    def ping(self) -> list[tuple[int, int, int, int, int, int]]:
        """Events of one ping; none where no answer came in time."""
        ping_id = self._first_id + self.num_pings
        self.num_pings += 1
        self.port.poll()  # of one that was given up
        status, _, seen_ns = self.port.ping(ping_id, spin_s=PING_SPIN_S, timeout_s=PING_TIMEOUT_S)
        entries = self.port.poll()
        if status != PortStatus.OK or not len(entries) or int(entries["request_id"][-1]) != ping_id:
            return []
        return [(seen_ns, int(TraceKind.FIRST_DRAINED), self.port.queue_pair_idx, 0, ping_id, 0)]


class Recorder:
    """Attached from the constructor on. Raises TraceError or SharedMemoryError."""

    def __init__(self, engine_name: str, path: Path, *, pings: bool = True, from_start: bool = False) -> None:
        self.engine_name = engine_name
        region = open_trace(engine_name)
        self.device = TraceReader(region, from_start=from_start)
        self.info = read_engine_info(region, self.device)
        self.num_queue_pairs = self.device.header["num_queue_pairs"]
        self.ingresses = [
            TraceReader(open_ingress_trace(engine_name, idx), from_start=from_start)
            for idx in range(self.num_queue_pairs)
        ]
        self._page = open_engine_page(engine_name)
        self._status = self._page.view(abi.ENGINE_PAGE)["status"]
        self._queue_pairs = [open_queue_pair(engine_name, idx, writable=False) for idx in range(self.num_queue_pairs)]
        self._lines = [region.view(abi.QUEUE_PAIR) for region in self._queue_pairs]
        self.lost_op_samples = 0
        self._slot_written_ns = [0] * self.device.header["num_op_slots"]
        self._last_samples: dict[tuple[int, int], int] = {}
        self.writer = TraceFileWriter(
            path,
            num_ops=self.device.header["num_ops"],
            num_workers=self.device.header["num_workers"],
            begin_ns=time.monotonic_ns(),
        )
        # Last: its thread writes to a queue pair until it is closed, and a constructor that fails before leaves none to a process that ends.
        self._pinger = self._open_pinger() if pings else None

    @property
    def has_pings(self) -> bool:
        return self._pinger is not None

    @property
    def lost(self) -> Lost:
        return Lost(self.device.num_lost, sum(reader.num_lost for reader in self.ingresses), self.lost_op_samples)

    def _open_pinger(self) -> Pinger | None:
        """On the last queue pair that is nobody's; not on one that an ingress of the configuration will want."""
        config = self.info.config
        num_taken = int(config.get("num_ingress", 0)) + bool(config.get("http", ""))
        for idx in range(self.num_queue_pairs - 1, num_taken - 1, -1):
            words = self._lines[idx]["ingress"]
            if int(words["owner_pid"][0]):
                continue
            try:
                port = QueuePairPort.open(self.engine_name, idx)
            except (QueuePairError, SharedMemoryError):
                continue
            try:
                port.attach(ATTACH_TIMEOUT_S)
                port.start_heartbeat()
            except QueuePairError:
                port.close()
                continue
            return Pinger(port)
        return None

    # ---- Recording ---------------------------------------------------------------------------------------------------
    def run(
        self,
        seconds: float,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int, Lost, float], None] = lambda *_: None,
    ) -> Metadata:
        """Until the time is over, should_stop() says so, or the engine is gone; then finishes the file. progress(events, lost, seconds)."""
        begin_s = time.monotonic()
        sample_at = alive_at = 0.0
        ping_at, num_first_pings = 0.0, FIRST_PINGS
        ended_by = ""
        while not ended_by:
            now = time.monotonic()
            if now - begin_s >= seconds:
                ended_by = "time"
            elif should_stop():
                ended_by = "interrupt"
            elif now >= alive_at:
                alive_at = now + ALIVE_PERIOD_S
                ended_by = self._why_it_ends()
                progress(self.writer.num_events, self.lost, now - begin_s)
            if now >= sample_at:
                sample_at = now + SAMPLE_PERIOD_S
                self.writer.append(make_events(self._samples()))
            if self._pinger is not None and now >= ping_at and self._may_ping(num_first_pings > 0):
                self.writer.append(make_events(self._pinger.ping()))
                num_first_pings = max(0, num_first_pings - 1)
                ping_at = now + (0.0 if num_first_pings else PING_PERIOD_S)
            self._read()
            time.sleep(READ_PERIOD_S)
        if self._pinger is not None and not ended_by.startswith("the engine"):
            for _ in range(LAST_PINGS if self._may_ping(True) else 0):
                self.writer.append(make_events(self._pinger.ping()))
                time.sleep(READ_PERIOD_S)
        self.writer.append(make_events(self._samples()))
        self._read()
        return self._finish(ended_by)

    def _why_it_ends(self) -> str:
        """What became of the engine; empty while it is there. One that was started anew has other regions under the same names."""
        if not engine_is_alive(self.engine_name):
            return "the engine has ended"
        try:
            with open_engine_page(self.engine_name) as page:
                engine_id = int(page.view(abi.ENGINE_HEADER)[0]["engine_id"])
        except SharedMemoryError:
            return "the engine has ended"
        return "" if engine_id == self.device.header["engine_id"] else "the engine was started anew"

    def _finish(self, ended_by: str) -> Metadata:
        metadata = Metadata(
            recorded_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            engine_id=self.device.header["engine_id"],
            engine=self.info,
            lost=self.lost,
            num_queue_pairs=self.num_queue_pairs,
            num_pings=self._pinger.num_pings if self._pinger is not None else 0,
            sample_period_s=SAMPLE_PERIOD_S,
            ended_by=ended_by,
        )
        self.writer.finish(metadata, time.monotonic_ns())
        return metadata

    def _read(self) -> None:
        events = self.device.read()
        self.writer.append(events)
        if self.device.header["op_period"]:
            self._keep_op_samples(events[events["kind"] == int(TraceKind.OP_TIMES)])
        for reader in self.ingresses:
            self.writer.append(reader.read())

    def _keep_op_samples(self, events: NDArray[np.void]) -> None:
        for event in events:
            times = self.device.op_times(event)
            slot, ended_ns = int(event["argument"]), int(event["time_ns"])
            before_ns, self._slot_written_ns[slot] = self._slot_written_ns[slot], ended_ns
            if int(times.max(initial=0)) > ended_ns + CLOCK_GRAIN_NS:  # a later step has begun to write the slot
                self.lost_op_samples += 1
                continue
            times[times <= before_ns] = 0  # of the step that had the slot before: this worker has written nothing
            if not times.any():  # nor has any: a GPU's workers keep no times under orchestrator=cpu
                continue
            self.writer.append_op_sample(int(event["step"]), ended_ns, times)

    def _may_ping(self, even_if_idle: bool) -> bool:
        """A parked engine stays parked; an idle one is left alone, but at the recording's ends."""
        status = self._status[0]
        if int(status["state"]) != EngineState.RUNNING:
            return False
        return even_if_idle or bool(int(status["num_running"]) or int(status["num_waiting"]))

    def _samples(self) -> list[tuple[int, int, int, int, int, int]]:
        """What has changed since the last look."""
        now_ns = time.monotonic_ns()
        status = self._status[0]
        step = int(status["step"]) & 0xFFFFFFFF
        found = {
            (int(TraceKind.BATCH), 0): int(status["num_running"]) | int(status["num_waiting"]) << 32,
            (int(TraceKind.PAGES), 0): int(status["num_pages_used"]) | int(status["num_pages_cached"]) << 32,
        }
        for idx, words in enumerate(self._lines):
            ingress, director = words["ingress"][0], words["director"][0]
            # Two words of two writers: one may be older. Consumers first, so that an occupancy is never below 0.
            taken, read = int(director["submission_consumer_pos"]), int(ingress["completion_consumer_pos"])
            submitted, said = int(ingress["submission_producer_pos"]), int(director["completion_producer_pos"])
            found[int(TraceKind.RINGS), idx] = max(0, submitted - taken) | max(0, said - read) << 32
        changed = {key: value for key, value in found.items() if self._last_samples.get(key) != value}
        self._last_samples.update(changed)
        return [(now_ns, kind, idx, step, 0, value) for (kind, idx), value in changed.items()]

    def close(self) -> None:
        self.writer.close()
        if self._pinger is not None:
            self._pinger.port.close()
        del self._status, self._lines
        for reader in (self.device, *self.ingresses):
            reader.close()
        for region in (self._page, *self._queue_pairs):
            region.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
