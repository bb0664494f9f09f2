"""After the first steps an exchange takes no new memory."""

import resource
import statistics

import pytest
from torch.nn.parallel import DistributedDataParallel as DDP

import commopt
from commopt.compressors import STEADY
from ranks import Given, each_rank

SPECS = ["none", "bf16", "int8", "int4:rotate=hadamard", "int8:collective=integer_sum", "mxfp4", "nvfp4", "ternary", "sign", "topk:ratio=0.01", "topk:scope=threshold",
         "topk:scope=block", "randomk:ratio=0.01", "powersgd:rank=4"]  # dct has torch's own products and sorts, with temporaries


def fresh_pages(rank: int, spec: str | None, schedule: str) -> float:
    """That a backward with 6 MB of gradients in three buckets touches. Whatever is allocated at 1 MB or more comes from the system and
    goes back to it when it is freed (see `ranks`), so that its next use is as many page faults as it has pages."""
    ddp, faults = DDP(Given((1000, 1000), (700, 600), (9,)), bucket_cap_mb=2), []
    handle = commopt.attach(ddp, commopt.parse(spec).at(STEADY), schedule=schedule, start_step=0) if spec else None
    given = ddp.module.random(rank, 0)
    for _ in range(8):
        ddp.zero_grad()
        loss = ddp(given)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        loss.backward()
        if handle:
            handle.flush()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    if handle:
        handle.detach()
    return statistics.median(faults[4:])


@pytest.mark.parametrize("schedule", ["pipelined", "decoupled"])
@each_rank(3, seconds=100)
def test_nothing_is_allocated(rank, world, schedule):
    """No more than by plain DDP, up to 0.4 MB of 4 KB pages: a fifteenth of the gradient."""
    plain = fresh_pages(rank, None, schedule)
    for spec in SPECS:
        pages = fresh_pages(rank, spec, schedule)
        assert pages <= plain + 100, f"{spec}: {pages} fresh pages in a step, {plain} with plain DDP"
