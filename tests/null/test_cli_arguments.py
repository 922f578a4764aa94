"""The command line's flags and help: nothing is started. Covers blinkimp/cli/__init__.py, blinkimp/cli/options.py,
blinkimp/cli/local_server.py.

Run: pytest tests/null/test_cli_arguments.py
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import pytest

from blinkimp.cli import COMMANDS, build_parser, main
from blinkimp.cli.local_server import serve_arguments
from blinkimp.cli.options import config_of, sampling_of
from blinkimp.config import Config, ConfigError, keys
from blinkimp.protocol import Sampling

SUBPARSERS = argparse._SubParsersAction


def parse(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(arguments)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in keys().values():
        monkeypatch.delenv(key.variable, raising=False)
    monkeypatch.delenv("BLINKIMP_CONFIG", raising=False)


def test_without_flags_the_configuration_is_the_default() -> None:
    assert config_of(parse("serve")) == Config()


def test_every_key_is_a_flag_of_serve() -> None:
    arguments = ["serve"]
    for key in keys().values():
        arguments.append(f"{key.flag}={key.default}")
    assert config_of(parse(*arguments)) == Config()


def test_flags_win_over_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine.toml").write_text("max_batch = 2\nnum_ingress = 2\n")
    monkeypatch.setenv("BLINKIMP_MAX_BATCH", "3")
    config = config_of(parse("serve", "--config", str(tmp_path / "engine.toml"), "--num-queue-pairs", "8"))
    assert (config.max_batch, config.num_ingress, config.num_queue_pairs) == (3, 2, 8)


def test_a_bad_flag_value_is_reported_with_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--max-batch", "lots"]) == 1
    message = capsys.readouterr().err
    assert "max_batch (flag --max-batch): got 'lots', expected an integer from 0 to 512" in message
    with pytest.raises(ConfigError):
        config_of(parse("serve", "--device", "tpu"))


def test_sampling_flags_are_fields_of_the_protocol() -> None:
    options = parse(
        "generate", "--temperature", "0.5", "--top-k", "9", "--seed", "3", "--max-tokens", "5", "--ignore-eos", "x"
    )
    sampling = Sampling(**sampling_of(options))
    assert sampling == Sampling(temperature=0.5, top_k=9, seed=3, max_tokens=5, ignore_eos=True)


def test_a_local_server_gets_the_same_settings_and_is_quiet(tmp_path: Path) -> None:
    options = parse("generate", "--max-batch", "8", "--device", "emulated", "x")
    arguments = serve_arguments(options, tmp_path / "socket")
    config = config_of(parse("serve", *arguments))
    assert (config.max_batch, config.device, config.log_level) == (8, "emulated", "warning")
    assert config.bind == f"ipc://{tmp_path}/socket"
    louder = serve_arguments(parse("generate", "--log-level", "debug", "x"), tmp_path / "socket")
    assert config_of(parse("serve", *louder)).log_level == "debug"


SERVER_SETTINGS = {  # of a server that stays
    "http": "0.0.0.0:8000",
    "metrics": "0.0.0.0:9090",
    "curve_key": "/etc/blinkimp/server.key",
    "curve_clients": "/etc/blinkimp/clients",
    "api_key_file": "/etc/blinkimp/keys",
    "capture_arrivals": "/var/captures",
    "num_ingress": 2,
    "num_queue_pairs": 8,
    "engine_name": "prod",
    "bind": "tcp://0.0.0.0:5555",
}


@pytest.mark.parametrize("source", ["environment", "file"])
@pytest.mark.parametrize("settings", [SERVER_SETTINGS, {"num_ingress": 8}])
def test_a_local_server_has_settings_of_its_own_for_what_a_server_is_to_the_world(
    settings: dict[str, str | int], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**settings, "max_batch": 7}
    flags = ["generate", "x"]
    if source == "environment":
        for name, value in settings.items():
            monkeypatch.setenv(keys()[name].variable, str(value))
    else:
        (tmp_path / "engine.toml").write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
        flags += ["--config", str(tmp_path / "engine.toml")]
    config = config_of(parse("serve", *serve_arguments(parse(*flags), tmp_path / "socket")))
    assert config.max_batch == 7, "of the model and the memory it is theirs"
    assert (config.bind, config.engine_name) == (f"ipc://{tmp_path}/socket", f"local-{os.getpid()}")
    assert (config.http, config.metrics, config.curve_key, config.curve_clients) == ("", "", "", "")
    assert (config.api_key_file, config.capture_arrivals) == ("", "")
    assert (config.num_ingress, config.num_queue_pairs) == (1, 1)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*filter(None, [command]), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"blinkimp {command}".strip() in text
    assert "where to start:" in text if command == "" else "examples:" in text
    if command:
        assert "what happens:" in text
    else:
        for name, summary in COMMANDS.items():
            assert name in text
            assert summary in text


PARTS = {
    "trace": ("record", "stats", "timeline", "export", "diff", "arrivals"),
    "lab": ("sweep", "interference", "evidence", "report"),
}


@pytest.mark.parametrize(("command", "part"), [(command, part) for command, parts in PARTS.items() for part in parts])
def test_help_of_a_part_teaches_and_tells_every_default(
    command: str, part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main([command, part, "--help"])
    text = capsys.readouterr().out
    assert f"  blinkimp {command} {part} " in text.partition("examples:")[2]
    (parser,) = (action for action in build_parser(only=command)._actions if isinstance(action, SUBPARSERS))
    (parts,) = (action for action in parser.choices[command]._actions if isinstance(action, SUBPARSERS))
    for action in parts.choices[part]._actions:
        assert action.help, f"{action.dest} has no help"
        if action.option_strings and action.nargs != 0 and action.default not in (None, "", float("inf")):
            assert f"{action.help} (default" in text or "(default" in action.help, action.dest


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_paragraphs_of_help_are_as_wide_as_the_terminal(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*filter(None, [command]), "--help"])
    text = capsys.readouterr().out
    usage, _, rest = text.partition("\n\n")
    assert usage and not [line for line in rest.splitlines() if len(line) > 80 and not line.startswith(" ")]


def test_wrong_usage_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (
            ["tune", "--aging-ms", "soon"],
            "blinkimp tune: error: argument --aging-ms: got 'soon', expected milliseconds",
        ),
        (
            ["lab", "sweep", "--folder", "x", "--rates", "a"],
            "argument --rates: got 'a', expected a number above 0",
        ),
        (["trace", "timeline", "x", "--request", "z"], "argument --request: got 'z', expected a number such as 0x1f3a"),
        (["compile", "--num-workers", "-4"], "argument --num-workers: got '-4', expected a whole number of at least 1"),
        (["generate"], "blinkimp generate: error: the following arguments are required: prompt"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--timeout"],
        ["chat", "--timeout"],
        ["top", "--interval"],
        ["tune", "--timeout"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e9", "soon"])
def test_a_time_that_is_none_or_has_no_end_is_wrong_usage(
    arguments: list[str], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments[:-1], f"{arguments[-1]}={value}")
    assert ended.value.code == 2
    assert re.search(
        rf"argument {arguments[-1]}: got '{value}', expected seconds (from|above) \S+ to", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "Qwen/Qwen3-4B"], ["unrecognized arguments: Qwen/Qwen3-4B;", "--model Qwen/Qwen3-4B"]),
        (["serve", "--port", "8000", "--host=0.0.0.0"], ["unrecognized arguments: --port --host;", "--http HOST:PORT"]),
        (["serve", "--api-key", "sk-123"], ["--api-key;", "--api-key-file FILE", "BLINKIMP_API_KEY"]),
        (["serve", "--max-model-len", "4096", "--api-key=sk-123"], ["--max-context", "--api-key-file"]),
        (["generate", "x", "--max-tok", "5"], ["unrecognized arguments: --max-tok;", "blinkimp generate --help"]),
        (["trace", "record", "--out", "x", "--sec", "5"], ["unrecognized arguments: --sec;"]),
    ],
)
def test_unknown_arguments_are_named_with_ours_and_never_with_a_secret(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "sk-123" not in said
    assert all(word in said for word in words), said


def test_no_command_prints_help_and_counts_as_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "where to start:" in capsys.readouterr().out


def test_an_unknown_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sevre"])
    assert ended.value.code == 2
    assert "serve" in capsys.readouterr().err


def test_a_prompt_may_be_named_like_a_command() -> None:
    assert parse("generate", "serve").prompt == "serve"
