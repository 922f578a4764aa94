"""nic_shim/constraint_compiler.py: what the machine has no time for is not held against the constraint.

Run: pytest tests/null/test_constraint_compiler.py
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blinkimp.nic_shim import constraint_compiler
from blinkimp.nic_shim.constraint_compiler import ConstraintCompiler, ConstraintProblem
from blinkimp.protocol import Constraint
from tests.ingress_support import write_byte_tokenizer

SLOT_BYTES = 1 << 20
CONSTRAINT = Constraint("regex", "[a-z]{1,80}")


@pytest.fixture
def compiler(tmp_path: Path) -> Iterator[ConstraintCompiler]:
    write_byte_tokenizer(tmp_path)
    compiler = ConstraintCompiler(tmp_path / "tokenizer.json", 258, (257,), SLOT_BYTES, timeout_s=120)
    yield compiler
    compiler.close()


@pytest.mark.parametrize("limit", ["START_TIMEOUT_S", "MOST_WAIT_FACTOR"])
def test_a_machine_without_time_may_be_asked_again(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str
) -> None:
    """The worker's start, or the worker itself, gets no time at all (it does nothing); then as much as it wants."""
    with monkeypatch.context() as patch:
        patch.setattr(constraint_compiler, "START_TIMEOUT_S", 180)
        if limit == "MOST_WAIT_FACTOR":
            compiler.compile(Constraint("regex", "a"))  # the worker has started
            assert compiler._worker is not None
            os.kill(compiler._worker.pid, signal.SIGSTOP)
        else:
            idle = tmp_path / "idle"
            idle.write_text("#!/bin/sh\nexec sleep 600\n")
            idle.chmod(0o755)
            patch.setattr(sys, "executable", str(idle))
        patch.setattr(constraint_compiler, "LOOK_PERIOD_S", 0.0)
        patch.setattr(constraint_compiler, limit, 0.0)
        with pytest.raises(ConstraintProblem, match="cannot be used") as caught:
            compiler.compile(CONSTRAINT)
    assert caught.value.error.code == "busy" and caught.value.error.remedy == "send it again"
    monkeypatch.setattr(constraint_compiler, "START_TIMEOUT_S", 180)
    assert compiler.compile(CONSTRAINT).table.data


def test_a_constraint_that_computes_too_long_is_refused_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraint_compiler, "LOOK_PERIOD_S", 0.0)
    monkeypatch.setattr(constraint_compiler, "START_TIMEOUT_S", 180)
    write_byte_tokenizer(tmp_path)
    compiler = ConstraintCompiler(tmp_path / "tokenizer.json", 258, (257,), SLOT_BYTES, timeout_s=-1)
    try:
        for _ in range(2):
            with pytest.raises(ConstraintProblem) as caught:
                compiler.compile(Constraint("regex", "(a|b)*a(a|b){14}"))
            assert caught.value.error.code == "constraint_too_large"
        assert compiler.num_compiled == 0
    finally:
        compiler.close()
