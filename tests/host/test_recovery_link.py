"""The ingress's side of a crash, with scripted engines: who is submitted again, who is suspected, and when nobody comes any more.

Test: pytest tests/host/test_recovery_link.py
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from blinkimp.client import Client, RequestRefusedError
from blinkimp.nic_shim import engine_watch
from blinkimp.nic_shim.crash_suspects import CLEAR_TOKENS
from blinkimp.ring_abi import EngineState
from tests.fake_director import FakeDirector
from tests.ingress_support import Served, expected_ids, hold_after_first_tokens, serve, wait_until
from tests.support import PATIENCE_S


class Engines:
    """Engines of one name, one after the other. The first is that of `served`; none says a token unless it is told to."""

    def __init__(self, served: Served, stack: ExitStack) -> None:
        self._served, self._stack = served, stack
        self.current = served.director

    def crash(self, state: EngineState = EngineState.FAULTED) -> FakeDirector:
        """The engine is gone in the middle of what it did; the next one is there."""
        name = self.current.regions.engine_name
        self.current.stop()
        self.current.status["state"] = state
        self.current.regions.unlink()
        self.current = FakeDirector(name, script=self._served.script, vocab_size=258)
        self.current.paused = True
        self._stack.enter_context(self.current)
        return self.current

    @property
    def num_running(self) -> int:
        return len(self.current.queue_pairs[0].running)


def test_request_that_two_engines_died_of_fails_and_the_next_one_lives(tmp_path: Path) -> None:
    with serve(tmp_path) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client, ExitStack() as stack:
        engines = Engines(served, stack)
        (stream,) = hold_after_first_tokens(served, lambda: [client.submit("x", max_tokens=300)])
        engines.crash()
        wait_until(lambda: engines.num_running == 1, "it is submitted again")
        assert engines.current.queue_pairs[0].seen[0].body["num_prior_outputs"] == 1
        engines.crash().paused = False
        with pytest.raises(RequestRefusedError) as caught:
            stream.result()
        assert caught.value.code == "engine_error" and "2 crashes" in str(caught.value)
        assert client.generate("x", max_tokens=5).token_ids == expected_ids(served, 1, 5)
        assert len(engines.current.queue_pairs[0].seen) == 1, "the bad one was not given to the third engine"
        counters = client.stats().ingress
        assert (counters["engine_losses"], counters["crash_failures"]) == (2, 1)


def test_suspects_are_given_to_the_third_engine_one_at_a_time(tmp_path: Path) -> None:
    with serve(tmp_path) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client, ExitStack() as stack:
        engines = Engines(served, stack)
        prompts = [[7] * number for number in (1, 2, 3)]
        streams = hold_after_first_tokens(served, lambda: [client.submit(one, max_tokens=300) for one in prompts])
        engines.crash()
        wait_until(lambda: engines.num_running == 3, "all are submitted again")
        third = engines.crash()
        wait_until(lambda: engines.num_running == 1, "the first suspect")
        innocent = client.submit([7] * 9, max_tokens=300)
        wait_until(lambda: engines.num_running == 2, "what is not suspected does not wait")
        assert [one.num_prompt_tokens for one in third.queue_pairs[0].seen] == [2, 9], "prompt and the token it had"
        third.num_allowed_steps = CLEAR_TOKENS
        wait_until(lambda: engines.num_running == 3, "the first is clear, the second may run")
        streams[2].cancel()  # waits behind it
        assert streams[2].result().finish_reason == "cancelled"
        third.paused = False
        for number, stream in ((1, streams[0]), (2, streams[1]), (9, innocent)):
            assert stream.result().token_ids == expected_ids(served, number, 300)
        assert client.stats().ingress["crash_failures"] == 0


def test_requests_that_get_on_survive_any_number_of_crashes(tmp_path: Path) -> None:
    with serve(tmp_path) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client, ExitStack() as stack:
        engines = Engines(served, stack)
        (stream,) = hold_after_first_tokens(served, lambda: [client.submit("x", max_tokens=300)])
        for _ in range(4):
            engines.current.num_allowed_steps = CLEAR_TOKENS
            wait_until(lambda: engines.current.num_allowed_steps == 0, "it gets on")
            wait_until(lambda: not engines.current.queue_pairs[0].outbox, "what it said is on the ring")
            tokens = served.ingress.link.counters
            num_tokens = 1 + CLEAR_TOKENS * (tokens.engine_losses + 1)
            wait_until(lambda: tokens.tokens == num_tokens, "the ingress has read it")  # noqa: B023  waited for here
            engines.crash()
            wait_until(lambda: engines.num_running == 1, "it is submitted again")
        engines.current.paused = False
        assert stream.result().token_ids == expected_ids(served, 1, 300)


def test_engine_that_stopped_in_order_is_no_crash(tmp_path: Path) -> None:
    with serve(tmp_path) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client, ExitStack() as stack:
        engines = Engines(served, stack)
        (stream,) = hold_after_first_tokens(served, lambda: [client.submit("x", max_tokens=300)])
        for _ in range(3):
            engines.crash(EngineState.STOPPED)
            wait_until(lambda: engines.num_running == 1, "it is submitted again")
        engines.current.paused = False
        assert stream.result().token_ids == expected_ids(served, 1, 300)
        assert client.stats().ingress["engine_losses"] == 0


def test_parked_engine_is_not_lost_and_its_successor_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_watch, "HEARTBEAT_TIMEOUT_S", 0.2)
    with serve(tmp_path) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client, ExitStack() as stack:
        link = served.ingress.link
        served.director.stop()
        wait_until(lambda: client.health().status == "engine_lost", "a heart that stands still is noticed")
        served.director.status["state"] = EngineState.PARKED
        wait_until(lambda: client.health().status == "ok", "a parked one may stand still")
        wait_until(lambda: link.watch.heartbeat_age_s < 0.2, "for as long as it likes")
        engines = Engines(served, stack)
        engines.crash(EngineState.PARKED).paused = False
        assert client.generate("x", max_tokens=5).token_ids == expected_ids(served, 1, 5)


def test_ingress_that_ends_waits_for_no_engine_that_nobody_starts(tmp_path: Path) -> None:
    with serve(tmp_path) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client:
        (stream,) = hold_after_first_tokens(served, lambda: [client.submit("x", max_tokens=300)])
        served.director.stop()
        served.director.status["state"] = EngineState.FAULTED
        wait_until(lambda: client.health().status == "engine_faulted", "the loss is noticed")
        served.ingress.drain(3600)
        client.health()
        assert served.ingress.link.num_live == 1, "somebody still holds the engine's name: it may come back"
        served.director.regions.lock.release()
        with pytest.raises(RequestRefusedError) as caught:
            stream.result()
        assert caught.value.code == "engine_lost"
        assert served.ingress.join(PATIENCE_S), "and then it has nothing left to do"
