"""The process tree of `blinkimp serve`: the engine's process, its device, and the ingress processes.

    python -m blinkimp.host.supervisor [--config FILE]      configuration also from BLINKIMP_* variables

    supervisor (this) -- holds the engine's name, touches no GPU and no token
      |- engine                    host/engine_process.py: loads, launches, watches the device; started anew after a fault
      |    |- emulated device      only without a GPU
      |- ingress 0 .. num_ingress - 1 (ZeroMQ), and one for HTTP where `http` says so: one queue pair each; a dead one is started anew
      |- metrics                  where `metrics` says so: serves what is in shared memory

After a fault the ingresses live on: they submit what is unfinished again to the next engine, with the tokens that clients have already.
SIGTERM or SIGINT drains: new requests are rejected, running ones finish (drain_timeout_s at most, through a fault and a restart if need be),
ingresses flush, exit 0. A second signal stops at once. SIGHUP of a terminal that is closed drains too, however often it comes, unless it was
ignored at the start (nohup); SIGQUIT stops at once. SIGSTOP stops only this process: engine, device and ingresses go on. If this
process dies, the others die with it. Exit status: 0 drained, 1 the engine or an ingress could not start (a port in use, say), or the engine
has faulted too often (max_restarts).
Called by blinkimp/cli and tests. Test: pytest tests/null/test_supervisor.py tests/host/test_server.py tests/host/test_recovery.py
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Final

from blinkimp.config import Config, ConfigError, load_config, model_folder
from blinkimp.host.child_process import EXIT_MISCONFIGURED, ChildProcess
from blinkimp.host.engine_lock import EngineLock, SharedMemoryError
from blinkimp.host.engine_slot import Bars, EngineSlot, Phase
from blinkimp.host.shared_memory import discard_regions, remove_dead_engines
from blinkimp.logs import log_event, set_up_logging
from blinkimp.nic_shim.ingress_flags import limit_arguments
from blinkimp.nic_shim.ingress_limits import HttpLimits, ZmqLimits

_log = logging.getLogger("blinkimp.host.supervisor")  # by this name also when run as a module

WATCH_PERIOD_S: Final = 0.1
INGRESS_FLUSH_S: Final = 5.0  # from the engine's end to the ingress's
CANCEL_GRACE_S: Final = 2.0  # an ingress whose drain timed out tells its clients so
FIRST_BACKOFF_S: Final = 0.1  # before a dead ingress is started anew; doubles each time
MAX_BACKOFF_S: Final = 10.0
HEALTHY_S: Final = 30.0  # an ingress that lived for so long starts again with the first back-off


class ProcessSlot:
    """One place for a process that serves. Starts it again when it dies."""

    def __init__(self, name: str, config: Config, module: str, arguments: list[str]) -> None:
        self.name = name
        self._module = module
        self._arguments = ["--engine", config.engine_name, "--log-level", config.log_level]
        self._arguments += ["--log-format", config.log_format, *arguments]
        self._backoff_s = FIRST_BACKOFF_S
        self._restart_at = 0.0
        self._is_ending = False
        self._has_served = False
        self.child = self._start()

    @property
    def cannot_serve(self) -> bool:
        """It has never served, and what is wrong will not go away by itself: its port is another's, a file of keys cannot be read."""
        return not self._has_served and self.child.returncode() == EXIT_MISCONFIGURED

    def _start(self) -> ChildProcess:
        self._started_at = time.monotonic()
        return ChildProcess(self.name, self._module, self._arguments, on_line=self._on_line)

    def _on_line(self, line: bytes) -> None:
        """`ready ENDPOINT`, on the child's thread."""
        word, _, endpoint = line.decode(errors="replace").strip().partition(" ")
        if word == "ready":
            self._has_served = True
            log_event(
                _log, logging.INFO, "serving", f"{self.name} serves on {endpoint}", child=self.name, endpoint=endpoint
            )

    def ask_to_end(self) -> None:
        """SIGTERM, once: a second one would make it drop what it has not delivered."""
        if not self._is_ending:
            self._is_ending = True
            self.child.send_signal(signal.SIGTERM)

    def look(self) -> None:
        """Restarts a dead process once its back-off is over."""
        now = time.monotonic()
        if self.child.is_alive():
            return
        if self._restart_at == 0.0:
            if now - self._started_at > HEALTHY_S:
                self._backoff_s = FIRST_BACKOFF_S
            text = f"{self.child.describe_exit()}; it is started again in {self._backoff_s:g} s"
            log_event(_log, logging.ERROR, "child_died", text, child=self.name)
            self._restart_at = now + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)
        elif now >= self._restart_at:
            self._restart_at = 0.0
            self.child = self._start()


class IngressSlot(ProcessSlot):
    """Of an ingress process, and its queue pair."""

    def __init__(self, config: Config, idx: int, module: str, arguments: list[str]) -> None:
        self.idx = idx
        # Longer than the engine's drain: what the engine ends at its deadline is still delivered.
        drain_s = config.drain_timeout_s + INGRESS_FLUSH_S
        own = ["--queue-pair", str(idx), "--drain-timeout", str(drain_s), *arguments]
        if config.capture_arrivals:
            own += ["--capture-arrivals", config.capture_arrivals]
        super().__init__(f"ingress {idx}", config, module, own)


class Supervisor:
    """Runs one server until a signal, or faults that no restart helps against."""

    def __init__(self, config: Config, bars: Bars | None = None) -> None:
        self._config = config
        self._bars = bars
        self._num_signals = 0
        self._drain_until = 0.0  # monotonic; no drain yet
        self._is_misconfigured = False
        self._ingresses: list[ProcessSlot] = []  # and the metrics

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        for text in ignored_settings(self._config):
            _log.warning("%s", text)
        try:
            lock = EngineLock(self._config.engine_name)
        except SharedMemoryError as error:
            _log.error("the engine could not start: %s", error)
            return 1
        remove_dead_engines()
        try:
            engine = EngineSlot(self._config, lock, self._bars)
        except OSError as error:  # no process could be made
            _log.error("the engine could not start: %s", error)
            lock.release()
            return 1
        try:
            self._serve(engine)
        except OSError as error:
            _log.error(
                "the server cannot go on: no process can be started: %s; look at `ulimit -u` and free memory", error
            )
            engine.phase = Phase.FAILED
        finally:
            for slot in self._ingresses:
                slot.ask_to_end()
            engine.kill()
            # After the engine: what it ended at its stop is still delivered. Without the lock: they see that none is coming any more.
            discard_regions(lock)
            lock.release()
            self._end_ingresses()
        return 1 if self._is_misconfigured or engine.phase == Phase.FAILED else 0

    def _serve(self, engine: EngineSlot) -> None:
        while self._num_signals == 0:
            phase = engine.look()
            if phase in (Phase.ENDED, Phase.FAILED):
                return
            if phase == Phase.RUNNING:
                self._ingresses = self._ingresses or [*metrics_slots(self._config), *ingress_slots(self._config)]
                for slot in self._ingresses:
                    if slot.cannot_serve:
                        text = "; it has said why above. Correct that, and start again: the server ends"
                        log_event(
                            _log, logging.ERROR, "child_not_started", slot.child.describe_exit() + text, child=slot.name
                        )
                        self._shut_down(engine)
                        self._is_misconfigured = True
                        return
                    slot.look()
            time.sleep(WATCH_PERIOD_S)
        self._shut_down(engine)

    def _shut_down(self, engine: EngineSlot) -> None:
        """Until the engine has ended. One that faults meanwhile is started again for what the ingresses have not finished."""
        self._drain_until = time.monotonic() + self._config.drain_timeout_s
        for slot in self._ingresses:  # from now on they refuse requests themselves, and end when theirs are delivered
            slot.ask_to_end()
        if not engine.is_recovering:
            engine.ask_to_end()
        else:
            _log.info("draining while the engine is started again: requests have %g s", self._config.drain_timeout_s)
        num_signals = 1
        while engine.look() not in (Phase.ENDED, Phase.FAILED):
            if self._num_signals > num_signals:
                num_signals = self._num_signals
                engine.ask_to_end()
            is_over = time.monotonic() > self._drain_until or not any(slot.child.is_alive() for slot in self._ingresses)
            if is_over and not engine.is_ending:
                engine.ask_to_end()
            time.sleep(WATCH_PERIOD_S)

    def _end_ingresses(self) -> None:
        """Until they have delivered what the engine has said: their clients have the drain's time for that, too."""
        slots, self._ingresses = self._ingresses, []
        engine_ended_at = time.monotonic()
        for slot in slots:
            while not slot.child.wait(WATCH_PERIOD_S):
                since = engine_ended_at if self._num_signals > 1 else max(engine_ended_at, self._drain_until)
                if time.monotonic() - since > INGRESS_FLUSH_S + CANCEL_GRACE_S:
                    seconds = time.monotonic() - engine_ended_at
                    _log.warning("%s did not end within %.1f s of the engine's end and is killed", slot.name, seconds)
                    slot.child.send_signal(signal.SIGKILL)
                    slot.child.wait()
                    break

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:  # the kernel sends it to whom the dying shell has sent it
            self._num_signals = max(self._num_signals, 1)
        else:
            self._num_signals += 2 if number == signal.SIGQUIT else 1


def ingress_slots(config: Config) -> list[IngressSlot]:
    """Starts the ingress processes: ZeroMQ on the first queue pairs, HTTP on the next."""
    folder = str(model_folder(config))
    limits = limit_arguments(ZmqLimits.of(config))
    slots = []
    for idx in range(config.num_ingress):
        arguments = ["--bind", endpoint_of(config.bind, idx), "--tokenizer", folder, *limits]
        if config.curve_key:
            arguments += ["--curve-key", config.curve_key, "--curve-clients", config.curve_clients]
        slots.append(IngressSlot(config, idx, "blinkimp.nic_shim.zmq_ingress", arguments))
    if config.http:
        arguments = ["--bind", config.http, "--model-folder", folder, *limit_arguments(HttpLimits.of(config))]
        arguments += ["--model-name", config.served_model_name or config.model, "--api-key-file", config.api_key_file]
        arguments += ["--metrics-prefix", config.metrics_prefix]
        slots.append(IngressSlot(config, config.num_ingress, "blinkimp.nic_shim.http_ingress", arguments))
    return slots


def metrics_slots(config: Config) -> list[ProcessSlot]:
    """Starts the process that serves the metrics, where they have a port of their own."""
    if not config.metrics:
        return []
    arguments = ["--bind", config.metrics, "--metrics-prefix", config.metrics_prefix]
    return [ProcessSlot("metrics", config, "blinkimp.nic_shim.metrics_server", arguments)]


def ignored_settings(config: Config) -> list[str]:
    """What was set and changes nothing, in words."""
    texts = []
    if config.api_key_file and not config.http:
        texts.append(
            "api_key_file is ignored: it is of the HTTP ingress, and there is none; give http too (--http HOST:PORT)"
        )
    if config.trace_op_period and not config.trace_events:
        texts.append("trace_op_period is ignored: there is no trace; give trace_events too (--trace-events 1048576)")
    return texts


def endpoint_of(bind: str, idx: int) -> str:
    """Where ingress idx listens: the first at `bind`, the others at the next ports, or at numbered paths; all at any free port, if it is so."""
    base, colon, port = bind.rpartition(":")
    if idx == 0 or (bind.startswith("tcp://") and port in ("*", "0")):
        return bind
    if bind.startswith("tcp://") and port.isdecimal():
        return f"{base}{colon}{int(port) + idx}"
    return f"{bind}.{idx}"


def serve(config: Config, bars: Bars | None = None) -> int:
    """Runs the server in this process's main thread. Returns the exit status."""
    return Supervisor(config, bars).run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m blinkimp.host.supervisor", description="Runs a blinkimp server.")
    parser.add_argument("--config", type=Path, help="TOML file; BLINKIMP_* variables have precedence")
    arguments = parser.parse_args()
    try:
        config = load_config(path=arguments.config)
    except ConfigError as error:
        print(f"blinkimp: {error}", file=sys.stderr)
        return 1
    set_up_logging(config.log_level, config.log_format, "host", in_background=True)
    return serve(config)


if __name__ == "__main__":
    sys.exit(main())
