"""Docstrings for mkdocstrings: the few reStructuredText marks in them become Markdown.

help() shows docstrings as they are, so they are written in the marks that Python readers know:
``.. math::``, :math:`x`, :func:`pyloss.soft_sort` and a double colon before code.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([^`]+)`")
_MATH_ROLE = re.compile(r":math:`([^`]+)`")
_MATH_BLOCK = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<first>[^\n]*)\n"
    r"(?P<rest>(?:[ ]*\n)*(?:(?P=indent) +\S[^\n]*(?:\n|\Z)(?:[ ]*\n(?=(?P=indent) +\S))*)*)",
    re.M,
)


def _block(match: re.Match[str]) -> str:
    body = "\n".join([match["first"].strip(), textwrap.dedent(match["rest"]).strip()]).strip()
    lines = "\n".join(line for line in body.splitlines() if line.strip())
    return textwrap.indent(
        f"\n$$\n{lines}\n$$\n\n", match["indent"], lambda line: bool(line.strip())
    )


def _role(match: re.Match[str]) -> str:
    name = match[1].strip()
    return f"[`{name}`][{name}]" if name.startswith("pyloss.") else f"`{name}`"


def to_markdown(text: str) -> str:
    text = _MATH_BLOCK.sub(_block, text)
    text = _MATH_ROLE.sub(lambda match: f"${match[1]}$", text)
    text = re.sub(r"::$", ":", text, flags=re.M)  # the indented block after it is code anyway
    return _ROLE.sub(_role, text)


class Markdown(griffe.Extension):
    """The extension that mkdocs.yml names."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
