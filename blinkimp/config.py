"""Configuration: one type, filled from a TOML file, BLINKIMP_* environment variables and command-line flags.

Precedence: flags > environment > file > default. Every value remembers where it came from, so that an error names the key, the
source, what was found, what was expected and what to do. Unknown keys are errors.
Called by: blinkimp/cli. The README's table is written from this type by tools/gen_config_table.py.
Test: pytest tests/null/test_config.py
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from blinkimp import ring_abi

ENVIRONMENT_PREFIX = "BLINKIMP_"
MAX_PORT = 65535
# Variables that are not configuration of an engine; README, "Environment".
OTHER_VARIABLES = {
    "BLINKIMP_API_KEY": "HTTP: API keys, separated by commas, beside those of api_key_file",
    "BLINKIMP_CONFIG": "path of the TOML file, where no --config is given",
    "BLINKIMP_EXPECT_CACHED": "1: a compile at start is an error (the cubin must be in the cache already)",
    "BLINKIMP_NATIVE_LIBRARY": "path of another build of the native library, e.g. one with a sanitizer",
}


# Keys that are paths: `~` is the home folder wherever they come from. A shell expands it in `--key ~/x`, not in `--key=~/x`, nor in a file.
# Those of `model` and `cache_dir` are model_folder() and cache_folder().
PATH_KEYS = ("api_key_file", "curve_key", "curve_clients", "capture_arrivals")


class ConfigError(ValueError):
    """A configuration value is wrong; the message is meant for the person who set it."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one engine. 0 and `auto` mean: chosen from the model and the device."""

    model: Annotated[str, Meta(min_length=1, description="`embedded`, or a Hugging Face checkpoint folder")] = (
        "embedded"
    )
    load_format: Annotated[
        Literal["auto", "dummy", "null"],
        Meta(
            description="for measurements: `dummy`: random weights, only config.json is read; `null`: no model, on the emulated device, "
            "a token of its vocabulary for each running request and step"
        ),
    ] = "auto"
    null_step_us: Annotated[
        int, Meta(ge=0, le=1 << 30, description="with load_format null: from step to step; 0: as fast as it goes")
    ] = 10_000
    device: Annotated[
        Literal["auto", "gpu", "emulated"],
        Meta(description="`auto`: the GPU where there is one, else the emulated device"),
    ] = "auto"
    kernel: Annotated[
        Literal["auto", "hopper", "portable"],
        Meta(
            description="of the GPU; `auto`: `hopper` on compute capability 9.0, `portable` (8.0 and newer) elsewhere"
        ),
    ] = "auto"
    orchestrator: Annotated[
        Literal["gpu", "cpu", "cpu-ahead"],
        Meta(
            description="who schedules: the device, or a thread of the host that launches each step (to measure what that costs); "
            "`cpu-ahead`: a step early"
        ),
    ] = "gpu"
    compute_dtype: Annotated[
        Literal["auto", "f32", "bf16"], Meta(description="of GEMM inputs and KV pages; the GPU computes in bf16")
    ] = "auto"
    engine_name: Annotated[
        str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$", description="names the shared memory; one engine a name")
    ] = "blinkimp"
    bind: Annotated[
        str,
        Meta(
            pattern=r"^(tcp|ipc)://.+", description="ZeroMQ endpoint of the first ingress; others take the next ports"
        ),
    ] = "tcp://127.0.0.1:5555"
    http: Annotated[
        str,
        Meta(
            pattern=r"^$|^\S*:[0-9]{1,5}$",
            description="HOST:PORT of an HTTP ingress with OpenAI's API, such as 127.0.0.1:8000; empty: none",
        ),
    ] = ""
    metrics: Annotated[
        str,
        Meta(
            pattern=r"^$|^\S*:[0-9]{1,5}$",
            description="HOST:PORT of Prometheus metrics for whoever has no HTTP ingress; empty: at /metrics of that one only",
        ),
    ] = ""
    metrics_prefix: Annotated[
        str,
        Meta(
            pattern=r"^([a-zA-Z_][a-zA-Z0-9_]*[:_])?$",
            description="of metrics that vLLM has too; with `vllm:` its dashboards read them as they are",
        ),
    ] = "blinkimp:"
    served_model_name: Annotated[str, Meta(description="what HTTP clients call the model; empty: as `model` says")] = ""
    api_key_file: Annotated[
        str, Meta(description="HTTP: API keys, one a line, mode 600; empty: BLINKIMP_API_KEY, else none is asked for")
    ] = ""
    curve_key: Annotated[
        str,
        Meta(description="ZeroMQ: file of the server's CURVE secret key; empty: no encryption; PROTOCOL.md, Security"),
    ] = ""
    curve_clients: Annotated[str, Meta(description="ZeroMQ: file of the public keys that may connect, one a line")] = ""
    max_outstanding: Annotated[
        int, Meta(ge=1, le=65535, description="choices of one API key, or requests of one CURVE key, that run at once")
    ] = 1024
    max_requests_per_s: Annotated[
        int,
        Meta(
            ge=1,
            le=1 << 20,
            description="requests a second of one API key, CURVE key or plain ZeroMQ connection; twice as many may come at once",
        ),
    ] = 500
    max_request_bytes: Annotated[
        int, Meta(ge=1024, le=1 << 30, description="of an HTTP body or ZeroMQ message; larger ones are refused")
    ] = 2 << 20
    max_prompt_chars: Annotated[
        int, Meta(ge=1, le=1 << 30, description="characters of a prompt given as text; longer ones are refused")
    ] = 1 << 20
    read_timeout_s: Annotated[
        float,
        Meta(gt=0, le=86400, description="HTTP: without a byte of a request for so long, its connection is closed"),
    ] = 30.0
    num_ingress: Annotated[int, Meta(ge=1, le=ring_abi.MAX_QUEUE_PAIRS, description="ingress processes")] = 1
    num_queue_pairs: Annotated[
        int, Meta(ge=1, le=ring_abi.MAX_QUEUE_PAIRS, description="queue pairs; each ingress process takes one")
    ] = 4
    num_submissions: Annotated[
        int, Meta(ge=2, le=1 << 20, extra={"power_of_two": True}, description="entries of a submission ring")
    ] = 1024
    num_completions: Annotated[
        int, Meta(ge=2, le=1 << 24, extra={"power_of_two": True}, description="entries of a completion ring")
    ] = 8192
    arena_bytes: Annotated[
        int, Meta(ge=4096, le=1 << 32, extra={"power_of_two": True}, description="request bodies of a queue pair")
    ] = 8 << 20
    num_requests: Annotated[int, Meta(ge=1, le=65535, description="entries of the request table")] = 4096
    max_batch: Annotated[int, Meta(ge=0, le=512, description="requests in one step; a GPU takes 256 at most")] = 0
    max_step_tokens: Annotated[
        int, Meta(ge=0, le=ring_abi.MAX_STEP_TOKENS, description="tokens (rows) in one step")
    ] = 0
    prefill_chunk_tokens: Annotated[
        int, Meta(ge=0, le=ring_abi.MAX_STEP_TOKENS, description="prompt tokens of one request in one step")
    ] = 0
    max_context: Annotated[int, Meta(ge=0, description="tokens of one request, prompt and output")] = 0
    num_pages: Annotated[int, Meta(ge=0, description=f"KV pages of {ring_abi.PAGE_TOKENS} tokens")] = 0
    kv_memory_fraction: Annotated[
        float, Meta(gt=0, le=1, description="share of the memory left after the weights that KV pages may take")
    ] = 0.9
    prefix_cache: Annotated[
        bool, Meta(description="requests that begin alike share the KV pages of their common beginning")
    ] = True
    constraint_slots: Annotated[
        int, Meta(ge=0, le=1024, description="structured outputs that a queue pair has loaded at once")
    ] = 8
    constraint_slot_bytes: Annotated[
        int, Meta(ge=0, le=1 << 30, description="largest automaton of a structured output")
    ] = 0
    num_threads: Annotated[int, Meta(ge=0, le=1024, description="CPU threads of the emulated device")] = 0
    ingress_timeout_s: Annotated[
        float, Meta(ge=0.2, le=3600, description="an ingress silent for longer is dropped, its requests cancelled")
    ] = 1.0
    drain_timeout_s: Annotated[
        float, Meta(ge=0, le=86400, description="SIGTERM: how long running requests may take to finish")
    ] = 30.0
    stall_timeout_s: Annotated[
        float,
        Meta(
            ge=0, le=86400, description="a device without a heartbeat for so long hangs; 0: 10 s (GPU), 30 s (emulated)"
        ),
    ] = 0.0
    max_restarts: Annotated[
        int, Meta(ge=0, le=1000, description="engines that are started anew after faults, within 10 minutes; 0: none")
    ] = 3
    recovery_timeout_s: Annotated[
        float,
        Meta(
            gt=0, le=86400, description="requests wait for so long for an engine that is started anew, then they fail"
        ),
    ] = 300.0
    park_after_s: Annotated[
        float,
        Meta(ge=0, le=86400, description="idle for so long, the kernel leaves the GPU until it is wanted; 0: never"),
    ] = 0.0
    trace_events: Annotated[
        int,
        Meta(ge=0, le=1 << 28, description="events that the trace keeps, a power of two, at least 65536; 0: no trace"),
    ] = 0
    trace_op_period: Annotated[
        int,
        Meta(ge=0, le=1 << 20, description="with a trace: times of every op on every SM, every so many steps; 0: none"),
    ] = 0
    capture_arrivals: Annotated[
        str,
        Meta(
            description="folder to which ingresses write every request, prompts and all, for a replay (TRACE.md); empty: nothing is written"
        ),
    ] = ""
    cache_dir: Annotated[
        str, Meta(description="compiled kernels; empty: $XDG_CACHE_HOME/blinkimp or ~/.cache/blinkimp")
    ] = ""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="to stderr")] = "info"
    log_format: Annotated[
        Literal["text", "json"], Meta(description="of every process's lines; `json`: one object a line, METRICS.md")
    ] = "text"


def cache_folder(config: Config) -> Path:
    """The folder that config.cache_dir names, or the default one. It may not exist yet."""
    if config.cache_dir:
        return _expand(config.cache_dir, "cache_dir")
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "blinkimp"


def model_folder(config: Config) -> Path:
    """The checkpoint folder that config.model names."""
    if config.model == "embedded":
        return Path(__file__).resolve().parent / "models" / "embedded"
    return _expand(config.model, "model")


class Key(msgspec.Struct, frozen=True):
    """What flags, the README's table and error messages say of one key of Config."""

    name: str
    value_type: Any  # the annotated type, for msgspec.convert
    default: str | int | float
    description: str
    expected: str  # in words
    choices: tuple[str, ...]  # of a Literal, else empty
    is_power_of_two: bool

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _expectation(info: msgspec.inspect.Type, power_of_two: bool) -> str:
    """The type and its limits in words."""
    match info:
        case msgspec.inspect.LiteralType(values=values):
            return "one of " + ", ".join(map(str, values))
        case msgspec.inspect.IntType(ge=low, le=high):
            noun = "a power of two" if power_of_two else "an integer"
            return f"{noun} from {low} to {high}" if high is not None else f"{noun} of at least {low}"
        case msgspec.inspect.FloatType(gt=above, ge=low, le=high):
            return f"a number from {low} to {high}" if above is None else f"a number above {above}, at most {high}"
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.StrType(pattern=str(pattern)):
            return f"text that matches {pattern}"
    return "text"


def keys() -> dict[str, Key]:
    """Every key of Config, in its order."""
    struct_info = msgspec.inspect.type_info(Config)
    assert isinstance(struct_info, msgspec.inspect.StructType)
    result = {}
    for field, struct_field in zip(struct_info.fields, msgspec.structs.fields(Config), strict=True):
        info, description = field.type, ""
        extra: dict[str, object] = {}
        while isinstance(info, msgspec.inspect.Metadata):
            extra |= info.extra or {}
            description = (info.extra_json_schema or {}).get("description", description)
            info = info.type
        power_of_two = bool(extra.get("power_of_two"))
        choices = tuple(map(str, info.values)) if isinstance(info, msgspec.inspect.LiteralType) else ()
        expected = _expectation(info, power_of_two)
        value = Key(field.name, struct_field.type, field.default, description, expected, choices, power_of_two)
        result[field.name] = value
    return result


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def _parse(key: Key, raw: object, source: str) -> object:
    """`raw` as the key's type. Text from the environment or a flag is read leniently, TOML values by their own type."""
    try:
        value = msgspec.convert(raw, key.value_type, strict=not isinstance(raw, str))
    except msgspec.ValidationError:
        value = None
    if value is None or (key.is_power_of_two and value & (value - 1)):
        remedy = f"the default is {key.default!r}"
        if key.choices and (close := difflib.get_close_matches(str(raw), key.choices, n=1)):
            remedy = f"did you mean {close[0]}?"
        raise ConfigError(f"{key.name} ({source}): got {raw!r}, expected {key.expected}; {remedy}")
    if key.name in PATH_KEYS and value:
        return str(_expand(value, f"{key.name} ({source})"))
    return value


def _expand(path: str | Path, what: str) -> Path:
    """With the home folder in place of `~`."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{what}: got {str(path)!r}, whose home folder is unknown; give the whole path") from error


def _read_file(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"config file {path}: cannot be read ({error.strerror}); check --config or BLINKIMP_CONFIG"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config file {path}: not TOML ({error}); expected lines such as `num_ingress = 2`"
        ) from error


def load_config(
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    path: Path | None = None,
) -> Config:
    """The configuration from all sources. `flags` holds only what the user gave, by key. Raises ConfigError."""
    environ = os.environ if environ is None else environ
    if path is None and environ.get("BLINKIMP_CONFIG"):
        path = Path(environ["BLINKIMP_CONFIG"])
    path = path and _expand(path, "config file")
    known = keys()
    variables = {key.variable: key for key in known.values()}
    values: dict[str, object] = {}

    for name, raw in (_read_file(path) if path else {}).items():
        if name not in known:
            raise ConfigError(f"config file {path}: unknown key {name}; {_suggestion(name, list(known))}")
        values[name] = _parse(known[name], raw, f"in {path}")
    for name, text in environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or name in OTHER_VARIABLES:
            continue
        if name not in variables:
            raise ConfigError(
                f"unknown environment variable {name}; {_suggestion(name, [*variables, *OTHER_VARIABLES])}"
            )
        values[variables[name].name] = _parse(variables[name], text, f"environment variable {name}")
    for name, raw in (flags or {}).items():
        if name not in known:
            raise ConfigError(f"unknown flag {name}; {_suggestion(name, list(known))}")
        values[name] = _parse(known[name], raw, f"flag {known[name].flag}")

    config = Config(**values)  # type: ignore[arg-type]  # each value was converted to its key's type above
    num_ingresses = config.num_ingress + bool(config.http)
    if num_ingresses > config.num_queue_pairs:
        with_http = " with the HTTP ingress" if config.http else ""
        raise ConfigError(
            f"num_ingress: got {num_ingresses}{with_http}, expected at most num_queue_pairs = {config.num_queue_pairs}, because each "
            "ingress takes a queue pair; raise num_queue_pairs"
        )
    if bool(config.curve_key) != bool(config.curve_clients):
        missing = "curve_clients" if config.curve_key else "curve_key"
        raise ConfigError(
            f"{missing}: got nothing, expected a file, because the other of curve_key and curve_clients is set; give both"
        )
    _check_ports(config)
    return config


def _check_ports(config: Config) -> None:
    """ZeroMQ would listen on another port than one that does not exist, without a word."""
    for name in ("http", "metrics"):
        address = getattr(config, name)
        if address and int(address.rpartition(":")[2]) > MAX_PORT:
            raise ConfigError(f"{name}: got {address!r}, expected a port from 0 to {MAX_PORT}; choose another")
    port = config.bind.rpartition(":")[2]
    if not config.bind.startswith("tcp://") or port == "*":
        return
    if not port.isdecimal() or int(port) + config.num_ingress - 1 > MAX_PORT:
        raise ConfigError(
            f"bind: got {config.bind!r} for {config.num_ingress} ingress processes, expected a port up to {MAX_PORT} for each, such as "
            "tcp://127.0.0.1:5555, or tcp://127.0.0.1:* for any free one; choose another"
        )
