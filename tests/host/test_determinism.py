"""Tokens and logprobs of the embedded model do not depend on batch, chunks, cached prefixes, preemptions and restarts: emulated device.

The GPU's tests are the same cases with all 64 requests (tests/gpu/test_determinism_gpu.py). Run: pytest tests/host/test_determinism.py -rP
"""

from __future__ import annotations

from typing import Any

import pytest

from blinkimp.ring_abi import FinishReason
from tests.host import determinism_scenario as scenario
from tests.host.engine_support import Stream, finished

NUM_REQUESTS = 12  # of 64: a CPU prefills slowly
OPTIONS: dict[str, Any] = {"device": "emulated", "compute_dtype": "bf16"}  # the program that a GPU runs
VOCAB = 4096

Asked = tuple[list[scenario.Request], list[Stream]]


@pytest.fixture(scope="module")
def alone() -> Asked:
    requests = scenario.make_requests(NUM_REQUESTS, VOCAB, longest_output=64)
    return requests, scenario.reference("embedded", requests, **OPTIONS)


@pytest.mark.parametrize("case", scenario.CASES)
def test_bits_are_those_of_each_request_alone(case: str, alone: Asked) -> None:
    requests, expected = alone
    scenario.run_case(case, "embedded", requests, expected, **OPTIONS)


def a_stream() -> Stream:
    end = finished(FinishReason.LENGTH)
    return Stream([5, 6], [-1.0, -0.0], [[(5, -1.0)], []], is_accepted=True, end=end)


def test_a_difference_is_found_and_named() -> None:
    """The comparison itself: one bit of a logprob, an alternative, a token that is missing, another end."""
    requests = scenario.make_requests(3, VOCAB)
    expected = [a_stream() for _ in range(3)]
    scenario.assert_same_bits("x", requests, expected, [a_stream() for _ in range(3)])
    wrong: dict[str, dict[str, Any]] = {
        "2@1: only the sign of a zero": {"logprobs": [-1.0, 0.0]},
        "2@0: one bit": {"logprobs": [-0.99999994, -0.0]},
        "2@0: an alternative": {"tops": [[(5, -0.99999994)], []]},
        "2@1: shorter": {"tokens": [5], "logprobs": [-1.0], "tops": [[(5, -1.0)]]},
        "2@2: another end": {"end": finished(FinishReason.EOS)},
    }
    for what, changes in wrong.items():
        got = [a_stream() for _ in range(3)]
        for name, value in changes.items():
            setattr(got[2], name, value)
        with pytest.raises(AssertionError) as caught:
            scenario.assert_same_bits("x", requests, expected, got)
        message = str(caught.value)
        assert "1 of 3 requests differ" in message and what.split(":")[0] in message, message
        assert "alone " in message and f"request 2 ({requests[2]})" in message, message
