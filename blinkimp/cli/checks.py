"""The checks of `blinkimp doctor`: each looks at one thing and returns a Finding.

Called by blinkimp/cli/doctor.py. Test: pytest tests/host/test_cli.py tests/null/test_cli_checks.py
"""

from __future__ import annotations

import enum
import importlib.metadata
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from blinkimp import __version__, native
from blinkimp.config import Config, cache_folder, model_folder
from blinkimp.outputs import OutputError, make_folder

if TYPE_CHECKING:
    from blinkimp.host.trace_memory import TraceGeometry

NUM_PINGS = 500
PING_TIMEOUT_S = 5.0
PING_SPIN_S = 0.001  # the emulated device may have gone to sleep
PACKAGES = (
    "numpy",
    "pyzmq",
    "msgspec",
    "tokenizers",
    "safetensors",
    "cuda-bindings",
    "cuda-core",
    "nvidia-cuda-nvrtc",
)


class Verdict(enum.Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(msgspec.Struct, frozen=True):
    what: str
    verdict: Verdict
    found: str
    remedy: str = ""


def check_versions() -> Finding:
    versions, missing = [f"blinkimp {__version__}", f"Python {platform.python_version()}"], []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        remedy = f"pip install {' '.join(missing)}"
        return Finding("packages", Verdict.FAIL, f"{', '.join(versions)}; missing: {', '.join(missing)}", remedy)
    return Finding("packages", Verdict.OK, ", ".join(versions))


def check_gpu(config: Config) -> Finding:
    from blinkimp.host.gpu_driver import GpuError, probe_gpu
    from blinkimp.host.gpu_kernel import KernelChoiceError, choose_kernel

    if config.device == "emulated":
        return Finding("GPU", Verdict.OK, "not asked for: device = emulated")
    try:
        gpu = probe_gpu()
    except GpuError as error:
        if config.device == "gpu":
            return Finding(
                "GPU", Verdict.FAIL, str(error), "install the driver and check nvidia-smi, or use --device emulated"
            )
        remedy = "to serve from a GPU: install the NVIDIA driver, check nvidia-smi and CUDA_VISIBLE_DEVICES"
        return Finding("GPU", Verdict.WARN, f"none usable, the emulated device serves ({error})", remedy)
    found = f"{gpu.name}, {gpu.arch}, {gpu.num_multiprocessors} SMs, {gpu.total_bytes / 2**30:.0f} GiB"
    try:
        kind = choose_kernel(config.kernel, gpu.compute_capability, gpu.name)
    except KernelChoiceError as error:
        verdict = Verdict.FAIL if config.device == "gpu" else Verdict.WARN
        return Finding("GPU", verdict, found, str(error))
    return Finding("GPU", Verdict.OK, f"{found}; {kind} kernel")


def check_driver(config: Config) -> Finding:
    from blinkimp.host.gpu_driver import GpuError, probe_gpu

    try:
        version = probe_gpu().driver_version
    except GpuError:
        verdict = Verdict.FAIL if config.device == "gpu" else Verdict.OK
        return Finding("driver", verdict, "no NVIDIA driver with a device; not needed by the emulated device")
    found = f"supports CUDA {version // 1000}.{version % 1000 // 10}"
    if version < 13000:
        return Finding("driver", Verdict.FAIL, found, "kernels are compiled for CUDA 13: install driver 580 or newer")
    return Finding("driver", Verdict.OK, found)


def check_nvrtc() -> Finding:
    from blinkimp.host.compile import CompileError, nvrtc_version

    try:
        version = nvrtc_version()
    except CompileError as error:
        return Finding("NVRTC", Verdict.FAIL, str(error), "pip install 'nvidia-cuda-nvrtc>=13,<14'")
    if not version.startswith("13."):
        return Finding("NVRTC", Verdict.FAIL, version, "pip install 'nvidia-cuda-nvrtc>=13,<14'")
    return Finding("NVRTC", Verdict.OK, version)


def check_device_sources() -> Finding:
    from blinkimp.host.compile import DEVICE_DIR
    from blinkimp.host.gpu_kernel import KERNEL_SOURCE, PACK_SOURCE, PORTABLE_SOURCE, STEP_SOURCE

    sources = ("ring_abi.h", KERNEL_SOURCE, PORTABLE_SOURCE, PACK_SOURCE, STEP_SOURCE)
    missing = [name for name in sources if not (DEVICE_DIR / name).is_file()]
    if missing:
        return Finding("kernel sources", Verdict.FAIL, f"{DEVICE_DIR} lacks {', '.join(missing)}", "reinstall blinkimp")
    return Finding("kernel sources", Verdict.OK, str(DEVICE_DIR))


def check_compiler() -> Finding:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        if path := shutil.which(name):
            return Finding("C++ compiler", Verdict.OK, path)
    remedy = "needed to install from source: apt-get install g++ (Debian, Ubuntu), or set CXX"
    return Finding("C++ compiler", Verdict.WARN, f"none of {', '.join(names)} on PATH", remedy)


def check_native_library() -> Finding:
    try:
        native.load()
    except native.NativeLibraryError as error:
        return Finding("native library", Verdict.FAIL, str(error), "install g++, then reinstall blinkimp")
    return Finding("native library", Verdict.OK, str(native.library_path()))


def check_locked_memory(config: Config) -> Finding:
    """Queue pairs are registered with CUDA, which locks their pages."""
    from blinkimp.host.shared_memory import QueuePairGeometry

    soft_bytes, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    geometry = QueuePairGeometry(config.num_submissions, config.num_completions, config.arena_bytes)
    needed_bytes = config.num_queue_pairs * geometry.region_bytes
    if soft_bytes == resource.RLIM_INFINITY:
        return Finding("locked memory", Verdict.OK, f"unlimited; queue pairs take {needed_bytes / 2**20:.0f} MiB")
    found = f"limit {soft_bytes / 2**20:.0f} MiB; queue pairs take {needed_bytes / 2**20:.0f} MiB"
    if soft_bytes < needed_bytes:
        remedy = "matters only where registering memory with the GPU fails: ulimit -l unlimited, or lower arena_bytes"
        return Finding("locked memory", Verdict.WARN, found, remedy)
    return Finding("locked memory", Verdict.OK, found)


def check_shared_memory(config: Config, folder: Path = Path("/dev/shm")) -> Finding:
    """Of all that an engine takes, but some KB by which it describes itself in the trace: known only to one that starts."""
    from blinkimp.host.shared_memory import QueuePairGeometry
    from blinkimp.host.shared_room import shared_room

    what = "shared memory"
    if not folder.is_dir():
        return Finding(what, Verdict.FAIL, f"{folder} does not exist", f"mount -t tmpfs tmpfs {folder}")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="blinkimp-doctor-"):
            pass
    except OSError as error:
        remedy = f"expected mode 1777: chmod 1777 {folder}, and a mount that is not read-only"
        return Finding(what, Verdict.FAIL, f"{folder} cannot be written: {error.strerror}", remedy)
    geometry = QueuePairGeometry(config.num_submissions, config.num_completions, config.arena_bytes)
    try:
        trace = _trace_geometry(config)
    except ValueError as error:
        return Finding(what, Verdict.FAIL, str(error), "correct trace_events")
    room = shared_room(config.num_queue_pairs, geometry.region_bytes, trace, folder)
    found = f"{folder}: {room.free_bytes / 2**20:.0f} MiB free; an engine takes {room.needed_bytes / 2**20:.0f} MiB"
    if room.is_enough:
        return Finding(what, Verdict.OK, found)
    lower = "lower num_queue_pairs, arena_bytes, num_completions or trace_events"
    if room.memory_bytes < room.needed_bytes:
        found += f", but {room.memory_bytes / 2**20:.0f} MiB of memory are available"
        remedy = f"{lower}, end what takes the memory, or raise the container's limit (docker run --memory)"
        return Finding(what, Verdict.FAIL, found, remedy)
    remedy = f"mount -o remount,size=1G /dev/shm (docker run --shm-size 1g), or {lower}"
    return Finding(what, Verdict.FAIL, found, remedy)


def _trace_geometry(config: Config) -> TraceGeometry | None:
    """Without op times where there is no model to have any: check_model() says so. Raises ValueError."""
    from blinkimp.host.checkpoint import read_model_config
    from blinkimp.host.engine import num_workers_of
    from blinkimp.host.program import num_program_ops
    from blinkimp.host.trace_memory import trace_geometry

    if not config.trace_events or not config.trace_op_period:
        return trace_geometry(config, 0, 0)
    try:
        num_ops = num_program_ops(read_model_config(model_folder(config)), config.load_format)
    except (ValueError, OSError):
        return trace_geometry(msgspec.structs.replace(config, trace_op_period=0), 0, 0)
    return trace_geometry(config, num_ops, num_workers_of(config))


def check_cores() -> Finding:
    num_cores = len(os.sched_getaffinity(0))
    if num_cores < 2:
        remedy = "the emulated device and the ingress each want a core: allow two (taskset, docker run --cpus)"
        return Finding("CPU cores", Verdict.WARN, f"{num_cores} usable", remedy)
    return Finding("CPU cores", Verdict.OK, f"{num_cores} usable")


def check_cache(config: Config) -> Finding:
    folder = cache_folder(config)
    try:
        make_folder(folder)
    except OutputError as error:
        remedy = "every start would compile: set cache_dir (BLINKIMP_CACHE_DIR) to a folder that can be written"
        return Finding("compile cache", Verdict.WARN, str(error), remedy)
    num_kernels = sum(1 for _ in folder.glob("kernels/*/kernel.cubin"))
    return Finding("compile cache", Verdict.OK, f"{folder}: {num_kernels} kernels")


def check_model(config: Config) -> Finding:
    """What the engine reads before it reads weights."""
    from blinkimp.host.checkpoint import read_eos_ids, read_model_config
    from blinkimp.host.model_config import UnsupportedModelError
    from blinkimp.nic_shim.chat_template import ChatTemplate, ChatTemplateError
    from blinkimp.nic_shim.tokenizer import Tokenizer, TokenizerError

    folder = model_folder(config)
    try:
        model = read_model_config(folder)
        read_eos_ids(folder, model.vocab)
        Tokenizer(folder)
    except (UnsupportedModelError, TokenizerError, OSError) as error:
        return Finding("model", Verdict.FAIL, str(error), "give --model a folder with a checkpoint that can be served")
    try:
        ChatTemplate(folder)
    except ChatTemplateError as error:
        return Finding("model", Verdict.WARN, str(error), "neither --http nor `blinkimp chat` works with it")
    return Finding("model", Verdict.OK, f"{folder}: {model.num_layers} layers, {model.vocab} tokens")


def check_round_trip(config: Config) -> Finding:
    """A whole engine, and pings through a queue pair of it: shared memory, director and both ports work, and how fast."""
    from blinkimp.host.engine import Engine
    from blinkimp.nic_shim.queue_pair import QueuePairPort

    what = "ring round trip"
    private = msgspec.structs.replace(config, engine_name=f"doctor-{os.getpid()}", num_ingress=1, num_queue_pairs=1)
    try:
        with Engine(private) as engine, QueuePairPort.open(private.engine_name, 0) as port:
            port.attach(timeout_s=PING_TIMEOUT_S)
            port.start_heartbeat()
            round_trips_us = [ping_us(port, request_id) for request_id in range(NUM_PINGS)]
            description = engine.device.describe()
    except (
        RuntimeError,
        ValueError,
        OSError,
    ) as error:  # ValueError: settings that do not go together, a model that is none
        return Finding(what, Verdict.FAIL, f"{type(error).__name__}: {error}", "look at the findings above first")
    p50, p99 = np.percentile(round_trips_us, [50, 99])
    return Finding(what, Verdict.OK, f"p50 {p50:.1f} us, p99 {p99:.1f} us over {NUM_PINGS} pings ({description})")


def ping_us(port: object, request_id: int) -> float:
    """The round trip of one ping. Raises QueuePairError where there is none, or no answer comes."""
    from blinkimp.nic_shim.queue_pair import PortStatus, QueuePairError, QueuePairPort

    assert isinstance(port, QueuePairPort)
    status, committed_ns, seen_ns = port.ping(request_id, spin_s=PING_SPIN_S, timeout_s=PING_TIMEOUT_S)
    if status == PortStatus.PENDING:
        raise QueuePairError(f"ping {request_id} had no answer within {PING_TIMEOUT_S:g} s; the director does not run")
    answers = port.poll()
    if status != PortStatus.OK or [int(answer["request_id"]) for answer in answers] != [request_id]:
        raise QueuePairError(
            f"ping {request_id}: the port says {status.name}, with {len(answers)} answers; expected OK and its own; restart the engine"
        )
    return (seen_ns - committed_ns) / 1e3


def all_checks(config: Config) -> list[tuple[str, Callable[[], Finding]]]:
    """(what is looked at, how), in the order of the report."""
    return [
        ("packages", check_versions),
        ("GPU", lambda: check_gpu(config)),
        ("driver", lambda: check_driver(config)),
        ("NVRTC", check_nvrtc),
        ("kernel sources", check_device_sources),
        ("C++ compiler", check_compiler),
        ("native library", check_native_library),
        ("locked memory", lambda: check_locked_memory(config)),
        ("shared memory", lambda: check_shared_memory(config)),
        ("CPU cores", check_cores),
        ("compile cache", lambda: check_cache(config)),
        ("model", lambda: check_model(config)),
        ("ring round trip", lambda: check_round_trip(config)),
    ]
