"""A whole server with the embedded model, as its clients see it: text, sampling, a stalled ingress, a client that does not read.

Faults of the processes are in tests/host/test_server.py. Run: pytest tests/host/test_serve_end_to_end.py
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator

import pytest

from blinkimp.async_client import AsyncClient
from blinkimp.client import Client, RequestRefusedError
from blinkimp.nic_shim.tokenizer import REPLACEMENT, Tokenizer
from blinkimp.protocol import Error, Finish, Tokens
from tests.host.engine_support import assert_all_pages_are_back, process_state, wait_for
from tests.host.server_support import ServerProcess
from tests.ingress_support import RawClient, encoded
from tests.support import PATIENCE_S, ROOT

PROMPT = "def read_file(path):"
INGRESS_TIMEOUT_S = 1.5
NUM_TRIES = 5
NUM_COMPLETIONS = 256  # far less than 8 streams of 500 tokens: they cannot end while their ingress stands still


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    with ServerProcess(
        folder, num_ingress=2, ingress_timeout_s=INGRESS_TIMEOUT_S, num_completions=NUM_COMPLETIONS
    ) as running:
        yield running
        assert_all_pages_are_back(running.status)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(ROOT / "blinkimp" / "models" / "embedded")


def test_text_streams_and_is_the_same_over_every_way_in(server: ServerProcess, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT).tolist()
    with (
        Client(server.endpoints[0], timeout_s=PATIENCE_S) as first,
        Client(server.endpoints[1], timeout_s=PATIENCE_S) as second,
    ):
        assert first.health().status == second.health().status == "ok"
        assert [first.health().queue_pair_idx, second.health().queue_pair_idx] == [0, 1]
        for _ in range(NUM_TRIES):  # should all of it have come at once, to a process that slept meanwhile: once more
            stream = first.submit(PROMPT, max_tokens=64, temperature=0)
            pieces = list(stream.text_pieces())
            completion = stream.result()
            if len(pieces) > 1:
                break
        assert len(pieces) > 1, "it streams"
        assert "".join(pieces) == completion.text == tokenizer.decode(completion.token_ids)
        assert completion.text
        assert completion.num_prompt_tokens == len(ids)
        assert all(logprob <= 0 for logprob in completion.logprobs)
        by_ids = second.generate(ids, max_tokens=64, temperature=0)
        assert (by_ids.token_ids, by_ids.text, by_ids.logprobs) == (
            *(completion.token_ids, completion.text, completion.logprobs),
        )
        finish = completion.finish
        assert 0 < finish.accepted_ns < finish.first_token_ns < finish.finished_ns


def test_seed_decides_sampled_tokens(server: ServerProcess) -> None:
    options = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.95, "ignore_eos": True}
    with (
        Client(server.endpoints[0], timeout_s=PATIENCE_S) as first,
        Client(server.endpoints[1], timeout_s=PATIENCE_S) as second,
    ):
        drawn = first.generate(PROMPT, **options)
        again = second.generate(PROMPT, seed=drawn.seed, **options)
        others = [second.generate(PROMPT, seed=drawn.seed ^ bit, **options).token_ids for bit in (1, 2, 4)]
    assert again.token_ids == drawn.token_ids and any(other != drawn.token_ids for other in others)


def test_wild_output_is_whole_characters(server: ServerProcess, tokenizer: Tokenizer) -> None:
    """At this temperature most tokens are drawn from everywhere, pieces of characters among them."""
    with Client(server.endpoints[0], timeout_s=PATIENCE_S) as client:
        streams = [
            client.submit("naïve 😀", max_tokens=48, temperature=100.0, seed=seed, ignore_eos=True) for seed in range(8)
        ]
        for stream in streams:
            completion = stream.result()
            whole = tokenizer.decode(completion.token_ids)
            assert whole.startswith(completion.text)
            assert set(whole[len(completion.text) :]) <= {REPLACEMENT}


def test_stop_ids_and_eos(server: ServerProcess, tokenizer: Tokenizer) -> None:
    with Client(server.endpoints[0], timeout_s=PATIENCE_S) as client:
        free = client.generate(PROMPT, max_tokens=32, temperature=0, ignore_eos=True).token_ids
        stop = free[10]
        stopped = client.generate(PROMPT, max_tokens=32, temperature=0, stop_token_ids=[stop], ignore_eos=True)
        assert stopped.finish_reason == "stop_id" and stopped.token_ids == free[: free.index(stop) + 1]
        assert client.health().eos_ids == list(tokenizer.eos_ids) != []


def test_ingress_that_was_stopped_for_too_long_comes_back(server: ServerProcess) -> None:
    """The director drops it and frees its pages; once it runs again it attaches and resubmits, and no token is lost or doubled."""
    with Client(server.endpoints[0], timeout_s=PATIENCE_S) as client:
        expected = client.generate(PROMPT, max_tokens=500, temperature=0, ignore_eos=True).token_ids
        before = client.stats()
        pid = server.ingress_pid(0)
        for _ in range(NUM_TRIES):  # should this process come too late: once more
            streams = [client.submit(PROMPT, max_tokens=500, temperature=0, ignore_eos=True) for _ in range(8)]
            for stream in streams:
                next(stream)
            os.kill(pid, signal.SIGSTOP)
            try:
                wait_for(lambda: process_state(pid) == "T", PATIENCE_S, "it stands still")
                if server.status()["num_running"] < 8:
                    continue
                wait_for(
                    lambda: server.status()["ingress_drops"] > before.engine["ingress_drops"], PATIENCE_S, "dropped"
                )
                wait_for(lambda: server.status()["num_pages_used"] == 0, PATIENCE_S, "its pages are free")
                break
            finally:
                os.kill(pid, signal.SIGCONT)
                for stream in streams:
                    completion = stream.result()
                    assert (completion.token_ids, completion.finish_reason) == (expected, "length")
        else:
            raise AssertionError("the streams ended before their ingress stood still")
        after = client.stats()
        assert server.ingress_pid(0) == pid
    # More, should the machine have stood still for INGRESS_TIMEOUT_S besides.
    assert after.ingress["attaches"] >= before.ingress["attaches"] + 1
    assert after.ingress["resubmissions"] >= before.ingress["resubmissions"] + 8


def test_client_that_stops_reading_gets_everything_later(server: ServerProcess) -> None:
    num_requests, max_tokens = 24, 64
    sampling = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    with (
        RawClient(server.endpoints[0], recv_hwm=1, recv_bytes=4096) as slow,
        Client(server.endpoints[0], timeout_s=PATIENCE_S) as same_ingress,
        Client(server.endpoints[1], timeout_s=PATIENCE_S) as other_ingress,
    ):
        expected = same_ingress.generate("x", max_tokens=max_tokens, temperature=0, ignore_eos=True).token_ids
        for request_id in range(num_requests):
            slow.send(encoded(id=request_id, sampling=sampling))
        for client in (same_ingress, other_ingress):
            assert client.generate("y", max_tokens=8, temperature=0).num_output_tokens > 0
        wait_for(lambda: server.status()["num_running"] == 0, PATIENCE_S, "the engine is done with all of them")
        output: dict[int, list[int]] = {request_id: [] for request_id in range(num_requests)}
        num_finished = 0
        while num_finished < num_requests:
            for message in slow.receive():
                if isinstance(message, Tokens):
                    assert message.index == len(output[message.id])
                    output[message.id] += message.token_ids
                num_finished += isinstance(message, Finish)
    assert all(tokens == expected for tokens in output.values())


def test_nonsense_does_not_reach_the_engine(server: ServerProcess) -> None:
    accepted = server.status()["requests_accepted"]
    with RawClient(server.endpoints[0]) as raw:
        frames = [b"", b"\xc1", encoded()[:-2], encoded(prompt=[10**6]), encoded(prompt=""), os.urandom(10_000_000)]
        for frame in [*frames, encoded(sampling={"max_tokens": 10**6}), encoded(sampling={"temprature": 1})]:
            raw.send(frame)
            (error,) = raw.receive()
            assert isinstance(error, Error) and error.remedy
        assert server.status()["requests_rejected"] == 0
        assert server.status()["requests_accepted"] == accepted


def test_random_requests_from_many_clients_leave_nothing_behind(server: ServerProcess) -> None:
    """Lengths, cancels, deadlines, stops, refusals, several clients on both ingresses; every request has exactly one end."""
    generator = random.Random(7)
    started = time.monotonic()

    async def one_request(client: AsyncClient, seed: int) -> str:
        rng = random.Random(seed)
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 3, 63, 64, 65, 130, 300]))]
        max_tokens = rng.choice([1, 2, 8, 24, 5000])
        stream = client.submit(prompt, max_tokens=max_tokens, temperature=rng.choice([0.0, 1.0]), seed=seed)
        if rng.random() < 0.1:  # before it has said anything, on a machine however fast
            stream.cancel()
        try:
            async for _ in stream:
                if rng.random() < 0.1:
                    stream.cancel()
        except RequestRefusedError as refused:
            return refused.code
        assert stream.finish is not None
        return stream.finish.reason

    async def one_client(endpoint: str) -> list[str]:
        async with AsyncClient(endpoint, timeout_s=PATIENCE_S) as client:
            return await asyncio.gather(*(one_request(client, generator.randrange(2**32)) for _ in range(50)))

    async def all_clients() -> list[str]:
        groups = await asyncio.gather(*(one_client(endpoint) for endpoint in server.endpoints * 2))
        return [reason for group in groups for reason in group]

    reasons = asyncio.run(all_clients())
    assert len(reasons) == 200
    assert (
        {"length", "cancelled", "prompt_too_long"}
        <= set(reasons)
        <= {
            *("length", "cancelled", "prompt_too_long", "eos"),
        }
    )
    assert_all_pages_are_back(server.status)
    print(f"200 requests in {time.monotonic() - started:.1f} s")
