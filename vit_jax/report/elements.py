"""Parts of an HTML page, from text that they escape."""

import base64
import html
import io
import pathlib
from collections.abc import Sequence


def text(value) -> str:
    """Returns a value as escaped text; file names may have bytes that aren't UTF-8."""
    readable = str(value).encode("utf-8", "backslashreplace").decode()
    return html.escape(readable)


def section(title: str, *parts: str) -> str:
    """Returns parts under a heading; nothing if all are empty."""
    parts = [part for part in parts if part]
    return f"<h2>{text(title)}</h2>\n" + "\n".join(parts) if parts else ""


def paragraph(words: str) -> str:
    return f'<p class="faint">{text(words)}</p>'


def numbers(items: Sequence[tuple[str, str, str]]) -> str:
    """Returns large numbers side by side: (title, number, what is below it)."""
    cards = (
        f"<div><span>{text(title)}</span><b>{text(number)}</b><span>{text(below)}</span></div>"
        for title, number, below in items
    )
    return f'<div class="numbers">{"".join(cards)}</div>'


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), style: str = "") -> str:
    """Returns a table; it scrolls sideways where the page is narrower.

    Args:
        rows: the cells of each row.
        header: the titles of the columns; empty: none.
        style: "text" if the cells are text instead of numbers.
    """
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    body = "\n".join(f"<tr>{''.join(f'<td>{text(c)}</td>' for c in row)}</tr>" for row in rows)
    head = f"<tr>{head}</tr>\n" if head else ""
    return f'<div class="scroll"><table class="{style}">\n{head}{body}\n</table></div>'


def details(title: str, content: str) -> str:
    """Returns content that is hidden until the reader opens it."""
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def preformatted(content: str) -> str:
    return f"<pre>{text(content)}</pre>"


def picture(png: bytes, description: str, caption: str, is_wide: bool = False) -> str:
    """Returns a PNG as part of the page.

    Args:
        png: the file's contents.
        description: what is to be seen, for readers who don't see it.
        caption: the text below.
        is_wide: whether it scrolls sideways on a narrow screen, where it would be too small.
    """
    encoded = base64.b64encode(png).decode()
    style = "wide" if is_wide else ""
    return (
        f'<figure class="{style}">'
        f'<img alt="{text(description)}" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def figure_png(figure) -> bytes:
    """Returns a matplotlib Figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return buffer.getvalue()


def page(title: str, *parts: str) -> str:
    """Returns a complete page; it loads nothing and executes nothing."""
    style = pathlib.Path(__file__).with_name("style.css").read_text()
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
