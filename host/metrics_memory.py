"""The metrics' shared memory: `/dev/shm/blinkimp.<engine>.metrics`: what the engine is, and one slot of counters for each ingress.

    region = open_metrics(engine_name)              host/shared_memory.py
    about(region).model_name                        written by the host before anybody can open it
    slots(region)[2][word("prompt_tokens")]         a float64, written by the ingress on queue pair 2 alone

Counters live here, not in an ingress process, so that one scrape of any endpoint sees all ingresses, and so that an ingress that is started
anew goes on counting where its predecessor stopped. Only Python looks at this region, so its layout is not in device/ring_abi.h.
Written by nic_shim/request_metrics.py; read by nic_shim/http_metrics.py and blinkimp/cli/top.py. Test: pytest tests/null/test_metrics_memory.py

Invariants
I1  A slot has one writer, the process that owns the queue pair; each word is written by one of its threads. Readers take each word for itself.
I2  Words of COUNTERS and histograms only grow, for the life of the engine. A histogram's count is the sum of its buckets.
"""

from __future__ import annotations

import mmap
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

if TYPE_CHECKING:
    from blinkimp.host.shared_memory import Region

MAGIC: Final = 0x3130_4D4D_4B4E_4C42  # "BLNKMM01"
HEADER_BYTES: Final = 4096
MAX_BOUNDS: Final = 31  # of a histogram; beyond the last one is +Inf

_TOKEN_GAPS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_LENGTHS = ()  # 1, 2, 5, 10, ... up to max_context: length_bounds()

# Names, meanings and bounds are those of vLLM, so that its dashboards read them.
HISTOGRAMS: Final[dict[str, tuple[str, tuple[float, ...]]]] = {
    "time_to_first_token_seconds": ("From a request's arrival at the ingress to its first token there.", _FIRST_TOKEN),
    "inter_token_latency_seconds": ("Between two tokens of a request, on the device's clock.", _TOKEN_GAPS),
    "request_time_per_output_token_seconds": ("Mean time of a request's tokens after the first.", _TOKEN_GAPS),
    "e2e_request_latency_seconds": ("From a request's arrival at the ingress to its end there.", _LATENCY),
    "request_queue_time_seconds": ("From the engine's acceptance to the batch.", _LATENCY),
    "request_prefill_time_seconds": ("From the batch to the first token.", _LATENCY),
    "request_decode_time_seconds": ("From the first token to the end.", _LATENCY),
    "request_inference_time_seconds": ("From the batch to the end.", _LATENCY),
    "request_prompt_tokens": ("Prompt tokens of a request.", _LENGTHS),
    "request_generation_tokens": ("Output tokens of a request.", _LENGTHS),
    "request_max_num_generation_tokens": ("Output tokens of a request's longest choice.", _LENGTHS),
    "request_prefill_kv_computed_tokens": ("Prompt tokens of a request that were not in the prefix cache.", _LENGTHS),
    "request_params_n": ("Choices that a request asked for.", (1.0, 2.0, 5.0, 10.0, 20.0)),
    "request_params_max_tokens": ("Output tokens that a request asked for.", _LENGTHS),
}
FINISHED_REASONS: Final = ("stop", "length", "abort", "timeout", "error")
HTTP_HANDLERS: Final = (
    *("/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize", "/version"),
    "none",  # no such path
)
HTTP_STATUSES: Final = ("2xx", "4xx", "5xx")
# Of one ingress process; 0 again when it is started anew.
INGRESS_COUNTERS: Final = {
    "attaches": "Times the ingress attached to its queue pair.",
    "resubmissions": "Requests put on the ring again after a loss of the engine.",
    "ring_full": "Times the submission ring had no room.",
    "arena_full": "Times the arena had no room.",
    "stray_completions": "Completions of requests that the ingress does not know.",
    "broken_sequences": "Requests whose tokens came out of order.",
    "engine_losses": "Times another engine took the place of one that had not stopped in order.",
    "crash_failures": "Requests that failed because engines crashed with them.",
    "tokens": "Output tokens received.",
    "refused": "Requests refused before they reached the engine.",
}
INGRESS_GAUGES: Final = {
    "num_outstanding": "Requests (choices) that are not finished.",
    "num_waiting": "Of them, those not on the ring yet.",
    "pid": "Process that serves the queue pair; 0: none has yet.",
    "is_http": "1: HTTP, 0: ZeroMQ.",
}


def length_bounds(max_context: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to max_context."""
    bounds = (factor * 10**exponent for exponent in range(12) for factor in (1, 2, 5))
    return tuple(float(bound) for bound in bounds if bound <= max(1, max_context))[:MAX_BOUNDS]


def bounds_of(name: str, max_context: int) -> tuple[float, ...]:
    return HISTOGRAMS[name][1] or length_bounds(max_context)


def _word_names() -> Iterator[str]:
    yield "prompt_tokens"
    yield from (f"finished_{reason}" for reason in FINISHED_REASONS)
    for name in HISTOGRAMS:
        yield f"{name}_sum"
        yield from (f"{name}_bucket_{idx}" for idx in range(MAX_BOUNDS + 1))
    for handler in HTTP_HANDLERS:
        yield f"http_seconds {handler}"
        yield from (f"http_{status} {handler}" for status in HTTP_STATUSES)
    yield from (f"ingress_{name}" for name in (*INGRESS_COUNTERS, *INGRESS_GAUGES))


_WORDS: Final = {name: idx for idx, name in enumerate(_word_names())}
NUM_WORDS: Final = -(-len(_WORDS) // 16) * 16  # slots do not share a 128-byte line
LAYOUT: Final = zlib.crc32(repr(list(_WORDS)).encode())  # both sides must have been built from the same names


def word(name: str) -> int:
    """Index in a slot."""
    return _WORDS[name]


class About(msgspec.Struct, frozen=True):
    """What the engine is."""

    model_name: str = ""
    device: str = ""  # gpu, emulated
    max_batch: int = 0
    max_step_tokens: int = 0
    max_context: int = 0
    has_prefix_cache: bool = False
    started_unix_s: float = 0.0


_HEADER: Final = np.dtype(
    [("magic", "<u8"), ("layout", "<u8"), ("engine_id", "<u8"), ("num_slots", "<u8"), ("about_bytes", "<u8")]
)


@dataclass(frozen=True)
class MetricsGeometry:
    num_slots: int

    @property
    def region_bytes(self) -> int:
        return -(-(HEADER_BYTES + self.num_slots * NUM_WORDS * 8) // mmap.PAGESIZE) * mmap.PAGESIZE

    def header(self, engine_id: int, about: About) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """[HEADER_BYTES]"""
        text = msgspec.json.encode(about)
        if len(text) > HEADER_BYTES - _HEADER.itemsize:  # an absurd model name: the rest says enough
            text = msgspec.json.encode(msgspec.structs.replace(about, model_name=about.model_name[:256]))
        words = np.zeros(1, _HEADER)
        words["magic"], words["layout"], words["engine_id"] = MAGIC, LAYOUT, engine_id
        words["num_slots"], words["about_bytes"] = self.num_slots, len(text)
        return np.frombuffer((words.tobytes() + text).ljust(HEADER_BYTES, b"\0"), np.uint8)


def header_words(region: Region) -> dict[str, int]:
    """For the checks at the opening."""
    record = region.view(_HEADER)[0]
    return {name: int(record[name]) for name in _HEADER.names or ()}


def about(region: Region) -> About:
    begin = _HEADER.itemsize
    return msgspec.json.decode(bytes(region.buffer[begin : begin + header_words(region)["about_bytes"]]), type=About)


def slots(region: Region) -> list[Any]:
    """One memoryview of float64 for each queue pair: plain loads and stores without numpy's cost for a single word."""
    num_slots = header_words(region)["num_slots"]
    ends = [HEADER_BYTES + idx * NUM_WORDS * 8 for idx in range(num_slots + 1)]
    return [region.buffer[ends[idx] : ends[idx + 1]].cast("d") for idx in range(num_slots)]


def new_about(model_name: str, device: str, **sizes: Any) -> About:
    return About(model_name, device, **sizes, started_unix_s=time.time())
