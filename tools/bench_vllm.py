#!/usr/bin/env python3
"""The rows of tools/bench_step.py through an installed vLLM, offline: ms per token and per prefill, random weights and prompts.

    python tools/bench_vllm.py [--site PATH] [--rows d1@1024,p128] [--shape llama-3-8b] [--model FOLDER] --out FILE.json

vLLM runs with its defaults (it chooses attention backend, compilation and CUDA graphs itself), but for: random weights, no prefix cache, and as
many tokens a request as the rows need. Its engine is stepped by hand, and a token's time is when step() has returned it, so the figures are the
client's, as `client` of bench_step is. Decode: only steps in which all requests decode count, and prompts are shortened so that the mean context
is the row's. Prefill: a lone request from add_request() to its first token.
--site: a folder of packages to import vLLM from (it also goes to the processes that vLLM starts). Test: pytest tests/null/test_bench_vllm.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402  (the path above comes first)
from numpy.typing import NDArray  # noqa: E402
from step_cost import Limits, decode_cost, prefill_cost  # noqa: E402
from step_report import side_of  # noqa: E402
from step_requests import BenchError, steady_state  # noqa: E402
from step_rows import SHAPES, Row, parse_rows  # noqa: E402
from step_stats import finish, header, spread, write_report  # noqa: E402

from blinkimp.host.model_config import parse_config  # noqa: E402
from blinkimp.host.power import PowerMeter, PowerSource, idle_power_w, open_nvml  # noqa: E402

IDLE_S: Final = 2.0
MIN_PREFILLS: Final = 7
LEAD_TOKENS_A_STEP: Final = 2048  # of prompts in a step of vLLM, at least; more only makes the steady part longer
STEP_TIMEOUT_S: Final = 120.0


class VllmSide:
    """A vLLM engine that is stepped by hand. `engine`: add_request(), step(), has_unfinished_requests()."""

    def __init__(self, engine: Any, make_params: Any, vocab: int, source: PowerSource | None) -> None:
        self._engine, self._make_params, self._vocab, self._source = engine, make_params, vocab, source
        self._random = np.random.default_rng(0)
        self._next_id = 0

    def run(self, batch: int, context: int, max_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(submitted [batch], when each token had come [batch, max_tokens]) in ns."""
        submitted, came = np.zeros(batch, np.int64), np.zeros((batch, max_tokens), np.int64)
        num_got: dict[str, int] = {}
        row_of: dict[str, int] = {}
        for row in range(batch):
            name = str(self._next_id)
            self._next_id += 1
            prompt = self._random.integers(0, self._vocab, context).tolist()
            num_got[name], row_of[name] = 0, row
            submitted[row] = time.monotonic_ns()
            self._engine.add_request(name, {"prompt_token_ids": prompt}, self._make_params(max_tokens))
        deadline = time.monotonic() + STEP_TIMEOUT_S
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now_ns = time.monotonic_ns()
            for output in outputs:
                num_tokens = len(output.outputs[0].token_ids)
                came[row_of[output.request_id], num_got[output.request_id] : num_tokens] = now_ns
                num_got[output.request_id] = num_tokens
            if time.monotonic() > deadline:
                raise BenchError(
                    f"{batch} requests still ran after {STEP_TIMEOUT_S:g} s; expected an end; choose smaller rows"
                )
        if not came.all():
            raise BenchError(f"{int((came > 0).sum())} tokens came, expected {came.size}; see vLLM's messages")
        return submitted, came

    def measure(self, row: Row, num_repeats: int) -> dict[str, Any]:
        with PowerMeter(self._source) as meter:
            return (
                self._decode(row, num_repeats, meter)
                if row.phase == "decode"
                else self._prefill(row, num_repeats, meter)
            )

    def _decode(self, row: Row, num_steps: int, meter: PowerMeter) -> dict[str, Any]:
        num_lead = math.ceil(row.batch * row.context / LEAD_TOKENS_A_STEP) + 2
        mean_lead = num_lead / 2 if row.batch > 1 else 0
        context = row.context - round(mean_lead + num_steps / 2)
        if context < 1:
            raise BenchError(
                f"{row.label}: {num_steps} steps do not fit into the context; expected fewer: lower --seconds"
            )
        _, came = self.run(row.batch, context, num_steps + num_lead)
        rows, columns = steady_state(came)
        if not len(rows):
            raise BenchError(
                f"{row.label}: no step decoded all {row.batch} requests; expected {num_steps}: does the batch fit?"
            )
        begin_ns, end_ns = int(came[rows, columns - 1].min()), int(came[rows, columns].max())
        return {
            "name": row.name,
            "mean_context": round(context + float(columns.mean()), 1),
            "num_steps": len(rows) // row.batch,
            "device": spread(came[rows, columns] - came[rows, columns - 1]),
            "energy_j": meter.energy_j(begin_ns, end_ns),
            "energy_s": (end_ns - begin_ns) / 1e9,
            "energy_steps": len(rows) / row.batch,
        }

    def _prefill(self, row: Row, num_runs: int, meter: PowerMeter) -> dict[str, Any]:
        runs = [self.run(1, row.context, 1) for _ in range(1 + num_runs)][1:]
        begin_ns, end_ns = int(runs[0][0][0]), int(runs[-1][1][0, 0])
        return {
            "name": row.name,
            "mean_context": float(row.context),
            "num_steps": num_runs,
            "device": spread(np.array([int(came[0, 0] - submitted[0]) for submitted, came in runs], np.int64)),
            "energy_j": meter.energy_j(begin_ns, end_ns),
            "energy_s": (end_ns - begin_ns) / 1e9,
            "energy_steps": num_runs,
        }


def use_site(site: Path | None) -> None:
    """Before vLLM is imported: where it lies, and what keeps a machine without a network from waiting for one."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # The requests are stepped from this process, whose clock the figures are.
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    if site is not None:
        sys.path.insert(0, str(site))
        parts = [str(site), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(parts)


def repeats_of(row: Row, shape: str, seconds: float) -> int:
    """How often a row is repeated to last about so long, as its limit tells in advance."""
    model = parse_config(SHAPES[shape])
    if row.phase == "decode":
        steps = math.ceil(seconds / (1.3 * decode_cost(model, 2, row.batch, row.context).limit_s()))
        return max(32, min(steps, row.context // 2))
    return max(MIN_PREFILLS, min(50, math.ceil(seconds / (1.3 * prefill_cost(model, 2, row.context).limit_s()))))


def start_vllm(arguments: argparse.Namespace, folder: Path, source: PowerSource | None) -> VllmSide:
    use_site(arguments.site)
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise BenchError(
            f"vLLM cannot be imported: {error}; expected an installed one; install it, or give its folder as --site"
        ) from None
    if arguments.model is None:
        (folder / "config.json").write_text(json.dumps(SHAPES[arguments.shape]))
    llm = LLM(
        model=str(arguments.model or folder),
        load_format="dummy",
        skip_tokenizer_init=True,  # token ids in, token ids out
        enable_prefix_caching=False,
        max_model_len=max(row.context for row in arguments.rows) * 5 // 4 + 512,
        max_num_seqs=max(256, *(row.batch for row in arguments.rows)),
        seed=0,
    )

    def make_params(max_tokens: int) -> Any:
        return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)

    return VllmSide(llm.llm_engine, make_params, SHAPES[arguments.shape]["vocab_size"], source)


def bench(
    side: VllmSide, rows: Sequence[Row], shape: str, seconds: float, report: dict[str, Any], path: Path | None = None
) -> None:
    """Adds a row each to the report, which is written after every one: what there is is kept."""
    model = parse_config(SHAPES[shape])
    for row in rows:
        try:
            figures = side.measure(row, repeats_of(row, shape, seconds))
        except BenchError as error:
            report["errors"].append(f"{row.name}: {error}")
            continue
        limits = Limits() if report["gpu"] is not None else None
        times = side_of(row, model, limits, figures, report["idle_w"])
        times["client"] = times.pop("device")  # what was measured is the client's
        report["rows"].append(
            {"name": row.name, "phase": row.phase, "batch": row.batch, "context": row.context, "vllm": times}
        )
        client, joules, above = times["client"], times["j_per_token"], times["j_per_token_above_idle"]
        print(
            f"{row.name:9}{client['median_ms']:10.3f} ms  p10 {client['p10_ms']:.3f}  p90 {client['p90_ms']:.3f}"
            f"{'' if joules is None else f'  {joules:.4f} J/token'}{'' if above is None else f', {above:.4f} above idle'}",
            flush=True,
        )
        write_report(report, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=parse_rows, default=parse_rows("quick"), help="as in bench_step (default quick)")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument(
        "--model", type=Path, help="checkpoint folder to take the configuration from, in place of the shape's"
    )
    parser.add_argument("--site", type=Path, help="folder of packages that holds vLLM")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long each row is repeated")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    arguments = parser.parse_args(argv)
    source = open_nvml()
    report: dict[str, Any] = {
        **header("bench_vllm", argv, arguments.commit, source),
        "shape": arguments.shape,
        "idle_w": idle_power_w(source, IDLE_S),
        "rows": [],
        "errors": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            began = time.monotonic()
            side = start_vllm(arguments, Path(folder), source)
            report["start_s"] = round(time.monotonic() - began, 1)
            report["versions"]["vllm"] = __import__("vllm").__version__
            bench(side, arguments.rows, arguments.shape, arguments.seconds, report, arguments.out)
        except BenchError as error:
            report["errors"].append(str(error))
    return finish(report, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
