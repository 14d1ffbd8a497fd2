"""The look of the report: one HTML page that needs nothing else, light and dark, from phone to desktop."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c636b; --paper: #ffffff; --line: #d5d8dc; --tint: #f3f5f7;
  --link: #0058a3; --heat: 0, 114, 178 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a3abb5; --paper: #16181c; --line: #3a3f46;
  --tint: #1f2328; --link: #7cc0f5; --heat: 86, 180, 233 } }
* { box-sizing: border-box }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100% }
body { margin: 0; color: var(--ink); background: var(--paper); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", sans-serif }
a { color: var(--link) }
.page { max-width: 40rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; padding-top: .8rem; border-top: 1px solid var(--line) }
h3 { font-size: 1.02rem; margin: 2rem 0 .4rem }
p { margin: .5rem 0 }
.soft, figcaption { color: var(--soft) }
.path { overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1.2rem 0 }
.tiles div { background: var(--tint); border-radius: .5rem; padding: .7rem .8rem }
.tiles dd { margin: 0; font-size: 1.3rem; font-weight: 650; line-height: 1.2; white-space: nowrap }
.tiles dt { color: var(--soft); font-size: .82rem; line-height: 1.35; margin-top: .2rem }
.tiles div { display: flex; flex-direction: column-reverse; justify-content: flex-end }
nav ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .4rem }
nav a { display: inline-block; padding: .3rem .75rem; border: 1px solid var(--line); border-radius: 1rem;
  text-decoration: none; font-size: .9rem }
nav a:hover { background: var(--tint) }
figure { margin: .6rem 0 1rem }
figure img { display: block; width: 100%; height: auto }
figcaption { font-size: .92rem; margin-top: .5rem }
details { margin: .8rem 0 }
summary { cursor: pointer; color: var(--link); font-size: .92rem; padding: .2rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
thead th { color: var(--soft); font-weight: 600 }
th[scope=row] { text-align: left; font-weight: 500 }
.facts { width: 100%; table-layout: fixed }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere }
.facts th { vertical-align: top; color: var(--soft); white-space: normal; width: 38% }
.facts td { vertical-align: top }
.passage { background: var(--tint); border-radius: .5rem; padding: .8rem; line-height: 2; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .95rem/2 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }
.legend { display: flex; flex-wrap: wrap; gap: .3rem .9rem; margin: .6rem 0; font-size: .86rem; padding: 0;
  list-style: none }
.passage span, .legend span { border-bottom: 0 solid var(--ink); padding-bottom: 1px; margin-right: 1px }
.v1 { background: rgba(var(--heat), .06) }
.v2 { background: rgba(var(--heat), .2); border-bottom-width: 1px !important }
.v3 { background: rgba(var(--heat), .34); border-bottom-width: 2px !important }
.v4 { background: rgba(var(--heat), .48); border-bottom-width: 3px !important }
.v5 { background: rgba(var(--heat), .62); border-bottom-width: 4px !important }
@media (max-width: 36rem) { figure img { width: 100vw; max-width: none; margin-left: calc(50% - 50vw) } }
@media (min-width: 70rem) { .page { display: grid; grid-template-columns: 11rem 40rem; gap: 0 3.5rem; max-width: 56rem }
  nav { grid-row: 1 / span 2; position: sticky; top: 1.5rem; align-self: start } main, header { grid-column: 2 }
  nav ul { flex-direction: column; gap: .1rem } nav a { border: 0; display: block } }
@media print { nav { display: none } h2, h3, figure { break-inside: avoid; break-after: avoid } }
"""


def page(title: str, header: str, contents: list[str], main: str) -> str:
    """A whole document. `header` and `main` are HTML; the contents are the titles of sections, see `section`."""
    links = "".join(f'<li><a href="#{anchor(name)}">{escape(name)}</a></li>' for name in contents)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><div class=page>\n"
        f"<header>{header}</header>\n<nav aria-label=Contents><ul>{links}</ul></nav>\n<main>{main}</main>\n"
        "</div></body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A section that the contents lead to; `body` is HTML."""
    return f'<section><h2 id="{anchor(title)}">{escape(title)}</h2>\n{body}</section>\n'


def folded(summary: str, body: str) -> str:
    """Something to be opened by a touch; `body` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>\n"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table of texts, the first of each row its name; it scrolls where the page is narrow."""
    head = "".join(f"<th scope=col>{escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr><th scope=row>{escape(row[0])}</th>" + "".join(f"<td>{escape(text)}</td>" for text in row[1:]) + "</tr>\n"
        for row in rows
    )
    return f"<div class=wide tabindex=0><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"


def anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())
