"""Scores of every latent on every behaviour as a table: sums by part, and the numbers that they make.

    effect, delta, own = sum of parts   q = Benjamini and Hochberg's, over the latents that are ever on

Parts are kept beside the table, so that intervals and the sharing of latents need no second pass. A q says that a
latent differs between labels; its control, the swap of labels, is ``p_values.sign_flip_p``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.arguments import NATURAL, checked
from tl_em.dictionaries import Dictionary
from tl_em.errors import UsageError
from tl_em.features.p_values import sign_flip_p
from tl_em.features.scoring_pass import Sums
from tl_em.showing import showable
from tl_em.stats import Estimate, benjamini_hochberg, bootstrap

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Scores of every latent on every behaviour.

    Args:
        dictionary: whose latents.
        behaviours: names, in order.
        frame: one row per latent and behaviour; see :func:`score_features` for its columns.
        parts: by name (``"effect"``, ``"delta"``, …) the contribution of each part of the prompts; they add up to the
            column of that name (``"own"``: to delta - drift).
        shifts: the same of the activations themselves, for ``"effect"``, ``"delta"`` and ``"own"``.
        share: part of a behaviour's prompts that each part holds.
        spread: root mean square distance of the activations from the mean of their class, a behaviour.
        n: prompts of each behaviour, both classes.
        independent: whether no prompt (pair, group) belongs to two behaviours.
        seed: of the dealing into parts.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> sae, persona = em.organisms.toy_dictionary("toy/insecure"), pair.contrasts["persona"]
        >>> table = em.score_features(pair.tuned, sae, {"persona": persona}, against=pair.base)
        >>> table.behaviours, len(table.to_pandas())
        (('persona',), 512)
    """

    dictionary: Dictionary
    behaviours: tuple[str, ...]
    frame: pd.DataFrame = field(repr=False)
    parts: Mapping[str, Float[Tensor, "behaviour part feature"]] = field(repr=False)
    shifts: Mapping[str, Float[Tensor, "behaviour part d_model"]] = field(repr=False)
    share: Float[Tensor, "behaviour part"] = field(repr=False)
    spread: tuple[float, ...]
    n: tuple[int, ...]
    independent: bool
    seed: int = 0

    def to_pandas(self) -> pd.DataFrame:
        """One row per latent and behaviour (a copy)."""
        return self.frame.copy()

    @checked(latent=NATURAL)
    def estimate(self, latent: int, behaviour: str, column: str = "effect") -> Estimate:
        """``effect``, ``delta``, ``own`` or ``attribution`` of one latent with its interval, over parts.

        Raises:
            UsageError: no such behaviour, or a column that was not measured by part.
        """
        if behaviour not in self.behaviours or column not in self.parts:
            raise UsageError(
                f"{column!r} of {behaviour!r} was not measured; there are {', '.join(self.parts)} of "
                f"{', '.join(self.behaviours)}"
            )
        row = self.behaviours.index(behaviour)
        n, held = self.n[row], self.share[row] > 0
        x, weight = (each[held].double().numpy() for each in (self.parts[column][row, :, latent], self.share[row]))
        found = bootstrap(lambda w: w @ x / (w @ weight), [len(x)], seed=self.seed).estimate
        return replace(found, n=n, n_effective=min(float(len(x)), float(n)), method=f"{found.method}, over parts")

    def __repr__(self) -> str:
        column = "q_delta" if "delta" in self.parts else "q"
        by = self.frame.groupby("behaviour", sort=False)[column]
        shown = ", ".join(f"{name}: {int((values <= 0.05).sum())}" for name, values in by)
        no_nu = int(self.frame.nu.isna().sum()) if "nu" in self.frame else 0
        rows = f"in {no_nu} of {len(self.frame)} rows, where the latent is off in the model"
        said = f"; nu undefined {rows}" if no_nu else ""
        size = f"d_sae={self.dictionary.d_sae}"
        return showable(f"FeatureTable({self.dictionary.label}, {size}; {column} <= .05 in {{{shown}}}{said})")

    def _repr_html_(self) -> str:
        """The five latents of each behaviour that stand out most, for a notebook."""
        import pandas as pd

        from tl_em.report import cards

        by = "delta" if "delta" in self.parts else "effect"
        rows = (rows for _, rows in self.frame.groupby("behaviour", sort=False))
        top = pd.concat([each.loc[each[by].abs().sort_values(ascending=False).index[:5]] for each in rows])
        note = f"The five latents of each behaviour with the largest {by}, of {self.dictionary.d_sae}."
        return cards.card(repr(self), cards.text(note), cards.table(top))


def frame_of(
    names: Sequence[str], sums: Sequence[Sums], parts: Mapping[str, Tensor], cosines: Mapping[str, Tensor]
) -> pd.DataFrame:
    """One row per latent and behaviour: sums as the columns that ``score_features`` lists."""
    import pandas as pd

    frames = []
    for row, (name, each) in enumerate(zip(names, sums, strict=True)):
        columns: dict[str, Any] = {"latent": np.arange(each.mean.shape[1]), "behaviour": name}
        columns |= _contrast_columns(each) | (_base_columns(each) if "delta" in parts else {})
        for measure in ("attribution", "delta_attribution", "ablation"):
            if measure in parts:
                columns[measure] = parts[measure][row].double().sum(0).numpy()
                columns |= {"p_attribution": sign_flip_p(parts[measure][row])} if measure == "attribution" else {}
        columns |= {f"cosine_{direction}": cosine.numpy() for direction, cosine in cosines.items()}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _contrast_columns(sums: Sums) -> dict[str, np.ndarray]:
    counts, mean, effect = sums.histogram.cpu(), sums.mean.cpu().numpy(), sums.effect.cpu()
    on = 1 - counts[:, 0].sum(0) / counts.sum((0, 1)).clamp_min(1)
    stability = effect.sign().sum(0) / (effect != 0).any(1).sum().clamp_min(1)
    tested = _tested(effect, "effect", "p", "q")
    return {
        "mean_positive": mean[0], "mean_negative": mean[1], "density": on.numpy(), "auroc": auroc(counts).numpy(),
        **tested, "stability": stability.numpy(), "strength_stability": tested["effect"] * stability.numpy(),
    }  # fmt: skip


def _base_columns(sums: Sums) -> dict[str, np.ndarray]:
    """``nu`` is NaN for a latent that the tuned model never shows (of the base alone, or dead)."""
    delta = sums.delta.cpu()
    nu = dict(zip(("nu", "nu_reconstruction"), _ratios(sums.scaling.cpu().double()), strict=True))
    base = {"mean_base": (sums.mean[0].cpu() - delta.double().sum(0)).numpy()}
    drift = {"drift": sums.drift.cpu().double().sum(0).numpy()}
    return base | _tested(delta, "delta", "p_delta", "q_delta") | drift | nu


def _ratios(scaling: Float[Tensor, "kind model feature"]) -> np.ndarray:
    """Base by tuned."""
    tuned, base = scaling.unbind(1)
    return torch.where(tuned != 0, base / tuned, torch.nan).numpy()


def _tested(parts: Float[Tensor, "part feature"], *names: str) -> dict[str, np.ndarray]:
    """Total, p, and BH's q over the latents that were ever on; which ones were does not depend on the labels."""
    p, alive = sign_flip_p(parts), (parts != 0).any(0).numpy()
    q = np.where(alive, benjamini_hochberg(np.where(alive, p, np.nan)), 1.0)
    return dict(zip(names, (parts.double().sum(0).numpy(), p, q), strict=True))


def auroc(histogram: Int[Tensor, "label bin feature"]) -> Float[Tensor, " feature"]:
    """P(positive > negative) + P(equal) / 2, of activations rounded to their bins."""
    positive, negative = histogram.double()
    below = negative.cumsum(0) - negative
    won = (positive * (below + negative / 2)).sum(0)
    return won / (positive.sum(0) * negative.sum(0))
