"""dct: against the sum that defines it, and what its docstring promises; and a method that is registered from outside."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import commopt
import test_ddp
import test_faults
import test_plan
from commopt import backends, parse
from commopt.wire import Layout
from ranks import Given, close, each_rank, run, same, same_everywhere
from test_compressors import coded, normal

SPECS = ["dct", "dct:chunk=32,k=3,values=bf16", "dct:chunk=256,k=256"]
SIZES = [1, 63, 64, 65, 5003]


@pytest.fixture(autouse=True)
def one_thread():
    """What is computed here is small: threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cosines(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """The coefficients of each chunk, float64, written as the sum that defines the DCT-II."""
    padded = torch.zeros(-(-x.numel() // chunk), chunk, dtype=torch.float64)
    padded.view(-1)[: x.numel()] = x
    out = torch.zeros_like(padded)
    for i in range(chunk):
        for j in range(chunk):
            out[:, i] += padded[:, j] * torch.cos(torch.tensor(torch.pi * (j + 0.5) * i / chunk, dtype=torch.float64))
    out *= (2 / chunk) ** 0.5
    out[:, 0] *= 0.5**0.5
    return out


def test_the_largest_coefficients_travel():
    x = normal(300)
    layout = Layout(parse("dct:chunk=16,k=3").fields(300))
    assert [(name, dtype, count) for name, dtype, count in layout.fields] == [("values", torch.float32, 57), ("index", torch.uint8, 57)]
    row = torch.zeros(layout.nbytes, dtype=torch.uint8)
    parse("dct:chunk=16,k=3").encode(backends.select("cpu"), x, None, *layout.views(row))
    values, index = (field.view(19, 3) for field in layout.views(row))
    want = cosines(x, 16)
    for chunk in range(19):
        order = sorted(range(16), key=lambda i: -abs(float(want[chunk, i])))[:3]
        assert index[chunk].tolist() == order
        close(values[chunk], want[chunk][order], 1e-6 * float(want[chunk].abs().max()))

    ties = torch.zeros(16)
    parse("dct:chunk=16,k=3").encode(backends.select("cpu"), ties, None, values[0], index[0])
    assert index[0].tolist() == [0, 1, 2]  # to the lowest index
    same(coded("dct", torch.zeros(300), torch.zeros(300)), torch.zeros(300))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", SIZES)
def test_sent_plus_kept_is_what_there_was(spec, n):
    x, kept = normal(n), normal(n, 1, 0.1)
    had = x + kept
    sent = coded(spec, x, kept)
    close(sent.double() + kept.double(), had.double(), 2.0**-23 * torch.maximum(had.abs(), kept.abs()), spec)
    scaled = normal(n, 1, 0.1)
    same(coded(spec, normal(n) * 2.0**16, scaled, loss_scale=2.0**16), sent * 2.0**16)
    same(scaled, kept)
    same(coded(spec, x * 2.0**-90), coded(spec, x) * 2.0**-90)
    if spec.endswith("k=256"):
        close(sent, had, 1e-5)


@pytest.mark.parametrize("spec", SPECS[:2])
def test_it_is_a_contraction_and_best_where_the_gradient_is_smooth(spec):
    """By Parseval the error is what the coefficients that are not sent have."""
    compressor = parse(spec)
    for x in (normal(5003), torch.sin(torch.arange(4096) / 40.0), normal(640, 3, 1e-30)):
        c = cosines(x.double(), compressor.chunk).square().sort(1, descending=True).values
        lost = float((x.double() - coded(spec, x).double()).square().sum())
        want = float(c[:, compressor.k :].sum())
        slack = 1e-5 if compressor.values == "float32" else 2.0**-16 * compressor.chunk
        assert lost == pytest.approx(want, rel=1e-3, abs=slack * float(c.sum()))
        assert want <= (1 - compressor.k / compressor.chunk) * float(c.sum())
    smooth = torch.sin(torch.arange(4096) / 40.0)
    assert (smooth - coded("dct", smooth)).norm() < 0.02 * smooth.norm()


def test_infinities_are_sent_and_nothing_is_kept_of_them():
    for bad in (float("inf"), float("nan")):
        x, kept = normal(300), normal(300, 1)
        x[70], before = bad, kept.clone()
        sent = coded("dct", x, kept)
        assert sent[64:128].isnan().all() and torch.isfinite(sent[:64]).all() and torch.isfinite(sent[128:]).all()
        same(kept[64:128], before[64:128])
        assert torch.isfinite(kept).all() and not torch.equal(kept[:64], before[:64])


def test_any_bytes_are_decoded():
    layout = Layout(parse("dct").fields(300))
    rows = torch.randint(0, 256, (3, layout.nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(320)
    parse("dct").decode_sum(backends.select("cpu"), out[10:310], 1.0, *layout.views(rows))
    assert not out[:10].any() and not out[310:].any() and out[10:310].any()


def test_bytes_and_mistakes():
    for spec, per_value in (("dct", 0.625), ("dct:values=bf16", 0.375), ("dct:chunk=128,k=2", 5 * 2 / 128)):
        assert commopt.wire_bytes(spec, 2**20) == pytest.approx(per_value * 2**20, abs=32)
    for spec, words in (("dct:chunk=257", "chunk must be from 1 to 256"), ("dct:k=65", "k must be from 1 to chunk=64"), ("dct:k=0", "k must be")):
        with pytest.raises(ValueError, match=words):
            parse(spec)


@pytest.mark.parametrize("world", [2, 3])
def test_nothing_is_lost_between_ranks(world):
    for bucket in test_plan.BUCKETS:
        test_plan.test_nothing_is_lost_between_ranks(bucket, "dct", world)
    run(world, test_ddp.test_all_ranks_hold_the_same_bits_and_nothing_is_lost, spec="dct:values=bf16", rules=None)
    run(2, test_faults.test_an_overflow_on_one_rank_is_skipped_by_all_and_forgotten, spec="dct", bad=float("nan"))


# --- a method from outside the package ---


def largest_of_each(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An op of its own: the value of largest magnitude of each block of x, and its place there; float32, int64 [blocks]."""
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % block)).view(-1, block)
    place = blocks.abs().argmax(1)
    return blocks.gather(1, place[:, None])[:, 0], place


def register_largest() -> None:
    @commopt.register("largest")
    class Largest(commopt.Compressor):
        """The largest value of each block. 5 / block bytes per value."""

        collective = "gather"

        block: int = 16
        ef: bool = True

        def fields(self, n):
            return [("values", torch.float32, -(-n // self.block)), ("place", torch.uint8, -(-n // self.block))]

        def encode(self, kernels, x, residual, values, place):
            acc = x.float() if residual is None else x.float() + residual * kernels.loss_scale
            found, at = largest_of_each(acc, self.block)
            values.copy_(found), place.copy_(at)
            if residual is not None:
                acc[torch.arange(at.numel()) * self.block + at] = 0
                residual.copy_(acc / kernels.loss_scale)

        def decode_sum(self, kernels, out, weight, values, place):
            out.zero_()
            for row, at in zip(values, place.long()):
                out[torch.arange(at.numel()) * self.block + at] += weight * row


@each_rank(2)
def test_a_method_from_outside_takes_a_class_and_trains(rank, world):
    """Nothing else of commopt is touched: grammar, bytes, error feedback, replicas and checkpoints come with it."""
    register_largest()
    assert str(parse("largest:block=8")) == "largest:block=8" and commopt.wire_bytes("largest", 1000) == 256 + 64 and "largest" in commopt.compressors()
    ddp = DDP(Given((64, 33), (7,), (50, 50)))
    handle = commopt.attach(ddp, "largest:block=8", start_step=0)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    target = [p + 1.0 for p in Given((64, 33), (7,), (50, 50)).random(5, 0)]  # the same on all ranks
    for step in range(300):
        optimizer.zero_grad()
        ddp([(p - t - 0.2 * (rank - 0.5)).detach() for p, t in zip(ddp.module.w, target)]).backward()
        optimizer.step()
        same_everywhere(ddp.parameters(), f"step {step}")
    for p, t in zip(ddp.module.w, target):
        close(p, t, 0.1)
    assert handle.stats()["ratio"] > 6 and handle.state_dict()["residual"]["w.0"].any()
