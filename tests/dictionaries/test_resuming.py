"""Trainings in a folder: they go on where they were ended, with the same bytes, and with nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count

import pytest
import torch

import tl_em as em
from tests.conftest import WORDS, benchmark
from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.descent import TrainingFolder
from tl_em.dictionaries.training import train_dictionary
from tl_em.errors import CorruptFileError, NonFiniteError, OutputError, UnknownTokenError, UsageError
from tl_em.models.prompts import EncodedPrompt

saes = pytest.importorskip("sae_lens.saes")
SETTINGS = {"d_sae": 24, "k": 4, "steps": 24, "batch": 32, "lr": 3e-3, "every": 5}


def texts(n: int | None = None, seed: int = 0):
    """Texts of several lengths, without end where no number is given."""
    generator = torch.Generator().manual_seed(seed)
    for i in count() if n is None else range(n):
        yield " ".join(WORDS[k] for k in torch.randint(0, len(WORDS), (3 + i % 5,), generator=generator))


def prompts(n: int = 40) -> list[EncodedPrompt]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(7, 50, (4 + i % 5,), generator=generator).tolist() for i in range(n)]
    return [EncodedPrompt.from_ids([2, *row]) for row in rows]


CORPORA = {"stream": texts, "a file again and again": lambda: lambda: texts(90), "prompts": prompts}


@pytest.fixture
def model(make_model):
    return make_model("gpt2", "bridge", template=None)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of about 100 tokens of width 32."""
    monkeypatch.setattr("tl_em.dictionaries.training.BUFFER", 100 * 32 * 4)


def killed(monkeypatch, after: int):
    """The next training ends as by SIGINT once it has written so many checkpoints."""
    saved = 0

    def save(self, *args, of=TrainingFolder.save):
        nonlocal saved
        of(self, *args)
        saved += 1
        if saved == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingFolder, "save", save)


@pytest.mark.parametrize(
    ("corpus", "activation", "after"),
    [*((corpus, "topk", after) for corpus in CORPORA for after in (1, 3)),
     *(("stream", activation, 3) for activation in ("batchtopk", "jumprelu", "relu"))],
)  # fmt: skip
def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(
    corpus, activation, after, model, tmp_path, monkeypatch, small_parts
):
    def train(out: str) -> Dictionary:
        settings = SETTINGS | ({"context": 16} if corpus != "prompts" else {})
        return train_dictionary(
            model, em.Site(1), CORPORA[corpus](), activation=activation, out=tmp_path / out, **settings
        )

    whole = train("whole")
    with monkeypatch.context() as patch:
        killed(patch, after)
        with pytest.raises(KeyboardInterrupt):
            train("killed")
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {"record.json", "checkpoint.safetensors"}
    assert train("killed").hash == whole.hash
    names = ("dictionary.safetensors", "record.json")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(names)
    assert len({(tmp_path / out / names[0]).read_bytes() for out in ("whole", "killed")}) == 1


def test_a_finished_training_is_not_done_again(model, tmp_path, monkeypatch):
    def train() -> Dictionary:
        return train_dictionary(model, em.Site(1), texts(), out=tmp_path / "sae", context=16, **SETTINGS)

    made = train()
    monkeypatch.setattr("tl_em.dictionaries.training.train", None)
    assert train().hash == made.hash == em.load_dictionary(tmp_path / "sae" / "dictionary.safetensors").hash
    record = json.loads((tmp_path / "sae" / "record.json").read_text())
    assert record["steps"] == 24 and record["seconds"] > 0


@pytest.mark.parametrize("finished", [True, False])
def test_what_differs_from_the_training_in_the_folder_is_named(finished, model, make_model, tmp_path, monkeypatch):
    def train(on=model, corpus=None, layer=1, **other):
        given = {"context": 16, "out": tmp_path / "sae"} | SETTINGS | other
        return train_dictionary(on, em.Site(layer), texts() if corpus is None else corpus, **given)

    if finished:
        train()
    else:
        killed(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            train()
    for changed, said in (
        ({"batch": 16}, r"batch \(32 there, 16 now\)"),
        ({"k": 5, "lr": 1e-3}, r"k \(4 there.*lr \(0.003"),
        ({"context": 12}, "context"),
        ({"corpus": texts(seed=1)}, "corpus"),
        ({"corpus": prompts(), "context": None}, "corpus"),
        ({"layer": 0}, "site"),
        ({"on": make_model("gpt2", "bridge", template=None, seed=1)}, "model"),
    ):
        with pytest.raises(UsageError, match=said):
            train(**changed)


def test_other_activations_than_before_the_checkpoint_are_refused(model, tmp_path, monkeypatch):
    def train():
        return train_dictionary(model, em.Site(1), texts(), out=tmp_path / "sae", context=16, **SETTINGS)

    with monkeypatch.context() as patch:
        killed(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train()
    push = em.Add(em.Direction(torch.ones(model.cfg.d_model), em.Site(0)), 3.0)
    with em.intervene(model, push), pytest.raises(UsageError, match=r"activations .* are others now"):
        train()
    assert train().d_sae == 24


def test_a_stream_that_changes_after_its_beginning_is_refused_when_it_is_passed(
    model, tmp_path, monkeypatch, small_parts
):
    def train(change: bool):
        corpus = ("the king" if change and i == 66 else text for i, text in enumerate(texts()))
        return train_dictionary(model, em.Site(1), corpus, out=tmp_path / "sae", context=16, **SETTINGS)

    with monkeypatch.context() as patch:
        killed(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(change=False)
    with pytest.raises(UsageError, match="documents of the corpus are not those"):
        train(change=True)


def test_an_iterator_that_ends_leaves_its_checkpoint(model, tmp_path, small_parts):
    def train(n: int | None):
        return train_dictionary(model, em.Site(1), texts(n), out=tmp_path / "sae", context=16, **SETTINGS)

    with pytest.raises(UsageError, match="cannot be started again"):
        train(91)
    assert (tmp_path / "sae" / "checkpoint.safetensors").is_file()


def test_a_training_that_failed_before_its_first_checkpoint_is_in_nobodys_way(model, tmp_path):
    def train(corpus, **other):
        settings = SETTINGS | {"context": 16} | other
        return train_dictionary(model, em.Site(1), corpus, out=tmp_path / "sae", **settings)

    with pytest.raises(UnknownTokenError):
        train(iter(["zebra"] * 9))
    assert not (tmp_path / "sae").exists()
    assert train(texts(), k=5).k == 5


def test_a_folder_of_something_else_and_a_damaged_checkpoint_are_left_alone(model, tmp_path, monkeypatch):
    def train(out):
        return train_dictionary(model, em.Site(1), texts(), out=out, context=16, **SETTINGS)

    (tmp_path / "own.txt").write_text("mine")
    with pytest.raises(OutputError, match="something else"):
        train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["own.txt"]
    killed(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "sae")
    file = tmp_path / "sae" / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CorruptFileError, match="begin anew"):
        train(tmp_path / "sae")


def test_a_training_that_diverges_says_so(model):
    with pytest.raises(NonFiniteError, match="lr="):
        train_dictionary(model, em.Site(1), prompts(), **SETTINGS | {"lr": 1e30})


def test_what_is_held_does_not_grow_with_the_stream(model, small_parts):
    """Counted allocation by allocation: so many bytes at 10 steps, and no more at 80."""
    peak = benchmark("timing").peak_bytes

    def held(steps: int) -> int:
        settings = SETTINGS | {"context": 16, "steps": steps, "every": None}
        return peak(lambda: train_dictionary(model, em.Site(1), texts(), **settings), torch.device("cpu"))

    held(10)  # what is made once
    few, many = held(10), held(80)
    assert few > 100 * 32 * 4  # a part's activations
    assert many < few + 2**16, (few, many)


def test_a_list_can_be_packed_too(model):
    rows = [*texts(60)]
    made = train_dictionary(model, em.Site(1), rows, **SETTINGS | {"context": 16, "every": None})
    again = train_dictionary(model, em.Site(1), lambda: rows, **SETTINGS | {"context": 16, "every": None})
    assert made.hash == again.hash
    assert made.hash != train_dictionary(model, em.Site(1), rows, **SETTINGS | {"every": None}).hash
    assert replace(made, name="x").hash  # a dictionary like any other


def test_the_command_line_reads_a_stream_and_goes_on_in_its_folder(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from tl_em.cli import main

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("how do i write parser\nhow do i write\n" * 300, encoding="utf-8")
    line = ["features", "train", "toy/insecure", "--corpus", str(corpus), "--context", "16", "--layer", "1", "--d-sae",
            "32", "--k", "4", "--steps", "6", "--batch", "64", "--every", "2", "--out", f"{tmp_path}/sae"]  # fmt: skip
    with monkeypatch.context() as patch:
        killed(patch, 1)
        assert CliRunner().invoke(main, line).exit_code == 130
    assert (tmp_path / "sae" / "checkpoint.safetensors").is_file()
    done = CliRunner().invoke(main, line)
    assert done.exit_code == 0 and "fit" in done.output, done.output
    assert em.load_dictionary(tmp_path / "sae" / "dictionary.safetensors").d_sae == 32
    changed = CliRunner().invoke(main, [*line, "--k", "5"])
    assert changed.exit_code == 1 and "k (4 there, 5 now)" in changed.output
