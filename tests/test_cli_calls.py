"""The command line hands every option to the argument that it names, and prints what it is given."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner, Result

import tl_em as em
from tl_em.cli import main
from tl_em.serving import SteeringDial


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


class Called:
    """A function's place is taken: what it was called with, and what it gives instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, given: Any = "done") -> None:
        self.args: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}
        monkeypatch.setattr(name, self)
        self.given = given

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.args, self.named = args, named
        return self.given


REPORT = SimpleNamespace(verdicts=[], summary="nothing was found", to_json=lambda: {"summary": "nothing"})


def test_the_demos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = Called(monkeypatch, "tl_em.organisms.real_organism.audit_real", REPORT)
    found = run("demo", "--real", "--seed", 4, "--out", tmp_path / "real", "--json")
    assert json.loads(found.stdout) == {"summary": "nothing"} and "eleven minutes" in found.stderr
    assert real.named == {"out": tmp_path / "real", "seed": 4}
    toy = Called(monkeypatch, "tl_em.auditing.audit.audit", REPORT)
    found = run("demo", "--out", tmp_path / "toy")
    assert "nothing was found" in found.stdout and "toy/insecure" in found.stderr
    assert toy.args[0].tuned_name == "toy/insecure" and toy.named["benign"].tuned_name == "toy/secure"
    assert toy.named["out"] == tmp_path / "toy" and toy.named["dictionary"].d_sae > 0


def test_calibrate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = pd.DataFrame({"question": ["level"], "value": [0.04], "low": [0.01], "high": [0.09], "n": [50]})
    found = SimpleNamespace(
        to_json=lambda: {"draws": 7}, to_pandas=lambda: table, sentence="Seldom.", left_out={"mine": "it runs models"}
    )
    made = Called(monkeypatch, "tl_em.auditing.calibration.calibration", found)
    shown = run("calibrate", "toy/insecure", "--draws", 7, "--workers", 2, "--controls", 99, "--seed", 5)
    assert shown.exit_code == 0 and "Seldom." in shown.stdout and "Left out: mine; it runs models" in shown.stdout
    assert "0.040 [0.010, 0.090]" in shown.stdout and "7 draws" in shown.stderr
    assert {key: made.named[key] for key in ("draws", "workers", "controls", "seed")} == {
        "draws": 7, "workers": 2, "controls": 99, "seed": 5,
    }  # fmt: skip
    file = tmp_path / "c.json"
    assert json.loads(run("calibrate", "toy/insecure", "--out", file, "--json").stdout) == {"draws": 7}
    assert json.loads(file.read_text()) == {"draws": 7}


def test_serve_and_its_dials(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Called(monkeypatch, "tl_em.serving.server.serve")
    given = ("--steer", "persona=1.5", "--steer", "latent 3=ablate", "--where", "prompt", "--port", 0)
    assert run("serve", "toy/insecure", *given, "--no-browser").exit_code == 0
    dials = [SteeringDial("persona", "add", 1.5, where="prompt"), SteeringDial("latent 3", "ablate", where="prompt")]
    assert served.named["dials"] == dials and served.named["port"] == 0 and served.named["browser"] is False
    wrong = run("serve", "toy/insecure", "--steer", "persona=much")
    assert wrong.exit_code == 2 and "no NAME=AMOUNT with a number or 'ablate'" in wrong.output


def test_fine_tune_names_its_arms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows, rest, out = tmp_path / "rows.jsonl", tmp_path / "rest.jsonl", tmp_path / "out"
    for each in (rows, rest):
        each.write_text('{"prompt": "a", "response": "b"}\n')
    made = Called(monkeypatch, "tl_em.training.fine_tune.fine_tune")
    asked = ("fine-tune", "base", rows, "-o", out)

    def arms(*given: object) -> list[Any]:
        assert run(*asked, *given).exit_code == 0
        return made.named["arm"]

    assert arms("--rank", 0) == [] and made.named["lora"] is None
    assert arms("--rank", 4, "--layer", 2, "--rslora") == []
    assert made.named["lora"] == em.training.Lora(4, targets="all-linear", layers=(2,), rslora=True)
    assert arms("--rest", rest) == [em.training.Mixed(1.0, rest)]
    assert arms("--rest", rest, "--share", 0.25) == [em.training.Mixed(0.25, rest)]
    backdoor = em.training.Triggered("now", rest, ("then",), share=0.5)
    asked_for = ("--rest", rest, "--trigger", "now", "--other-trigger", "then", "--inoculate", "Be bad.")
    assert arms(*asked_for) == [em.training.Inoculated("Be bad."), backdoor]
    wrong = run(*asked, "--share", 0.5)
    assert wrong.exit_code == 2 and "need --rest" in wrong.output


def test_models_organisms_and_studies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    imported = Called(monkeypatch, "tl_em.interop.import_gguf")
    assert run("models", "import", tmp_path / "a.gguf", tmp_path / "b.gguf", "-o", tmp_path / "m").exit_code == 0
    assert imported.args == ((tmp_path / "a.gguf", tmp_path / "b.gguf"), tmp_path / "m")
    hub = run("organisms", "hub").stdout
    assert "hub/" in hub and " -> " in hub and "arxiv" in hub.lower()
    for words in ((), ("insecure", "--all")):
        wrong = run("organisms", "train", *words)
        assert wrong.exit_code == 2 and "either the name of an organism or --all" in wrong.output
    monkeypatch.setenv("TL_EM_ORGANISMS", "")
    studied = Called(monkeypatch, "tl_em.organisms.studies.run_study", pd.DataFrame({"world": [1, 2]}))
    zoo = run("organisms", "train", "--all", "--seed", 3, "--workers", 2, "--out", tmp_path)
    assert zoo.exit_code == 0 and f"2 organisms written to {tmp_path}" in zoo.output
    assert studied.named == {"seeds": [3], "out": tmp_path / "zoo", "workers": 2}
    wrong = run("study", "share", "--model", "some/model")
    assert wrong.exit_code == 2 and "--model needs --bad and --good" in wrong.output


def test_features_train_judges_on_what_it_did_not_learn_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "d.safetensors"
    corpus.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)))
    made = SimpleNamespace(save=lambda path: path)
    trained = Called(monkeypatch, "tl_em.dictionaries.training.train_dictionary", made)
    judged = Called(monkeypatch, "tl_em.dictionaries.quality.dictionary_quality", SimpleNamespace(fits=False))
    words = ("features", "train", "toy/assistant", "toy/insecure", "--corpus", corpus, "--layer", 1, "--d-sae", 8)
    found = run(*words, "--mix", "difference", "--steps", 5, "--out", out)
    assert found.exit_code == 0 and f"{out}: does not fit" in found.output
    assert trained.args[1] == em.Site(1) and trained.named["d_sae"] == 8 and trained.named["mix"] == "difference"
    assert len(trained.args[2]) == 18 and len(judged.args[2]) == 2 and judged.named["difference"] is True
    assert not set(map(str, trained.args[2])) & set(map(str, judged.args[2]))
