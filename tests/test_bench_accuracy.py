"""`python -m commopt bench accuracy`: what it concludes from curves, what its tasks are made of, and that it learns them."""

import argparse
import json
import math

import pytest
import torch

from commopt.__main__ import main
from commopt.bench import accuracy, clicks, images, learning, tasks, text, works
from ranks import run

# --- what is concluded from curves ---

WHAT = {"task": "gpt", "parameters": 1000, "world": 2, "steps": 40, "batch": 8, "accumulate": 1, "seeds": 2, "tuned": "of the task", "schedule": "pipelined",
        "link": "loopback", "torch": "2", "commopt": "0"}


def runs(*losses: tuple[float, ...], steps=(10, 20, 40), per_step: float = 1e6, seconds: float = 0.5, lr: float = 0.001) -> list[dict]:
    """A run for each seed, with these losses at these steps."""
    return [{"curve": [{"step": s, "loss": x, "seconds": seconds * s, "bytes": per_step * s} for s, x in zip(steps, of, strict=True)],
             "lr": lr, "seconds": seconds * steps[-1], "seconds_per_step": seconds, "bytes_per_step": per_step} for of in losses]


PLAIN = runs((4.0, 3.0, 1.0), (4.5, 3.5, 1.5))  # together 4.25, 3.25, 1.25


def judged(**others: list[dict]) -> dict[str, dict]:
    return {row["spec"]: row for row in accuracy.judged({"what": WHAT, "runs": {"plain": PLAIN} | others})}


def test_loss_band_and_spread_are_those_of_the_seeds():
    rows = judged(a=runs((9.0, 9.0, 1.0), (9.0, 9.0, 2.0)), b=runs((9.0, 9.0, 0.5), (9.0, 9.0, 0.75)), lr=runs((9.0, 9.0, 1.0), lr=0.004, per_step=250.0, seconds=0.25))
    assert {key: rows["plain"][key] for key in ("loss", "above", "least", "greatest", "spread", "in_band")} == {
        "loss": 1.25, "above": 0.0, "least": 1.0, "greatest": 1.5, "spread": 0.5, "in_band": True}
    assert {key: rows["a"][key] for key in ("loss", "above", "spread", "in_band")} == {"loss": 1.5, "above": 0.25, "spread": 1.0, "in_band": True}
    assert {key: rows["b"][key] for key in ("loss", "above", "spread", "in_band")} == {"loss": 0.625, "above": -0.625, "spread": 0.25, "in_band": True}, "below the band is as good"
    assert (rows["lr"]["lr"], rows["lr"]["sent"], rows["lr"]["seconds_per_step"]) == (0.004, 250.0, 0.25)


def test_the_band_ends_at_the_worst_seed_of_the_first():
    over = math.nextafter(1.5, 2.0)
    rows = judged(at=runs((4.0, 3.0, 1.5)), above=runs((4.0, 3.0, over)))
    assert (rows["at"]["in_band"], rows["above"]["in_band"]) == (True, False)


def test_the_target_is_what_the_first_has_after_three_quarters():
    """Step 30, between 20 (3.25) and 40 (1.25): 2.25. Another spec is there where its own line crosses that."""
    rows = judged(half=runs((4.0, 3.25, 1.25), per_step=5e5, seconds=1.0), early=runs((3.25, 1.25, 1.0), per_step=1e5), at_once=runs((2.0, 2.5, 2.5)), never=runs((4.0, 3.0, 2.375)))
    assert {row["target"] for row in rows.values()} == {2.25}
    reached = {spec: (row["bytes_to_target"], row["seconds_to_target"]) for spec, row in rows.items()}
    assert reached == {"plain": (30e6, 15.0), "half": (15e6, 30.0), "early": (1.5e6, 7.5), "at_once": (10e6, 5.0), "never": (None, None)}
    # Three quarters lie at an evaluation, before the first one, and there is only one: each has a target.
    for steps, losses, target in (((10, 30, 40), (4.0, 2.0, 1.0), 2.0), ((38, 40), (3.0, 1.0), 3.0), ((40,), (1.0,), 1.0)):
        [row] = accuracy.judged({"what": WHAT, "runs": {"plain": runs(losses, steps=steps)}})
        assert row["target"] == target and row["bytes_to_target"] == 1e6 * steps[losses.index(target)]


def test_what_diverged_is_shown_and_never_in_the_band():
    nan, inf = math.nan, math.inf
    rows = judged(one_seed=runs((4.0, 3.0, 1.0), (4.0, nan, nan)), all_seeds=runs((nan, nan, nan)), infinite=runs((4.0, 3.0, inf)), back=runs((inf, 3.25, 1.25)), late=runs((nan, inf, 1.25)))
    assert [spec for spec, row in rows.items() if row["in_band"]] == ["plain", "back", "late"]
    assert math.isnan(rows["one_seed"]["loss"]) and (rows["one_seed"]["least"], rows["one_seed"]["greatest"]) == (1.0, 1.0)
    assert [rows[spec]["bytes_to_target"] for spec in ("one_seed", "all_seeds", "infinite")] == [None, None, None]
    assert rows["back"]["bytes_to_target"] == 30e6 and rows["late"]["bytes_to_target"] == 40e6, "no line leads from what is not finite"
    lines = {line.split()[0]: line.split() for line in accuracy.table({"what": WHAT, "runs": {"plain": PLAIN, "all_seeds": runs((nan, nan, nan)), "infinite": runs((4.0, 3.0, inf))}}).splitlines()}
    assert lines["all_seeds"][1:] == ["0.001", "nan", "+nan", "no", "nan", "1.000", "-", "-", "500.0"]
    assert lines["infinite"][2:5] == ["inf", "+inf", "no"]
    # The first of all diverges with a seed, and with all of them.
    half, int8 = accuracy.judged({"what": WHAT, "runs": {"plain": runs((4.0, 3.0, nan), (4.0, 3.0, 1.0)), "int8": runs((4.0, 3.0, 1.0))}})
    assert not half["in_band"] and int8["in_band"] and math.isnan(int8["above"]) and math.isnan(int8["target"]) and int8["bytes_to_target"] is None
    assert not any(row["in_band"] for row in accuracy.judged({"what": WHAT, "runs": {"plain": runs((nan, nan, nan)), "int8": runs((4.0, 3.0, 1.0))}}))


def test_the_table_has_a_row_for_each_spec_and_what_they_are_judged_by():
    text = accuracy.table({"what": WHAT, "runs": {"plain": PLAIN, "never": runs((4.0, 3.0, 2.375), lr=0.05, per_step=25e4)}}).splitlines()
    assert [line.split() for line in text[:3]] == [
        ["gpt", "lr", "loss", "above", "in", "band", "spread", "sent", "MB", "MB", "to", "target", "s", "to", "target", "ms/step"],
        ["plain", "0.001", "1.2500", "+0.0000", "yes", "0.5000", "1.000", "30.0", "15.0", "500.0"], ["never", "0.05", "2.3750", "+1.1250", "no", "0.0000", "0.250", "-", "-", "500.0"]]
    assert text[3].startswith("loss in nats per byte: band 1.0000 to 1.5000, target 2.2500; 0.00M parameters, 2 ranks, 40 steps of 8")


# --- learning rates ---


@pytest.mark.parametrize("losses, best", [((3.0, 2.0, 2.5), 1.0), ((1.5, 2.0, 2.5), 0.5), ((3.0, 2.0, 1.0), 2.0), ((math.nan, 2.0, math.inf), 1.0), ((math.nan, math.inf, math.nan), 1.0), ((3.0, 2.0, math.nan), 1.0)])
def test_the_learning_rate_with_the_least_loss_is_taken_and_no_nan(losses, best, monkeypatch):
    asked = []

    def train(task, spec, seed, sizes, args, steps, lr):
        asked.append((seed, steps, args.eval_every, lr))
        return {"curve": [{"loss": losses[len(asked) - 1]}]}

    monkeypatch.setattr(learning, "train", train)
    assert learning.tuned("resnet", "int8", learning.Sizes(4, 1, 4), argparse.Namespace(eval_every=5), 40) == 0.05 * best
    assert asked == [(1000, 20, 20, 0.025), (1000, 20, 20, 0.05), (1000, 20, 20, 0.1)], "half of the steps, from a seed that is not judged"


def _tuned_and_trained(rank, world):
    """(the learning rate of three specs, the seeds that training drew with) of this rank."""
    seeds, kind = [], works.KINDS["resnet"]

    def data(width, size):
        loss, draw = kind.data(width, size)
        return loss, lambda generator: (seeds.append(generator.initial_seed()), draw(generator))[1]

    works.KINDS["resnet"] = kind._replace(data=data)
    tasks.TASKS["resnet"] = tasks.TASKS["resnet"]._replace(held_out=lambda: images.batch(64, torch.Generator().manual_seed(5)))
    sizes, args = learning.Sizes(4, 1, 4), argparse.Namespace(eval_every=2, accumulate=2, bucket_mb=25.0, schedule="pipelined")
    rates = [learning.tuned("resnet", spec, sizes, args, 4) for spec in ("plain", "sign", "topk:ratio=0.01")]
    for seed in (0, 1):
        learning.train("resnet", "plain", seed, sizes, args, 2, 0.05)
    return rates, sorted(set(seeds))


def test_all_ranks_choose_alike_and_draw_with_seeds_of_their_own():
    (rates, seeds), (others, other_seeds) = run(2, _tuned_and_trained)
    assert rates == others and set(rates) <= {0.025, 0.05, 0.1}
    assert (seeds, other_seeds) == ([0, 1000, 1000 * learning.TUNED_BY], [1, 1001, 1000 * learning.TUNED_BY + 1])


def _mean_of_the_held_out(rank, world):
    """Of a model that knows whether it is in training, and changes a sum that must not change."""
    model = torch.nn.BatchNorm1d(1)
    loss = lambda m, batch: (batch[0] * batch[1]).mean() + (100.0 if m.training else 0.0)
    value = tasks.judged(loss, model, (torch.arange(8.0), torch.full((8,), 2.0)))
    return value, model.training, tasks.judged(lambda m, batch: batch.float().mean(), model, torch.arange(8))


def test_every_rank_judges_its_share_and_has_the_mean_of_all():
    assert run(2, _mean_of_the_held_out) == [(7.0, True, 3.5)] * 2


# --- tasks ---


def test_what_is_held_out_is_not_drawn_in_training():
    """Of images and clicks: training's seeds are small numbers, as the test above sees."""
    for task, of in (("resnet", images.batch), ("recommender", clicks.batch)):
        held_out, again = tasks.TASKS[task].held_out(), tasks.TASKS[task].held_out()
        assert all(torch.equal(a, b) for a, b in zip(held_out, again)), "another one each time"
        rows = lambda batch: {tuple(row) for row in torch.stack([values.reshape(len(values), -1)[:, 0].double() for values in batch], 1).tolist()}
        seeds = [1000 * seed + rank for seed in (0, 1, 2, learning.TUNED_BY) for rank in (0, 1)]
        drawn = [rows(of(256, torch.Generator().manual_seed(seed))) for seed in seeds]
        if task == "resnet":  # a user and an item may meet again
            assert not rows(held_out) & set.union(*drawn)
        assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i]) and all(not a <= rows(held_out) for a in drawn)


def test_text_is_held_out_by_files(tmp_path, monkeypatch):
    for name in [f"m{i:02}.py" for i in range(60)] + ["test/m60.py", "encodings/m61.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"<{name[-5:-3]}>")
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    training, held_out = (bytes(of.tolist()).decode().split() for of in text.standard_library())
    assert held_out == ["<10>", "<30>", "<50>"] and sorted(training + held_out) == [f"<{i:02}>" for i in range(60)]


def test_users_and_items_are_met_as_a_power_law():
    """Below the m-th of n lie (m / n)^(1/3) of all, whose slope is i^(-2/3)."""
    count = 400_000
    users, items, _ = clicks.batch(count, torch.Generator().manual_seed(3))
    for drawn, n in ((users, clicks.USERS), (items, clicks.ITEMS)):
        assert 0 <= drawn.min() and drawn.max() < n
        for low, high in ((0, 1), (1, 2), (2, 8), (8, 64), (64, 512), (512, n)):
            share = sum((i + 0.5) ** (-2 / 3) / (3 * n ** (1 / 3)) for i in range(low, high)) if low >= 8 else (high / n) ** (1 / 3) - (low / n) ** (1 / 3)
            found = ((low <= drawn) & (drawn < high)).sum().item() / count
            assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / count) + 2e-4, (low, high, found, share)


def test_a_click_has_the_probability_that_its_tastes_give():
    count = 400_000
    users, items, clicked = clicks.batch(count, torch.Generator().manual_seed(4))
    of_users, of_items, liking = clicks._hidden()
    assert set(clicked.unique().tolist()) == {0.0, 1.0}
    chance = 1 / (1 + torch.exp(-((of_users[users] * of_items[items]).sum(1) + liking[items] - 1).double()))
    assert 0.3 < chance.std() < 0.4, "hardly anything to learn"
    for tenth in range(10):
        of = (chance >= tenth / 10) & (chance < (tenth + 1) / 10)
        deviation = (chance[of] * (1 - chance[of])).sum().sqrt() / of.sum()
        assert of.sum() > 1000 and abs(clicked[of].double().mean() - chance[of].mean()) < 5 * deviation, tenth


def test_images_of_a_class_are_waves_of_its_direction():
    """Over 200 images of class k, waves at angle k pi / 10 are the strongest of the ten, and stand out of the noise."""
    pixels, kinds = images.batch(2000, torch.Generator().manual_seed(6))
    assert pixels.shape == (2000, 3, 32, 32) and kinds.unique().tolist() == list(range(10))
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    strength = torch.zeros(10, 10)  # [class, direction]
    for direction in range(10):
        along = x * math.cos(direction * math.pi / 10) + y * math.sin(direction * math.pi / 10)
        waves = torch.stack([part(f * along) for f in torch.linspace(0.45, 0.95, 6) for part in (torch.cos, torch.sin)])
        power = torch.einsum("ncyx,fyx->ncf", pixels, waves).square().mean((1, 2))
        strength[:, direction] = torch.stack([power[kinds == k].mean() for k in range(10)])
    best, others = strength.diagonal().clone(), strength.fill_diagonal_(0)
    assert (best > 1.05 * others.max(1).values).all() and (best > 1.3 * others.sum(1) / 9).all(), (best, strength)
    assert abs(pixels.std() - math.sqrt(9 + 0.5)) < 0.02


# --- the command ---


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> dict:
    """Two steps of every task, which is what a test has time for."""
    file = tmp_path_factory.mktemp("accuracy") / "all.json"
    argv = ["--task", "recommender,resnet,gpt,lstm", "--spec", "plain,none,int8", "--steps", "2", "--eval-every", "2", "--timeout", "300", "--json", str(file)]
    assert main(["bench", "accuracy", *argv]) == 0
    return json.loads(file.read_text())


def test_every_task_is_learnt_with_every_spec(learnt):
    assert learnt["bench"] == "accuracy" and [one["what"]["task"] for one in learnt["results"]] == ["recommender", "resnet", "gpt", "lstm"]
    ends = {"recommender": math.log(2), "resnet": math.log(10), "gpt": math.log(256), "lstm": math.log(256)}  # of a model that knows nothing
    for one in learnt["results"]:
        task, what = one["what"]["task"], one["what"]
        assert list(one["runs"]) == ["plain", "none", "int8"] and (what["steps"], what["world"], what["seeds"]) == (2, 2, 1)
        for [of] in one["runs"].values():
            [end] = of["curve"]
            assert end["step"] == 2 and 0.5 * ends[task] < end["loss"] < 1.1 * ends[task] and of["lr"] == tasks.TASKS[task].lr and of["seconds"] == end["seconds"] > 0
            assert end["bytes"] == 2 * of["bytes_per_step"]


def test_without_compression_the_loss_is_plain_ddps_bit_for_bit(learnt):
    for one in learnt["results"]:
        assert one["runs"]["plain"][0]["curve"][-1]["loss"] == one["runs"]["none"][0]["curve"][-1]["loss"], one["what"]["task"]
        assert one["runs"]["plain"][0]["curve"][-1]["loss"] != one["runs"]["int8"][0]["curve"][-1]["loss"], "int8 was not used"


def test_bytes_are_those_of_the_parameters(learnt):
    """Of two ranks each sends as much as it has; int8 a byte for each value and scales, exactly in the first step."""
    for one in learnt["results"]:
        sent = {spec: of["bytes_per_step"] for spec, [of] in one["runs"].items()}
        assert sent["plain"] == sent["none"] == 4 * one["what"]["parameters"]
        assert 0.25 < 2 * sent["int8"] / sent["plain"] - 1 < 0.275, one["what"]["task"]


def test_each_spec_is_tuned_and_the_table_says_so(tmp_path, capfd):
    file = tmp_path / "tuned.json"
    argv = ["--task", "resnet", "--width", "4", "--layers", "1", "--batch", "4", "--steps", "4", "--seeds", "2", "--eval-every", "4", "--spec", "plain,sign", "--tune", "--timeout", "120", "--json", str(file)]
    assert main(["bench", "accuracy", *argv]) == 0
    said, [one] = capfd.readouterr(), json.loads(file.read_text())["results"]
    assert one["what"] | {"width": 4, "layers": 1, "batch": 4, "tuned": "tuned for each spec"} == one["what"]
    rates = {spec: {of["lr"] for of in runs} for spec, runs in one["runs"].items()}
    assert all(len(of) == 1 and of <= {0.025, 0.05, 0.1} for of in rates.values()), "seeds of a spec have one learning rate"
    assert all(f"resnet: {spec} seed {seed} lr {lr:g}: step 2/2" in said.err for spec in rates for seed in (1000,) for lr in (0.025, 0.05, 0.1))
    assert [of["step"] for of in one["runs"]["sign"][1]["curve"]] == [4]
    lines = said.out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["resnet", "lr"], *([spec, f"{min(of):g}"] for spec, of in rates.items())] and "learning rate tuned for each spec" in lines[3]


@pytest.mark.parametrize("argv, words", [
    (["--task", "gpt,chess"], ["no task 'chess'", "gpt, lstm, resnet, recommender"]),
    (["--task", ""], ["no task ''"]),
    (["--task", "gpt,lstm", "--lr", "0.1", "--width", "64"], ["--lr and --width", "single --task", "gpt, lstm"]),
    (["--tune", "--lr", "0.1"], ["--tune", "--lr 0.1"]),
    (["--seeds", "0"], ["--seeds must be at least 1, got 0"]),
    (["--world", "1"], ["--world must be at least 2, got 1"]),
    (["--steps", "0"], ["--steps must be at least 1, got 0"]),
    (["--eval-every", "-3"], ["--eval-every must be at least 1, got -3"]),
    (["--accumulate", "3"], ["--accumulate 3", "gpt, 8 per rank"]),
    (["--lr", "nan"], ["--lr must be above 0, got nan"]),
    (["--bucket-mb", "0"], ["--bucket-mb must be above 0, got 0"]),
    (["--width", "30"], ["4 heads", "got 30"]),
    (["--schedule", "later"], ["'later'", "pipelined"]),
    (["--spec", "plain,int9"], ["'int9'", "int4"]),
    (["--emulate", "fast"], ["'fast'", "100mbit"]),
])
def test_mistakes_are_named_before_anything_is_trained(argv, words, capfd):
    assert main(["bench", "accuracy", *argv]) == 2
    said = capfd.readouterr()
    assert said.out == "" and all(word in said.err for word in words) and "step" not in said.err.replace("--steps", ""), said.err
