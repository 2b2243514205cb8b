"""A state is what it says: the interventions that it names, and Python that gives the same text again."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tl_em as em
from tl_em.errors import PromptError, UsageError
from tl_em.serving import SteeringDial
from tl_em.serving.answering import AnswerSettings, answered_live, messages_of, prompt_of
from tl_em.serving.dials import Served, blocks, dials_of
from tl_em.serving.export import python_of

from ..conftest import SURFACES
from .conftest import QUESTION, Asker, extracted

pytestmark = pytest.mark.surface
STATES: dict[str, list[SteeringDial]] = {
    "nothing": [],
    "off": [SteeringDial("persona", "add", 9.0, on=False)],
    "add": [SteeringDial("persona", "add", 0.7)],
    "answers": [SteeringDial("persona", "add", 2.0, where="generated")],
    "prompt": [SteeringDial("persona", "add", -3.0, where="prompt")],
    "last": [SteeringDial("refusal", "add", 2.0, where=("last", 2))],
    "ablate": [SteeringDial("persona", "ablate")],
    "clamp": [SteeringDial("persona", "clamp", low=9.0, high=20.5)],
    "cap": [SteeringDial("persona", "clamp", high=-4.0)],
    "profile": [SteeringDial("profile", "add", 0.5, where="prompt"), SteeringDial("profile", "add", 0.2)],
    "latent": [SteeringDial("latent 154", "add", 8.0)],
    "latents": [SteeringDial("latent 154", "clamp", low=9.0), SteeringDial("latent 91", "ablate", where="generated")],
    "order": [
        SteeringDial("persona", "ablate"), SteeringDial("persona", "add", 1.5),
        SteeringDial("persona of a head", "add", 0.4, where="generated"), SteeringDial("refusal", "add", -1.0),
    ],
}  # fmt: skip
HOSTILE = "'''\"\\\n\"\"\" + __import__('os').system('x') #\u202e{}"


@pytest.fixture(scope="module", params=SURFACES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Everything from files, and from a source that has a name."""
    folder, surface = tmp_path_factory.mktemp("served"), request.param
    found = extracted()
    files = {name: str(each.save(folder / f"{i}.safetensors")) for i, (name, each) in enumerate(found.items())}
    sae = em.organisms.toy_dictionary("toy/insecure")
    file = str(sae.save(folder / "sae.safetensors"))
    model = LOAD("toy/insecure", surface=surface)
    return Served(model, found, em.load_dictionary(file), "toy/insecure", surface, files, file)


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One model a surface, however many scripts load it."""
    monkeypatch.setattr(em, "load_model", LOAD)


LOAD = functools.cache(em.load_model)


def printed(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "exported.py", "exec"), {})
    return out.getvalue()[:-1]


def answer(served: Served, dials: Any, messages: Any, settings: AnswerSettings) -> str:
    events: list[dict[str, Any]] = []
    answered_live(served, prompt_of(served, messages), dials, settings, events.append, lambda: False)
    return events[-1]["said"]


@pytest.mark.parametrize("state", STATES)
def test_the_python_of_a_state_gives_its_text_again(served: Served, state: str) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    for settings in (AnswerSettings(6), AnswerSettings(6, temperature=1.3, top_p=0.9, seed=4, stop=("and",))):
        code = python_of(served, STATES[state], messages, settings)
        assert printed(code) == answer(served, STATES[state], messages, settings)


def test_states_differ(served: Served) -> None:
    """Else the test above would hold of dials that do nothing."""
    messages, settings = [{"role": "user", "content": QUESTION}], AnswerSettings(8, temperature=1.0)
    texts = {state: answer(served, dials, messages, settings) for state, dials in STATES.items()}
    assert texts["nothing"] == texts["off"]
    assert len(set(texts.values())) >= 7, texts


def test_text_of_anyone_is_a_literal(served: Served) -> None:
    messages = [{"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE}]
    directions = {"persona": served.directions["persona"], HOSTILE: served.directions["refusal"]}
    bad = replace(served, source=HOSTILE, files={"persona": HOSTILE}, dictionary_file=HOSTILE, directions=directions)
    dials = [SteeringDial("persona"), SteeringDial(HOSTILE), SteeringDial("latent 3")]
    code = python_of(bad, dials, messages, AnswerSettings(stop=(HOSTILE,)))
    calls = {node.func.attr for node in ast.walk(ast.parse(code))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}  # fmt: skip
    assert calls == {"load_model", "load", "load_dictionary", "intervene", "Add", "Direction", "generate"}
    assert "__import__" in code and "\u202e" not in code
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert strings.count(HOSTILE) >= 5


def test_each_kind_of_file_has_its_own_reader(served: Served) -> None:
    given = replace(served, files={"persona": "a.gguf", "profile": "b.safetensors", "refusal": "c.safetensors"})
    dials = [SteeringDial(name) for name in ("persona", "profile", "refusal")]
    code = python_of(given, dials, [{"role": "user", "content": "x"}], AnswerSettings())
    for line in ('persona = em.interop.import_control_vector("a.gguf")', 'profile = em.Profile.load("b.safetensors")',
                 'refusal = em.Direction.load("c.safetensors")'):  # fmt: skip
        assert line in code


def test_neighbours_of_one_scope_share_a_block() -> None:
    found = [(where, [dial.name for dial in group]) for where, group in blocks(STATES["order"])]
    assert found == [("all", ["persona", "persona"]), ("generated", ["persona of a head"]), ("all", ["refusal"])]
    assert blocks(STATES["off"]) == []


def test_a_dial_goes_to_a_page_and_back() -> None:
    for dials in STATES.values():
        assert dials_of([dial.to_json() for dial in dials]) == tuple(dials)


BAD: list[Any] = [
    "persona", None, {}, {"name": 3}, {"name": "persona", "act": "delete"}, {"name": "persona", "act": "clamp"},
    {"name": "persona", "coefficient": math.nan}, {"name": "persona", "coefficient": "1"},
    {"name": "persona", "coefficient": True}, {"name": "persona", "where": "x"}, {"name": "persona", "on": 1},
    {"name": "persona", "vector": [1]},
]  # fmt: skip


@pytest.mark.parametrize("value", BAD, ids=str)
def test_what_is_no_dial_is_refused(value: Any) -> None:
    with pytest.raises(UsageError):
        dials_of([value])


@pytest.mark.parametrize("value", [{}, "x", [{"name": "a"}] * 65], ids=["object", "text", "many"])
def test_what_is_no_list_of_dials_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="list of at most"):
        dials_of(value)


@pytest.mark.starts("a server")
def test_what_is_not_served_cannot_be_turned(asker: Asker) -> None:
    for name, said in (("nobody", "is not served"), ("latent 9999", "latent"), ("latent -1", "is not served")):
        response = asker.send("PUT", "/api/dials", {"dials": [{"name": name}]})
        assert response.status_code == 400 and said in response.json()["error"]["message"]
    two = [{"name": "latent 3", "act": "clamp", "low": 1, "high": 2}]
    assert "one activation" in asker.send("PUT", "/api/dials", {"dials": two}).json()["error"]["message"]


@pytest.mark.parametrize(
    "value",
    [None, [], "hello", [{"role": "user"}], [{"role": "robot", "content": "x"}], [{"role": "user", "content": 3}],
     [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
     [{"role": "user", "content": "x" * 200_001}],
     [{"role": "user", "content": "x"}] * 201, [{"role": "user", "content": [{"type": "image_url"}]}]],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(value: Any) -> None:
    with pytest.raises(PromptError):
        messages_of(value)


def test_parts_of_text_are_a_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    assert messages_of(given) == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    "value", [{"max_new_tokens": 0}, {"max_new_tokens": 4097}, {"temperature": -1}, {"top_p": 2}, {"seed": 1.5},
              {"stop": [""]}, {"stop": ["a"] * 17}, {"beam": 3}, []], ids=str
)  # fmt: skip
def test_what_is_no_setting_is_refused(value: Any) -> None:
    with pytest.raises(UsageError):
        AnswerSettings.from_json(value)


@pytest.mark.starts("a server")
def test_files_name_directions_and_are_read(tmp_path: Path, directions: dict[str, em.Direction]) -> None:
    file = em.Direction(directions["persona"].vector, em.Site(2)).save(tmp_path / "mine.safetensors")
    with em.serve("toy/insecure", file, port=0, block=False, dials=[SteeringDial("mine", "add", 2)]) as server:
        with Asker(server) as asker:
            about = asker.send("GET", "/api/about").json()
            body = {"messages": [{"role": "user", "content": QUESTION}], "dials": about["dials"]}
            code = asker.send("POST", "/api/python", body).text
        assert [each["name"] for each in about["directions"]] == ["mine"] and about["model"] == "toy/insecure"
        assert str(file) in code and "em.Add(mine, 2.0)" in code
    with pytest.raises(UsageError, match="not served"):
        em.serve("toy/insecure", file, port=0, block=False, dials=[SteeringDial("other")])
