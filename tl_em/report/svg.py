"""matplotlib figures as SVG elements for a page: allowed elements only, text as text, colours as custom properties.

The drawing is rebuilt element by element from a short list of allowed ones, so that nothing but shapes and text can get
into the page whatever a model or a domain is called, and its colours become the page's custom properties, so that one
drawing serves light and dark.
"""

from __future__ import annotations

import re
from io import StringIO
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from tl_em.report import drawing
from tl_em.showing import showable, slug

_ELEMENTS = frozenset({"svg", "g", "path", "text", "tspan", "use", "defs", "clipPath", "rect", "line", "circle"})
_ATTRIBUTES = frozenset(
    {"id", "d", "style", "transform", "x", "y", "width", "height", "clip-path", "viewBox", "href", "cx", "cy", "r"}
)
_LOOKS = drawing.MORE | drawing.MODELS | drawing.CONDITIONS
_COLOURS = {
    drawing.INK: "ink",
    drawing.MUTED: "muted",
    drawing.RULE: "rule",
    drawing.BAND: "band",
    "#ffffff": "page",
    **{look.text: f"{name}-text" for name, look in _LOOKS.items()},
    **{look.colour: name for name, look in _LOOKS.items()},
}


def inline(figure: Figure, name: str) -> Markup:
    """A figure as an SVG element for a page: allowed elements only, text as text, colours as custom properties."""
    buffer = StringIO()
    with drawing.styled(), matplotlib.rc_context({"svg.hashsalt": showable(name)}):
        drawing.seen(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    return Markup(ElementTree.tostring(clean(root, name), encoding="unicode"))


def clean(element: ElementTree.Element, name: str) -> ElementTree.Element:
    """The same element without namespaces, without what is not allowed, and with ids of this figure's own."""
    kept = ElementTree.Element(element.tag.rpartition("}")[2])
    for key, value in element.attrib.items():
        key = key.rpartition("}")[2]
        if key in _ATTRIBUTES and not (kept.tag == "svg" and key in ("width", "height")):
            kept.set(key, _attribute(key, value, name))
    if kept.tag == "svg":
        kept.set("aria-hidden", "true")
        kept.set("focusable", "false")
        kept.set("style", "stroke-linejoin:round;stroke-linecap:butt")
    kept.text, kept.tail = element.text, element.tail
    kept.extend(clean(child, name) for child in element if child.tag.rpartition("}")[2] in _ELEMENTS)
    return kept


def _attribute(key: str, value: str, name: str) -> str:
    own = slug(name)
    if key == "id":
        return f"{own}-{value}"
    if key == "href":
        return f"#{own}-{value.removeprefix('#')}" if value.startswith("#") else "#"
    if key == "clip-path":
        return value.replace("url(#", f"url(#{own}-")
    if key == "style":
        value = re.sub(r"font: ([^;]*?)(\d+(?:\.\d+)?px)[^;]*", r"font: \1\2 var(--sans)", value)
        return re.sub(r"#[0-9a-f]{6}", lambda found: _colour(found.group()), value)
    return value


def _colour(code: str) -> str:
    return f"var(--{_COLOURS[code]})" if code in _COLOURS else code
