"""commopt.average: means of tensors of any kind, what is kept, and errors on all ranks."""

import os

import pytest
import torch
import torch.distributed as dist

import commopt
from ranks import close, each_rank, raised, run, same, same_everywhere, total

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def whole(shape, dtype, rank: int) -> torch.Tensor:
    """Small whole numbers, of which also the mean of 2 or 4 ranks is a small multiple of a quarter."""
    g = torch.Generator().manual_seed(rank)
    return torch.randint(0, 4, shape, generator=g).to(dtype)


@pytest.mark.parametrize("spec", ["none", "bf16"])
@each_rank(2, 4)
def test_means_of_every_dtype_and_shape_are_exact(rank, world, spec):
    shapes = [(), (1,), (7,), (5000,), (33, 65), (4, 3, 5, 7), (0,), (0, 3), (70000,)]
    kinds = [(shape, dtype) for dtype in [*FLOATS, *INTEGERS, torch.complex64, torch.complex128] for shape in shapes]
    given = [whole(shape, dtype, rank) for shape, dtype in kinds]
    assert commopt.average(given, spec) is given
    for (shape, dtype), got in zip(kinds, given):
        mean = sum(whole(shape, dtype, r).to(torch.complex128) for r in range(world)) / world
        want = mean if dtype.is_complex else mean.real if dtype.is_floating_point else mean.real.round()
        same(got, want.to(dtype).clone(memory_format=torch.contiguous_format), f"{dtype} {shape}")


@each_rank(2, 3)
def test_integers_are_rounded_to_nearest_and_ties_to_even(rank, world):
    sums = torch.arange(-20, 21)
    mine = sums.clone() if rank == 0 else torch.zeros_like(sums)
    same(commopt.average(mine), torch.round(sums.double() / world).long())
    large = torch.tensor([2**53 + 1 + 2 * rank])  # float64 has no such number
    assert int(commopt.average(large)) == 2**53 + 1 + (world - 1)


@each_rank(3)
def test_layouts_in_memory_do_not_matter(rank, world):
    def tensors(r: int) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(r)
        t = lambda *shape: torch.randn(shape, generator=g)
        return [t(60, 50).t(), t(2, 30, 8, 9).to(memory_format=torch.channels_last), t(64, 64)[::2, 1::3], torch.complex(t(40, 40), t(40, 40)).conj(), t(3000)[500:2500]]

    plain = [t.clone(memory_format=torch.contiguous_format).resolve_conj() for t in tensors(rank)]
    strided = tensors(rank)
    commopt.average(plain, "int8")
    commopt.average(strided, "int8")
    for got, want in zip(strided, plain):
        same(got.resolve_conj().contiguous(), want)
    alone = tensors(rank)[4]
    around = alone.untyped_storage().nbytes()
    assert commopt.average(alone, "none") is alone and alone.untyped_storage().nbytes() == around
    close(alone, sum(tensors(r)[4].double() for r in range(world)) / world, 1e-6)


@pytest.mark.parametrize("spec", [
    "int8:ef=true", "int4", "sign", "topk:ratio=0.05", "topk:ratio=0.05,collective=sparse_two_shot", "randomk:ratio=0.1", "powersgd:rank=2,values=float32",
    "intra=none,inter=int4",
])
@each_rank(2, 3, 4)
def test_what_was_sent_and_what_is_kept_is_what_there_was(rank, world, spec):
    if spec.startswith("intra"):
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # each a machine
    shapes, dtypes = [(64, 70), (5000,), (9,), (50, 41)], [torch.float32, torch.float32, torch.float32, torch.complex64]
    residual = [torch.zeros(*shape, *([2] if dtype.is_complex else [])) for shape, dtype in zip(shapes, dtypes)]
    real = lambda tensors: [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    for step in range(3):
        g = torch.Generator().manual_seed(10 * step + rank)
        given = [torch.randn(*shape, dtype=dtype, generator=g) for shape, dtype in zip(shapes, dtypes)]
        had = total(real(given)) + total(residual)
        commopt.average(given, spec, residual=residual)
        same_everywhere(real(given), spec)
        sent = torch.cat([t.flatten() for t in real(given)])
        close(world * sent.double() + total(residual), had, 2e-5 * had.abs().max(), f"{spec} step {step}")
    assert total(r.abs() for r in residual[:1]).max() > 0 and residual[2].eq(0).all()  # few elements travel exactly


@each_rank(2)
def test_without_a_residual_the_rest_is_lost_and_with_one_it_follows(rank, world):
    given = torch.zeros(2000).index_fill_(0, torch.tensor([5]), 8.0)
    given[6] = 1.0 + rank
    kept = torch.zeros(2000)
    first = commopt.average(given.clone(), "topk:ratio=0.0005", residual=kept)
    assert (first.nonzero().flatten().tolist(), first[5].item(), kept[6].item()) == ([5], 8.0, 1.0 + rank)
    second = commopt.average(torch.zeros(2000), "topk:ratio=0.0005", residual=kept)
    assert second[6] == 1.5 and kept.eq(0).all()
    assert commopt.average(given.clone(), "topk:ratio=0.0005")[6] == 0


@each_rank(2, 3)
def test_sparse_tensors_are_averaged_exactly(rank, world):
    at = torch.tensor([[rank, 5], [0, 1]])
    sparse = torch.sparse_coo_tensor(at, torch.tensor([1.0, 2.0]), (8, 4))
    dense = torch.full((3000,), float(rank))
    commopt.average([dense, sparse], "int4")
    want = torch.zeros(8, 4)
    want[5, 1] = 2.0
    want[:world, 0] = 1.0 / world
    close(sparse.to_dense(), want, 1e-7)


@each_rank(3)
def test_a_part_of_the_ranks(rank, world):
    pair = dist.new_group([0, 2])
    if rank != 1:
        same(commopt.average(torch.full((5000,), float(rank)), "bf16", pair), torch.ones(5000))
    same(commopt.average(torch.full((5000,), float(rank)), "bf16"), torch.ones(5000))


@each_rank(2)
def test_a_new_process_group_is_not_mistaken_for_the_old_one(rank, world):
    same(commopt.average(torch.full((5000,), float(rank)), "none"), torch.full((5000,), 0.5))
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=world)
    same(commopt.average(torch.full((5000,), float(rank)), "none"), torch.full((5000,), 0.5))


WRONG = {
    "a bool": (lambda: torch.ones(3, dtype=torch.bool), {}, "has no mean of its own kind"),
    "nothing": (lambda: [torch.ones(3), None], {}, "leave out parameters without a gradient"),
    "an expanded one": (lambda: torch.ones(1).expand(5), {}, "expanded"),
    "a spec": (lambda: torch.ones(3), {"spec": "int9"}, "int9"),
    "a residual's shape": (lambda: torch.ones(3), {"residual": torch.zeros(4)}, r"must be \[3\]"),
    "a residual too many": (lambda: torch.ones(3), {"residual": [torch.zeros(3)] * 2}, "2 entries|each of the 1"),
    "no residual": (lambda: torch.ones(3), {"residual": 0.5}, "float32 tensor"),
    "no spec": (lambda: torch.ones(3), {"spec": 8}, "8"),
    "a residual's dtype": (lambda: torch.ones(3), {"residual": torch.zeros(3, dtype=torch.float64)}, "float32"),
    "momentum": (lambda: torch.ones(3), {"spec": "topk:momentum=0.9", "residual": torch.zeros(3)}, "attach"),
}


@pytest.mark.parametrize("what", WRONG)
@each_rank(2)
def test_bad_input_is_a_ValueError_and_a_RuntimeError_for_the_others(rank, world, what):
    make, arguments, said = WRONG[what]
    for everywhere in (True, False):
        if rank == 1 or everywhere:
            with pytest.raises(ValueError, match=said):
                commopt.average(make(), **arguments)
        else:
            with pytest.raises(RuntimeError, match="(?s)do not agree.*refused"):
                commopt.average(torch.ones(3))
    same(commopt.average(torch.full((3,), float(rank))), torch.full((3,), 0.5))  # and all goes on


@each_rank(3)
def test_ranks_that_average_different_things_all_get_the_difference(rank, world):
    same(commopt.average([torch.full((3,), float(rank)), torch.ones(4)])[0], torch.ones(3))  # known to all by now
    for given, said in (([torch.ones(3)] * (1 + (rank == 2)), "rank 2"), ([torch.ones(3, 1 + rank)], r"\[3, 2\]"),
                        ([torch.ones(3, dtype=torch.float64 if rank else torch.float32)], "float64")):
        error = raised(lambda: commopt.average(given))
        assert isinstance(error, RuntimeError), error
        with pytest.raises(RuntimeError, match=said):
            raise error
    with pytest.raises(RuntimeError, match="int4"):
        commopt.average(torch.ones(3), "int4" if rank else "int8")


@each_rank(3, timeout=20)
def test_a_rank_that_fails_tells_the_others_and_the_next_call_works(rank, world):
    given = lambda: torch.full((5000,), float(rank))
    commopt.average(given(), "int8:ef=true")
    residual = torch.zeros(5000)
    from commopt.backends import cpu as kernels  # noqa: PLC0415

    right = kernels.quant_encode

    def wrong(*arguments):
        raise MemoryError("no room")

    if rank == 1:
        kernels.quant_encode = wrong
    error = raised(lambda: commopt.average(given(), "int4", residual=residual))
    kernels.quant_encode = right
    assert isinstance(error, RuntimeError) and "rank 1 failed" in str(error) and "no room" in str(error), error
    close(commopt.average(given(), "int8"), torch.ones(5000), 1e-2)


def leaving(rank, world):
    commopt.average(torch.ones(300_000), "int8")
    if rank == 1:
        os._exit(0)
    error = raised(lambda: commopt.average(torch.ones(300_000), "int8"))
    return f"{type(error).__name__}: {error}"


def test_a_rank_that_is_gone_is_an_error_on_the_others():
    said = run(3, leaving, seconds=40, timeout=15, lost=(1,))
    assert len(said) == 2 and all(s.startswith("RuntimeError") for s in said), said
