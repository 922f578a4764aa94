"""What the prefix cache costs the director's plan, on the CPU: the same decode steps with the cache on and off.

    python tools/plan_cost.py [--batch 64] [--steps 1500] [--out FILE.json]

Requests decode side by side, each at another place of its page, so that at a batch of 64 every step fills about one page. Times are those of
one call into the native library, its ctypes call included; between two of them Python runs, so the director's code and data are mostly out of
the first caches, as they are on the emulated device, where a model step lies between. Test: pytest tests/host/test_plan_cost.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from blinkimp import ring_abi as abi  # noqa: E402  (the path above comes first)
from tests.host.director_rig import Rig, Shape, plain_sampler  # noqa: E402
from tests.host.py_ingress import address_of  # noqa: E402

CONTEXT = 2048
PROMPT_TOKENS = 100


def measure(batch: int, num_steps: int, prefix_cache: bool) -> dict[str, Any]:
    shape = Shape(
        num_pages=batch * CONTEXT // abi.PAGE_TOKENS, num_requests=batch, max_requests_per_queue_pair=batch, max_batch=batch,
        max_step_tokens=256, prefill_chunk_tokens=256, max_context=CONTEXT, num_submissions=256, num_completions=8192,
        arena_bytes=1 << 20, prefix_cache=prefix_cache,
    )  # fmt: skip
    rig = Rig(shape)
    rig.attach_all()
    ingress = rig.ingresses[0]
    for idx in range(batch):
        prompt = [(idx * 7 + position * 3) % 400 + 5 for position in range(PROMPT_TOKENS)]
        assert ingress.submit(idx + 1, prompt, CONTEXT - PROMPT_TOKENS, sampling={"ignore_eos": 1})
        rig.step(plain_sampler)
        ingress.read()
    plan_ns = []
    for _ in range(num_steps):
        rig.poll()
        rig.plan_memory = rig.plans[rig.num_commits & 1]
        address = address_of(rig.plan_memory)
        begin = time.perf_counter_ns()
        num_rows = rig.native.bk_director_plan(rig.address, address)
        plan_ns.append(time.perf_counter_ns() - begin)
        assert num_rows == batch, "every request decodes in every step"
        rig.sampled[rig.num_commits & 1]["token"] = 100 + rig.num_commits % 300
        rig.native.bk_director_commit(rig.address, address)
        rig.num_commits += 1
        rig.publish()
        ingress.read()
    rig.check()
    num_shared = int((rig.page_owners & 0x40000000 != 0).sum())
    low, median, high = (float(value) / 1000 for value in statistics.quantiles(plan_ns, n=10)[::4])
    return {
        "plan_us_p10": round(low, 2),
        "plan_us_median": round(median, 2),
        "plan_us_p90": round(high, 2),
        "pages_in_the_cache": num_shared,
    }


def run(batch: int, num_steps: int) -> dict[str, Any]:
    most_steps = CONTEXT - PROMPT_TOKENS - batch - 1
    if not 2 <= num_steps <= most_steps:
        raise SystemExit(f"--steps is {num_steps}; expected 2 to {most_steps}: then the requests are at their end")
    return {
        "batch": batch,
        "steps": num_steps,
        "off": measure(batch, num_steps, prefix_cache=False),
        "on": measure(batch, num_steps, prefix_cache=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, help="where to keep the result")
    arguments = parser.parse_args()
    text = json.dumps(run(arguments.batch, arguments.steps), indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
