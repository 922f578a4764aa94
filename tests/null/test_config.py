"""blinkimp/config.py: precedence of the sources, and errors that name key, source, got, expected and remedy.

Run: pytest tests/null/test_config.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from blinkimp.config import OTHER_VARIABLES, Config, ConfigError, cache_folder, keys, load_config, model_folder
from tests.support import ROOT, load_tool


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "engine.toml"
    path.write_text(text)
    return path


def test_defaults_are_valid() -> None:
    assert load_config(environ={}) == Config()


def test_precedence_is_flags_then_environment_then_file_then_default(tmp_path: Path) -> None:
    path = write(tmp_path, "num_ingress = 2\nmax_batch = 2\nnum_threads = 2\n")
    environ = {"BLINKIMP_MAX_BATCH": "3", "BLINKIMP_NUM_THREADS": "3", "HOME": "/nowhere"}
    config = load_config({"num_threads": "4"}, environ, path)
    assert (config.num_requests, config.num_ingress, config.max_batch, config.num_threads) == (4096, 2, 3, 4)


def test_file_named_by_the_environment(tmp_path: Path) -> None:
    path = write(tmp_path, "max_batch = 7\n")
    assert load_config(environ={"BLINKIMP_CONFIG": str(path)}).max_batch == 7


@pytest.mark.parametrize(
    ("flags", "environ", "text", "complaint"),
    [
        (
            {"max_batch": "many"},
            {},
            "",
            r"max_batch \(flag --max-batch\): got 'many', expected an integer from 0 to 512",
        ),
        ({}, {"BLINKIMP_MAX_BATCH": "-1"}, "", r"environment variable BLINKIMP_MAX_BATCH\): got '-1'"),
        ({}, {}, 'max_batch = "8"', None),
        ({}, {}, "max_batch = 8.5", r"in .*engine\.toml\): got 8\.5, expected an integer"),
        ({}, {}, "max_batch = true", r"got True, expected an integer"),
        ({"device": "gpus"}, {}, "", r"got 'gpus', expected one of auto, emulated, gpu; did you mean gpu\?"),
        ({"num_completions": "1000"}, {}, "", r"expected a power of two from 2 to"),
        ({"num_queue_pairs": "33"}, {}, "", r"an integer from 1 to 32"),
        ({"kv_memory_fraction": "0"}, {}, "", r"a number above 0.*at most 1"),
        ({"kv_memory_fraction": "nan"}, {}, "", r"a number above 0"),
        ({"bind": "5555"}, {}, "", r"text that matches \^\(tcp\|ipc\)"),
        ({"num_ingress": "5"}, {}, "", r"num_ingress: got 5, expected at most num_queue_pairs = 4"),
        ({"bind": "tcp://127.0.0.1:99999"}, {}, "", r"expected a port up to 65535 for each"),
        (
            {"bind": "tcp://127.0.0.1:65535", "num_ingress": "2"},
            {},
            "",
            r"for 2 ingress processes, expected a port up to",
        ),
        ({"bind": "tcp://127.0.0.1"}, {}, "", r"such as tcp://127\.0\.0\.1:5555"),
        ({"http": "127.0.0.1:65536"}, {}, "", r"http: got '127\.0\.0\.1:65536', expected a port from 0 to 65535"),
        (
            {},
            {"BLINKIMP_MAX_BACTH": "1"},
            "",
            r"unknown environment variable BLINKIMP_MAX_BACTH; did you mean BLINKIMP_MAX_BATCH\?",
        ),
        ({}, {}, "max_bacth = 1", r"unknown key max_bacth; did you mean max_batch\?"),
        ({}, {}, "= 1", r"not TOML"),
    ],
)
def test_a_bad_value_is_an_error_that_helps(
    tmp_path: Path, flags: dict[str, object], environ: dict[str, str], text: str, complaint: str | None
) -> None:
    path = write(tmp_path, text)
    if complaint is None:
        assert load_config(flags, environ, path).max_batch == 8  # a number in quotes is unambiguous
        return
    with pytest.raises(ConfigError, match=complaint):
        load_config(flags, environ, path)


@pytest.mark.parametrize(
    "name", ["api_key_file", "curve_key", "curve_clients", "capture_arrivals", "cache_dir", "model"]
)
@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_home_is_expanded_in_every_path_from_every_source(
    name: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    both = dict.fromkeys(("curve_key", "curve_clients"), "~/x") if name.startswith("curve") else {name: "~/x"}
    (tmp_path / "engine.toml").write_text("".join(f"{key} = {value!r}\n" for key, value in both.items()))
    if source == "flag":
        config = load_config(both, environ={})
    elif source == "environment":
        config = load_config(environ={keys()[key].variable: value for key, value in both.items()})
    else:
        config = load_config(environ={"BLINKIMP_CONFIG": "~/engine.toml"})
        assert config == load_config(environ={}, path=Path("~/engine.toml")), "and in --config=~/engine.toml"
    folders = {"cache_dir": str(cache_folder(config)), "model": str(model_folder(config))}
    assert folders.get(name, getattr(config, name)) == f"{tmp_path}/x"


def test_a_home_that_is_nobodys_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"api_key_file \(flag --api-key-file\): got '~nobody-here/x'.*give the whole path"
    ):
        load_config({"api_key_file": "~nobody-here/x"}, environ={})


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(environ={}, path=tmp_path / "none.toml")


def test_every_default_satisfies_its_own_key() -> None:
    for key in keys().values():
        assert getattr(load_config({key.name: str(key.default)}, {}), key.name) == key.default
        assert key.description, key.name


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(Config()) == tmp_path / "blinkimp"
    assert cache_folder(Config(cache_dir="/elsewhere")) == Path("/elsewhere")


def test_readme_table_is_what_the_type_says() -> None:
    readme = (ROOT / "README.md").read_text()
    assert load_tool("gen_config_table").updated(readme) == readme, "run: python tools/gen_config_table.py"


def test_every_variable_in_the_sources_is_documented() -> None:
    import re

    known = {key.variable for key in keys().values()} | set(OTHER_VARIABLES)
    for folder in ("blinkimp", "host", "nic_shim", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"BLINKIMP_[A-Z0-9_]+\b", path.read_text()):
                assert name in known, f"{path}: {name} is neither a key of Config nor in OTHER_VARIABLES"
