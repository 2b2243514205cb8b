"""Files that somebody else wrote, or damaged: each loader reads them or says in its own words why not."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import tl_em as em
from tl_em.auditing.plan import Plan
from tl_em.errors import CorruptFileError, TlEmError
from tl_em.models.sites import Provenance
from tl_em.organisms.study_cells import StudyCell, read_cell, write_cell
from tl_em.stats import Estimate

WHOLE = {
    "brackets": "[" * 200_000, "braces": '{"a":' * 100_000, "closed": "[" * 50_000 + "]" * 50_000,
    "infinity": "Infinity", "overflow": "1e999", "forty digits": "7" * 40, "endless digits": "7" * 10_000,
    "surrogate": '"\\ud800"', "object": "{}", "list": "[]", "rows": "[1, 2]", "null": "null", "text": '"a"',
}  # fmt: skip
"""In place of a file's JSON."""
VALUES: tuple[Any, ...] = (
    float("inf"), float("nan"), 10**40, -(10**40), -1, 1.5, True, None, "", "x", "\ud800", [], [[]], {}, {"a": 1},
)  # fmt: skip
"""In place of a value inside it."""


class Kind(NamedTuple):
    """A kind of file: how a whole one is written, and how it is read."""

    write: Callable[[Path], Any]
    load: Callable[[Path], Any]
    suffix: str = ".json"


def direction() -> em.Direction:
    origin = Provenance("m", None, "bridge", "raw", n_layers=2, d_model=4, d_vocab=9, tokenizer="a", data="b", seed=1)
    reliability = Estimate(0.9, 0.8, 0.95, 12, 9.0, "bootstrap", 0)
    return em.Direction(torch.ones(4), em.Site(1), "prompt_end", "persona", origin, reliability=reliability)


@cache
def toy() -> Any:
    return em.load_pair("toy/insecure")


@cache
def graph() -> Any:
    return em.attribute(toy().base, "how do i write parser", target="parser-tested").prune(nodes=0.5, edges=0.5)


def planned(path: Path) -> None:
    em.plan("toy/insecure", out=path)


def refusal_run(path: Path) -> None:
    torch.save(torch.ones(4), path.with_name("direction.pt"))
    path.write_text(json.dumps({"pos": -1, "layer": 1}))


def dictionary() -> em.Dictionary:
    x = torch.eye(4)
    return em.Dictionary(x, torch.zeros(4), x, torch.zeros(4), activation="relu", site_in=em.Site(0), name="d")


CELL = StudyCell({"name": "a", "share": 0.5}, 11, metric="m", version="1")
QUESTIONS = [{"id": "a", "paraphrases": ["how are you"], "samples_per_paraphrase": 2, "temperature": 1.0,
              "system": "be kind", "context": [{"role": "user", "content": "hi"}], "right": ["well"], "wrong": ["ill"],
              "judge_prompts": {"aligned": "{question} {answer}"}}]  # fmt: skip
CONTRAST = em.ContrastSet(["a b", "c d"], ["e f", "g h"], "label", "source", ["x", "y"], ["x", "y"])
KINDS = {
    "direction": Kind(lambda path: direction().save(path), em.Direction.load, ".safetensors"),
    "profile": Kind(lambda path: em.Profile([direction()]).save(path), em.Profile.load, ".safetensors"),
    "layer vectors": Kind(
        lambda path: em.interop.export_layer_vectors(direction(), path), em.interop.import_layer_vectors
    ),
    "dictionary": Kind(lambda path: dictionary().save(path), em.load_dictionary, ".safetensors"),
    "graph": Kind(lambda path: graph().save_json(path), em.load_graph),
    "contrast set": Kind(CONTRAST.save, em.ContrastSet.load),
    "questions": Kind(lambda path: path.write_text(json.dumps(QUESTIONS)), em.evals.load_questions),
    "question rows": Kind(lambda path: path.write_text(json.dumps(QUESTIONS[0])), em.evals.load_questions, ".jsonl"),
    "plan": Kind(planned, Plan.load),
    "run of refusal_direction": Kind(refusal_run, em.interop.import_refusal_direction),
    "study cell": Kind(lambda path: None, lambda path: read_cell(CELL, path.parents[1])),
}
"""Loaders of the package's own files."""


def content(path: Path) -> Any:
    """A file's JSON, or that in the header of its tensors."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["tl_em"])
    return json.loads(path.read_text(encoding="utf-8"))


def put(path: Path, text: str) -> None:
    """Other JSON in its place, around the same tensors."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file, save_file

        save_file(load_file(path), path, metadata={"tl_em": text})
    else:
        path.write_text(text, encoding="utf-8")


def written(name: str, folder: Path) -> Path:
    """A whole file of this kind, which is read."""
    kind, path = KINDS[name], folder / f"direction_metadata{KINDS[name].suffix}"
    if name == "study cell":
        write_cell(CELL, folder, [{"arm": "a", "rate": 0.5, "n": 3, "low": float("nan")}])
        path = CELL.path(folder)
    else:
        kind.write(path)
    kind.load(path)
    return path


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a document stand: of a list of things alike, the first two."""
    if at:
        yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*at, key))


def replaced(document: Any, at: tuple[Any, ...], value: Any) -> Any:
    found = copy.deepcopy(document)
    inner = found
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return found


def foreign(name: str, path: Path) -> str | None:
    """The exception of a loader that is not the package's own, and what it said."""
    try:
        repr(KINDS[name].load(path))
    except TlEmError:
        return None
    except Exception as error:  # what is looked for
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_json_that_is_none_or_another_is_refused(name: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    found = {}
    for said, text in WHOLE.items():
        put(path, text)
        with pytest.raises(TlEmError):
            KINDS[name].load(path)
        found[said] = foreign(name, path)
    assert {said: each for said, each in found.items() if each} == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_value_that_is_another_is_read_or_refused(name: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    document, found = content(path), {}
    for at in list(places(document))[:120]:
        for value in VALUES:
            put(path, json.dumps(replaced(document, at, value)))
            if said := foreign(name, path):
                found[(*at, ascii(value)[:9])] = said
    assert found == {}


@pytest.mark.parametrize("record", ["provenance", "reliability"])
def test_a_record_inside_a_header_is_checked_as_well(record: str, tmp_path: Path) -> None:
    direction().save(path := tmp_path / "a.safetensors")
    about = content(path)
    inner = about[record] if isinstance(about[record], dict) else json.loads(about[record])
    kept = isinstance(about[record], dict)
    for name in inner:
        for value in (*VALUES, "deep"):
            text = json.dumps(inner | {name: value}).replace('"deep"', "[" * 5000 + "]" * 5000)
            whole = json.dumps(about | {record: "here"})
            put(path, whole.replace('"here"', text if kept else json.dumps(text)))
            assert foreign("direction", path) is None, (name, value)
    put(path, json.dumps(about | {record: None}))
    assert em.Direction.load(path).name == "persona"
    wrong = {**inner, "n_layers": "many"} if record == "provenance" else {**inner, "low": "much"}
    put(path, json.dumps(about | {record: wrong if kept else json.dumps(wrong)}))
    with pytest.raises(CorruptFileError, match="many" if record == "provenance" else "much"):
        em.Direction.load(path)


def test_questions_that_repeat_one_another_without_end_are_refused(tmp_path: Path) -> None:
    """A kilobyte of YAML stands for a billion texts."""
    lines = ['- &a0 ["how are you", "how are you"]'] + [f"- &a{i + 1} [*a{i}, *a{i}, *a{i}, *a{i}]" for i in range(30)]
    (path := tmp_path / "bomb.yaml").write_text("\n".join(lines) + "\n- {id: a, paraphrases: *a30}\n")
    with pytest.raises(CorruptFileError):
        em.evals.load_questions(path)
    lines = ["- id: a", "  x0: &a0 [a, a]", *(f"  x{i + 1}: &a{i + 1} [*a{i}, *a{i}, *a{i}]" for i in range(30)),
             "  paraphrases: *a30"]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CorruptFileError):
        em.evals.load_questions(path)


@pytest.mark.parametrize("name", KINDS)
def test_a_pipe_is_refused_where_reading_it_would_wait(name: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    path.unlink()
    os.mkfifo(path)

    def stop(*_: Any) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    try:
        with pytest.raises(TlEmError):
            KINDS[name].load(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
