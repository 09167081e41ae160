"""The sample kernel under Triton's interpreter."""

import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compile"))
import sample_kernel


@pytest.mark.parametrize("cols", [1, 5, 64, 127])
def test_row_logsumexp(cols: int) -> None:
    assert isinstance(sample_kernel.row_logsumexp_kernel, InterpretedFunction)
    x = torch.randn(3, cols) * 10
    torch.testing.assert_close(
        sample_kernel.row_logsumexp(x), torch.logsumexp(x, 1), rtol=1e-5, atol=1e-5
    )
