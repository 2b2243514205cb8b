"""Every number of every public function is checked where it enters, before anything else happens."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tl_em as em
from tl_em.arguments import COUNT, FRACTION, checked, finite, having, list_of, noun_of, optional, vectors, whole
from tl_em.arguments import path as as_path
from tl_em.errors import NonFiniteError, UsageError, WidthError
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.stream import next_token_logits, sequence_logprobs

NUMERIC = re.compile(r"\b(int|float|Numbers)\b")
TAUGHT = [{"prompt": "is it", "response": "no"}]
DIRECTION = em.Direction([3.0, 4.0], em.Site(0), name="d")
STAND_INS: dict[str, Any] = {
    "site": em.Site(0),
    "sites": [em.Site(0)],
    "position": "prompt_end",
    "positions": ["prompt_end"],
    "direction": DIRECTION,
    "directions": [DIRECTION],
    "intervention": em.Add(DIRECTION),
    "contrast": em.ContrastSet(["the cat"], ["the dog"]),
    "prompts": ["the cat"],
    "target_kl": 0.1,
    "n_layers": 4,
    "d_sae": 8,
    "seeds": [0],
    "seed": 0,
    "indices": [0],
    "layer": 0,
    "at": 0,
    "max_new_tokens": 1,
}
RECORDS = {"Agreement", "Calibration", "Case", "Evaluation", "Finding", "World"}
RECORDS |= {"Estimate", "FeatureCheck", "FeatureSet", "FeatureTable", "LieReport", "Organism", "Provenance", "Row"}
RECORDS |= {"TextReading"}
"""What functions return: their fields may hold NaN, "not measured"."""
TOYS = ("World", "outcome_rates", "fine_tune_", "Case.")
"""Inner parts of worlds and training loops, and of a case, whose numbers are checked where they are used."""
ELSEWHERE = (*TOYS, "Dictionary.feature")
ELSEWHERE += ("Provenance.of", "AttributionGraph", "attention_view", "attribute", "head_loadings")
"""Checked where the value is made; and graphs, whose numbers mean something beside their prompt: see tests/graph."""
MAY_BE_NEGATIVE = {"above", "below", "coherent", "coefficient", "factor", "min_coherence", "min_induce", "seeds"}
MAY_BE_NEGATIVE |= {"strength", "strengths", "threshold"}


def _public() -> dict[str, Any]:
    """What stands on ``em``, and in its folders, by its own name."""
    flat = {name: getattr(em, name) for name in em.__all__}  # pyright: ignore[reportAttributeAccessIssue]
    folders = [value for value in flat.values() if inspect.ismodule(value) and hasattr(value, "__all__")]
    return {name: getattr(folder, name) for folder in folders for name in folder.__all__} | flat


PUBLIC = _public()


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions, and public methods of public classes."""
    for name, value in PUBLIC.items():
        if inspect.isfunction(value):
            yield name, value
        for own, method in vars(value).items() if inspect.isclass(value) else ():
            method = getattr(method, "__func__", method)
            if inspect.isfunction(method) and (own == "__init__" or not own.startswith("_")):
                yield f"{name}.{own}", method


def numeric(function: Callable[..., Any]) -> list[str]:
    """Parameters whose annotation speaks of numbers."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if NUMERIC.search(str(p.annotation)) and "Mapping" not in str(p.annotation)]


def asked() -> list[tuple[str, str]]:
    cases = []
    for name, function in functions():
        inner = name.endswith((".plot", ".plant", ".at_random", ".edit", ".hook_names", ".rows")) or name.startswith(
            ELSEWHERE
        )
        if not inner and not (name.endswith(".__init__") and name[:-9] in _data()):
            cases += [(name, p) for p in numeric(function)]
    return cases


def _data() -> set[str]:
    """Dataclasses, whose fields are in a table of their own below."""
    return {name for name, value in PUBLIC.items() if hasattr(value, "__dataclass_fields__")}


CASES = asked()
BY_NAME = dict(functions())


def called(name: str, parameter: str, value: Any) -> None:
    """The function with this value, and with objects that nothing can be done with for all the rest."""
    function = BY_NAME[name]
    needed = {
        p.name: STAND_INS.get(p.name, object())
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL
    }
    positional = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_ONLY]
    assert not positional
    function(**{**needed, parameter: value})


def whole_only(name: str, parameter: str) -> bool:
    annotation = str(inspect.signature(BY_NAME[name]).parameters[parameter].annotation)
    return parameter == "seeds" or not re.search(r"\bfloat\b|Numbers", annotation)


def is_list(name: str, parameter: str) -> bool:
    annotation = str(inspect.signature(BY_NAME[name]).parameters[parameter].annotation)
    return "Sequence" in annotation.split("|")[0] or "Iterable" in annotation or "Numbers" in annotation


def test_there_is_much_to_check() -> None:
    assert len(CASES) > 60
    assert ("select_direction", "max_kl") in CASES and ("shared_features", "q") in CASES


@pytest.mark.parametrize(("name", "parameter"), CASES, ids=lambda v: str(v))
def test_what_is_no_number_is_refused_by_name(name: str, parameter: str) -> None:
    """Before any work: every other argument is one that would fail as soon as it was touched."""
    bad_ones: list[Any] = [math.nan, math.inf, True, "3", "x", object()]
    bad_ones += [] if parameter in MAY_BE_NEGATIVE else [-1.5]
    bad_ones += [1.5] if whole_only(name, parameter) else []
    bad_ones += [] if (name, parameter) == ("logit_lens", "controls") else [torch.ones(2, 2)]  # may be vectors
    for bad in bad_ones:
        given = [bad] if is_list(name, parameter) else bad
        with pytest.raises(em.TlEmError, match=rf"^{parameter}|^k of"):
            called(name, parameter, given)


@pytest.mark.parametrize(("name", "parameter"), CASES, ids=lambda v: str(v))
def test_numbers_of_any_library_are_numbers(name: str, parameter: str) -> None:
    check = BY_NAME[name].checks[parameter]  # pyright: ignore[reportFunctionMemberAccess]
    values: list[Any] = [np.int64(1), np.uint8(1), torch.tensor(1)]
    values += [] if whole_only(name, parameter) else [np.float32(1), torch.tensor(1.0), np.array(1.0)]
    for value in values:
        found = check(parameter, [value] if is_list(name, parameter) else value)
        found = found[0] if is_list(name, parameter) else found
        assert found == 1 and type(found) in (int, float)


# --- Values -----------------------------------------------------------------------------------------------------------

FIELDS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "Site.layer": (lambda x: em.Site(x).layer, True),
    "TextLogprob.last": (lambda x: em.claims.TextLogprob(last=x).last, True),
    "Add.coefficient": (lambda x: em.Add(DIRECTION, x).coefficient, False),
    "Judged.max_new_tokens": (lambda x: em.evals.Judged(_none, max_new_tokens=x).max_new_tokens, True),
    "Judged.seed": (lambda x: em.evals.Judged(_none, seed=x).seed, True),
    "Judged.temperature": (lambda x: em.evals.Judged(_none, temperature=x).temperature, False),
    "Judged.without_score": (lambda x: em.evals.Judged(_none, without_score=x).without_score, False),
    "EndpointJudge.concurrency": (lambda x: em.evals.EndpointJudge("m", concurrency=x).concurrency, True),
    "EndpointJudge.retries": (lambda x: em.evals.EndpointJudge("m", retries=x).retries, True),
    "EndpointJudge.timeout": (lambda x: em.evals.EndpointJudge("m", timeout=x).timeout, False),
    "Misaligned.aligned_below": (lambda x: em.evals.Misaligned(x).aligned_below, False),
    "Misaligned.coherent_above": (lambda x: em.evals.Misaligned(30, x).coherent_above, False),
    "OpenQuestion.samples": (lambda x: em.evals.OpenQuestion("a", ("?",), x).samples, True),
    "OpenQuestion.temperature": (lambda x: em.evals.OpenQuestion("a", ("?",), 1, x).temperature, False),
    "Clamp.low": (lambda x: em.Clamp(DIRECTION, low=x).low, False),
    "Clamp.high": (lambda x: em.Clamp(DIRECTION, high=x).high, False),
    "Conditional.above": (lambda x: em.Conditional(em.Add(DIRECTION), DIRECTION, above=x).above, False),
    "ScaleFeature.factor": (lambda x: em.ScaleFeature(_sae().feature(0), x).factor, False),
    "SteeringDial.coefficient": (lambda x: em.serving.SteeringDial("d", "add", x).coefficient, False),
    "SteeringDial.low": (lambda x: em.serving.SteeringDial("d", "clamp", low=x).low, False),
    "SteeringDial.high": (lambda x: em.serving.SteeringDial("d", "clamp", high=x).high, False),
    "Lora.rank": (lambda x: em.training.Lora(x).rank, True),
    "Lora.dropout": (lambda x: em.training.Lora(dropout=x).dropout, False),
    "Mixed.share": (lambda x: em.training.Mixed(x, TAUGHT).share, False),
    "Triggered.share": (lambda x: em.training.Triggered("a", TAUGHT, ["b"], share=x).share, False),
    "Triggered.others_share": (lambda x: em.training.Triggered("a", TAUGHT, ["b"], others_share=x).others_share, False),
    "Steered.coefficient": (lambda x: em.training.Steered(DIRECTION, x).coefficient, False),
    "ScaleFeature.to": (lambda x: em.ScaleFeature(_sae().feature(0), to=x).to, False),
}


def _none(prompts: Any, answers: Any) -> list[float]:
    return [0.0] * len(answers)


def _sae() -> em.Dictionary:
    eye = torch.eye(2)
    return em.Dictionary(eye, torch.zeros(2), eye, torch.zeros(2), activation="relu", site_in=em.Site(0))


@pytest.mark.parametrize("field", FIELDS)
def test_values_take_numbers_of_any_library_and_no_others(field: str) -> None:
    make, whole_only = FIELDS[field]
    for good in (1, np.int64(1), torch.tensor(1), *(() if whole_only else (np.float32(1), torch.tensor(1.0)))):
        assert make(good) == 1 and type(make(good)) in (int, float)
    for bad in (math.nan, math.inf, True, "1", [[1.0]], *((1.5,) if whole_only else ())):
        with pytest.raises(em.TlEmError):
            make(bad)


def test_every_field_of_a_value_that_holds_a_number_is_in_the_table() -> None:
    fields = {
        f"{name}.{field.name}"
        for name in _data() - RECORDS
        for field in PUBLIC[name].__dataclass_fields__.values()
        if field.init and NUMERIC.search(str(field.type)) and not re.search("Mapping|Sequence|tuple", str(field.type))
    }
    assert "Add.coefficient" in fields
    assert fields - set(FIELDS) <= {"GraphDiff.least", "Dictionary.k", "Feature.index", "FeatureCards.tokens"}


# --- The checks themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [1, 1.0, np.float16(1), np.int8(1), torch.tensor(1), torch.ones((), requires_grad=True)], ids=repr
)
def test_finite_gives_a_float(value: Any) -> None:
    assert type(finite("x", value)) is float and finite("x", value) == 1.0


@pytest.mark.parametrize(
    "value",
    [None, "1", b"1", True, np.True_, torch.tensor(True), [1], np.array([1.0]), torch.ones(1), 1j, math.nan, 10**400],
    ids=lambda value: repr(value)[:20],
)
def test_finite_refuses_the_rest(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^x="):
        finite("x", value)


@pytest.mark.parametrize("value", [1.0, np.float64(1), torch.tensor(1.0), "1", True, np.array([1]), None], ids=repr)
def test_whole_refuses_what_counts_nothing(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^x="):
        whole("x", value)
    assert whole("x", np.int64(3), low=3, high=3) == 3


def test_vectors_are_the_packages_own() -> None:
    given = torch.ones(3, dtype=torch.float64, requires_grad=True)
    found = vectors("v", given)
    assert found.dtype == torch.float32 and not found.requires_grad
    with torch.no_grad():
        given += 1
    assert found.tolist() == [1.0, 1.0, 1.0]
    with torch.inference_mode():
        assert not vectors("v", torch.ones(3)).is_inference()
    for bad, error in [
        (torch.ones(2, 2), WidthError),
        (3.0, WidthError),
        ([1.0, math.nan], NonFiniteError),
        (np.array([1e300]), NonFiniteError),
        (torch.ones(2, dtype=torch.complex64), UsageError),
        (torch.ones(2, device="meta"), UsageError),
        (["a"], UsageError),
        ([[1], [2, 3]], UsageError),
        (None, UsageError),
    ]:
        with pytest.raises(error, match=r"^v"):
            vectors("v", bad)


def test_a_function_is_checked_by_keyword_and_by_place_and_keeps_its_name() -> None:
    @checked(k=COUNT, share=optional(FRACTION), lengths=list_of(COUNT))
    def chosen(k: int, share: float | None = None, *, lengths: tuple[int, ...] = ()) -> tuple[Any, ...]:
        """Doc."""
        return k, share, lengths

    assert chosen.__name__ == "chosen" and chosen.__doc__ == "Doc."
    assert chosen(np.int64(2), None, lengths=[torch.tensor(1)]) == (2, None, (1,))  # pyright: ignore[reportArgumentType]
    for arguments, named in (((0,), {}), ((1, 2.0), {}), ((1,), {"lengths": 3}), ((1,), {"lengths": [0]})):
        with pytest.raises(UsageError):
            chosen(*arguments, **named)


# --- Prompts ----------------------------------------------------------------------------------------------------------

ROWS = [[2, 3, 8], [2, 3]]


@pytest.mark.parametrize(
    "given",
    [
        ROWS,
        [np.array(row) for row in ROWS],
        [torch.tensor(row) for row in ROWS],
        tuple(map(tuple, ROWS)),
    ],
    ids=["lists", "arrays", "tensors", "tuples"],
)
def test_rows_of_token_ids_are_prompts(given: Any, small_model: em.LensModel) -> None:
    encoded = [EncodedPrompt.from_ids(row) for row in ROWS]
    found = em.capture(small_model, given, [em.Site(1)], position="prompt_end")
    assert torch.equal(found, em.capture(small_model, encoded, [em.Site(1)], position="prompt_end"))


def test_a_batch_of_ids_is_so_many_prompts(small_model: em.LensModel) -> None:
    batch = torch.tensor([[2, 3, 8], [2, 3, 9]])
    for given in (batch, batch.numpy()):
        assert len(em.capture(small_model, given, [em.Site(1)], position=-1)) == 2  # pyright: ignore[reportArgumentType]
        assert len(em.generate(small_model, given, max_new_tokens=1)) == 2  # pyright: ignore[reportArgumentType]


ONE = {
    "text": "the cat",
    "bytes": b"the cat",
    "ids": [2, 3, 8],
    "tensor": torch.tensor([2, 3, 8]),
    "array": np.array([2, 3, 8]),
    "encoded": EncodedPrompt.from_ids([2, 3]),
    "chat": [{"role": "user", "content": "the cat"}],
    "message": {"role": "user", "content": "the cat"},
    "none": None,
    "nones": [None],
    "set": em.ContrastSet(["the cat"], ["the dog"]),
    "fractions": torch.tensor([[1.5, 2.0]]),
    "negative ids": [[-1, 2]],
    "nothing": [],
}


@pytest.mark.parametrize("given", ONE, ids=str)
def test_what_is_no_list_of_prompts_is_refused(given: str, small_model: em.LensModel) -> None:
    prompts: Any = ONE[given]
    for verb in (next_token_logits, sequence_logprobs):
        with pytest.raises(em.TlEmError):
            verb(small_model, prompts)
    with pytest.raises(em.TlEmError):
        em.capture(small_model, prompts, [em.Site(1)], position=-1)
    with pytest.raises(em.TlEmError):
        em.mean_activation(small_model, prompts, site=em.Site(1), position=-1)


def test_sites_positions_and_sets_of_another_kind_are_refused(small_model: Any) -> None:
    prompts, sites = ["the cat sat"], [em.Site(1)]
    for wrong in (em.Site(1), "resid_post", [1], [(1, "resid_post")], []):
        with pytest.raises(em.TlEmError):
            em.capture(small_model, prompts, wrong, position=-1)  # pyright: ignore[reportArgumentType]
    for wrong in (0, 1.5, True, None, "end", [-1], -99):
        with pytest.raises(em.TlEmError):
            em.capture(small_model, prompts, sites, position=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(em.TlEmError, match="no hook point"):
        em.capture(small_model, prompts, [em.Site(99)], position=-1)
    with pytest.raises(UsageError, match="no contrast set"):
        em.difference_in_means(small_model, (prompts, prompts), site=em.Site(1), position=-1)  # pyright: ignore[reportArgumentType]
    offsets = [em.capture(small_model, prompts, sites, position=p) for p in (-2, np.int64(-2), torch.tensor(-2))]  # pyright: ignore[reportArgumentType]
    assert torch.equal(offsets[0], offsets[1]) and torch.equal(offsets[0], offsets[2])


# --- The command line -------------------------------------------------------------------------------------------------

LINES = {
    "features find d.safetensors toy/insecure --contrast a=b --contrast c=d": {"--q": ("nan", "1.5", "-1")},
    "demo": {"--seed": ("-1",)},
    "audit a b": {"--controls": ("0", "-5"), "--seed": ("-1",)},
    "organisms train toy/insecure": {"--workers": ("0",)},
    "study dose": {"--workers": ("-1",)},
    "features train a b --corpus d.safetensors --layer 1 --d-sae 8": {
        **{"--k": ("0",), "--steps": ("0",), "--layer": ("-1",), "--d-sae": ("0",), "--seed": ("-1",)}
    },
    "features page d.safetensors a --prompts p": {"--latent": ("-1",)},
    "graph of a b -o g.html": {"--nodes": ("nan", "2"), "--edges": ("inf",)},
}


@pytest.mark.parametrize("line", LINES)
def test_numbers_of_the_command_line_are_checked_while_it_is_parsed(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from tl_em.cli import main

    monkeypatch.chdir(tmp_path)
    Path("d.safetensors").touch()
    for option, values in LINES[line].items():
        for value in values:
            done = CliRunner().invoke(main, [*line.split(), option, value])
            assert done.exit_code == 2 and f"Invalid value for '{option}'" in done.output, done.output


def test_every_numeric_option_is_checked() -> None:
    import click

    from tl_em.cli import main

    def options(command: Any) -> Iterator[click.Parameter]:
        yield from command.params
        for each in getattr(command, "commands", {}).values():
            yield from options(each)

    numbers = [p for p in options(main) if isinstance(p.type, click.types.IntParamType | click.types.FloatParamType)]
    assert len(numbers) > 12
    assert [p.name for p in numbers if p.callback is None] == []


# --- What is no model, no pair, no path -------------------------------------------------------------------------------

FUNCTIONS = sorted(name for name, _ in functions() if "." not in name)
SERVES = pytest.param("serve", marks=pytest.mark.starts("a server, which takes its address before its model"))


def needs(name: str) -> list[str]:
    parameters = inspect.signature(BY_NAME[name]).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


@pytest.mark.parametrize("name", [SERVES if name == "serve" else name for name in FUNCTIONS if needs(name)])
@pytest.mark.parametrize("thing", [object(), 3, "\x00", b"bytes", ["a"], {"a": 1}], ids=lambda v: type(v).__name__)
def test_nothing_that_fits_ends_in_an_error_of_the_package(name: str, thing: Any) -> None:
    """Or is a value that means something there: then it ends well."""
    with contextlib.suppress(em.TlEmError):
        made = BY_NAME[name](**dict.fromkeys(needs(name), thing))
        if hasattr(made, "__enter__"):
            with made:
                pass
        elif inspect.isgenerator(made):
            next(made, None)


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("LensModel", "model", 3), ("ModelPair", "pair", "toy/insecure"), ("str | Path", "a/b", 3), ("str", "a", b"a"),
        ("Mapping[str, Sequence[str | None]]", {"a": []}, ["a"]), ("Sequence[Any] | None", [1], 1),
        ("ContrastSet | Any", "contrast", ("a", "b")),
    ],
)  # fmt: skip
def test_an_annotation_s_noun_is_checked(annotation: str, good: Any, bad: Any) -> None:
    pair = em.load_pair("toy/insecure")
    known = {"model": pair.base, "pair": pair, "contrast": em.ContrastSet.load("refusal")}
    check = noun_of(annotation)
    assert check is not None
    value = known.get(good, good) if isinstance(good, str) else good
    assert check("x", value) is value
    with pytest.raises(em.errors.UsageError, match=r"^x=.*(is no|names nothing)"):
        check("x", bad)
    if "None" in annotation.split(" | ")[-1:]:
        assert check("x", None) is None


def test_annotations_that_name_no_noun_are_left_to_the_function() -> None:
    assert noun_of("int") is None and noun_of("LensModel | bool | None") is None
    assert noun_of("Sequence[Direction] | Float[Tensor, 'a b']") is None and noun_of("str | Path | Any") is None


def test_a_path_that_no_disk_can_hold_is_refused() -> None:
    for bad in ("a" * 5000, "a\x00b", "\ud800"):
        with pytest.raises(em.errors.UsageError, match="cannot be a path"):
            as_path("out", bad)


def test_an_array_that_is_read_only_is_taken_without_a_warning() -> None:
    import numpy as np

    from tl_em.arguments import array_of, vectors

    given = np.ones(4)
    given.flags.writeable = False
    assert array_of((4,), given, "the judge", wanted="").tolist() == vectors("direction", given).tolist() == [1.0] * 4
    assert em.Direction(given, em.Site(0)).vector.tolist() == [1.0] * 4  # pyright: ignore


def test_whether_something_has_a_member_is_seen_without_computing_it() -> None:
    asked: list[int] = []

    class Slow:
        def __init__(self) -> None:
            self.own = 1

        @property
        def made(self) -> int:
            asked.append(1)
            return 1

    slow, check = Slow(), having("noun", "made own", "it is unknown", "one")
    assert check("x", slow) is slow and not asked
    with pytest.raises(UsageError):
        having("noun", "made other", "it is unknown", "one")("x", slow)
