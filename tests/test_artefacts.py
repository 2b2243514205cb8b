"""Artefacts appear whole or not at all."""

from __future__ import annotations

import dis
import gc
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType

import pytest
import torch

from tl_em import artefacts
from tl_em.artefacts import check_writable, replacing, replacing_folder, save_tensors
from tl_em.errors import CorruptFileError, OutputError


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    with replacing(target) as temporary:
        temporary.write_text("first")
    with pytest.raises(RuntimeError, match="half way"), replacing(target) as temporary:
        temporary.write_text("second, half")
        raise RuntimeError("half way")
    assert target.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("writing", [replacing, replacing_folder])
def test_what_is_found_wrong_while_something_is_written_is_said_as_it_is(
    writing: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path
) -> None:
    with pytest.raises(CorruptFileError, match=r"^a\.jsonl, line 3"), writing(tmp_path / "made"):
        raise CorruptFileError("a.jsonl, line 3: no JSON")
    with pytest.raises(OutputError, match=r"cannot write .*made.*No space left"), writing(tmp_path / "made"):
        raise OSError(28, "No space left on device")
    assert not any(tmp_path.iterdir())


class _CtrlC:
    """KeyboardInterrupt at the n-th instruction of artefacts.py, as a signal may fall on any."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, _: object) -> _CtrlC | None:
        if frame.f_code.co_filename != artefacts.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] != dis.opmap["NOP"]:  # where no signal is seen
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def _a_file(folder: Path) -> None:
    with replacing(folder / "made") as temporary:
        temporary.write_text("new")


def _a_folder(folder: Path) -> None:
    with replacing_folder(folder / "made", overwrite=True, holds="part") as made:
        (made / "part").write_text("new")


def _tensors(folder: Path) -> None:
    save_tensors(folder / "made", {"x": torch.ones(3)}, {"schema": "tl_em/test/1"})


@pytest.mark.parametrize("write", [_a_file, _a_folder, _tensors])
def test_ctrl_c_at_any_instruction_leaves_the_old_or_the_new_and_nothing_else(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path)
    (made,) = tmp_path.iterdir()
    new = tmp_path.parent / f"{tmp_path.name}-new"
    made.rename(new)
    held = (new / "part" if new.is_dir() else new).read_bytes()
    told, tracing, ended = [], sys.gettrace(), False
    while not ended:
        path = shutil.copytree(new, made) / "part" if new.is_dir() else Path(shutil.copy(new, made))
        path.write_bytes(b"old")
        artefacts._SWEPT.clear()
        sys.settrace(_CtrlC(len(told) + 1))
        try:
            write(tmp_path)
            ended = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracing)
        gc.collect()
        told.append(path.read_bytes())
        assert told[-1] in (b"old", held) and list(tmp_path.iterdir()) == [made], (len(told), list(tmp_path.iterdir()))
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    assert len(told) > 100 and told[0] == b"old" and told[-1] == told[-2] == held
    assert told.index(held) == told.count(b"old"), "it came, and went again"


def test_a_path_that_cannot_be_written_is_one_typed_error(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    for call in (
        lambda: check_writable(blocker / "report.html"),
        lambda: replacing(blocker / "report.html").__enter__(),
    ):
        with pytest.raises(OutputError, match="cannot write"):
            call()
    with pytest.raises(OutputError, match="is a directory"):
        check_writable(tmp_path)
    check_writable(tmp_path / "new" / "report.html")
    assert not (tmp_path / "new").exists()


def test_files_have_the_mode_of_new_files_whoever_wrote_them(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(3)}, {"schema": "tl_em/test/1"})
        with replacing(tmp_path / "b.txt") as temporary:
            temporary.write_text("b")
    finally:
        assert os.umask(old) == 0o027, "the mask of the process was changed"
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_a_link_stays_and_what_it_points_at_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    link = tmp_path / "latest.txt"
    link.symlink_to(tmp_path / "kept" / "real.txt")
    for text in ("one", "two"):
        with replacing(link) as temporary:
            assert temporary.parent == tmp_path / "kept"
            temporary.write_text(text)
        assert link.is_symlink() and (tmp_path / "kept" / "real.txt").read_text() == text


@pytest.mark.starts("a process to kill")
def test_what_a_killed_process_left_goes_and_what_a_living_one_makes_stays(tmp_path: Path) -> None:
    write = "import sys, time; from pathlib import Path; from tl_em.artefacts import replacing\n"
    write += f"with replacing(Path({str(tmp_path)!r}) / 'page.html') as t: t.write_text('half'); "
    write += "print('made', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", write], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"made\n"
        (left,) = tmp_path.iterdir()
        artefacts._SWEPT.clear()
        with replacing(tmp_path / "other.txt"):
            assert left.exists(), "somebody is writing it"
        process.kill()
    of_another_machine = tmp_path / left.name.replace(artefacts._NODE, "0" * 8)
    of_another_machine.write_text("half")
    artefacts._SWEPT.clear()
    with replacing(tmp_path / "page.html") as temporary:
        temporary.write_text("whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([of_another_machine.name, "other.txt", "page.html"])


FOLDER = """
import os, signal, sys
from pathlib import Path
from tl_em.artefacts import replacing_folder
renames = []
real = Path.replace
def rename(self, target):
    renames.append(real(self, target))
    if len(renames) == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
Path.replace = rename
with replacing_folder({target!r}, overwrite=True) as folder:
    (folder / "config.json").write_text("new")
    if not {after}:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.starts("a process to kill")
@pytest.mark.parametrize(("after", "holds"), [(0, "old"), (1, "new"), (2, "new")])
def test_a_folder_whose_writer_was_killed_is_the_old_one_or_the_new_one(tmp_path: Path, after: int, holds: str) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    killed = subprocess.run([sys.executable, "-c", FOLDER.format(after=after, target=str(target))], check=False)
    assert killed.returncode == -9 and len(list(tmp_path.iterdir())) == 2 - (after == 1)
    artefacts._SWEPT.clear()
    with replacing(tmp_path / "other.txt"):
        pass
    assert (target / "config.json").read_text() == holds
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model", "other.txt"]


def test_a_full_disk_is_one_typed_error(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    save_tensors(target, {"x": torch.zeros(3)}, {"schema": "tl_em/test/1"})
    before = target.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            save_tensors(target, {"x": torch.zeros(100_000)}, {"schema": "tl_em/test/1"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]
