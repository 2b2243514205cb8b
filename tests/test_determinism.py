"""One seed, one report: in another process and folder to the last byte but for the time; with two threads, or on the
other surface, with the same words and figures within a tolerance.

Sums of float32 in another order differ by their rounding, about 1e-7 of what is summed; a figure that is a difference
of such sums, in own gaps or log-odds, by up to some 1e-5.  So figures may differ by 1e-4 of themselves or by 1e-5.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_em as em
from tests.conftest import SURFACES
from tests.net.measured import differences

ROOT = Path(__file__).parents[1]
ELSEWHERE = """
from tests.test_determinism import audited
audited("bridge", "one", threads=1)
audited("bridge", "two", threads=2)
"""


def audited(surface: str, out: str | Path, *, threads: int = 1) -> dict[str, Any]:
    """What a small audit writes, which measures, resamples and draws random directions; without the time of day."""
    torch.set_num_threads(threads)
    pair = em.load_pair("toy/insecure", surface=surface)  # pyright: ignore[reportArgumentType]
    whole = (pair.contrasts or {})["persona"]
    few = {"persona": em.ContrastSet(whole.positive[:16], whole.negative[:16])}
    em.audit(pair, contrasts=few, questions=["level", "use"], controls=99, seed=3, out=out)
    return written(Path(out))


def written(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert found["provenance"].pop("made").startswith("20")
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return audited("bridge", tmp_path_factory.mktemp("here"))


@pytest.mark.starts("Python, elsewhere")
def test_another_process_writes_the_same_report_and_two_threads_the_same_words(
    report: dict[str, Any], tmp_path: Path
) -> None:
    passive = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}  # threads that wait leave the processors to others
    known = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345"} | passive
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, env=known, check=True)
    assert written(tmp_path / "one") == report
    assert differences(report, written(tmp_path / "two")) == []
    assert {row["question"]: row["verdict"] for row in report["verdicts"]} == {"level": "exaggerated", "use": "causal"}


@pytest.mark.skipif(len(SURFACES) < 2, reason="this TransformerLens has one surface")
def test_both_surfaces_give_the_same_words_and_figures(report: dict[str, Any], tmp_path: Path) -> None:
    hooked = audited("hooked", tmp_path)
    assert [each.pop("surface") for each in hooked["provenance"]["models"].values()] == ["hooked", "hooked"]
    changed = differences(report, hooked)
    assert changed == [f"/provenance/models/{each}/surface: gone" for each in ("base", "tuned")]
