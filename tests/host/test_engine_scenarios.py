"""The scenarios of engine_scenarios.py on the emulated device. Test: pytest tests/host/test_engine_scenarios.py"""

from __future__ import annotations

from pathlib import Path

from tests.host import engine_scenarios as scenarios


def test_ten_thousand_random_requests_leave_nothing_behind(tiny: Path) -> None:
    scenarios.random_requests_leave_nothing_behind(tiny, num_threads=1)


def test_batch_of_256_streams_runs_at_once(tiny: Path) -> None:
    scenarios.batch_of_256_streams_runs_at_once(tiny)


def test_reader_that_stops_holds_up_nobody_and_loses_nothing(tiny: Path) -> None:
    scenarios.reader_that_stops_holds_up_nobody_and_loses_nothing(tiny, num_threads=1)


def test_cancel_takes_effect_at_the_next_commit(tiny: Path) -> None:
    scenarios.cancel_takes_effect_at_the_next_commit(tiny, num_threads=1)


def test_seeded_tokens_do_not_depend_on_the_batch(tiny: Path) -> None:
    scenarios.seeded_tokens_do_not_depend_on_the_batch(tiny)


def test_observers_see_each_start_and_each_step_by_its_rows(tiny: Path) -> None:
    scenarios.observers_see_each_start_and_each_step_by_its_rows(tiny, num_threads=1)


def test_context_fills_to_its_end(tiny: Path) -> None:
    scenarios.context_fills_to_its_end(tiny, 460, 52)
