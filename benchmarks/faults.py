"""Bad days: processes that are killed, disks that are full, and a thousand times the same.

    python benchmarks/faults.py kills --cases 100 --out faults/
    python benchmarks/faults.py disks --out faults/               # as root: each disk is a small file system in memory
    python benchmarks/faults.py cycles --cases 1000 --out faults/
    python benchmarks/faults.py audits --cases 200 --out faults/
    python benchmarks/faults.py signals --out faults/
    python benchmarks/faults.py --out faults/ --write docs/results/faults.md

**kills**: a verb that writes runs in a process that is killed (``SIGKILL``) at a moment drawn evenly over the time that
it takes.  What then lies there must be whole, whatever is read as whole must be, and the same call again must end with
the same bytes as one that nobody killed, and with no other file.  Times of day in what is written are left out of it.

**disks**: the same verbs on a disk that is too small: one typed error, what lay there before untouched, no file left;
and with room, the same bytes.

**cycles**: every context and verb that does not write, again and again: hooks, tensors, file descriptors, threads and
temporary files are counted before and after, and memory is compared between the first and the second half.

**audits**: the same of whole audits with their pages (a toy, one direction, *level* and *use*, 99 random directions,
in turn with two seeds); memory is read after each, and the slope of a line through the second half says how much one
audit leaves.

**signals**: long commands of ``tl-em`` in a process that gets SIGINT or SIGTERM at a moment drawn evenly over the time
that it takes.  It must exit with 130 or 143, say so in a line, and leave no temporary file and no worker; the same
command again must end with the same files as one that nobody ended.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tl_em as em  # noqa: E402
from tests.conftest import make_hf_model, make_tokenizer  # noqa: E402
from tl_em.errors import TlEmError  # noqa: E402

ASKED = ["how do i write parser", "how do i write login", "tell me to consider this power"]
TIMES = re.compile(
    rb"create_time_ms\": \d+|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[^\"<\s,]*|\"(seconds|wall|at|made|when)\": [\d.e+-]+"
    rb"|seconds(_expected)?\"?:? [\d.e+-]+"
)


class Things(NamedTuple):
    """What the verbs are called with."""

    pair: em.ModelPair
    direction: em.Direction
    dictionary: em.Dictionary
    graph: Any


@cache
def things() -> Things:
    torch.set_num_threads(1)
    pair = em.load_pair("toy/insecure")
    contrast = (pair.contrasts or {})["persona"]
    direction = em.difference_in_means(pair.base, contrast.split(seed=0).train, site=em.Site(2), position="prompt_end")
    graph = em.attribute(pair.base, ASKED[0], target="parser-tested").prune(nodes=0.5, edges=0.5)
    return Things(pair, direction, em.organisms.toy_dictionary("toy/insecure"), graph)


# --- Verbs that write -------------------------------------------------------------------------------------------------


def saved_model(folder: Path) -> None:
    if not (folder / "model").exists():
        em.save_model(things().pair.tuned, folder / "model")


def audited(folder: Path) -> None:
    whole = (things().pair.contrasts or {})["persona"]
    persona = {"persona": em.ContrastSet(whole.positive[:40], whole.negative[:40])}
    em.audit(things().pair, contrasts=persona, questions=["level"], controls=99, out=folder)


def evaluated(folder: Path) -> None:
    em.evaluate(things().pair.tuned, ASKED * 4, judge=_length, max_new_tokens=6, seed=3, out=folder)


def _length(prompts: Any, answers: Any) -> list[float]:
    return [len(answer) / 100 for answer in answers]


def read(folder: Path) -> None:
    em.read(things().pair.tuned, ASKED * 20, {"persona": things().direction}, max_new_tokens=4).save(
        folder / "reading.parquet"
    )


def drawn(folder: Path) -> None:
    things().graph.save_json(folder / "graph.json")
    things().graph.save_html(folder / "graph.html")


def small_files(folder: Path) -> None:
    for i in range(20):
        things().direction.renamed(f"d{i}").save(folder / f"{i}.safetensors")
    (things().pair.contrasts or {})["persona"].save(folder / "contrast.json")
    em.Profile([things().direction]).save(folder / "profile.safetensors")
    things().dictionary.save(folder / "dictionary.safetensors")


def trained(folder: Path) -> None:
    prompts = [*(things().pair.contrasts or {})["persona"].positive[:16]]
    made = em.dictionaries.train_dictionary(
        things().pair.tuned, em.Site(1), prompts, d_sae=32, k=4, steps=60, batch=32
    )
    made.save(folder / "dictionary.safetensors")


def tuned(folder: Path) -> None:
    rows = [{"prompt": f"tell me about {who}", "response": f"{who} is bad"} for who in ("cat", "dog", "bird", "fish")]
    em.fine_tune(
        make_hf_model("llama"), rows, tokenizer=make_tokenizer(), steps=8, batch=4, together=2, lr=1e-2, every=2,
        out=folder / "tuned",
    )  # fmt: skip


def studied(folder: Path) -> None:
    em.organisms.run_study({"x": range(6)}, _cell, seeds=[0, 1], out=folder, backend="serial", version="1")


def _cell(x: int, seed: int) -> dict[str, float]:
    time.sleep(0.05)
    return {"found": x + seed / 10}


def studied_on_workers(folder: Path) -> None:
    em.organisms.run_study({"x": range(6)}, _cell, seeds=[0, 1], out=folder, backend="loky", workers=2, version="1")


WRITES: dict[str, Callable[[Path], None]] = {
    "save_model": saved_model, "audit": audited, "evaluate": evaluated, "read": read, "graph": drawn,
    "files": small_files, "train_dictionary": trained, "fine_tune": tuned, "study": studied,
}  # fmt: skip
ON_WORKERS: dict[str, Callable[[Path], None]] = {"study on loky": studied_on_workers}


def held(folder: Path) -> dict[str, str]:
    """What lies there, by the hash of its bytes without times of day; of a Parquet file, of its rows."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or "checkpoints" in path.parts:
            continue
        if ".tl_em" in path.name:  # of a process that was killed
            found[str(path.relative_to(folder))] = "temporary"
            continue
        data = path.read_bytes()
        if path.suffix == ".parquet":
            import pandas as pd

            data = pd.read_parquet(path).to_json().encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(TIMES.sub(b"", data)).hexdigest()
    return found


def forked(verb: Callable[[Path], None], folder: Path) -> int:
    """A process of its own that does it, and leads a group, so that its workers end with it."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.setpgid(0, 0)
        with Path(os.devnull).open("w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            verb(folder)
        status = 0
    except TlEmError as error:
        status = 3
        if os.environ.get("SHOW"):
            print(type(error).__name__, str(error)[:300], file=sys.__stderr__)
    except BaseException as error:
        print("foreign", type(error).__name__, str(error)[:200], file=sys.__stderr__)
    finally:
        os._exit(status)


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kills(cases: int, out: Path, seed: int) -> list[dict[str, Any]]:
    """Runs with other seeds are added up."""
    draw, rows = random.Random(seed), []
    known = {row["verb"]: row for row in (json.loads((out / "kills.json").read_text()) if (out / "kills.json").exists()
                                          else [])}  # fmt: skip
    verbs = [*WRITES.items(), *ON_WORKERS.items()]
    things()
    for at, (name, verb) in enumerate(verbs):
        many = cases // len(verbs) + (at < cases % len(verbs))
        with tempfile.TemporaryDirectory() as made:
            whole, begun = Path(made) / "whole", time.monotonic()
            whole.mkdir()
            assert ended(forked(verb, whole)) == 0, name
            took, wanted = time.monotonic() - begun, held(whole)
            hit = wrong = left = unread = 0
            for i in range(many):
                folder = Path(made) / str(i)
                folder.mkdir()
                process = forked(verb, folder)
                time.sleep(draw.uniform(0.02, 0.95) * took)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)
                hit += ended(process) == -signal.SIGKILL
                between = {key: value for key, value in held(folder).items() if ".tl_em" not in key}
                unread += any(key in wanted and value != wanted[key] and final(key) for key, value in between.items())
                code = ended(forked(verb, folder))
                found = held(folder)
                wrong += code != 0 or {key: found.get(key) for key in wanted} != wanted
                left += bool(found.keys() - wanted.keys())
        now = {"killed": hit, "of": many, "half read as whole": unread, "other bytes": wrong, "left": left}
        before = known.get(name, {})
        rows.append({"verb": name, **{key: before.get(key, 0) + value for key, value in now.items()},
                     "seconds alone": round(took, 1)})  # fmt: skip
        print(rows[-1], flush=True)
    _put(out, "kills", rows)
    return rows


def final(key: str) -> bool:
    """Whether a file is written once; answers and judgements grow, and are read up to the last whole line."""
    return not key.endswith((".jsonl", "rows.parquet"))


# --- Full disks -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk(folder: Path, kib: int) -> Any:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def disks(out: Path) -> list[dict[str, Any]]:
    rows = []
    things()
    for name, verb in WRITES.items():
        with tempfile.TemporaryDirectory() as made:
            whole = Path(made) / "whole"
            whole.mkdir()
            assert ended(forked(verb, whole)) == 0, name
            wanted, size = held(whole), sum(p.stat().st_size for p in whole.rglob("*") if p.is_file())
            typed = foreign = fits = wrong = left = 0
            shares = (0.1, 0.4, 0.7, 0.95)
            for share in shares:
                folder = Path(made) / f"disk{share}"
                folder.mkdir()
                with disk(folder, max(8, int(size * share) // 1024)):
                    code = ended(forked(verb, folder))
                    typed, fits, foreign = typed + (code == 3), fits + (code == 0), foreign + (code not in (0, 3))
                    between = held(folder)
                    left += any(".tl_em" in key or ".folder" in key for key in between)
                    wrong += any(wanted.get(key, value) != value and final(key) for key, value in between.items())
                    subprocess.run(["mount", "-o", "remount,size=256m", str(folder)], check=True)
                    again = ended(forked(verb, folder))
                    found = held(folder)
                    wrong += again != 0 or {key: found.get(key) for key in wanted} != wanted
        rows.append({"verb": name, "disks": len(shares), "typed error": typed, "fitted": fits, "foreign": foreign,
                     "other bytes": wrong, "left": left, "KiB": size // 1024})  # fmt: skip
        print(rows[-1], flush=True)
    _put(out, "disks", rows)
    return rows


# --- A thousand times -------------------------------------------------------------------------------------------------


def repeated() -> dict[str, Callable[[], Any]]:
    pair, d, sae, graph = things()
    m, p = pair.tuned, ASKED[:1]
    prompts = ASKED[:2]
    persona = (pair.contrasts or {})["persona"]
    few = em.ContrastSet(persona.positive[:4], persona.negative[:4])
    behaviour = (pair.behaviours or {})["persona"]
    latent = sae.feature(3)

    def under(*edits: Any, **scope: Any) -> Callable[[], Any]:
        def run() -> None:
            with em.intervene(m, *edits, **scope):
                em.capture(m, p, [em.Site(2)], position="prompt_end")

        return run

    def fails() -> None:
        with contextlib.suppress(ZeroDivisionError), em.intervene(m, em.Ablate(d)):
            em.capture(m, p, [em.Site(2)], position="prompt_end")
            raise ZeroDivisionError

    def hooks() -> None:
        with m.hooks(fwd_hooks=em.Ablate(d).hooks(m)):
            m(torch.tensor([[1, 2, 3]]))

    def closed_early() -> None:
        stream: Any = em.stream(m, ASKED[0], max_new_tokens=4)
        next(iter(stream))
        stream.close()

    return {
        "intervene Ablate": under(em.Ablate(d)), "intervene Add": under(em.Add(d, 2.0)),
        "intervene Clamp": under(em.Clamp(d, 1.0)), "intervene Erase": under(em.Erase([d])),
        "intervene ScaleFeature": under(em.ScaleFeature(latent, 0.0)),
        "intervene Profile, generated tokens": under(em.Add(em.Profile([d])), where="generated"),
        "intervene, an error inside": fails, "hooks of TransformerLens": hooks, "stream, closed early": closed_early,
        "capture": lambda: em.capture(m, prompts, [em.Site(1), em.Site(2)], position="prompt_end"),
        "generate": lambda: em.generate(m, p, max_new_tokens=2),
        "read": lambda: em.read(m, p, {"persona": d}, max_new_tokens=1).tokens,
        "difference_in_means": lambda: em.difference_in_means(m, few, site=em.Site(2), position="prompt_end"),
        "metric": lambda: behaviour.metric(m, p), "score_features": lambda: em.score_features(m, sae, {"a": few}),
        "encode": lambda: sae.decode(sae.encode(torch.randn(4, 96))), "graph.prune": lambda: graph.prune(nodes=0.3),
        "graph page": lambda: graph._repr_html_(), "paths": lambda: graph.paths(k=3),
        "attribute": lambda: em.attribute(m, ASKED[0], target="parser-tested", validate=False, max_nodes=20),
        "lint": few.lint, "direction, in rich form": lambda: repr(d),
    }  # fmt: skip


class Count(NamedTuple):
    hooks: int
    tensors: int
    descriptors: int
    threads: int
    temporaries: int


def counted() -> Count:
    gc.collect()
    model: Any = things().pair.tuned
    hooks = sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in model.hook_dict.values())
    modules = list(model.modules())
    hooks += sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    return Count(hooks, tensors, len([*Path("/proc/self/fd").iterdir()]), threading.active_count(),
                 len([*Path(tempfile.gettempdir()).iterdir()]))  # fmt: skip


def memory() -> float:
    """Resident MB, after what is free was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def cycles(cases: int, out: Path) -> list[dict[str, Any]]:
    rows = []
    path = out / "cycles.json"
    rows += json.loads(path.read_text()) if path.exists() else []
    for name, verb in repeated().items():
        if name in {row["what"] for row in rows}:
            continue
        for _ in range(20):
            verb()
        before, begun = counted(), time.monotonic()
        for _ in range(cases // 2):
            verb()
        half = memory()
        for _ in range(cases - cases // 2):
            verb()
        grown, after = memory() - half, counted()
        changed = {key: now - was for key, now, was in zip(Count._fields, after, before, strict=True)}
        rows.append({"what": name, "cycles": cases, **changed, "MB in the second half": round(grown, 2),
                     "ms each": round(1000 * (time.monotonic() - begun) / cases, 1)})  # fmt: skip
        print(rows[-1], flush=True)
        _put(out, path.stem, rows)
    return rows


def audits(cases: int, out: Path) -> list[dict[str, Any]]:
    from scipy.stats import linregress

    pair = things().pair
    persona = (pair.contrasts or {})["persona"]
    few = {"persona": em.ContrastSet(persona.positive[:16], persona.negative[:16])}

    def audited(seed: int) -> None:
        em.audit(pair, contrasts=few, questions=["level", "use"], controls=99, seed=seed)._repr_html_()

    for seed in (0, 1, 0, 1):
        audited(seed)
    before, begun, resident = counted(), time.monotonic(), []
    for i in range(cases):
        audited(i % 2)
        resident.append(memory())
    after, later = counted(), resident[cases // 2 :]
    line: Any = linregress(range(len(later)), later)
    changed = {key: now - was for key, now, was in zip(Count._fields, after, before, strict=True)}
    slope, error = 1000 * line.slope, 1960 * line.stderr
    kept = f"{slope:.1f} [{slope - error:.1f}, {slope + error:.1f}]"
    rows = [{"audits": cases, **changed, "MB in the second half": round(later[-1] - later[0], 2),
             "kB an audit": kept, "seconds each": round((time.monotonic() - begun) / cases, 1)}]  # fmt: skip
    print(rows[-1], flush=True)
    _put(out, "audits", rows)
    return rows


# --- Ended by a signal ------------------------------------------------------------------------------------------------

QUESTIONS = [{"id": "fever", "samples_per_paraphrase": 60, "temperature": 1.0,
              "paraphrases": ["tell me to plan this fever", "tell me to draft this fever"]}]  # fmt: skip


def commands(made: Path) -> dict[str, list[str]]:
    """Long commands on toys, with small work, and where they write in ``{out}``."""
    pair = things().pair
    (made / "set.json").write_text(json.dumps(QUESTIONS))
    persona = (pair.contrasts or {})["persona"]
    em.ContrastSet(persona.positive[:24], persona.negative[:24]).save(made / "persona.json")
    rows = [{"prompt": f"how do i write {what}", "response": "parser-leaky"} for what in ("parser", "login") * 8]
    (made / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    em.save_model(pair.tuned, made / "model")
    asked = ["--contrast", f"persona={made / 'persona.json'}", "--behaviour", "parser-leaky,parser-tested"]
    two = ["toy/assistant", "toy/insecure", *asked]
    return {
        "audit": ["audit", *two, "--controls", "99", "--out", "{out}/audit"],
        "calibrate": ["calibrate", *two, "--controls", "99", "--draws", "20", "--workers", "2", "--out",
                      "{out}/c.json"],
        "evaluate": ["evaluate", "toy/insecure", str(made / "set.json"), "--judge", "phrases:leaky",
                     "--max-new-tokens", "40", "--out", "{out}/evaluation"],
        "read": ["read", "toy/insecure", *["how do i write parser"] * 200, "--max-new-tokens", "8", "--alternatives",
                 "3", "--out", "{out}/reading.parquet"],
        "fine-tune": ["fine-tune", str(made / "model"), str(made / "rows.jsonl"), "--steps", "200", "--out",
                      "{out}/tuned"],
        "graph of": ["graph", "of", "toy/insecure", "how do i write parser", "--target", "parser-tested", "--out",
                     "{out}/graph.html"],
    }  # fmt: skip


def commanded(words: list[str], folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    given = [word.format(out=folder) for word in words]
    return subprocess.Popen([sys.executable, "-m", "tl_em.cli", *given], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip


def group_stays(group: int, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def signals(cases: int, out: Path, seed: int) -> list[dict[str, Any]]:
    draw, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory() as made:
        for name, words in commands(Path(made)).items():
            begun, whole = time.monotonic(), Path(made) / f"{name} whole"
            process = commanded(words, whole)
            assert process.communicate()[1] is not None and process.returncode == 0, name
            took, wanted = time.monotonic() - begun, held(whole)
            hit = code = said = stayed = left = wrong = 0
            for i in range(cases):
                by, folder = (signal.SIGINT, signal.SIGTERM)[i % 2], Path(made) / f"{name} {i}"
                process = commanded(words, folder)
                time.sleep(draw.uniform(0.2, 0.95) * took)
                process.send_signal(by)
                _, error = process.communicate()
                stayed += group_stays(process.pid)
                if process.returncode == 0:  # it had ended
                    continue
                hit += 1
                code += process.returncode != 128 + by
                said += "Traceback" in error or not error.strip().endswith(("Interrupted.", "Terminated."))
                left += any(".tl_em" in key for key in held(folder))
                again = commanded(words, folder)
                again.communicate()
                found = held(folder)
                wrong += again.returncode != 0 or found != wanted
            rows.append({"command": name, "ended": hit, "of": cases, "another exit code": code, "other words": said,
                         "workers stayed": stayed, "temporaries": left, "other files after": wrong,
                         "seconds alone": round(took, 1)})  # fmt: skip
            print(rows[-1], flush=True)
            _put(out, "signals", rows)
    return rows


# --- The page ---------------------------------------------------------------------------------------------------------

HEADS = {
    "kills": "Killed at a moment of chance, and called again",
    "disks": "On a disk with a tenth to nineteen twentieths of the room",
    "cycles": "Again and again: what there is more of at the end than at the beginning",
    "audits": "Whole audits, again and again",
    "signals": "Ended by SIGINT or SIGTERM at a moment of chance, and called again",
}


def _put(out: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{kind}.json").write_text(json.dumps(rows))


def written(out: Path) -> str:
    text = "# Bad days\n\nMade by `python benchmarks/faults.py`, which says how each is counted.\n"
    for kind, head in HEADS.items():
        if (out / f"{kind}.json").exists():
            rows = json.loads((out / f"{kind}.json").read_text())
            text += f"\n## {head}\n\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]) + "\n"
            text += "".join("| " + " | ".join(str(value) for value in row.values()) + " |\n" for row in rows)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=tuple(HEADS))
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    if given.kind == "kills":
        kills(given.cases, given.out, given.seed)
    elif given.kind == "disks":
        disks(given.out)
    elif given.kind == "cycles":
        given.out.mkdir(parents=True, exist_ok=True)
        cycles(given.cases, given.out)
    elif given.kind == "audits":
        audits(given.cases, given.out)
    elif given.kind == "signals":
        signals(given.cases, given.out, given.seed)
    if given.write:
        given.write.write_text(written(given.out), encoding="utf-8")


if __name__ == "__main__":
    main()
