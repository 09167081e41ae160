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
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)  # the name by which it is code
    text = re.sub(r"::$", ":", text, flags=re.M)  # the indented block after it is code anyway
    return _ROLE.sub(_role, text)


def _type_of(names: list[str], obj: Any) -> str:
    """What the signature says of arguments that share a line; the parser looks for one name."""
    parameters = {p.name: str(p.annotation) for p in getattr(obj, "parameters", ()) if p.annotation}
    found = dict.fromkeys(parameters[n] for n in names if n in parameters)
    return " or ".join(found) or "as there"  # of the function that it is handed to


def _argument(text: str, obj: Any) -> str | None:
    match = re.match(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): ", text + " ")
    if match is None:  # a reference, with a type, or the rest of the line above
        if text.startswith("As "):
            return f"arguments (as there): {text}"
        return text if re.match(r"\w+ \(.*?\): ", text) else None
    names = match[1].split(", ")
    return f"{match[1]} ({_type_of(names, obj)}){text[match.end(1) :]}"


def _error(text: str, obj: Any) -> str | None:
    if re.match(r"[A-Z]\w*(?:\.\w+)*: ", text + " "):
        return text
    if re.match(r"[A-Z]\w*(?:, [A-Z]\w*)+: ", text + " "):
        return text
    return f"Exception: {text}" if re.match(r"(?:As|as|Otherwise|What|No|None) ", text) else None


_ITEMS = {"Args": _argument, "Raises": _error}
_SECTION = re.compile(r"^(Args|Raises):\n((?:[ ]+\S.*\n?|[ ]*\n)+)", re.M)


def items(text: str, obj: Any) -> str:
    """Each item of the two sections as ``name: description``, what continues it indented.

    The docstrings refer ("As the function;"), name several arguments at once and do not always
    indent a second line, which people read as it is meant and the parser drops.
    """

    def section(match: re.Match[str]) -> str:
        lines = match[2].rstrip("\n").split("\n")
        base = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        indent = " " * base
        names = re.compile(rf"{indent}(?:\*{{0,2}}\w+, ?)+$")  # of arguments, and more to come
        joined: list[str] = []
        for line in lines:
            if joined and names.match(joined[-1]) and match[1] == "Args":
                joined[-1] = f"{joined[-1]} {line.strip()}"
            else:
                joined.append(line)
        done = []
        for line in joined:
            if line.startswith(indent + " ") or not line.strip():
                done.append(line)
            else:
                item = _ITEMS[match[1]](line.strip(), obj)
                done.append(f"{indent}    {line.strip()}" if item is None else indent + item)
        tail = match[2][len(match[2].rstrip("\n")) :]
        return f"{match[1]}:\n" + "\n".join(done) + tail

    return _SECTION.sub(section, text)


class Markdown(griffe.Extension):
    """The extension that mkdocs.yml names."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Once the signatures are known."""
        self._items_of(pkg)

    def _items_of(self, obj: griffe.Object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = items(obj.docstring.value, obj)
        for member in obj.members.values():
            if not member.is_alias:
                self._items_of(member)
