"""Every kernel under device/ compiles for every supported architecture, without a driver, and nothing in it spills registers.

Run: pytest tests/compile/test_kernels.py
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from blinkimp.config import Config, model_folder
from blinkimp.host.checkpoint import read_model_config
from blinkimp.host.compile import DEFAULT_ARCH, DEVICE_DIR, FunctionReport, compile_cubin
from blinkimp.host.gpu_kernel import (
    KERNEL_SOURCE,
    PACK_SOURCE,
    PORTABLE_SOURCE,
    STEP_SOURCE,
    WORKER_THREADS,
    kernel_shape,
)
from blinkimp.host.model_config import ModelConfig, parse_config
from blinkimp.lab.shapes import LLAMA_3_8B

NUM_WORKERS = 131  # an H100 or H200 has 132 SMs, one of which is the director's
REGISTERS_PER_MULTIPROCESSOR = 65536
REGISTERS_ALLOCATED_AT_ONCE = 8  # per thread
# On the Hopper kernel's stack: a word of the scale warps, read once a step, outside of all loops over pages and slices (device/PERFORMANCE.md).
MOST_SPILL_BYTES = {KERNEL_SOURCE: 4}
# Low twelve bits of an instruction of sm_90, as NVIDIA's disassembler names them.
BULK_COPY = 0x3BA  # UBLKCP
TO_UNIFORM_REGISTER = 0x2CA  # R2UR
PRODUCT = 0x9F0  # HGMMA of two operands in shared memory
INSTRUCTION_BYTES = 16

QWEN_3_4B = LLAMA_3_8B | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
}


def models() -> dict[str, ModelConfig]:
    """One of each kind of kernel: head dimension 64 and 128, with and without norms of the query and key heads."""
    return {
        "embedded": read_model_config(model_folder(Config())),
        "llama-3-8b": parse_config(LLAMA_3_8B),
        "qwen-3-4b": parse_config(QWEN_3_4B),
    }


Compiled: TypeAlias = tuple[bytes, tuple[FunctionReport, ...]]


def assert_fits(source: str, compiled: Compiled, num_threads: int) -> None:
    cubin, functions = compiled
    assert cubin.startswith(b"\x7fELF")
    budget = REGISTERS_PER_MULTIPROCESSOR // num_threads // REGISTERS_ALLOCATED_AT_ONCE * REGISTERS_ALLOCATED_AT_ONCE
    for function in functions:
        assert function.spill_store_bytes <= MOST_SPILL_BYTES.get(source, 0), function
        assert function.num_registers <= budget, function


# A compilation takes a minute: head dimensions 64 and 128 here, the kernel with norms of the heads by `blinkimp compile`.
HOPPER_MODELS = ("embedded", "llama-3-8b")
# The oldest and the newest architecture, one with head norms. The others by `blinkimp compile --arch`.
PORTABLE_MODELS = (("sm_80", "qwen-3-4b"), ("sm_120a", "llama-3-8b"))


@pytest.fixture(scope="module")
def compilations() -> Iterator[dict[tuple[str, str], Future[Compiled]]]:
    """By (architecture, model): all the long ones, side by side on the machine's CPUs."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(4, len(os.sched_getaffinity(0))), spawn) as pool:

        def start(source: str, defines: Mapping[str, str], arch: str) -> Future[Compiled]:
            return pool.submit(compile_cubin, DEVICE_DIR / source, arch, dict(defines))

        jobs = {}
        for arch, model in PORTABLE_MODELS:
            shape = kernel_shape(models()[model], NUM_WORKERS, "portable", arch)
            jobs[arch, model] = start(shape.source, shape.defines(), arch)
        for model in HOPPER_MODELS:
            jobs[DEFAULT_ARCH, model] = start(
                KERNEL_SOURCE, kernel_shape(models()[model], NUM_WORKERS).defines(), DEFAULT_ARCH
            )
        yield jobs
        pool.shutdown(cancel_futures=True)


def opcodes_of(compiled: Compiled) -> NDArray[np.uint64]:
    """[num_instructions], what else stands in the file among them."""
    cubin, _ = compiled
    whole = len(cubin) // INSTRUCTION_BYTES * INSTRUCTION_BYTES
    return np.frombuffer(cubin[:whole], np.uint64)[::2] & np.uint64(0xFFF)


def test_every_kernel_is_covered_here() -> None:
    sources = {str(path.relative_to(DEVICE_DIR)) for path in DEVICE_DIR.rglob("*.cu")}
    assert sources == {KERNEL_SOURCE, PORTABLE_SOURCE, PACK_SOURCE, STEP_SOURCE}


@pytest.mark.parametrize("model", HOPPER_MODELS)
@pytest.mark.timeout(1800)  # minutes where others compile too
def test_persistent_kernel_compiles_with_few_spills(
    compilations: dict[tuple[str, str], Future[Compiled]], model: str
) -> None:
    assert_fits(KERNEL_SOURCE, compilations[DEFAULT_ARCH, model].result(), WORKER_THREADS)


@pytest.mark.parametrize("model", HOPPER_MODELS)
@pytest.mark.timeout(1800)
def test_addresses_of_copies_stay_in_uniform_registers(
    compilations: dict[tuple[str, str], Future[Compiled]], model: str
) -> None:
    """One thread issues all copies of a ring: with 344 such moves in place of 16 it was what QKV waited for at 128 rows."""
    opcodes = opcodes_of(compilations[DEFAULT_ARCH, model].result())
    copies = np.flatnonzero(opcodes == BULK_COPY)
    moves = sum(int((opcodes[max(0, copy - 32) : copy] == TO_UNIFORM_REGISTER).sum()) for copy in copies)
    assert len(copies) > 30
    assert moves <= 30


@pytest.mark.parametrize("model", HOPPER_MODELS)
@pytest.mark.timeout(1800)
def test_addresses_of_products_stay_in_uniform_registers(
    compilations: dict[tuple[str, str], Future[Compiled]], model: str
) -> None:
    """Main loops: a move in front of each product may take longer than a product of few columns, and is paid for in joules in front of any.
    QKV at 256 rows had them for several states, unseen."""
    opcodes = opcodes_of(compilations[DEFAULT_ARCH, model].result())
    products = np.flatnonzero(opcodes == PRODUCT)
    groups = [group for group in np.split(products, np.flatnonzero(np.diff(products) > 45) + 1) if len(group) >= 4]
    # Four products right behind a loop of more are an item's last slice: not a loop.
    loops = [
        group
        for before, group in itertools.pairwise([products[:0], *groups])
        if len(group) > 4 or len(before) <= 4 or group[0] - before[-1] > 200
    ]
    assert len(loops) >= 20
    for loop in loops:
        moves = int((opcodes[loop[0] : loop[-1]] == TO_UNIFORM_REGISTER).sum())
        assert moves <= len(loop) / 2, f"{moves} moves between the {len(loop)} products from instruction {loop[0]} on"


@pytest.mark.parametrize(("arch", "model"), PORTABLE_MODELS)
@pytest.mark.timeout(1800)
def test_portable_kernel_compiles_without_spills(
    compilations: dict[tuple[str, str], Future[Compiled]], arch: str, model: str
) -> None:
    shape = kernel_shape(models()[model], NUM_WORKERS, "portable", arch)
    assert_fits(shape.source, compilations[arch, model].result(), shape.num_threads)


def test_weight_packing_compiles_without_spills() -> None:
    assert_fits(PACK_SOURCE, compile_cubin(DEVICE_DIR / PACK_SOURCE, DEFAULT_ARCH, {}), 256)


@pytest.mark.parametrize("arch", [DEFAULT_ARCH, "sm_80"])
def test_the_start_of_a_launched_step_compiles_without_spills(arch: str) -> None:
    # 1024: kBeginThreads of device/emu/orchestrator_cuda.cpp
    assert_fits(STEP_SOURCE, compile_cubin(DEVICE_DIR / STEP_SOURCE, arch, {}), 1024)
