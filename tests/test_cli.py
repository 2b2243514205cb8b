"""The command line: it parses, calls and prints; errors are one line and leave nothing behind."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

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
