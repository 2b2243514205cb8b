"""A PEFT adapter on its base: whole, this base's own, and then part of the weights, or beside weights that stay shared.

peft leaves out what an adapter's file lacks, writes some of it over the base's own tensors, and merges into matrices
that two modules may hold; it only logs, or says nothing. Here each is looked after, and the model that results is
compared with peft's own forward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tl_em.artefacts import json_of
from tl_em.errors import AdapterBaseWarning, CorruptFileError, ModelError, first_line
from tl_em.models.shared import put_beside_

ADAPTER, CONFIG = "adapter_config.json", "config.json"
_SEEN_TO = (
    "Model (has|with) `tie_word_embeddings=True`",
    "Input and output embeddings are no longer",
    ".*LoRA tensor.s. have invalid shape",  # said of the bias of a low rank, too; _check_whole compares every tensor
)


def is_adapter(source: Any) -> bool:
    """Whether a path is the directory of a PEFT adapter."""
    return isinstance(source, str | Path) and (Path(source) / ADAPTER).is_file()


def check_peft(path: Path) -> None:
    """Raise ``ModelError`` where peft is missing, before a base is loaded."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"{str(path)!r} holds a PEFT adapter, and the package peft, which puts it on its base, is not "
            f"installed. Install the extra: pip install 'tl-em[lora]'."
        ) from error


def with_adapter(path: Path, hf_base: Any, *, beside: bool) -> Any:
    """The base with an adapter from a directory, shown to compute what peft computes.

    Args:
        path: of the adapter.
        hf_base: a Hugging Face model, which is used up.
        beside: leave the weights that plain LoRA changes as they are, and add its low-rank change to what they give;
            else, and for everything that is no plain LoRA (DoRA, trained embeddings, other kinds), it goes into copies
            of the weights that it changes.

    Raises:
        ModelError: peft is missing, or the adapter changes no weights.
        CorruptFileError: it is not whole, is not this base's, or what results is not what peft computes.
    """
    check_peft(path)
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            for said in _SEEN_TO:
                warnings.filterwarnings("ignore", said)
            copies = _own_what_is_stored_(path, hf_base)
            peft_model = PeftModel.from_pretrained(hf_base, str(path)).eval()
            check_changes_weights(str(path), peft_model)
            _check_whole(path, peft_model)
            before = _some_logits(peft_model)
            hf_model = peft_model.get_base_model()
            _settle_(hf_model, beside)
            _put_back_(hf_model, copies)
    except (CorruptFileError, ModelError):
        raise
    except Exception as error:  # no common base: an unknown kind of adapter, a key, a shape, a truncated file
        raise CorruptFileError(
            f"The adapter in {str(path)!r} does not fit its base {base_of(path)!r} ({first_line(error)}). Use the base "
            f"that it was trained on, as base_model_name_or_path of its adapter_config.json."
        ) from error
    gap = float((_some_logits(hf_model) - before).abs().max() / before.std().clamp_min(1e-12))
    if not gap < (1e-3 if before.dtype in (torch.float32, torch.float64) else 1.0):
        raise CorruptFileError(
            f"The adapter in {str(path)!r} cannot be taken from peft's layers: log-probabilities differ by {gap:.2g} "
            f"spreads from peft's own. Load it as it is, as a PeftModel in memory: em.load_model(peft_model)."
        )
    return hf_model


def check_changes_weights(source: str, peft_model: Any) -> None:
    """Raise ``ModelError`` for an adapter that puts learned vectors before a prompt: no change of weights is that."""
    configs = getattr(peft_model, "peft_config", {})
    kinds = sorted({str(each.peft_type).split(".")[-1] for each in configs.values() if each.is_prompt_learning})
    if kinds:
        raise ModelError(
            f"The adapter of {source!r} is {kinds[0]}: it puts learned vectors before every prompt and changes no "
            f"weight, so without them the model would be its base. Use a fine-tune of the weights, e.g. LoRA."
        )


# --- Whose it is ------------------------------------------------------------------------------------------------------


def base_of(path: Path) -> str:
    """The base that an adapter names: a path, one relative to the adapter, or a hub id."""
    try:
        base = str(json_of((path / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path / ADAPTER} names no base model ({error!r}). Save the adapter again.") from error
    return str(path / base) if not Path(base).is_dir() and (path / base).is_dir() else base


def goes_on(path: Path, base: str) -> bool:
    """Whether an adapter belongs on this base; True with a warning where the base that it names is not on this machine.

    A base of the same last name is taken to be the same one in another place.
    """
    named = base_of(path)
    if Path(named).is_dir() and Path(base).is_dir():
        return Path(named).resolve() == Path(base).resolve()
    parts = Path(base).parts
    if Path(named).name.lower() == Path(base).name.lower() or f"models--{named.replace('/', '--')}" in parts:
        return True
    if Path(named).is_dir() or _is_cached(named):
        return False
    warnings.warn(
        f"The adapter in {str(path)!r} names the base {named!r}, which is not on this machine, and is put on {base!r}. "
        f"On weights that it was not trained on it would be another fine-tune: make sure that the two are the same.",
        AdapterBaseWarning,
        stacklevel=4,
    )
    return True


def _is_cached(source: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(source, CONFIG), str)
    except Exception:  # no common base: what is no hub id at all
        return False


# --- Onto the base ----------------------------------------------------------------------------------------------------


def _own_what_is_stored_(path: Path, hf_base: nn.Module) -> dict[int, nn.Parameter]:
    """Copies in place of the base's own tensors that the file holds new values of: peft would write over them."""
    stored = {key.removeprefix("base_model.model.").replace(".base_layer", "") for key in _weights(path)}
    found = dict(hf_base.named_parameters(remove_duplicate=False))
    originals = {id(found[key]): found[key] for key in stored & found.keys()}
    own = {key: nn.Parameter(weight.detach().clone(), False) for key, weight in originals.items()}
    _exchange_(hf_base, own)
    return {id(own[key]): weight for key, weight in originals.items()}


def _put_back_(hf_model: nn.Module, copies: Mapping[int, nn.Parameter]) -> None:
    """The base's own tensors, where peft put the new values elsewhere (the trained copy of a module)."""
    held = {id(p): p for p in hf_model.parameters()}
    same = {key: p for key, p in copies.items() if key in held and torch.equal(held[key], p)}
    _exchange_(hf_model, same)


def _exchange_(model: nn.Module, given: Mapping[int, nn.Parameter]) -> None:
    for module in model.modules() if given else ():
        for name, weight in module._parameters.items():
            module._parameters[name] = given.get(id(weight), weight)


def _settle_(hf_model: Any, beside: bool) -> None:
    """Plain layers in place of peft's, whose changes go into copies of the weights, or stand beside them."""
    embedding, head = _ends(hf_model)
    tied = None not in (embedding, head) and embedding is head
    for name, layer in list(_outermost(hf_model)):
        if beside and _is_plain_lora(layer) and layer is not hf_model.get_output_embeddings():
            plain = put_beside_(layer.get_base_layer(), *_low_rank(layer))
        else:
            for module in layer.modules():
                for key, weight in module._parameters.items():
                    if weight is not None:
                        module._parameters[key] = nn.Parameter(weight.detach().clone(), requires_grad=False)
            if hasattr(layer, "unload_and_optionally_merge_module"):
                plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                layer.merge()
                plain = layer.get_base_layer()
        hf_model.set_submodule(name, plain)
    if hasattr(hf_model, "peft_config"):
        del hf_model.peft_config
    embedding, head = _ends(hf_model)
    if tied and embedding is not head and torch.equal(embedding, head):
        hf_model.get_output_embeddings().weight = embedding
    elif tied and embedding is not head:
        hf_model.config.get_text_config().tie_word_embeddings = hf_model.config.tie_word_embeddings = False


def _outermost(hf_model: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's layers, by name; not those that are a part of another."""
    inside: list[str] = []
    for name, module in hf_model.named_modules():
        its_own = hasattr(module, "unload_and_optionally_merge_module") or hasattr(module, "base_layer")
        if its_own and not any(name.startswith(f"{outer}.") for outer in inside):
            inside.append(name)
            yield name, module


def _is_plain_lora(layer: Any) -> bool:
    """A low-rank change of one matrix and nothing else, the same for every token."""
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    plain = type(layer) is Linear and type(layer.base_layer) in (nn.Linear, Conv1D)
    return plain and not layer.lora_variant and not any(layer.lora_bias.values())


def _low_rank(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all active adapters together, their scale in the second."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    A = torch.cat([layer.lora_A[name].weight for name in names])
    return A, torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], 1)


def _ends(hf_model: Any) -> list[Any]:
    """The matrices of embedding and unembedding, which an adapter may be wrapped around."""
    modules = (hf_model.get_input_embeddings(), hf_model.get_output_embeddings())
    return [getattr(getattr(module, "base_layer", module), "weight", None) for module in modules]


def _some_logits(hf_model: Any) -> torch.Tensor:
    """Log-probabilities over a few tokens."""
    size = _ends(hf_model)[0].shape[0]
    tokens = torch.linspace(0, size // 2, 8).long()[None].to(next(hf_model.parameters()).device)
    with torch.no_grad():
        return hf_model(input_ids=tokens).logits.log_softmax(-1)


# --- Is it whole? -----------------------------------------------------------------------------------------------------


def _check_whole(path: Path, peft_model: Any) -> None:
    """Raise unless the adapter's file holds every tensor that its config asks for, and every one of them was taken."""
    from peft import get_peft_model_state_dict

    stored = _weights(path)
    taken = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    unused = stored.keys() - taken.keys() - peft_model.state_dict().keys()
    both = stored.keys() & taken.keys()
    changed = [key for key in both if not torch.equal(stored[key].to(taken[key].dtype), taken[key].to("cpu"))]
    trouble = {
        "asked for by its config, but not in its file": taken.keys() - stored.keys(),
        "in its file, but fit nothing in the base": unused,
        "in its file, but not what was loaded": changed,
    }
    said = told(trouble)
    if said or not taken:
        raise CorruptFileError(
            f"The adapter in {str(path)!r} is not whole on its base: {said or 'it changes no module'}. peft "
            f"would go on without those parts, and the fine-tune would look like no change. Save the adapter again "
            f"with peft_model.save_pretrained(…), and check base_model_name_or_path in adapter_config.json."
        )


def _weights(path: Path) -> dict[str, torch.Tensor]:
    from peft.utils import load_peft_weights

    return load_peft_weights(str(path), device="cpu")


def told(trouble: Mapping[str, Iterable[str]]) -> str:
    """What is wrong with which tensors: the first by name, and how many there are."""
    said = []
    for what, keys in trouble.items():
        names = sorted(map(str, keys))
        rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
        if names:
            said.append(f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:4])}{rest}) {what}")
    return "; ".join(said)
