"""`blinkimp compile`: the kernels of a model into the cache, with times, registers and spills. Needs no GPU and no driver.

Called by blinkimp/cli/__init__.py. Test: pytest tests/host/test_cli.py
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from blinkimp.cli.options import add_config_flags, config_of, new_parser
from blinkimp.cli.terminal import set_up_logging, stderr_console
from blinkimp.config import Config, ConfigError, cache_folder, model_folder
from blinkimp.host.checkpoint import read_model_config
from blinkimp.host.compile import DEFAULT_ARCH, nvrtc_version
from blinkimp.host.compile_cache import CompiledKernel, get_kernel
from blinkimp.host.gpu_driver import GpuError, probe_gpu
from blinkimp.host.gpu_kernel import (
    PACK_SOURCE,
    STEP_SOURCE,
    KernelChoiceError,
    capability_of,
    choose_kernel,
    kernel_shape,
)

DEFAULT_NUM_WORKERS = 131  # of an H100 or H200: 132 SMs, one of them the director's

EPILOG = """\
examples:
  blinkimp compile                                     the embedded model, for the GPU of this machine (or sm_90a)
  blinkimp compile --model ~/models/Qwen3-4B --cache-dir /shared/cache
  blinkimp compile --arch sm_80 --num-workers 107      for an A100, on any machine
  BLINKIMP_EXPECT_CACHED=1 blinkimp serve --model ...  then: a compile at start is an error

what happens: NVRTC compiles device/*.cu to cubins in the cache folder, keyed by every source byte, the options, the architecture and
the NVRTC version. `blinkimp serve` finds them there. The table shows what the assembler reports: registers a thread, stack, spills.
"""


def worker_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1, such as 131 (an H200)")
    return int(text)


def add_parser(subparsers: Any, summary: str) -> None:
    parser = new_parser(subparsers, "compile", summary, EPILOG, usage="[options]")
    parser.add_argument(
        "--arch", metavar="ARCH", help=f"such as sm_90a (default: this machine's GPU, else {DEFAULT_ARCH})"
    )
    parser.add_argument(
        "--num-workers",
        type=worker_count,
        metavar="N",
        help=f"SMs less one (default: of this GPU, else {DEFAULT_NUM_WORKERS})",
    )
    add_config_flags(parser, without=("bind", "engine_name", "device"))


def target_of(options: argparse.Namespace) -> tuple[str, int]:
    """Architecture and number of workers to compile for."""
    arch, num_workers = options.arch, options.num_workers
    if arch is None or num_workers is None:
        try:
            gpu = probe_gpu()
            arch, num_workers = arch or gpu.arch, num_workers or gpu.num_workers
        except GpuError:
            arch, num_workers = arch or DEFAULT_ARCH, num_workers or DEFAULT_NUM_WORKERS
            print(
                f"no GPU here: compiling for {arch} with {num_workers} workers; --arch and --num-workers say otherwise"
            )
    return arch, num_workers


def compile_all(config: Config, arch: str, num_workers: int) -> dict[str, tuple[CompiledKernel, CompiledKernel]]:
    """Source -> (as it was obtained now, as the cache serves it)."""
    try:
        kind = choose_kernel(config.kernel, capability_of(arch), arch)
    except KernelChoiceError as error:
        raise ConfigError(str(error)) from error
    shape = kernel_shape(read_model_config(model_folder(config)), num_workers, kind, arch)
    sources: dict[str, dict[str, str]] = {shape.source: shape.defines(), PACK_SOURCE: {}, STEP_SOURCE: {}}
    folder, kernels = cache_folder(config), {}
    for source, defines in sources.items():
        with stderr_console.status(f"{source} for {arch}"):
            first = get_kernel(source, folder, arch, defines, must_keep=True)
            kernels[source] = (first, get_kernel(source, folder, arch, defines, must_keep=True))
    return kernels


def table_of(kernels: dict[str, tuple[CompiledKernel, CompiledKernel]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("source", "function", "registers", "stack B", "spills B", "shared B", "compile ms", "cached ms"):
        table.add_column(column, justify="left" if column in ("source", "function") else "right", no_wrap=True)
    for source, (first, cached) in kernels.items():
        for function in first.functions:
            times = (f"{first.compile_ns / 1e6:.0f}", f"{cached.load_ns / 1e6:.1f}") if function.is_entry else ("", "")
            table.add_row(
                source,
                function.name,
                str(function.num_registers) if function.is_entry else "-",
                str(function.stack_bytes),
                str(function.spill_store_bytes + function.spill_load_bytes),
                str(function.shared_bytes),
                *times,
            )
    return table


def run(options: argparse.Namespace) -> int:
    config = config_of(options)
    set_up_logging(config.log_level)
    arch, num_workers = target_of(options)
    kernels = compile_all(config, arch, num_workers)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table_of(kernels))
    for first, cached in kernels.values():
        how = "was in the cache; compile ms is of the day it was compiled" if first.from_cache else "compiled now"
        print(f"{cached.path}: {len(cached.cubin)} bytes, {how}")
    print(f"architecture {arch}, {num_workers} workers, NVRTC {nvrtc_version()}")
    spilling = [function.name for first, _ in kernels.values() for function in first.functions if function.has_spills]
    if spilling:
        print(f"registers are spilled in {', '.join(spilling)}: slower than it need be on {arch}")
    return 0
