"""Both ends of a queue pair in any order of events: hypothesis drives the port and a director in Python against a simple model.

Invariants cited are those of device/ingress_port.cuh. Run: pytest tests/host/test_ingress_port_stateful.py
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blinkimp import ring_abi as abi
from blinkimp.nic_shim.queue_pair import PortStatus, QueuePairPort, sampling_record
from tests.fake_director import DEFAULT_SCRIPT, FakeDirector
from tests.ingress_support import SMALL_RINGS, attach, engine_name, kind_of, prompt, reason_of


class IngressMachine(RuleBasedStateMachine):
    """Both ends in any order. Every request is acknowledged and gets its tokens in order and one end, or was lost in a drop."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeDirector(engine_name(), geometry=SMALL_RINGS)
        self.queue_pair = self.fake.queue_pairs[0]
        self.queue_pair.timeout_s = 3600
        self.port = QueuePairPort.open(self.fake.regions.engine_name, 0)
        self.next_id = 1
        self.live: dict[int, tuple[int, int, list[int]]] = {}  # id -> prompt tokens, max_tokens, output so far
        self.acknowledged: set[int] = set()
        self.pings: list[int] = []

    @initialize()
    def start(self) -> None:
        attach(self.port, self.queue_pair)

    def attached(self) -> bool:
        return self.port.state == PortStatus.OK

    @precondition(attached)
    @rule(num_tokens=st.integers(1, 460), max_tokens=st.integers(1, 12), num_stop_ids=st.integers(0, 16))
    def submit(self, num_tokens: int, max_tokens: int, num_stop_ids: int) -> None:
        status = self.port.try_submit(
            self.next_id, prompt(num_tokens), sampling_record(), stop_ids=[4000] * num_stop_ids, max_tokens=max_tokens
        )
        body_bytes = abi.REQUEST_BODY.itemsize + 4 * (num_tokens + num_stop_ids)
        if -(-body_bytes // 64) * 64 > SMALL_RINGS.arena_bytes // 2:
            assert status in (PortStatus.TOO_LARGE, PortStatus.RING_FULL)
        elif status == PortStatus.OK:
            self.live[self.next_id] = (num_tokens, max_tokens, [])
        else:
            assert status in (PortStatus.RING_FULL, PortStatus.ARENA_FULL)
            taken = self.queue_pair.submission_consumer_pos == int(
                self.queue_pair.ingress["submission_producer_pos"][0]
            )
            assert not taken, f"refused although everything was taken\n{self.port.dump()}"
        self.next_id += 1

    @precondition(attached)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from([*self.live, 10**9]))
        assert self.port.try_cancel(request_id) in (PortStatus.OK, PortStatus.RING_FULL)

    @precondition(attached)
    @rule()
    def ping(self) -> None:
        if self.port.try_ping(self.next_id, self.next_id) == PortStatus.OK:
            self.pings.append(self.next_id)
        self.next_id += 1

    @rule()
    def director_polls(self) -> None:
        self.queue_pair.poll()

    @rule(num_steps=st.integers(1, 6))
    def director_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.queue_pair.step()

    @rule()
    def director_publishes(self) -> None:
        self.queue_pair.publish()

    @rule()
    def director_drops(self) -> None:
        if self.attached():
            self.queue_pair.drop()

    @precondition(lambda self: not self.attached())
    @rule()
    def attach_again(self) -> None:
        self.poll()
        attach(self.port, self.queue_pair)
        self.live.clear()
        self.acknowledged.clear()
        self.pings.clear()

    @rule()
    def poll(self) -> None:
        for entry in self.port.poll().copy():
            request_id, kind = int(entry["request_id"]), kind_of(entry)
            if kind == abi.COMPLETION_PONG:
                assert self.pings.pop(0) == request_id == int(entry["device_ns"])
                continue
            num_prompt_tokens, max_tokens, output = self.live[request_id]
            if kind == abi.COMPLETION_ACK:
                assert request_id not in self.acknowledged
                self.acknowledged.add(request_id)
                continue
            assert request_id in self.acknowledged
            if kind == abi.COMPLETION_TOKEN:
                position = num_prompt_tokens + len(output)
                assert int(entry["index"]) == len(output)
                assert int(entry["token"]) == DEFAULT_SCRIPT[position % len(DEFAULT_SCRIPT)]
                output.append(int(entry["token"]))
            else:
                assert kind == abi.COMPLETION_FINISH and int(entry["index"]) == len(output)
                assert reason_of(entry) == abi.FINISH_CANCELLED or len(output) == max_tokens
                del self.live[request_id]

    @invariant()
    def positions_hold(self) -> None:
        ingress, director = self.queue_pair.ingress[0], self.queue_pair.director[0]
        ahead = int(ingress["submission_producer_pos"]) - int(director["submission_consumer_pos"])
        assert 0 <= ahead <= SMALL_RINGS.num_submissions or not self.attached(), self.port.dump()  # I2

    def teardown(self) -> None:
        if self.attached():  # then everything that was taken comes to its end
            for _ in range(200):
                self.fake.turn()
                self.poll()
            assert not self.live and not self.pings, self.port.dump()
        self.port.close()
        self.fake.close()


TestIngressMachine = IngressMachine.TestCase
TestIngressMachine.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
