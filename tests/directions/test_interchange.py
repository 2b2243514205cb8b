"""Published directions land where they were read, do what they did, and no file of theirs runs code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import make_hf_model, make_tokenizer
from tl_em.directions.interchange import (
    import_mean_diffs,
    import_persona_vectors,
    import_refusal_direction,
    import_steering_vector,
)
from tl_em.errors import (
    CorruptFileError,
    NonFiniteError,
    ProvenanceError,
    UsageError,
    WidthError,
    ZeroDirectionError,
)
from tl_em.interventions.edits import Add
from tl_em.interventions.intervene import intervene
from tl_em.models.hooks import LensModel
from tl_em.models.loading import load_model
from tl_em.models.prompts import encode
from tl_em.models.sites import Site
from tl_em.models.stream import capture, next_token_logits

pytestmark = pytest.mark.surface
RUNS = Path(__file__).parents[2] / "../shared/data/refusal-direction/runs"
D, LAYERS = 32, 3
PROMPT = "the king ran to the big bank"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as refusal_direction leaves it: float64, the direction a view of all differences."""
    diffs = torch.randn(4, LAYERS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    diffs[:, 0] *= 1e-15  # the template's tokens are the same in both classes
    (tmp_path / "generate_directions").mkdir()
    torch.save(diffs, tmp_path / "generate_directions" / "mean_diffs.pt")
    torch.save(diffs[-2, 1], tmp_path / "direction.pt")
    (tmp_path / "direction_metadata.json").write_text(json.dumps({"pos": -2, "layer": 1}))
    return tmp_path


def test_a_run_is_read_at_its_published_position_and_layer(run: Path, small_model: LensModel) -> None:
    direction = import_refusal_direction(run, model=small_model)
    assert (direction.site, direction.position) == (Site(1, "resid_pre"), -2)
    assert direction.provenance is not None and direction.provenance.differences(small_model) == []
    assert import_refusal_direction(run / "direction.pt").provenance is None
    about = run / "direction_metadata.json"
    about.write_bytes(b"\xef\xbb\xbf" + about.read_bytes())
    assert import_refusal_direction(run).site == Site(1, "resid_pre")
    candidates = import_mean_diffs(run)
    assert [(d.position, d.site.layer) for d in candidates] == [(p, k) for p in (-4, -3, -2, -1) for k in (1, 2)]
    (same,) = [d for d in candidates if (d.position, d.site) == (direction.position, direction.site)]
    assert torch.equal(same.vector, direction.vector)
    assert sum(torch.equal(d.vector, direction.vector) for d in candidates) == 1


if (RUNS / "gemma-2b-it").is_dir():

    def test_the_published_direction_is_its_entry_of_the_differences() -> None:
        folder = RUNS / "gemma-2b-it"
        direction, candidates = import_refusal_direction(folder), import_mean_diffs(folder)
        assert (direction.position, direction.site, len(direction.vector)) == (-2, Site(10, "resid_pre"), 2048)
        assert direction.norm == pytest.approx(10.064, abs=5e-4)  # published to three decimals
        assert len(candidates) == 5 * 17  # 18 layers; at the first, both classes read the same template
        equal = [d for d in candidates if torch.equal(d.vector, direction.vector)]
        assert [(d.position, d.site) for d in equal] == [(-2, Site(10, "resid_pre"))]

    @pytest.mark.parametrize(
        ("model", "position", "layer"), [("llama-2-7b-chat-hf", -1, 14), ("meta-llama-3-8b-instruct", -5, 12)]
    )
    def test_a_run_without_its_vector_is_refused(model: str, position: int, layer: int) -> None:
        assert json.loads((RUNS / model / "direction_metadata.json").read_text()) == {"pos": position, "layer": layer}
        with pytest.raises(CorruptFileError, match=r"direction\.pt"):
            import_refusal_direction(RUNS / model)


class Vandal:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "ran")


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_code_in_a_file_is_refused_and_not_run(run: Path, write: Callable[[Any, Path], Any]) -> None:
    trace, path = run / "trace", run / "direction.pt"
    write(Vandal(trace), path)
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert trace.read_text() == "ran"  # it would
    trace.unlink()
    with pytest.raises(CorruptFileError, match="could run code"):
        import_refusal_direction(run)
    assert not trace.exists()


def test_files_that_are_something_else_are_one_typed_error(run: Path) -> None:
    path = run / "direction.pt"
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:100], b"", b"not a tensor"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match="holds no plain tensors"):
            import_refusal_direction(run)
    nan = torch.ones(D)
    nan[3] = float("nan")
    odd = (torch.ones(2, D), torch.ones(D, dtype=torch.int64), {"vector": torch.ones(D)}, torch.ones(0), nan)
    for each in odd:
        torch.save(each, path)
        with pytest.raises(CorruptFileError):
            import_refusal_direction(run)
    path.unlink()
    with pytest.raises(CorruptFileError):
        import_refusal_direction(run)


def test_metadata_that_names_no_place_is_one_typed_error(run: Path) -> None:
    for text in ("", "[]", '{"pos": -1}', '{"pos": 0, "layer": 1}', '{"pos": -1, "layer": "1"}'):
        (run / "direction_metadata.json").write_text(text)
        with pytest.raises(CorruptFileError, match="position and layer"):
            import_refusal_direction(run)
    (run / "direction_metadata.json").unlink()
    with pytest.raises(CorruptFileError, match="position and layer"):
        import_refusal_direction(run)


def test_a_model_of_another_shape_or_with_processed_weights_is_refused(run: Path, small_model: LensModel) -> None:
    torch.save(torch.ones(8), run / "direction.pt")
    with pytest.raises(WidthError, match="8 wide"):
        import_refusal_direction(run, model=small_model)
    torch.save(torch.ones(D), run / "direction.pt")
    (run / "direction_metadata.json").write_text(json.dumps({"pos": -1, "layer": LAYERS}))
    with pytest.raises(ProvenanceError, match="layer 3"):
        import_refusal_direction(run, model=small_model)
    torch.save(torch.ones(4, LAYERS + 1, D), run / "generate_directions" / "mean_diffs.pt")
    with pytest.raises(ProvenanceError, match="4 layers"):
        import_mean_diffs(run, model=small_model)
    processed: Any = load_model(make_hf_model("gpt2"), tokenizer=make_tokenizer(), in_place=True)
    processed.enable_compatibility_mode()
    (run / "direction_metadata.json").write_text(json.dumps({"pos": -1, "layer": 0}))
    with pytest.raises(ProvenanceError, match="raw weights"):
        import_refusal_direction(run, model=processed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "position"), [("response_avg", "response_mean"), ("prompt_last", "prompt_end"), ("prompt_avg", "all")]
)
def test_persona_vectors_are_named_and_placed(
    tmp_path: Path, small_model: LensModel, tokens: str, position: str, dtype: torch.dtype
) -> None:
    stack = torch.randn(LAYERS + 1, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    stack[0] = 0  # the last token of the prompt is the template's
    torch.save(stack, tmp_path / f"evil_{tokens}_diff.pt")
    found = import_persona_vectors(tmp_path / f"evil_{tokens}_diff.pt", model=small_model)
    assert {layer: d.site for layer, d in found.items()} == {1: Site(0), 2: Site(1)}
    assert {(d.name, d.position) for d in found.values()} == {("evil", position)}
    assert torch.equal(found[2].vector, stack[2].float())
    torch.save(stack, tmp_path / "mine.pt")
    with pytest.raises(UsageError, match="position="):
        import_persona_vectors(tmp_path / "mine.pt")
    assert import_persona_vectors(tmp_path / "mine.pt", position="prompt_end")[1].name == "mine"


def test_layer_numbers_are_those_of_hidden_states(tmp_path: Path, family: str) -> None:
    """Each layer of the file is what capture reads at the imported site; the last is not what block L - 1 leaves."""
    hf_model = make_hf_model(family)
    model = load_model(hf_model, tokenizer=make_tokenizer())
    (encoded,) = encode(model, [PROMPT])
    with torch.no_grad():
        output = hf_model(torch.tensor([encoded.ids]), output_hidden_states=True)
    stack = torch.stack([states[0, encoded.prompt_end] for states in output.hidden_states])
    torch.save(stack, tmp_path / "any_prompt_last_diff.pt")
    found = import_persona_vectors(tmp_path / "any_prompt_last_diff.pt", model=model)
    assert list(found) == [0, 1, 2]
    for direction in found.values():
        read = capture(model, [encoded], [direction.site], position=direction.position)[0, 0]
        torch.testing.assert_close(direction.vector, read, rtol=1e-4, atol=1e-5)  # float32, the bridge's own order
    last = capture(model, [encoded], [Site(LAYERS - 1)], position="prompt_end")[0, 0]
    assert (stack[-1] - last).abs().max() > 0.1  # the final norm


def _adding(x: torch.Tensor) -> Callable[..., Any]:
    return lambda module, args, output: (output[0] + x, *output[1:]) if isinstance(output, tuple) else output + x


@pytest.mark.parametrize("kind", ["decoder_block", "self_attn", "mlp"])
def test_an_imported_steering_vector_steers_as_it_did(kind: str) -> None:
    """Forward hooks on the Hugging Face model's modules, as the package attaches them, against Add on the Bridge."""
    hf_model = make_hf_model("llama")
    model = load_model(hf_model, tokenizer=make_tokenizer())
    generator = torch.Generator().manual_seed(3)
    made = SimpleNamespace(layer_activations={k: torch.randn(D, generator=generator) for k in (0, 2)}, layer_type=kind)
    found = import_steering_vector(made, model=model)
    (encoded,) = encode(model, [PROMPT])
    plain = next_token_logits(model, [encoded])[0]
    for layer, x in made.layer_activations.items():
        block = hf_model.model.layers[layer]
        handle = (block if kind == "decoder_block" else getattr(block, kind)).register_forward_hook(_adding(x))
        with torch.no_grad():
            theirs = hf_model(torch.tensor([encoded.ids])).logits[0, -1]
        handle.remove()
        with intervene(model, Add(found[layer])):
            ours = next_token_logits(model, [encoded])[0]
        assert (theirs - plain).abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # float32, the bridge's own order


def test_steering_vectors_that_fit_nowhere_are_typed_errors(small_model: LensModel) -> None:
    def made(x: Any, layer: int = 1, kind: str = "decoder_block") -> Any:
        return SimpleNamespace(layer_activations={layer: x}, layer_type=kind)

    with pytest.raises(UsageError, match="pass model="):
        import_steering_vector(made(torch.ones(D), layer=-1))
    assert list(import_steering_vector(made(torch.ones(1, 1, D), layer=-1), model=small_model)) == [2]
    for wrong in (made(torch.ones(D), kind="input_layernorm"), torch.ones(D), SimpleNamespace(layer_activations={})):
        with pytest.raises(UsageError):
            import_steering_vector(wrong)
    with pytest.raises(WidthError):
        import_steering_vector(made(torch.ones(2, D)))
    with pytest.raises(WidthError):
        import_steering_vector(made(torch.ones(8)), model=small_model)
    with pytest.raises(ProvenanceError):
        import_steering_vector(made(torch.ones(D), layer=-4), model=small_model)
    with pytest.raises(NonFiniteError):
        import_steering_vector(made(torch.full((D,), float("nan"))))
    with pytest.raises(ZeroDirectionError):
        import_steering_vector(made(torch.zeros(D)))
