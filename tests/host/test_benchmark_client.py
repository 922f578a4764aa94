"""A benchmark client of others, guidellm (the vLLM project's), by its own command line against the embedded model: no request fails, and its
counts of tokens are the engine's.

Run: pytest tests/host/test_benchmark_client.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.http_support import EMBEDDED, MODEL, embedded
from tests.support import PATIENCE_S

NUM_REQUESTS, NUM_STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS = 12, 4, 32, 16
# No look-ups of models or data; one worker, for each of them imports torch.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "GUIDELLM__MAX_WORKER_PROCESSES": "1"}


def run_guidellm(url: str, folder: Path) -> Any:
    """Its report."""
    report = folder / "report.json"
    arguments = {
        "--backend": f"kind=openai_http,target={url},model={MODEL}",
        "--profile": f"kind=concurrent,streams={NUM_STREAMS}",
        "--constraint": f"kind=max_requests,count={NUM_REQUESTS}",
        "--tokenizer": f"kind=hf_auto,model={EMBEDDED}",
        "--data": f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
        "--output": f"kind=json,path={report}",
    }
    command = [str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console"]
    command += [word for pair in arguments.items() for word in pair]
    environment = {**os.environ, **ENVIRONMENT, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=10 * PATIENCE_S, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())


def test_guidellm_finds_every_request_successful(tmp_path: Path) -> None:
    with embedded() as (server, _):
        (benchmark,) = run_guidellm(server.url, tmp_path)["benchmarks"]
        status = server.wait_until_idle()
    metrics, requests = benchmark["metrics"], benchmark["requests"]["successful"]
    assert metrics["request_totals"] == {
        "successful": NUM_REQUESTS,
        "errored": 0,
        "incomplete": 0,
        "total": NUM_REQUESTS,
    }
    assert len({request["response_id"] for request in requests}) == NUM_REQUESTS
    for request in requests:
        assert request["response_id"].startswith("chatcmpl-") and request["output"]
        assert request["output_tokens"] == OUTPUT_TOKENS
        assert PROMPT_TOKENS <= request["prompt_tokens"] <= PROMPT_TOKENS + 16, "the prompt, in the chat's template"
        assert 0 < request["time_to_first_token_ms"] <= 1000 * request["request_latency"]
        assert 1 <= request["output_tokens_per_iteration"] <= OUTPUT_TOKENS, "it was streamed"
    assert (
        status["output_tokens"]
        == metrics["output_token_count"]["successful"]["total_sum"]
        == NUM_REQUESTS * OUTPUT_TOKENS
    )
    computed = status["prompt_tokens"] + sum(request["cached_tokens"] or 0 for request in requests)
    assert computed == metrics["prompt_token_count"]["successful"]["total_sum"]
