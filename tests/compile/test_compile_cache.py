"""host/compile.py and host/compile_cache.py: hits, what changes the key, corruption, races, errors. No GPU and no driver.

Run: pytest tests/compile/test_compile_cache.py
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from blinkimp.host import compile as compiler
from blinkimp.host import compile_cache
from blinkimp.host.compile import CompileError, compile_cubin, nvrtc_version, parse_report
from blinkimp.host.compile_cache import cubin_key, get_kernel

KERNEL = '#include <value.h>\nextern "C" __global__ void probe(int* out) { *out = kValue + BK_EXTRA; }\n'
DEFINES = {"BK_EXTRA": 5}
EM_CUDA = 190  # e_machine of the ELF header


@pytest.fixture
def device_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device/ folder with one tiny kernel and one header."""
    folder = tmp_path / "device"
    folder.mkdir()
    (folder / "value.h").write_text("constexpr int kValue = 7;\n")
    (folder / "probe.cu").write_text(KERNEL)
    monkeypatch.setattr(compiler, "DEVICE_DIR", folder)
    return folder


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_second_call_is_served_from_the_cache(device_dir: Path, cache_dir: Path) -> None:
    first = get_kernel("probe.cu", cache_dir, defines=DEFINES)
    second = get_kernel("probe.cu", cache_dir, defines=DEFINES)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert first.cubin == second.cubin == second.path.read_bytes()
    assert first.cubin.startswith(b"\x7fELF")  # plain, as cuobjdump wants it
    assert int.from_bytes(first.cubin[18:20], "little") == EM_CUDA
    assert first.functions == second.functions
    assert [(function.name, function.is_entry) for function in first.functions] == [("probe", True)]
    assert second.compile_ns == first.compile_ns > 0


def test_every_byte_that_nvrtc_could_read_is_in_the_key(device_dir: Path) -> None:
    source = device_dir / "probe.cu"
    keys = {cubin_key(source, "sm_90a", DEFINES)}
    assert cubin_key(source, "sm_90a", DEFINES) in keys

    def expect_new(key: str, what: str) -> None:
        assert key not in keys, what
        keys.add(key)

    expect_new(cubin_key(source, "sm_80", DEFINES), "architecture")
    expect_new(cubin_key(source, "sm_90a", {"BK_EXTRA": 6}), "macro value")
    expect_new(cubin_key(source, "sm_90a", {}), "macro")
    header = (device_dir / "value.h").read_text()
    for at in range(len(header)):
        (device_dir / "value.h").write_text(header[:at] + "~" + header[at + 1 :])
        expect_new(cubin_key(source, "sm_90a", DEFINES), f"byte {at} of the header")
    (device_dir / "value.h").write_text(header)
    (device_dir / "other.cuh").write_text("")
    expect_new(cubin_key(source, "sm_90a", DEFINES), "a new, empty header")
    (device_dir / "other.cuh").rename(device_dir / "renamed.cuh")
    expect_new(cubin_key(source, "sm_90a", DEFINES), "a header's name")
    source.write_text(KERNEL + "\n")
    expect_new(cubin_key(source, "sm_90a", DEFINES), "the source")


def test_nvrtc_version_and_schema_are_in_the_key(device_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from blinkimp.host import compile_cache

    source = device_dir / "probe.cu"
    before = cubin_key(source, "sm_90a", {})
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "99.9")
    other_version = cubin_key(source, "sm_90a", {})
    monkeypatch.setattr(compile_cache, "SCHEMA", compile_cache.SCHEMA + 1)
    assert len({before, other_version, cubin_key(source, "sm_90a", {})}) == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "no-json", "bad-json", "no-cubin"])
def test_a_corrupt_entry_is_rebuilt_with_a_warning(
    device_dir: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    good = get_kernel("probe.cu", cache_dir, defines=DEFINES)
    cubin, entry = good.path, good.path.parent / "entry.json"
    match damage:
        case "flip":
            cubin.write_bytes(good.cubin[:-1] + bytes([good.cubin[-1] ^ 1]))
        case "truncate":
            cubin.write_bytes(good.cubin[:100])
        case "no-json":
            entry.unlink()
        case "bad-json":
            entry.write_text("{")
        case "no-cubin":
            cubin.unlink()
    with caplog.at_level(logging.WARNING):
        again = get_kernel("probe.cu", cache_dir, defines=DEFINES)
    assert not again.from_cache
    assert again.cubin == good.cubin
    assert "corrupt" in caplog.text
    assert get_kernel("probe.cu", cache_dir, defines=DEFINES).from_cache


def test_expect_cached_makes_a_compile_an_error(
    device_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLINKIMP_EXPECT_CACHED", "1")
    with pytest.raises(CompileError, match="BLINKIMP_EXPECT_CACHED=1 forbids"):
        get_kernel("probe.cu", cache_dir, defines=DEFINES)
    monkeypatch.setenv("BLINKIMP_EXPECT_CACHED", "0")
    get_kernel("probe.cu", cache_dir, defines=DEFINES)
    monkeypatch.setenv("BLINKIMP_EXPECT_CACHED", "1")
    assert get_kernel("probe.cu", cache_dir, defines=DEFINES).from_cache
    (device_dir / "value.h").write_text("constexpr int kValue = 8;\n")
    with pytest.raises(CompileError, match="not in the compile cache"):
        get_kernel("probe.cu", cache_dir, defines=DEFINES)
    monkeypatch.setenv("BLINKIMP_EXPECT_CACHED", "yes")
    with pytest.raises(CompileError, match="got 'yes', expected 0 or 1"):
        get_kernel("probe.cu", cache_dir, defines=DEFINES)


def test_a_refused_source_carries_source_options_and_log(device_dir: Path, cache_dir: Path) -> None:
    (device_dir / "probe.cu").write_text('extern "C" __global__ void probe() { undeclared_name = 1; }\n')
    with pytest.raises(CompileError) as caught:
        get_kernel("probe.cu", cache_dir, defines=DEFINES)
    message = str(caught.value)
    assert str(device_dir / "probe.cu") in message
    assert "-arch=sm_90a" in message
    assert "-DBK_EXTRA=5" in message
    assert 'identifier "undeclared_name" is undefined' in message
    assert not list(cache_dir.rglob("*.cubin"))


def test_a_missing_source_is_named(device_dir: Path, cache_dir: Path) -> None:
    with pytest.raises(CompileError, match=r"none\.cu does not exist"):
        get_kernel("none.cu", cache_dir)


def test_an_unwritable_cache_compiles_with_a_warning(
    device_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")  # a file where the folder should be: fails for root too
    assert not get_kernel("probe.cu", tmp_path / "file", defines=DEFINES).from_cache
    assert "every start will compile" in caplog.text


def test_a_kernel_that_must_be_kept_and_is_not_is_an_error(
    device_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compile_cache, "_publish", publish)
    with pytest.raises(CompileError, match=r"cannot be written .*No space left"):
        get_kernel("probe.cu", cache_dir, defines=DEFINES, must_keep=True)
    assert [path.name for path in (cache_dir / "kernels").iterdir()] == [], "nothing is left of the attempt"


def test_two_processes_may_compile_the_same_kernel_at_once(device_dir: Path, cache_dir: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from blinkimp.host import compile as c, compile_cache; "
        "c.DEVICE_DIR = Path(sys.argv[1]); c.nvrtc_version(); sys.stdout.write('ready\\n'); sys.stdout.flush(); "
        "sys.stdin.readline(); k = compile_cache.get_kernel('probe.cu', Path(sys.argv[2]), defines={'BK_EXTRA': 5}); "
        "print(k.path, len(k.cubin))"
    )
    command = [sys.executable, "-c", program, str(device_dir), str(cache_dir)]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:  # both start now
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        outputs = {process.communicate()[0] for process in processes}
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(process.returncode == 0 for process in processes)
    assert len(outputs) == 1
    assert len(list((cache_dir / "kernels").iterdir())) == 1  # one entry, no scratch folder left
    assert get_kernel("probe.cu", cache_dir, defines=DEFINES).from_cache


def test_spills_are_seen(device_dir: Path) -> None:
    """The proof of zero spills is worth something only if spills show: 200 live values do not fit in 32 registers."""
    (device_dir / "probe.cu").write_text(
        """extern "C" __global__ void __launch_bounds__(1024, 2) probe(const float* in, float* out, int n) {
          float values[200];
          #pragma unroll
          for (int i = 0; i < 200; i++) values[i] = in[i * n + threadIdx.x];
          for (int round = 0; round < n; round++) {
            #pragma unroll
            for (int i = 0; i < 200; i++) values[i] = values[i] * values[(i + 7) % 200] + 1.0f;
          }
          #pragma unroll
          for (int i = 0; i < 200; i++) out[i * n + threadIdx.x] = values[i];
        }"""
    )
    _, (function,) = compile_cubin(device_dir / "probe.cu")
    assert function.has_spills
    assert function.num_registers == 32


def test_a_log_without_a_report_is_refused() -> None:
    with pytest.raises(CompileError, match="cannot read the assembler's report"):
        parse_report("ptxas info : nothing of use\n")


def test_report_tells_callees_from_entries() -> None:
    log = (
        "ptxas info    : Compiling entry function 'main_kernel' for 'sm_90a'\n"
        "ptxas info    : Function properties for main_kernel\n"
        "ptxas         .     16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 2 barriers, 1024 bytes smem\n"
        "ptxas info    : Function properties for helper\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    )
    main_kernel, helper = parse_report(log)
    assert (main_kernel.is_entry, main_kernel.num_registers, main_kernel.shared_bytes) == (True, 168, 1024)
    assert (main_kernel.stack_bytes, main_kernel.spill_store_bytes, main_kernel.spill_load_bytes) == (16, 8, 4)
    assert main_kernel.has_spills
    assert (helper.name, helper.is_entry, helper.has_spills) == ("helper", False, False)


def test_version_looks_like_one() -> None:
    assert nvrtc_version().startswith("13.")
