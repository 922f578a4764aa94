"""Fuzzes the HTTP API with schemathesis, from its own OpenAPI document, in front of a real engine on the emulated device.

    python tools/fuzz_openapi.py [--inputs 30000] [--seed N] [--out FILE.json]

Every operation gets requests that keep to the document and such that do not: first each field's bounds and wrong methods, one by one, then
drawn ones, in turns of some hundred with another seed each, until so many requests were sent. All of schemathesis' checks are on: no 5xx;
status, headers, media type and body as the document says, each event of a stream as well; 405 with Allow; what keeps to the document is
accepted, what does not is refused. Here each event is held against the server's own types too. RIGHT_REFUSALS are what no schema can say.

The model's context is short, so that no request runs for long. Fails where a check does, with the curl line of each (20 at most), where a
process has died, or where a page is not free or cached at the end. Needs schemathesis (pip install .[dev]).
Test: pytest tests/host/test_fuzz_openapi.py (a slice)
"""

from __future__ import annotations

import collections
import contextlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import schemathesis
from schemathesis.core.failures import Failure, ServerError
from schemathesis.core.result import Ok
from schemathesis.engine import Status, events, from_schema
from schemathesis.openapi.checks import RejectedPositiveData

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from fuzz_command import fuzz_parser, run_fuzzer  # noqa: E402  (the path above comes first)

from blinkimp.nic_shim.http_schemas import NO_CONSTRAINT  # noqa: E402  (the path above comes first)
from blinkimp.nic_shim.http_types import ChatChunk, CompletionChunk  # noqa: E402
from tests.host.engine_support import make_tiny_checkpoint, running_engine  # noqa: E402
from tests.http_support import HttpServer, Reply, http_ingress  # noqa: E402
from tests.ingress_support import write_byte_tokenizer  # noqa: E402
from tests.support import PATIENCE_S  # noqa: E402

CONTEXT = 96  # tokens, one page and a half: what a request may take at most
VOCAB = 272  # the byte tokenizer's 258, in whole rows
NUM_DRAWN = 50  # requests of each operation in a turn, but for
NUM_DRAWN_OF = {"/v1/completions": 150, "/v1/chat/completions": 150, "/detokenize": 25, "/v1/models/{model}": 10}
NUM_CHAINS = 5  # of /v1/models and then one of them, in a turn
MOST_FAILURES = 20  # then it stops
MOST_CHARS = 2000  # told of each


def _is_constrained(body: dict[str, Any]) -> bool:
    return any(body.get(name) is not None for name in NO_CONSTRAINT)


def _exceeds_the_context(message: str) -> bool:
    found = re.search(r"got (\d+) prompt tokens \+ max_tokens (\d+),", message)
    return found is not None and int(found[1]) + int(found[2]) > CONTEXT


# Status and code of a refusal -> what in body and message makes it right, although the body keeps to the document: no JSON schema says that.
RIGHT_REFUSALS: dict[tuple[int, str], Callable[[dict[str, Any], str], Any]] = {
    # Whether a text has a token, and how many, is the tokenizer's to say.
    (400, "prompt_empty"): lambda body, _: "" in (body["prompt"], *body["prompt"]),
    (400, "context_length_exceeded"): lambda _, message: _exceeds_the_context(message),
    # One field's bound is another's value, or its default.
    (400, "bad_sampling"): lambda body, message: body.get("min_tokens") and message.startswith("min_tokens cannot be used"),
    # A regex, or a schema in the subset that compiles.
    (400, "bad_constraint"): lambda body, _: _is_constrained(body),
    (422, "constraint_too_large"): lambda body, _: _is_constrained(body),
    # The client's own time is over before the prompt's log-probabilities, which cannot be told in part, are there.
    (504, "timeout"): lambda body, _: body.get("timeout") and body.get("echo") and body.get("logprobs") is not None,
}  # fmt: skip


class Watch:
    """What was sent, what came back, and what of it is wrong."""

    def __init__(self, num_inputs: int) -> None:
        self.num_left = num_inputs
        self.stop: Callable[[], None] = lambda: None  # the engine's; there is none before it runs
        self.answers: collections.Counter[tuple[str, int]] = collections.Counter()  # by operation and status
        self.data: collections.Counter[str] = collections.Counter()  # by whether it keeps to the document
        self.checks: collections.Counter[str] = collections.Counter()  # passed, or silent about a request
        self.right_refusals: collections.Counter[str] = collections.Counter()
        self.num_streams = self.num_events = 0
        self.failures: list[str] = []

    def attach(self, schema: schemathesis.BaseSchema) -> None:
        schema.hooks.register_hook_with_name(self.after_call, "after_call")
        schema.hooks.register_hook_with_name(self.filter_failure, "filter_failure")

    def after_call(
        self, context: schemathesis.HookContext, case: schemathesis.Case[Any], response: schemathesis.Response
    ) -> None:
        """A hook: each request."""
        self.answers[case.operation.label, response.status_code] += 1
        self.data[case.meta.generation.mode.value if case.meta is not None else "neither"] += 1
        if any(kind.startswith("text/event-stream") for kind in response.headers.get("content-type", ())):
            chunk = ChatChunk if "chat" in case.path else CompletionChunk
            try:
                payloads = Reply(response.status_code, {}, response.content).events
                msgspec.convert(payloads, list[chunk])  # type: ignore[valid-type]
            except (AssertionError, ValueError, msgspec.ValidationError) as error:
                self._fail("events", case, f"{error!r} in {response.content!r}")
            else:
                self.num_streams += 1
                self.num_events += len(payloads)
        self.num_left -= 1
        if self.num_left == 0:
            self.stop()

    def filter_failure(
        self,
        context: schemathesis.HookContext,
        failure: Failure,
        case: schemathesis.Case[Any],
        response: schemathesis.Response,
    ) -> bool:
        """A hook: each failed check. False where the server is right."""
        body, status = case.body, response.status_code
        is_refusal = isinstance(failure, RejectedPositiveData | ServerError)
        if is_refusal and isinstance(body, dict) and any(status == known for known, _ in RIGHT_REFUSALS):
            error = response.json()["error"]
            explains = RIGHT_REFUSALS.get((status, error["code"]))
            if explains is not None and explains(body, error["message"]):
                self.right_refusals[f"{status} {error['code']}"] += 1
                return False
        self._fail(type(failure).__name__, case, f"{failure.message}\n{status} {response.text}")
        return True

    def _fail(self, what: str, case: schemathesis.Case[Any], text: str) -> None:
        self.failures.append(f"{case.operation.label}: {what}: {text[:MOST_CHARS]}\n    {case.as_curl_command()}")

    def take(self, event: events.EngineEvent) -> None:
        """What the engine says of a group of requests, or of itself."""
        if isinstance(event, events.ScenarioFinished):
            for nodes in event.recorder.checks.values():
                self.checks.update(node.name for node in nodes if node.status == Status.SUCCESS)
                self.failures += [f"the check {node.name} crashed" for node in nodes if node.status == Status.ERROR]
            if event.status == Status.ERROR:
                self.failures.append(f"{event.label}: schemathesis could not test it")
        elif isinstance(event, events.NonFatalError):
            self.failures.append(f"{event.label}: {event.value!r}")
        elif isinstance(event, events.FatalError):
            self.failures.append(repr(event.exception))


def configuration(url: str, seed: int) -> schemathesis.Config:
    drawn = [{"include-path": path, "generation": {"max-examples": number}} for path, number in NUM_DRAWN_OF.items()]
    return schemathesis.Config.from_dict(
        {
            "base-url": url,
            "seed": seed,
            "max-time": 24 * 3600,  # it takes turns until then; here the number of requests ends it
            "suppress-health-check": ["all"],  # of hypothesis, about its own speed
            "request-timeout": PATIENCE_S,
            "max-stream-events": 1_000_000,  # or it would leave long streams
            "continue-on-failure": True,
            "generation": {"database": "none", "no-shrink": True, "max-examples": NUM_DRAWN},
            "phases": {"stateful": {"generation": {"max-examples": NUM_CHAINS}}},
            "operations": drawn,
            "output": {"sanitization": {"enabled": False}},  # the curl lines are to be run
        }
    )


@contextlib.contextmanager
def serving() -> Iterator[HttpServer]:
    """An engine on the emulated device with an HTTP ingress; both must end well."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_checkpoint(Path(folder) / "model", max_position_embeddings=CONTEXT, vocab_size=VOCAB)
        write_byte_tokenizer(model)
        limits = ("--max-requests-per-s", "1000000", "--burst-requests", "1000000", "--log-level", "error")
        with (
            running_engine(model, log_level="warning", constraint_slots=2) as engine,
            http_ingress(engine.config.engine_name, model, *limits) as server,
        ):
            yield server


def fuzz(server: HttpServer, document: dict[str, Any], num_inputs: int, seed: int) -> Watch:
    """document: the server's own, unless a test has another."""
    schema = schemathesis.openapi.from_dict(document, config=configuration(server.url, seed))
    schema.validate()  # against OpenAPI's own schema
    watch = Watch(num_inputs)
    watch.attach(schema)
    stream = from_schema(schema).execute()
    watch.stop = stream.stop
    for event in stream:
        watch.take(event)
        if len(watch.failures) >= MOST_FAILURES:
            stream.stop()
    unseen = {found.ok().label for found in schema.get_all_operations() if isinstance(found, Ok)} - {
        label for label, _ in watch.answers
    }
    watch.failures += [f"{label} was never called" for label in sorted(unseen)]
    if watch.num_left > 0:
        watch.failures.append(f"{watch.num_left} of {num_inputs} requests were not sent")
    return watch


def run(num_inputs: int, seed: int) -> dict[str, Any]:
    """Returns what --out writes. Raises SystemExit or AssertionError where something is wrong."""
    started = time.monotonic()
    with serving() as server:
        watch = fuzz(server, server.get("/openapi.json").json, num_inputs, seed)
        if watch.failures:
            raise SystemExit("\n".join([f"seed {seed}: {len(watch.failures)} failures", *watch.failures]))
        status = server.wait_until_idle()
        outstanding = b'blinkimp:ingress_num_outstanding{protocol="http",queue_pair="0"} 0.0'
        assert outstanding in server.get("/metrics").body
    answers: dict[str, dict[str, int]] = {}
    for (label, code), number in sorted(watch.answers.items()):
        answers.setdefault(label, {})[str(code)] = number
    pages = ("num_pages", "num_pages_free", "num_pages_cached", "requests_accepted", "requests_rejected")
    return {
        "inputs": watch.answers.total(),
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "schemathesis": schemathesis.__version__,
        "answers": answers,
        "data": dict(sorted(watch.data.items())),
        "streams": watch.num_streams,
        "stream events": watch.num_events,
        "checks passed": dict(sorted(watch.checks.items())),
        "right refusals of what keeps to the document": dict(sorted(watch.right_refusals.items())),
        "engine": {key: status[key] for key in pages},
    }


def main() -> None:
    run_fuzzer(fuzz_parser(__doc__, 30_000).parse_args(), run)


if __name__ == "__main__":
    main()
