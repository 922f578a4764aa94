"""Every kernel under device/ compiles for every supported architecture, without a driver, and nothing in it spills registers.

Run: pytest tests/compile/test_kernels.py
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from blinkimp.host.compile import DEFAULT_ARCH, DEVICE_DIR, KERNEL_VARIANTS, compile_cubin

VARIANTS = [(name, defines) for name, variants in KERNEL_VARIANTS.items() for defines in variants]


def test_every_kernel_is_listed() -> None:
    assert set(KERNEL_VARIANTS) == {path.name for path in DEVICE_DIR.glob("*.cu")}


@pytest.mark.parametrize(("name", "defines"), VARIANTS, ids=[f"{name}-{dict(defines)}" for name, defines in VARIANTS])
def test_compiles_without_spills(name: str, defines: Mapping[str, int]) -> None:
    cubin, functions = compile_cubin(DEVICE_DIR / name, DEFAULT_ARCH, defines)
    assert cubin.startswith(b"\x7fELF")
    for function in functions:
        assert not function.has_spills, function
        # 384 threads and 65,536 registers a multiprocessor: more than 168 and the cooperative launch would not fit.
        assert function.num_registers <= 168, function
