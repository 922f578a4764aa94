"""An engine on the emulated device, end to end through real shared memory. Test: pytest tests/host/test_engine.py"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.host import engine_process
from blinkimp.host.device_protocol import DeviceError
from blinkimp.host.emulated_device import EmulatedDevice
from blinkimp.host.emulated_process import IDLE_SLEEP_NS
from blinkimp.host.engine import Engine, EngineFaultError, choose_device
from blinkimp.host.engine_lock import EngineLock
from blinkimp.host.memory_plan import MemoryPlanError
from blinkimp.host.model_config import UnsupportedModelError
from blinkimp.host.shared_memory import SHM_DIR, EngineAlreadyRunningError
from blinkimp.nic_shim.queue_pair import PortStatus, sampling_record
from blinkimp.ring_abi import CompletionKind, EngineState, FinishReason, RejectReason
from tests.host.engine_support import (
    TINY_POSITIONS,
    TINY_VOCAB,
    PortClient,
    assert_all_pages_are_back,
    engine_config,
    finished,
    running_engine,
    wait_for,
)
from tests.host.standing_still import held
from tests.support import PATIENCE_S


# ---- Tokens --------------------------------------------------------------------------------------------------------
def test_tokens_do_not_depend_on_batch_threads_or_chunks(tiny: Path) -> None:
    prompts = [[(7 * i + j) % TINY_VOCAB for j in range(1 + 11 * i)] for i in range(24)]
    with running_engine(tiny, num_threads=1, max_batch=1) as engine, PortClient(engine.config.engine_name, 0) as client:
        alone = [client.generate(prompt, 40).tokens for prompt in prompts]
    assert all(len(tokens) == 40 for tokens in alone)
    assert len({tuple(tokens) for tokens in alone}) > 20, "a model that ignores its prompt proves nothing"
    options = {"num_threads": 2, "max_batch": 16, "max_step_tokens": 48, "prefill_chunk_tokens": 17, "num_pages": 24}
    with running_engine(tiny, **options) as engine, PortClient(engine.config.engine_name, 1) as client:
        with held(engine):  # all of them are there before one ends
            ids = [client.submit(prompt, 40) for prompt in prompts]
        client.wait_all(2 * PATIENCE_S)
        assert [client.streams[request_id].tokens for request_id in ids] == alone
        assert engine.status()["preemptions"] > 0, (
            "24 pages are too few for 16 requests: some must have been recomputed"
        )


def test_stop_conditions(tiny: Path) -> None:
    with running_engine(tiny, num_threads=1) as engine, PortClient(engine.config.engine_name, 0) as client:
        tokens = client.generate([5, 6, 7], 50).tokens
        assert client.streams[1].end == finished(FinishReason.LENGTH)
        stop_at = next(i for i in range(5, 50) if tokens[i] not in tokens[:i])
        stream = client.generate([5, 6, 7], 50, stop_ids=(tokens[stop_at],))
        assert stream.end == finished(FinishReason.STOP_ID) and stream.tokens == tokens[: stop_at + 1]
        assert_all_pages_are_back(engine.status)


def test_eos_ends_a_request_unless_ignored(tiny: Path, tmp_path: Path) -> None:
    with running_engine(tiny, num_threads=1) as engine, PortClient(engine.config.engine_name, 0) as client:
        tokens = client.generate([5, 6, 7], 50).tokens
    # The same weights with an EOS id that the model does emit.
    eos_at = next(i for i in range(5, 50) if tokens[i] not in tokens[:i])
    for path in tiny.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    changed = {**json.loads((tiny / "config.json").read_text()), "eos_token_id": tokens[eos_at]}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with running_engine(tmp_path, num_threads=1) as engine, PortClient(engine.config.engine_name, 0) as client:
        stream = client.generate([5, 6, 7], 50, sampling=sampling_record(temperature=0.0))
        assert stream.end == finished(FinishReason.EOS) and stream.tokens == tokens[: eos_at + 1]
        assert client.generate([5, 6, 7], 50).tokens == tokens, "ignore_eos goes on"


def test_bad_requests_are_rejected_with_their_reason(tiny: Path) -> None:
    with running_engine(tiny, num_threads=1) as engine, PortClient(engine.config.engine_name, 0) as client:
        cases = [
            (([], 4), {}, RejectReason.PROMPT_EMPTY),
            (([1] * TINY_POSITIONS, 4), {}, RejectReason.TOO_LONG),
            (([1, TINY_VOCAB], 4), {}, RejectReason.BAD_TOKEN),
            (([1], 4), {"sampling": sampling_record(temperature=-1.0)}, RejectReason.BAD_SAMPLING),
            (([1], 4), {"sampling": sampling_record(top_p=float("nan"))}, RejectReason.BAD_SAMPLING),
        ]
        for arguments, options, reason in cases:
            stream = client.generate(*arguments, **options)  # type: ignore[arg-type]  # a table of mixed cases
            assert stream.end is not None and stream.end[1] == reason, (arguments, options, stream.end)
        assert client.generate([1], 4).end == finished(FinishReason.LENGTH)
        wait_for(lambda: engine.status()["requests_rejected"] == len(cases), PATIENCE_S, "the status has caught up")


# ---- Idle, batches and long steps ----------------------------------------------------------------------------------
def test_idle_device_sleeps_and_still_answers_at_once(tiny: Path) -> None:
    """The heartbeat counts looks at the rings; a sleep between two of them cannot be shorter than was asked for, on any machine."""
    with running_engine(tiny) as engine, PortClient(engine.config.engine_name, 0) as client:
        time.sleep(0.1)
        begin, num_looks = time.monotonic(), engine.status()["heartbeat"]
        time.sleep(0.5)
        num_looks = engine.status()["heartbeat"] - num_looks
        most = (time.monotonic() - begin) / (IDLE_SLEEP_NS / 1e9)
        assert 0 < num_looks <= most + 10, (
            "an idle device must sleep; a few of its sleeps after something to do are short"
        )
        delays_ms = []
        for ping_id in range(100):
            time.sleep(0.003)
            begin = time.perf_counter()
            client.port.try_ping(ping_id, 0)
            while not len(client.port.poll()):
                assert time.perf_counter() - begin < PATIENCE_S
            delays_ms.append((time.perf_counter() - begin) * 1e3)
    print(f"idle: {num_looks} looks; ping p50 {np.median(delays_ms):.3f} ms, p99 {np.percentile(delays_ms, 99):.3f} ms")
    assert min(delays_ms) < 200 * IDLE_SLEEP_NS / 1e6, "at its next look, but for who else has the CPU"


def test_streams_share_steps() -> None:
    # The ring holds few completions: nobody is far ahead before the last one is submitted, however slow this client is.
    with running_engine("embedded", num_completions=64) as engine, PortClient(engine.config.engine_name, 0) as client:
        prompt = [int(token) for token in np.random.default_rng(1).integers(3, engine.model.vocab, 32)]

        def num_steps(num_streams: int) -> int:
            before = engine.status()["step"]
            for _ in range(num_streams):
                client.submit(prompt, 128)
            client.wait_all(PATIENCE_S)
            wait_for(lambda: engine.status()["num_running"] == 0, PATIENCE_S, "idle")
            return engine.status()["step"] - before

        alone, batch = num_steps(1), num_steps(8)
        assert_all_pages_are_back(engine.status)
    print(f"128 tokens alone: {alone} steps; of 8 streams: {batch}")
    assert 128 <= alone <= 130, "a token a step, and perhaps one planned ahead"
    assert 128 <= batch <= 8 * 128 // 3


def test_director_goes_on_during_a_long_step() -> None:
    """Pings are answered between the acknowledgement of a prompt and its only token, which come from one step."""
    options = {"max_step_tokens": 8192, "prefill_chunk_tokens": 2048, "num_threads": 1}
    with running_engine("embedded", **options) as engine, PortClient(engine.config.engine_name, 0) as client:
        num_pongs = 0
        # This client may be too slow for a second ping, or the machine so fast that the step is over: then another one, at last a longer one.
        for attempt, num_prompts in enumerate((1, 1, 2, 4, 4)):
            assert_all_pages_are_back(engine.status)
            step = engine.status()["step"]
            tokens = np.random.default_rng(attempt).integers(3, engine.model.vocab, (num_prompts, 2000))
            with held(engine):
                ids = [client.submit(prompt, 1) for prompt in tokens.tolist()]
            num_pongs = pongs_before_the_end(client, ids[0])
            client.wait_all(PATIENCE_S)
            assert_all_pages_are_back(engine.status)
            assert engine.status()["step"] - step == 1, "all of it in one step"
            if num_pongs >= 2:
                break
        step_s = engine.status()["step_ns_last"] / 1e9
    print(f"step of {tokens.size} rows: {step_s:.2f} s, {num_pongs} pings answered meanwhile")
    assert num_pongs >= 2


def pongs_before_the_end(client: PortClient, request_id: int) -> int:
    """Of pings that are sent one after the other, from the request's acknowledgement on."""
    stream, num_pongs, is_waiting = client.streams[request_id], 0, False
    while stream.end is None:
        for entry in client.port.poll():
            if (int(entry["commit"]) >> abi.COMMIT_KIND_SHIFT) & 0xFF == CompletionKind.PONG:
                num_pongs, is_waiting = num_pongs + (not stream.tokens), False
            else:
                client.take(entry)
        if stream.is_accepted and not is_waiting and stream.end is None:
            is_waiting = client.port.try_ping(1, 0) == PortStatus.OK
        client.port.wait(0.01)
    return num_pongs


# ---- Start and stop ------------------------------------------------------------------------------------------------
def test_drain_finishes_what_runs_and_rejects_what_comes(tiny: Path) -> None:
    with running_engine(tiny, num_threads=1) as engine, PortClient(engine.config.engine_name, 0) as client:
        ids = [
            client.submit([i], 100) for i in range(32)
        ]  # they fit into the completion ring: nobody reads during the drain
        wait_for(
            lambda: client.poll() >= 0 and all(client.streams[i].tokens for i in ids),
            PATIENCE_S,
            "every stream has begun",
        )
        assert engine.drain(PATIENCE_S)
        late = client.generate([1], 4)
        assert late.end is not None and late.end[1] == RejectReason.DRAINING
        client.wait_all(PATIENCE_S)
        assert all(
            client.streams[i].end == finished(FinishReason.LENGTH) and len(client.streams[i].tokens) == 100 for i in ids
        )
        assert_all_pages_are_back(engine.status)
        assert engine.status()["state"] == EngineState.DRAINING


def test_drain_is_bounded_by_a_client_that_does_not_read(tiny: Path) -> None:
    with (
        running_engine(tiny, num_threads=1, num_completions=64, ingress_timeout_s=5.0) as engine,
        PortClient(engine.config.engine_name, 0) as client,
    ):
        for i in range(4):
            client.submit([i], 300)
        wait_for(lambda: engine.status()["credit_stalls"] > 0, PATIENCE_S, "the ring is full")
        begin = time.monotonic()
        assert not engine.drain(0.5)
        assert not engine.drain(600.0, should_give_up=lambda: time.monotonic() - begin > 1.0)
        assert engine.halt(), "the device stops by itself, although nobody reads"
        assert engine.status()["state"] == EngineState.STOPPED
        assert len(client.port.poll()) == 64, "nothing unread was overwritten"


def test_stop_ends_running_requests_as_draining(tiny: Path) -> None:
    with running_engine(tiny, num_threads=1) as engine, PortClient(engine.config.engine_name, 0) as client:
        ids = [client.submit([i], 500) for i in range(8)]
        wait_for(
            lambda: client.poll() >= 0 and all(client.streams[i].tokens for i in ids),
            PATIENCE_S,
            "every stream has begun",
        )
        assert engine.halt()
        client.poll()
        reasons = {client.streams[i].end for i in ids}
        assert reasons <= {finished(FinishReason.DRAINING), finished(FinishReason.LENGTH)} and None not in reasons


def test_second_engine_of_a_name_is_refused_and_harms_nothing(tiny: Path) -> None:
    with running_engine(tiny, num_threads=1) as engine, PortClient(engine.config.engine_name, 0) as client:
        with pytest.raises(EngineAlreadyRunningError, match=str(os.getpid())):
            Engine(engine.config).start()
        assert client.generate([1, 2], 20).end == finished(FinishReason.LENGTH)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_broken_checkpoint_is_refused_and_leaves_nothing(tiny: Path, tmp_path: Path, missing: str) -> None:
    for path in tiny.iterdir():
        if path.name != missing:
            (tmp_path / path.name).symlink_to(path)
    config = engine_config(tmp_path)
    with pytest.raises(UnsupportedModelError, match=missing.partition(".")[0]):
        Engine(config).start()
    assert not list(SHM_DIR.glob(f"blinkimp.{config.engine_name}.*"))


def test_device_that_cannot_load_says_why_and_leaves_nothing(tiny: Path) -> None:
    config = engine_config(tiny)
    engine = Engine(config)
    engine.folder = tiny / "moved"  # between planning and loading
    with pytest.raises(DeviceError, match="moved"):
        engine.start()
    assert not list(SHM_DIR.glob(f"blinkimp.{config.engine_name}.*"))


def test_signal_right_behind_the_start_leaves_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine runs, and its process does not know it yet."""
    pids: list[int] = []

    class SignalledEngine(Engine):
        def start(self) -> None:
            super().start()
            assert isinstance(self.device, EmulatedDevice)
            pids.append(self.device.pid)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(engine_process, "Engine", SignalledEngine)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    config = engine_config(tiny, num_threads=1)
    lock = EngineLock(config.engine_name)
    try:
        order = engine_process.Order(config, os.dup(lock.fd))
        assert engine_process.EngineProcess(order, lambda _: None).run() == engine_process.EXIT_STOPPED
    finally:
        lock.release()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert not Path(f"/proc/{pids[0]}").exists(), "its device runs on"
    assert not list(SHM_DIR.glob(f"blinkimp.{config.engine_name}.*"))


def test_sizes_that_do_not_fit_are_refused(tiny: Path) -> None:
    with pytest.raises(MemoryPlanError, match="max_batch"):
        Engine(engine_config(tiny, max_batch=600))


def test_engine_that_is_not_started_has_no_status(tiny: Path) -> None:
    engine = Engine(engine_config(tiny))
    with pytest.raises(EngineFaultError, match="not started"):
        engine.status()
    with pytest.raises(EngineFaultError, match="not started"):
        engine.check()
    engine.stop()


def test_no_gpu_means_the_emulated_device_and_a_word_about_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from blinkimp.host import gpu_device
    from blinkimp.host.gpu_driver import GpuError

    def refuse(*_: object, **__: object) -> None:
        raise GpuError("cuInit: got nothing")

    monkeypatch.setattr(gpu_device, "GpuDevice", refuse)
    assert choose_device(engine_config(tiny, device="auto")).kind == "emulated"
    assert "cuInit: got nothing" in caplog.text and "emulated" in caplog.text
    with pytest.raises(DeviceError, match="device=emulated"):
        choose_device(engine_config(tiny, device="gpu"))
