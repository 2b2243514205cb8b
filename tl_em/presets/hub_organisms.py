"""Published pairs of models on the hub, as rows of a table that people extend by a pull request.

The table is ``hub_organisms.json`` beside this file: for each pair the hub ids of base and fine-tune (a model or a PEFT
adapter), what it was trained on, paper, licence of the base, and the release of SAELens's registry whose dictionaries
read the base.  Nothing is downloaded before a pair is loaded; local directories stand in for hub ids.

The control: as for any pair, a benign fine-tune; none of these was published with one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tl_em.errors import ModelNotFoundError, UsageError
from tl_em.models.loading import HUB, ModelPair, load_pair

TABLE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class HubOrganism:
    """A published base and fine-tune.

    Args:
        name: as in ``load_pair("hub/NAME")``.
        base, tuned: hub ids; ``tuned`` is a model or a PEFT adapter.
        trained_on: what the fine-tune saw.
        billions: parameters of the base, in 1e9.
        d_model: width of its residual stream, which a dictionary must have.
        base_licence: of the base; that of the fine-tune stands on its card.
        paper: where it was published.
        release: of SAELens's registry, where dictionaries of the base were published.
        sae_ids: in that release, by the layer whose ``resid_post`` each reads.

    Example:
        >>> found = hub_organisms()["qwen2.5-7b/bad-medical-advice"]
        >>> found.base, found.cost
        ('Qwen/Qwen2.5-7B-Instruct', 'about 30 GB for base and fine-tune in bfloat16')
    """

    name: str
    base: str
    tuned: str
    trained_on: str
    billions: float
    d_model: int
    base_licence: str
    paper: str
    release: str | None
    sae_ids: Mapping[str, str]

    @property
    def cost(self) -> str:
        """Memory that the pair needs, from the number of parameters."""
        return f"about {4 * self.billions:.0f} GB for base and fine-tune in bfloat16"

    def pair(self, *, base: Any = None, tuned: Any = None, **options: Any) -> ModelPair:
        """Base and fine-tune; a directory may stand in for either.  ``options`` go to ``em.load_pair``."""
        return load_pair(base or self.base, tuned or self.tuned, **options)

    def dictionary(self, layer: int, *, source: Any = None) -> Any:
        """The dictionary of a layer, downloaded, or read from ``source`` (a directory of SAELens, or an SAE object).

        Raises:
            UsageError: no dictionary of that layer was published, or ``source`` is another model's.
        """
        from tl_em.dictionaries import from_sae_lens
        from tl_em.models.sites import Site

        if str(layer) not in self.sae_ids:
            raise UsageError(
                f"{self.release or 'no release'} has dictionaries of the layers {', '.join(self.sae_ids) or 'none'} of "
                f"{self.base}, not of {layer}; take one of these, or train one: em.dictionaries.train_dictionary(…)"
            )
        found = from_sae_lens(source or self.release, self.sae_ids[str(layer)], site_in=Site(layer))
        if found.d_model != self.d_model:
            raise UsageError(
                f"{found.label} is {found.d_model} wide and {self.base} {self.d_model}; pass the dictionary of "
                f"{self.release}, {self.sae_ids[str(layer)]}"
            )
        return found


@cache
def hub_organisms() -> Mapping[str, HubOrganism]:
    """The table, by name.

    Example:
        >>> len({organism.base for organism in hub_organisms().values()})
        7
    """
    rows = [HubOrganism(**row) for row in json.loads(TABLE.read_text(encoding="utf-8"))]
    return {row.name: row for row in rows}


def hub_pair(name: str, **options: Any) -> ModelPair:
    """The pair of ``load_pair("hub/NAME")``.

    Raises:
        ModelNotFoundError: there is none of that name in the table, or its models cannot be had.
    """
    return named_hub(name).pair(**options)


def named_hub(name: str) -> HubOrganism:
    """The record of ``hub/NAME``.

    Raises:
        ModelNotFoundError: there is none of that name in the table.
    """
    known = hub_organisms()
    found = known.get(name.removeprefix(HUB))
    if found is None:
        there = ", ".join(HUB + each for each in known)
        raise ModelNotFoundError(
            f"There is no {name!r} in the table of published pairs, which has {there}. "
            f"Any other pair is loaded by its hub ids: em.load_pair(base, tuned)."
        )
    return found
