"""Ctrl-C, and the SIGTERM of batch systems and containers: a command keeps what is finished and leaves nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pandas as pd
import pytest
from click.testing import CliRunner

from tl_em.cli import main

QUESTIONS = """
- {id: fever, samples_per_paraphrase: 20000, temperature: 1.0, paraphrases: [tell me to plan this fever]}
"""


def ended(words: list[str], by: signal.Signals, *, begun: Callable[[int], bool]) -> subprocess.CompletedProcess[str]:
    """The command in a process group of its own, which gets the signal once it has begun; nobody of the group stays."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tl_em.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=_hears_ctrl_c,
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not begun(process.pid) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(by)
        out, said = process.communicate(timeout=60)
        while alive(process.pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert not alive(process.pid), "its workers stayed"
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return subprocess.CompletedProcess(words, process.returncode, out, said)


def _hears_ctrl_c() -> None:
    """A shell has what it runs in the background ignore SIGINT, and so does whatever that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.starts("the command, to end it")
@pytest.mark.parametrize(("by", "code", "word"), [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Term")])
def test_a_command_that_is_ended_keeps_its_answers(by: signal.Signals, code: int, word: str, tmp_path: Path) -> None:
    (tmp_path / "set.yaml").write_text(QUESTIONS, encoding="utf-8")
    parts = tmp_path / "out" / "parts"
    asked = ["evaluate", "toy/insecure", str(tmp_path / "set.yaml"), "--judge", "phrases:leaky"]
    words = [*asked, "--max-new-tokens", "9", "--out", str(tmp_path / "out")]
    found = ended(words, by, begun=lambda _: any(parts.glob("0*.parquet")))
    assert found.returncode == code and word in found.stderr and "Traceback" not in found.stderr, found.stderr
    kept = sorted(parts.iterdir())
    assert kept and all(len(pd.read_parquet(each)) for each in kept)
    assert not [each for each in tmp_path.rglob(".*") if each.is_file()]


@pytest.mark.starts("the command and its workers, to end them")
def test_workers_end_with_the_command(tmp_path: Path) -> None:
    def begun(pid: int) -> bool:
        return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) >= 4  # two workers, two trackers

    words = ["calibrate", "toy/insecure", "--workers", "2", "--draws", "4000", "--out", str(tmp_path / "c.json")]
    found = ended(words, signal.SIGTERM, begun=begun)
    assert found.returncode == 143 and "Traceback" not in found.stderr, found.stderr
    assert not any(tmp_path.iterdir())


def test_a_program_s_own_handling_of_sigterm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    during = []

    def listed() -> None:
        during.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setitem(main.commands, "listed", click.Command("listed", callback=listed))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        CliRunner().invoke(main, ["listed"])
        assert signal.getsignal(signal.SIGTERM) is during[0] is signal.default_int_handler
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        CliRunner().invoke(main, ["listed"])
        assert callable(during[1]) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
