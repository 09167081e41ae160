"""The public names and their signatures, compared with those written down in api_snapshot.txt.

A difference is either a mistake or a change that users will meet, which CHANGELOG.md then names.
Where it is meant, write the file again::

    python tests/test_api_snapshot.py --write

Annotations stand as the source writes them, and only what pyloss itself defines is listed (no
method of torch.nn.Module or of tuple but forward), so that the file is the same for every version
of Python and torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

SNAPSHOT = Path(__file__).with_name("api_snapshot.txt")
UPDATE = "python tests/test_api_snapshot.py --write"

# A name that several of them export is written in full in the first and as an alias in the others.
MODULES = (
    "pyloss.functional",
    "pyloss.nn",
    "pyloss.nn.init",
    "pyloss.nn.lie",
    "pyloss.metrics",
    "pyloss.optim",
    "pyloss.optim.lr_scheduler",
    "pyloss.adversarial",
    "pyloss.regularizers",
    "pyloss.aggregate",
    "pyloss.analysis",
    "pyloss.analysis.comp_sum",
    "pyloss.analysis.lazy",
    "pyloss.analysis.learning_rate",
    "pyloss.analysis.spectrum",
    "pyloss.analysis.invariance",
    "pyloss.distributed",
    "pyloss.integrations.torchtitan",
    "pyloss.integrations.transformers",
    "pyloss.visualize",
    "pyloss.ops",
    "pyloss.testing",
    "pyloss.reference",
    "pyloss.segment",
    "pyloss",
)


def annotation_text(annotation: Any) -> str:
    annotation = getattr(annotation, "__forward_arg__", annotation)  # NamedTuple keeps ForwardRefs
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def default_text(value: Any) -> str:
    """repr without addresses."""
    return value.__qualname__ if isinstance(value, (FunctionType, type)) else repr(value)


def parameter_text(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    text = stars.get(parameter.kind, "") + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {annotation_text(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        text += f" = {default_text(parameter.default)}"
    return text


def signature_lines(name: str, obj: Any) -> list[str]:
    """`name(` with one parameter a line, so that a diff shows the one that changed.

    inspect.Signature's own text is not used: Python 3.14 writes annotations in another way.
    """
    signature = inspect.signature(obj)
    returns = signature.return_annotation
    end = ")" if returns is signature.empty else f") -> {annotation_text(returns)}"
    texts: list[str] = []
    kinds = inspect.Parameter
    before = None
    for parameter in signature.parameters.values():
        if before == kinds.POSITIONAL_ONLY != parameter.kind:
            texts.append("/")
        if parameter.kind == kinds.KEYWORD_ONLY and before not in (
            kinds.KEYWORD_ONLY,
            kinds.VAR_POSITIONAL,
        ):
            texts.append("*")
        texts.append(parameter_text(parameter))
        before = parameter.kind
    if before == kinds.POSITIONAL_ONLY:
        texts.append("/")
    if not texts:
        return [f"{name}({end}"]
    return [f"{name}(", *(f"    {text}," for text in texts), end]


def own_names(cls: type) -> list[str]:
    """Public attributes that pyloss adds to what torch and Python give the class."""
    foreign = {
        name
        for base in cls.__mro__
        if not base.__module__.startswith("pyloss")
        for name in vars(base)
    }
    own = {
        name
        for base in cls.__mro__
        if base.__module__.startswith("pyloss")
        for name in vars(base)
        if not name.startswith("_") and (name == "forward" or name not in foreign)
    }
    return sorted(own)


def member_lines(cls: type, name: str) -> list[str]:
    value = inspect.getattr_static(cls, name)
    if isinstance(value, property):
        returns = inspect.signature(value.fget).return_annotation
        suffix = "" if returns is inspect.Signature.empty else f": {annotation_text(returns)}"
        return [f"property {name}{suffix}"]
    if isinstance(value, (classmethod, staticmethod)):
        kind = type(value).__name__
        return signature_lines(f"{kind} {name}", getattr(cls, name))
    if callable(value):
        return signature_lines(name, value)
    return [f"attribute {name}"]


def class_lines(name: str, cls: type) -> list[str]:
    fields: tuple[str, ...] = getattr(cls, "_fields", ())
    if fields:
        kind = "NamedTuple"
    elif dataclasses.is_dataclass(cls):
        kind = "dataclass"
        fields = tuple(field.name for field in dataclasses.fields(cls))
    else:
        kind = "Module" if issubclass(cls, torch.nn.Module) else "class"
    lines = signature_lines(f"{kind} {name}", cls)
    for member in own_names(cls):
        if member not in fields:  # those stand in the constructor
            lines += [f"  {line}" for line in member_lines(cls, member)]
    return lines


def object_lines(name: str, obj: Any) -> list[str]:
    if isinstance(obj, ModuleType):
        return [f"module {name}"]
    if inspect.isclass(obj):
        return class_lines(name, obj)
    if callable(obj):
        return signature_lines(name, obj)
    return [f"{name}: {type(obj).__name__}"]


def sections() -> dict[str, str]:
    """The text of every module that can be imported here."""
    homes: dict[int, str] = {}
    found = {}
    for module_name in MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            # An extra that is not installed; a module of pyloss that fails is a failure.
            if (error.name or "pyloss").startswith("pyloss"):
                raise
            continue
        lines = [f"[{module_name}]"]
        for name in sorted(module.__all__):
            obj = getattr(module, name)
            home = homes.setdefault(id(obj), f"{module_name}.{name}")
            alias = home != f"{module_name}.{name}"
            lines += [f"{name} = {home}"] if alias else object_lines(name, obj)
        found[module_name] = "\n".join(lines) + "\n"
    return found


def written_sections() -> dict[str, str]:
    blocks = SNAPSHOT.read_text().split("\n\n")[1:]  # the first one is the comment
    return {b.partition("]")[0].lstrip("["): b.rstrip("\n") + "\n" for b in blocks}


def write() -> None:
    comment = f"# Public names of pyloss. Written by `{UPDATE}`; do not edit.\n"
    SNAPSHOT.write_text("\n".join([comment, *sections().values()]))


def test_public_api_is_the_one_written_down() -> None:
    now, before = sections(), written_sections()
    assert set(before) == set(MODULES), f"another list of modules; run `{UPDATE}`"
    diff: list[str] = []
    for name, text in now.items():
        diff += difflib.unified_diff(
            before[name].splitlines(),
            text.splitlines(),
            f"{name}, as written in tests/api_snapshot.txt",
            f"{name}, as it is",
            lineterm="",
            n=4,
        )
    if diff:
        hint = f"If that is meant: `{UPDATE}`, and a line in CHANGELOG.md."
        pytest.fail("\n".join(["the public API has changed:", *diff, hint]), pytrace=False)


def test_signature_text() -> None:
    def f(a: int, /, b: Tensor, *, c: float = 1.0, d=torch.float32, **rest) -> bool: ...

    def g(*args: int, key): ...

    inside = ["    a: int,", "    /,", "    b: Tensor,", "    *,", "    c: float = 1.0,"]
    inside += ["    d = torch.float32,", "    **rest,"]
    assert signature_lines("f", f) == ["f(", *inside, ") -> bool"]
    assert signature_lines("g", g) == ["g(", "    *args: int,", "    key,", ")"]


def test_the_type_checked_program_uses_every_public_name() -> None:
    """`make lint` checks tests/typing/public_surface.py; a name that it lacks is not checked."""
    program = SNAPSHOT.with_name("typing").joinpath("public_surface.py").read_text()
    used = set(re.findall(r"\w+", program))
    for module_name in MODULES:
        if module_name in ("pyloss.testing", "pyloss.reference"):
            continue  # helpers
        names = importlib.import_module(module_name).__all__
        assert set(names) <= used, (module_name, set(names) - used)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {UPDATE}")
    write()
