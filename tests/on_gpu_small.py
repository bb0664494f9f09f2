"""A few small runs of every CUDA op, for compute-sanitizer: `compute-sanitizer --tool racecheck python tests/on_gpu_small.py`."""

import importlib

import op_cases
import torch

from commopt.backends import reference

LONGER = {"topk": [(5003, {"k": 500}), (70_003, {"k": 700})], "threshold": [(5003, {"k": 500}), (70_003, {"k": 700})], "blocktopk": [(70_003, {"k": 10})],
          "randomk": [(70_003, {"k": 700, "scaled": True})], "quant": [(5003, {"bits": 8, "block": 1024, "stochastic": True})]}
OPS = ("dense", "half", "float", "quant", "shared", "ternary", "sign", "hadamard", "topk", "threshold", "blocktopk", "randomk")

if __name__ == "__main__":
    cuda = importlib.import_module("commopt.backends.cuda")
    for op in OPS:
        cases = [(n, next(iter(op_cases.variants(op, n)))) for n in (1, 257, 5003)]
        for n, options in cases + LONGER.get(op, []):
            got, wanted = (op_cases.run(kernels, op, n, "heavy", torch.float32, device=device, **options) for kernels, device in ((cuda, "cuda"), (reference, "cpu")))
            wrong = op_cases.difference({name: value.cpu() for name, value in got.items()}, wanted)
            assert not wrong, f"{op} n={n}: {wrong}"
        print(op, "has the bits of the reference", flush=True)
