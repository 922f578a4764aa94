"""A whole server (`python -m blinkimp.host.supervisor`) for a test: engine, emulated device, ingress processes, all as in production.

Used by tests/host/test_server.py. Test: pytest tests/host/test_server.py
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from blinkimp import ring_abi as abi
from blinkimp.config import Config
from blinkimp.host.shared_memory import SHM_DIR, open_engine_page, open_queue_pair
from tests.host.engine_support import engine_config
from tests.support import ROOT


class ServerProcess:
    """Runs once the constructor has returned: every ingress has said that it serves, unless wait is False."""

    def __init__(self, folder: Path, model: Path | str = "embedded", *, wait: bool = True, **changes: Any) -> None:
        self.config: Config = engine_config(
            model, **{"bind": f"ipc://{folder}/ingress", "log_level": "info", **changes}
        )
        self.log: list[str] = []
        lines: queue.Queue[str] = queue.Queue()
        # Settings go through a file, as an operator's would; strings and numbers look alike in TOML and in repr().
        values = {name: getattr(self.config, name) for name in self.config.__struct_fields__}
        toml = "".join(f'{k} = "{v}"\n' if isinstance(v, str) else f"{k} = {v}\n" for k, v in values.items())
        (folder / "server.toml").write_text(toml)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "blinkimp.host.supervisor", "--config", str(folder / "server.toml")],
            cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

        def read() -> None:
            assert self.process.stderr is not None
            for line in self.process.stderr:
                self.log.append(line)
                lines.put(line)

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()
        if wait:
            self.wait_for_log("serves on", self.config.num_ingress)

    @property
    def endpoints(self) -> list[str]:
        return [self.config.bind, *(f"{self.config.bind}.{idx}" for idx in range(1, self.config.num_ingress))]

    def wait_for_log(self, text: str, num_times: int = 1, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while sum(text in line for line in self.log) < num_times:
            assert self.process.poll() is None, f"the server ended:\n{''.join(self.log)}"
            assert time.monotonic() < deadline, f"{text!r} was not logged {num_times} times:\n{''.join(self.log)}"
            time.sleep(0.01)

    def status(self) -> dict[str, int]:
        with open_engine_page(self.config.engine_name) as page:
            record = page.view(abi.ENGINE_PAGE)["status"][0].copy()
        return {name: int(record[name]) for name in abi.STATUS_LINES.names or () if name != "reserved"}

    def ingress_pid(self, idx: int) -> int:
        """The process that owns queue pair idx."""
        with open_queue_pair(self.config.engine_name, idx) as region:
            return int(region.view(abi.QUEUE_PAIR)["ingress"]["owner_pid"][0])

    def wait(self, timeout_s: float) -> int:
        returncode = self.process.wait(timeout_s)
        self._reader.join(5)
        return returncode

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            print("".join(self.log))
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()
        for path in SHM_DIR.glob(f"blinkimp.{self.config.engine_name}.*"):
            path.unlink()  # of a server that was killed
