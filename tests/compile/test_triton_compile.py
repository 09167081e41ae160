"""Every Triton kernel, as the ops launch it, compiles for each architecture, and compiles well.

What is compiled is what triton_launches.py records from the calls of triton_scenarios.py: no
signature is written by hand. In a loop that multiplies matrices no spilled register is touched, and
ptxas serialises no product; where it is otherwise EXCEPTIONS says why.

This is about the Triton that is imported. `make gpu-proof` runs it again with Triton 3.6.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.4")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "kernels"
# At the end, so that an installed pyloss stays ahead of the one in the source tree.
sys.path.append(str(ROOT))

from bench import _kernel_table, _models  # noqa: E402

OPS = [HERE / "sample_kernel.py"] + sorted(
    p  # modules and packages
    for p in KERNELS.iterdir()
    if p.name[0] != "_" and (p.suffix == ".py" or (p / "__init__.py").is_file())
)


def kernels_of(path: Path) -> list[str]:
    """Read, not imported: collecting the tests must not cost the import of Triton."""
    sources = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    texts = [source.read_text() for source in sources]
    return [name for text in texts for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)]


# By architecture, and by kernel, so that the processes of pytest-xdist share the work.
ALL = [pytest.param(p.stem, k, id=f"{p.stem}-{k}") for p in OPS for k in kernels_of(p)]

# (kernel, scenario or property of the launch, why): spills or serialised products that are known.
EXCEPTIONS = (
    ("", "float32", "full precision has no tensor cores: operands stand in registers"),
    ("", "256", "two accumulators of 256 columns do not fit the registers"),
    ("tensor_attention_bwd_", "masked", "tiles of the masks stand in registers beside the scores"),
    ("tensor_attention_lowrank_", "degree 3", "up to 4 reloads an iteration of thousands"),
    ("tensor_attention_bwd", "99 KiB", "tiles are made small by halving, not chosen"),
    ("tensor_attention_bwd_", "sm_80", "tiles are Hopper's; sums and factors stand in registers"),
    ("tensor_attention_bwd_kv_rows", "tf32", "tiles are those of half types, halved"),
    ("tensor_attention_lowrank_state", "one", "tiles are those of many tokens"),
    ("tensor_attention_lowrank_scan_key_gradient", "windows alone", "one reload"),
    *(
        (f"tensor_attention_lowrank_{kernel}", sm, "three products of tf32; tiles are Hopper's")
        for kernel in ("state", "query_kernel")
        for sm in ("sm_80", "sm_89", "sm_100")
    ),
)


@functools.cache
def held() -> bool:
    """Whether tiles were chosen for this Triton: the newest that is allowed, and 3.6. Others allot
    registers otherwise; with them kernels must compile and fit the shared memory."""
    import triton

    requirements = (ROOT / "requirements-dev.txt").read_text()
    (newest,) = re.findall(r"^triton.*<=(\d+\.\d+)", requirements, re.M)
    return ".".join(triton.__version__.split(".")[:2]) in (newest, "3.6")


@pytest.fixture(autouse=True)
def no_earlier_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "interpreted kernels cannot be compiled"


@functools.cache
def launches(module: str, capability: int, more: bool) -> dict:
    """(scenario, launch) of each binary that the calls of a module need."""
    from triton_launches import record
    from triton_scenarios import MORE, USUAL

    found = {}
    for calls, taken in ((USUAL, True), (MORE, more)):
        for scenario, call in calls[module].items() if taken else ():
            for launch in record(call, capability):
                found.setdefault(launch.key, (scenario, launch))
    return found


@functools.cache
def usual(module: str) -> dict:
    """Those that `make test` compiles: for sm_90, of each kernel the first launch and the one whose
    constants differ most from it. Not two that differ in nothing but which sizes are multiples of
    16, or 1."""
    by_kernel: dict[str, dict] = {}
    found = launches(module, 90, False)
    forms: dict[str, str] = {}
    for key, (_, launch) in found.items():
        forms.setdefault(launch.form, key)
    for key in forms.values():
        launch = found[key][1]
        by_kernel.setdefault(launch.name, {})[key] = launch.constexprs
    keys = []
    for constants in by_kernel.values():
        (first, plain), *others = constants.items()
        furthest = max(others, key=lambda one: differences(plain, one[1]), default=(first, plain))
        keys += dict.fromkeys((first, furthest[0]))
    return {key: found[key] for key in keys}


def differences(a: dict, b: dict) -> int:
    """Constants of two launches that are not the same; those of a NamedTuple count one by one."""
    return sum(a.get(at) != b.get(at) for at in {*a, *b})


def properties(launch, capability: int) -> set[str]:
    """What EXCEPTIONS go by."""

    constants = repr(launch.constexprs)
    types = repr(launch.signature)
    names = launch.kernel.arg_names
    named = {names[at[0]]: value for at, value in launch.constexprs.items() if len(at) == 1}
    degree = named.get("DEGREE", getattr(named.get("C"), "DEGREE", 0))
    found = {width for width in ("256",) if f" D={width}" in constants}
    if "'*fp16'" not in types and "'*bf16'" not in types and "'ieee'" in constants:
        found.add("float32")
    if "MASK2_ROWS=True" in constants:
        found.add("masked")
    if degree >= 3:
        found.add("degree 3")
    if capability == 89:
        found.add("99 KiB")
    if "'tf32'" in constants:
        found.add("tf32")
    return found | {f"sm_{capability}"}


def check(kernel: str, capability: int, found: dict) -> list:
    """Compiles those launches of a kernel; what came out."""
    from triton_compile import SHARED_LIMIT, compile_launch

    made, bad = [], []
    for scenario, launch in found.values():
        if launch.name != kernel:
            continue
        where = f"{scenario}: {launch.constexprs}"
        done = compile_launch(launch, capability)
        made.append(done)
        if done.shared > SHARED_LIMIT[capability]:
            bad.append(f"{where}: {done.shared} bytes of shared memory")
        known = properties(launch, capability) | {scenario}
        if any(kernel.startswith(name) and what in known for name, what, _ in EXCEPTIONS):
            continue
        if not held():
            continue
        local = [loop.local for loop in done.loops if loop.local]
        if local:
            bad.append(f"{where}: accesses of spilled registers in loops with products: {local}")
        bad += [f"{where}: {text}" for text in done.warnings]
    assert not bad, "\n".join(bad)
    return made


@pytest.mark.parametrize("module, kernel", ALL)
def test_compiles(module: str, kernel: str) -> None:
    """And the first launch has what the table of predictions says, by the Triton it names."""
    import triton

    made = check(kernel, 90, usual(module))
    assert made, "no scenario launches it"
    rows = [row for row in _kernel_table.TRITON_KERNELS if row.name == kernel]
    if rows and triton.__version__.startswith(_kernel_table.TRITON):
        assert 32 * made[0].warps == rows[0].threads
        assert abs(made[0].registers - rows[0].registers) <= 16, made[0].registers
        assert made[0].shared <= rows[0].shared, made[0].shared


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("module, kernel", ALL)
def test_compiles_everywhere(module: str, kernel: str, capability: int) -> None:
    found = launches(module, capability, True)
    if capability == 90:  # the usual ones are those of test_compiles
        rest = {key: one for key, one in found.items() if key not in usual(module)}
        check(kernel, 90, rest)
    else:
        assert check(kernel, capability, found), "no scenario launches it"


# Half types on Hopper, tiles of at least 64 rows: kernels that must get its product instructions.
@pytest.mark.parametrize(
    "module, kernel, scenario",
    [
        ("linear_cross_entropy", "linear_softmax_stats_kernel", "plain"),
        ("linear_cross_entropy", "masked_matmul_tn_kernel", "float32 accumulation"),
        ("tensor_attention", "tensor_attention_fwd_rows_kernel", "full"),
        pytest.param(
            "similarity_softmax", "pair_sweep_kernel", "NT-Xent", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_products_are_those_of_the_architecture(module: str, kernel: str, scenario: str) -> None:
    from triton_compile import compile_launch

    launch = next(
        one
        for where, one in launches(module, 90, False).values()
        if where == scenario and one.name == kernel
    )
    assert "wgmma.mma_async" in compile_launch(launch, 90).ptx


@pytest.mark.parametrize("what", ["windows", "full"])
def test_forward_of_attention_is_as_predicted(what: str) -> None:
    """What bench/_models.py counts with; its instructions leave out the masks of edges."""
    from triton_compile import compile_launch

    (row,) = (k for k in _models.AFTER if k.what == what)
    (launch,) = (
        one
        for where, one in launches("tensor_attention", 90, False).values()
        if where == what and one.name == row.kernel
    )
    done = compile_launch(launch, 90)
    _, loop = done.loops  # the first one looks for a maximum
    products = row.rows // 64 * (row.width // 16 + row.keys // 16)
    assert (done.warps, loop.matrix, loop.local) == (row.warps, products, 0)
    assert done.programs(90) == row.programs and done.shared <= row.shared
    assert loop.instructions <= 1.4 * row.loop


@pytest.mark.exhaustive
@pytest.mark.parametrize("at", [0, 1], ids=["queries", "keys"])
def test_backward_of_windows_is_as_predicted(at: int) -> None:
    """As above; and no spilled register is touched."""
    from triton_compile import compile_launch

    row = _models.WINDOWS_BACKWARD[at]
    launch = next(
        one
        for where, one in launches("tensor_attention", 90, False).values()
        if where == "windows" and one.name == row.kernel
    )
    done = compile_launch(launch, 90)
    (loop,) = done.loops
    products = 2 * (row.rows // 64) * (row.width // 16 + row.keys // 16)
    assert (done.warps, loop.matrix, loop.local) == (row.warps, products, 0)
    assert done.programs(90) == row.programs == 2 and done.shared <= row.shared
    assert loop.instructions <= 1.4 * row.loop and not done.warnings


def test_predicted_backward_of_windows() -> None:
    """Over the forward, where the products alone would be 4 times its own."""
    assert _models.backward_share(_models.WINDOWS_BACKWARD) <= 4.2
    assert _models.backward_share(_models.WINDOWS_BACKWARD_BEFORE) >= 7


@pytest.mark.parametrize("what, least", [("windows", 400), ("full", 450)])
def test_predicted_rate_of_attention(what: str, least: float) -> None:
    """Useful TFLOP/s, also where less overlaps; before it was below 300."""
    (now,) = (k for k in _models.AFTER if k.what == what)
    assert _models.useful_rate(now, 3) >= least * 1e12
    (before,) = (k for k in _models.BEFORE if k.what == what)
    assert _models.useful_rate(before, 3) < 300e12


# ------------------------------------------------------------------------------ the checks, checked


def test_a_kernel_that_does_not_compile_is_reported(tmp_path: Path) -> None:
    import torch
    from triton_compile import compile_launch
    from triton_launches import record

    text = (HERE / "sample_kernel.py").read_text()
    path = tmp_path / "sample_kernel_broken.py"
    path.write_text(text.replace("tl.log(", "tl.no_such_function("))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (launch,) = record(lambda: module.row_logsumexp(torch.empty(3, 5, device="meta")))
    with pytest.raises(Exception, match="no_such_function"):
        compile_launch(launch, 90)


def test_signatures_are_those_of_the_call() -> None:
    """Alignment of addresses, multiples of 16, 1, sizes beyond 32 bits."""
    import sample_kernel
    import torch
    from triton_launches import record

    def attributes(x: torch.Tensor):
        (launch,) = record(lambda: sample_kernel.row_logsumexp(x))
        return launch, {at[0] for at, found in launch.attrs.items() if found}

    x = torch.empty(8, 1000, device="meta", dtype=torch.bfloat16)
    launch, multiples = attributes(x)
    assert launch.signature["x_ptr"] == "*bf16" and launch.signature["stride_x_row"] == "i32"
    assert launch.grid == (8,) and launch.asked["enable_fp_fusion"] is True
    assert multiples == {0, 1}
    assert attributes(x[:, 1:])[1] == {1}
    assert attributes(x[:, :992])[1] == {0, 1, 3}
    assert attributes(x[:, :1])[0].signature["n_cols"] == "constexpr"
    far = torch.empty(0, device="meta").as_strided((2, 16), (2**33, 1))
    launch, multiples = attributes(far)
    assert launch.signature["stride_x_row"] == "i64" and multiples == {0, 1, 2, 3}


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDL R2, [R1] ;
        /*0020*/                   MOV R3, RZ ;
        /*0030*/                   STL [R1+0x4], R3 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/               @P0 BRA 0x30 ;
        /*0070*/                   LDL R9, [R1+0x8] ;
        /*0080*/              @!P1 BRA `(.L_x_1) ;
        /*0090*/               @P2 BRA 0x20 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
"""


def test_loops_are_found() -> None:
    from triton_compile import _loops

    (loop,) = _loops(SASS)  # the inner one; that around it holds no product of its own
    assert loop == (4, 1, 1, 1)
    assert _loops(SASS.replace("HGMMA", "HFMA2")) == []
    (outer,) = _loops(SASS.replace("@P0 BRA 0x30", "MOV R5, R6"))
    assert outer == (8, 1, 2, 1)
