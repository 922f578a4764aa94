"""What the prefix cache does for the time to the first token: a shared prefix of some 2,000 tokens, over HTTP, on the emulated device.

    python tools/bench_prefix.py [--rounds 10] [--out tools/results/prefix_ttft.json]

Each round takes a prefix that the engine has not seen and asks four questions behind it, one after the other: the first (nothing is cached),
a second one with another end (the prefix is cached), the second again with `prefix_cache` false, and again under another `cache_salt`. Beside the
times stand the prompt rows that the engine computed, which do not depend on the machine. Fails where the outputs of the last three differ.
Test: pytest tests/host/test_bench_prefix.py
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from blinkimp.nic_shim.tokenizer import Tokenizer  # noqa: E402  (the path above comes first)
from tests.http_support import EMBEDDED, HttpServer, embedded  # noqa: E402

NUM_PREFIX_TOKENS = 2000
NUM_OWN_TOKENS = 16
NUM_OUTPUT_TOKENS = 8
KINDS = ("first", "same prefix", "opted out", "another salt")


@dataclass
class Answer:
    """One streamed completion."""

    ttft_ms: float
    num_cached_tokens: int
    num_computed_tokens: int  # prompt rows, of all requests meanwhile: nobody else asks
    token_ids: list[int]


def ask(server: HttpServer, prompt_ids: list[int], **fields: Any) -> Answer:
    body = {
        "prompt": prompt_ids, "max_tokens": NUM_OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, "return_token_ids": True, **fields,
    }  # fmt: skip
    num_before = server.status()["prompt_tokens"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.connect()
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body).encode())
    reply = connection.getresponse()
    ttft_ms, num_cached = 0.0, 0
    token_ids: list[int] = []
    for line in reply:
        payload = line.removeprefix(b"data: ").strip()
        if not payload or payload == b"[DONE]":
            continue
        event = json.loads(payload)
        for choice in event["choices"]:
            if choice["token_ids"] and not token_ids:
                ttft_ms = (time.perf_counter() - began) * 1000
            token_ids += choice["token_ids"]
        if event["usage"] is not None:
            num_cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
    connection.close()
    if reply.status != 200 or len(token_ids) != NUM_OUTPUT_TOKENS:
        raise SystemExit(f"got status {reply.status} and {len(token_ids)} tokens, expected 200 and {NUM_OUTPUT_TOKENS}")
    return Answer(ttft_ms, num_cached, server.status()["prompt_tokens"] - num_before, token_ids)


def run(num_rounds: int, seed: int = 1) -> dict[str, Any]:
    rng = random.Random(seed)
    vocab = Tokenizer(EMBEDDED).vocab_size
    answers: dict[str, list[Answer]] = {name: [] for name in KINDS}
    with embedded() as (server, _):
        ask(server, [5] * 70, prefix_cache=False)  # the first request of a process pays for its threads
        for idx in range(num_rounds):
            prefix = [rng.randrange(300, vocab) for _ in range(NUM_PREFIX_TOKENS)]
            first, second = ([rng.randrange(300, vocab) for _ in range(NUM_OWN_TOKENS)] for _ in range(2))
            answers["first"].append(ask(server, prefix + first))
            answers["same prefix"].append(ask(server, prefix + second))
            answers["opted out"].append(ask(server, prefix + second, prefix_cache=False))
            answers["another salt"].append(ask(server, prefix + second, cache_salt=f"tenant {idx}"))
            outputs = {name: of_kind[-1].token_ids for name, of_kind in answers.items() if name != "first"}
            if len({tuple(token_ids) for token_ids in outputs.values()}) != 1:
                raise SystemExit(f"round {idx}: the outputs differ with and without the cache: {outputs}")
        server.wait_until_idle()
    result: dict[str, Any] = {
        "model": "embedded, emulated device", "cpus": len(os.sched_getaffinity(0)), "prefix_tokens": NUM_PREFIX_TOKENS,
        "rounds": num_rounds, "outputs": "equal with and without the cache",
    }  # fmt: skip
    for name, of_kind in answers.items():
        times = sorted(answer.ttft_ms for answer in of_kind)
        result[name] = {
            "ttft_ms_median": round(statistics.median(times), 2),
            "ttft_ms_least": round(times[0], 2),
            "ttft_ms_most": round(times[-1], 2),
            "cached_tokens": of_kind[0].num_cached_tokens,
            "computed_tokens": of_kind[0].num_computed_tokens,
        }
    result["speedup_median"] = round(result["opted out"]["ttft_ms_median"] / result["same prefix"]["ttft_ms_median"], 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="where to keep the result")
    arguments = parser.parse_args()
    text = json.dumps(run(arguments.rounds), indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
