"""Write the net, or compare with it to the last digit:  python -m tests.net.cast [--compare] [NAME …]"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.net.measured import HERE, STORIES, SUBJECTS, differences, plain

SEEDS = (0, 1)
SURFACES = ("bridge", "hooked")


def kept(name: str, surface: str, seed: int) -> Path:
    return HERE / "kept" / f"{name}-{surface}-{seed}.json.gz"


def read(path: Path) -> Any:
    return json.loads(gzip.decompress(path.read_bytes()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SUBJECTS))
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--surfaces", nargs="+", default=SURFACES)
    chosen, failed = parser.parse_args(), 0
    torch.set_num_threads(1)
    for name in chosen.names or list(SUBJECTS):
        if name == "stories" and not STORIES.is_dir():
            continue
        for surface in chosen.surfaces:
            for seed in chosen.seeds:
                torch.manual_seed(0)
                start, path = time.monotonic(), kept(name, surface, seed)
                found = plain(SUBJECTS[name](surface, seed))
                if chosen.compare:
                    changed = differences(read(path), found, rtol=0, atol=0)
                    failed += len(changed)
                    print(name, surface, seed, f"{time.monotonic() - start:.0f} s", len(changed), "differences")
                    print("\n".join(changed[:40]), flush=True)
                else:
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(gzip.compress(json.dumps(found, indent=0).encode(), mtime=0))
                    print(name, surface, seed, f"{time.monotonic() - start:.0f} s", path.stat().st_size, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
