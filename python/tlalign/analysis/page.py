"""One page of HTML with pictures and tables inside it: it needs no network, no script and no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --page: #fafaf8; --card: #ffffff; --text: #1c1c1a; --quiet: #5b5b57; --line: #d9d9d4;
  --link: #0b57a0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #161719; --card: #202225; --text: #ececea; --quiet: #a9adb3; --line: #3a3d42; --link: #8ab8ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 16px; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.4em 0; }
h2 { font-size: 1.25rem; margin: 0 0 0.3em; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; margin: 12px 0; padding: 0; }
p { max-width: 75ch; margin: 0.5em 0; }
.quiet, figcaption, caption { color: var(--quiet); font-size: 0.92rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 18px 0; padding: 16px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 20px;
  align-items: start; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; max-width: 540px; height: auto; background: #ffffff; border-radius: 4px; }
figure.wide { overflow-x: auto; }
figure.wide img { max-width: 860px; min-width: 600px; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: 4px; }
th, td { border-bottom: 1px solid var(--line); padding: 3px 12px 3px 0; text-align: right; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
@media (max-width: 480px) { body { padding: 8px; } section { padding: 10px; } }
"""


@dataclass
class Picture:
    """A picture of a section.

    Attributes:
        path: PNG file.
        alt: What is to be seen, for those who don't see it.
        caption: What stands below.
        wide: Whether it takes the whole width.
    """

    path: Path
    alt: str
    caption: str
    wide: bool = False


@dataclass
class Table:
    """A table of a section.

    Attributes:
        caption: What stands above.
        head: Names of the columns.
        rows: Cells; numbers are rounded to four digits.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: Heading.
        text: Paragraphs.
        pictures: Pictures, side by side where there is room.
        tables: Tables below them.
    """

    title: str
    text: Sequence[str]
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def write_page(path: Path, title: str, summary: Sequence[str], sections: Sequence[Section]) -> None:
    """Writes a page that is complete in itself.

    Args:
        path: HTML file to write.
        title: Of the page.
        summary: Paragraphs at its top.
        sections: Its parts.
    """
    links = "".join(
        f'<li><a href="#part{number}">{html.escape(section.title)}</a></li>' for number, section in enumerate(sections)
    )
    parts = "\n".join(_section(number, section) for number, section in enumerate(sections))
    path.write_text(
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
{_paragraphs(summary)}
<nav aria-label="Parts of the page"><ul>{links}</ul></nav>
</header>
<main>
{parts}
</main>
</body>
</html>
""",
        encoding="utf-8",
        # Paths need not be text.
        errors="replace",
    )


def _section(number: int, section: Section) -> str:
    pictures = "\n".join(_picture(picture) for picture in section.pictures)
    tables = "\n".join(_table(table) for table in section.tables)
    return f"""<section id="part{number}" aria-labelledby="title{number}">
<h2 id="title{number}">{html.escape(section.title)}</h2>
{_paragraphs(section.text)}
<div class="pictures">{pictures}</div>
{tables}
</section>"""


def _paragraphs(text: Sequence[str]) -> str:
    return "\n".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in text)


def _picture(picture: Picture) -> str:
    content = base64.b64encode(picture.path.read_bytes()).decode()
    # What scrolls sideways on a phone can be reached by keys.
    kind = ' class="wide" tabindex="0"' if picture.wide else ""
    return (
        f"<figure{kind}>"
        f'<img src="data:image/png;base64,{content}" alt="{html.escape(picture.alt)}">'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name.replace("_", " "))}</th>' for name in table.head)
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell_text(cell))}</td>' for cell in row)}</tr>" for row in table.rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{html.escape(table.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def cell_text(cell: str | float | int | None) -> str:
    """What a table says of a value."""
    if cell is None or cell != cell:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
