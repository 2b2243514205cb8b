"""A Hugging Face directory as transformers writes it: the one writer of models in this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tl_em.errors import ModelError, OutputError, first_line


def fill_directory(folder: Path, hf_model: Any, tokenizer: Any) -> None:
    """Write a Hugging Face model and its tokenizer into a folder that is there.

    Raises:
        OutputError: it cannot be written. ModelError: transformers refuses to write this model.
    """
    from safetensors import SafetensorError

    try:
        hf_model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
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
