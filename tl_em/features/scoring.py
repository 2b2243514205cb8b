"""Every latent of a dictionary scored on every behaviour, in one streaming pass.

    effect   mean activation on prompts that show the behaviour - on matched ones that do not
    delta    mean activation in the tuned model - in the base, on the same prompts (Wang et al.)
    nu       beta_base / beta_tuned, beta = sum f (d.x) / (|d|^2 sum f^2), f of the tuned model; about 0: tuned only

The control is the swap of labels within pairs (of base and tuned within a prompt): under it a sum of units becomes
``sum s_u d_u`` with random signs, whose tail is never above 3.18 times the normal's (Bentkus and Dzindzalieta). So the
p of all 2^n swaps is bounded in closed form, and 4,096 latents need no 100,000 random swaps for their smallest q. It
says that a latent differs, not that it matters: for that see ``attribution``, and ``verify_feature``.

Sources: Wang et al. 2025, arXiv:2506.19823 (delta); Minder et al. 2025, arXiv:2504.02922 (latent scaling, here its
closed form); Bentkus and Dzindzalieta 2015, arXiv:1307.3451; Benjamini and Hochberg 1995.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.dictionaries import Dictionary
from tl_em.directions.direction import Direction
from tl_em.errors import UsageError, WidthError
from tl_em.features.attribution import ablation_parts, attribution_parts, have_completions
from tl_em.features.sums import PARTS, Sums, add_behaviour, deal
from tl_em.metrics import Metric
from tl_em.models.capture import encoded_prompts
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.sites import Position, check_belongs
from tl_em.stats import Estimate, benjamini_hochberg, bootstrap

if TYPE_CHECKING:
    import pandas as pd

_TAIL = 3.178
"""1 / (4 P(Z > sqrt 2)), the best constant there is."""
_EXACT = 12
"""Parts up to which all 2^n sign flips are counted."""


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Scores of every latent on every behaviour.

    Args:
        dictionary: whose latents.
        behaviours: names, in order.
        frame: one row per latent and behaviour; see :func:`score_features` for its columns.
        parts: by name (``"effect"``, ``"delta"``, …) the contribution of each part of the prompts; they add up to the
            column of that name.
        shifts: the same of the activations themselves, for ``"effect"`` and ``"delta"``.
        share: part of a behaviour's prompts that each part holds.
        spread: root mean square distance of the activations from the mean of their class, a behaviour.
        n: prompts of each behaviour, both classes.
        independent: whether no prompt (pair, group) belongs to two behaviours.
        seed: of the dealing into parts.
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

    def estimate(self, latent: int, behaviour: str, column: str = "effect") -> Estimate:
        """``effect``, ``delta`` or ``attribution`` of one latent with its interval, over parts.

        Raises:
            UsageError: no such behaviour, or a column that was not measured by part.
        """
        if behaviour not in self.behaviours or column not in self.parts:
            raise UsageError(
                f"{column!r} of {behaviour!r} was not measured; there are {', '.join(self.parts)} of "
                f"{', '.join(self.behaviours)}"
            )
        row = self.behaviours.index(behaviour)
        return over_parts(self.parts[column][row, :, latent], self.share[row], n=self.n[row], seed=self.seed)

    def __repr__(self) -> str:
        column = "q_delta" if "delta" in self.parts else "q"
        shown = [f"{name}: {int((rows[column] <= 0.05).sum())}" for name, rows in self._by_behaviour()]
        return f"FeatureTable({self.dictionary.label}, d_sae={self.dictionary.d_sae}; {column} <= .05 in {{{', '.join(shown)}}})"  # noqa: E501

    def _by_behaviour(self) -> list[tuple[str, pd.DataFrame]]:
        return [(name, self.frame[self.frame.behaviour == name]) for name in self.behaviours]

    def _repr_html_(self) -> str:
        """The five latents of each behaviour that stand out most, for a notebook."""
        import pandas as pd

        by = "delta" if "delta" in self.parts else "effect"
        top = [rows.reindex(rows[by].abs().sort_values(ascending=False).index).head(5) for _, rows in self._by_behaviour()]  # noqa: E501
        return pd.concat(top).to_html(index=False, float_format=lambda x: f"{x:.3g}", escape=True)


def score_features(
    model: LensModel,
    dictionary: Dictionary,
    behaviours: Mapping[str, ContrastSet],
    *,
    against: LensModel | None = None,
    position: Position = "prompt_end",
    directions: Mapping[str, Direction] | None = None,
    attribution: bool = True,
    leaders: int = 0,
    metric: Metric | None = None,
    seed: int = 0,
) -> FeatureTable:
    """Score every latent on every behaviour; nothing is kept of a prompt but its share of sums.

    Args:
        model: the (tuned) model.
        dictionary: an SAE or transcoder of this model's width.
        behaviours: by name; positive prompts show the behaviour, negative ones are matched and do not. Classes of
            equal length are pairs.
        against: the base model. The *same* positive prompts are then read in both.
        position: the token that is read; over a span (``"response_mean"``, ``"all"``) the mean of its tokens' latents.
        directions: vectors to compare decoder rows with.
        attribution: whether to attribute completions to latents, where all prompts end in an assistant message; takes
            a second pass, with gradients.
        leaders: latents to ablate one by one (a pass over the positive prompts each): those that stand out most in the
            behaviour in which they do least. A latent is set to 0; with ``against``, to the base's mean.
        metric: what ablations change, a number for each prompt; the completion's log-likelihood by default.
        seed: of the dealing of prompts into parts.

    Returns:
        A table with columns latent, behaviour; mean_positive, mean_negative; density (share of prompts on which it is
        on); auroc; effect, p, q; stability (mean sign of the parts, -1 to 1) and strength_stability (its product with
        effect). With ``against``: mean_base, delta, p_delta, q_delta, nu. With completions: attribution,
        p_attribution, delta_attribution. With leaders: ablation (as it is - ablated; NaN for the others).
        cosine_NAME for each direction. q is Benjamini and Hochberg's over the latents that are ever on, in each
        behaviour.

    Raises:
        UsageError: no behaviour. WidthError, ProvenanceError: the dictionary (or a direction) is of another model.
        PairMismatchError: base and tuned cannot be compared. And what ``encode`` and ``capture`` raise.

    Example:
        >>> from tl_em.organisms.zoo import load_pair
        >>> from tl_em.models.sites import Site
        >>> pair = load_pair("toy/insecure")
        >>> q, _ = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(0)))
        >>> wide = torch.cat([q, -q], 1)
        >>> sae = Dictionary(wide, torch.zeros(192), wide.T, torch.zeros(96), activation="relu", site_in=Site(2))
        >>> table = score_features(pair.tuned, sae, {"refusal": pair.contrasts["refusal"]}, against=pair.base)
        >>> len(table.to_pandas())
        192

    Source: see the head of the module.
    """
    if not behaviours:
        raise UsageError("there are no behaviours to score latents on; pass {'name': em.ContrastSet(…), …}")
    _check(model, dictionary, against, directions or {})
    sets = list(behaviours.values())
    parts, independent = deal(sets, seed=seed)
    encoded = [(encoded_prompts(model, each.positive), encoded_prompts(model, each.negative)) for each in sets]
    sums = [
        add_behaviour(model, dictionary, classes, part, against=against, position=position)
        for classes, part in zip(encoded, parts, strict=True)
    ]
    changes = {name: torch.stack([getattr(each, name) for each in sums]).cpu() for name in _changes(against)}
    extra: dict[str, Tensor] = {}
    if attribution and all(have_completions(some) for classes in encoded for some in classes):
        both = zip(encoded, parts, strict=True)
        found = [attribution_parts(model, dictionary, classes, part, against=against) for classes, part in both]
        extra = {"attribution": torch.stack([each.parts for each in found]),
                 "delta_attribution": torch.stack([each.delta for each in found]),
                 "whole attribution": torch.stack([each.whole for each in found])[..., None]}  # fmt: skip
    if leaders:
        extra["ablation"] = _ablated(model, dictionary, encoded, parts, sums, changes, leaders, metric)
    return FeatureTable(
        dictionary,
        tuple(behaviours),
        _frame(dictionary, tuple(behaviours), sums, changes, extra, directions or {}),
        changes | extra,
        {name: torch.stack([each.shift[i] for each in sums]).cpu() for i, name in enumerate(changes)},
        torch.stack([_share(part) for part in parts]),
        tuple(each.spread for each in sums),
        tuple(len(each.positive) + len(each.negative) for each in sets),
        independent,
        seed,
    )


def _changes(against: LensModel | None) -> tuple[str, ...]:
    return ("effect",) if against is None else ("effect", "delta")


def _ablated(
    model: LensModel,
    dictionary: Dictionary,
    encoded: Sequence[tuple[Sequence[EncodedPrompt], Sequence[EncodedPrompt]]],
    parts: Sequence[tuple[Sequence[int], Sequence[int]]],
    sums: Sequence[Sums],
    changes: Mapping[str, Tensor],
    leaders: int,
    metric: Metric | None,
) -> Float[Tensor, "behaviour part feature"]:
    """Exact ablations of the latents whose smallest change over behaviours is largest; NaN for the others."""
    last = changes["delta" if "delta" in changes else "effect"]
    z = (last.sum(1) / last.square().sum(1).sqrt().clamp_min(1e-30)).abs().amin(0)
    latents = z.topk(min(leaders, len(z))).indices.tolist()
    out = torch.full_like(last, torch.nan)
    for row, (classes, part) in enumerate(zip(encoded, parts, strict=True)):
        to = (sums[row].mean[0].cpu() - last[row].sum(0))[latents] if "delta" in changes else None
        out[row][:, latents] = ablation_parts(model, dictionary, latents, classes[0], part[0], metric=metric, to=to)
    return out


def _check(
    model: LensModel, dictionary: Dictionary, against: LensModel | None, directions: Mapping[str, Direction]
) -> None:
    for each in (model, against):
        if each is not None:
            check_belongs(dictionary.label, dictionary.d_model, dictionary.provenance, each)
    if against is not None:
        ModelPair(against, model)  # raises where the two cannot be compared
    for name, direction in directions.items():
        if len(direction.vector) != dictionary.d_model:
            raise WidthError(
                f"the direction {name!r} is {len(direction.vector)} wide and decoder rows are {dictionary.d_model}; "
                "extract it on this model"
            )


def _share(part: tuple[Sequence[int], Sequence[int]]) -> Float[Tensor, " part"]:
    """Share of the prompts in each part, mean of both classes' shares."""
    counts = [torch.bincount(torch.tensor(each), minlength=PARTS) / len(each) for each in part]
    return (counts[0] + counts[1]) / 2


def _frame(
    dictionary: Dictionary,
    names: Sequence[str],
    sums: Sequence[Sums],
    changes: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
    directions: Mapping[str, Direction],
) -> pd.DataFrame:
    import pandas as pd

    W_dec = dictionary.W_dec.cpu()
    cosines = {
        f"cosine_{name}": torch.nn.functional.cosine_similarity(W_dec, each.vector.float().cpu()[None], dim=-1).numpy()
        for name, each in directions.items()
    }
    frames = []
    for row, (name, each) in enumerate(zip(names, sums, strict=True)):
        columns: dict[str, Any] = {"latent": np.arange(dictionary.d_sae), "behaviour": name}
        columns |= _contrast_columns(each) | (_base_columns(each) if "delta" in changes else {})
        if "attribution" in extra:
            found = extra["attribution"][row]
            columns |= {"attribution": found.double().sum(0).numpy(), "p_attribution": sign_flip_p(found)}
            columns["delta_attribution"] = extra["delta_attribution"][row].double().sum(0).numpy()
        if "ablation" in extra:
            columns["ablation"] = extra["ablation"][row].double().sum(0).numpy()
        frames.append(pd.DataFrame(columns | cosines))
    return pd.concat(frames, ignore_index=True)


def _contrast_columns(sums: Sums) -> dict[str, np.ndarray]:
    counts = sums.histogram.cpu()
    on = 1 - counts[:, 0].sum(0) / counts.sum((0, 1)).clamp_min(1)
    effect, mean = sums.effect.cpu(), sums.mean.cpu()
    stability = effect.sign().sum(0) / (effect != 0).any(1).sum().clamp_min(1)
    total = effect.double().sum(0)
    p = sign_flip_p(effect)
    return {
        "mean_positive": mean[0].numpy(),
        "mean_negative": mean[1].numpy(),
        "density": on.numpy(),
        "auroc": auroc(counts).numpy(),
        "effect": total.numpy(),
        "p": p,
        "q": _q(p, effect),
        "stability": stability.numpy(),
        "strength_stability": (total * stability).numpy(),
    }


def _base_columns(sums: Sums) -> dict[str, np.ndarray]:
    delta, scaling = sums.delta.cpu(), sums.scaling.cpu().double()
    total = delta.double().sum(0)
    p = sign_flip_p(delta)
    return {
        "mean_base": (sums.mean[0].cpu() - total).numpy(),
        "delta": total.numpy(),
        "p_delta": p,
        "q_delta": _q(p, delta),
        "nu": torch.where(scaling[0] != 0, scaling[1] / scaling[0], torch.nan).numpy(),
    }


def _q(p: np.ndarray, parts: Float[Tensor, "part feature"]) -> np.ndarray:
    """BH over the latents that were ever on; which ones were does not depend on the labels."""
    alive = (parts != 0).any(0).numpy()
    q = benjamini_hochberg(np.where(alive, p, np.nan))
    return np.where(alive, q, 1.0)


def sign_flip_p(parts: Float[Tensor, "part *axes"]) -> np.ndarray:
    """Two-sided p of "every part is as likely as its negative", over all sign flips at once.

        p <= 2 * 3.178 * P(Z > |sum d| / sqrt(sum d^2))

    With at most 12 parts that are not zero the flips are counted instead, and p is exact.

    Example:
        >>> sign_flip_p(torch.ones(40, 1)).item() < 1e-8, sign_flip_p(torch.tensor([[1.0], [-1.0]])).item()
        (True, 1.0)

    Source: Bentkus and Dzindzalieta 2015, arXiv:1307.3451, theorem 1.
    """
    from scipy.stats import norm

    d = parts.double()
    d = d[(d != 0).flatten(1).any(1)]
    if len(d) <= _EXACT:
        return _counted(d).numpy()
    z = d.sum(0).abs() / d.square().sum(0).sqrt().clamp_min(1e-300)
    return np.minimum(1.0, 2 * _TAIL * norm.sf(z.numpy()))


def _counted(d: Float[Tensor, "part *axes"]) -> Float[Tensor, "*axes"]:
    """Share of all sign flips whose sum is at least as far from 0 as the observed one."""
    n = max(len(d) - 1, 0)  # the first part keeps its sign: flipping all changes no distance
    flips = 1.0 - 2.0 * ((torch.arange(2**n)[:, None] >> torch.arange(n)) & 1).double()
    first = d[:1].flatten(1)
    sums = flips @ d[1:].flatten(1) + (first if len(d) else 0.0)
    far = sums.abs() >= d.sum(0).flatten().abs() * (1 - 1e-9)
    return far.double().mean(0).reshape(d.shape[1:])


def auroc(histogram: Int[Tensor, "label bin feature"]) -> Float[Tensor, " feature"]:
    """P(positive > negative) + P(equal) / 2, of activations rounded to their bins."""
    positive, negative = histogram.double()
    below = negative.cumsum(0) - negative
    won = (positive * (below + negative / 2)).sum(0)
    return won / (positive.sum(0) * negative.sum(0))


def over_parts(values: Float[Tensor, " part"], share: Float[Tensor, " part"], *, n: int, seed: int = 0) -> Estimate:
    """A mean over prompts from its parts' contributions, with a bootstrap interval over parts."""
    from dataclasses import replace

    held = share > 0
    x, weight = values[held].double().numpy(), share[held].double().numpy()
    found = bootstrap(lambda w: w @ x / (w @ weight), [len(x)], seed=seed).estimate
    return replace(found, n=n, n_effective=min(float(len(x)), float(n)), method=f"{found.method}, over parts")
