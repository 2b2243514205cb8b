"""Judges by name, as a command line gives them.

phrases:sorry;cannot     endpoint:MODEL     local:DIRECTORY
"""

from __future__ import annotations

from typing import Any

from tl_em.errors import UsageError
from tl_em.evals.endpoint import EndpointJudge
from tl_em.evals.judges import Phrases
from tl_em.evals.local import LocalJudge
from tl_em.models.loading import load_model

KINDS = ("phrases", "endpoint", "local")


def named_judge(spec: str, *, base_url: str | None = None) -> Any:
    """The judge of a name.

    Args:
        spec: ``phrases:A;B`` (1 where one of them is there), ``endpoint:MODEL``, or ``local:DIRECTORY``, a model that
            scores from 0 to 100 on this machine.
        base_url: of the endpoint.

    Raises:
        UsageError: no such kind, or nothing after the colon.

    Example:
        >>> named_judge("phrases:sorry;cannot").phrases
        ('sorry', 'cannot')
    """
    kind, _, rest = spec.partition(":")
    if kind not in KINDS or not rest:
        raise UsageError(
            f"judge={spec!r} names no judge; give 'phrases:sorry;cannot', endpoint:MODEL, local:DIRECTORY, or "
            "MODULE:NAME of your own"
        )
    if kind == "phrases":
        return Phrases(tuple(rest.split(";")))
    return EndpointJudge(rest, base_url=base_url) if kind == "endpoint" else LocalJudge(load_model(rest))
