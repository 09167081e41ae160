"""Graphs of torch.export: ops as torch operations, other processes, ONNX, AOTInductor."""

from __future__ import annotations

import math
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from specs import SPECS
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

import pyloss
from pyloss.functional import (
    hard_info_nce,
    linear_distillation_loss,
    margin_shift,
    pca_frames,
    permutahedron_rank,
    permutahedron_sort,
    segment_reduce,
    spherical_z_loss,
)
from pyloss.ops import _registry
from pyloss.ops._decompose import ops_in
from pyloss.ops.permutahedron import plain, reference

ROOT = Path(__file__).resolve().parents[1]


class Module(torch.nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def close(got, want, **tolerance) -> None:
    torch.testing.assert_close(got, want, equal_nan=True, **tolerance)


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def decomposed(program: ExportedProgram) -> ExportedProgram:
    found = pyloss.ops.decompose(program)
    assert list(ops_in(program.graph_module)) and not list(ops_in(found.graph_module))
    return found


# --------------------------------------------------------------------------------------------------
# Torch operations in place of the ops


def several(x, y, w):
    """Rows, the constants of a network, sizes that depend on the batch."""
    return (
        pyloss.comp_sum_loss(x, y, 1.5),
        pyloss.soft_sort(w[:, :3]),
        pyloss.tensor_attention(*x.reshape(1, 1, -1, 6).expand(5, -1, -1, -1, -1).unbind()),
    )


def test_decompose_with_an_open_batch() -> None:
    def inputs(rows: int):
        return torch.randn(rows, 6), torch.randint(5, (rows,)), torch.randn(5, 6)

    rows = {0: Dim("rows", min=2, max=1000)}
    program = export(Module(several), inputs(3), dynamic_shapes={"inputs": (rows, rows, None)})
    found = decomposed(program).module()
    given = inputs(7)
    close(found(*given), several(*given))


def test_what_cannot_be_decomposed_is_named() -> None:
    image = torch.rand(1, 1, 4, 4)
    program = export(Module(pyloss.betti_matching_loss), (image, image))
    with pytest.raises(NotImplementedError, match="pyloss::betti_loss_fused .* on the values"):
        pyloss.ops.decompose(program)
    table = pyloss.ops.decompositions()
    with pytest.raises(NotImplementedError, match="pyloss::scale_ .* changes its arguments"):
        table[torch.ops.pyloss.scale_.default](image, image)


def test_decompose_wants_a_program() -> None:
    with pytest.raises(TypeError, match="program must be an ExportedProgram, got Module"):
        pyloss.ops.decompose(Module(several))


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="needs torch 2.7")
def test_padded_rows_are_refused() -> None:
    def padded(x, lengths):
        return pyloss.soft_sort(x, lengths=lengths)

    with pytest.raises(NotImplementedError, match="numbers of mask or lengths are read"):
        export(Module(padded), (torch.randn(2, 3), torch.tensor([3, 1])), strict=False)


def test_every_op_has_a_plain_form_or_says_why_not() -> None:
    pyloss.ops.load_all()
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("pyloss::")}
    assert names == {f"pyloss::{name}" for name in _registry.plain_forms}
    assert {type(form) for form in _registry.plain_forms.values() if not callable(form)} == {str}


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("rank", [False, True])
def test_permutahedron_by_bounds(rank: bool, kl: bool) -> None:
    """Where the reference pools, ties and infinite and missing elements among the rows."""
    for n in (0, 1, 2, 9):
        x = torch.randn(6, n, dtype=torch.float64) * 2
        x[1] = x[1].round()
        if n > 2:
            x[2, :2], x[3, 2], x[4, 1] = math.inf, -math.inf, math.nan
        for strength in (0.1, 2.0):
            close(
                plain.forward(x, rank, kl, strength)[0], reference.forward(x, rank, kl, strength)[0]
            )


class OfSpec(torch.nn.Module):
    """A Spec's function of the tensors of a sample."""

    def __init__(self, spec, sample) -> None:
        super().__init__()
        self.spec = spec
        self.leaves, self.tree = pytree.tree_flatten(sample.arguments)
        self.places = [i for i, x in enumerate(self.leaves) if isinstance(x, torch.Tensor)]
        self.given = tuple(self.leaves[i] for i in self.places)

    def forward(self, *tensors):
        leaves = list(self.leaves)
        for at, t in zip(self.places, tensors):
            leaves[at] = t
        return self.spec.tensors(self.spec.function(**pytree.tree_unflatten(leaves, self.tree)))


# The last two hold no op of pyloss, and torch cannot retrace or export what they are made of.
_NO_GRAPH = ("persistence_pairs", "betti_matching", "betti_matching_loss")
_NO_GRAPH += ("betti_matching_loss of logits", "lipschitz_gradient_penalty")
_NO_GRAPH += ("lagrangian_residual_loss",)
_READS_NUMBERS = {("neural_ndcg_loss", "mask")}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "spec", [s for s in SPECS.values() if s.compile is True], ids=lambda s: s.name
)
def test_decompose_every_spec(spec) -> None:
    if spec.name in _NO_GRAPH:
        pytest.skip("has no such graph")
    for name in [*spec.compile_samples, *spec.samples][:2]:
        if (spec.name, name) in _READS_NUMBERS:
            continue
        module = OfSpec(spec, spec.samples[name]())
        program = export(module, module.given)
        found = pyloss.ops.decompose(program)
        assert not list(ops_in(found.graph_module)), name
        close(found.module()(*module.given), module(*module.given))


@pytest.mark.exhaustive
def test_backward_ops_decompose() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x, y = torch.randn(4, 6), torch.randint(6, (4,))
    q = torch.randn(5, 1, 1, 4, 6)

    def step(function, *tensors):
        tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        asked = [t for t in tensors if t.requires_grad]
        return torch.autograd.grad(function(*tensors), asked)

    table = pyloss.ops.decompositions()
    for function, tensors in (
        (lambda x, y: (pyloss.focal_loss(x, y, reduction="none") * x[:, 0]).sum(), (x, y)),
        (lambda x, y: (spherical_z_loss(x, y, reduction="none") * x[:, 0]).sum(), (x, y)),
        (lambda x, y: (pyloss.soft_sort(x) * x).sum(), (x, y)),
        (lambda *q: pyloss.tensor_attention(*q).square().sum(), q.unbind()),
    ):
        graph = make_fx(lambda *t, f=function: step(f, *t), decomposition_table=table)(*tensors)
        assert not list(ops_in(graph))
        close(graph(*tensors), step(function, *tensors))


# --------------------------------------------------------------------------------------------------
# Other processes

X, Y, W = torch.randn(4, 6), torch.tensor([0, 1, 2, 3]), torch.randn(5, 6)
LOSSES = {
    "cross entropy": (pyloss.fused_cross_entropy, (X, Y)),
    "comp-sum": (lambda x, y: pyloss.comp_sum_loss(x, y, 1.5), (X, Y)),
    "focal, rows": (lambda x, y: pyloss.focal_loss(x, y, reduction="none"), (X, Y)),
    "aldr": (pyloss.aldr_loss, (X, Y)),
    "linear": (pyloss.fused_linear_cross_entropy, (X, W, Y)),
    "sort": (pyloss.soft_sort, (X,)),
    "rank": (pyloss.soft_rank, (X,)),
    "permutation": (pyloss.soft_permutation, (X,)),
    "permutahedron": (permutahedron_sort, (X,)),
    "permutahedron rank": (permutahedron_rank, (X,)),
    "attention": (pyloss.tensor_attention, torch.randn(5, 1, 2, 4, 8).unbind()),
    "causal attention": (
        lambda *q: pyloss.tensor_attention(*q, is_causal=True),
        torch.randn(5, 1, 2, 4, 8).unbind(),
    ),
    "low rank": (
        lambda *q: pyloss.tensor_attention(*q, method="lowrank", degree=2, poly="taylor"),
        (torch.randn(5, 1, 2, 4, 4) * 0.3).unbind(),
    ),
    "info_nce": (pyloss.info_nce, (X, X.flip(1))),
    "siglip": (pyloss.siglip_loss, (X, X.flip(1))),
    "z-loss": (spherical_z_loss, (X, Y)),
    "dice": (pyloss.nn.SoftDiceLoss(), (torch.rand(2, 1, 4, 4), torch.ones(2, 1, 4, 4))),
}
of_losses = pytest.mark.parametrize("function, inputs", LOSSES.values(), ids=LOSSES)

LOAD = """
import sys, torch
if sys.argv[3] == "ops":
    import pyloss.ops
    pyloss.ops.load_all()
    assert not [n for n in sys.modules if n.startswith("pyloss.functional.")]
inputs, want = torch.load(sys.argv[2])
got = LOADED
torch.testing.assert_close(got, want)
assert "pyloss" in sys.modules or sys.argv[3] == "none"
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("strict", [False, True])
@of_losses
def test_strict_and_with_gradients(function, inputs, strict: bool) -> None:
    """What autograd records in a trace does not hide an op."""
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    program = export(Module(function), tuple(leaves), strict=strict)
    found = pyloss.ops.decompose(program)
    assert not list(ops_in(found.graph_module))
    close(found.module()(*inputs), function(*inputs))


OPEN = {name: LOSSES[name] for name in LOSSES if "attention" not in name and name != "low rank"}
OPEN["distillation"] = (lambda x: linear_distillation_loss(x, W, x + 1, W), (X,))
OPEN["row statistics"] = (lambda x, y: pyloss.functional.row_softmax_stats(x, y).lse, (X, Y))
OPEN["attention"] = (
    lambda x: pyloss.tensor_attention(*(x[None, None] / i for i in range(1, 6))), (X,)
)  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("function, inputs", OPEN.values(), ids=OPEN)
def test_no_function_fixes_the_batch(function, inputs) -> None:
    batch = {0: Dim("batch", min=2, max=100)}
    shapes = tuple(None if t is W else batch for t in inputs)
    program = export(Module(function), tuple(inputs), dynamic_shapes=(shapes,)).module()
    given = [t if t is W else torch.cat([t, t[:3]]) for t in inputs]
    close(program(*given), function(*given))


@pytest.mark.exhaustive
def test_a_decomposed_program_where_pyloss_is_not_imported(tmp_path: Path) -> None:
    inputs = X, Y, W
    torch.export.save(decomposed(export(Module(several), inputs)), tmp_path / "program.pt2")
    torch.save((inputs, several(*inputs)), tmp_path / "tensors.pt")
    load = LOAD.replace("LOADED", "torch.export.load(sys.argv[1]).module()(*inputs)")
    run(load, tmp_path / "program.pt2", tmp_path / "tensors.pt", "none")


class EveryFamily(torch.nn.Module):
    """An op of every family that a graph can hold, behind layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = torch.nn.Linear(6, 6), torch.nn.Linear(6, 5)

    def forward(self, x, y, image):
        h = self.layer(x)
        logits, other, q = self.head(h), h.flip(1), h.view(1, 1, -1, 6)
        w = self.head.weight
        small = q / 8
        return (
            pyloss.comp_sum_loss(logits, y, 1.5),
            pyloss.aldr_loss(logits, y),
            margin_shift(logits, logits.flip(1), y),
            spherical_z_loss(logits, y),
            pyloss.fused_linear_cross_entropy(h, w, y),
            linear_distillation_loss(h, w, other, w),
            pyloss.soft_sort(logits),
            pyloss.soft_rank(logits),
            pyloss.soft_permutation(logits),
            permutahedron_sort(logits),
            pyloss.info_nce(h, other),
            pyloss.siglip_loss(h, other),
            hard_info_nce(w, w.flip(1)),  # how many are the hardest is fixed with the rows
            pyloss.tensor_attention(q, q, other.view(q.shape), q, q),
            pyloss.tensor_attention(small, small, small, q, q, method="lowrank", degree=2),
            pyloss.betti_matching_loss(image.sigmoid(), (image > 0).to(image)),
            segment_reduce(w, y.new_tensor([0, 1, 5])),
            pca_frames(x.view(-1, 3, 2))[0],
        )


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_family_in_a_process_that_has_loaded_the_ops(tmp_path: Path) -> None:
    """torch.export.save and load, with a batch that no trace has seen."""

    def inputs(rows: int):
        return torch.randn(rows, 6), torch.randint(5, (rows,)), torch.randn(rows, 1, 4, 5)

    batch = {0: Dim("batch", min=3, max=100)}
    model, tensors = EveryFamily(), tmp_path / "tensors.pt"
    with torch.no_grad():
        program = export(model, inputs(4), dynamic_shapes=(batch, batch, batch))
        torch.save((given := inputs(7), model(*given)), tensors)
    found = " ".join(ops_in(program.graph_module))
    packages = {m.name for m in pkgutil.iter_modules(pyloss.ops.__path__) if m.ispkg}
    assert {p for p in packages if p not in found} == {
        "betti_matching",
        "lion_k",
        "similarity_topk",
    }
    assert "betti_loss_fused" in found and "similarity_hardest" in found
    torch.export.save(program, tmp_path / "program.pt2")
    load = "torch.export.load(sys.argv[1]).module()(*inputs)"
    run(LOAD.replace("LOADED", load), tmp_path / "program.pt2", tensors, "ops")


# Not the whole model: torch 2.13 cannot load its package (type must be number, but is string).
@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cross entropy", "linear", "sort", "attention"])
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    function, inputs = LOSSES[name]
    package = str(tmp_path / "model.pt2")
    program = export(Module(function), tuple(inputs))
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    torch.save((tuple(inputs), function(*inputs)), tmp_path / "tensors.pt")
    load = LOAD.replace("LOADED", "torch._inductor.aoti_load_package(sys.argv[1])(*inputs)")
    run(load, package, tmp_path / "tensors.pt", "ops")


# --------------------------------------------------------------------------------------------------
# ONNX


def onnx_model(program: ExportedProgram, inputs):
    pytest.importorskip("onnxscript")
    model = torch.onnx.export(program, tuple(inputs), dynamo=True, verbose=False).model_proto
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
    return model


def results(model, inputs) -> list[torch.Tensor]:
    """Of onnxruntime: onnx's own evaluator takes no negative axis in GatherElements."""
    session = pytest.importorskip("onnxruntime").InferenceSession(model.SerializeToString())
    given = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs)}
    return [torch.from_numpy(a) for a in map(numpy.array, session.run(None, given))]


@pytest.mark.exhaustive
@of_losses
def test_onnx(function, inputs) -> None:
    program = pyloss.ops.decompose(export(Module(function), tuple(inputs)))
    got = results(onnx_model(program, inputs), inputs)
    want = function(*inputs)
    for a, b in zip(got, want if isinstance(want, tuple) else (want,)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_onnx_with_an_open_batch() -> None:
    rows = {0: Dim("rows", min=2, max=1000)}
    program = export(Module(pyloss.fused_cross_entropy), (X, Y), dynamic_shapes=((rows, rows),))
    model = onnx_model(decomposed(program), (X, Y))
    given = torch.randn(9, 6), torch.randint(6, (9,))
    (got,) = results(model, given)
    torch.testing.assert_close(got, pyloss.fused_cross_entropy(*given))


@pytest.mark.exhaustive
def test_onnx_names_the_op_that_is_not_decomposed() -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"pyloss\.row_softmax_fwd"):
        torch.onnx.export(export(Module(pyloss.fused_cross_entropy), (X, Y)), (X, Y), dynamo=True)
