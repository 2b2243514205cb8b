"""Environments of other tools, which want other versions than this package: made where they are not there yet.

``older`` holds what wants transformers 4, in versions that go together; ``newer`` what wants transformers 5; ``lens4``
this package beside TransformerLens 4.3.  All have the torch of the process that makes them.  ``peers.py`` and
``tests/coming_from.py`` run code in them.
"""

from __future__ import annotations

import subprocess
import venv
from collections.abc import Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS: Mapping[str, tuple[str, ...]] = {
    "older": (
        "transformers==4.57.3", "transformer-lens==3.2.1", "numpy==1.26.4", "pyarrow==21.0.0",
        "steering-vectors==0.12.2", "repeng==0.4.0", "circuit-tracer==0.5.0",
    ),
    "newer": ("saklas==5.3.0", "steerkit==0.3.0", "hidden-directions==0.1.6"),
    "lens4": ("-c", str(ROOT / "constraints.txt"), "transformer-lens==4.3.0", "-e", str(ROOT)),
}  # fmt: skip


def make_environment(folder: Path, name: str) -> Path:
    """The interpreter of one of them in a folder of its name, made if it is not there.

    Raises:
        CalledProcessError: its packages cannot be installed.
    """
    place = folder.resolve() / name
    python, made = place / "bin" / "python", place / "packages"
    packages = [f"torch=={torch.__version__.partition('+')[0]}", *ENVIRONMENTS[name]]
    if not made.exists() or made.read_text(encoding="utf-8").splitlines() != packages:
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        made.write_text("\n".join(packages), encoding="utf-8")
    return python
