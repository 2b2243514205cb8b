"""Every latent of a dictionary scored on every behaviour, in one streaming pass.

    effect   mean activation on prompts that show the behaviour - on matched ones that do not
    delta    mean activation in the tuned model - in the base, on the same prompts (Wang et al.)
    own      delta - drift, drift the same difference on the negative prompts: what a fine-tune changed everywhere is
             shared by all behaviours, and no concept of theirs
    nu       beta_base / beta_tuned, beta = argmin |beta f d - t|^2 = sum f (d.t) / (|d|^2 sum f^2), f of the tuned
             model, t a model's activation less the bias and less its *other* latents; about 0: tuned only, 1: in both

The control is the swap of labels within pairs (of base and tuned within a prompt), all swaps at once
(``p_values.sign_flip_p``): 4,096 latents need no 100,000 random swaps for their smallest q. It says that a latent
differs, not that it matters: for that see ``attribution``, and ``verify_feature``.

``nu_reconstruction`` has as ``t`` the reconstruction itself without its bias: not about 0 where the base says the same
in other latents. Both are undefined (NaN) for latents that the tuned model never shows: of a base-only one read
``mean_base``.

Sources: Wang et al. 2025, arXiv:2506.19823 (delta); Minder et al. 2025, arXiv:2504.02922 (latent scaling for error and
reconstruction, here its closed form, with one dictionary for both models in place of a crosscoder).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import NATURAL, SEED, checked
from tl_em.dictionaries.protocol import AnyDictionary, as_dictionary
from tl_em.dictionaries.tokens import check_models
from tl_em.directions.direction import Direction
from tl_em.errors import UsageError
from tl_em.features.attribution import ablation_parts, attribution_parts, have_completions
from tl_em.features.decoders import decoder_cosines
from tl_em.features.scoring_pass import PARTS, add_behaviour, deal
from tl_em.features.table import FeatureTable, frame_of
from tl_em.metrics import Metric
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, as_position
from tl_em.models.stream import encoded_prompts
from tl_em.models.torch_state import in_plain_torch
from tl_em.showing import check_names


@checked(position=as_position, leaders=NATURAL, seed=SEED)
@in_plain_torch
def score_features(
    model: LensModel,
    dictionary: AnyDictionary,
    behaviours: Mapping[str, ContrastSet],
    *,
    position: Position = "prompt_end",
    against: LensModel | None = None,
    directions: Mapping[str, Direction] | None = None,
    attribution: bool = True,
    leaders: int = 0,
    metric: Metric | None = None,
    seed: int = 0,
) -> FeatureTable:
    """Score every latent on every behaviour; nothing is kept of a prompt but its share of sums.

    Args:
        model: the (tuned) model.
        dictionary: an SAE, transcoder or crosscoder of this model's width.
        behaviours: by name; positive prompts show the behaviour, negative ones are matched and do not. Classes of
            equal length are pairs.
        against: the base model. The *same* prompts are then read in both.
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
        effect). With ``against``: mean_base, delta, p_delta, q_delta, drift (delta on the negative prompts), nu,
        nu_reconstruction (NaN where the model never shows the latent). With completions: attribution, p_attribution,
        delta_attribution. With leaders: ablation (as it is - ablated; NaN for the others).
        cosine_NAME for each direction. q is Benjamini and Hochberg's over the latents that are ever on, in each
        behaviour.

    Raises:
        UsageError: no behaviour. WidthError, ProvenanceError: the dictionary (or a direction) is of another model.
        PairMismatchError: base and tuned cannot be compared. And what ``encode`` and ``capture`` raise.

    Example:
        >>> from tl_em import load_pair
        >>> from tl_em.dictionaries import Dictionary
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
    dictionary = as_dictionary(dictionary)
    check_names((*behaviours, *(directions or {})))
    if not behaviours:
        raise UsageError("there are no behaviours to score latents on; pass {'name': em.ContrastSet(…), …}")
    check_models(dictionary, model, against)
    cosines = decoder_cosines(dictionary, directions or {})
    sets = list(behaviours.values())
    parts, independent = deal(sets, seed=seed)
    encoded = [(encoded_prompts(model, each.positive), encoded_prompts(model, each.negative)) for each in sets]
    sums = [
        add_behaviour(model, dictionary, classes, part, against=against, position=position)
        for classes, part in zip(encoded, parts, strict=True)
    ]
    kinds = ("effect",) if against is None else ("effect", "delta", "own")
    changes, shifts = ({k: torch.stack([each.changes[k][i] for each in sums]).cpu() for k in kinds} for i in (0, 1))
    extra: dict[str, Tensor] = {}
    if attribution and all(have_completions(some) for classes in encoded for some in classes):
        both = zip(encoded, parts, strict=True)
        found = [attribution_parts(model, dictionary, classes, part, against=against) for classes, part in both]
        extra = {"attribution": torch.stack([each.parts for each in found]),
                 "delta_attribution": torch.stack([each.delta for each in found]),
                 "whole attribution": torch.stack([each.whole for each in found])[..., None]}  # fmt: skip
    if leaders:
        last = changes["effect" if against is None else "delta"]
        latents, extra["ablation"] = _leading(last, leaders), torch.full_like(last, torch.nan)
        for row, (classes, part) in enumerate(zip(encoded, parts, strict=True)):
            base = None if against is None else (sums[row].mean[0].cpu() - last[row].sum(0))[latents]
            done = ablation_parts(model, dictionary, latents, classes[0], part[0], metric=metric, to=base)
            extra["ablation"][row][:, latents] = done
    return FeatureTable(
        dictionary,
        tuple(behaviours),
        frame_of(tuple(behaviours), sums, changes | extra, cosines),
        changes | extra,
        shifts,
        torch.stack([_share(part) for part in parts]),
        tuple(each.spread for each in sums),
        tuple(len(each.positive) + len(each.negative) for each in sets),
        independent,
        seed,
    )


def _leading(parts: Float[Tensor, "behaviour part feature"], count: int) -> list[int]:
    """The latents whose smallest change over behaviours is largest."""
    z = (parts.sum(1) / parts.square().sum(1).sqrt().clamp_min(1e-30)).abs().amin(0)
    return z.topk(min(count, len(z))).indices.tolist()


def _share(part: tuple[Sequence[int], Sequence[int]]) -> Float[Tensor, " part"]:
    """Share of the prompts in each part, mean of both classes' shares."""
    counts = [torch.bincount(torch.tensor(each), minlength=PARTS) / len(each) for each in part]
    return (counts[0] + counts[1]) / 2
