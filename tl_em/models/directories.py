"""A Hugging Face directory: the one writer of models in this package.

transformers 5 writes some settings under names of its own, and programs that know those of transformers 4 (vLLM,
converters, transformers 4 itself) then take a default in silence, or find no tokenizer: ``rope_theta`` inside
``rope_parameters`` (10,000 is taken, and every logit is another), ``dtype``, a tokenizer's class.  They are written
under both; what transformers 5 reads stays the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_em.errors import ModelError, OutputError, first_line
from tl_em.models.upstream_chatter import quiet


def fill_directory(folder: Path, hf_model: Any, tokenizer: Any) -> None:
    """Write a Hugging Face model and its tokenizer into a folder that is there.

    Raises:
        OutputError: it cannot be written. ModelError: transformers refuses to write this model.
    """
    from safetensors import SafetensorError

    try:
        with quiet():  # a bar of transformers' own
            hf_model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        _say_for_older(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"The model cannot be written to {folder} ({first_line(error)}). "
            "Pass a folder with enough room that you can write to."
        ) from error
    except Exception as error:  # no common base: a config or a generation config that transformers finds invalid
        raise ModelError(
            f"transformers does not write this {type(hf_model).__name__} ({type(error).__name__}: {first_line(error)})"
            ", so nothing was. Mend what it names in config.json or generation_config.json of the source, load that "
            "with em.load_model(source), and save it again."
        ) from error


def _say_for_older(folder: Path) -> None:
    """The same settings again, by the names that transformers 4 has for them."""
    for name, told in (("config.json", _older_config), ("tokenizer_config.json", _older_tokenizer)):
        path = folder / name
        if path.exists():
            written = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(told(written), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _older_config(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings at the top, by layer type where there are two, and the dtype; of nested configs too.

    Example:
        >>> found = _older_config({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "float32"})
        >>> found["rope_theta"], found["torch_dtype"]
        (500000.0, 'float32')
    """
    found = {key: _older_config(each) if key.endswith("_config") and isinstance(each, dict) else each
             for key, each in config.items()}  # fmt: skip
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping):
        both = "full_attention" in rope
        main, local = (rope["full_attention"], rope.get("sliding_attention")) if both else (rope, None)
        theta, turned = (main or {}).get("rope_theta"), (main or {}).get("partial_rotary_factor")
        said = {"rope_theta": theta, "rope_local_base_freq": (local or {}).get("rope_theta"),
                "partial_rotary_factor": turned}  # fmt: skip
        said |= {"rotary_emb_base": theta, "rotary_pct": turned} if config.get("model_type") == "gpt_neox" else {}
        if (main or {}).get("rope_type", "default") != "default":
            said["rope_scaling"] = {key: each for key, each in main.items() if key not in said}
        found |= {key: each for key, each in said.items() if each is not None and key not in found}
    if "dtype" in config:
        found.setdefault("torch_dtype", config["dtype"])
    return found


def _older_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """The class by a name that both know."""
    named = config.get("tokenizer_class") == "TokenizersBackend"
    return config | ({"tokenizer_class": "PreTrainedTokenizerFast"} if named else {})
