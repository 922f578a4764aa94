"""Kernels of tests/gpu/kernels compile for sm_90a without a driver, without spills, inside the worker's register budget.

Run: pytest tests/compile/test_kernel_resources.py
"""

from __future__ import annotations

import pytest

from tests.gpu.gpu_harness import compile_kernel

MAX_REGISTERS = 168  # per thread at entry, with 384 threads; attention_test.cu then moves registers as the worker does
KERNELS = [
    ("sampling_test.cu", []),
    ("sample_op_test.cu", []),
    ("attention_test.cu", ["-DHEAD_DIM=64"]),
    ("attention_test.cu", ["-DHEAD_DIM=128"]),
    *(("gemm_wide_test.cu", [f"-DTILE_ROWS={tile_rows}"]) for tile_rows in (32, 48, 64, 112, 128)),
]


@pytest.mark.parametrize(("file_name", "options"), KERNELS, ids=str)
def test_no_spills_and_few_registers(file_name: str, options: list[str]) -> None:
    kernel = compile_kernel(file_name, options)
    assert kernel.usage, f"ptxas reported no entry:\n{kernel.log}"
    for entry, usage in kernel.usage.items():
        spilled = usage.stack_bytes + usage.spill_store_bytes + usage.spill_load_bytes
        assert spilled == 0, f"{entry} spills: {usage}"
        assert usage.num_registers <= MAX_REGISTERS, f"{entry}: {usage}"
