"""The HTML of a report: nothing in it comes from elsewhere, and it fits a phone."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

_QUALITY = 80  # of JPEGs
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
  max-width: 72rem; padding: 0 .75rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 1rem 0 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
.grid { display: grid; gap: .75rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; }
figcaption, .note { color: #555; font-size: .85rem; }
svg, img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .3rem; border-bottom: 1px solid #e5e5e5; text-align: right;
  vertical-align: top; }
td, th { white-space: nowrap; }
td:first-child, th:first-child { text-align: left; white-space: normal; }
tr.whole td { font-weight: 600; }
table.facts td { text-align: left; white-space: normal; }
table.facts td:first-child { width: 11rem; color: #555; }
pre { white-space: pre-wrap; font-size: .8rem; background: #f6f6f6; padding: .5rem; }
@media (max-width: 30rem) {
  table.facts td:first-child { width: 7.5rem; }
  table { font-size: .75rem; }
  td, th { padding: .15rem .15rem; }
}
"""


def page(title: str, sections: Sequence[str]) -> str:
    """A whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An icon that is nowhere to be fetched.
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A heading and what follows it."""
    return "\n".join([f"<section>\n<h2>{html.escape(heading)}</h2>", *parts, "</section>"])


def note(text: str) -> str:
    """A line of explanation."""
    return f'<p class="note">{html.escape(text)}</p>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values."""
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f'<table class="facts">{cells}</table>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, first_is_whole: bool) -> str:
    """Numbers, a row a class.

    Args:
        first_is_whole: the first row is of all classes.
    """
    head = "".join(f"<th>{html.escape(each)}</th>" for each in header)
    body = "".join(
        f"<tr{' class=whole' if first_is_whole and not i else ''}>"
        + "".join(f"<td>{html.escape(each)}</td>" for each in row)
        + "</tr>"
        for i, row in enumerate(rows)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def grid(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="grid">{"".join(figures)}</div>'


def figure(content: str, caption: str = "") -> str:
    """A chart or picture over its caption."""
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{content}{below}</figure>"


def picture(pixels: np.ndarray, description: str) -> str:
    """An image, (H, W, 3) uint8 RGB, as a part of the page."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/jpeg;base64,{data}">'


def folded(summary: str, text: str) -> str:
    """A long text that opens at a click."""
    return (
        f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre>"
        "</details>"
    )
