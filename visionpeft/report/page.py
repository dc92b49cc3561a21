"""A self-contained HTML page: no scripts, no files beside it, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
th { border-bottom: 2px solid #888 }
figure { display: inline-block; margin: .4em; vertical-align: top; text-align: center }
figcaption { font-size: 12px } .wrong { color: #b00 } .note { color: #555 }
img { image-rendering: pixelated } svg { max-width: 100%; height: auto }
@media (prefers-color-scheme: dark) { body { background: #fff } }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """The whole document."""
    body = "\n".join(sections)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n")


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraphs(lines: Iterable[str]) -> str:
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{''.join(lines)}</table>"


def figure(content: str, caption: str = "", wrong: bool = False) -> str:
    """Markup of a picture (not escaped) with a caption (escaped)."""
    mark = ' class="wrong"' if wrong else ""
    return f"<figure>{content}<figcaption{mark}>{escape(caption)}</figcaption></figure>"


def folded(summary: str, content: str) -> str:
    """Markup (not escaped) behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"
