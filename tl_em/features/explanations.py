"""What others wrote about latents: a file of explanations, and a page at Neuronpedia that is linked, never asked for.

Both are text from outside: an explanation is somebody's guess, and no test of what a latent does (``verify_feature``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_em.dictionaries import Dictionary
from tl_em.errors import CorruptFileError

_NEURONPEDIA = re.compile(r"[\w.-]+/\d+-[\w.-]+")
_INDEX, _SAID = ("index", "feature", "latent"), ("description", "explanation", "label")


def neuronpedia_link(dictionary: Dictionary, index: int) -> str | None:
    """The latent's page, where the dictionary's name is Neuronpedia's (``model/layer-source``); nothing is asked for.

    Example:
        >>> import torch
        >>> from tl_em.models.sites import Site
        >>> eye = torch.eye(4)
        >>> known = {"activation": "relu", "site_in": Site(6), "name": "gpt2-small/6-res-jb"}
        >>> neuronpedia_link(Dictionary(eye, torch.zeros(4), eye, torch.zeros(4), **known), 3)
        'https://www.neuronpedia.org/gpt2-small/6-res-jb/3'
    """
    name = dictionary.name or ""
    return f"https://www.neuronpedia.org/{name}/{index}" if _NEURONPEDIA.fullmatch(name) else None


def read_explanations(path: str | Path, dictionary: Dictionary) -> dict[int, str]:
    """Explanations of this dictionary's latents from a JSONL file; the last one of a latent counts.

    Raises:
        CorruptFileError: the file is missing, or a line is not what it should be.
    """
    found: dict[int, str] = {}
    number = 0
    try:
        for line in Path(path).read_text(encoding="utf-8").split("\n"):  # not at U+2028, which JSON may hold
            number += 1
            record = json.loads(line) if line.strip() else {"dictionary": None}
            if record.get("dictionary", dictionary.hash) in (dictionary.hash, dictionary.name or dictionary.hash):
                found[int(_first(record, _INDEX))] = str(_first(record, _SAID))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CorruptFileError(
            f"line {number} of {path} is no explanation ({type(error).__name__}: {error}), so none was read; each line "
            'is an object such as {"index": 17, "description": "…"}'
        ) from error
    return found


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in record:
            return record[name]
    raise KeyError(f"none of {', '.join(names)}")
