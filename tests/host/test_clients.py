"""The sync and the async client against a running ingress: iteration, deadlines, silence, and restarts of the server.

Run: pytest tests/host/test_clients.py
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq

from blinkimp.async_client import AsyncClient, AsyncTokenStream
from blinkimp.client import (
    BadRequestError,
    Client,
    ClientError,
    RequestRefusedError,
    ServerTimeoutError,
    configure_socket,
)
from blinkimp.nic_shim import sessions
from blinkimp.nic_shim.zmq_ingress import ZmqIngress
from blinkimp.protocol import Tokens, decode_server_messages
from tests.ingress_support import Served, expected_ids, hold_after_first_tokens, serve, wait_until
from tests.support import PATIENCE_S

Result = TypeVar("Result")


def with_async_client(served: Served, use: Callable[[AsyncClient], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        async with AsyncClient(served.endpoint, timeout_s=PATIENCE_S) as client:
            return await use(client)

    return asyncio.run(run())


async def first_tokens(served: Served, streams: Sequence[AsyncTokenStream]) -> None:
    """Of a model that stands still: it is let go for a step, and another while a stream has none (one that ends may have had the last)."""
    while len(served.director.queue_pairs[0].running) < len(streams):
        await asyncio.sleep(0.005)
    for stream in streams:
        first = asyncio.ensure_future(anext(aiter(stream)))
        while not first.done():
            served.director.num_allowed_steps = 1
            await asyncio.wait({first}, timeout=0.05)
        await first


def restart_ingress(served: Served) -> ZmqIngress:
    """Ends the ingress without a drain, as a crash would, and starts another at the same endpoint."""
    served.ingress.stop()
    assert served.ingress.join(PATIENCE_S)
    served.ingress = ZmqIngress(
        served.director.regions.engine_name, 0, served.endpoint, served.tokenizer, eos_ids=served.ingress.link.eos_ids
    )
    served.ingress.start()
    return served.ingress


# ---- Sync ------------------------------------------------------------------------------------------------------------
def test_iteration_over_chunks_text_and_tokens(tmp_path: Path) -> None:
    with serve(tmp_path) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client:
        assert list(client.submit("x", max_tokens=50).tokens()) == expected_ids(served, 1, 50)
        stream = client.submit("x", max_tokens=50)
        text = "".join(stream.text_pieces())
        assert text == served.tokenizer.decode(expected_ids(served, 1, 50)).rstrip("\ufffd")
        assert stream.result().text == text and stream.finish is not None


def test_deadline_cancels(tmp_path: Path) -> None:
    with serve(tmp_path) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client:
        served.director.paused = True  # it would never end by itself
        started = time.monotonic()
        with pytest.raises(ServerTimeoutError, match="of 2000 tokens at its deadline"):
            client.generate("x", max_tokens=2000, deadline_s=0.2)
        assert time.monotonic() - started >= 0.2
        wait_until(lambda: not served.director.queue_pairs[0].running, "it is cancelled in the engine")
        served.director.paused = False
        assert client.generate("x", max_tokens=2).num_output_tokens == 2  # the client is still good


def test_no_server_is_a_timeout() -> None:
    with Client("tcp://127.0.0.1:1", timeout_s=0.5) as client:
        with pytest.raises(ServerTimeoutError, match=r"no word from tcp://127\.0\.0\.1:1 for .* s; expected"):
            client.generate("x")
        with pytest.raises(ServerTimeoutError):
            client.health()


def test_server_of_another_protocol_is_noticed() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with contextlib.closing(context.socket(zmq.ROUTER)) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        with Client(f"tcp://127.0.0.1:{port}", timeout_s=PATIENCE_S) as client:
            stream = client.submit("x")
            identity, _ = router.recv_multipart()
            router.send_multipart([identity, b"what?"])
            with pytest.raises(ClientError, match="no message of this protocol"):
                stream.result()
    context.term()


def test_client_waits_for_a_server_that_starts_later(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        served.ingress.stop()
        assert served.ingress.join(PATIENCE_S)
        with Client(served.endpoint, timeout_s=PATIENCE_S) as client:
            stream = client.submit("x", max_tokens=20)
            time.sleep(0.2)
            restart_ingress(served)
            assert stream.result().token_ids == expected_ids(served, 1, 20)


def test_streams_outlive_a_restarted_server(tmp_path: Path) -> None:
    with serve(tmp_path) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client:
        streams = hold_after_first_tokens(
            served, lambda: [client.submit([7] * number, max_tokens=400, temperature=0) for number in (1, 2, 3)]
        )
        restart_ingress(served)
        served.director.paused = False
        for number, stream in zip((1, 2, 3), streams, strict=True):
            completion = stream.result()
            assert completion.token_ids == expected_ids(served, number, 400)
            assert completion.text == served.tokenizer.decode(completion.token_ids).rstrip("\ufffd")
            assert (completion.num_prompt_tokens, completion.num_output_tokens) == (number, 400)
        resumed = [request for request in served.director.queue_pairs[0].seen if request.max_tokens < 400]
        assert len(resumed) == 3  # they went on with what they had, not from the start


def lose_connections(client: Client, num_frames: int) -> None:
    """From now on the connection is lost behind each so many frames with output; the client is soon back with a new one."""
    core, num_seen = client._core, 0
    handle = core.handle

    def handle_and_lose(frame: bytes, now: float) -> None:
        nonlocal num_seen
        handle(frame, now)
        num_seen += any(isinstance(message, Tokens) for message in decode_server_messages(frame))
        if num_seen == num_frames:
            num_seen = 0
            client._socket.close()
            client._socket = client._context.socket(zmq.DEALER)
            configure_socket(client._socket, None)
            client._socket.connect(core.endpoint)
            core._next_tick = now  # it need not wait to ask what the server knows

    core.handle = handle_and_lose  # type: ignore[method-assign]


@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_text_outlives_connections_lost_between_full_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool, num_frames: int
) -> None:
    """I5 of nic_shim/live_request.py: requests share a frame, so each is cut anywhere, also within a character or a stop string."""
    monkeypatch.setattr(sessions, "MAX_TOKENS_PER_FRAME", 7)
    with serve(tmp_path, step_s=0.0) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client:
        lose_connections(client, num_frames)
        options: dict[str, Any] = {"stream": stream, "max_tokens": 60, "stop": ["done. naïve café 😀"]}
        streams = [client.submit([7] * number, **options) for number in (1, 2, 40)]
        for number, one in zip((1, 2, 40), streams, strict=True):
            completion = one.result()
            assert completion.token_ids == expected_ids(served, number, len(completion.token_ids))
            whole = served.tokenizer.decode(completion.token_ids).rstrip("\ufffd")
            shown, _, rest = whole.partition("done. naïve café 😀")
            assert (completion.text, rest) == (shown, "")
            assert completion.finish_reason == ("length" if shown == whole else "stop")


def test_prompt_that_cannot_be_sent_harms_no_other_stream(tmp_path: Path) -> None:
    with serve(tmp_path) as served, Client(served.endpoint, timeout_s=PATIENCE_S) as client:
        (stream,) = hold_after_first_tokens(served, lambda: [client.submit("x", max_tokens=400, temperature=0)])
        for prompt in ("a\ud800", [2**70], b"abc", [1.0], None):
            with pytest.raises(BadRequestError, match=r"^prompt"):
                client.generate(prompt, max_tokens=2)  # type: ignore[arg-type]
        client._core.tick(client._core.seconds_to_tick(0.0))  # the client says which requests it believes to run
        client.health()  # and has read the answer
        served.director.paused = False
        assert stream.result().token_ids == expected_ids(served, 1, 400)


# ---- Async -----------------------------------------------------------------------------------------------------------
def test_async_streams_run_together(tmp_path: Path) -> None:
    with serve(tmp_path) as served:

        async def use(client: AsyncClient) -> None:
            health = await client.health()
            assert health.status == "ok"
            completions = await asyncio.gather(*(client.generate([7] * n, max_tokens=50) for n in range(1, 33)))
            for number, completion in enumerate(completions, start=1):
                assert completion.token_ids == expected_ids(served, number, 50)
            pieces = [piece async for piece in client.submit("x", max_tokens=50).text_pieces()]
            assert len(pieces) > 5
            tokens = [token async for token in client.submit("x", max_tokens=50).tokens()]
            assert tokens == expected_ids(served, 1, 50)
            assert (await client.stats()).ingress["requests"] == 34

        with_async_client(served, use)


def test_async_cancel_deadline_and_early_exit(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        served.director.paused = True  # none of them ends by itself

        async def use(client: AsyncClient) -> None:
            stream = client.submit("x", max_tokens=2000)
            await first_tokens(served, [stream])
            stream.cancel()
            assert (await stream.result()).finish_reason == "cancelled"
            with pytest.raises(ServerTimeoutError, match="at its deadline"):
                await client.generate("x", max_tokens=2000, deadline_s=0.1)
            async with client.submit("x", max_tokens=2000) as left_early:
                await first_tokens(served, [left_early])
            await asyncio.to_thread(wait_until, lambda: not served.director.queue_pairs[0].running, "all are cancelled")
            with pytest.raises(RequestRefusedError) as caught:
                await client.generate("x", max_tokens=5000)
            assert caught.value.code == "prompt_too_long"
            with pytest.raises(ValueError, match="expected fields out of"):
                client.submit("x", banana=1)

        with_async_client(served, use)


def test_async_task_cancellation_leaves_the_client_good(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        served.director.paused = True

        async def use(client: AsyncClient) -> None:
            task = asyncio.create_task(client.generate("x", max_tokens=2000))
            while not served.director.queue_pairs[0].running:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            served.director.paused = False
            assert (await client.generate("x", max_tokens=2)).num_output_tokens == 2

        with_async_client(served, use)


def test_async_prompt_that_cannot_be_sent_harms_no_other_stream(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        served.director.paused = True
        complaints: list[object] = []  # of the event loop: exceptions in callbacks

        async def use(client: AsyncClient) -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
            stream = client.submit("x", max_tokens=400, temperature=0)
            await first_tokens(served, [stream])
            for prompt in ("a\ud800", [2**70], b"abc"):
                with pytest.raises(BadRequestError, match=r"^prompt"):
                    await client.generate(prompt, max_tokens=2)  # type: ignore[arg-type]
            client._core.tick(client._core.seconds_to_tick(0.0))
            await client.health()
            served.director.paused = False
            assert (await stream.result()).token_ids == expected_ids(served, 1, 400)

        with_async_client(served, use)
        assert not complaints


def test_async_streams_outlive_a_restarted_server(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        served.director.paused = True

        async def use(client: AsyncClient) -> None:
            streams = [client.submit([7] * number, max_tokens=400, temperature=0) for number in (1, 2)]
            await first_tokens(served, streams)
            await asyncio.to_thread(restart_ingress, served)
            served.director.paused = False
            for number, stream in zip((1, 2), streams, strict=True):
                assert (await stream.result()).token_ids == expected_ids(served, number, 400)

        with_async_client(served, use)


def test_async_silence_is_a_timeout() -> None:
    async def run() -> None:
        async with AsyncClient("tcp://127.0.0.1:1", timeout_s=0.5) as client:
            with pytest.raises(ServerTimeoutError):
                await client.generate("x")
            with pytest.raises(ServerTimeoutError):
                await client.stats()

    asyncio.run(run())
