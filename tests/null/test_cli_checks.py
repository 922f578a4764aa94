"""The checks of `blinkimp doctor` on machines that lack something. Covers blinkimp/cli/checks.py.

Run: pytest tests/null/test_cli_checks.py
"""

from __future__ import annotations

import os
import resource
import shutil
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from blinkimp import native
from blinkimp.cli import checks
from blinkimp.cli.checks import Verdict
from blinkimp.config import Config, model_folder
from blinkimp.host import gpu_driver, shared_memory, shared_room
from blinkimp.host.checkpoint import read_model_config
from blinkimp.host.trace_memory import TraceGeometry
from tests.checkpoint_support import CONFIG, write_config


def test_packages_are_found_and_missing_ones_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_versions().verdict is Verdict.OK
    monkeypatch.setattr(checks, "PACKAGES", ("numpy", "no-such-package"))
    finding = checks.check_versions()
    assert finding.verdict is Verdict.FAIL
    assert finding.remedy == "pip install no-such-package"


def test_shared_memory_that_is_missing_or_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_shared_memory(Config(), tmp_path / "none").verdict is Verdict.FAIL
    assert checks.check_shared_memory(Config(num_queue_pairs=1, arena_bytes=4096), tmp_path).verdict is Verdict.OK
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=1 << 20))
    finding = checks.check_shared_memory(Config(), tmp_path)
    assert finding.verdict is Verdict.FAIL
    assert "1 MiB free" in finding.found
    assert "--shm-size" in finding.remedy


def test_shared_memory_larger_than_the_memory_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_room, "host_memory_available_bytes", lambda: 1 << 20)
    finding = checks.check_shared_memory(Config(), tmp_path)
    assert finding.verdict is Verdict.FAIL
    assert "1 MiB of memory are available" in finding.found and "--memory" in finding.remedy


@pytest.mark.parametrize(("trace_events", "op_period"), [(0, 0), (0, 8), (1 << 16, 0), (1 << 16, 8)])
def test_shared_memory_is_enough_where_an_engine_starts(
    trace_events: int, op_period: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, and with all that it creates."""
    config = Config(
        num_queue_pairs=2, num_submissions=16, num_completions=64, arena_bytes=4096, trace_events=trace_events,
        trace_op_period=op_period, device="emulated", num_threads=3,
    )  # fmt: skip
    num_ops = 5 * read_model_config(model_folder(config)).num_layers + 3
    op_times = {"op_period": op_period, "num_op_slots": 16, "num_ops": num_ops, "num_workers": 3} if op_period else {}
    geometry = shared_memory.QueuePairGeometry(config.num_submissions, config.num_completions, config.arena_bytes)
    trace = TraceGeometry(trace_events, **op_times) if trace_events else None
    name = f"test-{uuid.uuid4().hex[:12]}"

    def start() -> int:
        """Bytes of what an engine has created."""
        regions = shared_memory.create_engine_regions(
            name, num_queue_pairs=2, geometry=geometry, max_context=256, vocab_size=100, trace=trace
        )
        try:
            paths = [path for path in shared_memory.SHM_DIR.glob(f"blinkimp.{name}.*") if path.suffix != ".lock"]
            return sum(path.stat().st_size for path in paths)
        finally:
            regions.unlink()

    num_bytes = start()
    monkeypatch.setattr(shared_room, "host_memory_available_bytes", lambda: num_bytes)
    assert start() == num_bytes and checks.check_shared_memory(config).verdict is Verdict.OK
    monkeypatch.setattr(shared_room, "host_memory_available_bytes", lambda: num_bytes - 1)
    with pytest.raises(shared_memory.SharedMemoryError, match="memory are available"):
        start()
    assert checks.check_shared_memory(config).verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("settings", "num_ops", "num_workers"),
    [({}, 163, 131), ({"device": "emulated"}, 163, 3), ({"kernel": "hopper"}, 163, 3), ({"load_format": "null"}, 1, 3)],
    ids=["gpu", "emulated", "a gpu without its kernel", "null"],
)
def test_op_times_are_counted_as_the_device_and_the_model_have_them(
    settings: dict[str, Any], num_ops: int, num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability = (8, 0) if "kernel" in settings else (9, 0)
    properties = gpu_driver.GpuProperties("NVIDIA H200", capability, 132, 141 << 30, 13000)
    monkeypatch.setattr(gpu_driver, "probe_gpu", lambda _=0: properties)
    write_config(tmp_path, {**CONFIG, "num_hidden_layers": 32})
    options: dict[str, Any] = {"model": str(tmp_path), "num_threads": 3, **settings}
    expected = TraceGeometry(1 << 16, op_period=8, num_op_slots=16, num_ops=num_ops, num_workers=num_workers)
    assert checks._trace_geometry(Config(trace_events=1 << 16, trace_op_period=8, **options)) == expected


def test_op_times_of_no_model_are_left_to_the_check_of_the_model(tmp_path: Path) -> None:
    config = Config(model=str(tmp_path), trace_events=1 << 16, trace_op_period=8)
    assert checks._trace_geometry(config) == TraceGeometry(1 << 16)
    assert checks.check_model(config).verdict is Verdict.FAIL


def test_shared_memory_for_a_trace_that_cannot_be() -> None:
    finding = checks.check_shared_memory(Config(trace_events=65537))
    assert finding.verdict is Verdict.FAIL and "power of two" in finding.found


def test_shared_memory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks.tempfile, "NamedTemporaryFile", refuse)
    finding = checks.check_shared_memory(Config(), tmp_path)
    assert finding.verdict is Verdict.FAIL
    assert "chmod 1777" in finding.remedy


def test_a_small_limit_of_locked_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    finding = checks.check_locked_memory(Config())
    assert finding.verdict is Verdict.WARN
    assert "ulimit -l" in finding.remedy
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert checks.check_locked_memory(Config()).verdict is Verdict.OK


def test_a_model_is_looked_at(tmp_path: Path) -> None:
    assert checks.check_model(Config()).verdict is Verdict.OK
    missing = checks.check_model(Config(model=str(tmp_path)))
    assert missing.verdict is Verdict.FAIL and f"{tmp_path}/config.json" in missing.found
    folder = tmp_path / "copy"
    shutil.copytree(model_folder(Config()), folder)
    (folder / "chat_template.jinja").write_text("{% for %}")
    broken = checks.check_model(Config(model=str(folder)))
    assert broken.verdict is Verdict.WARN and "expected a Jinja template" in broken.found
    (folder / "generation_config.json").write_text('{"eos_token_id": 99999}')
    outside = checks.check_model(Config(model=str(folder)))
    assert outside.verdict is Verdict.FAIL and "eos_token_id: got 99999" in outside.found


def test_one_core_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert checks.check_cores().verdict is Verdict.WARN


def test_no_compiler_is_a_warning_with_the_package_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    finding = checks.check_compiler()
    assert finding.verdict is Verdict.WARN
    assert "apt-get install g++" in finding.remedy


def test_a_missing_native_library_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, str(tmp_path / "none.so"))
    native.load.cache_clear()
    try:
        finding = checks.check_native_library()
    finally:
        native.load.cache_clear()
    assert finding.verdict is Verdict.FAIL
    assert finding.remedy


def test_a_cache_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = checks.check_cache(Config(cache_dir=str(tmp_path / "file" / "cache")))
    assert finding.verdict is Verdict.WARN and "Not a directory" in finding.found
    assert checks.check_cache(Config(cache_dir=str(tmp_path / "cache"))).verdict is Verdict.OK


def test_no_gpu_fails_only_where_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu(_: int = 0) -> None:
        raise gpu_driver.GpuError("cuInit: got no driver")

    monkeypatch.setattr(gpu_driver, "probe_gpu", no_gpu)
    assert checks.check_gpu(Config()).verdict is Verdict.WARN
    assert checks.check_gpu(Config(device="emulated")).verdict is Verdict.OK
    assert checks.check_gpu(Config(device="gpu")).verdict is Verdict.FAIL
    assert checks.check_driver(Config()).verdict is Verdict.OK
    assert checks.check_driver(Config(device="gpu")).verdict is Verdict.FAIL


@pytest.mark.parametrize(("version", "verdict"), [(12090, Verdict.FAIL), (13000, Verdict.OK)])
def test_an_old_driver_fails(monkeypatch: pytest.MonkeyPatch, version: int, verdict: Verdict) -> None:
    properties = gpu_driver.GpuProperties("NVIDIA H200", (9, 0), 132, 141 << 30, version)
    monkeypatch.setattr(gpu_driver, "probe_gpu", lambda _=0: properties)
    assert checks.check_driver(Config()).verdict is verdict
    assert checks.check_gpu(Config()).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("name", "capability", "kernel"),
    [("NVIDIA A100", (8, 0), "portable"), ("NVIDIA H200", (9, 0), "hopper"), ("NVIDIA B200", (10, 0), "portable")],
)
def test_a_gpu_is_named_with_its_kernel(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], kernel: str
) -> None:
    properties = gpu_driver.GpuProperties(name, capability, 108, 80 << 30, 13000)
    monkeypatch.setattr(gpu_driver, "probe_gpu", lambda _=0: properties)
    finding = checks.check_gpu(Config(device="gpu"))
    assert finding.verdict is Verdict.OK
    assert f"{kernel} kernel" in finding.found


@pytest.mark.parametrize(("capability", "kernel"), [((7, 5), "auto"), ((8, 0), "hopper")])
def test_a_gpu_without_its_kernel(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kernel: Literal["auto", "hopper"]
) -> None:
    properties = gpu_driver.GpuProperties("NVIDIA T4", capability, 40, 16 << 30, 13000)
    monkeypatch.setattr(gpu_driver, "probe_gpu", lambda _=0: properties)
    assert checks.check_gpu(Config(kernel=kernel)).verdict is Verdict.WARN
    finding = checks.check_gpu(Config(device="gpu", kernel=kernel))
    assert finding.verdict is Verdict.FAIL
    assert "NVIDIA T4 has compute capability" in finding.remedy
