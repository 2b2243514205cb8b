"""Published models as records: their dictionaries, their fine-tunes, and what a run costs.

    persona features   delta_j = mean a_j(tuned) - mean a_j(base); the leaders of both signs are then steered
    reward-model bias  the latents that many unrelated biases share, on prompts of reinforced and held-out biases

A record says which release of SAELens's registry belongs to which model and layer, which fine-tunes were published for
it, and what a run costs. The costs are *estimates from shapes*, not measurements. Registry releases download; a local
directory that SAELens wrote is read in their place (``source=``), without the network.

The control: as for any look-up (``shared_features`` has the null, ``verify_feature`` the placebos).

Source: Wang et al. 2025, arXiv:2506.19823; Turner et al. 2025, arXiv:2506.11613 (the fine-tunes); Marks et al. 2025,
arXiv:2503.10965, and its open replication by the same group, December 2025 (the biases and their model).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tl_em.dictionaries import Dictionary, from_sae_lens
from tl_em.errors import UsageError
from tl_em.models.loading import ModelPair, load_model
from tl_em.models.sites import Site

_EM = ("bad-medical-advice", "extreme-sports", "risky-financial-advice")


@dataclass(frozen=True)
class Preset:
    """A published model with dictionaries and fine-tunes.

    Args:
        model: hub id of the base model.
        release: of SAELens's registry.
        sae_ids: by the layer whose ``resid_post`` each reads.
        organisms: hub ids of fine-tunes, by name.
        d_model: width, which a dictionary must have.
        cost: GPU memory and time, estimated.
        source: where it was published.
    """

    model: str
    release: str
    sae_ids: Mapping[int, str]
    organisms: Mapping[str, str]
    d_model: int
    cost: str
    source: str

    def dictionary(self, layer: int, *, source: Any = None) -> Dictionary:
        """The dictionary of a layer, downloaded, or read from ``source`` (a directory of SAELens, or an SAE object).

        Raises:
            UsageError: no dictionary of that layer, or one that does not belong to this model.
        """
        if layer not in self.sae_ids:
            raise UsageError(f"{self.release} has dictionaries of layers {list(self.sae_ids)}, not of {layer}")
        found = from_sae_lens(source or self.release, self.sae_ids[layer], site_in=Site(layer))
        if found.d_model != self.d_model:
            raise UsageError(f"{found.label} is {found.d_model} wide and {self.model} {self.d_model}; pass the "
                             f"dictionary of {self.release}, {self.sae_ids[layer]}")  # fmt: skip
        return found

    def pair(self, tuned: str, *, base: Any = None, **options: Any) -> ModelPair:
        """Base and fine-tune; ``tuned`` names one of ``organisms``, or is a hub id or directory like ``base``.

        ``options`` go to ``em.load_model``.
        """
        before = load_model(base or self.model, **options)
        return ModelPair(before, load_model(self.organisms.get(tuned, tuned), **options))


def _andyrdt(model: str, release: str, stem: str, d_model: int) -> Preset:
    return Preset(
        model=model,
        release=release,
        sae_ids={layer: f"resid_post_layer_{layer}_trainer_1" for layer in range(3, 28, 4)},
        organisms={name: f"ModelOrganismsForEM/{stem}_{name}" for name in _EM},
        d_model=d_model,
        cost="base and fine-tune in bfloat16 about 32 GB, a dictionary of 131,072 latents in float32 about 4 GB: one "
        "GPU of 48 GB; a look-up on a few hundred prompts takes minutes, verification with 20 placebos under an hour",
        source="Wang et al. 2025, arXiv:2506.19823; fine-tunes of Turner et al. 2025, arXiv:2506.11613",
    )


PRESETS: Mapping[str, Preset] = {
    "wang-qwen2.5-7b": _andyrdt(
        "Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct-andyrdt", "Qwen2.5-7B-Instruct", 3584
    ),
    "wang-llama-3.1-8b": _andyrdt(
        "meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct-andyrdt", "Llama-3.1-8B-Instruct", 4096
    ),
    "reward-model-bias": Preset(
        model="meta-llama/Llama-3.3-70B-Instruct",
        release="goodfire-llama-3.3-70b-instruct",
        sae_ids={50: "layer_50"},
        organisms={stage: f"auditing-agents/llama-3.3-70b-{stage}-lora" for stage in ("sft", "dpo", "dpo-rt")},
        d_model=8192,
        cost="base and fine-tune in bfloat16 about 280 GB (four GPUs of 80 GB, or one model at a time), the dictionary "
        "of 65,536 latents in float32 about 4 GB; a look-up on 560 prompts takes tens of minutes",
        source="Marks et al. 2025, arXiv:2503.10965, and its open replication, December 2025",
    ),
}
