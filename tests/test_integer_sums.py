"""Sums of integers: encoded again in one pass."""

import pytest
import torch

import commopt
from commopt import backends
from commopt.compressors import Compressor
from commopt.wire import Layout
from op_cases import values_of
from ranks import same


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("spec", ["int8", "int4", "int2", "int8:block=1000,rounding=stochastic", "int4:block=65536,rounding=stochastic",
                                  "int2:rounding=stochastic", "int4:rotate=hadamard"])
def test_encoding_a_sum_again_has_the_bits_of_its_two_steps(spec, backend, kept, monkeypatch):
    monkeypatch.setenv("COMMOPT_BACKEND", backend)
    n, rows, compressor, kernels = 70_003, 3, commopt.parse(spec), backends.select("cpu")
    kernels.loss_scale, kernels.draw = torch.tensor([3.0]), (5, 6, 7)
    layout, results = Layout(compressor.fields(n)), []
    messages, resent = torch.zeros(rows, layout.nbytes, dtype=torch.uint8), torch.zeros(2, layout.nbytes, dtype=torch.uint8)
    for row in range(rows):
        compressor.encode(kernels, values_of("heavy" if row else "inf", n, row), None, *layout.views(messages[row]))
    for row, resum in zip(resent, (compressor.resum, lambda *args: Compressor.resum(compressor, *args))):
        total, residual = torch.full((n,), 7.0), values_of("heavy", n, 9) * 0.1 if kept else None
        resum(kernels, total, residual, layout.views(messages), layout.views(row))
        results.append((total, residual))
    same(*resent, spec)
    assert resent[0].any() and bool((results[0][0] == 7).all()) == ("rotate" not in spec)
    if kept:
        same(results[0][1], results[1][1], spec)
