"""What an engine must hold on any device: scenarios that take a model and the device's settings, and assert.

Called with device="emulated" by tests/host/test_engine.py, test_faults.py and test_engine_scenarios.py, and with device="gpu" by
tests/gpu/test_engine_gpu.py. `options` are fields of Config and go to the engine.
Test: pytest tests/host/test_engine_scenarios.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from blinkimp import ring_abi as abi
from blinkimp.host.engine_view import look
from blinkimp.nic_shim.queue_pair import PortStatus, sampling_record
from blinkimp.ring_abi import CompletionKind, FinishReason
from tests.host.engine_support import (
    TINY_VOCAB,
    HostProcess,
    PortClient,
    assert_all_pages_are_back,
    finished,
    process_state,
    running_engine,
    wait_for,
)
from tests.host.standing_still import held
from tests.support import PATIENCE_S, ROOT, python_path

# Owns a queue pair, starts requests, reads nothing: they fill the completion ring and hold pages until somebody takes them away.
VICTIM = """
import sys, time
from tests.host.engine_support import PortClient
client = PortClient(sys.argv[1], 1)
for i in range(8):
    client.submit([i, i + 1, i + 2], 400)
print("submitted", flush=True)
time.sleep(600)
"""


# ---- Processes that stop or die ------------------------------------------------------------------------------------
def streams_finish_while_the_host_is_stopped(model: Path, **options: Any) -> None:
    # The ring holds a small part of what 32 streams say: no device is so fast that they end before the host is stopped.
    with (
        HostProcess(model, num_completions=1024, **options) as host,
        PortClient(host.engine_name, 0) as client,
    ):
        expected = client.generate([0, 1], 400).tokens
        ids = [client.submit([i % 4, 1], 400) for i in range(32)]
        client.wait_begun(ids)
        os.kill(host.process.pid, signal.SIGSTOP)
        wait_for(lambda: process_state(host.process.pid) == "T", PATIENCE_S, "the host is stopped")
        client.poll()
        assert client.num_unfinished == 32, "the streams must still run when the host stops"
        client.wait_all(PATIENCE_S)
        late = client.generate([3, 2, 1], 50)  # a request that begins after the stop
        assert process_state(host.process.pid) == "T", "the host ran in between"
        assert all(client.streams[i].end == finished(FinishReason.LENGTH) for i in ids)
        assert all(client.streams[i].tokens == expected for i in ids[::4])
        assert late.end == finished(FinishReason.LENGTH)
        os.kill(host.process.pid, signal.SIGCONT)
        time.sleep(0.3)
        assert host.process.poll() is None, "the watchdog must not blame the device for the host's own pause"
        host.process.send_signal(signal.SIGTERM)
        assert host.wait(PATIENCE_S) == (0, "")


def killed_ingress_frees_its_pages_and_disturbs_nobody(model: Path, **options: Any) -> None:
    sizes = {"num_completions": 64, "ingress_timeout_s": 3.0}
    with HostProcess(model, **sizes, **options) as host, PortClient(host.engine_name, 0) as client:
        expected = client.generate([9, 8, 7], 300).tokens
        environment = {**os.environ, "PYTHONPATH": python_path()}
        command = [sys.executable, "-c", VICTIM, host.engine_name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as victim:
            assert victim.stdout is not None and victim.stdout.readline() == "submitted\n"
            # How many of its eight are taken before its ring is full is a matter of speed: a request is taken only with credit for its answer.
            wait_for(lambda: host.status()["requests_accepted"] > 1, PATIENCE_S, "the victim's requests run")
            num_stalls = host.status()["credit_stalls"]
            wait_for(lambda: host.status()["credit_stalls"] > num_stalls, PATIENCE_S, "the victim's ring is full")
            assert host.status()["num_pages_used"] > 0
            stream = client.streams[client.submit([9, 8, 7], 300)]
            wait_for(lambda: client.poll() >= 0 and len(stream.tokens) > 0, PATIENCE_S, "our stream runs beside it")
            assert stream.end is None
            victim.kill()
        died_at = time.monotonic()
        client.wait_all(PATIENCE_S)
        assert stream.tokens == expected
        while host.status()["ingress_drops"] == 0:
            assert client.generate([9, 8, 7], 300).tokens == expected
            assert time.monotonic() - died_at < PATIENCE_S, "a dead ingress must be noticed"
        assert_all_pages_are_back(host.status)
        freed_s = time.monotonic() - died_at
        print(f"the dead ingress's pages were free after {freed_s:.2f} s")

        def is_counted() -> bool:
            status = host.status()
            num_of_victim = status["requests_accepted"] - status["finished_length"]
            return status["finished_cancelled"] == num_of_victim > 0 and status["num_queue_pairs_attached"] == 1

        wait_for(is_counted, PATIENCE_S, "all requests of the victim are counted as cancelled")
        with PortClient(host.engine_name, 1) as successor:  # the place can be taken again
            assert successor.generate([9, 8, 7], 300).tokens == expected


def sigterm_drains_the_host(model: Path, **options: Any) -> None:
    with HostProcess(model, num_completions=1024, **options) as host, PortClient(host.engine_name, 0) as client:
        ids = [client.submit([i], 400) for i in range(32)]
        client.wait_begun(ids)
        assert client.num_unfinished == 32
        host.process.send_signal(signal.SIGTERM)
        client.wait_all(PATIENCE_S)
        assert all(client.streams[i].end == finished(FinishReason.LENGTH) for i in ids), "nothing was cut short"
        assert all(len(client.streams[i].tokens) == 400 for i in ids)
        assert host.wait(PATIENCE_S) == (0, "")


# ---- Many requests -------------------------------------------------------------------------------------------------
def random_requests_leave_nothing_behind(
    model: Path, num_requests: int = 10_000, mean_tokens: int = 10, **options: Any
) -> None:
    """Lengths, sampling, stop ids and cancels at random over two queue pairs; few pages and short rings, so that preemption,
    credit stalls and full rings all happen. mean_tokens: of the output, of a fast device more, to keep it busy."""
    rng = np.random.default_rng(7)
    sizes = {"num_pages": 16, "max_batch": 32, "max_context": 256, "num_completions": 256, "num_submissions": 64}
    with (
        running_engine(model, num_requests=256, **sizes, **options) as engine,
        PortClient(engine.config.engine_name, 0) as first,
        PortClient(engine.config.engine_name, 1) as second,
    ):
        asked: list[dict[int, tuple[int, tuple[int, ...], bool]]] = [{}, {}]
        cancelled: list[set[int]] = [set(), set()]
        clients = [first, second]
        for _ in range(num_requests):
            which = int(rng.integers(2))
            client = clients[which]
            prompt = [int(token) for token in rng.integers(0, TINY_VOCAB, int(rng.geometric(1 / 24)) % 180 + 1)]
            max_tokens = int(rng.geometric(1 / mean_tokens)) % 70 + 1
            stop_ids = (
                tuple(int(token) for token in rng.integers(0, TINY_VOCAB, int(rng.integers(0, 17))))
                if rng.random() < 0.3
                else ()
            )
            ignore_eos = bool(rng.random() < 0.5)
            temperature, top_k = float(rng.choice([0.0, 1.0])), int(rng.integers(0, 9))
            seed = int(rng.integers(1 << 62))
            sampling = sampling_record(temperature=temperature, top_k=top_k, seed=seed, ignore_eos=ignore_eos)
            request_id = client.submit(prompt, max_tokens, sampling, stop_ids, timeout_s=PATIENCE_S)
            asked[which][request_id] = (max_tokens, stop_ids, ignore_eos)
            if rng.random() < 0.15:
                victim = int(rng.integers(max(1, request_id - 40), request_id + 1))  # waiting, running, or long gone
                client.port.try_cancel(victim)
                cancelled[which].add(victim)
            for other in clients:
                other.poll()
        for which, client in enumerate(clients):
            client.wait_all(PATIENCE_S)
            for request_id, stream in client.streams.items():
                max_tokens, stop_ids, ignore_eos = asked[which][request_id]
                assert stream.end is not None
                ends = [i for i, t in enumerate(stream.tokens) if t in stop_ids or (t == 2 and not ignore_eos)]
                match FinishReason(stream.end[1]):
                    case FinishReason.LENGTH:
                        assert len(stream.tokens) == max_tokens and not ends
                    case FinishReason.STOP_ID | FinishReason.EOS:
                        assert ends == [len(stream.tokens) - 1]
                    case FinishReason.CANCELLED:
                        assert request_id in cancelled[which] and not ends
                    case reason:
                        raise AssertionError(f"request {request_id} ended as {reason.name}")
        assert_all_pages_are_back(engine.status)
        status = engine.status()
        print({name: value for name, value in status.items() if value})
        assert status["requests_accepted"] == num_requests
        ended = ("finished_eos", "finished_stop_id", "finished_length", "finished_cancelled")
        assert sum(status[name] for name in ended) == num_requests and min(status[name] for name in ended) > 50
        if status["preemptions"] == 0:
            # A fast engine never had many at once. These stall for credit until all are submitted: then sixteen run, a page each, and want a second.
            for _ in range(32):
                prompt = [int(token) for token in rng.integers(0, TINY_VOCAB, 50)]
                first.submit(prompt, 60, sampling_record(temperature=0.0, ignore_eos=True))
            first.wait_all(PATIENCE_S)
        assert engine.status()["preemptions"] > 0
        wait_for(lambda: engine.status()["num_free_requests"] == 256, PATIENCE_S, "every request's entry is free")
        wait_for(
            lambda: engine.status()["integrity_checks"] > status["integrity_checks"], PATIENCE_S, "an integrity check"
        )
        assert_all_pages_are_back(engine.status)


def batch_of_256_streams_runs_at_once(model: Path, **options: Any) -> None:
    """All 256 in one step, and the tokens of each prompt as those that it gets alone."""
    # The ring holds a small part of what 256 streams say, and nobody reads until they all run: none of them ends before.
    num_output, sizes = 300, {"max_batch": 256, "max_step_tokens": 512, "num_completions": 1 << 14}
    with running_engine(model, **sizes, **options) as engine, PortClient(engine.config.engine_name, 0) as client:
        expected = [client.generate([i, 7, 2 * i], num_output).tokens for i in range(8)]
        assert len({tuple(tokens) for tokens in expected}) > 4, "a model that ignores its prompt proves nothing"
        with held(engine):
            ids = [client.submit([i % 8, 7, 2 * (i % 8)], num_output) for i in range(256)]
        wait_for(lambda: engine.status()["num_running"] == 256, PATIENCE_S, "256 streams run")
        client.wait_all(PATIENCE_S)
        assert [client.streams[request_id].tokens for request_id in ids] == expected * 32
        assert_all_pages_are_back(engine.status)


# ---- Back-pressure and cancels -------------------------------------------------------------------------------------
def reader_that_stops_holds_up_nobody_and_loses_nothing(model: Path, **options: Any) -> None:
    with (
        running_engine(model, num_completions=64, **options) as engine,
        PortClient(engine.config.engine_name, 0) as stopped,
        PortClient(engine.config.engine_name, 1) as reading,
    ):
        prompts = [[i, 5, 9] for i in range(6)]
        expected = [reading.generate(prompt, 200).tokens for prompt in prompts]
        ids = [stopped.submit(prompt, 200) for prompt in prompts]
        wait_for(
            lambda: engine.status()["credit_stalls"] > 0, PATIENCE_S, "the ring of the reader that stopped is full"
        )
        for prompt, tokens in zip(prompts, expected, strict=True):
            assert reading.generate(prompt, 200).tokens == tokens, "others go on"
        entries = stopped.port.poll()
        assert 32 <= len(entries) <= 64, f"{len(entries)} unread completions in a ring of 64"
        for entry in entries:
            stopped.take(entry)
        assert stopped.num_unfinished == 6, "they must have waited for the reader"
        stopped.wait_all(PATIENCE_S)
        assert [stopped.streams[request_id].tokens for request_id in ids] == expected
        assert_all_pages_are_back(engine.status)


def cancel_takes_effect_at_the_next_commit(model: Path, **options: Any) -> None:
    """A PING after the CANCEL marks the poll that has seen both: from its PONG on the cancelled request must say no token.

    The ring holds few completions, so that no request ends before this slow client has cancelled it."""
    with (
        running_engine(model, num_completions=64, **options) as engine,
        PortClient(engine.config.engine_name, 0) as client,
    ):
        alone = client.generate([4, 4], 400).tokens
        num_cancelled = 0
        for round_idx in range(30):
            other = client.submit([4, 4], 400)
            victim = client.submit([round_idx, 1, 2], 400)
            stream = client.streams[victim]
            deadline = time.monotonic() + PATIENCE_S
            while not stream.tokens:  # without a pause: it may run for a few milliseconds only
                client.poll()
                assert time.monotonic() < deadline, f"no token\n{client.port.dump()}"
            assert client.port.try_cancel(victim) == PortStatus.OK
            assert client.port.try_ping(77, 0) == PortStatus.OK
            num_after_pong: int | None = None
            while stream.end is None or num_after_pong is None:
                assert time.monotonic() < deadline, f"no end after a cancel\n{client.port.dump()}"
                for entry in client.port.poll():
                    kind = CompletionKind((int(entry["commit"]) >> abi.COMMIT_KIND_SHIFT) & 0xFF)
                    if kind == CompletionKind.PONG:
                        num_after_pong = 0
                    elif num_after_pong is not None and int(entry["request_id"]) == victim:
                        num_after_pong += kind == CompletionKind.TOKEN
                    client.take(entry)
            assert num_after_pong == 0, f"{num_after_pong} tokens after the cancel was seen"
            if stream.end == finished(FinishReason.CANCELLED):
                num_cancelled += 1
                assert len(stream.tokens) < 400, "a request that said all it had has not been cancelled"
                # What is left belongs to the other stream, which may have ended by now.
                wait_for(
                    lambda: (
                        (status := engine.status())["num_running"] <= 1
                        and status["num_pages_used"] <= -(-402 // abi.PAGE_TOKENS)
                    ),
                    PATIENCE_S,
                    "the cancelled request has left the batch, and its pages are back",
                )
            client.wait_all(PATIENCE_S)
            assert client.streams[other].tokens == alone, "the other stream noticed"
        print(f"{num_cancelled} of 30 requests were cancelled while they ran")
        assert num_cancelled == engine.status()["finished_cancelled"] == 30, num_cancelled
        assert_all_pages_are_back(engine.status)


# ---- Determinism ---------------------------------------------------------------------------------------------------
def seeded_tokens_do_not_depend_on_the_batch(model: Path | str, **options: Any) -> None:
    def sampling(seed: int) -> Any:
        return sampling_record(temperature=0.8, top_p=0.9, seed=seed, ignore_eos=True)

    rng = np.random.default_rng(3)
    vocab = TINY_VOCAB
    with running_engine(model, max_batch=80, **options) as engine, PortClient(engine.config.engine_name, 0) as client:
        prompts = [[int(t) for t in rng.integers(3, vocab, size)] for size in (1, 3, 17, 64, 65, 90, 128, 200)]
        alone = [client.generate(prompt, 96, sampling=sampling(1000 + i)).tokens for i, prompt in enumerate(prompts)]
        again = client.generate(prompts[2], 96, sampling=sampling(1002)).tokens
        assert again == alone[2], "the same seed, the same tokens"
        assert client.generate(prompts[2], 96, sampling=sampling(5)).tokens != alone[2], "the seed must matter"
        for i in range(64):  # greedy and sampled ones, short and long
            noise = [int(t) for t in rng.integers(3, vocab, int(rng.integers(1, 180)))]
            max_tokens = int(rng.integers(20, 200))
            if i % 2:
                client.submit(noise, max_tokens)
            else:
                client.submit(noise, max_tokens, sampling_record(temperature=1.0, top_k=i, seed=i, ignore_eos=True))
        ids = [client.submit(prompt, 96, sampling=sampling(1000 + i)) for i, prompt in enumerate(prompts)]
        client.wait_all(PATIENCE_S)
        assert [client.streams[request_id].tokens for request_id in ids] == alone


def context_fills_to_its_end(model: Path | str, num_prompt: int, num_output: int, **options: Any) -> None:
    """A prompt of thousands of tokens, continued to the context's last token: alone, beside others, and resumed by its own
    prefill in the middle of what decode steps wrote."""
    with running_engine(model, **options) as engine, PortClient(engine.config.engine_name, 0) as client:
        max_context = engine.plan.sizes.max_context
        assert num_prompt + num_output == max_context, (num_prompt, num_output, max_context)
        rng = np.random.default_rng(11)
        prompt = [int(token) for token in rng.integers(3, engine.model.vocab, num_prompt)]
        alone = client.generate(prompt, num_output, timeout_s=PATIENCE_S)
        assert alone.end == finished(FinishReason.LENGTH) and len(alone.tokens) == num_output
        ids = [client.submit(prompt, num_output)]
        ids += [client.submit([int(token) for token in rng.integers(3, engine.model.vocab, 300)], 40) for _ in range(3)]
        client.wait_all(PATIENCE_S)
        assert client.streams[ids[0]].tokens == alone.tokens
        half = num_output // 2
        resumed = client.generate(prompt + alone.tokens[:half], num_output - half, timeout_s=PATIENCE_S)
        assert resumed.tokens == alone.tokens[half:], "prefill and decode must leave the same bits"
        refused = client.generate([*prompt, 1], num_output)
        assert refused.end == (CompletionKind.REJECT, int(abi.RejectReason.TOO_LONG))
        assert_all_pages_are_back(engine.status)


# ---- Observers -----------------------------------------------------------------------------------------------------
def observers_see_each_start_and_each_step_by_its_rows(model: Path | str, **options: Any) -> None:
    """START once for each request, before its first token; steps counted by rows in the engine page."""
    with running_engine(model, **options) as engine, PortClient(engine.config.engine_name, 0) as client:
        started: list[int] = []
        take = client.take

        def count_starts(entry: Any) -> None:
            if int(entry["commit"]) >> abi.COMMIT_KIND_SHIFT & 0xFF == CompletionKind.START:
                started.append(int(entry["request_id"]))
            take(entry)

        client.take = count_starts  # type: ignore[method-assign]
        ids = [client.submit([idx % 50 + 3] * (1 + 7 * idx % 90), 2 + idx % 5) for idx in range(40)]
        client.wait_all(PATIENCE_S)
        assert sorted(started) == sorted(ids)
        assert_all_pages_are_back(engine.status)
        status = engine.status()
        view = look(engine.config.engine_name)
        assert sum(view.step_counts) == status["step"] > 0 and status["preemptions"] == 0
        # A request's first token comes with the last row of its prompt; every other one has a row of its own.
        assert view.num_step_rows == status["prompt_tokens"] + status["output_tokens"] - len(ids)
        least = sum(num * (1 if idx == 0 else 2 ** (idx - 1) + 1) for idx, num in enumerate(view.step_counts))
        assert least <= view.num_step_rows <= sum(num << idx for idx, num in enumerate(view.step_counts))
