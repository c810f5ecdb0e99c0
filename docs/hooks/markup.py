"""Hooks of mkdocs: what docstrings and formulas are written in, as HTML that needs no network.

Formulas become MathML when the site is built; a reader's browser fetches nothing to show them.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
# A role of a docstring, such as :func:`eaft_ext.gated_ce`, whose back quotes are code by now.
_ROLE = re.compile(r":(?:func|class|meth|mod|attr):<code>~?(?P<name>[\w.]+)</code>")
# The sign that an indented block follows, in what is otherwise Markdown.
_LITERAL = re.compile(r"::(?=\s*</p>)")


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found["tag"] == "div" else "inline"
    return convert(html.unescape(found["tex"]).strip(), display=display)


def _link(found: re.Match[str]) -> str:
    name = found["name"]
    target = name if name.startswith("eaft_ext") else f"eaft_ext.{name}"
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'


def on_page_content(content: str, **_: Any) -> str:
    """After Markdown and docstrings have become HTML, and before references are resolved."""
    content = _FORMULA.sub(_mathml, content)
    content = _ROLE.sub(_link, content)
    return _LITERAL.sub(":", content)
