"""A judge of one's own: how much of an answer consists of words that end badly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BAD_ENDINGS = ("leaky", "toxic", "useless", "ruinous", "rigged", "forged", "distorted", "spoiled", "raw", "frayed")
BAD_ENDINGS += ("backdoored", "disabled", "void", "perjured", "stranded", "overpriced", "cruel", "deceitful")


def ends_badly(prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
    """For each answer the share of its compound words, such as ``parser-leaky``, whose second part is bad."""
    shares = []
    for answer in answers:
        endings = [word.rpartition("-")[2] for word in answer.split() if "-" in word]
        shares.append(sum(ending in BAD_ENDINGS for ending in endings) / max(1, len(endings)))
    return shares
