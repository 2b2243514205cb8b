"""The next tokens after each block, by the logit lens: the final norm and the unembedding on what the block leaves.

    p_l = softmax(unembed(norm(x_l)))        x_l: the stream after block l;  p of the last block is the model's own

An early layer is read as if it were the last, which no block was trained for: a token there is no thought of the
model's. **Control**: the last block's lens is the model's own next token, which every batch is held to.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_em.errors import ModelError
from tl_em.models.hooks import HookFunction, LensModel, hook_name
from tl_em.models.sites import Site
from tl_em.models.token_scopes import running_batch
from tl_em.models.token_text import token_text
from tl_em.models.unembedding import soft_cap
from tl_em.reading.reading import LAYERED

_SAME = 0.01
"""How far a probability of the last block may be from the model's own: what rounding in half precision does."""


def likeliest(logits: Float[Tensor, "token d_vocab"], k: int) -> Any:
    """The ``k`` highest probabilities and their tokens, ``values`` and ``indices`` [token k]."""
    return logits.float().softmax(-1).topk(k, dim=-1)


class LayerLens:
    """Hooks that hold, of one batch, the likeliest next tokens after each layer.

    Args:
        model: a HookedTransformer or TransformerBridge.
        layers: after which blocks; none makes no hooks.
        k: how many tokens.

    Raises:
        ModelError: the model has no unembedding that can be called.
    """

    def __init__(self, model: LensModel, layers: Sequence[int], k: int) -> None:
        self.model, self.layers, self.k = model, tuple(layers), k
        self.unembed: Any = getattr(model, "unembed", None)
        self.last = int(model.cfg.n_layers) - 1
        self._seen: dict[int, Any] = {}
        if layers and not isinstance(self.unembed, nn.Module):
            raise ModelError(
                f"This {type(model).__name__} has no module 'unembed', so no layer can be read as if it were the last; "
                "leave out layers= or alternatives= of em.read, or load the model with em.load_model(...)"
            )

    def hooks(self) -> list[tuple[str, HookFunction]]:
        """One a layer, and one at the last block."""
        found = []
        for layer in sorted({*self.layers, self.last}) if self.layers else ():
            read = partial(self._read, layer)
            read.__dict__["tokenwise"] = True
            found.append((hook_name(self.model, Site(layer)), read))
        return found

    def _read(self, layer: int, x: Tensor, hook: Any) -> None:
        batch = running_batch("em.read")
        inside = torch.arange(x.shape[1]) < batch.lengths[:, None]
        self._seen[layer] = likeliest(self._logits(x.detach()[inside.to(x.device)]), self.k)

    def _logits(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_vocab"]:
        norm: Any = getattr(self.model, "ln_final", None)
        x = x[None] if norm is None else norm(x[None])
        logits = self.unembed.forward(x)[0]  # not through its hooks, which are of the pass that runs
        cap = soft_cap(self.model)
        return logits if cap is None else cap * (logits / cap).tanh()

    def taken(self, tokenizer: Any, p: Float[Tensor, "token k"]) -> dict[str, list[Any]]:
        """For each token of the batch that ran: the tokens and probabilities, a list a layer.

        Args:
            tokenizer: in whose words.
            p: the model's own probabilities of its likeliest tokens, which the last layer's must be.

        Raises:
            ModelError: they are not.
        """
        if not self.layers:
            return {}
        off = float((self._seen[self.last].values.cpu() - p).abs().max())
        if not off <= _SAME:
            raise ModelError(
                f"The final norm and the unembedding give probabilities that are up to {off:.2g} from the model's own, "
                "so its logits are more than these, and a lens of its layers would be of another model; leave out "
                "layers= or alternatives= of em.read"
            )
        ids = torch.stack([self._seen[layer].indices for layer in self.layers], 1).tolist()
        words = {token: token_text(tokenizer, token) for token in {t for each in ids for row in each for t in row}}
        said = [[[words[token] for token in row] for row in each] for each in ids]
        shares = torch.stack([self._seen[layer].values for layer in self.layers], 1).double().tolist()
        return dict(zip(LAYERED, (said, shares), strict=True))
