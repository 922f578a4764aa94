"""Log lines: whatever is logged, a line in JSON is one valid object with the keys that every line has.

Run: pytest tests/null/test_logs.py
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blinkimp.logs import JsonFormatter, TextFormatter, log_event
from tests.support import PATIENCE_S, ROOT, python_path

KEYS = {"time", "level", "logger", "process", "pid", "message"}


class Collector(logging.Handler):
    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def logger_to(formatter: logging.Formatter) -> tuple[logging.Logger, Collector]:
    log = logging.Logger("blinkimp.test", logging.INFO)
    collector = Collector(formatter)
    log.addHandler(collector)
    return log, collector


def json_line(event: str = "request", message: str = "", **fields: Any) -> dict[str, Any]:
    log, collector = logger_to(JsonFormatter("http ingress 1"))
    log_event(log, logging.INFO, event, message, **fields)
    (line,) = collector.lines
    assert "\n" not in line
    value: dict[str, Any] = json.loads(line)
    return value


def test_an_event_has_its_fields_and_what_every_line_has() -> None:
    line = json_line(request_id="a-1", output_tokens=7, ttft_s=0.25, error=None, stream=True)
    assert set(line) == KEYS | {"event", "request_id", "output_tokens", "ttft_s", "error", "stream"}
    assert (line["level"], line["logger"], line["process"]) == ("info", "blinkimp.test", "http ingress 1")
    assert line["time"].endswith("Z") and "T" in line["time"]
    assert (line["event"], line["message"], line["ttft_s"], line["error"]) == ("request", "request", 0.25, None)


def test_a_plain_line_is_an_object_too() -> None:
    log, collector = logger_to(JsonFormatter("host"))
    log.warning("100 %% of %s", "it")
    assert set(json.loads(collector.lines[0])) == KEYS
    assert json.loads(collector.lines[0])["message"] == "100 % of it"


def test_an_exception_is_a_key_not_more_lines() -> None:
    log, collector = logger_to(JsonFormatter("host"))
    try:
        raise ValueError("no\nway")
    except ValueError:
        log.exception("it failed")
    (line,) = collector.lines
    assert "\n" not in line and "ValueError: no\nway" in json.loads(line)["exception"]


def test_a_field_cannot_take_the_place_of_a_key() -> None:
    line = json_line(level="mine", time=1)
    assert line["level"] == "info" and line["level_"] == "mine" and line["time_"] == 1


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.one_of(st.text(), st.floats(), st.integers(-(2**63), 2**64 - 1), st.none(), st.binary(), st.just(object())),
        max_size=4,
    ),
    st.text(),
)
def test_any_fields_make_a_valid_line(fields: dict[str, Any], message: str) -> None:
    log, collector = logger_to(JsonFormatter("host"))
    log.info("%s", message, extra={"event": "x", "fields": fields})
    (line,) = collector.lines
    assert json.loads(line)["event"] == "x" and "\n" not in line


def test_half_a_surrogate_pair_of_a_client_is_written_somehow() -> None:
    assert json_line(user="\ud800")["user"] == "'\\ud800'"


def test_numbers_that_json_has_not_are_null() -> None:
    assert json_line(e2e_s=math.nan)["e2e_s"] is None


def test_text_shows_the_fields_that_are_known() -> None:
    log, collector = logger_to(TextFormatter("%(levelname)s %(message)s"))
    log_event(log, logging.INFO, "request", request_id="r", error=None, e2e_s=0.1234567890, user='a "b"\n')
    assert collector.lines == ['INFO request request_id=r e2e_s=0.123457 user="a \\"b\\"\\n"']


def test_what_is_not_logged_costs_no_formatting() -> None:
    log, collector = logger_to(TextFormatter())
    log_event(log, logging.DEBUG, "request", value=object())
    assert not collector.lines


def stderr_of(script: str) -> str:
    """Of a Python process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={**os.environ, "PYTHONPATH": python_path()},
    ).stderr


@pytest.mark.parametrize(
    "how", ["raise RuntimeError('here')", "__import__('threading').Thread(target=lambda: 1 / 0).start()"]
)
def test_uncaught_exceptions_are_lines_too(how: str) -> None:
    script = f"from blinkimp.logs import set_up_logging\nset_up_logging('info', 'json', 'host')\n{how}"
    (line,) = stderr_of(script).splitlines()
    assert json.loads(line)["level"] == "critical" and "Error" in json.loads(line)["exception"]


def test_text_does_not_say_twice_what_the_message_says() -> None:
    log, collector = logger_to(TextFormatter("%(levelname)s %(message)s"))
    log_event(log, logging.INFO, "serving", "ingress 0 serves on there", endpoint="there")
    assert collector.lines == ["INFO ingress 0 serves on there"]


@pytest.mark.parametrize("num_lines", [0, 3, 30_000])
def test_a_reader_that_stands_still_stops_nobody_and_loses_only_what_is_said_to_be_lost(num_lines: int) -> None:
    script = (
        "import logging\nfrom blinkimp import logs\nfrom blinkimp.logs import log_event, set_up_logging\n"
        f"logs.FLUSH_TIMEOUT_S = {PATIENCE_S}\n"  # at its end it waits for this test, however long that is held up
        "set_up_logging('info', 'json', 'ingress', in_background=True)\n"
        f"for idx in range({num_lines}): log_event(logging.getLogger('x'), logging.INFO, 'request', idx=idx, text='-' * 100)\n"
        "print('done', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": python_path()},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n", "all of it is logged while nobody reads stderr"
        _, text = process.communicate("\n", timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in text.splitlines()]
    seen = [line["idx"] for line in lines if line["event"] == "request"]
    num_dropped = sum(line["num_lines"] for line in lines if line["event"] == "lines_dropped")
    assert seen == sorted(seen) and len(seen) + num_dropped == num_lines
    assert (num_dropped > 0) == (num_lines > 20_000)


def test_text_lines_of_all_processes_look_alike_and_name_theirs() -> None:
    for process in ("host", "zmq ingress 1"):
        script = (
            "import logging\nfrom blinkimp.logs import log_event, set_up_logging\n"
            f"set_up_logging('info', 'text', {process!r})\n"
            "log_event(logging.getLogger('x'), logging.INFO, 'draining', num_unfinished=1)"
        )
        assert re.fullmatch(
            rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} INFO {process}: draining num_unfinished=1\n", stderr_of(script)
        )
