"""An SVG made fit to stand in a page: no ids that clash, colours of the page's own theme, a title and a description."""

from __future__ import annotations

import html
import re

COLOURS = {
    name: f"#0001{k:02x}"
    for k, name in enumerate(
        (
            *("ink", "muted", "line", "paper", "accent", "loss", "gain", "warn", "even"),
            *(f"{side}-{step}" for side in ("loss", "gain", "like") for step in range(1, 6)),
        )
    )
}
"""What pictures are drawn in: each stands for the page's custom property of the name, light or dark."""

SHOWN = 1.47
"""Pixels of a unit of a view box at most, so that the text of every picture is of one size."""

_NOISE = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>|<style[^>]*>.*?</style>", re.DOTALL
)
_FONT = re.compile(r" ?font-family: [^;\"]*;?")
_IDS = re.compile(r'\sid="([^"]*)"')
_REFERENCES = re.compile(r'(xlink:href="#|url\(#)([^")]+)')
_COLOUR = re.compile("|".join(COLOURS.values()))
_VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
_OPENING = re.compile(r"<svg[^>]*?viewBox=\"([^\"]+)\"[^>]*>")


def inlined(drawn: str, name: str, title: str, description: str) -> str:
    """Return a drawn SVG as an element of the page; `name` is its own among the page's pictures."""
    svg = _FONT.sub("", _NOISE.sub("", drawn))
    used = {found[1] for found in _REFERENCES.findall(svg)}
    svg = _IDS.sub(lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = _REFERENCES.sub(lambda found: f"{found[1]}{name}-{found[2]}", svg)
    svg = _COLOUR.sub(lambda found: _VARIABLES[found[0]], svg)
    width = float(found[1].split()[2]) if (found := _OPENING.search(svg)) else 0.0
    opening = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\\1" '
        f'role="img" aria-labelledby="{name}-title {name}-text" style="max-width:{SHOWN * width:.0f}px">'
    )
    said = (
        f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-text">{html.escape(description)}</desc>'
    )
    svg = _OPENING.sub(lambda found: found.expand(opening) + said, svg, count=1)
    return re.sub(r">\s+<", "><", svg).strip()
