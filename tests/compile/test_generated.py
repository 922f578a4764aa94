"""device/ptx_wgmma*.cuh are what tools/gen_wgmma.py writes.

Run: pytest tests/compile/test_generated.py
"""

from __future__ import annotations

from tests.support import ROOT, load_tool


def test_wgmma_wrappers_are_the_generator_s() -> None:
    for name, text in load_tool("gen_wgmma").generate().items():
        assert (ROOT / "device" / name).read_text() == text, name
