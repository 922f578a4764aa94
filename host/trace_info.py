"""What a trace says of the engine that it was made with: configuration, model, and the names of the program's ops.

The host puts it into the trace's region as JSON (TraceHeader.info_offset of device/trace_abi.h), because a recorder is another process and may
look long after the start; `blinkimp trace record` copies it into its file. Called by host/engine.py, blinkimp/trace/recorder.py.
Test: pytest tests/host/test_trace_recorder.py
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

import msgspec

from blinkimp import __version__
from blinkimp.config import Config
from blinkimp.host.model_config import ModelConfig
from blinkimp.host.shared_region import Region
from blinkimp.host.trace_reader import TraceReader

LAYER_OPS: Final = (
    "qkv",
    "attention",
    "attention_out",
    "gate_up",
    "down",
)  # of build_pre_norm_decoder(), host/program.py
PRIVATE_KEYS: Final = frozenset(
    {"curve_key", "curve_clients", "api_key_file"}
)  # where secrets lie is nobody's business


class EngineInfo(msgspec.Struct):
    """Any of it may be absent: a region that was made without it gives an empty one."""

    blinkimp_version: str = ""
    engine_name: str = ""
    device: str = ""
    config: dict[str, Any] = {}
    model: dict[str, Any] = {}
    op_names: list[str] = []  # [num_ops], as op times are indexed; "layer.3.qkv"
    limits: dict[str, int] = {}  # of the engine's memory plan: pages, batch, tokens of a step


def op_names(num_layers: int) -> list[str]:
    """[5 * num_layers + 3], in the program's order."""
    layers = [f"layer.{layer}.{name}" for layer in range(num_layers) for name in LAYER_OPS]
    return ["embed", *layers, "lm_head", "sample"]


def engine_info(config: Config, model: ModelConfig, device: str, limits: dict[str, int], num_ops: int) -> bytes:
    names = op_names(model.num_layers)
    if len(names) != num_ops:  # a program of another shape: better numbers than wrong names
        names = [f"op.{idx}" for idx in range(num_ops)]
    settings = {name: value for name, value in msgspec.structs.asdict(config).items() if name not in PRIVATE_KEYS}
    scalars = {
        field.name: value
        for field in fields(model)
        if isinstance(value := getattr(model, field.name), (str, int, float, bool))
    }
    info = EngineInfo(__version__, config.engine_name, device, settings, scalars, names, limits)
    return msgspec.json.encode(info)


def read_engine_info(region: Region, reader: TraceReader) -> EngineInfo:
    """Of a trace's region."""
    begin, num_bytes = reader.header["info_offset"], reader.header["info_bytes"]
    if not num_bytes:
        return EngineInfo()
    return msgspec.json.decode(bytes(region.buffer[begin : begin + num_bytes]), type=EngineInfo)
