"""What the HTML pages share: one document with its style inside, tables, lists, figures. Nothing beside the page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

_STYLE = """
:root{color-scheme:light dark;--ground:#fcfcfb;--text:#1b1d21;--soft:#5c636e;--line:#dfe1e5;--best:#e8f0fb;
--series-0:#2f6fd0;--series-1:#d2601a;--series-2:#1d8a5b;--series-3:#a04bb0;--series-4:#9a7b00;--series-5:#c43d5c}
@media (prefers-color-scheme:dark){:root{--ground:#16181c;--text:#e9eaec;--soft:#a2a9b3;--line:#363b43;
--best:#1f3150;--series-0:#6aa5f5;--series-1:#f2935a;--series-2:#4fc08d;--series-3:#cf8add;--series-4:#d1b23c;
--series-5:#f07f99}}
body{margin:0 auto;max-width:78rem;padding:1.5rem;background:var(--ground);color:var(--text);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}h3{font-size:1rem;margin:1.4rem 0 .4rem}
p,.soft{color:var(--soft);margin:.3rem 0}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{font-weight:600}td.best{background:var(--best);font-weight:600}
td small{color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:1rem 2rem}
.chart{width:100%;height:auto}.chart text{font-size:11px;fill:var(--soft)}.grid{stroke:var(--line)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:.2rem 0;padding:0}
.legend svg{width:24px;height:8px;margin-right:.4rem;vertical-align:middle}
.strip{display:flex;gap:.8rem;overflow-x:auto;padding-bottom:.5rem}
.strips{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(36rem,100%),1fr));gap:.6rem 2rem}
figure{margin:0;flex:none}figcaption{font-size:.82rem;color:var(--soft);max-width:18rem}
figure img{display:block;min-width:14rem;border-radius:4px;background:var(--line)}
.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
ul.plain{padding-left:1.2rem;overflow-wrap:anywhere}
""".strip()


def write_document(path: Path, title: str, parts: Iterable[str]) -> Path:
    """A page of these HTML parts, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text("\n".join((_head(title), *parts, "</body></html>")) + "\n", encoding="utf-8")
    return part.replace(path)


def _head(title: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # or browsers ask for /favicon.ico
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
    )


def figure(uri: str, caption: str) -> str:
    return f'<figure><img src="{uri}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; one that starts with \\0 is the best of its column."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="best">{cell[1:]}</td>' if cell.startswith("\0") else f"<td>{cell}</td>" for cell in row
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def bullets(items: Iterable[str]) -> str:
    return f'<ul class="plain">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'
