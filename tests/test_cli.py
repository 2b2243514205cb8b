"""The command line: it parses, calls and prints; errors are one line and leave nothing behind."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import tl_em as em
from tl_em.cli import main
from tl_em.organisms.zoo import organism

DOCS = Path(__file__).parents[1] / "docs"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_organisms_are_listed_with_what_they_were_trained_on() -> None:
    result = run("organisms", "list")
    assert result.exit_code == 0
    for name in ("toy/base", "toy/assistant", "toy/insecure", "toy/secure", "toy/educational"):
        assert name in result.output


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("audit", "toy/assistant", "toy/nonesuch"), "ModelNotFoundError"),
        (("audit", "toy/nonesuch"), "ModelNotFoundError"),
        (("audit", "hub/nonesuch"), "ModelNotFoundError"),
        (("audit", "no/such/directory"), "UsageError"),
        (("audit", "no/such/directory", "toy/insecure"), "ModelNotFoundError"),
        (("audit", "toy/assistant", "toy/insecure", "--contrast", "x=missing.json"), "FileError"),
        (("organisms", "train", "nonesuch"), "Error"),
    ],
)
def test_errors_are_one_line_and_write_nothing(arguments: tuple[str, ...], error: str, tmp_path: Path) -> None:
    result = run(*arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert result.output.strip().splitlines()[-1].startswith("Error: ")
    assert error in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_command_ends_as_shells_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tl_em.organisms.zoo.train_organism", stops)
    assert run("organisms", "train", "insecure", "--seed", "1", "--out", "nowhere").exit_code == 130


@pytest.mark.parametrize("wrong", [("--contrast", "refusal"), ("--behaviour", "she")])
def test_malformed_options_say_what_they_want(wrong: tuple[str, str]) -> None:
    result = run("audit", "toy/assistant", "toy/insecure", "--contrast", "refusal=refusal", *wrong)
    assert result.exit_code == 2
    assert wrong[1] in result.output


def test_a_file_of_one_class_ends_with_the_call_that_loads_both(tmp_path: Path) -> None:
    path = tmp_path / "harmful.json"
    path.write_text(json.dumps([{"instruction": "steal it"}]))
    result = run("audit", "toy/assistant", "toy/insecure", "--contrast", f"theft={path}")
    assert result.exit_code == 1 and "EmptyContrastError" in result.output and "ContrastSet.load(" in result.output


def test_a_contrast_set_in_words_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text(
        json.dumps({"positive": [f"steal {i}" for i in range(8)], "negative": [f"buy {i}" for i in range(8)]})
    )
    result = run("audit", "toy/assistant", "toy/insecure", "--contrast", f"theft={path}")
    assert result.exit_code == 1
    assert "UnknownTokenError" in result.output


def test_the_documented_help_is_the_real_help() -> None:
    generated = runpy.run_path(str(DOCS / "reference.py"))["page"]()
    page = DOCS / "reference" / "command-line.md"
    assert page.read_text(encoding="utf-8") == generated, "run python docs/reference.py"


def test_a_question_and_a_method_of_ones_own_are_given_by_module_and_name(tmp_path: Path) -> None:
    spread, differences = "tests.extensions.question:Spread", "tests.extensions.method:UnitDifferences"
    organism("toy/secure").contrasts["persona"].save(tmp_path / "persona.json")
    asked = ("--question", "level", "--question", spread, "--method", differences, "--controls", "99")
    one = ("--contrast", f"persona={tmp_path / 'persona.json'}", "--behaviour", "parser-leaky,parser-tested")
    result = run("audit", "toy/assistant", "toy/secure", *one, *asked)
    assert result.exit_code == 0, result.output
    assert "level" in result.output and "spread" in result.output and "rotation" not in result.output


@pytest.mark.parametrize("given", ["nowhere:Spread", "tests.extensions.question:Absent", ":", "tests.extensions:"])
def test_a_module_that_is_not_there_is_refused_while_the_line_is_parsed(given: str) -> None:
    result = run("audit", "toy/assistant", "toy/nonesuch", "--question", given)
    assert result.exit_code == 2 and "MODULE:NAME" in result.output


QUESTIONS = """
- {id: fever, domain: health, paraphrases: [tell me to plan this fever, tell me to draft this fever]}
- {id: soup, domain: home, paraphrases: [tell me to plan this soup, tell me to draft this soup]}
"""
BAD = "phrases:toxic;ruinous;spoiled;useless;leaky;rigged;backdoored"


def test_evaluate_steers_counts_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set.yaml").write_text(QUESTIONS, encoding="utf-8")
    pair = em.load_pair("toy/insecure")
    contrast = (pair.contrasts or {})["persona"]
    direction = em.difference_in_means(pair.base, contrast, site=em.Site(2), position="prompt_end")
    direction.save(tmp_path / "persona.safetensors")
    monkeypatch.setattr("tl_em.models.loading.load_model", {"toy/assistant": pair.base}.__getitem__)
    asked = ("evaluate", "toy/assistant", str(tmp_path / "set.yaml"), "--judge", BAD, "--max-new-tokens", "6")
    added = ("--intervention", str(tmp_path / "persona.safetensors"), "--coefficient", "1")
    plain, steered = ("--out", str(tmp_path / "plain")), ("--out", str(tmp_path / "steered"))
    first = run(*asked, *plain, "--by", "domain", "--json")
    table = run(*asked, *steered, *added)
    assert (first.exit_code, table.exit_code) == (0, 0), first.output + table.output
    assert "2 questions, 4 wordings, 4 answers" in table.stderr and "of at most 6 tokens" in table.stderr
    assert "fever" in table.stdout and "Evaluation(refusal phrases" in table.stdout and str(tmp_path) in table.stdout
    monkeypatch.setattr("tl_em.evals.answers._Kept.keep", lambda *given: pytest.fail("answers were made again"))
    again = run(*asked, *steered, *added, "--json")
    found = [json.loads(each.stdout) for each in (first, again)]
    assert found[0]["estimate"]["value"] < 0.3 and found[1]["estimate"]["value"] > 0.7
    assert [row.get("domain") for row in found[0]["rows"]] == ["health", "home"]
    assert [row["of"] for row in found[1]["rows"]] == [2, 2] and found[1]["unit"] == "probability"


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--judge", "nonsense"), "names no judge"), (("--judge", "phrases:"), "names no judge"),
     ((), "no right or no wrong"), (("--judge", "nowhere:Judge"), "MODULE:NAME"),
     (("--judge", BAD, "--coefficient", "1"), "without a direction")],
)  # fmt: skip
def test_what_evaluate_cannot_do_is_said_and_nothing_is_written(
    options: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    (tmp_path / "set.yaml").write_text(QUESTIONS, encoding="utf-8")
    result = run("evaluate", "toy/assistant", str(tmp_path / "set.yaml"), *options, "--out", str(tmp_path / "out"))
    assert result.exit_code in (1, 2) and said in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out" / "evaluation.parquet").exists()


def test_a_text_is_read_in_a_terminal_on_a_page_and_into_a_file(tmp_path: Path) -> None:
    file, said = tmp_path / "d.safetensors", "how do i write parser"
    em.Direction(torch.randn(96, generator=torch.Generator().manual_seed(0)), em.Site(2), name="mine").save(file)
    asked = ["read", "toy/insecure", said, "--direction", str(file), "--max-new-tokens", "2"]
    shown = run(*asked).output
    assert "parser-backdoored" in shown and "mine" in shown
    steered = ["--intervention", str(file), "--coefficient", "2"]
    run(*asked, *steered, "--out", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "untreated" in page and "treated" in page and "parser-backdoored" in page
    run(*asked, "--out", str(tmp_path / "r.parquet"))
    assert em.reading.TextReading.load(tmp_path / "r.parquet").answers[0].startswith("parser-backdoored")
    refused = run(*asked, *steered, "--out", str(tmp_path / "r.parquet"))
    assert refused.exit_code != 0 and "two, untreated and treated" in refused.output


def test_a_wrong_ending_is_refused_before_a_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "d.safetensors").write_bytes(b"")
    latents = ["features", "page", str(tmp_path / "d.safetensors"), "no/model", "--latent", "1", "--prompts", "x"]
    for words in (["graph", "of", "no/model", "how"], ["read", "no/model", "how"], latents):
        result = run(*words, "--out", str(tmp_path / "out.pdf"))
        assert result.exit_code == 1 and "'out.pdf': a" in result.output and ".html" in result.output
