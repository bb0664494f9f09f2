"""`python -m commopt bench kernels`: a row for everything that was asked for, nothing timed that is wrong, rivals that do the same work."""

import itertools
import json
import os
import shutil

import pytest
import torch

import commopt
from commopt import backends
from commopt.__main__ import main
from commopt.backends import cpu
from commopt.bench import gradients, in_torch, kernels
from commopt.bench.kernel_runs import Run, Tensors, What
from commopt.compressors import base, overview

ISAS = commopt._C.cpu.isas()[-2:]
QUICK = ["--turns", "2", "--n", "3001"]


def rows(capsys, *argv: str) -> list[dict]:
    assert main(["bench", "kernels", *argv, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def failed(capsys, status: int, *argv: str) -> str:
    assert main(["bench", "kernels", *QUICK, *argv]) == status
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return said.err


def test_a_row_for_everything(capsys):
    before = commopt._C.cpu.isa(), torch.get_num_threads(), os.environ.get("COMMOPT_BACKEND")
    found = rows(capsys, "--spec", "int8,topk:ratio=0.01", "--what", "encode,decode 3,resum", "--n", "3001,70000", "--dtype", "float32,bfloat16",
                 "--backends", "cpu,reference", "--isas", ",".join(ISAS), "--threads", "1,2", "--turns", "2", "--no-compile")
    whats = [("int8", "encode"), ("int8", "decode 3"), ("int8", "resum 8"), ("topk:ratio=0.01", "encode"), ("topk:ratio=0.01", "decode 3")]
    owners = [*(("cpu", isa) for isa in ISAS), ("reference", None)]
    wanted = itertools.product(whats, owners, (1, 2), ("float32", "bfloat16"), (3001, 70000))
    assert sorted(str(((r["spec"], r["what"]), (r["backend"], r["isa"]), r["threads"], r["dtype"], r["n"])) for r in found) == sorted(map(str, wanted))
    assert all(r[key] > 0 for r in found for key in ("ns_per_value", "axpy_ns", "of_axpy", "median", "vs_torch", "worst"))
    assert all((r["of_zero"] is not None) == r["what"].startswith("decode") and r["vs_compile"] is None for r in found)
    assert all(r["gb_per_s"] == pytest.approx(r["bytes"] / (r["ns_per_value"] * r["n"])) for r in found)
    assert before == (commopt._C.cpu.isa(), torch.get_num_threads(), os.environ.get("COMMOPT_BACKEND"))


def test_the_bytes_that_must_be_moved(capsys):
    found = rows(capsys, "--spec", "int8,int8:ef=true,topk:momentum=0.9", "--what", "encode,decode 2,resum 8", "--dtype", "bfloat16", *QUICK, "--no-torch")
    moved = {(r["spec"], r["what"]): r["bytes"] for r in found}
    n, int8, topk = 3001, 3008 + 48, commopt.wire_bytes("topk:warmup=0", 3001)
    assert moved == {
        ("int8", "encode"): 2 * n + int8, ("int8", "decode 2"): 2 * int8 + 2 * n, ("int8", "resum 8"): 9 * int8,
        ("int8:ef=true", "encode"): 2 * n + int8 + 8 * n, ("int8:ef=true", "decode 2"): 2 * int8 + 2 * n, ("int8:ef=true", "resum 8"): 9 * int8,
        ("topk:momentum=0.9", "encode"): 2 * n + topk + 16 * n, ("topk:momentum=0.9", "decode 2"): 2 * topk + 2 * n,
    }


def test_what_is_registered_is_benched():
    try:

        @commopt.register("mine")
        class Mine(commopt.Compressor):
            collective = "gather"
            ef: bool = False

            def fields(self, n):
                return [("values", torch.float32, n)]

        @commopt.register("bare")  # one that knows nothing of error feedback
        class Bare(commopt.Compressor):
            collective, fields = "gather", Mine.fields

        plan = kernels._plan(None, None)
    finally:
        for name in ("mine", "bare"):
            base._table.classes.pop(name, None)
    with_messages = [row["spec"] for row in overview() if row["collective"] in ("gather", "auto", "two_shot")]
    assert "bare" in plan and "bare:ef=true" not in plan
    assert set(with_messages) < set(plan) and not {"none", "powersgd:rank=4"} & set(plan)
    assert plan["mine"] == [What("encode"), What("decode", 2), What("decode", 4)] and plan["mine:ef=true"] == [What("encode")]
    assert plan["int8"] == [What("encode"), What("decode", 2), What("decode", 8), What("resum", 8)] and plan["int8:ef=true"] == [What("encode")]
    assert What("rising") in plan["topk:ratio=0.01"] and What("rising") not in plan["topk:ratio=0.001"]
    assert kernels._plan(None, "resum 4").keys() == {spec for spec in plan if "resum 8" in map(str, plan[spec])}


@pytest.mark.parametrize("spec, op, argument, words", [
    ("int8", "quant_encode", 3, "codes"),
    ("int8:ef=true", "quant_encode", 1, "residual"),
    ("int4", "quant_decode_sum", 0, "out"),
    ("topk:ratio=0.01", "topk_encode", 4, "low"),
    ("randomk:ratio=0.01", "randomk_encode", 3, "values"),
])
def test_a_wrong_bit_is_not_timed(spec, op, argument, words, capsys, monkeypatch):
    right = getattr(cpu, op)

    def wrong(*args):
        right(*args)
        if args[argument] is not None:
            args[argument].view(-1).view(torch.uint8)[1000] ^= 1

    monkeypatch.setattr(cpu, op, wrong)
    said = failed(capsys, 1, "--spec", spec)
    assert f"{spec} on cpu, 200003 elements of float32: {words}[" in said and " differ" in said


def test_what_only_a_resum_does_is_verified(capsys, monkeypatch):
    right = cpu.quant_resum

    def wrong(n, row_codes, row_scales, residual, loss_scale, codes, *args):
        right(n, row_codes, row_scales, residual, loss_scale, codes, *args)
        codes[7] += 1

    monkeypatch.setattr(cpu, "quant_resum", wrong)
    assert "codes of the resum[7]" in failed(capsys, 1, "--spec", "int4")


@pytest.mark.parametrize("n", [70_003, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["int8", "int8:ef=true", "int4", "sign", "bf16", "bf16:ef=true", "fp16:ef=true", "topk:ratio=0.01"])
def test_torch_does_the_same_work(spec, dtype, n):
    """Over the whole blocks: what is sent, what is kept, and what becomes of two messages."""
    t = Tensors(spec, gradients.layered(n, dtype, 3), rows=2)
    ours, whole = Run("cpu", t), n // 1024 * 1024
    for turn in range(4):
        ours.encode(turn, turn % 2)
    form, spare, torch_rows = in_torch.way(t.compressor), t.residual.clone(), torch.zeros_like(t.rows)
    for row in (0, 1):  # its messages are read by our decoder
        fields = list(t.layout.views(torch_rows[row]))
        if spec.startswith("topk"):
            fields[1:] = [torch.zeros(fields[0].numel(), dtype=torch.int64)]
        form.encode(t.compressor, t.grads[2 * row], spare if t.compressor.ef else None, *fields)
        ours.encode(2 * row, row)
    if spec.startswith("topk"):  # which of two equal magnitudes is sent is up to torch
        spare, kept = (r.abs().sort().values for r in (spare, t.residual))
        assert near(spare, kept)
    else:
        assert near(spare[:whole], t.residual[:whole])
    ours.decode(2)
    decoded = t.out.clone()
    if not spec.startswith("topk"):  # whose places are written otherwise
        t.rows.copy_(torch_rows)
        ours.decode(2)
        assert near(t.out[:whole], decoded[:whole])
    t.out.zero_()
    in_torch.work(t, What("decode", 2), spare)(t.grads[0])
    assert near(t.out[:whole], decoded[:whole])
    if t.compressor.collective == "two_shot":
        in_torch.work(t, What("resum", 2), spare)(t.grads[0])
        assert near(t.total[:whole], 2 * decoded[:whole])


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """But for the few values whose rounding depends on whether one multiplies or divides."""
    return (a.float() - b.float()).norm() <= 0.01 * b.float().norm() + 1e-6


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_does_the_same_work(capsys):
    t = Tensors("int8", gradients.layered(4096, torch.float32, 2), rows=2)
    for turn in range(2):
        Run("cpu", t).encode(turn, turn)
    body = in_torch.work(t, What("resum", 2), t.residual)
    body(t.grads[0])
    total = t.total.clone()
    t.total.zero_()
    assert in_torch.compiled(body, t.grads[0], "int8 resum 2") is not None, capsys.readouterr().err
    assert total.norm() > 0 and near(t.total, total)


def test_a_compiler_that_fails_is_said(capsys, monkeypatch):
    def broken(x):
        raise RuntimeError("\nno compiler here\nat all")

    monkeypatch.setattr(torch, "compile", lambda body, **options: broken)
    assert main(["bench", "kernels", *QUICK, "--spec", "int8", "--what", "encode"]) == 0
    said = capsys.readouterr()
    assert "int8 encode, 3001 elements of float32, 1 threads: torch.compile fails, RuntimeError: no compiler here\n" in said.err
    assert said.out.splitlines()[1].split()[-2] == "-" and said.out.splitlines()[1].split()[-3] != "-"


def test_what_a_backend_lacks_is_left_out(capsys, monkeypatch):
    monkeypatch.delattr(cpu, "bits_pack")
    assert rows(capsys, *QUICK, "--spec", "topk:scope=block", "--no-torch", "--what", "decode") == []
    assert main(["bench", "kernels", *QUICK, "--spec", "topk:scope=block"]) == 0
    assert "topk:scope=block: left out, cpu does not have bits_pack" in capsys.readouterr().err


def test_a_method_without_ops_has_one_row(capsys):
    found = rows(capsys, *QUICK, "--spec", "dct:chunk=64,k=8", "--what", "encode", "--isas", ",".join(ISAS))
    assert [(r["backend"], r["isa"]) for r in found] == [("torch", None)]


@pytest.mark.parametrize("argv, words", [
    (["--spec", "int9"], ["int9", "int4"]),
    (["--spec", "powersgd"], ["powersgd", "rounds", "bench bandwidth"]),
    (["--spec", "none"], ["none", "the gradient itself"]),
    (["--what", "transcode"], ["--what", "transcode", "resum"]),
    (["--what", "decode many"], ["decode many", "number of rows"]),
    (["--what", "encode 2"], ["'encode 2'", "should be encode"]),
    (["--spec", "topk", "--what", "resum 8"], ["nothing to time"]),
    (["--backends", "gpu"], ["--backends", "gpu", "triton"]),
    (["--backends", "cuda"], ["cuda does not serve --device cpu"]),
    (["--backends", "triton"], ["interpreter", "--device cuda"]),
    (["--backends", "reference", "--isas", "avx2"], ["--isas", "backend cpu"]),
    (["--isas", "mmx"], ["--isas", "mmx", "base"]),
    (["--threads", "0"], ["--threads", "'0'"]),
    (["--n", "1000,"], ["--n", "'1000,'"]),
    (["--dtype", "float64"], ["--dtype", "float64", "bfloat16"]),
    (["--turns", "0"], ["--turns", "0"]),
])
def test_mistakes_are_named(argv, words, capsys):
    said = failed(capsys, 2, *argv)
    assert all(word in said for word in words), said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert "no GPU" in failed(capsys, 2, "--device", "cuda")
