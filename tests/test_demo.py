"""`python -m pyloss.demo` and the examples: they run, write what they promise, and their checks
notice what they should."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from pyloss.demo import __main__ as command
from pyloss.demo import curves, language_model, sections, text
from pyloss.demo.memory import PeakMemory
from pyloss.demo.model import GPT
from pyloss.demo.progress import Progress, table

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def corpus() -> text.Corpus:
    return text.load_corpus(8192)


@pytest.fixture
def fake_section(monkeypatch):
    """Replaces the table by one section that fails as many checks as --seed says."""

    def run(options: sections.Options) -> list[str]:
        return ["reason"] * options.seed

    fake = {"fake": sections.Section("fake", "does nothing", run)}
    monkeypatch.setattr(command, "load", lambda: fake)


def test_quick_run(tmp_path, corpus):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "pyloss.demo", "--quick", "--section", "language-model"]
    done = subprocess.run(
        [*command, "--threads", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    png = (tmp_path / "demo_out" / "language_model.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    report = json.loads((tmp_path / "demo_out" / "language_model.json").read_text())
    assert report["size"]["vocabulary"] >= 8192
    assert [run["name"] for run in report["runs"]] == [run.name for run in language_model.RUNS]
    for run in report["runs"]:
        assert len(run["losses"]) == report["size"]["steps"]
        assert 0 < run["head_ms"] < run["step_ms"]
        if run["name"] == language_model.PYLOSS_LINEAR:
            assert run["loss_ms"] is None  # it has no logits to start from
        else:
            assert 0 < run["loss_ms"] < run["head_ms"]
        assert run["peak_mib"] is None or run["peak_mib"] > 0
        assert run["name"] in done.stdout
    assert report["failures"] == []
    # Another process, another order of sets: the text is the same.
    assert report["text_crc32"] == zlib.crc32(corpus.train.tobytes())
    assert "all checks passed" in done.stdout
    assert "\r" not in done.stdout  # not a terminal


def test_full_size_is_what_was_promised():
    full = language_model.FULL
    assert full.vocabulary >= 8192
    assert full.batch * full.context >= 2048
    # Large enough for the check on the memory to mean something.
    logits = full.batch * full.context * full.vocabulary * 4 / (1 << 20)
    assert logits >= 2 * language_model.MEASURABLE_MIB
    names = [run.name for run in language_model.RUNS if not run.wrong_targets]
    assert names == [
        "F.cross_entropy",
        "pyloss.fused_cross_entropy",
        "pyloss.fused_linear_cross_entropy",
    ]


def curve(length: int = 60) -> list[float]:
    return [9.0 - 0.05 * step for step in range(length)]


def test_equal_curves_agree():
    nearly = [loss + 5e-5 for loss in curve()]
    assert language_model.compare_curves(curve(), curve()) == []
    assert language_model.compare_curves(curve(), nearly) == []


@pytest.mark.parametrize(
    ("step", "change", "part"),
    [
        (0, 2e-4, "first 20"),
        (19, 2e-4, "first 20"),
        (5, float("nan"), "first 20"),
        (5, float("inf"), "first 20"),
        (-10, 0.03, "last 10"),
        (-1, -0.03, "last 10"),
        (-1, float("nan"), "last 10"),
    ],
)
def test_differing_curves_are_noticed(step, change, part):
    other = curve()
    other[step] += change
    (failure,) = language_model.compare_curves(curve(), other)
    assert part in failure
    (failure,) = language_model.compare_curves(other, curve())
    assert part in failure


def test_the_middle_may_drift():
    other = curve()
    other[30] += 0.01
    assert language_model.compare_curves(curve(), other) == []


@pytest.mark.parametrize(("first", "second"), [(60, 59), (59, 60), (19, 19), (0, 0)])
def test_curves_of_wrong_length_are_noticed(first, second):
    assert len(language_model.compare_curves(curve(first), curve(second))) == 1


@pytest.mark.parametrize("run", language_model.RUNS, ids=lambda run: run.name)
def test_output_step(run):
    """The cuts of the graph change neither the loss nor a gradient."""
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    wanted = torch.arange(6)
    loss_fn = language_model.loss_function(run)
    expected = loss_fn((2 * hidden) @ weight.t(), wanted)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    memory = PeakMemory()
    loss, cost = language_model.output_step(run, 2 * hidden, weight, wanted, memory)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close((hidden.grad, weight.grad), gradients)
    assert cost.head_seconds > 0
    assert (cost.head_growth is None) == (not memory.can_reset)
    if run.linear:
        assert cost.loss_seconds is None and cost.loss_growth is None
    else:
        assert 0 < cost.loss_seconds < cost.head_seconds


@pytest.mark.skipif(not PeakMemory().can_reset, reason="this system cannot reset the peak")
def test_output_step_sees_the_logits():
    rows, classes = 2048, 8192  # 64 MiB of logits
    hidden, weight = torch.randn(rows, 4), torch.randn(classes, 4, requires_grad=True)
    hidden.requires_grad_()
    growth = {}
    for run in language_model.RUNS[:3]:
        step = (hidden * 1, weight, torch.zeros(rows, dtype=torch.int64), PeakMemory())
        language_model.output_step(run, *step)  # libraries' own buffers come with the first call
        step = (hidden * 1, *step[1:])
        growth[run.name] = language_model.output_step(run, *step)[1].head_growth
    stored = growth[language_model.PYTORCH]
    assert stored > 3 * 64 - 4
    assert growth[language_model.PYLOSS] > 2 * 64 - 4
    assert growth[language_model.PYLOSS_LINEAR] < stored - 64


def result(**fields) -> language_model.Result:
    values = dict(
        name="name",
        losses=[9.0, 8.0],
        validation_steps=[0, 2],
        curve_accuracies=[0.0, 0.1],
        validation_loss=9.5,
        validation_accuracy=0.1,
        step_ms=2.0,
        head_ms=1.0,
        head_mib=None,
        loss_ms=1.0,
        loss_mib=None,
        peak_mib=None,
        memory_method="none",
        sample=None,
    )
    return language_model.Result(**{**values, **fields})


@pytest.mark.parametrize(
    ("losses", "accuracies", "failures"),
    [
        ([9.0, 8.0], [0.0, 0.1], 0),
        ([9.0, 10.0], [0.0, 0.1], 0),
        ([9.0, 8.0], [0.1, 0.1], 1),
        ([9.0, 8.0], [0.0, float("nan")], 1),
        ([9.0, float("nan")], [0.0, 0.1], 1),
        ([float("inf"), 8.0], [0.1, 0.0], 2),
    ],
)
def test_check_learning(losses, accuracies, failures):
    run = result(losses=losses, curve_accuracies=accuracies, validation_accuracy=accuracies[-1])
    assert len(language_model.check_learning(run)) == failures


@pytest.mark.parametrize(
    ("stored", "fused", "logits", "failures"),
    [
        (256.0, 32.0, 64.0, 0),
        (256.0, 192.0, 64.0, 0),
        (256.0, 193.0, 64.0, 1),
        (256.0, 256.0, 64.0, 1),
        (256.0, float("nan"), 64.0, 1),
        (4.0, 4.0, 2.0, 0),  # too small to be measured
        (None, None, 64.0, 0),
    ],
)
def test_check_memory(stored, fused, logits, failures):
    pair = result(head_mib=stored), result(head_mib=fused)
    assert len(language_model.check_memory(*pair, logits)) == failures


@pytest.mark.parametrize("name", [None, language_model.PYLOSS, language_model.PYLOSS_LINEAR])
def test_a_run_that_drifts_fails_the_section(monkeypatch, tmp_path, corpus, name):
    """The runs themselves are replaced; `name` is the one whose losses differ."""
    steps = language_model.QUICK.steps

    def fake(run, *args):
        drift = 0.01 if run.name == name else 0.0
        return result(name=run.name, losses=[9.0 + drift] * steps, curve_accuracies=[0.0, 0.1])

    monkeypatch.setattr(language_model, "in_own_process", fake)
    monkeypatch.setattr(language_model, "load_corpus", lambda vocabulary: corpus)
    failures = language_model.language_model(sections.Options(tmp_path, quick=True))
    assert [failure.split(":")[0] for failure in failures] == ([] if name is None else [name])


def test_cost_table_without_memory_or_a_loss_alone():
    rows = language_model.cost_table([result(loss_ms=None)]).splitlines()
    assert rows[-1].split() == ["name", "1.0", "ms", "-", "-", "-", "2", "ms", "-"]


@pytest.mark.parametrize("methods", [["spawn"], multiprocessing.get_all_start_methods()])
def test_a_run_that_fails_says_why(monkeypatch, methods):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: methods)
    size = language_model.QUICK
    options = sections.Options(Path())
    tokens = np.zeros(4, dtype=np.int64)  # shorter than one window
    data = language_model.Data(tokens, tokens, tokens, tokens, tokens)
    with pytest.raises(RuntimeError, match="the training with broken failed"):
        language_model.in_own_process(
            language_model.Run("broken", tau=1.0), size, data, options, [0], ()
        )


def test_corrupted_targets():
    targets = np.arange(100_000) % 50
    wrong = language_model.corrupt(targets, 50, 0.2, seed=1)
    assert 0.19 < np.mean(wrong != targets) < 0.21
    assert wrong.min() >= 0 and wrong.max() < 50
    np.testing.assert_array_equal(wrong, language_model.corrupt(targets, 50, 0.2, seed=1))


def test_schedule():
    rates = [language_model.schedule(step, 100) for step in range(100)]
    assert max(rates) == 1.0 and min(rates) > 0.0
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_corpus(corpus):
    assert len(corpus.words) == len(set(corpus.words)) == 8192
    assert len(corpus.train) > 10 * len(corpus.validation) > 10_000
    for part in (corpus.train, corpus.validation):
        assert part.dtype == np.int64 and part.min() >= 0 and part.max() < 8192
    # Most of the text is in the vocabulary, and every word of it occurs.
    assert np.mean(corpus.train == 0) < 0.05
    both = np.concatenate([corpus.train, corpus.validation])
    assert len(np.unique(both)) == 8192


def test_corpus_that_is_too_small(monkeypatch):
    monkeypatch.setattr(text, "documents", lambda: ["only a few words"])
    with pytest.raises(RuntimeError, match="only 6 different words"):
        text.load_corpus(8192)


def test_tokenize():
    assert text.tokenize("It's a  list:\n[x_1, 23]...\n \n======") == [
        "It's", "a", "list", ":", "[", "x_1", ",", "23", "]", "...", "\n\n", "===",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "sentence",
    [
        'Return the "name" of the module, or None.',
        "See `os.path` (the module) for more.\n\nThe end.",
    ],
)
def test_decode_reads_as_english(sentence):
    words = [text.UNKNOWN, *dict.fromkeys(text.tokenize(sentence))]
    small = text.Corpus(words, np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert small.decode(small.encode(sentence)) == sentence


def test_model_is_causal():
    model = GPT(vocabulary=30, context=8, width=8, layers=2, heads=2)
    tokens = torch.randint(30, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 30
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5])
    # The output layer alone is left of the hidden states.
    logits = model.hidden(tokens) @ model.tokens.weight.t()
    torch.testing.assert_close(logits, model(tokens), rtol=0, atol=0)
    grouped = sum(len(group["params"]) for group in model.parameter_groups(1.0, 1.0))
    assert grouped == len(list(model.parameters()))


def test_section_table():
    table = sections.load()
    assert next(iter(table)) == "language-model"
    for name, entry in table.items():
        assert name == entry.name and entry.summary and callable(entry.run)
    with pytest.raises(ValueError, match="twice"):
        sections.section("language-model", "again")(lambda options: [])


def test_exit_status(fake_section, tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert command.main([*out, "--seed", "0"]) == 0
    assert command.main([*out, "--seed", "2"]) == 1
    assert "FAILED fake: reason" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--section", "unknown"], ["--threads", "0"]])
def test_wrong_arguments(fake_section, arguments):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)


PEAK = """
import numpy as np
from pyloss.demo.memory import PeakMemory
memory = PeakMemory()
if memory.can_reset:
    memory.reset()
    before = memory.peak()
    block = np.ones(8 << 20)  # 64 MiB
    grown = memory.peak() - before
    del block
    assert 60 < grown < 80, grown
    memory.reset()
    assert memory.peak() < before + 16
else:
    print("cannot reset the peak")
"""


def test_peak_memory():
    """In a process of its own: what other tests have freed may serve the block."""
    found = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    if found.stdout:
        pytest.skip("this system cannot reset the peak")


def test_peak_memory_without_proc(monkeypatch):
    monkeypatch.setattr("pyloss.demo.memory._reset_mark", lambda: False)
    memory = PeakMemory()
    memory.reset()
    assert not memory.can_reset
    assert (memory.peak() is None) == (memory.method == "not available on this system")


def test_progress_in_a_log():
    stream = io.StringIO()
    progress = Progress("run", 100, stream)
    for step in range(1, 101):
        progress.update(step, "note")
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["25/100", "50/100", "75/100", "100/100"]


def test_progress_on_a_terminal():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = Progress("run", 3, stream)
    for step in range(1, 4):
        progress.update(step)
    assert stream.getvalue().startswith("\r")
    assert stream.getvalue().count("\n") == 1


def test_table():
    lines = table(["loss", "time"], [["a", "1 ms"], ["longer", "20 ms"]]).splitlines()
    assert lines == ["loss     time", "------  -----", "a        1 ms", "longer  20 ms"]


def test_no_picture_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = curves.draw(tmp_path / "curves.png", [], [])
    assert "matplotlib" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory", [64.0, None])
def test_picture(tmp_path, memory):
    pytest.importorskip("matplotlib")
    runs = [result(name=f"loss {i}", head_mib=memory) for i in range(3)]
    assert "curves.png" in curves.draw(tmp_path / "curves.png", runs, runs)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_example_lm_cross_entropy():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "lm_cross_entropy.py"), "--steps", "40"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # its operations are too small for more
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    before, after = (float(part.split()[-1]) for part in lines[0].split(","))
    assert before == pytest.approx(after, abs=2e-6)
    losses = [float(line.split()[3]) for line in lines[1:]]
    assert losses[-1] < losses[0] - 1


def test_example_lm_linear_cross_entropy():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "lm_linear_cross_entropy.py"), "--steps", "40"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, *steps, last = done.stdout.splitlines()
    before, after = (float(part.split()[-1]) for part in first.split(","))
    assert before == pytest.approx(after, abs=2e-6)
    losses = [float(line.split()[3]) for line in steps]
    assert losses[-1] < losses[0] - 1
    logprob, entropy = (float(part.split()[-1]) for part in last.split(","))
    assert -losses[0] < logprob < 0 < entropy
