"""How HTML of this package reaches an eye: one environment for templates, one frame for notebooks, one theme in both.

A whole page stands in a notebook in a sandboxed ``<iframe srcdoc>`` of an origin of its own. It cannot ask the notebook
which theme is chosen, nor may anything be run outside to tell it. What can cross is its size: the host's stylesheet
makes the frame ``SIGN`` pixels taller where the theme is light and twice that where it is dark, all of it clipped away,
and the page reads that in a media query. So a page follows a switch of the theme at once, without a script, whether or
not the browser hands ``color-scheme`` down to frames. Where no known host says anything, ``prefers-color-scheme`` does.

A drawing lies in the notebook's own page, where rules reach it: its letters and greys are those of the page around, its
hues those of the theme that the host names, or else the browser prefers.

A notebook that is not trusted is stripped of frames, drawings and styles. What is left is a sentence that says so, or
an image on white.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tl_em.artefacts import check_ending, replacing
from tl_em.showing import showable, slug

SANDBOX = "allow-scripts allow-downloads"
SIGN = 20_000
"""Pixels by which a frame is taller in a light theme; twice as many in a dark one."""
LEAST = 480
"""Pixels that a frame is high at least, where the screen is low."""
MOST = 2_500_000
"""Characters of a page that a notebook is given at most: servers cut off what comes in megabytes a second."""
DARK = (
    'body[data-jp-theme-light="false"]', "body.vscode-dark",
    "body.vscode-high-contrast:not(.vscode-high-contrast-light)", "html.dark", "body.dark", ".dark-theme",
    'html[theme="dark"]', '[data-theme="dark"]', '[data-md-color-scheme="slate"]',
)  # fmt: skip
"""How JupyterLab, VS Code, marimo, Colab, Sphinx themes and MkDocs say that they are dark."""
LIGHT = (
    'body[data-jp-theme-light="true"]', "body.vscode-light", "body.vscode-high-contrast-light", "html.light",
    "body.light", ".light-theme", 'html[theme="light"]', '[data-theme="light"]', '[data-md-color-scheme="default"]',
)  # fmt: skip
_HOST = (
    ".tl-em-frame{{position:relative;height:var(--tl-em-height);border:1px solid #8886;border-radius:6px;"
    "overflow:hidden;overflow:clip}}.tl-em-frame iframe{{position:absolute;left:0;top:0;height:100%!important;"
    "color-scheme:inherit}}.tl-em-frame p{{display:none}}"
    ":is({light}) .tl-em-frame iframe{{height:calc(100% + {one}px)!important;color-scheme:light}}"
    ":is({dark}) .tl-em-frame iframe{{height:calc(100% + {two}px)!important;color-scheme:dark}}"
).format(light=",".join(LIGHT), dark=",".join(DARK), one=SIGN, two=2 * SIGN)
_GUEST = (
    "@media (min-height:{one}px){{:root{{--screen:calc(100vh - {one}px)}}html{{height:var(--screen)!important;"
    "overflow:hidden}}body{{height:100%!important;min-height:0!important;overflow:auto}}}}"
    "@media (min-height:{two}px){{:root{{--screen:calc(100vh - {two}px)}}}}"
).format(one=SIGN, two=2 * SIGN)


_NEUTRAL = (
    "--sans:system-ui,sans-serif;--ink:currentColor;--page:var(--jp-layout-color0,var(--vscode-editor-background,Canvas));"
    + "".join(f"--{name}:color-mix(in srgb,currentColor {share}%,transparent);" for name, share in (
        ("muted", 70), ("rule", 25), ("band", 13), ("base", 78), ("untreated", 78), ("base-text", 85),
        ("untreated-text", 85),
    ))
)  # fmt: skip
"""Of a picture that lies in a notebook's own page: its letters and greys are the page's letters, in any theme."""
_HUES = re.compile(r"--(?:benign|tuned|random|treated|brown|indigo|lavender)(?:-text)?: #[0-9a-f]{6};")


@cache
def _theme() -> str:
    """Rules by which a picture in a notebook's own page has the colours of ``style.css``, light or dark."""
    style = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    light, dark = ("".join(_HUES.findall(part)).replace(" ", "") for part in style.split("color-scheme: dark;"))
    return (
        f".tl-em-picture{{{_NEUTRAL}{light}}}"
        f"@media (prefers-color-scheme:dark){{.tl-em-picture{{{dark}}}}}"
        f":is({','.join(LIGHT)}) .tl-em-picture{{{light}}}:is({','.join(DARK)}) .tl-em-picture{{{dark}}}"
        ".tl-em-picture svg{display:block;width:100%;height:auto}.tl-em-picture img{display:none}"
    )


def picture(drawing: str, instead: str, title: str, *, width: int) -> str:
    """A drawing in a notebook's own page, in the colours of its theme.

    Args:
        drawing: an SVG element whose colours are the custom properties of ``style.css``.
        instead: an image that stands in its place where a notebook that is not trusted loses drawings and styles.
        title: what it shows, for a screen reader.
        width: pixels, where there is room.
    """
    return (
        f'<div class="tl-em-picture" role="img" aria-label="{html.escape(showable(title))}" '
        f'style="max-width:{width}px"><style>{_theme()}</style>{drawing}{instead}</div>'
    )


def environment(*folders: Path) -> jinja2.Environment:
    """Templates of the report, and of further folders: everything escaped, everything visible, nothing undefined."""
    loader = jinja2.FileSystemLoader([Path(__file__).parent / "templates", *folders])
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=_finalised,
    )  # fmt: skip
    made.filters["slug"] = slug
    made.filters["breakable"] = _breakable
    return made


def _breakable(name: str) -> Markup:
    """A name that may be broken after an underscore, and only there where that is enough."""
    return Markup("_<wbr>").join(Markup.escape(part) for part in showable(name).split("_"))


def _finalised(value: Any) -> Any:
    return showable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def frame(document: str, title: str, *, height: int, scripts: bool = True, instead: str = "") -> str:
    """A whole document in a sandboxed frame, as Jupyter, Colab, VS Code and marimo all show it.

    Args:
        document: HTML that loads nothing; more than ``MOST`` characters are not shown, which is said.
        title: what the frame holds, for a screen reader.
        height: of the frame in pixels; on a low screen it is lower, so that it can be seen as a whole.
        scripts: whether the document's script may run, and offer downloads; nothing else is ever allowed.
        instead: the call that writes the page to a file, for those who cannot see it here.
    """
    named = html.escape(showable(title))
    way = f" <code>{html.escape(instead)}</code> writes it to a file." if instead else ""
    if len(document) > MOST:
        return f"<p>{named}: {len(document) / 1e6:.1f} MB, more than a notebook takes ({MOST / 1e6:.1f} MB).{way}</p>"
    fitted = f"clamp({min(height, LEAST)}px,84vh,{height}px)"
    return (
        f'<div class="tl-em-frame" style="--tl-em-height:{fitted}"><style>{_HOST}</style>'
        f'<iframe sandbox="{SANDBOX if scripts else ""}" title="{named}" srcdoc="{html.escape(_guest(document))}" '
        f'style="width:100%;height:{height}px;border:0"></iframe><p>{named}: not shown here, because this notebook is '
        "not trusted and its frames are taken out. To see it, trust the notebook (<em>Trust Notebook</em> in the "
        f"command palette, or <code>jupyter trust FILE</code>) or run the cell again.{way}</p></div>"
    )


def _guest(document: str) -> str:
    """The document with the rules by which it reads its host's theme; at the end of its head, so that they count."""
    style = f"<style>{_GUEST}</style>"
    before, end, after = document.partition("</head>")
    return f"{before}{style}{end}{after}" if end else style + document


def write(path: str | Path, document: str) -> Path:
    """Write a page (or its JSON), whole or not at all.

    Raises:
        UsageError: another ending. OutputError: the path cannot be written.
    """
    page = not document.startswith("{")
    check_ending(path, "a page" if page else "JSON", *((".html", ".htm") if page else (".json",)))
    with replacing(path) as temporary:
        temporary.write_text(document, encoding="utf-8")
    return Path(path)


@dataclass(frozen=True, eq=False)
class Framed:
    """A page of its own that a notebook shows in a frame.

    Args:
        document: the whole HTML.
        title: what it is.
        height: of the frame in pixels.
        said: what stands in its place where only text is shown.

    Example:
        >>> view = Framed("<!doctype html><head></head><p>here</p>", "A picture", 300, "a picture of nothing")
        >>> view
        A picture: a picture of nothing; a page of 1 kB that a notebook shows, and .save("page.html") writes
    """

    document: str
    title: str
    height: int
    said: str

    def save(self, path: str | Path) -> Path:
        """Write the page.

        Raises:
            UsageError: no path of an HTML file. OutputError: the path cannot be written.
        """
        return write(path, self.document)

    def _repr_html_(self) -> str:
        return frame(self.document, self.title, height=self.height, instead='view.save("page.html")')

    __html__ = _repr_html_

    def __repr__(self) -> str:
        n = len(self.document)
        size = f"{n / 1e6:.1f} MB" if n > 1e6 else f"{n // 1000 + 1} kB"
        return (
            f"{showable(self.title)}: {showable(self.said)}; a page of {size} that a notebook shows, and "
            '.save("page.html") writes'
        )
