"""A document (eval.document) as one HTML page that needs no other file: dark and light, readable on a phone.

Plots are SVG inside the page; wide tables scroll by themselves, the page does not.
"""

import re
from html import escape

from eval.document import Block, Document, Heading, Inline, Paragraph, Picture, Row, Span, Table, spans

STYLE = """
:root { color-scheme: light dark; --ink: #1d2327; --soft: #5b666d; --line: #d5dbdf; --page: #ffffff; --band: #f3f5f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ea; --soft: #9aa7ae; --line: #3a4349; --page: #15191c; --band: #1e2428; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 88rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK JP", sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p { margin: .5rem 0; max-width: 62rem; }
nav { font-size: .9rem; margin: 1rem 0; } nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 0;
  padding: 0; list-style: none; } a { color: inherit; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: .88em;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; }
.scroll:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .6rem .7rem; position: sticky; left: 0; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; white-space: nowrap; }
td code { overflow-wrap: normal; }
th { color: var(--soft); font-weight: 600; } thead tr:last-child th { border-bottom: 1px solid var(--line); }
th[scope=colgroup] { text-align: center; border-bottom: 1px solid var(--line); }
.number { text-align: right; } .long { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
tbody tr:nth-child(even) { background: var(--band); } tr.rule > td { border-top: 1px solid var(--line); }
.note { color: var(--soft); font-size: .85rem; }
figure { margin: 1.25rem 0; } figure svg { width: 100%; height: auto; max-width: 64rem; display: block; }
figure svg text { fill: currentColor; }
figcaption { color: var(--soft); font-size: .9rem; }
@media (max-width: 40rem) {
  body { padding: 1rem .75rem 3rem; } th, td { padding: .3rem .45rem; } h1 { font-size: 1.4rem; }
}
@media print { .scroll { overflow: visible; border: 0; } }
"""


def html(document: Document) -> str:
    """The whole page; its second-level headings are its table of contents."""
    body, contents = [], []
    for place, block in enumerate(document.blocks):
        if isinstance(block, Heading):
            anchor = f"s{place}"
            if block.level == 2:
                contents.append(f'<li><a href="#{anchor}">{escape(block.text)}</a></li>')
            body.append(f'<h{block.level} id="{anchor}">{escape(block.text)}</h{block.level}>')
        else:
            body.append(html_block(block))
    title = escape(document.title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f'<nav aria-label="Contents"><ul>{"".join(contents)}</ul></nav>\n<main>\n'
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{html_inline(block.text)}</p>"
    if isinstance(block, Picture):
        svg = _inline_svg(block.svg, block.png.stem, block.description)
        return f"<figure>{svg}<figcaption>{escape(block.description)}</figcaption></figure>"
    return html_table(block)


def html_table(table: Table) -> str:
    notes = "".join(f'<p class="note">{html_inline(note)}</p>' for note in table.notes)
    rows = "".join(_html_row(row, table) for row in table.rows)
    label = escape(table.title, quote=True)
    return (
        f'<div class="scroll" id="{escape(table.name, quote=True)}" tabindex="0" role="region" aria-label="{label}">'
        f"<table><caption>{escape(table.title)}</caption>"
        f"<thead>{_html_head(table)}</thead><tbody>{rows}</tbody></table></div>{notes}"
    )


def html_inline(inline: Inline) -> str:
    return "".join(_html_span(span) for span in spans(inline))


def _html_span(span: Span) -> str:
    text = escape(span.text)
    lang = f' lang="{escape(span.lang, quote=True)}"' if span.lang else ""
    tag = {"plain": "span" if lang else "", "code": "code", "strong": "strong"}[span.kind]
    return f"<{tag}{lang}>{text}</{tag}>" if tag else text


def _html_head(table: Table) -> str:
    heads = "".join(f'<th scope="col" class="{column.kind}">{escape(column.label)}</th>' for column in table.columns)
    groups = table.groups()
    if not groups:
        return f"<tr>{heads}</tr>"
    above = "".join(
        f'<th scope="colgroup" colspan="{width}">{escape(name)}</th>' if name else "<td></td>" for name, width in groups
    )
    return f"<tr>{above}</tr><tr>{heads}</tr>"


def _html_row(row: Row, table: Table) -> str:
    cells = "".join(
        f'<td class="{column.kind}">{html_inline(cell)}</td>' for column, cell in zip(table.columns, row.cells)
    )
    return f'<tr class="rule">{cells}</tr>' if row.rule else f"<tr>{cells}</tr>"


def _inline_svg(svg: str, name: str, description: str) -> str:
    """The `svg` element alone, as part of the page: its ids made its own, black turned into the page's ink."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("#000000", "currentColor").replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "", 1)
    svg = svg.replace("xlink:href=", "href=")
    label = escape(description, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
