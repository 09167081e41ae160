"""The benchmark machinery: cases, records, targets, comparison, tables, figures."""

from __future__ import annotations

import copy
import gc
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# At the end, so that an installed pyloss stays ahead of the one in the source tree.
sys.path.append(str(ROOT))

from bench import _core, _targets, plot, run  # noqa: E402
from bench import bench_aldr as aldr  # noqa: E402
from bench import bench_betti_matching as betti  # noqa: E402
from bench import bench_betti_matching_3d as betti_3d  # noqa: E402
from bench import bench_frame_pca as frame_pca  # noqa: E402
from bench import bench_gemm as gemm  # noqa: E402
from bench import bench_lcm as lcm  # noqa: E402
from bench import bench_linear_cross_entropy as linear  # noqa: E402
from bench import bench_lion_k as lion_k  # noqa: E402
from bench import bench_margin_shift as margin_shift  # noqa: E402
from bench import bench_permutahedron as permutahedron  # noqa: E402
from bench import bench_row_moments as row_moments  # noqa: E402
from bench import bench_row_softmax as row_softmax  # noqa: E402
from bench import bench_segment as segment  # noqa: E402
from bench import bench_segmentation as segmentation  # noqa: E402
from bench import bench_similarity_softmax as similarity_softmax  # noqa: E402
from bench import bench_similarity_topk as similarity_topk  # noqa: E402
from bench import bench_sorting_network as sorting_network  # noqa: E402
from bench import bench_spherical as spherical  # noqa: E402
from bench import bench_tensor_attention as attention  # noqa: E402
from bench import bench_tensor_attention_lowrank as lowrank  # noqa: E402


@pytest.fixture(autouse=True)
def little_garbage() -> None:
    """A run collects garbage before each measurement: in the process of all tests a look through a
    million objects that stay, which was four fifths of its time."""
    gc.freeze()


def _quick_run(folder: Path, op: str, cases: str) -> dict:
    """A quick run over a few cases, read back from its file."""
    path = folder / "out.json"
    gc.freeze()  # here too: a fixture of the module runs before those of a test
    threads = torch.get_num_threads()
    arguments = ["--op", op, "--quick", "--threads", "1", "--json", str(path)]
    status = run.main([*arguments, "--case", cases])
    assert torch.get_num_threads() == threads
    assert not path.with_name("out.json.part").exists()
    result = json.loads(path.read_text())
    assert status == 0, run.failures(result)
    return result


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> dict:
    cases = "^fwd.*4096x1000 fp32|^options|^inplace.*fp32|^overhead fwd$|^accuracy|bwd 16x21.*fp32"
    return _quick_run(tmp_path_factory.mktemp("bench"), "row_softmax", cases)


@pytest.fixture(scope="module")
def linear_document(tmp_path_factory) -> dict:
    cases = "^fwd\\+bwd 2048|^options.*bf16|^fwd 2048.*fp32|^per row|^accuracy"
    return _quick_run(tmp_path_factory.mktemp("linear"), "linear_cross_entropy", cases)


def test_document_has_the_promised_keys(document):
    assert document["schema"] == _core.SCHEMA_VERSION
    assert document["op"] == "row_softmax"
    environment = document["environment"]
    for key in ("revision", "pyloss", "torch", "triton", "cpu", "gpu", "huge_pages"):
        assert key in environment
    for key in ("model", "flags", "cores", "cores_usable"):
        assert environment["cpu"][key]
    assert len(environment["load_average_at_end"]) == 3
    assert document["bandwidth"][0]["copy_gbs"] > 0
    assert document["bandwidth"][0]["fresh_copy_gbs"] > 0


def test_records_are_checked_timed_and_complete(document):
    own = [r for r in document["results"] if r["provider"].startswith("pyloss")]
    assert {r["status"] for r in own} == {"ok"}
    timed = [r for r in document["results"] if "median_ms" in r]
    assert {r["provider"] for r in timed} >= {"pyloss", "torch", "pyloss inplace"}
    for r in timed:
        assert r["check_error"] <= 1.0
        assert r["rounds"] >= 2
        assert 0 < r["min_ms"] <= r["p20_ms"] <= r["median_ms"] <= r["p80_ms"]
        if r["provider"] == "torch":
            assert r["speedup"] == 1.0
    for r in document["results"]:
        if r["status"] == "skipped":
            assert r["reason"]
    assert all(r["value"] > 0 for r in document["results"] if r["group"] == "accuracy")


def test_records_of_the_linear_op(linear_document):
    records = linear_document["results"]
    own = [r for r in records if r["provider"].startswith("pyloss")]
    assert {r["status"] for r in own} == {"ok"}
    providers = {r["provider"] for r in records if "median_ms" in r}
    assert providers >= {"pyloss", "torch", linear.PRODUCTS, linear.EXACT, "pyloss smoothing"}
    for r in records:
        assert r["status"] == "ok" or r["reason"]
        if "median_ms" not in r:
            continue
        assert r["check_error"] <= 1.0
        assert "pct_copy" not in r  # time goes into products, not into bytes
        if r["provider"] == linear.PRODUCTS:
            assert r["x_products"] == 1.0 and "extra_mb" not in r
        elif r["group"] != "options":
            assert r["x_products"] > 0
        if r["peak_bytes"] is not None and r["provider"] != linear.PRODUCTS:
            n, v, d = r["shape"]
            size = {"fp32": 4, "bf16": 2}[r["dtype"]]
            gradients = (n + v) * d * size if r["mode"] == "fwd+bwd" else 0
            assert r["extra_mb"] == max(0, r["peak_bytes"] - gradients) / 1e6
    accuracy = [r for r in records if r["group"] == "accuracy"]
    what = {r["what"].split(",")[0] for r in accuracy}
    assert what == {"loss", "dX", "dW", "db"}
    assert all(0 < r["value"] < 2 for r in accuracy)


def test_the_check_of_the_linear_op_notices_small_damage():
    problem = linear.Problem((24, 50, 8), "fp32", "cpu")
    loss, grads = linear.make_run(problem, linear._unfused("mean"), "fwd+bwd", {}, bias=True).call()

    def error(change, which: int) -> float:
        changed = [g.clone() for g in grads]
        change(changed[which])
        return problem.error(loss, changed, {}, True)

    assert problem.error(loss, grads, {}, True) <= 1.0
    for which in range(3):
        assert error(lambda g: g[7].mul_(1.01), which) > 1.0
        assert not error(lambda g: g[7].fill_(float("nan")), which) <= 1.0
        assert error(lambda g: g.zero_(), which) > 1.0
    assert problem.error(loss * 1.001, grads, {}, True) > 1.0
    assert problem.error(loss, grads, {"tau": 1.7}, True) > 1.0
    with pytest.raises(ValueError, match="shorter|longer"):
        problem.error(loss, grads[:2], {}, True)


def test_the_answers_are_those_of_stored_logits():
    problem = linear.Problem((24, 50, 8), "bf16", "cpu")
    layer = (problem.hidden, problem.weight, problem.bias)
    hidden, weight, bias = (t.double().requires_grad_() for t in layer)
    rows = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(hidden, weight, bias), problem.target, reduction="none"
    )
    for options, upstream in (({}, torch.full((24,), 1 / 24)), ({"rows": True}, problem.upstream)):
        expected = torch.autograd.grad(
            rows, (hidden, weight, bias), upstream.double(), retain_graph=True
        )
        found, grads = problem.answer(options, bias=True)
        torch.testing.assert_close(found, rows.detach())
        torch.testing.assert_close(grads, [g.float() for g in expected])
    # Another dtype of the same shape shares them.
    again = linear.Problem((24, 50, 8), "fp32", "cpu")
    assert again.answer({}, bias=True) is problem.answer({}, bias=True)
    assert linear.Problem((24, 51, 8), "fp32", "cpu").answer({}, bias=True)[1][1].shape == (51, 8)


def test_derived_columns_of_the_linear_op():
    case = next(c for c in linear.cases(_core.Context()) if c.name.endswith("256 fp32"))
    ms = {
        linear.PRODUCTS: 10.0,
        "pyloss": 11.0,
        "pyloss filter": 8.0,
        "torch": 16.5,
        linear.CHUNKED: 33.0,
        "cce": 4.0,
    }
    records = [
        {"provider": name, "median_ms": t, "peak_bytes": case.result_bytes + int(5e7)}
        for name, t in ms.items()
    ]
    for r in records:
        r["approximate"] = r["provider"] in ("pyloss filter", "cce")
    _core.derive(records, case, copy_gbs=1.0)
    by_name = {r["provider"]: r for r in records}
    own = by_name["pyloss"]
    assert own["x_products"] == pytest.approx(1.1)
    assert own["speedup"] == pytest.approx(1.5)
    assert own["speedup_over_chunked"] == pytest.approx(3.0)
    assert own["extra_mb"] == pytest.approx(50.0)
    # The products are no peer, and who leaves work out is one only of its like.
    assert own["speedup_over_best_peer"] == pytest.approx(1.5)
    assert by_name["pyloss filter"]["speedup_over_best_peer"] == pytest.approx(0.5)
    assert "speedup_over_chunked" not in by_name["torch"]


@pytest.mark.parametrize(
    "op",
    [
        row_softmax,
        aldr,
        frame_pca,
        gemm,
        linear,
        attention,
        betti,
        betti_3d,
        lcm,
        lion_k,
        margin_shift,
        permutahedron,
        row_moments,
        segment,
        segmentation,
        spherical,
        similarity_softmax,
        similarity_topk,
        sorting_network,
    ],
)
def test_every_target_has_a_case(op):
    for device in ("cpu", "cuda"):
        context = _core.Context(device=device)
        names = [case.name for case in op.cases(context)]
        assert len(set(names)) == len(names)
        for target in op.TARGETS:
            if target.device == device:
                assert any(re.fullmatch(target.case, name) for name in names), target.what
            assert (target.at_least is None) != (target.at_most is None)


def test_targets_take_the_worst_value_per_thread_count():
    target = _targets.Target("t", "speedup", "a.*", at_least=2.0)
    base = {"device": "cpu", "provider": "pyloss"}
    results = [
        {**base, "case": "a1", "threads": 2, "speedup": 3.0},
        {**base, "case": "a2", "threads": 2, "speedup": 1.5},
        {**base, "case": "a1", "threads": 1, "speedup": 2.5},
        {**base, "case": "b", "threads": 1, "speedup": 0.1},
        {**base, "case": "a1", "threads": 1, "provider": "torch", "speedup": 1.0},
    ]
    outcomes = {o.threads: o for o in _targets.evaluate([target], results)}
    assert outcomes[2].value == 1.5 and outcomes[2].where == "a2, pyloss"
    assert not target.met(outcomes[2].value)
    assert outcomes[1].value == 2.5 and target.met(outcomes[1].value)


@pytest.fixture(scope="module")
def attention_document(tmp_path_factory) -> dict:
    return _quick_run(tmp_path_factory.mktemp("attention"), "tensor_attention", "fp32|windows")


def test_records_of_tensor_attention(attention_document):
    records = attention_document["results"]
    assert not run.failures(attention_document)
    measured = [r for r in records if r["provider"] == "pyloss" and "median_ms" in r]
    assert {r["mode"] for r in measured} == {"fwd", "bwd", "fwd+bwd"}
    for r in measured:
        assert r["check_error"] <= 1
        assert r["gflops"] > 0 and r["pct_products"] == pytest.approx(100 / r["x_products"])
    peers = {r["provider"] for r in records if r["status"] == "ok"}
    assert {attention.NAIVE, attention.BLOCKED, attention.WINDOWS, attention.PRODUCTS} <= peers
    ratios = [r for r in records if r["case"].startswith("rate of windows")]
    assert len(ratios) == 2 and all(r["value"] > 0 for r in ratios)


@pytest.fixture(scope="module")
def lowrank_document(tmp_path_factory):
    return _quick_run(tmp_path_factory.mktemp("lowrank"), "tensor_attention_lowrank", "")


def test_records_of_lowrank_attention(lowrank_document):
    records = lowrank_document["results"]
    assert not run.failures(lowrank_document)
    measured = [r for r in records if "median_ms" in r]
    assert {r["mode"] for r in measured} == {"fwd", "fwd+bwd"}
    assert {r["provider"] for r in measured} == {"pyloss", lowrank.TILED, lowrank.PRODUCTS}
    for r in measured:
        assert r.get("check_error", 0) <= 1 and r["gflops"] > 0
    # Every line of the table that a CPU can tell has its record.
    found = {o.target.what for o in _targets.evaluate(lowrank.TARGETS, records)}
    assert found == {t.what for t in lowrank.TARGETS if t.device == "cpu"}


def test_the_answer_of_lowrank_attention():
    """The tiled algorithm in PyTorch, backward by hand, against the library's own reference."""
    from pyloss.functional._polynomials import taylor
    from pyloss.reference import tensor_attention_lowrank

    problem = lowrank.Problem(2, 20, 5, 3, "cpu")
    leaves = [t.double().requires_grad_() for t in problem.tensors]
    out = tensor_attention_lowrank(
        leaves[0], leaves[1:3], leaves[3:], coefficients=taylor(3).scaled(0.2)
    )[0]
    grads = torch.autograd.grad(out, leaves, problem.upstream.double())
    found, found_grads = problem.answer()
    torch.testing.assert_close(found, out[0, 0])
    for a, b in zip(found_grads, grads):
        torch.testing.assert_close(a, b[0, 0])
    damaged = [g[0, 0].clone() for g in grads]
    assert problem.error(out[0, 0], damaged) < 0.1
    damaged[2][3, 1] += 1e-3 * damaged[2].abs().max()
    assert problem.error(None, damaged) > 1


@pytest.mark.parametrize("window", [None, (3, 5)])
def test_the_answer_of_tensor_attention(window):
    """What providers are checked with, against the library's own reference."""
    from pyloss.reference import tensor_attention

    problem = attention.Problem(2, 20, 8, window, "fp32", "cpu")
    leaves = [t.double().requires_grad_() for t in problem.tensors]
    out, _ = tensor_attention(
        leaves[0], leaves[1:3], leaves[3:], causal=window is not None, windows=window
    )
    grads = torch.autograd.grad(out, leaves, problem.upstream.double())
    found, found_grads = problem.answer()
    torch.testing.assert_close(found, out[0, 0])
    for a, b in zip(found_grads, grads):
        torch.testing.assert_close(a, b[0, 0])
    assert problem.error(out, list(grads)) < 0.1
    damaged = [g.clone() for g in grads]
    damaged[2][0, 0, 3, 1] += 1e-3 * damaged[2].abs().max()
    assert problem.error(None, damaged) > 1
    assert problem.error(out * (1 + 1e-4), None) > 1
    count = attention.triples(2, 20, window)
    assert count == 2 * sum(min(i + 1, 3) * min(i + 1, 5) for i in range(20)) or window is None
    assert attention.useful_flop("fwd+bwd", 2, 20, 8, window) == 14 * 8 * count


@pytest.fixture(scope="module")
def sorting_document(tmp_path_factory) -> dict:
    cases = "fused .*(64x32|64x1024)|permutation|values|matrices|soft_rank l2"
    return _quick_run(tmp_path_factory.mktemp("sorting"), "sorting_network", cases)


def test_records_of_the_sorting_network(sorting_document):
    records = sorting_document["results"]
    own = [r for r in records if r["provider"].startswith("pyloss")]
    assert {r["status"] for r in own} == {"ok"}
    assert {r["group"] for r in own} == {
        *("fused", "permutation", "values", "matrices"),
        "fwd+bwd",  # those of the permutahedron
    }
    for r in records:
        assert r["status"] == "ok" or r["reason"]
        assert r["check_error"] <= 1 if r in own else True


def test_the_check_of_the_sorting_network_notices_small_damage():
    problem = sorting_network.Problem("odd_even", 3, 9, "cpu")
    (provider, *_) = sorting_network.fused_providers(problem, True)
    run = provider.build()
    assert run.check() <= 1
    (_, dx), exact = run.call(), problem.bce_gradient
    assert problem.gradient_error(dx * 1.001, exact, 1e-4) > 1
    assert not problem.gradient_error(dx * float("nan"), exact, 1e-4) <= 1
    other = sorting_network.Problem("bitonic", 3, 9, "cpu").bce_gradient
    assert problem.gradient_error(dx, other, 1e-4) > 1


def test_a_long_call_of_a_peer_is_not_repeated(monkeypatch):
    monkeypatch.setattr(_core, "_LONG_CALL_SECONDS", -1.0)
    calls = []
    providers = [
        _core.Provider(name, lambda name=name: _core.Run(call=lambda: calls.append(name)))
        for name in ("pyloss", "peer")
    ]
    case = _tiny_case(providers)
    records = _core.run_case(case, providers, _core.Context(rounds=3), 1, 1.0)
    by_name = {r["provider"]: r for r in records}
    assert by_name["peer"]["rounds"] == 1 and calls.count("peer") == 1
    assert by_name["pyloss"]["rounds"] == 3


def _tiny_case(providers: list[_core.Provider]) -> _core.Case:
    return _core.Case("tiny", "fwd", "fwd", (4,), "fp32", 16, 16, open=lambda: providers)


def test_a_provider_that_is_wrong_or_fails_is_not_timed():
    calls = []

    def skipped() -> _core.Run:
        raise _core.Skip("not here")

    def broken() -> _core.Run:
        raise RuntimeError("first line\nsecond line")

    providers = [
        _core.Provider("pyloss", lambda: _core.Run(lambda: calls.append("ok"), lambda: 0.5)),
        _core.Provider("pyloss bad", lambda: _core.Run(lambda: calls.append("bad"), lambda: 2.0)),
        _core.Provider("inexact", lambda: _core.Run(lambda: calls.append("ok"), lambda: 2.0)),
        _core.Provider("bad", lambda: _core.Run(lambda: calls.append("bad"), lambda: 20.0)),
        _core.Provider("nan", lambda: _core.Run(lambda: calls.append("nan"), lambda: float("nan"))),
        _core.Provider("skipped", skipped),
        _core.Provider("broken", broken),
        _core.Provider("pyloss broken", broken),
    ]
    context = _core.Context(rounds=3)
    records = _core.run_case(_tiny_case(providers), providers, context, 1, copy_gbs=1.0)
    status = {r["provider"]: r["status"] for r in records}
    assert status == {
        "pyloss": "ok",
        "pyloss bad": "wrong",
        "inexact": "ok",
        "bad": "wrong",
        "nan": "wrong",
        "skipped": "skipped",
        "broken": "skipped",
        "pyloss broken": "failed",
    }
    assert set(calls) == {"ok"}
    assert {r["provider"]: r.get("reason") for r in records}["broken"] == "RuntimeError: first line"
    failed = run.failures({"results": records})
    assert len(failed) == 2 and "pyloss bad" in failed[0] and "pyloss broken" in failed[1]


def test_timing_is_interleaved_and_bounded():
    order = []
    runs = {name: _core.Run(lambda name=name: order.append(name)) for name in ("a", "b")}
    context = _core.Context(rounds=40)
    timings, timer = _core.time_interleaved(runs, 1, context)
    assert timer == "perf_counter"
    assert [len(t.samples) for t in timings.values()] == [40, 40]
    # After one warm-up each: two calls per sample, the first untimed as these calls are short.
    rounds = [tuple(order[i : i + 4]) for i in range(2, len(order), 4)]
    assert set(rounds) == {("a", "a", "b", "b"), ("b", "b", "a", "a")}

    context = _core.Context(rounds=40, seconds=0.0)
    timings, _ = _core.time_interleaved(runs, 1, context)
    assert [len(t.samples) for t in timings.values()] == [2, 2]


def test_a_case_may_ask_for_fewer_rounds():
    runs = {"a": _core.Run(lambda: None)}
    for most, rounds in ((3, 3), (50, 40), (None, 40)):
        timings, _ = _core.time_interleaved(runs, 1, _core.Context(rounds=40), most_rounds=most)
        assert len(timings["a"].samples) == rounds


def test_a_case_for_the_largest_thread_count_only():
    case = next(c for c in linear.cases(_core.Context(quick=True)) if c.once)
    records = run._run_case(case, _core.Context(quick=True, rounds=2), [2, 1], {1: 1.0, 2: 1.0})
    assert {r["threads"] for r in records} == {2}


def test_setup_runs_before_every_call():
    log = []
    runs = {"a": _core.Run(lambda: log.append("call"), setup=lambda: log.append("setup"))}
    _core.time_interleaved(runs, 1, _core.Context(rounds=3))
    assert log == ["setup", "call"] * 7


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_temporaries():
    size = 64 << 20

    def call() -> torch.Tensor:
        temporary = torch.ones(size // 4)
        return temporary.sum()

    peak, how = _core.peak_memory(_core.Run(call), "cpu")
    if peak is None:
        pytest.skip(how)
    assert 0.9 * size < peak < 1.5 * size


def test_compare(document):
    same = copy.deepcopy(document)
    assert run.compare(document, same) == []

    def change(key: str, group: str, factor: float) -> dict:
        new = copy.deepcopy(document)
        for r in new["results"]:
            if r["provider"] == "pyloss" and r["group"] == group and key in r:
                r[key] *= factor
        return new

    slower = change("median_ms", "fwd+bwd", 1.2)
    assert run.compare(document, slower)
    assert run.compare(document, slower, shared=True) == []
    assert run.compare(slower, document) == []
    other_machine = copy.deepcopy(slower)
    other_machine["environment"]["cpu"]["model"] = "another"
    assert run.compare(document, other_machine) == []

    overhead = change("min_ms", "overhead", 1.2)
    assert len(run.compare(document, overhead, shared=True)) == 1

    larger = copy.deepcopy(document)
    for r in larger["results"]:
        if r.get("peak_bytes") is not None and r["provider"] == "pyloss":
            r["peak_bytes"] += 100 << 20
    assert run.compare(document, larger, shared=True)


# --- tables and figures -------------------------------------------------------------------------


@pytest.fixture
def gpu_document(document) -> dict:
    """What a GPU run looks like; the numbers are invented."""
    gpu = copy.deepcopy(document)
    gpu["options"] |= {"device": "cuda", "quick": False}
    gpu["environment"]["gpu"] = {"name": "Test GPU", "sm_count": 4, "driver": "1.2"}
    gpu["bandwidth"] = [{"device": "cuda", "threads": 1, "copy_gbs": 1000.0}]
    gpu["results"] = []
    for case in row_softmax.cases(_core.Context(device="cuda")):
        if isinstance(case, _core.Case) and case.inner == 1:
            keys = ("min_ms", "p20_ms", "median_ms", "p80_ms")
            floor_ms = case.useful_bytes / 1e9
            base = {k: getattr(case, k) for k in ("group", "mode", "dtype")}
            base |= {"case": case.name, "shape": list(case.shape), "device": "cuda", "threads": 1}
            base |= {"status": "ok", "inner": 1, "rounds": 10}
            factors = {"pyloss": 1.05, "pyloss all options": 1.07, "torch": 3.0, "liger": 1.5}
            records = [
                {**base, "provider": name, **dict.fromkeys(keys, factor * floor_ms)}
                for name, factor in factors.items()
            ]
            _core.derive(records, case, 1000.0)
            gpu["results"] += records
    return gpu


def _write_results(root: Path, **documents: dict) -> None:
    folder = root / plot.RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (root / "docs").mkdir(exist_ok=True)
    for name, content in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_page_and_figures(document, gpu_document, linear_document, tmp_path):
    pytest.importorskip("matplotlib")
    stale = {**document, "created": "2000-01-01T00:00:00+00:00"}
    figures = {"schema": _core.SCHEMA_VERSION}  # of a script that draws; no op
    _write_results(tmp_path, cpu=document, a_stale=stale, cuda=gpu_document, figures=figures)
    _write_results(tmp_path, linear=linear_document)
    assert plot.main(["--write", "--root", str(tmp_path)]) == 0
    page = (tmp_path / plot.PAGE).read_text()
    assert page.count("\n## row_softmax\n") == page.count("\n## linear_cross_entropy\n") == 1
    assert page.count("### CPU: ") == 2 and page.count("### GPU: Test GPU") == 1
    assert "2000-01-01" not in page and "No GPU has run" not in page
    assert page.count("| what | asked |") == 3
    assert "95.2 %" in page  # 1 / 1.05 of the copy bandwidth
    assert "quick run" in page and "pyloss tau=0.5" in page
    assert "x bare products | x torch | extra memory (MB) |" in page
    assert "| accuracy bf16 | pyloss accumulate fp32 | dW, 256x262144x64 |" in page
    names = ["linear_cross_entropy_cpu", "overview", "row_softmax_cpu", "row_softmax_cuda"]
    pictures = sorted(p.stem for p in (tmp_path / "docs/img").iterdir())
    assert pictures == names
    for name in names:
        assert f"(img/{name}.png)" in page
        assert 1000 < (tmp_path / f"docs/img/{name}.png").stat().st_size < 100_000
    before = page
    plot.write(tmp_path)
    assert (tmp_path / plot.PAGE).read_text() == before


def test_one_file_is_printed(document, tmp_path, capsys):
    (tmp_path / "out.json").write_text(json.dumps(document))
    assert plot.main([str(tmp_path / "out.json")]) == 0
    text = capsys.readouterr().out
    assert "| what | asked |" in text and "pyloss tau=0.5" in text
    with pytest.raises(SystemExit):
        plot.main([])


def test_overview_is_ours_against_each_peer(document, tmp_path):
    line = plot.OVERVIEW[0]
    made = copy.deepcopy(document)
    made["options"]["threads"] = [2, 1]
    base = {"case": line.case, "status": "ok"}
    made["results"] = [
        {**base, "threads": 2, "provider": "pyloss", "median_ms": 2.0, "peak_bytes": 10},
        {**base, "threads": 2, "provider": "torch", "median_ms": 6.0, "peak_bytes": 0},
        {**base, "threads": 1, "provider": "torch", "median_ms": 99.0, "peak_bytes": 99},
        {**base, "threads": 2, "provider": "torch.compile", "status": "skipped"},
    ]
    assert plot.overview_rows([made]) == [(line.label, line.peers["torch"], 3.0, None)]


def test_committed_page_is_up_to_date():
    """docs/benchmarks.md and the files of bench/results say the same."""
    documents = plot.committed(ROOT)
    message = "run `python -m bench.plot --write`"
    assert (ROOT / plot.PAGE).read_text() == plot.page(documents, ROOT), message
    pictures = {plot.figure_name(d) for d in documents if plot.has_figure(d)} | {"overview.png"}
    for name in pictures:
        assert (ROOT / "docs/img" / name).is_file(), message
    lines = {(line.label, peer) for line in plot.OVERVIEW for peer in line.peers.values()}
    assert {row[:2] for row in plot.overview_rows(documents)} == lines


def test_plot_refuses_another_schema_and_missing_markers(document, tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({**document, "schema": 0}))
    with pytest.raises(ValueError, match="schema"):
        plot.load([path])
    with pytest.raises(ValueError, match="exactly one pair"):
        plot.replace_block("no markers", "text", "row_softmax")
