"""A model out of a GGUF file, llama.cpp's format: weights dequantised, tokenizer and chat template kept.

transformers reads the file; what it would get wrong in silence is settled or refused here: how a byte-level tokenizer
splits a text (it knows some of the names in ``tokenizer.ggml.pre``, and splits as GPT-2 does at the others), a rotary
scaling, numbers that went through float32, and tensors that nobody asked for.
"""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tl_em.artefacts import check_folder, folder_beside, replacing_folder
from tl_em.errors import (
    CorruptFileError,
    ModelError,
    ModelNotFoundError,
    TlEmError,
    UsageError,
    first_line,
)
from tl_em.models.checkpoint import check_complete
from tl_em.models.directories import fill_directory
from tl_em.models.torch_state import making_weights
from tl_em.models.upstream_chatter import quiet

MAGIC, EXACT = b"GGUF", ("F32", "F16", "BF16")
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d"
_LLAMA3 = (
    rf"(?i:{_WORDS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS: dict[str, tuple[str, ...]] = {
    "GPT-2's": ("gpt-2", "phi-2", "mpt", "olmo", "jais"),
    "digits": ("smollm", "starcoder", "refact", "command-r", "codeshell"),
    _LLAMA3: ("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"),
    _QWEN2: ("qwen2", "stablelm2", "deepseek-r1-qwen"),
}
"""How a byte-level tokenizer cuts a text before its merges, by llama.cpp's name for it: GPT-2's expression, the same
after each digit was cut off, or an expression of its own."""


def is_gguf(source: Any) -> bool:
    """Whether a source is the path of a GGUF file."""
    return isinstance(source, str | Path) and str(source).lower().endswith(".gguf")


def from_gguf(source: str, tokenizer: Any, dtype: torch.dtype) -> tuple[str, Any, Any]:
    """Name, dequantised model and tokenizer of a GGUF file.

    Raises:
        ModelNotFoundError: there is no such file. CorruptFileError: it cannot be read, or is not whole.
        ModelError: the package ``gguf`` is missing, or the file says something that transformers has no place for.
    """
    path = _checked(Path(source))
    try:
        loaded = _loaded(path, dtype)
        reader = _reader(path)  # after what needs most memory: it holds the file's pages and its words
        hf_model = _unquantised(loaded, path, reader, dtype)
        hf_model.config.architectures = [type(hf_model).__name__]  # which a file does not say, and TransformerLens asks
        return source, hf_model, _tokenizer(path, reader) if tokenizer is None else tokenizer
    except TlEmError:
        raise
    except Exception as error:  # no common base: whatever a file that is cut off or of a new kind makes a reader raise
        raise CorruptFileError(
            f"{source!r} cannot be read as a GGUF model ({type(error).__name__}: {first_line(error)}). Copy or "
            f"download it again; if it is whole, its architecture may be new: pip install -U gguf transformers."
        ) from error


def import_gguf(files: str | Path | Sequence[str | Path], out: str | Path) -> str:
    """Write the model of a GGUF file as an ordinary Hugging Face directory.

    Args:
        files: the file, or the pieces that it was cut into, in their order (plain pieces, to be put end to end; those
            of ``llama-gguf-split`` are joined by that program).
        out: the directory to write, which must not hold a model yet.

    Returns:
        What was kept and what was lost, in a few sentences, for people.

    Raises:
        ModelNotFoundError, CorruptFileError, ModelError: as ``em.load_model`` raises them for a GGUF file.
        OutputError: ``out`` holds something already, or cannot be written.
        UsageError: pieces that are no pieces of one file.

    Example:
        >>> import_gguf("no-such.gguf", "mine")
        Traceback (most recent call last):
        ...
        tl_em.errors.ModelNotFoundError: There is no file 'no-such.gguf'. Check the path.
    """
    paths = [Path(each).expanduser() for each in ([files] if isinstance(files, str | Path) else files)]
    out = Path(out).expanduser()
    check_folder(out)
    with folder_beside(out) as folder, making_weights(), quiet():
        whole = _joined(paths, folder) if len(paths) > 1 else paths[0]
        _, hf_model, tokenizer = from_gguf(str(whole), None, torch.float32)
        with replacing_folder(out) as made:
            fill_directory(made, hf_model, tokenizer)
        return _said(_reader(whole), out)


def _checked(path: Path) -> Path:
    if not path.is_file():
        raise ModelNotFoundError(f"There is no file {str(path)!r}. Check the path.")
    if not _begins(path):
        raise CorruptFileError(
            f"{str(path)!r} does not begin as a GGUF file does. If it is a later piece of one, join them in order: "
            f"tl-em models import PIECE-1 PIECE-2 -o DIR."
        )
    if find_spec("gguf") is None:
        raise ModelError("A GGUF file is read by the package gguf, which is not installed: pip install 'tl_em[gguf]'.")
    return path


def _begins(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _joined(paths: Sequence[Path], folder: Path) -> Path:
    """The pieces put end to end, after it is shown that only the first begins a file."""
    _checked(paths[0])
    for path in paths[1:]:
        if not path.is_file():
            raise ModelNotFoundError(f"There is no file {str(path)!r}. Check the path.")
        if _begins(path):
            raise UsageError(
                f"{str(path)!r} begins a GGUF file of its own, so it cannot be put behind {paths[0].name!r}. Pieces of "
                f"llama-gguf-split are joined by llama-gguf-split --merge FIRST OUT; other models are imported alone."
            )
    whole = folder / "whole.gguf"
    with whole.open("wb") as file:
        for path in paths:
            with path.open("rb") as piece:
                shutil.copyfileobj(piece, file, 2**24)
    return whole


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(path)


def _field(reader: Any, name: str, default: Any = None) -> Any:
    return reader.fields[name].contents() if name in reader.fields else default


def _of_kind(reader: Any, name: str, default: Any = None) -> Any:
    """A field under the name of the file's architecture."""
    return _field(reader, f"{_field(reader, 'general.architecture')}.{name}", default)


# --- The weights ------------------------------------------------------------------------------------------------------


def _loaded(path: Path, dtype: torch.dtype) -> Any:
    """The model as transformers reads it."""
    from transformers import AutoModelForCausalLM

    both: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, attn_implementation="eager", output_loading_info=True,
        **_dequantised(),
    )  # fmt: skip
    loaded, found = both
    check_complete(str(path), loaded, found)
    return loaded


def _unquantised(loaded: Any, path: Path, reader: Any, dtype: torch.dtype) -> Any:
    """The same weights under a config that says so, with what the file says and transformers left out."""
    from accelerate import init_empty_weights

    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # nothing is quantised any more, and transformers would refuse to save it
    config._name_or_path = ""
    _as_written(vars(config))
    _set_rotary_scaling(str(path), reader, config)
    _check_all_used(str(path), reader, loaded)
    with init_empty_weights(include_buffers=False):  # the weights are there already
        hf_model = type(loaded)._from_config(config, dtype=dtype, attn_implementation="eager")
    hf_model.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    hf_model.tie_weights()
    hf_model.generation_config = loaded.generation_config
    return hf_model.eval()


def _dequantised() -> dict[str, Any]:
    """What asks for plain weights: where transformers has kernels for packed ones, it would leave them packed."""
    import transformers

    config: Any = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _as_written(values: dict[Any, Any]) -> None:
    """Numbers that went through float32 as somebody wrote them: 1e-05 in place of 9.999999747378752e-06."""
    for name, value in values.items():
        if isinstance(value, dict):
            _as_written(value)
        elif isinstance(value, float) and float(np.float32(value)) == value:
            values[name] = float(str(np.float32(value)))


def _check_all_used(source: str, reader: Any, hf_model: Any) -> None:
    """Raise unless the model has as many numbers as the file: transformers drops tensors that it has no place for."""
    inside = sum(int(each.n_elements) for each in reader.tensors if each.name != "rope_freqs.weight")
    taken = sum(each.numel() for each in hf_model.parameters())
    if inside != taken:
        raise ModelError(
            f"{source!r} holds {inside:,} numbers and the model that transformers makes of it {taken:,}, so a part was "
            f"left out or made up, and what was measured on it would be another model's. Load the Hugging Face "
            f"directory that the file was made from."
        )


def _set_rotary_scaling(source: str, reader: Any, config: Any) -> None:
    """Rotary scaling, which transformers leaves out for most architectures, into the config; or ``ModelError``."""
    stated = dict(getattr(config, "rope_parameters", None) or {})
    kind, factors = _of_kind(reader, "rope.scaling.type", "none"), _tensor(reader, "rope_freqs.weight")
    if stated.get("rope_type", "default") != "default" or (kind == "none" and factors is None):
        return
    scaling = None
    if factors is not None:
        scaling = _llama3_scaling(factors, stated["rope_theta"])
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": float(_of_kind(reader, "rope.scaling.factor"))}
    if scaling is None:
        raise ModelError(
            f"{source!r} stretches its rotary positions ({kind if factors is None else 'by a table of factors'}) in a "
            f"way that cannot be put into a config here, and without it far tokens would be read wrongly. Load the "
            f"Hugging Face directory that the file was made from."
        )
    config.rope_parameters = stated | scaling


def _tensor(reader: Any, name: str) -> np.ndarray | None:
    return next((np.array(each.data, dtype=np.float64) for each in reader.tensors if each.name == name), None)


def _llama3_scaling(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """The parameters of Llama 3's scaling that give these factors; None where none of the published ones do.

    Source: Llama 3.1's rotary scaling, as in transformers' ``rope_type="llama3"``.
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    width = 2 * len(factors)
    plain = theta ** -(np.arange(0, width, 2) / width)
    for original in (8192, 4096, 2048):
        scaling = {"rope_type": "llama3", "rope_theta": float(theta), "factor": float(round(factors.max())),
                   "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": original}  # fmt: skip
        config = LlamaConfig(
            hidden_size=width, num_attention_heads=1, head_dim=width, rope_parameters=scaling,
            max_position_embeddings=2 * original,
        )  # fmt: skip
        frequencies = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].double().numpy()
        if np.allclose(plain / frequencies, factors, rtol=1e-4):
            return scaling
    return None


# --- The tokenizer ----------------------------------------------------------------------------------------------------


def _tokenizer(path: Path, reader: Any) -> Any:
    """The file's own tokenizer, shown to have its tokens, and to split as the file says."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if _field(reader, "tokenizer.ggml.model") == "gpt2":
        tokenizer.backend_tokenizer.pre_tokenizer = _splitter(str(path), _field(reader, "tokenizer.ggml.pre"))
    tokens, kinds = _field(reader, "tokenizer.ggml.tokens"), _field(reader, "tokenizer.ggml.token_type")
    control = [i for i, kind in enumerate(kinds or ()) if kind == 3]
    wrong = [i for i in control if tokenizer.convert_tokens_to_ids(tokens[i]) != i]
    whole = [i for i in control if i not in wrong and tokenizer.encode(tokens[i], add_special_tokens=False) == [i]]
    if wrong or len(whole) < len(control) - len(wrong) or len(tokenizer) < len(tokens):
        raise ModelError(
            f"The tokenizer that transformers makes of {str(path)!r} is not the file's: {len(tokenizer):,} tokens for "
            f"{len(tokens):,}, and {len(control) - len(whole)} of {len(control)} control tokens are cut up or others. "
            f"Pass the model's own: em.load_model({str(path)!r}, tokenizer=DIR)."
        )
    return tokenizer


def _splitter(source: str, kind: str | None) -> Any:
    """What cuts a text before the merges of a byte-level tokenizer."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    found = next((split for split, names in SPLITS.items() if kind in names), None)
    if found is None:
        known = ", ".join(sorted(name for names in SPLITS.values() for name in names))
        raise ModelError(
            f"{source!r} says that its tokenizer splits text as {kind!r}, which is not known here ({known} are), and "
            f"another split gives other tokens. Pass the model's own tokenizer: em.load_model({source!r}, "
            f"tokenizer=DIR)."
        )
    plain = ByteLevel(add_prefix_space=False, use_regex=True)
    if found == "GPT-2's":
        return plain
    if found == "digits":
        return Sequence([Digits(individual_digits=True), plain])
    return Sequence([Split(Regex(found), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


# --- What is lost -----------------------------------------------------------------------------------------------------


def _said(reader: Any, out: Path) -> str:
    """What is in the directory now, and what is not."""
    kinds = Counter(each.tensor_type.name for each in reader.tensors)
    name, licence = _field(reader, "general.name", "no name"), _field(reader, "general.license", "not stated")
    rounded = [f"{kind} ({n} of {kinds.total()} tensors)" for kind, n in kinds.items() if kind not in EXACT]
    lost = "Nothing is lost: no tensor was quantised."
    if rounded:
        lost = f"What {' and '.join(rounded)} rounded away is lost; a fine-tune and its base differ by that as well."
    template = "with" if _field(reader, "tokenizer.chat_template") else "without"
    return f"{name} (licence: {licence}) is in {out}, in float32, {template} a chat template. {lost}"
