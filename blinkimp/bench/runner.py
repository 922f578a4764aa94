"""Runs a load against a target, open or closed loop, and puts the figures together.

    report = asyncio.run(run_load(plan_options, target, slos={}, progress=...))

Open loop: each request is sent when it is meant to be, whatever the others do; where the client is late, or a cap on concurrency holds it back,
the latency from the intended time tells. Closed loop: `concurrency` requests at a time, the next one when one ends.
Called by blinkimp/cli/bench.py and blinkimp/lab. Test: pytest tests/host/test_bench_load.py
"""

from __future__ import annotations

import asyncio
import datetime
import gc
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from blinkimp import __version__
from blinkimp.bench.errors import LoadError
from blinkimp.bench.load_plan import LoadOptions, LoadPlan, make_plan
from blinkimp.bench.metrics import Window, details_of, figures_of, floors_of, inferencex_keys, inferencex_power_keys
from blinkimp.bench.openai_backend import OpenAiBackend
from blinkimp.bench.record import Record
from blinkimp.bench.replay import ReplayPlan, compare_outputs
from blinkimp.bench.zmq_backend import ZmqBackend
from blinkimp.host.power import PowerMeter, PowerSource, idle_power_w, per_token
from blinkimp.trace.arrivals import Arrival
from blinkimp.transport import Security

SPIN_NS: Final = 1_000_000  # asyncio's timers are a millisecond coarse: the last one is spun away
OPEN_TIMEOUT_S: Final = 10.0
IDLE_S: Final = 2.0  # how long the server's power is looked at before the load, where no idle power is given

Progress = Callable[[str, int, int], None]  # what, done, of how many


@dataclass(frozen=True)
class Target:
    """What is loaded: connect (ZeroMQ endpoint) or url (OpenAI-compatible)."""

    connect: str | None = None
    url: str | None = None
    model_name: str | None = None
    api_key: str | None = None
    vocab_size: int | None = None
    chat: bool = False
    num_gpus: int = 1
    label: str = ""
    security: Security | None = None  # CURVE, of connect

    def __post_init__(self) -> None:
        if (self.connect is None) == (self.url is None):
            raise LoadError(
                f"target: got connect {self.connect} and url {self.url}; expected one of them: --connect or --url"
            )
        of_http = {"--model-name": self.model_name, "--api-key": self.api_key, "--chat": self.chat}
        if self.connect is not None and (unused := [flag for flag, value in of_http.items() if value]):
            raise LoadError(
                f"target: got {' and '.join(unused)} beside --connect; expected them with --url; ZeroMQ's keys are --server-key, --client-key"
            )
        if self.num_gpus < 1:
            raise LoadError(
                f"target: got {self.num_gpus} GPUs; expected at least 1: figures per GPU are divided by --num-gpus"
            )


class Backend(Protocol):
    """zmq_backend.py, openai_backend.py."""

    name: str
    model: str
    vocab_size: int
    max_context: int | None
    tells_tokens: bool  # ids come back, not only text

    async def open(self, timeout_s: float) -> None: ...
    def prepare(self, output_len: int, prompt: list[int], arrival: Arrival | None = None) -> Any: ...
    def submit(self, record: Record, prepared: Any) -> None: ...
    async def close(self) -> None: ...


def make_backend(target: Target, on_end: Callable[[Record], None]) -> Backend:
    if target.connect is not None:
        return ZmqBackend(target.connect, on_end, security=target.security)
    assert target.url is not None
    return OpenAiBackend(
        target.url,
        on_end,
        model=target.model_name,
        api_key=target.api_key,
        vocab_size=target.vocab_size,
        chat=target.chat,
    )


class LoadRun:
    """One load while it runs. Invariant: every submitted record ends exactly once, at the latest by give_up()."""

    def __init__(self, plan: LoadPlan, backend: Backend, progress: Progress) -> None:
        self.plan, self.backend, self._progress = plan, backend, progress
        self.records: list[Record] = []
        self.num_running = self.num_ended = 0
        self.ended_early = False  # a trace had fewer requests than the duration would take
        self._waiting: deque[Record] = deque()  # meant to be sent, held back by the cap on concurrency
        self._freed: deque[int] = deque()  # when places of a closed loop became free, in ns
        self._changed = asyncio.Event()
        self._prepared: dict[int, Any] = {}  # requests ahead of their time, by index
        for idx in range(min(len(plan), plan.options.concurrency or 1)):
            self._prepare(idx)

    def on_end(self, record: Record) -> None:
        self.num_running -= 1
        self.num_ended += 1
        self._freed.append(record.ended_ns)
        self._changed.set()
        if self._waiting:
            self._send(self._waiting.popleft())

    def make(self, idx: int, intended_ns: int) -> Record:
        record = Record(idx, int(self.plan.input_lens[idx]), int(self.plan.output_lens[idx]), intended_ns)
        if self.plan.arrival(idx) is not None and self.backend.tells_tokens:
            record.token_ids = []
        self.records.append(record)
        return record

    def offer(self, record: Record) -> None:
        """Sends, or keeps waiting under the cap."""
        most = self.plan.options.concurrency
        if most is not None and self.num_running >= most:
            self._waiting.append(record)
        else:
            self._send(record)

    def _send(self, record: Record) -> None:
        self.num_running += 1
        self.backend.submit(record, self._prepared.pop(record.idx))

    def _prepare(self, idx: int) -> None:
        """While there is time: a prompt of thousands of tokens takes a millisecond to draw and to encode."""
        if idx < len(self.plan) and idx not in self._prepared:
            output_len, prompt = int(self.plan.output_lens[idx]), self.plan.prompt(idx)
            self._prepared[idx] = self.backend.prepare(output_len, prompt, self.plan.arrival(idx))

    async def run(self, begin_ns: int) -> int:
        """Sends everything; returns when sending ended, in ns."""
        await (self._run_closed(begin_ns) if self.plan.intended_s is None else self._run_open(begin_ns))
        return time.monotonic_ns()

    async def _run_open(self, begin_ns: int) -> None:
        assert self.plan.intended_s is not None
        for idx, at_s in enumerate(self.plan.intended_s):
            intended_ns = begin_ns + int(at_s * 1e9)
            self._prepare(idx)
            await sleep_until(intended_ns)
            self.offer(self.make(idx, intended_ns))
            self._progress("requests", self.num_ended, len(self.plan))
        duration_s = self.plan.options.duration_s
        if duration_s is not None:
            await sleep_until(begin_ns + int(duration_s * 1e9))

    async def _run_closed(self, begin_ns: int) -> None:
        options = self.plan.options
        end_ns = None if options.duration_s is None else begin_ns + int(options.duration_s * 1e9)
        assert options.concurrency is not None
        for idx in range(len(self.plan)):
            self._prepare(idx)
            # A ramp starts its users one after the other.
            user_ns = begin_ns + int(options.ramp_s * 1e9 * min(idx, options.concurrency) / options.concurrency)
            if idx < options.concurrency and options.ramp_s > 0:
                await sleep_until(user_ns)
            if not await self._wait_for_place(min(idx + 1, options.concurrency), end_ns):
                return
            now_ns = time.monotonic_ns()
            if end_ns is not None and now_ns >= end_ns:
                return
            if (
                idx <= options.concurrency
            ):  # users on their first request, and those whose first ended before the ramp did
                self._freed.clear()
            self.offer(self.make(idx, self._freed.popleft() if self._freed else now_ns))
            if end_ns is None:
                self._progress("requests", self.num_ended, len(self.plan))
            else:
                self._progress("seconds", (now_ns - begin_ns) // 10**9, (end_ns - begin_ns) // 10**9)
        if end_ns is None:
            return
        if options.trace is None:
            raise LoadError(
                f"closed loop: its {len(self.plan)} requests were used up before the duration; expected fewer; "
                "give --num-requests in place of --duration"
            )
        # With all places taken until the duration's end, nothing was missing.
        is_free = await self._wait_for_place(options.concurrency, end_ns)
        self.ended_early = is_free and time.monotonic_ns() < end_ns

    async def _wait_for_place(self, num_places: int, end_ns: int | None) -> bool:
        """False: the load's end came first."""
        while self.num_running >= num_places:
            self._changed.clear()
            if not await wait_until(self._changed, end_ns):
                return False
        return True

    async def drain(self, timeout_s: float) -> None:
        """Waits for what was sent; what is not there by then has failed."""
        deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        while self.num_running or self._waiting:
            self._changed.clear()
            self._progress("draining", self.num_ended, len(self.records))
            if not await wait_until(self._changed, deadline_ns):
                break
        self.give_up(f"unfinished {timeout_s:g} s after the load's end")

    def give_up(self, why: str) -> None:
        """What has not ended does now."""
        now_ns = time.monotonic_ns()
        for record in self.records:
            if not record.is_ended:
                record.is_cut = True
                record.end(now_ns, error=why)


async def sleep_until(at_ns: int) -> None:
    """To a few microseconds, where the loop has nothing else to do."""
    left_ns = at_ns - time.monotonic_ns()
    if left_ns > SPIN_NS:
        await asyncio.sleep((left_ns - SPIN_NS) / 1e9)
    while time.monotonic_ns() < at_ns:
        await asyncio.sleep(0)


async def wait_until(event: asyncio.Event, deadline_ns: int | None) -> bool:
    """False: the deadline came first."""
    if deadline_ns is None:
        await event.wait()
        return True
    try:
        await asyncio.wait_for(event.wait(), max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9))
    except TimeoutError:
        return False
    return True


async def run_load(
    options: LoadOptions,
    target: Target,
    *,
    slos: Mapping[str, float] | None = None,
    progress: Progress = lambda *_: None,
    drain_s: float = 120.0,
    source: PowerSource | None = None,
    idle_w: float | None = None,
    details: bool = False,
    floors: bool = False,
    keeps_when_cancelled: bool = False,
) -> dict[str, Any]:
    """The report of one load: vLLM's keys, this tool's own, energy, and InferenceX's under `inferencex`.

    idle_w is subtracted for one of the two energy figures; None: the GPU's power before the load, with the server running, is measured.
    details: vLLM's lists of each request. floors: `floors_ms`, the latencies that cells of the lab are compared by, of each request.
    keeps_when_cancelled: a load that is cancelled (Ctrl-C) ends there, `stopped_early`, with what it has measured."""
    runs: list[LoadRun] = []
    backend = make_backend(target, lambda record: runs[0].on_end(record))
    metered = source if target.num_gpus == 1 else None  # a source is one GPU: its joules are not those of several
    try:
        await backend.open(OPEN_TIMEOUT_S)
        plan = make_plan(options, target.vocab_size or backend.vocab_size)
        check_fits(plan, backend.max_context)
        run = LoadRun(plan, backend, progress)
        runs.append(run)
        idle_source = "given" if idle_w is not None else "measured right before the load"
        if idle_w is None:
            idle_w = await asyncio.to_thread(idle_power_w, metered, IDLE_S)
        gc.collect()
        gc.disable()  # a collection in the middle of a load is a late token that the server did not cause
        try:
            with PowerMeter(metered) as meter:
                begin_ns = time.monotonic_ns()
                sent_ns, stopped_early = None, False
                try:
                    sent_ns = await run.run(begin_ns)
                    await run.drain(drain_s)
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if not keeps_when_cancelled or task is None:
                        raise
                    task.uncancel()
                    stopped_early = True
                    run.give_up("on its way when the load was stopped")
                end_ns = time.monotonic_ns()
                sent_ns = sent_ns or end_ns
        finally:
            gc.enable()
    finally:
        await backend.close()
    window = Window.of(run.records, begin_ns + int(options.warmup_s * 1e9), sent_ns)
    if not window.records:
        raise LoadError(
            f"load: no request was meant to be sent after the {options.warmup_s:g} s of warm-up; expected some; make it longer"
        )
    figures = figures_of(run.records, window, slos or {})
    energy_j = meter.energy_j(begin_ns, end_ns)
    tokens = sum(record.num_output_tokens for record in run.records)
    concurrency = options.concurrency
    isl, osl = lengths_of(options, window)
    facts = {
        "model": backend.model,
        "framework": target.label or backend.name,
        "hw": "cpu" if source is None else source.name,
        "precision": "bf16",
        "image": f"blinkimp {__version__}",
        "infmax_model_prefix": backend.model,
        "conc": concurrency or 0,
        "isl": isl,
        "osl": osl,
    }
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": backend.name,
        "backend": backend.name,
        "label": target.label or None,
        "model_id": backend.model,
        "tokenizer_id": backend.model,
        "num_prompts": len(window.records),
        "request_rate": request_rate_of(plan),
        "burstiness": options.to_json()["burstiness"] if options.rate is not None else None,
        "max_concurrency": concurrency,
        "stopped_early": stopped_early,
        "ended_early": run.ended_early,
        **figures,
        **(queue_inclusive(figures) if options.rate is not None and concurrency is not None else {}),
        "gpu_energy": {
            **per_token(energy_j, (end_ns - begin_ns) / 1e9, tokens, idle_w),
            "idle_w": idle_w,
            "idle_source": idle_source if metered is not None else None,
            "sm_clock_mhz": mean_clock_mhz(meter, begin_ns, end_ns),
            "left_out": None
            if metered is source
            else f"one GPU is measured, and the load is that of {target.num_gpus}",
        },
        "load": options.to_json(),
        **({"replay": compare_outputs(plan, run.records)} if isinstance(plan, ReplayPlan) else {}),
        "blinkimp_version": __version__,
        "inferencex": {
            **inferencex_keys(figures, num_gpus=target.num_gpus, **facts),
            **inferencex_power_keys(run.records, energy_j, meter.power_w(begin_ns, end_ns)),
        },
        "error_counts": counts([record.error for record in window.records if record.error]),
        **(details_of(window) if details else {}),
        **({"floors_ms": floors_of(window)} if floors else {}),
    }


def request_rate_of(plan: LoadPlan) -> float | str | None:
    """vLLM's key: the rate asked for, "inf" of a closed loop. Of times that a file gave their mean rate, None where they are one moment."""
    if plan.options.rate is not None:
        return plan.options.rate
    if plan.intended_s is None:
        return "inf"
    span_s = float(plan.intended_s.max() - plan.intended_s.min())
    return len(plan) / span_s if span_s > 0 else None


def lengths_of(options: LoadOptions, window: Window) -> tuple[int, int]:
    """InferenceX's isl and osl: the lengths asked for, or the most of a range, as it has them; of other requests the means."""
    if options.input_len is not None and options.output_len is not None:
        return options.input_len, options.output_len
    inputs = [record.input_len for record in window.records]
    outputs = [r.num_output_tokens if r.is_complete else r.output_len for r in window.records]
    return round(sum(inputs) / len(inputs)), round(sum(outputs) / len(outputs))


def queue_inclusive(figures: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's keys for latency that counts what a cap on concurrency held back; the same as `_intended`, by the name it has there."""
    return {
        key.replace("e2el_intended", "e2el_including_client_queue"): value
        for key, value in figures.items()
        if "e2el_intended" in key
    }


def mean_clock_mhz(meter: PowerMeter, begin_ns: int, end_ns: int) -> float | None:
    """Of the GPU's multiprocessors; None without a GPU that tells."""
    clocks = [reading.sm_clock_mhz for at_ns, reading in meter.samples() if begin_ns <= at_ns <= end_ns]
    return sum(clocks) / len(clocks) if clocks else None


def check_fits(plan: LoadPlan, max_context: int | None) -> None:
    longest = int((plan.input_lens + plan.output_lens).max())
    if max_context is not None and longest > max_context:
        raise LoadError(
            f"load: a request of {longest} tokens, prompt and output; expected at most the server's {max_context}; choose shorter lengths"
        )


def counts(errors: list[str]) -> dict[str, int]:
    return {error: errors.count(error) for error in dict.fromkeys(errors)}
