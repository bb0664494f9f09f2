"""What the docstrings of the sparsifiers promise: block top-k, random-k and the formats of the values of a list."""

import math

import pytest
import torch
from op_cases import message_rows
from test_compressors import coded, integers, normal
from simulated import exchange, plans_for

import commopt
from commopt import backends
from commopt.compressors.topk_scopes import SCOPES
from commopt.plan import Plan
from ranks import close, same

BLOCK = ["topk:scope=block", "topk:ratio=0.1,scope=block,values=bf16", "topk:ratio=0.1,scope=block,values=int8"]
THRESHOLD = ["topk:scope=threshold", "topk:ratio=0.1,scope=threshold,values=int8"]
NEW = [*BLOCK, *THRESHOLD, "topk:ratio=0.1,values=int4", "randomk", "randomk:ratio=0.3"]
SIZES = [1, 31, 1000, 1024, 1025, 5003]


def block_of(n: int) -> torch.Tensor:
    """The number of the block that each element belongs to, worked out from the docstring, element by element."""
    blocks = n // 1024
    return torch.tensor([i // 32 % blocks if i < blocks * 1024 else blocks for i in range(n)])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("spec", NEW)
def test_sent_plus_kept_is_what_there_was(spec, n):
    x, kept = normal(n), normal(n, 1, 0.1)
    had = x + kept
    sent = coded(spec, x, kept)
    close(sent.double() + kept.double(), had.double(), 2.0**-24 * torch.maximum(had.abs(), kept.abs()), spec)
    assert sent.any()


@pytest.mark.parametrize("kind", ["normal", "equal", "few"])
@pytest.mark.parametrize("n", SIZES)
def test_each_block_sends_its_largest(n, kind):
    x = {"normal": normal(n), "equal": torch.full((n,), -0.75), "few": integers(n, 0, 2)}[kind]
    sent, block = coded("topk:scope=block", x), block_of(n)
    for b in range(-(-n // 1024)):
        members = (block == b).nonzero().flatten()
        k = 10 if members.numel() == 1024 and b < n // 1024 else math.ceil(0.01 * members.numel())
        order = sorted(members.tolist(), key=lambda i: (-abs(float(x[i])), i))[:k]  # ties to the lowest index
        want = torch.zeros(members.numel())
        for place, i in enumerate(members.tolist()):
            want[place] = x[i] if i in order else 0.0
        same(sent[members], want, f"block {b}")


def test_the_bytes_of_a_block_list():
    n = 1 << 20
    assert commopt.wire_bytes("topk:scope=block", n) == 10240 * 4 + 10240 * 10 // 8
    assert commopt.wire_bytes("topk:scope=block,values=int8", n) == 10240 + 40 * 4 + 10240 * 10 // 8
    assert commopt.wire_bytes("topk:scope=block,index=u16", n) == 10240 * 6
    assert commopt.wire_bytes("topk:values=int4,index=u16", 1000) == 16 + 16 + 32 + 16  # 5 bytes of codes, 4 of scale, 20 of index, 8 of starts
    assert commopt.wire_bytes("topk:values=int4", 1000) == 16 + 16 + 16 + 16  # 8 bytes of low bits, 4 of high ones


@pytest.mark.parametrize("ratio, most", [(0.0001, 15.38), (0.001, 11.98), (0.01, 8.564), (0.1, 5.251), (0.5, 3.001)])
def test_the_bits_of_an_index(ratio, most):
    """Whatever the list: at most a bit more than the entropy of a random one, and 0.65 where it is sparse."""
    n = 1 << 24
    compressor = commopt.parse(f"topk:ratio={ratio},warmup=0")
    bits = 8 * (commopt.wire_bytes(compressor, n) - 4 * compressor.k(n)) / compressor.k(n)
    entropy = -math.log2(ratio) - (1 - ratio) / ratio * math.log2(1 - ratio)
    assert entropy < bits < min(most, entropy + (0.65 if ratio <= 0.1 else 1.01))
    assert commopt.wire_bytes("topk:ratio=0.01,values=int8", n) <= 0.021 * n


@pytest.mark.parametrize("spec", ["topk:ratio=0.1,values=int4", *BLOCK[1:], THRESHOLD[1]])
def test_error_feedback_gets_everything_across(spec):
    x, kept, kernels = normal(3000), torch.zeros(3000), backends.select("cpu")
    total = torch.zeros(3000, dtype=torch.float64)
    for step in range(1, 101):
        total += coded(spec, x, kept, kernels=kernels)
        close(total + kept.double(), step * x.double(), 1e-4, f"step {step}")
    assert float(kept.norm()) <= 15 * float(x.norm())


@pytest.mark.parametrize("spec", NEW)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_sent_on_and_not_kept(spec, bad):
    x, kept = normal(5003), normal(5003, 1, 0.1)
    x[4000] = bad
    before = kept.clone()
    sent = coded(spec, x, kept)
    assert not torch.isfinite(sent).all() and torch.isfinite(kept).all()
    same(kept[4000], before[4000])


# --- what reaches a threshold ---


def test_the_first_threshold_is_that_of_the_k_th_and_all_that_reach_it_are_sent():
    x = normal(5003)
    order = x.abs().sort(descending=True).values
    sent = coded("topk:scope=threshold", x)
    same(sent, torch.where(x.abs() >= order[49], x, 0.0))


@pytest.mark.parametrize("ratio", [0.01, 0.1])
def test_the_threshold_follows_what_error_feedback_heaps_up_below_it(ratio):
    n, kernels = 100_000, backends.select("cpu")
    kept, sent = torch.zeros(n), []
    for step in range(40):
        out = coded(f"topk:scope=threshold,ratio={ratio},warmup=0", normal(n, step), kept, (0, step, 0), kernels=kernels)
        sent.append(int((out != 0).sum()) / (ratio * n))
    assert min(sent[5:]) > 0.8 and sum(sent[5:]) / len(sent[5:]) > 0.96 and max(sent) <= 1.0, sent


def test_what_has_no_room_waits_no_longer_than_another():
    """Of 5,000 equal values 500 have room; with a threshold that all of them reach, every one is sent 30 times in 300 steps,
    give or take the ones at the ends of the list."""
    n, kernels, times = 5000, backends.select("cpu"), torch.zeros(5000)
    for step in range(300):
        kernels.scratch("control", torch.int32, 2).copy_(torch.tensor([1, 0]))
        sent = coded("topk:scope=threshold,ratio=0.1,warmup=0", torch.ones(n), None, (0, step, 0), kernels=kernels)
        assert int(sent.sum()) == 500
        times += sent
    assert times.min() >= 28 and times.max() <= 32


def test_a_value_that_is_not_finite_shows_even_where_it_has_no_room():
    n, kernels = 5000, backends.select("cpu")
    x, kept = torch.ones(n), torch.full((n,), 0.25)
    x[4000] = torch.inf
    kernels.scratch("control", torch.int32, 2).copy_(torch.tensor([1, 0]))
    sent = coded("topk:scope=threshold,ratio=0.1,warmup=0", x, kept, kernels=kernels)
    assert int(sent.isnan().sum()) == 1 and int((sent == 1.25).sum()) == 499 and not kernels.scratch("control", torch.int32, 2).any()
    same(kept[500:4000], torch.full((3500,), 1.25)), same(kept[4000], torch.tensor(0.25)), same(kept[0], torch.tensor(1.25))


# --- random-k ---


def plans(spec: str, n: int, world: int, seed: int = 0) -> list[Plan]:
    return plans_for([(n,)], spec, world, rules={"*": spec}, seed=seed)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_all_ranks_draw_the_same_and_nothing_is_lost(world):
    """Integers, so that sums are exact: `world` times the mean, plus what all kept, is what all had. The second encoding,
    of a rank's own shard, sends what the first has summed to the last bit."""
    n, steps = 7001, 3
    ours = plans("randomk:ratio=0.05", n, world)
    residuals = [torch.zeros(n) for _ in ours]
    had, sent, drawn = torch.zeros(n), torch.zeros(n), []
    user = torch.get_rng_state()
    for step in range(steps):
        xs = [integers(n, 10 * step + r) * 12 for r in range(world)]  # the mean of 2, 3 or 4 ranks is whole
        had += sum(xs)
        for plan in ours:
            plan.step = step
        exchange(ours, xs, residuals)
        assert all(torch.equal(xs[0], x) for x in xs[1:])
        sent += xs[0] * world
        drawn.append(xs[0] != 0)
        assert int(drawn[-1].sum()) <= sum(max(1, round(0.05 * (b - a))) for a, b in (ours[0].shards(world) if world > 2 else [(0, n)]))
    same(sent + sum(residuals), had)
    assert not torch.equal(drawn[0], drawn[1]), "every step draws anew"
    assert torch.equal(torch.get_rng_state(), user)


def test_without_feedback_a_sum_is_scaled_once_and_unbiased():
    n, world, draws = 2100, 2, 600
    ours, x = plans("randomk:ratio=0.1,ef=false", n, world), integers(n)
    total = torch.zeros(n, dtype=torch.float64)
    for step in range(draws):
        xs = [x.clone(), x.clone()]
        for plan in ours:
            plan.step = step
        exchange(ours, xs, [None] * world)
        hit = xs[0] != 0
        ratio = (xs[0] / x)[hit]
        assert ((ratio == ratio.round()) & (ratio >= 9) & (ratio <= 11)).all(), "the size of a stratum, once"
        total += xs[0]
    z = ((total / draws - x) / (x.abs() * 3 / draws**0.5))[x != 0]  # deviation of one draw: |x| sqrt(m - 1), m = 10
    assert abs(float(z.square().mean()) - 1) < 0.3 and float(z.abs().max()) < 5.5


def test_every_element_of_a_stratum_is_drawn_alike():
    """n = 40 in four strata of ten, 4,000 draws: each of the elements about 400 times."""
    counts, kernels = torch.zeros(40), backends.select("cpu")
    for step in range(4000):
        values, out = torch.zeros(1, 4), torch.zeros(40)
        kernels.randomk_decode_sum(out, 1.0, values + 1, (5, step, 6))
        counts += out
    assert torch.equal(counts.view(4, 10).sum(1), torch.full((4,), 4000.0))
    assert float((counts - 400).square().sum() / 360) < 36 + 5 * math.sqrt(72)  # chi-square with 36 degrees of freedom


# --- hostile bytes ---


@pytest.mark.parametrize("seed", range(4))
def test_block_lists_of_any_bytes_stay_inside(seed):
    g = torch.Generator().manual_seed(seed)
    n, k, rows = (1, 1000, 2048, 5003)[seed], (1, 3, 40, 10)[seed], 2
    count = n // 1024 * k + min(n % 1024, 7)
    values, index = message_rows(rows, {"values": (count, torch.float32), "index": (count, torch.int16)}, "cpu").values()
    values.copy_(torch.randn(rows, count, generator=g))
    drawn = torch.randint(-9, (40, 1100, 40000)[seed % 3], (rows, count), generator=g).to(torch.int16)
    index.copy_(drawn.sort(1).values if seed == 3 else drawn)
    results = []
    for name in ("reference", "cpu"):
        kernels = __import__(f"commopt.backends.{name}", fromlist=[name])
        out, residual = torch.full((n + 4096,), 7.0), torch.ones(n + 4096)
        kernels.blocktopk_decode_sum(out[2048 : n + 2048], -0.3, values, index, k)
        kernels.blocktopk_add(residual[2048 : n + 2048], torch.tensor([4.0]), values[0], index[0], k)
        results.append((out, residual))
    for want, got in zip(*results):
        same(got, want)


@pytest.mark.parametrize("width", [1, 7, 10, 16])
def test_a_stream_of_bits(width):
    """Against Python's integers of any size."""
    for k in (0, 1, 3, 1000):
        index = torch.randint(0, 2**width, (k,), generator=torch.Generator().manual_seed(k))
        whole = sum(int(i) << (width * e) for e, i in enumerate(index)).to_bytes(-(-k * width // 8), "little")
        short = ((index ^ 0x8000) - 0x8000).to(torch.int16)
        for name in ("reference", "cpu"):
            kernels = __import__(f"commopt.backends.{name}", fromlist=[name])
            packed, again = torch.zeros(len(whole), dtype=torch.uint8), torch.zeros(k, dtype=torch.int16)
            kernels.bits_pack(short, packed, width)
            assert bytes(packed.tolist()) == whole
            kernels.bits_unpack(packed, again, width)
            same(again, short)


@pytest.mark.parametrize("bits", [11, 16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_ascending_list_beyond_32_bits(backend, bits):
    """Elements up to 2^33 + 4, against Python's integers: the j-th of them sets bit (p >> bits) + j."""
    n, kernels = 2**33 + 5, __import__(f"commopt.backends.{backend}", fromlist=[backend])
    elements = sorted({0, 1, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 70_000, n - 2, n - 1, *(i * 12_345_677 for i in range(600))})
    k, tiles = len(elements), torch.arange(-(-n // 65536))
    index = torch.tensor([(p % 65536 ^ 0x8000) - 0x8000 for p in elements], dtype=torch.int16)
    starts = torch.searchsorted(torch.tensor(elements), tiles * 65536)
    high, again, begin = torch.zeros(-(-(k + (n >> bits)) // 8), dtype=torch.uint8), index & (-1 if bits == 16 else 2**bits - 1), starts * 0
    kernels.eliasfano_pack(index, starts, high, n, bits)
    assert int.from_bytes(bytes(high.tolist()), "little") == sum(1 << (p >> bits) + j for j, p in enumerate(elements))
    kernels.eliasfano_unpack(high, again, begin, n, bits)
    same(again, index), same(begin, starts)
    same(SCOPES["global"].positions(n, 0.0, again, begin), torch.tensor(elements))


@pytest.mark.parametrize("seed", range(6))
def test_any_bytes_are_an_ascending_list(seed):
    g = torch.Generator().manual_seed(seed)
    n, k, bits = ((200_003, 2000, 6), (65_536, 1, 16), (70_001, 30_000, 1), (5, 5, 1), (131_072, 0, 9), (1000, 999, 16))[seed]
    results = []
    high = torch.randint(0, 256, (-(-(k + (n >> bits)) // 8),), generator=g).to(torch.uint8) * (seed != 2)
    low = torch.randint(-32768, 32768, (k,), generator=g).to(torch.int16)
    for name in ("reference", "cpu"):
        kernels = __import__(f"commopt.backends.{name}", fromlist=[name])
        around = torch.full((k + 64,), 77, dtype=torch.int16), torch.full((-(-n // 65536) + 64,), 77)
        index, starts = around[0][32 : k + 32], around[1][32:-32]
        index.copy_(low)
        kernels.eliasfano_unpack(high, index, starts, n, bits)
        assert all(int((t == 77).sum()) >= 64 for t in around)
        results.append(around)
    for want, got in zip(*results):
        same(got, want)


@pytest.mark.parametrize("call, words", [
    (lambda k: k.bits_pack(torch.zeros(3, dtype=torch.int16), torch.zeros(4, dtype=torch.uint8), 17), "bits_pack: width"),
    (lambda k: k.bits_unpack(torch.zeros(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int16), 10), "bits_unpack: packed"),
    (lambda k: k.eliasfano_pack(torch.zeros(3, dtype=torch.int16), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.uint8), 9, 17),
     "eliasfano_pack: bits must be a number from 1 to 16, got 17"),
    (lambda k: k.eliasfano_unpack(torch.zeros(1, dtype=torch.uint8), torch.zeros(3, dtype=torch.int16), torch.zeros(1, dtype=torch.int64), 2, 1),
     "eliasfano_unpack: index holds 3 entries"),
    (lambda k: k.eliasfano_unpack(torch.zeros(1, dtype=torch.uint8), torch.zeros(3, dtype=torch.int16), torch.zeros(2, dtype=torch.int64), 9, 1),
     "eliasfano_unpack: starts"),
    (lambda k: k.randomk_decode_sum(torch.zeros(5), 1.0, torch.zeros(1, 6), (0, 0, 0)), "randomk_decode_sum: values must hold"),
    (lambda k: k.blocktopk_decode_sum(torch.zeros(5), 1.0, torch.zeros(1, 6), torch.zeros(1, 6, dtype=torch.int16), 1), "blocktopk_decode_sum: 6 values"),
    (lambda k: k.blocktopk_encode(torch.zeros(5), None, torch.ones(1), torch.zeros(2), torch.zeros(3, dtype=torch.int16), 1), "blocktopk_encode: index"),
])
def test_bad_arguments_are_named(call, words):
    cpu = pytest.importorskip("commopt.backends.cpu")
    with pytest.raises(ValueError, match=words):
        call(cpu)
