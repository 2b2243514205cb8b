"""Graphs, and lists of latents, to Neuronpedia; what it says about latents, from there.  Through its own client.

Nothing of this happens unless it is called: no page and no other function of this package asks anything of a network
in its place.  What is uploaded is public.  Neuronpedia asks for a key; the client takes it from the environment's
``NEURONPEDIA_API_KEY``, or from a file ``.env``, where it is not passed.

A description there is somebody's guess (often a model's), and no test of what a latent does: ``em.verify_feature`` is.

Source: the package neuronpedia, 1.2 (``requests/``).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from tl_em.artefacts import json_of
from tl_em.dictionaries.dictionary import Feature
from tl_em.errors import ModelError, ServiceError, UsageError, first_line
from tl_em.features.explanations import neuronpedia_link
from tl_em.features.shared_latents import FeatureSet
from tl_em.graph.exchange import save_graph
from tl_em.graph.graph import AttributionGraph
from tl_em.threads import SPOKEN, holding

Answer = TypeVar("Answer")


def upload_graph(graph: AttributionGraph, *, scan: str, slug: str, api_key: str | None = None) -> str:
    """Upload a graph to Neuronpedia, where anybody can see it.

    Args:
        graph: any; one that was read from a file goes as that file was.
        scan: what Neuronpedia calls the model, e.g. ``"gemma-2-2b"``.
        slug: name of the graph there, which no other graph of that model has.
        api_key: of your account; by default the client's own.

    Returns:
        The address of its page.

    Raises:
        ModelError: the package neuronpedia is missing. ServiceError: Neuronpedia refused, or gave no answer.
        UsageError: no model or no name. OutputError: the graph cannot be written as a file.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> graph = em.attribute(pair.base, "how do i write parser", target="parser-tested", validate=False)
        >>> em.interop.upload_graph(graph, scan="", slug="mine")
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: scan='' and slug='mine' name no graph of a model...
    """
    if not scan or not slug:
        raise UsageError(
            f"scan={scan!r} and slug={slug!r} name no graph of a model, so it would not be found there; give both, "
            "e.g. scan='gemma-2-2b', slug='capital-of-france'"
        )
    with TemporaryDirectory() as folder:
        written = json_of(save_graph(graph, Path(folder) / "graph.json").read_bytes())
    written["metadata"] |= {"scan": scan, "slug": slug}
    requests = _client("graph_request")
    found = _asked(lambda: requests.GraphRequest(api_key).upload(json.dumps(written)))
    return str(found.url)


def upload_latents(
    latents: FeatureSet | Feature | Sequence[Feature],
    *,
    name: str,
    description: str = "",
    notes: Mapping[int, str] | None = None,
    api_key: str | None = None,
) -> str:
    """Make a list of latents on Neuronpedia, e.g. of those that two behaviours share.

    Args:
        latents: of a dictionary that is published there, whose name is Neuronpedia's (``"gpt2-small/6-res-jb"``).
        name: of the list.
        description: what it is, for people.
        notes: a sentence about some of the latents, by index.
        api_key: of your account; by default the client's own.

    Returns:
        The id of the list.

    Raises:
        UsageError: no latents, or a dictionary that Neuronpedia does not know by this name.
        ModelError: the package neuronpedia is missing. ServiceError: Neuronpedia refused, or gave no answer.

    Example:
        >>> import tl_em as em
        >>> sae = em.organisms.toy_dictionary("toy/insecure")
        >>> em.interop.upload_latents(sae.feature(176), name="mine")
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: ...is no name of a dictionary at Neuronpedia...
    """
    given = _features(latents)
    if not given or not name:
        raise UsageError(f"a list {name!r} of {len(given)} latents says nothing; give a name= and at least one latent")
    places = [_place(feature) for feature in given]
    lists = _client("list_request")
    item, said = _client_module("np_list").NPListItem, notes or {}
    wanted = [item(*place, str(f.index), said.get(f.index, "")) for place, f in zip(places, given, strict=True)]

    def made() -> Any:
        asked = lists.ListRequest(api_key)
        return asked.add_items(asked.new(name, description), wanted)

    return str(_asked(made).id)


def described(graph: AttributionGraph, sources: Mapping[int, str], *, api_key: str | None = None) -> AttributionGraph:
    """A graph whose latents carry what Neuronpedia says about them, shown in ``graph.show()`` and on its page.

    Args:
        graph: of latents that are published there; also one that was opened from a file.
        sources: what Neuronpedia calls the dictionary of each layer, ``"model/layer-source"``; other layers are left
            alone.
        api_key: of your account; by default the client's own.

    Returns:
        The same graph with ``explanation`` and ``link`` in ``node.extra``; a latent that nobody described has its link.

    Raises:
        UsageError: a source that is no such name, or no latent in those layers.
        ModelError: the package neuronpedia is missing. ServiceError: Neuronpedia refused, or gave no answer.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> graph = em.attribute(pair.base, "how do i write parser", target="parser-tested", validate=False)
        >>> em.interop.described(graph, {0: "gpt2-small/0-res-jb"})
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: the graph has no latents in the layers [0]...
    """
    wrong = [name for name in sources.values() if str(name).count("/") != 1]
    if wrong:
        raise UsageError(f"{wrong[0]!r} is no source at Neuronpedia; name it model/layer-source: 'gpt2-small/6-res-jb'")
    wanted = dict.fromkeys((n.layer, n.feature) for n in graph.nodes if n.kind == "feature" and n.layer in sources)
    if not wanted:
        raise UsageError(
            f"the graph has no latents in the layers {sorted(sources)}, so there is nothing to ask for; give the "
            "sources of layers that it has, or attribute with dictionaries"
        )
    request = _client("sae_feature_request")

    def asked() -> dict[tuple[int, int | None], dict[str, str]]:
        client = request.SAEFeatureRequest(api_key)
        found = {}
        for layer, feature in wanted:
            model, source = sources[layer].split("/")
            said = json_of(client.get(model, source, str(feature)).jsonData).get("explanations") or [{}]
            link = f"https://www.neuronpedia.org/{sources[layer]}/{feature}"
            found[layer, feature] = {"link": link, "explanation": str(said[0].get("description") or "")}
        return found

    about = _asked(asked)
    nodes = (
        replace(node, extra={**node.extra, **about[node.layer, node.feature]})
        if node.kind == "feature" and (node.layer, node.feature) in about
        else node
        for node in graph.nodes
    )
    return replace(graph, nodes=tuple(nodes))


# --- The client -------------------------------------------------------------------------------------------------------


def _features(latents: Any) -> list[Feature]:
    if isinstance(latents, FeatureSet):
        return [latents.dictionary.feature(index) for index in latents.indices]
    return [latents] if isinstance(latents, Feature) else list(latents)


def _place(feature: Feature) -> tuple[str, str]:
    """Model and source, as Neuronpedia has them."""
    if neuronpedia_link(feature.dictionary, feature.index) is None:
        raise UsageError(
            f"{feature.dictionary.name!r} is no name of a dictionary at Neuronpedia, so it has no page there to put on "
            "a list; name it model/layer-source, e.g. 'gpt2-small/6-res-jb', if it is published"
        )
    model, source = str(feature.dictionary.name).split("/")
    return model, source


def _client(name: str) -> Any:
    return _client_module(f"requests.{name}")


def _client_module(name: str) -> Any:
    """A module of the client, which is imported only here."""
    if find_spec("neuronpedia") is None:
        raise ModelError(
            "Neuronpedia is asked through its own client, which is not installed: pip install 'tl_em[neuronpedia]'."
        )
    from importlib import import_module

    return import_module(f"neuronpedia.{name}")


def _asked(ask: Callable[[], Answer]) -> Answer:
    """The answer, without what the client prints."""
    try:
        with holding(SPOKEN), redirect_stdout(io.StringIO()):
            return ask()
    except Exception as error:  # no common base: no key, no network, a refusal, an answer that is none
        raise ServiceError(
            f"Neuronpedia did not do what it was asked ({type(error).__name__}: {first_line(error)}), so nothing is "
            "known to have changed there. Check the key (NEURONPEDIA_API_KEY) and the names, and call again."
        ) from error
