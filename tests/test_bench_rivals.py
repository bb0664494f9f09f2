"""`python -m commopt bench rivals`: that it trains and times the same candidates, and what it concludes from numbers."""

import importlib.util
import json
import pathlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

from commopt.__main__ import main
from commopt.bench import candidates, rivals
from ranks import run

WHAT = {"task": "gpt", "parameters": 1000, "world": 2, "steps": 400, "seeds": 2, "tuned": "of the task", "bucket_mb": 1.0}
TINY = ["--spec", "torch:fp16,torch:powersgd1,torch:fp16-powersgd4,int8,powersgd:rank=2", "--width", "32", "--layers", "1", "--batch", "2", "--rounds", "2", "--eval-every", "4"]


def trained(losses: dict[str, tuple[float, ...]], **what) -> dict:
    run = lambda x: {"curve": [{"step": i, "loss": y, "seconds": i, "bytes": i} for i, y in enumerate((9.0, x))], "lr": 0.001, "bytes_per_step": 1.0, "seconds_per_step": 1.0}
    return {"what": WHAT | what, "runs": {spec: [run(x) for x in of] for spec, of in losses.items()}}


def timed(added: dict[str, float]) -> dict:
    what = {"parameters": 1000, "buckets": [4000], "world": 2, "threads": 1, "rounds": 3, "link": "1gbit", "kernels": "cpu", "torch": "2", "commopt": "0"}
    rows = [{"spec": spec, "step_ms": 50 + ms, "added_ms": ms, "sent": 1e6, "of_plain": ms / 100, "floor_ms": None} for spec, ms in added.items()]
    return {"what": what, "rows": rows}


def test_the_best_is_the_cheapest_in_the_band():
    losses = trained({"plain": (2.0, 2.2), "torch:fp16": (2.0, 2.2), "torch:powersgd16": (2.01, 2.22), "torch:powersgd1": (2.5, 2.5),
                      "int4": (2.0, 2.21), "topk:ratio=0.01": (2.2, 2.2), "sign": (1.9, 2.3)})
    added = {"plain": 100.0, "torch:fp16": 60.0, "torch:powersgd16": 40.0, "torch:powersgd1": 8.0, "int4": 10.0, "topk:ratio=0.01": 2.0, "sign": 12.0}
    result = rivals.judged(timed(added), losses, 0.02)
    rows = {row["spec"]: row for row in result["rows"]}
    assert [spec for spec, row in rows.items() if row["in_band"]] == ["plain", "torch:fp16", "torch:powersgd16", "int4", "sign"]
    assert rows["torch:powersgd16"]["above_plain"] == pytest.approx(0.015)
    assert result["best"] == {"band": 0.02, "ours": "int4", "theirs": "torch:powersgd16", "ratio": pytest.approx(4.0)}
    text = rivals.table(result).splitlines()
    assert text[-1] == ("within 0.02 nats of plain DDP: of ours int4 adds 10.0 ms, of theirs torch:powersgd16 adds 40.0 ms; theirs / ours = 4.00")
    assert text[3].split() == ["torch:powersgd16", "+0.0150", "yes", "1.000", "40.0", "0.400", "-", "90.0"]
    assert text[4].split()[:3] == ["torch:powersgd1", "+0.4000", "no"]


def test_plain_ddp_is_theirs_and_ours_may_have_none():
    losses = trained({"plain": (2.0,), "torch:powersgd1": (2.5,), "sign": (2.3,)})
    result = rivals.judged(timed({"plain": 100.0, "torch:powersgd1": 8.0, "sign": 1.0}), losses, 0.02)
    assert (result["best"]["ours"], result["best"]["theirs"], result["best"]["ratio"]) == (None, "plain", None)
    assert rivals.table(result).endswith("of ours none is, of theirs plain adds 100.0 ms")
    result = rivals.judged(timed({"plain": 100.0, "torch:powersgd1": 8.0, "sign": -1.0}), losses, 0.5)
    assert (result["best"]["ours"], result["best"]["theirs"], result["best"]["ratio"]) == ("sign", "torch:powersgd1", None)


def test_losses_are_read_from_files_that_belong_together(tmp_path):
    def file(name: str, result: dict) -> str:
        (tmp_path / name).write_text(json.dumps(result))
        return str(tmp_path / name)

    a = file("a", {"results": [trained({"plain": (2.0,), "int8": (2.1,)})]})
    b = file("b", {"rows": [], "trained": trained({"int8": (2.2,), "int4": (2.3,)})})
    runs = rivals.read([a, b], ["plain", "int4", "int8"])["runs"]
    assert {spec: of[0]["curve"][-1]["loss"] for spec, of in runs.items()} == {"plain": 2.0, "int4": 2.3, "int8": 2.2}
    with pytest.raises(ValueError, match="none of the files has sign, only plain, int8"):
        rivals.read([a], ["plain", "sign"])
    with pytest.raises(ValueError, match="has steps 30, and .* has 400"):
        rivals.read([a, file("c", {"results": [trained({}, steps=30)]})], ["plain"])


def test_it_trains_and_times_every_candidate(tmp_path, capfd):
    file = str(tmp_path / "all.json")
    assert main(["bench", "rivals", *TINY, "--steps", "4", "--seeds", "2", "--json", file]) == 0
    result = json.loads(pathlib.Path(file).read_text())
    specs = ["plain", "torch:fp16", "torch:powersgd1", "torch:fp16-powersgd4", "int8", "powersgd:rank=2"]
    assert [row["spec"] for row in result["rows"]] == list(result["trained"]["runs"]) == specs
    assert result["what"]["parameters"] == result["trained"]["what"]["parameters"] < 50_000
    sent = {row["spec"]: row["sent"] for row in result["rows"]}
    assert sent["plain"] == 4 * result["what"]["parameters"] > 3 * sent["int8"] > 0 and sent["powersgd:rank=2"] < sent["int8"]
    assert all(len(row["times_ms"]) == 2 and abs(row["above_plain"]) < 0.5 for row in result["rows"])
    assert capfd.readouterr().out.splitlines()[-1].startswith("within 0.02 nats of plain DDP: of ours ")

    assert main(["report", file, "-o", "-"]) == 0
    page = capfd.readouterr().out
    assert all(f"<title>{spec}: {row['above_plain']:+.4f} nats, {row['added_ms']:,.1f} ms</title>" in page for spec, row in zip(specs, result["rows"]))

    assert main(["bench", "rivals", *TINY, "--band", "9", "--losses", file]) == 0
    said = capfd.readouterr()
    assert "step 4/4" not in said.err and "no" not in [line.split()[2] for line in said.out.splitlines()[1:7]]


@pytest.mark.parametrize("argv, words", [
    (["--spec", "int9"], ["int9", "int4"]),
    (["--emulate", "fast"], ["fast", "100mbit"]),
    (["--rounds", "0"], ["--rounds must be at least 1, got 0"]),
    (["--task", "gpt,resnet"], ["no task 'gpt,resnet'", "takes one"]),
    (["--seeds", "0", "--losses", "nowhere.json"], ["--seeds must be at least 1, got 0"]),
])
def test_mistakes_are_named_before_anything_is_trained(argv, words, capfd):
    assert main(["bench", "rivals", *argv]) == 2
    said = capfd.readouterr()
    assert all(word in said.err for word in words) and "step" not in said.err, said.err


# --- peers ---


class Model(nn.Module):
    """Matrices that a few columns make smaller and some that they do not, one of them of a convolution, and vectors."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 30, 3), nn.Flatten(), nn.Linear(30, 24), nn.ReLU(), nn.Linear(24, 6), nn.BatchNorm1d(6), nn.Linear(6, 40, bias=False))

    def forward(self, x):
        return self.layers(x)


def _sent(rank, world, spec, path=None, steps=6):
    """Bytes that the hook gives to all-reduces and all-gathers in each step, what the peer says it sends, and gradients of every step: the
    mean that DDP leaves, and this rank's own."""
    import sys

    if path:
        sys.path.insert(0, path)
    torch.manual_seed(0)
    ddp, handle = candidates.wrap(spec, Model(), bucket_mb=0.001)
    assert handle is None
    given, all_reduce, all_gather = [], dist.all_reduce, dist.all_gather

    def counting(tensor, *args, **kwargs):
        given[-1] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *args, **kwargs)

    def counting_gathered(rows, tensor, *args, **kwargs):
        given[-1] += tensor.numel() * tensor.element_size()
        return all_gather(rows, tensor, *args, **kwargs)

    dist.all_reduce, dist.all_gather = counting, counting_gathered
    gradient = lambda: torch.cat([p.grad.flatten() for p in ddp.parameters()])
    means, own = [], []
    for step in range(steps):
        given.append(0)
        x = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(100 * step + rank))
        for keep, context in ((own, ddp.no_sync), (means, torch.enable_grad)):
            ddp.zero_grad()
            with context():
                ddp(x).square().sum().backward()
            keep.append(gradient())
    return given, candidates.bytes_per_step(spec, ddp, None), means, own


# Of the convolution 30 x 18, of the linear layers 24 x 30, 6 x 24 and 40 x 6; vectors have 30 + 24 + 6 + 6 + 6 values.
ALL, VECTORS = 540 + 720 + 144 + 240, 72


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("spec, values, size", [
    ("torch:fp16", ALL, 2), ("torch:powersgd1", 48 + 54 + 30 + 46, 4), ("torch:powersgd4", 192 + 216 + 144 + 240, 4), ("torch:fp16-powersgd4", 192 + 216 + 144 + 240, 2)])
def test_pytorchs_hooks_send_what_they_say(spec, values, size, world):
    """A column of both factors of an m x n matrix is m + n values; where four would not halve it, it is sent as it is."""
    for given, said, means, _ in run(world, _sent, spec=spec):
        assert given[3:] == [size * (values + VECTORS)] * 3
        assert said == pytest.approx(2 * (world - 1) / world * given[-1])
        assert all(mean.isfinite().all() for mean in means)


def test_plain_ddp_sends_all_and_averages_exactly():
    ranks = run(2, _sent, spec="plain")
    for given, said, means, _ in ranks:
        assert said == 4 * (ALL + VECTORS) and given == [0] * 6, "DDP's own all-reduce is not Python's"
        for step, mean in enumerate(means):
            torch.testing.assert_close(mean, (ranks[0][3][step] + ranks[1][3][step]) / 2)


# In place of packages that are not here: each sends half of what it is given, and the other half with the next step.
POWERSGD = """
from typing import NamedTuple
import torch.distributed as dist

class Config(NamedTuple):
    rank: int
    min_compression_rate: float = 2
    num_iters_per_step: int = 1
    start_compressing_after_num_steps: int = 100

class PowerSGD:
    def __init__(self, params, config):
        assert config == Config(4, start_compressing_after_num_steps=0)
        self.shapes = [p.shape for p in params]

    def aggregate(self, gradients):
        assert [g.shape for g in gradients] == self.shapes
        means = []
        for g in gradients:
            g.div_(2)
            means.append(g / dist.get_world_size())
            dist.all_reduce(means[-1])
        return means
"""
GRACE = """
import torch.distributed as dist

def grace_from_params(params):
    assert params == {"compressor": "topk", "memory": "residual", "communicator": "allgather", "compress_ratio": 0.01, "world_size": 2}
    return Grace()

class Grace:
    def __init__(self):
        self.residuals = {}

    def step(self, tensor, name):
        self.residuals[name] = (tensor + self.residuals.get(name, 0)) / 2
        mean = self.residuals[name] / 2
        dist.all_reduce(mean)
        return mean
"""
STAND_INS = {"epfml:powersgd4": {"powersgd.py": POWERSGD}, "grace:topk0.01": {"grace_dl/__init__.py": "", "grace_dl/dist/__init__.py": "", "grace_dl/dist/helper.py": GRACE}}


@pytest.mark.parametrize("spec", STAND_INS)
def test_what_a_peer_leaves_comes_in_the_next_step(tmp_path, spec):
    """Also after DDP has changed the order of its buckets."""
    for name, code in STAND_INS[spec].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    ranks = run(2, _sent, spec=spec, path=str(tmp_path))
    kept = torch.zeros_like(ranks[0][2][0])
    for step in range(6):
        due = kept + (ranks[0][3][step] + ranks[1][3][step]) / 2
        assert torch.equal(ranks[0][2][step], ranks[1][2][step])
        torch.testing.assert_close(ranks[0][2][step], due / 2)
        kept = due / 2


def test_the_authors_powersgd_sends_what_we_say():
    if candidates.missing("epfml:powersgd4"):
        pytest.skip(f"powersgd is {candidates.missing('epfml:powersgd4')}")
    one, other = 4 * (18 + 30 + 24 + 6) + VECTORS, 4 * (30 + 24 + 6 + 40) + VECTORS  # a factor of each matrix
    for world in (2, 3):
        for given, said, means, _ in run(world, _sent, spec="epfml:powersgd4"):
            assert given == [4 * one, 4 * other] * 3 and said == pytest.approx(2 * (world - 1) / world * 4 * (one + other) / 2)
            assert all(mean.isfinite().all() for mean in means)


@pytest.mark.parametrize("spec, message", [
    ("grace:topk0.01", 8 * (5 + 7 + 1 + 2 + 5)),  # of 540, 720, 144 and 240 values, and at least one of each of the five vectors
    ("grace:qsgd", ALL + VECTORS + 4 * (5 + 6 + 2 + 2 + 5)),
])
def test_grace_sends_what_we_say(spec, message):
    if candidates.missing(spec):
        pytest.skip(f"grace_dl is {candidates.missing(spec)}")
    for world in (2, 3):
        ranks = run(world, _sent, spec=spec)
        for given, said, means, _ in ranks:
            assert given == [message] * 6 and said == (world - 1) * message
            assert all(torch.equal(mean, other) for mean, other in zip(means, ranks[0][2]))
        due, sent = sum(sum(own) for *_, own in ranks) / world, sum(ranks[0][2])
        assert (due - sent).norm() / due.norm() < (0.1 if spec == "grace:qsgd" else 0.95), "nothing of the gradients arrives"


def test_an_absent_peer_is_left_out_with_a_line(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, of=importlib.util.find_spec: None if name in ("powersgd", "grace_dl") else of(name))
    assert rivals.installed(["plain", "epfml:powersgd4", "torch:fp16", "grace:qsgd", "epfml:powersgd16", "int8"]) == ["plain", "torch:fp16", "int8"]
    line = "not installed (pip install git+https://github.com/epfml/powersgd.git)"
    assert capsys.readouterr().err == (f"epfml:powersgd4, epfml:powersgd16: {line}\n"
                                       "grace:qsgd: not installed (git clone https://github.com/sands-lab/grace.git && pip install -e grace)\n")
    for bench in ("accuracy", "step"):  # named there, it is a mistake
        assert main(["bench", bench, "--spec", "plain,epfml:powersgd4"]) == 2 and capsys.readouterr().err == f"epfml:powersgd4: {line}\n"


def test_every_peer_has_what_a_bench_asks_of_it():
    assert candidates.EXTERNAL[:2] == ("plain", "torch:fp16") and len(set(candidates.EXTERNAL)) == len(candidates.EXTERNAL)
    for spec in candidates.EXTERNAL:
        assert candidates.rough(spec) == (spec not in ("plain", "torch:fp16")) and (candidates.missing(spec) is None or spec.split(":")[0] in ("epfml", "grace"))
    with pytest.raises(ValueError, match="epfml"):
        candidates.check(["epfml:powersgd3"])
