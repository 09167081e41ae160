"""The demo section match3: its task, its construction, its models and its checks."""

from __future__ import annotations

import json

import pytest
import torch

from pyloss.demo import match3, sections


def test_section_runs(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert match3.match3(sections.Options(tmp_path, quick=True)) == []
    assert torch.get_num_threads() == threads
    report = json.loads((tmp_path / "match3.json").read_text())
    assert [run["name"] for run in report["runs"]] == [run.name for run in match3.RUNS]
    for run in report["runs"]:
        assert run["steps"][-1] == match3.QUICK.steps
        assert len(run["losses"]) == len(run["accuracies"]) == len(run["steps"])
        assert all(0 < a < 1 for a in run["accuracies"])
    assert 0.5 < report["majority"] < 0.9
    printed = capsys.readouterr().out
    assert printed.count("100.00%") == 2 * len(match3.QUICK.construction)
    pytest.importorskip("matplotlib")
    assert (tmp_path / "match3.png").read_bytes().startswith(b"\x89PNG")


def test_it_is_in_the_table():
    assert "match3" in sections.load()


def test_answers_by_loops():
    x = torch.randint(19, (50, 6))
    for row, found in zip(x.tolist(), match3.answers(x, 19).tolist()):
        for a, match in zip(row, found):
            assert match == any((a + b + c) % 19 == 0 for b in row for c in row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_construction_is_exact(dtype):
    for modulus, tokens in match3.FULL.construction:
        x = torch.randint(modulus, (5, tokens))
        assert torch.equal(match3.constructed(x, modulus, dtype), match3.answers(x, modulus))


def test_a_wrong_construction_is_noticed(monkeypatch):
    def wrong(x, modulus, dtype):
        found = match3.answers(x, modulus)
        found[0, 0] = ~found[0, 0]
        return found

    monkeypatch.setattr(match3, "constructed", wrong)
    _, failures = match3.check_construction(match3.QUICK, 0)
    assert len(failures) == 2 * len(match3.QUICK.construction)


def test_models_differ_in_the_attention_only():
    torch.manual_seed(0)
    tensor, plain = match3.Model(True, 32), match3.Model(False, 32)
    extra = sum(p.numel() for p in tensor.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == 2 * (32 * (match3.MODULUS - 1) + 32)
    wide = sum(p.numel() for p in match3.Model(False, 48).parameters())
    assert wide > sum(p.numel() for p in tensor.parameters())  # more parameters do not make up
    # With ones for the second keys and values, both compute the same.
    plain.load_state_dict(tensor.state_dict(), strict=False)
    for layer in (tensor.keys[1], tensor.values[1]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.ones_(layer.bias)
    x = torch.randint(match3.MODULUS, (4, match3.TOKENS))
    torch.testing.assert_close(tensor(x), plain(x), rtol=1e-4, atol=1e-5)


def _result(last):
    return match3.Result("name", 1, 1.0, [1], [0.5], [last])


@pytest.mark.parametrize(
    ("accuracies", "failures"),
    [
        ((0.97, 0.75, 0.80), 0),
        ((0.91, 0.75, 0.80), 1),
        ((float("nan"), 0.75, 0.80), 2),
        ((0.97, 0.86, 0.80), 1),
        ((0.97, 0.75, 0.95), 1),
    ],
)
def test_check_training(accuracies, failures):
    assert len(match3.check_training([_result(a) for a in accuracies])) == failures
