"""What is kept of a fault when its engine is gone: one JSON file each, in `faults` beside the compiled kernels.

    path = write_fault_report(folder, report)       # <folder>/faults/<engine>-<UTC time>.json

The fault record names step, site, block, thread and what a wait or a check expected and saw. A program counter is in none of these: a
kernel that traps or reads a wrong address leaves one only in a core file (host/ENGINE.md, "After a fault").
Called by host/engine_process.py, and by host/engine_slot.py when the engine's process itself died. Test: pytest tests/null/test_fault_report.py
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from blinkimp import __version__
from blinkimp import ring_abi as abi
from blinkimp.host.watchdog import Symptom, Verdict, describe_fault, fault_site_names, state_name

FOLDER_NAME: Final = "faults"
NUM_KEPT: Final = 32  # of one folder; the oldest go

ADVICE: Final = {
    Symptom.FAULT_RECORD: "report the fault file: it names the check that failed",
    Symptom.HEARTBEAT_STALL: "if steps of this model can take that long, raise stall_timeout_s; else report the fault file",
    Symptom.DEVICE_DEATH: "look for the out-of-memory killer in dmesg; lower num_pages or kv_memory_fraction",
    Symptom.CUDA_ERROR: "look for Xid lines in dmesg, run `blinkimp doctor`; CUDA_ENABLE_COREDUMP_ON_EXCEPTION=1 gives a core file "
    "with the program counter of the next one",
    Symptom.HOST_DEATH: "look for the out-of-memory killer in dmesg",
}


class FaultReport(msgspec.Struct, kw_only=True):
    """All that is known. `record` is the device's FaultRecord with its numbers in words, or None."""

    engine_name: str
    at: str  # UTC
    version: str = __version__
    symptom: Symptom
    text: str  # the line of the log
    advice: str
    num_restarts: int  # before this fault
    device: str  # Device.describe()
    model: str
    state: str = ""
    step: int = 0
    record: dict[str, int | str] | None = None
    status: dict[str, int] = {}  # StatusLines


def make_fault_report(
    verdict: Verdict, page: Any, *, engine_name: str, model: str, device: str, num_restarts: int
) -> FaultReport:
    """page: [1] ENGINE_PAGE of the engine that faulted, or None where it is gone."""
    report = FaultReport(
        engine_name=engine_name,
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        symptom=verdict.symptom,
        text=verdict.text,
        advice=ADVICE[verdict.symptom],
        num_restarts=num_restarts,
        device=device,
        model=model,
    )
    if page is None:
        return report
    status = page["status"][0]
    report.status = {name: int(status[name]) for name in abi.STATUS_LINES.names or () if name != "reserved"}
    report.state, report.step = state_name(report.status["state"]), report.status["step"]
    fault = page["fault"][0]
    if int(fault["code"]):
        report.record = {name: int(fault[name]) for name in abi.FAULT_RECORD.names or () if name != "reserved"}
        report.record["site_name"] = fault_site_names().get(int(fault["site"]), "unknown site")
        report.record["in_words"] = describe_fault(fault)
    return report


def write_fault_report(cache_folder: Path, report: FaultReport) -> Path | None:
    """The file's path, or None where none can be written: a fault must not hinder the restart."""
    folder = cache_folder / FOLDER_NAME
    content = msgspec.json.format(msgspec.json.encode(report), indent=2)
    path = folder / f"{report.engine_name}-{report.at.replace(':', '')}-{report.num_restarts}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".new-{os.getpid()}")
        temporary.write_bytes(content)
        temporary.rename(path)
        for old in sorted(folder.glob("*.json"), key=lambda one: one.stat().st_mtime)[:-NUM_KEPT]:
            with contextlib.suppress(FileNotFoundError):  # another server's clean-up took it
                old.unlink()
    except OSError:
        return None
    return path
