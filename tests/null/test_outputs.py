"""Outputs: what is refused before the work, and what a failure leaves. Run: pytest tests/null/test_outputs.py"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from blinkimp.outputs import OutputError, check_outputs, replacing


def test_an_input_is_no_output_by_any_name(tmp_path: Path) -> None:
    """I1"""
    given, link, hard = (tmp_path / name for name in ("in", "link", "hard"))
    given.write_text("kept")
    link.symlink_to(given)
    hard.hardlink_to(given)
    for output in (given, link, hard, tmp_path / "x" / ".." / "in"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(OutputError, match=r"the same file as .*expected one of its own"):
            check_outputs([output], [given])
    with pytest.raises(OutputError, match="the same file"):
        check_outputs([tmp_path / "new", None, tmp_path / "new"])
    check_outputs([tmp_path / "new", None, tmp_path / "other"], [given, None])
    check_outputs([Path("/dev/null"), Path("/dev/null")])


@pytest.mark.parametrize(
    ("name", "words"), [("", "Is a directory"), ("none/x", "No such file"), ("file/x", "Not a directory")]
)
def test_what_cannot_be_written_is_known_before(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=rf"cannot be written \({words}.*choose another"):
        check_outputs([tmp_path / name])
    with pytest.raises(OutputError, match=rf"cannot be written \({words}.*choose another"), replacing(tmp_path / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("of the block's own")])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, error: Exception) -> None:
    """I2"""
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(RuntimeError, match=r"No space left|the block's own"), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_with_its_permissions_and_a_link_stays(tmp_path: Path) -> None:
    """I2"""
    path, link = tmp_path / "out", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o640
    with replacing(path, 0o600) as temporary:
        temporary.write_text("private")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_pipe_is_written_to_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with replacing(path) as temporary:
        temporary.write_text("told")
    assert os.read(reader, 100) == b"told" and path.is_fifo()
    os.close(reader)
    with (
        pytest.raises(OutputError, match=r"/dev/full: cannot be written \(No space left"),
        replacing(Path("/dev/full")) as temporary,
    ):
        temporary.write_text("told")
