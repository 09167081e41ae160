"""Public names: sorted, documented, and with examples that run."""

from __future__ import annotations

import doctest
import inspect
from typing import Any

import pytest
import torch

import pyloss
import pyloss.adversarial
import pyloss.aggregate
import pyloss.analysis.comp_sum
import pyloss.analysis.invariance
import pyloss.analysis.lazy
import pyloss.analysis.learning_rate
import pyloss.analysis.spectrum
import pyloss.distributed
import pyloss.functional
import pyloss.metrics
import pyloss.nn
import pyloss.nn.init
import pyloss.nn.lie
import pyloss.ops
import pyloss.optim
import pyloss.optim.lr_scheduler
import pyloss.regularizers
import pyloss.research.bandits
import pyloss.research.continual
import pyloss.research.curriculum
import pyloss.research.federated
import pyloss.research.mdp
import pyloss.research.online
import pyloss.research.pretrain
import pyloss.testing

MODULES = [
    pyloss,
    pyloss.adversarial,
    pyloss.aggregate,
    pyloss.analysis,
    pyloss.analysis.comp_sum,
    pyloss.analysis.lazy,
    pyloss.analysis.learning_rate,
    pyloss.analysis.spectrum,
    pyloss.analysis.invariance,
    pyloss.distributed,
    pyloss.functional,
    pyloss.metrics,
    pyloss.nn,
    pyloss.nn.init,
    pyloss.nn.lie,
    pyloss.ops,
    pyloss.optim,
    pyloss.optim.lr_scheduler,
    pyloss.regularizers,
    pyloss.research.bandits,
    pyloss.research.mdp,
    pyloss.research.online,
    pyloss.research.continual,
    pyloss.research.curriculum,
    pyloss.research.federated,
    pyloss.research.pretrain,
    pyloss.testing,
]


def public_objects(*modules: Any) -> list[Any]:
    found = {}
    for module in modules:
        for name in module.__all__:
            obj = getattr(module, name)
            if inspect.isclass(obj) or callable(obj):
                found.setdefault(id(obj), pytest.param(obj, id=f"{module.__name__}.{name}"))
    return list(found.values())


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_all_is_sorted_and_complete(module: Any) -> None:
    assert list(module.__all__) == sorted(set(module.__all__))
    for name in module.__all__:
        assert hasattr(module, name), name
    assert set(module.__all__) <= set(dir(module))


def test_headline_names() -> None:
    for name in ("fused_cross_entropy", "comp_sum_loss", "show_config", "backend"):
        assert name in pyloss.__all__


@pytest.mark.parametrize("obj", public_objects(*MODULES[:-1]))
def test_docstring_example(obj: Any) -> None:
    text = inspect.getdoc(obj)
    assert text, "no docstring"
    assert "Example" in text, "no Example section"
    finder = doctest.DocTestFinder(recurse=False)
    tests = [
        t
        for t in finder.find(obj, obj.__name__, globs={"torch": torch, "pyloss": pyloss})
        if t.examples
    ]
    assert tests, "the Example holds no >>> line"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for test in tests:
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("obj", public_objects(*MODULES))
def test_docstring_and_annotations(obj: Any) -> None:
    assert inspect.getdoc(obj)
    if inspect.isclass(obj):
        return
    for parameter in inspect.signature(obj).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert parameter.annotation is not parameter.empty, parameter.name
