"""The predicted cost of an exchange: bytes, rounds and seconds, where these can be said beforehand; and the probe."""

import json
import time

import pytest
import torch
import torch.distributed as dist

from commopt import parse
from commopt.__main__ import main
from commopt.collectives.link import Link
from commopt.compressors import STEADY
from commopt.tuning import Network, cost, probe
from commopt.tuning.cost import Timeline
from ranks import each_rank
from simulated import exchange, plans_for

SLOW = Network(latency=0.5, rate=1e4)  # on which the work does not count
SHAPE = (96, 70)


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("spec", ["none", "bf16", "int8", "int4", "topk:ratio=0.02", "powersgd:rank=2"])
def test_bytes_are_those_that_travel_and_time_is_theirs_on_a_slow_network(spec, world):
    predicted = cost(spec, SHAPE, world, SLOW)
    plans = plans_for([SHAPE], str(parse(spec).at(STEADY)), world)
    network = exchange(plans, [torch.randn(plans[0].n) for _ in plans], [torch.zeros(plan.n) if plan.wants_residual else None for plan in plans])
    if plans[0].collective != "sparse_two_shot":  # shards of lists are cut anew after each exchange
        assert predicted.sent == network.sent[0] == plans[0].sent
    assert predicted.collective == plans[0].collective
    assert predicted.rounds == {"sum": 2 * (world - 1), "gather": 1, "two_shot": 2, "sparse_two_shot": 2, "rounds": 4}[predicted.collective]
    awaited = predicted.sent / SLOW.rate + predicted.rounds * SLOW.latency
    assert awaited <= predicted.seconds + 1e-9 and predicted.seconds <= awaited + predicted.work + 1e-9


def test_only_rows_between_nodes_travel_on_the_slow_network():
    nodes, near = ((0, 1), (2, 3)), Network(0.0, 1e12)
    predicted = cost("intra=none,inter=int4", SHAPE, 4, SLOW, near=near, nodes=nodes)
    between = cost("int4", (SHAPE[0] // 2, SHAPE[1]), 2, SLOW)  # half of the bucket
    assert predicted.rounds == 3
    assert predicted.seconds == pytest.approx(between.seconds, rel=0.1)
    assert predicted.sent > 2 * between.sent


def test_what_travels_while_work_goes_on_counts_once():
    timeline = Timeline(Network(1.0, 10.0), Network(0.0, 1e9), torch.device("cpu"))
    timeline.now = 5.0
    timeline.row(100, timeline.far)  # leaves from 5 to 15
    timeline.now = 8.0
    timeline.row(50, timeline.far)  # waits, and leaves from 15 to 20
    timeline.now = 9.0
    timeline.arrive()
    assert (timeline.now, timeline.sent, timeline.rounds) == (21.0, 150, 1)
    timeline.row(10, timeline.near)
    timeline.arrive()
    assert timeline.now == pytest.approx(21.0)
    timeline.row(90, timeline.far)
    timeline.row(10, timeline.near)  # does not wait for the other
    timeline.arrive()
    assert timeline.now == pytest.approx(31.0)
    timeline.run()
    time.sleep(0.02)
    with timeline.aside():
        time.sleep(0.05)
    timeline.stop()
    assert 0.02 <= timeline.work < 0.05


def test_any_number_of_ranks_can_be_asked_for():
    """A two-shot's bytes do not grow with the number of ranks, those of gathered lists do."""
    few, many = (cost("int8", (512, 1024), world, SLOW).sent for world in (4, 512))
    assert many / few == pytest.approx((511 / 512) / (3 / 4), rel=0.02)
    assert cost("topk:ratio=0.001,collective=gather", (512, 1024), 64, SLOW).sent == 63 * cost("topk:ratio=0.001", (512, 1024), 2, SLOW).sent


@each_rank(2, 3)
def test_the_probe_finds_the_same_on_all_ranks(rank, world):
    found = probe(Link(dist.new_group(backend="gloo"), lambda error: None), dist.new_group(backend="gloo"), 0)
    everyone = [None] * world
    dist.all_gather_object(everyone, found)
    assert len(set(everyone)) == 1 and 0 < found.latency < 0.1 and found.rate > 1e7


def test_the_bench_verifies_and_tells_what_was_run(tmp_path, capsys):
    file = tmp_path / "out.json"
    assert main(["bench", "collectives", "--world", "3", "--rows", "40", "--rounds", "2", "--spec", "int8,topk:ratio=0.05,intra=none,inter=int4", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [(row["spec"], row["collective"]) for row in result["rows"]] == [
        ("none", "sum"), ("int8", "two_shot"), ("topk:ratio=0.05", "gather"), ("intra=none,inter=int4", "hierarchical")]
    assert all(row["measured_ms"] > 0 and row["predicted_ms"] > 0 and row["sent"] > 0 for row in result["rows"])
    assert "predicted" in capsys.readouterr().out
