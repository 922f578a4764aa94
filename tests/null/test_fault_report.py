"""What is kept of a fault. Test: pytest tests/null/test_fault_report.py"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.host.fault_report import (
    ADVICE,
    FOLDER_NAME,
    NUM_KEPT,
    FaultReport,
    make_fault_report,
    write_fault_report,
)
from blinkimp.host.watchdog import Symptom, Verdict
from blinkimp.ring_abi import EngineState, FaultCode


def report_of(symptom: Symptom, page: object, num_restarts: int = 0) -> FaultReport:
    verdict = Verdict(symptom, "it broke")
    return make_fault_report(
        verdict, page, engine_name="name", model="/model", device="a device", num_restarts=num_restarts
    )


def test_record_and_status_are_in_the_file(tmp_path: Path) -> None:
    page = np.zeros(1, dtype=abi.ENGINE_PAGE)
    page["status"]["state"], page["status"]["step"] = EngineState.FAULTED, 9
    page["fault"]["code"], page["fault"]["site"] = FaultCode.BAD_PROGRAM, 200
    page["fault"]["expected"], page["fault"]["seen"], page["fault"]["step"] = 3, abi.OP_ATTENTION, 8
    path = write_fault_report(tmp_path, report_of(Symptom.FAULT_RECORD, page, 2))
    assert path is not None and path.parent == tmp_path / FOLDER_NAME and path.name.startswith("name-")
    read = msgspec.json.decode(path.read_bytes(), type=FaultReport)
    assert (read.state, read.step, read.num_restarts, read.device) == ("FAULTED", 9, 2, "a device")
    assert read.record is not None and read.record["site_name"] == "kSiteEmulatedOp" and read.record["step"] == 8
    assert "op 3 (ATTENTION)" in str(read.record["in_words"])
    assert read.advice == ADVICE[Symptom.FAULT_RECORD]


def test_engine_that_left_nothing_is_reported_all_the_same(tmp_path: Path) -> None:
    path = write_fault_report(tmp_path, report_of(Symptom.HOST_DEATH, None))
    assert path is not None
    read = msgspec.json.decode(path.read_bytes(), type=FaultReport)
    assert read.record is None and read.status == {} and read.text == "it broke"


def test_state_that_makes_no_sense_is_shown_as_a_number() -> None:
    page = np.zeros(1, dtype=abi.ENGINE_PAGE)
    page["status"]["state"] = 77
    assert report_of(Symptom.DEVICE_DEATH, page).state == "unknown (77)"


def test_only_the_newest_files_are_kept(tmp_path: Path) -> None:
    for number in range(NUM_KEPT + 5):
        path = write_fault_report(tmp_path, report_of(Symptom.CUDA_ERROR, None, number))
        assert path is not None
        os.utime(path, (number, number))
    left = [msgspec.json.decode(one.read_bytes(), type=FaultReport) for one in (tmp_path / FOLDER_NAME).iterdir()]
    assert len(left) == NUM_KEPT and min(one.num_restarts for one in left) == 5


def test_folder_that_cannot_be_written_hinders_nothing(tmp_path: Path) -> None:
    (tmp_path / FOLDER_NAME).write_text("a file where the folder should be")
    assert write_fault_report(tmp_path, report_of(Symptom.CUDA_ERROR, None)) is None


@pytest.mark.parametrize("symptom", list(Symptom))
def test_every_symptom_has_advice(symptom: Symptom) -> None:
    assert ADVICE[symptom]
