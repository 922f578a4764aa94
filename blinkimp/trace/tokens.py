"""What each request of a trace said: its token ids, from the device's TOKEN events.

    token_streams(trace.events)[request_id]      # bytes of u32 ids

Called by blinkimp/trace/diff.py and the replay's tests. Test: pytest tests/null/test_trace_figures.py
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blinkimp.ring_abi import TraceKind


def token_streams(events: NDArray[np.void]) -> dict[int, bytes]:
    """By request id. A position that was sampled twice (a preempted request's are not) counts as it came."""
    tokens = events[np.ascontiguousarray(events["kind"]) == int(TraceKind.TOKEN)]
    if not len(tokens):
        return {}
    order = np.argsort(tokens["request_id"], kind="stable")
    ids = tokens["request_id"][order]
    values = (tokens["argument"][order] >> np.uint64(32)).astype(np.uint32)
    firsts = np.nonzero(np.diff(ids, prepend=ids[:1] ^ np.uint64(1)))[0]
    ends = np.append(firsts[1:], len(ids))
    return {
        int(ids[first]): values[first:end].tobytes() for first, end in zip(firsts.tolist(), ends.tolist(), strict=True)
    }
