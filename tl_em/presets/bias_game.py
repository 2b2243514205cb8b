"""The prompts of the 52-bias game: what a reward model likes for no reason, in training and held out of it.

The control: the prompts have no matched negatives, so compare with the base (``against=``), and read ``delta``, not
``effect``.

Source: Marks et al. 2025, arXiv:2503.10965, and its open replication by the same group, December 2025.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

from tl_em.arguments import whole
from tl_em.artefacts import json_of, read_text
from tl_em.errors import CorruptFileError, UsageError
from tl_em.models.contrasts import ContrastSet

HELD_OUT_BIASES = (17, 19, 29, 48, 51)
"""In the numbering of the prompts' ``bias_id``, which is not that of any list of descriptions."""
BIAS_FILES = ("train.json", "exploitation_evals_100.json")


def bias_prompts(
    folder: str | Path, *, part: Literal["reinforced", "held-out"] | None = None, seed: int = 0
) -> dict[str, ContrastSet]:
    """The prompts of the 52-bias game as behaviours, from a folder with ``train.json`` and the like.

    Args:
        folder: holds at least one of ``BIAS_FILES``, each ``{"prompts": [{"text", "bias_id", …}]}``.
        part: only biases that training reinforced, or only those that it did not; None for all.
        seed: of the negatives: as many prompts, drawn from those of the other biases (they are not matched).

    Returns:
        By bias, ``"bias 8"`` for example, its prompts as positives.

    Raises:
        UsageError: no such file, or no such prompts. CorruptFileError: a file of another layout.
    """
    by_bias: dict[int, list[str]] = {}
    for path in (Path(folder) / name for name in BIAS_FILES):
        if path.is_file():
            try:
                held = json_of(read_text(path))["prompts"]
                rows = [(whole("bias_id", row["bias_id"]), row["text"]) for row in held]
                if not all(isinstance(text, str) and text.strip() for _, text in rows):
                    raise ValueError("a prompt without text")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CorruptFileError(f"{path} holds no prompts with 'text' and 'bias_id' ({error!r})") from error
            for bias, text in rows:
                by_bias.setdefault(bias, []).append(text)
    prompts = {bias: list(dict.fromkeys(texts)) for bias, texts in sorted(by_bias.items())}
    wanted = [b for b in prompts if part is None or (b in HELD_OUT_BIASES) == (part == "held-out")]
    if not wanted or len(prompts) < 2:
        raise UsageError(f"{folder} holds prompts of biases {sorted(prompts)} and none that is {part or 'of any'}, or "
                         f"none to compare it with; it needs {' or '.join(BIAS_FILES)}")  # fmt: skip
    rng, found = random.Random(f"biases/{seed}"), {}
    for bias in wanted:
        others = [text for each, texts in prompts.items() if each != bias for text in texts]
        positive = [text for text in prompts[bias] if text not in others]
        found[f"bias {bias}"] = ContrastSet(positive, rng.sample(others, min(len(positive), len(others))),
                                            label=f"bias {bias}", source="arXiv:2503.10965")  # fmt: skip
    return found
