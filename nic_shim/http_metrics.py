"""The default body of /metrics: the engine's status page and this ingress's counters in Prometheus' text format.

Called by nic_shim/http_ingress.py. Test: pytest tests/host/test_http_ingress.py
"""

from __future__ import annotations

import dataclasses

from blinkimp.nic_shim.engine_link import EngineLink
from blinkimp.nic_shim.http_gate import Gate

_GAUGES = frozenset({"heartbeat", "device_ns", "state", "step_ns_last", "gap_ns_last", "tuning_generation"})


def metrics_text(link: EngineLink, gate: Gate) -> str:
    """One line a counter; names as device/ring_abi.h (StatusLines) has them."""
    lines = []
    for name, value in link.watch.counters().items():
        kind = "gauge" if name in _GAUGES or name.startswith("num_") else "counter"
        lines.append(f"# TYPE blinkimp:engine_{name} {kind}\nblinkimp:engine_{name} {value}")
    own = dataclasses.asdict(link.counters) | {"refused": gate.num_refused}
    lines += [f"# TYPE blinkimp:ingress_{name} counter\nblinkimp:ingress_{name} {value}" for name, value in own.items()]
    lines.append(
        f"# TYPE blinkimp:ingress_num_outstanding gauge\nblinkimp:ingress_num_outstanding {gate.num_outstanding}"
    )
    return "\n".join(lines) + "\n"
