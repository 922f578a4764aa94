"""The process tree of `blinkimp serve`: the engine in this process, its device, and the ingress processes.

    python -m blinkimp.host.supervisor [--config FILE]      configuration also from BLINKIMP_* variables

    supervisor (this) -- engine host: watches the device's heartbeat, touches no token
      |- emulated device          only without a GPU
      |- ingress 0 .. num_ingress - 1 (ZeroMQ), and one for HTTP where `http` says so: one queue pair each; a dead one is started anew

SIGTERM or SIGINT drains: new requests are rejected, running ones finish (drain_timeout_s at most), ingresses flush, exit 0. A second
signal stops at once. SIGSTOP stops only this process: device and ingresses go on. If this process dies, the others die with it.
Exit status: 0 drained, 1 the engine could not start or has faulted.
Called by blinkimp/cli and tests. Test: pytest tests/host/test_faults.py
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
from blinkimp.host.child_process import ChildProcess
from blinkimp.host.device_protocol import Progress
from blinkimp.host.engine import Engine, EngineFaultError

_log = logging.getLogger("blinkimp.host.supervisor")  # by this name also when run as a module

WATCH_PERIOD_S: Final = 0.1
INGRESS_FLUSH_S: Final = 5.0  # from the engine's end to the ingress's
FIRST_BACKOFF_S: Final = 0.1  # before a dead ingress is started anew; doubles each time
MAX_BACKOFF_S: Final = 10.0
HEALTHY_S: Final = 30.0  # an ingress that lived for so long starts again with the first back-off


class StartInterrupted(BaseException):
    """A signal came while the engine was loading: there is nothing to drain. Like KeyboardInterrupt, not an Exception."""


class IngressSlot:
    """One place for an ingress process, and its queue pair. Starts it again when it dies."""

    def __init__(self, config: Config, idx: int, module: str, arguments: list[str]) -> None:
        self.idx = idx
        self._module = module
        # Longer than the engine's drain: what the engine ends at its deadline is still delivered.
        drain_s = config.drain_timeout_s + INGRESS_FLUSH_S
        self._arguments = ["--engine", config.engine_name, "--queue-pair", str(idx), "--drain-timeout", str(drain_s)]
        self._arguments += ["--log-level", config.log_level, *arguments]
        self._backoff_s = FIRST_BACKOFF_S
        self._restart_at = 0.0
        self._is_ending = False
        self.child = self._start()

    def _start(self) -> ChildProcess:
        self._started_at = time.monotonic()
        return ChildProcess(f"ingress {self.idx}", self._module, self._arguments, on_line=self._on_line)

    def _on_line(self, line: bytes) -> None:
        """`ready ENDPOINT`, on the child's thread."""
        word, _, endpoint = line.decode(errors="replace").strip().partition(" ")
        if word == "ready":
            _log.info("ingress %d serves on %s", self.idx, endpoint)

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
            _log.error("%s; it is started again in %g s", self.child.describe_exit(), self._backoff_s)
            self._restart_at = now + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)
        elif now >= self._restart_at:
            self._restart_at = 0.0
            self.child = self._start()


class Supervisor:
    """Runs one server until a signal or a fault."""

    def __init__(self, config: Config, progress: Progress | None = None) -> None:
        self._config = config
        self._progress = progress
        self._num_signals = 0
        self._is_starting = True
        self._ingresses: list[IngressSlot] = []

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        engine = None
        try:
            engine = Engine(self._config, progress=self._progress)
            engine.start()
            self._is_starting = False
            return self._serve(engine)
        except StartInterrupted:
            _log.info("stopped by a signal before the engine ran")
            return 0
        except EngineFaultError as error:
            _log.error("%s", error)
        except (RuntimeError, ValueError, OSError) as error:
            # Refusals are of these types (device, driver, compiler, shared memory, checkpoint, sizes), and say what to do.
            _log.error("the engine could not %s: %s", "start" if self._is_starting else "go on", error)
            _log.debug("where", exc_info=True)
        finally:
            self._is_starting = False  # from here on a signal interrupts nothing
            for slot in self._ingresses:
                slot.ask_to_end()
            if engine is not None:
                engine.halt()
            self._end_ingresses()  # after the engine: what it ended at its stop is still delivered
            if engine is not None:
                engine.stop()
        return 1

    def _serve(self, engine: Engine) -> int:
        self._ingresses = ingress_slots(self._config)
        while self._num_signals == 0:
            engine.check()
            for slot in self._ingresses:
                slot.look()
            time.sleep(WATCH_PERIOD_S)
        self._shut_down(engine)
        return 0

    def _shut_down(self, engine: Engine) -> None:
        status = engine.status()
        num_requests = status["num_running"] + status["num_waiting"] + status["num_finishing"]
        timeout_s = self._config.drain_timeout_s
        _log.info("draining: %d requests have %g s to finish; another signal stops at once", num_requests, timeout_s)
        for slot in self._ingresses:  # from now on they refuse requests themselves, and end when theirs are delivered
            slot.ask_to_end()
        if engine.drain(timeout_s, should_give_up=lambda: self._num_signals > 1):
            _log.info("drained")
        else:
            _log.warning("requests were still running when the drain ended; they finish with reason `draining`")

    def _end_ingresses(self) -> None:
        slots, self._ingresses = self._ingresses, []
        deadline = time.monotonic() + INGRESS_FLUSH_S
        for slot in slots:
            if slot.child.wait(max(0.0, deadline - time.monotonic())):
                continue
            _log.warning("ingress %d did not end within %g s and is killed", slot.idx, INGRESS_FLUSH_S)
            slot.child.send_signal(signal.SIGKILL)
            slot.child.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        if self._is_starting:
            raise StartInterrupted


def ingress_slots(config: Config) -> list[IngressSlot]:
    """Starts the ingress processes: ZeroMQ on the first queue pairs, HTTP on the next."""
    folder = str(model_folder(config))
    slots = []
    for idx in range(config.num_ingress):
        arguments = ["--bind", endpoint_of(config.bind, idx), "--tokenizer", folder]
        if config.curve_key:
            arguments += ["--curve-key", config.curve_key, "--curve-clients", config.curve_clients]
        slots.append(IngressSlot(config, idx, "blinkimp.nic_shim.zmq_ingress", arguments))
    if config.http:
        arguments = ["--bind", config.http, "--model-folder", folder]
        arguments += ["--model-name", config.served_model_name or config.model, "--api-key-file", config.api_key_file]
        arguments += ["--max-outstanding", str(config.max_outstanding)]
        arguments += ["--max-requests-per-s", str(config.max_requests_per_s)]
        arguments += ["--burst-requests", str(2 * config.max_requests_per_s)]
        slots.append(IngressSlot(config, config.num_ingress, "blinkimp.nic_shim.http_ingress", arguments))
    return slots


def endpoint_of(bind: str, idx: int) -> str:
    """Where ingress idx listens: the first at `bind`, the others at the next ports, or at numbered paths."""
    if idx == 0 or bind.endswith(":*"):  # any free port
        return bind
    base, colon, port = bind.rpartition(":")
    if bind.startswith("tcp://") and port.isdecimal():
        return f"{base}{colon}{int(port) + idx}"
    return f"{bind}.{idx}"


def serve(config: Config, progress: Progress | None = None) -> int:
    """Runs the server in this process's main thread. Returns the exit status."""
    return Supervisor(config, progress).run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m blinkimp.host.supervisor", description="Runs a blinkimp server.")
    parser.add_argument("--config", type=Path, help="TOML file; BLINKIMP_* variables have precedence")
    arguments = parser.parse_args()
    try:
        config = load_config(path=arguments.config)
    except ConfigError as error:
        print(f"blinkimp: {error}", file=sys.stderr)
        return 1
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(name)s %(levelname)s %(message)s")
    return serve(config)


if __name__ == "__main__":
    sys.exit(main())
