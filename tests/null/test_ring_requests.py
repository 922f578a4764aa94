"""What an ingress has on the ring. Test: pytest tests/null/test_ring_requests.py"""

from __future__ import annotations

import pytest

from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.nic_shim.ring_requests import RingRequests
from blinkimp.protocol import Submit


def entered(ring: RingRequests, num: int, slot: int | None = None) -> list[LiveRequest]:
    requests = [LiveRequest(Submit(i, [1]), None) for i in range(num)]
    for request in requests:
        ring.enter(request, slot)
    return requests


def cancels(ring: RingRequests) -> list[int]:
    """All that are to be written, in order."""
    ids = []
    while (ring_id := ring.first_cancel) is not None:
        ids.append(ring_id)
        ring.take_first_cancel()
    return ids


def test_ring_ids_are_never_used_again() -> None:
    """R1, over epochs too."""
    ring, seen = RingRequests(), set()
    for _ in range(3):
        requests = entered(ring, 4)
        seen |= {request.ring_id for request in requests}
        ring.leave(requests[0].ring_id)
        assert ring.clear() == requests[1:], "in the order of their submission"
        assert (len(ring), ring.live, [request.ring_id for request in requests[1:]]) == (0, {}, [0] * 3)
    assert len(seen) == 12 and 0 not in seen


@pytest.mark.parametrize("is_abandoned", [False, True])
def test_what_was_submitted_counts_until_the_engine_is_done_with_it(is_abandoned: bool) -> None:
    """R2."""
    ring = RingRequests()
    first, second = entered(ring, 2, slot=0)
    if is_abandoned:
        ring.abandon(first)
    assert (len(ring), first.ring_id in ring.live, ring.is_abandoned(first.ring_id)) == (
        2,
        not is_abandoned,
        is_abandoned,
    )
    assert not ring.leave(first.ring_id), "the other one uses the slot"
    assert (len(ring), ring.is_abandoned(first.ring_id)) == (1, False)
    assert ring.leave(second.ring_id) and not ring.leave(second.ring_id)
    assert len(ring) == 0


def test_cancels_are_written_in_order_and_not_for_what_has_ended() -> None:
    ring = RingRequests()
    requests = entered(ring, 5)
    ids = [request.ring_id for request in requests]
    for request in requests[:4]:
        ring.cancel(request)
    ring.leave(ids[0])
    ring.leave(ids[2])
    ring.abandon(requests[4])
    assert cancels(ring) == [ids[1], ids[3], ids[4]]
    assert ring.has_cancels, "the abandoned one is still to be heard of"
    ring.leave(ids[4])
    assert not ring.has_cancels
    ring.cancel(requests[1])
    ring.clear()
    assert cancels(ring) == [] and not ring.has_cancels
