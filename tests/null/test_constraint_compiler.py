"""nic_shim/constraint_compiler.py: what the machine has no time for is not held against the constraint, and no failure stays.

Run: pytest tests/null/test_constraint_compiler.py
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blinkimp.nic_shim import constraint_compiler
from blinkimp.nic_shim.constraint_compiler import ConstraintCompiler, ConstraintProblem
from blinkimp.protocol import Constraint
from tests.ingress_support import write_byte_tokenizer
from tests.support import PATIENCE_S

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
        patch.setattr(constraint_compiler, "START_TIMEOUT_S", PATIENCE_S)
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
    monkeypatch.setattr(constraint_compiler, "START_TIMEOUT_S", PATIENCE_S)
    assert compiler.compile(CONSTRAINT).table.data


def test_a_constraint_that_computes_too_long_is_refused_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraint_compiler, "LOOK_PERIOD_S", 0.0)
    monkeypatch.setattr(constraint_compiler, "START_TIMEOUT_S", PATIENCE_S)
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


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Every descriptor below 1,024 is taken, as with so many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"this process may have {hard} descriptors, expected 2048; raise `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    descriptors = [os.open(os.devnull, os.O_RDONLY)]
    while descriptors[-1] < 1024:
        descriptors.append(os.dup(descriptors[0]))
    yield
    for fd in descriptors:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_worker_whose_pipes_have_high_descriptors_compiles(
    many_descriptors: None, compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraint_compiler, "START_TIMEOUT_S", PATIENCE_S)
    assert compiler.compile(CONSTRAINT).table.data
    assert compiler._worker is not None and compiler._worker.stdout is not None
    assert compiler._worker.stdout.fileno() >= 1024


def test_a_worker_whose_answer_was_not_read_is_not_asked_again(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I3, for what nobody has thought of: the next constraint must not get the answer to this one."""
    monkeypatch.setattr(constraint_compiler, "START_TIMEOUT_S", PATIENCE_S)
    expected = compiler.compile(CONSTRAINT).table.data
    compiler._cache.clear()
    with monkeypatch.context() as patch:

        def fail(*_: object) -> bytes:
            raise ValueError("a defect")

        patch.setattr(constraint_compiler, "_read", fail)
        with pytest.raises(ValueError, match="a defect"):
            compiler.compile(Constraint("regex", "[0-9]"))
    assert compiler.compile(CONSTRAINT).table.data == expected


def test_after_the_end_no_worker_is_started(compiler: ConstraintCompiler) -> None:
    """Else who closes it waits for a compilation that nobody wants."""
    compiler.close()
    with pytest.raises(ConstraintProblem) as caught:
        compiler.compile(CONSTRAINT)
    assert caught.value.error.code == "busy" and compiler._worker is None
