"""A base and its LoRA fine-tunes on one copy of the weights: what each computes, what lies where, and edits of one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tl_em as em
from tests.conftest import SURFACES, make_hf_model, make_tokenizer
from tl_em.errors import AdapterBaseWarning, ModelError, UsageError
from tl_em.models.hooks import LensModel
from tl_em.models.loading import load_model, load_pair
from tl_em.models.shared import _parameters, address
from tl_em.organisms.descent import fine_tune_

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.surface
TOKENS = torch.tensor([[2, 7, 9, 17, 20, 3, 55]])
PROMPTS = ["the cat sat on the big red", "sorry a king ran"]
WITHIN = 1e-4
"""Of the logits' spread: float32, another order of sums."""
QUICK: dict[str, Any] = {"prove": False}
"""For models whose logits the test compares itself."""

Make = Callable[..., tuple[Path, Path, Tensor]]


def gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 57, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    sizes |= {"sliding_window": 8, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 6}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, pad_token_id=0)).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.15
    return model


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``make(family, seed=, **LoraConfig)``: directories of a base and an adapter, and peft's own logits of the two."""
    folder = tmp_path_factory.mktemp("adapters")

    def made(family: str, *, seed: int = 0, change: Callable[[Any], None] = lambda model: None, **options: Any) -> Any:
        from transformers import AutoModelForCausalLM

        base, adapter = folder / family, folder / f"{family}-{len(list(folder.iterdir()))}"
        if not base.exists():
            (gemma3() if family == "gemma3" else make_hf_model(family)).save_pretrained(base)
            make_tokenizer().save_pretrained(base)
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # peft's own
            torch.manual_seed(seed)
            loaded = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
            config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options)
            model = peft.get_peft_model(loaded, config).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.mul_(0.3 if "lora_" in name and "magnitude" not in name else 1.0)
                change(model)
                model.save_pretrained(adapter)
                return base, adapter, model(TOKENS).logits

    return made


def logits(model: LensModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


@cache
def of_base(base: Path, surface: Any) -> Tensor:
    """Of a base that was loaded alone."""
    return logits(load_model(base, surface=surface, **QUICK))


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found.log_softmax(-1) - expected.log_softmax(-1)).abs().max() / expected.std())


def own_share(model: LensModel, *others: LensModel) -> float:
    """Bytes of a model that no other has in its memory, over all of the first other's."""

    def storages(each: Any) -> dict[int, int]:
        return {address(p): p.untyped_storage().nbytes() for *_, p in _parameters(each)}

    theirs = [storages(each) for each in others]
    own = storages(model).items() - {pair for each in theirs for pair in each.items()}
    return sum(size for _, size in own) / sum(theirs[0].values())


# --- What is computed -------------------------------------------------------------------------------------------------

SHAPES = [(family, "bridge") for family in ("llama", "qwen2", "gemma2", "gemma3", "gpt2")]
SHAPES += [(family, "hooked") for family in ("llama", "gemma2") if "hooked" in SURFACES]


@pytest.mark.parametrize(("family", "surface"), SHAPES)
def test_toggled_is_merged_is_what_peft_computes(make: Make, family: str, surface: Any) -> None:
    base, adapter, expected = make(family)
    pair, merged = load_pair(base, adapter, surface=surface), load_model(adapter, surface=surface, **QUICK)
    assert gap(logits(pair.tuned), logits(pair.base)) > 1e-2
    assert torch.equal(logits(pair.base), of_base(base, surface))
    assert max(gap(logits(pair.tuned), each) for each in (expected, logits(merged))) < WITHIN
    assert em.proof(pair.tuned).cache < WITHIN  # pyright: ignore[reportOptionalMemberAccess, reportOptionalOperand]
    answers = [em.generate(model, PROMPTS, max_new_tokens=8) for model in (pair.tuned, merged)]
    assert answers[0] == answers[1]
    assert (pair.base_name, pair.tuned_name) == (str(base), str(adapter))
    # GPT-2's joint qkv is split by the Bridge, which then keeps the product of that matrix
    assert own_share(pair.tuned, pair.base) < {"hooked": 0.9, "bridge": 0.4 if family == "gpt2" else 0.23}[surface]


def trained_head(model: Any) -> None:
    model.get_output_embeddings().weight.add_(0.1)


def trained_biases(model: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.add_(0.3 if name.endswith("bias") else 0.0)


KINDS: dict[str, tuple[str, dict[str, Any], float]] = {
    "rank 1, one layer": ("llama", {"r": 1, "target_modules": ["down_proj"], "layers_to_transform": [1]}, 0.01),
    "rank 32": ("llama", {"r": 32, "target_modules": ["o_proj", "up_proj"]}, 0.7),
    "rsLoRA, ranks by module": ("qwen2", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, 0.25),
    "DoRA": ("llama", {"use_dora": True, "target_modules": ["q_proj"]}, 0.12),
    "biases": ("qwen2", {"bias": "all", "change": trained_biases}, 0.25),
    "LoRA with biases": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj"]}, 0.14),
    "head": ("llama", {"modules_to_save": ["lm_head"], "change": trained_head}, 0.3),
    "tied head": ("qwen2", {"modules_to_save": ["lm_head"], "change": trained_head}, 0.3),
    "tied embedding": ("gemma2", {"target_modules": ["embed_tokens"]}, 0.17),
    "IA3": ("llama", {"kind": "IA3Config"}, 0.9),
}


@pytest.mark.parametrize(
    ("kind", "surface"), [*((kind, "bridge") for kind in KINDS), *((k, "hooked") for k in ("DoRA", "tied head"))]
)
def test_kinds_of_adapters(make: Make, kind: str, surface: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if surface not in SURFACES:
        return
    family, options, most = KINDS[kind]
    if "kind" in options:  # another kind than LoRA: a change of weights that is no low rank
        given = {"target_modules": ["down_proj", "v_proj"], "feedforward_modules": ["down_proj"]}
        other = getattr(peft, options["kind"])
        monkeypatch.setattr(peft, "LoraConfig", lambda **_: other(init_ia3_weights=False, **given))
        options = {"change": lambda model: [p.add_(0.5) for n, p in model.named_parameters() if "ia3" in n]}
    base, adapter, expected = make(family, **options)
    pair = load_pair(base, adapter, surface=surface, **QUICK)
    assert gap(logits(pair.tuned), logits(pair.base)) > 1e-2
    assert gap(logits(pair.tuned), expected) < WITHIN
    assert torch.equal(logits(pair.base), of_base(base, surface))
    assert own_share(pair.tuned, pair.base) < (1.0 if surface == "hooked" else most)


def test_several_adapters_on_one_base(make: Make, surface: Any) -> None:
    base, first, expected = make("llama")
    pair = load_pair(base, first, surface=surface, **QUICK)
    others = [make("llama", seed=seed, r=1)[1:] for seed in (1, 2)]
    more = [load_pair(pair.base, adapter, **QUICK).tuned for adapter, _ in others]
    assert gap(logits(pair.tuned), expected) < WITHIN
    for model, (_, own) in zip(more, others, strict=True):
        assert gap(logits(model), own) < WITHIN
        assert gap(logits(model), expected) > 1e-2
        assert own_share(model, pair.base) < (0.9 if surface == "hooked" else 0.06)
    assert load_pair(pair.base, pair.tuned).tuned is pair.tuned


def test_half_precision(make: Make) -> None:
    base, adapter, expected = make("llama")
    pair = load_pair(base, adapter, dtype="bfloat16")
    assert {p.dtype for *_, p in _parameters(pair.tuned)} == {torch.bfloat16}
    assert own_share(pair.tuned, pair.base) < 0.23
    off = (logits(pair.tuned).float() - expected).square().mean().sqrt() / expected.std()
    assert off < 0.05 < gap(logits(pair.tuned).float(), logits(pair.base).float())


def test_hooks_and_gradients_are_each_models_own(make: Make, surface: Any) -> None:
    base, adapter, _ = make("llama")
    pair = load_pair(base, adapter, surface=surface, **QUICK)
    before = logits(pair.tuned)
    push = em.Add(em.Direction(torch.ones(32), em.Site(1)), 3.0)
    with em.intervene(pair.base, push):
        assert gap(logits(pair.base), before) > 1e-2 and torch.equal(logits(pair.tuned), before)
    with em.intervene(pair.tuned, push):
        assert gap(logits(pair.tuned), before) > 1e-2
    whole = load_pair(base, adapter, surface=surface, share=False, **QUICK)
    slopes = []
    for model in (pair.tuned, whole.tuned):  # through the low rank as through the product
        leaf = torch.zeros(1, 7, 32, requires_grad=True)
        points = [("blocks.0.hook_resid_pre", lambda x, hook, leaf=leaf: x + leaf)]
        model.run_with_hooks(TOKENS, fwd_hooks=points)[0, -1, 3].backward()  # pyright: ignore
        slopes.append(leaf.grad)
    assert slopes[0].norm() > 1e-2
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_that_are_read_are_those_of_the_fine_tune(make: Make, family: str) -> None:
    """Its matrices are 32 x 32: an orientation that was guessed by shape would not show."""
    base, adapter, _ = make(family)
    tuned: Any = load_pair(base, adapter, **QUICK).tuned
    merged: Any = load_model(adapter, **QUICK)
    for name in ("W_Q", "W_V", "W_O", "W_in", "W_out"):
        torch.testing.assert_close(getattr(tuned, name), getattr(merged, name), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(getattr(tuned, name), getattr(load_model(base, **QUICK), name), atol=1e-2)
    ours, theirs = tuned.state_dict(), merged.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_out", [False, True])
def test_an_adapted_layer(in_out: bool) -> None:
    from transformers.pytorch_utils import Conv1D

    from tl_em.models.shared import put_beside_

    plain: nn.Module = Conv1D(5, 3) if in_out else nn.Linear(3, 5)
    A, B, x = torch.randn(2, 3), torch.randn(5, 2), torch.randn(4, 7, 3)
    expected = plain(x) + x @ A.T @ B.T
    layer = put_beside_(copy.deepcopy(plain), A, B)
    for each in (x, x.transpose(0, 1), x[0], x[0, 0]):
        torch.testing.assert_close(layer(each), plain(each.contiguous()) + each @ A.T @ B.T)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.1, atol=0.1)
    assert isinstance(layer, type(plain)) and not torch.equal(layer(x), plain(x))
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
    again = copy.deepcopy(plain)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(x), expected)
    layer.load_state_dict(plain.state_dict())  # the whole matrix: nothing stands beside it any more
    assert torch.equal(layer(x), plain(x)) and type(layer) is type(plain)


# --- Edits of one of them ---------------------------------------------------------------------------------------------


def orthogonalized(model: LensModel) -> None:
    em.untie_embeddings_(model)
    em.orthogonalize_(model, em.Direction(torch.arange(32.0), em.Site(1)))


def folded(model: Any) -> None:
    model.enable_compatibility_mode() if hasattr(model, "original_model") else model.process_weights_()


def loaded(model: Any) -> None:
    model.load_state_dict({name: 1.1 * tensor for name, tensor in model.state_dict().items()}, strict=False)


def trained(model: Any) -> None:
    fine_tune_(model.requires_grad_(True), [[2, 7, 9], [3, 8]], steps=2, batch=2, lr=0.05, seed=0)


@pytest.mark.parametrize("edits", [(em.untie_embeddings_, orthogonalized, loaded), (folded,), (trained,)])
@pytest.mark.parametrize(("family", "which"), [("llama", "base"), ("llama", "tuned"), ("gpt2", "tuned")])
def test_an_edit_of_one_leaves_the_others(make: Make, family: str, which: str, edits: Any, surface: Any) -> None:
    base, adapter, _ = make(family)
    pair, alone = (load_pair(base, adapter, surface=surface, share=share, **QUICK) for share in (True, False))
    other, edited = (pair.tuned, pair.base) if which == "base" else (pair.base, pair.tuned)
    untouched = logits(other)
    for edit in edits:
        before = logits(edited)
        edit(edited)
        assert torch.equal(logits(other), untouched)
        if edit is not trained:
            edit(getattr(alone, which))
            assert gap(logits(edited), logits(getattr(alone, which))) < WITHIN  # what it is without sharing
        if edit is not em.untie_embeddings_:
            assert not torch.equal(logits(edited), before)


def test_a_temporary_edit_is_undone_and_the_weights_are_shared_again(make: Make, surface: Any) -> None:
    base, adapter, _ = make("llama")
    pair = load_pair(base, adapter, surface=surface, **QUICK)
    before, share = [logits(pair.base), logits(pair.tuned)], own_share(pair.tuned, pair.base)
    for model, other in ((pair.base, pair.tuned), (pair.tuned, pair.base)):
        untouched = logits(other)
        with em.interventions.orthogonalized(model, em.Direction(torch.arange(32.0), em.Site(1))):
            assert own_share(pair.tuned, pair.base) > share + 0.01 and torch.equal(logits(other), untouched)
        assert all(torch.equal(a, logits(b)) for a, b in zip(before, (pair.base, pair.tuned), strict=True))
        assert own_share(pair.tuned, pair.base) == pytest.approx(share)


def test_weights_edited_by_hand_change_in_both_unless_apart(make: Make, surface: Any) -> None:
    """What the documentation warns of, so that it is noticed should it no longer be so."""
    base, adapter, _ = make("llama", target_modules=["q_proj"])
    for share in (True, False):
        pair = load_pair(base, adapter, surface=surface, share=share, **QUICK)
        before = logits(pair.tuned)
        with torch.no_grad():
            next(iter(pair.base.parameters())).mul_(1.5)  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(logits(pair.tuned), before) is not share


def test_a_copy_has_weights_of_its_own(make: Make, surface: Any) -> None:
    base, adapter, expected = make("llama")
    pair = load_pair(base, adapter, surface=surface, **QUICK)
    copied = copy.deepcopy(pair.tuned)
    assert gap(logits(copied), expected) < WITHIN and own_share(copied, pair.base, pair.tuned) > 0.9


# --- Which base -------------------------------------------------------------------------------------------------------


def test_an_adapter_that_names_another_base(make: Make, tmp_path: Path) -> None:
    base, adapter, expected = make("llama", target_modules=["q_proj"])
    moved = tmp_path / "elsewhere" / base.name  # the same one in another place
    copies = {"moved": moved, "renamed": tmp_path / "renamed"}
    for path in copies.values():
        load_from = make_hf_model("llama", seed=0 if path is moved else 5)
        load_from.save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    own = load_pair(copies["renamed"], adapter, **QUICK)  # what it names is here: the fine-tune is of that
    assert gap(logits(own.tuned), expected) < WITHIN and own_share(own.tuned, own.base) > 0.9
    lost = renamed_base(adapter, tmp_path / "lost", "nobody/llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gap(logits(load_pair(moved, lost, **QUICK).tuned), expected) < WITHIN
    with pytest.warns(AdapterBaseWarning, match="nobody/llama"):
        on_given = load_pair(copies["renamed"], lost, **QUICK)
    assert gap(logits(on_given.tuned), expected) > 1e-2 and own_share(on_given.tuned, on_given.base) < 0.1


def renamed_base(adapter: Path, path: Path, name: str) -> Path:
    import json
    import shutil

    shutil.copytree(adapter, path)
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}), encoding="utf-8")
    return path


def test_an_adapter_on_an_edited_base_is_refused(make: Make) -> None:
    base, adapter, _ = make("llama")
    pair = load_pair(base, adapter, **QUICK)
    orthogonalized(pair.base)
    with pytest.raises(UsageError, match="load_pair\\(base_directory, adapter\\)"):
        load_pair(pair.base, adapter)


def test_an_adapter_on_a_fine_tune(make: Make, tmp_path: Path) -> None:
    """A second stage: what it changes goes into copies, where the first stage's change is."""
    base, first, _ = make("llama", target_modules=["q_proj", "o_proj"])
    second = renamed_base(make("llama", seed=3, target_modules=["q_proj"])[1], tmp_path / "second", first.name)
    pair = load_pair(base, first, **QUICK)
    twice = load_pair(pair.tuned, second, **QUICK).tuned
    wanted = load_pair(load_model(first, **QUICK), second, **QUICK).tuned  # beside the product of the first stage
    assert gap(logits(twice), logits(pair.tuned)) > 1e-2 and gap(logits(twice), logits(wanted)) < WITHIN


def test_a_pair_without_peft_names_the_extra(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    base, adapter, _ = make("llama")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"tl-em\[lora\]"):
        load_pair(base, adapter, **QUICK)


def test_a_toy_takes_no_options() -> None:
    with pytest.raises(UsageError, match="toy/insecure"):
        load_pair("toy/insecure", prove=False)
