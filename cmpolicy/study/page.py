"""The study as one HTML file that opens without a network: figures first, then the claims."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cmpolicy.study.claims import Claim

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1120px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
td, th { border-bottom: 1px solid #ddd; padding: .4em .6em; text-align: left; vertical-align: top; }
code { background: #f3f3f3; padding: .1em .3em; font-size: 12px; }
figure { margin: 1.5em 0; } figcaption { margin-top: .4em; }
.verdict { font-weight: 600; white-space: nowrap; } .supported { color: #00798c; }
.refuted { color: #d1495b; } .unclear { color: #9a6b00; } .small { color: #666; font-size: 13px; }
"""


@dataclass(frozen=True)
class Shown:
    """A figure of the page: its heading, what is drawn, and the picture with its MIME type."""

    name: str
    title: str
    caption: str
    mime: str
    picture: bytes


def make_page(
    figures: Sequence[Shown],
    claims: Sequence[Claim],
    tables: Mapping[str, Sequence[Mapping[str, str]]],
    *,
    command: str,
    about: Sequence[str],
) -> str:
    """The page.

    Args:
        figures: in their order.
        claims: each is stated below its figure, and in the table.
        tables: further tables by heading.
        command: what makes all of it.
        about: sentences on how it was measured.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>cmpolicy study stability</title><style>{_STYLE}</style></head><body>",
        "<h1>Stability of one-step flow maps, against the true flow</h1>",
        *(f"<p>{html.escape(text)}</p>" for text in about),
    ]
    for shown in figures:
        parts.append(_figure(shown, [c for c in claims if c.figure == shown.name], command))
    parts.append("<h2>Claims</h2>")
    parts.append(_claims(claims))
    for heading, rows in tables.items():
        parts += [f"<h2>{html.escape(heading)}</h2>", _table(rows)]
    return "\n".join([*parts, "</body></html>", ""])


def _figure(shown: Shown, claims: Sequence[Claim], command: str) -> str:
    encoded = base64.b64encode(shown.picture).decode()
    said = "".join(
        f"<li>{html.escape(c.claim)} {_verdict(c)}: {html.escape(c.evidence)}. "
        f'<span class="small">Rule: {html.escape(c.rule)}. '
        f"What would change it: {html.escape(c.needed)}.</span></li>"
        for c in claims
    )
    return (
        f'<figure id="{shown.name}"><h2>{html.escape(shown.title)}</h2>'
        f'<img alt="{html.escape(shown.title)}" src="data:{shown.mime};base64,{encoded}">'
        f"<figcaption>{html.escape(shown.caption)}<ul>{said}</ul>"
        f"<code>{html.escape(command)}</code></figcaption></figure>"
    )


def _verdict(claim: Claim) -> str:
    return f'<span class="verdict {claim.verdict}">{claim.verdict}</span>'


def _claims(claims: Sequence[Claim]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(c.claim)}</td><td>{_verdict(c)}</td>"
        f'<td>{html.escape(c.evidence)} <a href="#{c.figure}">figure</a></td>'
        f'<td class="small">{html.escape(c.rule)}. '
        f"{'To decide it' if c.verdict == 'unclear' else 'To overturn it'}: "
        f"{html.escape(c.needed)}.</td></tr>"
        for c in claims
    )
    head = "<tr><th>claim</th><th>verdict</th><th>evidence</th><th>rule</th></tr>"
    return f"<table>{head}{rows}</table>"


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(v)}</td>" for v in row.values()) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
