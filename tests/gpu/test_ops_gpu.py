"""tools/ops_engine.py on a GPU: parts of a small model's program, repeated for as long as it takes, have times and energy and leave nothing behind.

Run: pytest -m gpu tests/gpu/test_ops_gpu.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from blinkimp.host.power import open_nvml
from tests.gpu.step_runner import StepRunner, llama_config, write_checkpoint
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from ops_engine import fill_kv_pages, measure_row, requests_of
from ops_parts import PARTS, WHOLE
from ops_timing import Settings
from step_rows import Row

pytestmark = pytest.mark.gpu
SEED = 1


def test_parts_have_times_and_energy_and_leave_a_steps_bits_alone(tmp_path: Path) -> None:
    """The launches of a part have tens of thousands of ops."""
    write_checkpoint(tmp_path, llama_config(), np.random.default_rng(2))
    with StepRunner(tmp_path) as runner:
        fill_kv_pages(runner, np.random.default_rng(3))
        for row in (Row("decode", 16, 256), Row("prefill", 1, 300)):
            requests = requests_of(row, np.random.default_rng(SEED), runner.config.vocab)
            runner.run(requests)
            before = runner.logits(len(requests)).view(np.uint32).copy()
            figures, bits = measure_row(runner, row, list(PARTS), Settings(seconds=0.3), open_nvml(), SEED)
            np.testing.assert_array_equal(bits, before)
            assert list(figures) == list(PARTS)
            for part, found in figures.items():
                assert found.sustained_ms is not None and found.joules is not None and found.watts is not None
                assert 0 < found.ms < 3 * found.sustained_ms and 20 < found.watts < 1500, (part, found)
            parts_ms = sum(found.ms for part, found in figures.items() if part != WHOLE)
            assert 0.3 * figures[WHOLE].ms < parts_ms < 2 * figures[WHOLE].ms, figures
