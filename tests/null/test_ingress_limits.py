"""nic_shim/ingress_limits.py: the limits of both ingresses have the configuration's defaults, reach the processes, and are told of as they are.

Run: pytest tests/null/test_ingress_limits.py
"""

from __future__ import annotations

import argparse
import dataclasses
import re

import pytest

from blinkimp.config import Config, keys
from blinkimp.nic_shim import http_ingress, zmq_ingress
from blinkimp.nic_shim.ingress_flags import add_limit_flags, limit_arguments, limits_of
from blinkimp.nic_shim.ingress_limits import HttpLimits, IngressLimits, ZmqLimits
from tests.support import ROOT

KINDS = (HttpLimits, ZmqLimits)
# Names that mean something else there: the configuration's is of the device.
OTHER_KEYS = {"stall_timeout_s"}
DOCUMENTS = {HttpLimits: "HTTP.md", ZmqLimits: "PROTOCOL.md"}


def parser_of(kind: type[IngressLimits]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_limit_flags(parser, kind)
    return parser


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_the_configurations(kind: type[IngressLimits]) -> None:
    defaults, config = kind(), Config()
    shared = [field.name for field in dataclasses.fields(kind) if field.name in keys().keys() - OTHER_KEYS]
    assert {"max_request_bytes", "max_prompt_chars", "max_outstanding", "max_requests_per_s"} <= set(shared)
    assert {name: getattr(defaults, name) for name in shared} == {name: getattr(config, name) for name in shared}
    assert dataclasses.replace(kind.of(config), loss_timeout_s=defaults.loss_timeout_s) == defaults


@pytest.mark.parametrize("kind", KINDS)
def test_a_servers_configuration_reaches_its_ingresses(kind: type[IngressLimits]) -> None:
    config = Config(
        max_request_bytes=4096, max_prompt_chars=17, read_timeout_s=0.5, max_outstanding=3, max_requests_per_s=7,
        recovery_timeout_s=11.0, stall_timeout_s=5.0,
    )  # fmt: skip
    limits = kind.of(config)
    expected: dict[str, float] = {
        "max_request_bytes": 4096, "max_prompt_chars": 17, "max_outstanding": 3, "max_requests_per_s": 7,
        "burst_requests": 14, "loss_timeout_s": 11.0,
    }  # fmt: skip
    if kind is HttpLimits:
        expected["read_timeout_s"] = 0.5
    assert limits == dataclasses.replace(kind(), **expected), "the others stay at their defaults"
    assert limits_of(parser_of(kind).parse_args(limit_arguments(limits)), kind) == limits


@pytest.mark.parametrize(("kind", "module"), [(HttpLimits, http_ingress), (ZmqLimits, zmq_ingress)])
def test_an_ingress_started_by_hand_has_the_defaults_and_a_flag_for_each(
    kind: type[IngressLimits], module: object
) -> None:
    parser: argparse.ArgumentParser = vars(module)["_parser"]()
    where = ["--model-folder", "folder"] if kind is HttpLimits else ["--tokenizer", "folder"]
    needed = ["--engine", "name", "--bind", "127.0.0.1:0", *where]
    assert limits_of(parser.parse_args(needed), kind) == kind()
    for field in dataclasses.fields(kind):
        flags = [*needed, "--" + field.name.replace("_", "-"), "9"]
        assert limits_of(parser.parse_args(flags), kind) == dataclasses.replace(kind(), **{field.name: 9})
        assert f"{field.metadata['text']} (default " in " ".join(parser.format_help().split())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_and_less_is_refused(kind: type[IngressLimits]) -> None:
    for field in dataclasses.fields(kind):
        for value in (0, -1):
            with pytest.raises(ValueError, match=f"{field.name} is {value}; expected more than 0"):
                dataclasses.replace(kind(), **{field.name: value})


def shown(name: str, value: float) -> str:
    """As the documents write it."""
    if name.endswith("_bytes"):
        shift, unit = (30, "GiB") if value >= 1 << 30 else (20, "MiB")
        return f"{value / (1 << shift):g} {unit}"
    return f"{value:g} s" if name.endswith("timeout_s") else f"{value:,}"


@pytest.mark.parametrize("kind", KINDS)
def test_documents_have_every_limit_with_its_default(kind: type[IngressLimits]) -> None:
    text = " ".join((ROOT / "nic_shim" / DOCUMENTS[kind]).read_text().split())
    for field in dataclasses.fields(kind):
        is_configured = field.name in keys().keys() - OTHER_KEYS
        name = field.name if is_configured else "--" + field.name.replace("_", "-")
        told = re.findall(rf"`{name}` \(([0-9][0-9,.]*(?: (?:[MG]iB|s\b))?)", text)
        assert set(told) == {shown(field.name, getattr(kind(), field.name))}, f"{name} in {DOCUMENTS[kind]}: {told}"
