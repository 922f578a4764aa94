"""The commands as a user runs them: processes, exit codes, what they print, and that nothing is left behind. Emulated device.

Run: pytest tests/host/test_cli.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blinkimp.cli import main
from blinkimp.config import Config, model_folder
from blinkimp.host.checkpoint import read_model_config
from blinkimp.host.compile_cache import CompiledKernel, get_kernel
from blinkimp.host.gpu_kernel import KERNEL_SOURCE, PACK_SOURCE, STEP_SOURCE, kernel_shape
from tests.support import PATIENCE_S, hear_signals, python_path

SHARED_MEMORY = Path("/dev/shm")
PROMPT = "def read_file(path):"
EMULATED = ("--device", "emulated", "--num-threads", "2")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "blinkimp", *arguments]


def environment(**more: str) -> dict[str, str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("BLINKIMP_") or key == "BLINKIMP_NATIVE_LIBRARY"
    }
    return {**kept, "PYTHONPATH": python_path(), **more}


def run(*arguments: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment(**more),
    )


def regions_of(engine_name: str) -> list[Path]:
    return [path for path in SHARED_MEMORY.iterdir() if path.name.startswith(f"blinkimp.{engine_name}.")]


def left_by_own_servers() -> set[Path]:
    """Regions of servers that commands started for themselves (blinkimp/cli/local_server.py), where the command has ended."""
    found = {path: re.match(r"blinkimp\.local-(\d+)\.", path.name) for path in SHARED_MEMORY.iterdir()}
    return {path for path, name in found.items() if name and not Path("/proc", name[1]).exists()}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(endpoint, process) of a running `blinkimp serve`."""
    endpoint = f"ipc://{tmp_path}/ingress"
    engine_name = f"cli-{os.getpid()}"
    process = subprocess.Popen(
        command("serve", *EMULATED, "--bind", endpoint, "--engine-name", engine_name),
        text=True,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (tmp_path / "ingress").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the server did not listen in time"
            time.sleep(0.05)
        yield endpoint, process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()  # its regions stay: the assertion below fails
            process.communicate()
    assert regions_of(engine_name) == []


def test_generate_starts_its_own_server_and_ends_it() -> None:
    left_before = left_by_own_servers()
    result = run("generate", *EMULATED, "--max-tokens", "40", PROMPT)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip()) > 40
    assert re.search(r"40 tokens; the first after \d+ ms, then \d+ tokens/s; finished: length", result.stderr), (
        result.stderr
    )
    again = run("generate", *EMULATED, "--max-tokens", "40", "-", stdin=PROMPT)
    assert again.stdout == result.stdout  # greedy, and the prompt from stdin
    assert left_by_own_servers() <= left_before


@pytest.mark.parametrize("num_times", [1, 3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_generate_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals, num_times: int) -> None:
    process = subprocess.Popen(
        command("generate", *EMULATED, "--load-format", "null", "--max-tokens", "1900", "--ignore-eos", PROMPT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(TMPDIR=str(tmp_path)),
        preexec_fn=hear_signals,
    )
    try:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1), "it generates"
        for _ in range(num_times):  # by an impatient hand; the server takes longer to end
            process.send_signal(number)
            time.sleep(0.03)
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 128 + number and b"Traceback" not in errors, errors
    assert not list(tmp_path.iterdir()) and not regions_of(f"local-{process.pid}")


@pytest.mark.parametrize("module", ["blinkimp.cli", "blinkimp.cli.options", "blinkimp.cli.generate", "blinkimp.client"])
def test_ctrl_c_while_modules_are_loaded_ends_the_command_without_a_word(module: str) -> None:
    program = (
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: print('loads', flush=True); time.sleep({PATIENCE_S})\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from blinkimp.__main__ import main\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "generate", "x"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), preexec_fn=hear_signals
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"loads\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT) and errors == b"", errors


def test_generate_says_when_the_emulated_device_stands_in() -> None:
    result = run("generate", "--max-tokens", "2", PROMPT, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert "emulated device" in result.stderr


def test_serve_answers_and_drains_on_sigterm(server: tuple[str, subprocess.Popen[str]]) -> None:
    endpoint, process = server
    first = run("generate", "--connect", endpoint, "--max-tokens", "20", PROMPT)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip()
    # A request in flight when SIGTERM comes is finished: all of its tokens arrive.
    running = subprocess.Popen(
        command("generate", "--connect", endpoint, "--max-tokens", "300", "--ignore-eos", PROMPT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert running.stdout is not None
    assert running.stdout.read(1)
    process.send_signal(signal.SIGTERM)
    _, messages = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, messages
    assert "300 tokens;" in messages
    assert "finished: length" in messages
    _, log = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, log
    assert "drain" in log


def test_a_second_engine_of_the_same_name_is_refused(server: tuple[str, subprocess.Popen[str]], tmp_path: Path) -> None:
    result = run("serve", *EMULATED, "--engine-name", f"cli-{os.getpid()}", "--bind", f"ipc://{tmp_path}/other")
    assert result.returncode == 1
    assert "already" in result.stderr or "running" in result.stderr


def test_chat_answers_each_line(server: tuple[str, subprocess.Popen[str]]) -> None:
    endpoint, _ = server
    result = run("chat", "--connect", endpoint, "--max-tokens", "16", stdin="def f(x):\n\nimport os\n")
    assert result.returncode == 0, result.stderr
    assert "no chat template" in result.stderr
    assert result.stdout.count("\n") >= 2


def test_chat_goes_on_after_a_message_that_is_too_long(server: tuple[str, subprocess.Popen[str]]) -> None:
    endpoint, _ = server
    lines, too_long = ["def f(x):", "import os"], "many words " * 5000
    expected = run("chat", "--connect", endpoint, "--max-tokens", "16", stdin="\n".join(lines))
    result = run("chat", "--connect", endpoint, "--max-tokens", "16", stdin="\n".join([lines[0], too_long, lines[1]]))
    assert result.returncode == 0, result.stderr
    assert re.search(r"the message is too long: got a prompt of \d+ tokens .*The message was dropped", result.stderr)
    assert "forgotten" not in result.stderr
    assert result.stdout == expected.stdout, "greedy replies: the conversation is the same"


def test_a_folder_named_like_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "q[" / "y]"  # as markup: an end without a beginning
    shutil.copytree(model_folder(Config()), folder)
    endpoint = f"ipc://{tmp_path}/nobody"
    result = run("chat", "--model", str(folder), "--connect", endpoint, "--timeout", "0.5")
    assert f"{folder} has no chat template: plain `User:`" in result.stderr, result.stderr
    assert result.returncode == 1 and "no word from" in result.stderr and "Traceback" not in result.stderr


def test_prompt_that_is_not_utf8_is_wrong_usage() -> None:
    words = b"got b'def \\xff', whose character 4 is not UTF-8; expected UTF-8 text"
    for arguments, stdin in (
        (["generate", "-"], b"def \xff"),
        (["generate", b"def \xff"], b""),
        (["chat", "--system", b"def \xff"], b""),
    ):
        done = subprocess.run(
            [*command(), *arguments], input=stdin, capture_output=True, timeout=300, check=False, env=environment()
        )
        assert done.returncode == 2 and words in done.stderr and b"Traceback" not in done.stderr, done.stderr
        assert done.stderr.startswith(f"blinkimp {arguments[0]}: ".encode())


def test_chat_goes_on_after_a_message_that_is_not_utf8(server: tuple[str, subprocess.Popen[str]]) -> None:
    endpoint, _ = server
    expected, result = (
        subprocess.run(
            command("chat", "--connect", endpoint, "--max-tokens", "16"),
            input=stdin,
            capture_output=True,
            timeout=300,
            check=False,
            env=environment(),
        )
        for stdin in (b"def f(x):\nimport os\n", b"def f(x):\ndef \xff\nimport os\n")
    )
    assert result.returncode == 0 and result.stdout == expected.stdout, result.stderr
    assert b"the message: got b'def \\xff', whose character 4 is not UTF-8;" in result.stderr
    assert result.stderr.count(b"The message was dropped") == 1


def test_doctor_measures_a_round_trip() -> None:
    result = run("doctor", "--json", *EMULATED)
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)}
    assert findings["ring round trip"]["verdict"] == "ok", findings
    assert re.search(r"p50 [\d.]+ us, p99 [\d.]+ us over 500 pings", findings["ring round trip"]["found"])
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("flags", "what", "found"),
    [
        (["--model", "/nowhere"], "model", "/nowhere/config.json: got no such file"),
        (["--num-pages", "1"], "ring round trip", "MemoryPlanError: 1 KV pages cannot be"),
        (["--max-context", "99999999"], "ring round trip", "max_context is 99999999, but the model has 2048"),
        (["--num-pages=-3"], "settings", "num_pages (flag --num-pages): got '-3'"),
    ],
)
def test_doctor_fails_where_a_setting_cannot_work(flags: list[str], what: str, found: str) -> None:
    result = run("doctor", "--json", *EMULATED, *flags)
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)}
    assert findings[what]["verdict"] == "fail" and found in findings[what]["found"] and findings[what]["remedy"]
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr


def test_doctor_fails_where_a_gpu_is_asked_for_and_none_is_there() -> None:
    result = run("doctor", "--device", "gpu", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1
    assert re.search(r"^FAIL GPU", result.stdout, flags=re.MULTILINE)
    assert "->" in result.stdout


def test_compile_prints_times_registers_and_spills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """tests/compile/test_kernels.py compiles the persistent kernel, in a minute; here a small one stands in for it."""
    asked: list[tuple[str, str, dict[str, str]]] = []

    def get_small_kernel(
        source: str, folder: Path, arch: str, defines: dict[str, str], *, must_keep: bool
    ) -> CompiledKernel:
        asked.append((source, arch, defines))
        stands_for = {**defines, f"STANDS_FOR_{Path(source).stem}": "1"}
        return get_kernel(PACK_SOURCE, folder, arch, stands_for, must_keep=must_keep)

    monkeypatch.setattr("blinkimp.cli.compile.get_kernel", get_small_kernel)
    arguments = ["compile", "--arch", "sm_90a", "--num-workers", "131", "--cache-dir", str(tmp_path)]
    assert main(arguments) == 0
    shape = kernel_shape(read_model_config(model_folder(Config())), 131, "hopper", "sm_90a")
    assert (KERNEL_SOURCE, "sm_90a", shape.defines()) in asked and (PACK_SOURCE, "sm_90a", {}) in asked
    assert (STEP_SOURCE, "sm_90a", {}) in asked
    table, _, rest = capsys.readouterr().out.partition(str(tmp_path))
    assert re.search(r"source +function +registers +stack B +spills B +shared B +compile ms +cached ms", table), table
    assert re.search(r"^persistent_kernel.cu +pack_weights +\d+ +\d+ +\d+ +\d+ +\d+ +[\d.]+ *$", table, re.MULTILINE), (
        table
    )
    assert "compiled now" in rest and "was in the cache" not in rest
    monkeypatch.setenv("BLINKIMP_EXPECT_CACHED", "1")
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert "was in the cache" in again and "compiled now" not in again
    assert main([*arguments[:-1], str(tmp_path / "empty")]) == 1
    assert "forbids" in capsys.readouterr().err


def test_compile_refuses_a_cache_that_cannot_be_written_before_it_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[str] = []

    def compile_nothing(source: Path, *_: object) -> None:
        compiled.append(source.name)
        raise AssertionError("it compiles")

    monkeypatch.setattr("blinkimp.host.compile_cache.compiler.compile_cubin", compile_nothing)
    (tmp_path / "file").write_text("")  # a file where the folder should be: fails for root too
    assert main(["compile", "--arch", "sm_90a", "--num-workers", "131", "--cache-dir", str(tmp_path / "file")]) == 1
    words = f"compile cache: {tmp_path}/file/kernels: cannot be written to (Not a directory)"
    said = capsys.readouterr().err
    assert words in said and "choose another (cache_dir)" in said and not compiled


def test_a_folder_that_is_no_model_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    result = run("generate", *EMULATED, "--model", str(tmp_path), PROMPT)
    assert result.returncode == 1
    assert "config.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_nobody_listens_at_the_endpoint(tmp_path: Path) -> None:
    result = run("generate", "--connect", f"ipc://{tmp_path}/nobody", "--timeout", "1", PROMPT)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "nobody" in result.stderr
