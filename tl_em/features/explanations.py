"""What others wrote about latents: a file of explanations, and a page at Neuronpedia that is linked, never asked for.

Both are text from outside: an explanation is somebody's guess, and no test of what a latent does (``verify_feature``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_em.arguments import whole
from tl_em.artefacts import read_rows
from tl_em.dictionaries import Dictionary
from tl_em.errors import CorruptFileError, FileError

_NEURONPEDIA = re.compile(r"[\w.-]+/\d+-[\w.-]+")
_LINE = 'an object such as {"index": 17, "description": "…"}'
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
    try:
        rows = read_rows(path)
    except FileError as error:
        raise CorruptFileError(f"{error}; no explanation was read, each line is {_LINE}") from error
    for where, record in rows:
        try:
            if record.get("dictionary", dictionary.hash) in (dictionary.hash, dictionary.name or dictionary.hash):
                index, said = _first(record, _INDEX), _first(record, _SAID)
                if not isinstance(said, str):
                    raise TypeError(f"the explanation is {said!r:.40}")
                found[int(index) if isinstance(index, str) else whole("index", index, low=0)] = said
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptFileError(
                f"{where} of {path} is no explanation ({type(error).__name__}: {error}), so none was read; each is "
                f"{_LINE}"
            ) from error
    return found


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in record:
            return record[name]
    raise KeyError(f"none of {', '.join(names)}")
