"""`python -m commopt bench rivals`: that it trains and times the same candidates, and what it concludes from numbers."""

import json
import pathlib

import pytest

from commopt.__main__ import main
from commopt.bench import rivals

WHAT = {"task": "gpt", "parameters": 1000, "world": 2, "steps": 400, "seeds": 2, "tuned": "of the task", "bucket_mb": 1.0}
TINY = ["--spec", "torch:fp16,torch:powersgd1,int8,powersgd:rank=2", "--width", "32", "--layers", "1", "--batch", "2", "--rounds", "2"]


def trained(losses: dict[str, tuple[float, ...]], **what) -> dict:
    return {"what": WHAT | what, "runs": {spec: [{"curve": [{"loss": 9.0}, {"loss": x}]} for x in of] for spec, of in losses.items()}}


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
    specs = ["plain", "torch:fp16", "torch:powersgd1", "int8", "powersgd:rank=2"]
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
    assert "step 4/4" not in said.err and "no" not in [line.split()[2] for line in said.out.splitlines()[1:6]]


@pytest.mark.parametrize("argv, words", [
    (["--spec", "int9"], ["int9", "int4"]),
    (["--emulate", "fast"], ["fast", "100mbit"]),
    (["--rounds", "0"], ["1 round", "--rounds 0"]),
])
def test_mistakes_are_named_before_anything_is_trained(argv, words, capfd):
    assert main(["bench", "rivals", *argv]) == 2
    said = capfd.readouterr()
    assert all(word in said.err for word in words) and "step" not in said.err, said.err
