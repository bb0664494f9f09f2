"""`python -m commopt report`: its charts are read as a reader does, by ticks and positions, and give the numbers of the files."""

import json
import logging
import math
import pathlib
import re
import xml.etree.ElementTree as xml

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import commopt
import report_cases as cases
from commopt.__main__ import main
from commopt.bench.report import colours, log, page
from commopt.bench.report.bars import wrapped
from commopt.bench.report.markup import tag
from commopt.bench.report.scale import axis, number
from commopt.bench.report.units import binary
from ranks import Given, run


# --- what a reader sees ---


def shown(folder: pathlib.Path, bench: str, result: dict) -> xml.Element:
    (folder / "result.json").write_text(json.dumps(cases.named(bench, result)))
    return parsed(page([str(folder / "result.json")]))


def parsed(html: str) -> xml.Element:
    begin, rest = html.split("\n", 1)
    assert begin == "<!DOCTYPE html>"
    return xml.fromstring(rest)  # it is well-formed


def text(element: xml.Element) -> str:
    return "".join(element.itertext())


def classed(element: xml.Element, name: str) -> list[xml.Element]:
    return [e for e in element.iter() if name in e.get("class", "").split()]


def chart(root: xml.Element, title: str) -> xml.Element:
    [figure] = [f for f in root.iter("figure") if f.find(".//h4") is not None and text(f.find(".//h4")) == title]
    return figure.find("svg")


UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def scale(svg: xml.Element, which: str):
    """Pixels -> value, as the labels of an axis say it, linear or logarithmic, whichever agrees with all of them."""
    at = {"x-axis": "x", "y-axis": "y"}[which]
    [group] = classed(svg, which)
    ticks = []
    for tick in classed(group, "tick"):
        value, _, unit = text(tick).replace(",", "").partition(" ")
        ticks.append((float(tick.get(at)) - (4 if at == "y" else 0), float(value) * UNITS.get(unit, 1)))
    assert len(ticks) >= 2, f"an axis with {len(ticks)} ticks"
    (p, a), (q, b) = ticks[0], ticks[-1]
    linear = lambda pixel: a + (b - a) * (pixel - p) / (q - p)
    logarithmic = lambda pixel: a * (b / a) ** ((pixel - p) / (q - p))
    for found in (linear, logarithmic) if a > 0 < b else (linear,):
        if all(math.isclose(found(pixel), value, rel_tol=0.02, abs_tol=0.002 * abs(b - a)) for pixel, value in ticks):
            return found
    raise AssertionError(f"ticks that are neither linear nor logarithmic: {ticks}")


def points(svg: xml.Element, name: str) -> list[tuple[float, float]]:
    x, y = scale(svg, "x-axis"), scale(svg, "y-axis")
    [series] = [g for g in classed(svg, "series") if g.find("title").text == name]
    places = [re.fullmatch(r"translate\((.*),(.*)\)", marker.get("transform")).groups() for marker in classed(series, "marker")]
    return sorted((x(float(a)), y(float(b))) for a, b in places)


def colour(element: xml.Element) -> str:
    [name] = re.findall(r"\b(c\d|grey)\b", element.get("class"))
    return name


# --- numbers of each bench ---


def test_accuracy_shows_means_against_seconds_and_bytes(tmp_path):
    root = shown(tmp_path, "accuracy", cases.accuracy())
    against = {"Loss against time": lambda k, i: k * (i + 1) / 4, "Loss against bytes": lambda k, i: 4e6 * k / 10**i}
    for title, x in against.items():
        svg = chart(root, title)
        [label] = [text(t) for t in classed(classed(svg, "x-axis")[0], "label")]
        unit = {"kB": 1e3, "MB": 1e6, "seconds of training": 1.0}[label.split(", ")[-1]]
        for i, spec in enumerate(cases.SPECS):
            want = [(x(k, i) / unit, 5 / (1 + k) + 2 + 0.01 + 0.05 * i) for k in range(1, 9)]
            for (a, b), (c, d) in zip(points(svg, spec), want, strict=True):
                assert math.isclose(a, c, rel_tol=0.01) and abs(b - d) < 0.01, (title, spec)
    svg = chart(root, "Loss against time")
    assert len(classed(svg, "seeds")) == len(cases.SPECS)
    y, [band] = scale(svg, "y-axis"), classed(svg, "band")
    top = float(band.get("y"))
    assert y(top) == pytest.approx(5 / 9 + 2.02, abs=0.01) and y(top + float(band.get("height"))) == pytest.approx(5 / 9 + 2, abs=0.01)
    edge = [tuple(map(float, pair.split(","))) for pair in classed(svg, "seeds")[0].get("d").strip("Mz").split("L")]
    assert y(edge[0][1]) == pytest.approx(4.52, abs=0.01) and y(edge[-1][1]) == pytest.approx(4.5, abs=0.01)  # of the first step, highest and lowest
    [target] = classed(svg, "level")  # what plain has after three quarters: step 6 of 8
    assert y(float(target.get("y1"))) == pytest.approx(5 / 7 + 2.01, abs=0.01) and "target 2.7243" in text(root)
    # The target: plain is there at 24 MB and 1.5 s; int8, 0.1 higher, is between its steps 7 (2.735) and 8 (2.6656), at 0.154 of the way.
    assert rows_of(root)["plain"] == ["0.001", "2.5656", "+0.0000", "yes", "0.0200", "0.080", "24.0", "1.5", "5.0"]
    assert rows_of(root)["int8"] == ["0.004", "2.6656", "+0.1000", "no", "0.0200", "0.001", "0.3", "5.4", "15.0"]
    assert rows_of(root)[cases.LONG] == ["0.008", "2.7156", "+0.1500", "no", "0.0200", "0.000", "0.0", "7.9", "20.0"]
    assert "plain ends at 2.5656 nats per byte, its 3 seeds between 2.5556 and 2.5756; all others end higher." in text(root)


def test_each_task_of_accuracy_has_its_own_charts_unit_and_numbers(tmp_path):
    result = {"results": [cases.learnt(("plain", "none", "int8"), 2, task="recommender", loss=lambda k: 0.7 - 0.02 * k), cases.learnt(("plain", "int8"), 1, task="resnet", loss=cases.steep)]}
    for spec in ("none", "int8"):  # below the second seed of plain, and a tenth of its bytes or a hundredth
        for run_ in result["results"][0]["runs"][spec]:
            run_["curve"][-1]["loss"] = 0.545
    root = shown(tmp_path, "accuracy", result)
    assert [text(h) for h in root.iter("h3")] == ["recommender", "resnet"] and len(list(root.iter("figure"))) == 6 and len(list(root.iter("dl"))) == 3
    assert "plain ends at 0.5450 nats (cross-entropy), its 2 seeds between 0.5400 and 0.5500; not higher: none, int8, of which int8 sends least, 0.0008 MB a step." in text(root)
    assert "plain ends at 0.1000 nats (cross-entropy); all others end higher." in text(root) and "nats per byte" not in text(next(root.iter("table")))
    assert rows_of(root, 1)["plain"][1] == "0.1000" and rows_of(root, 0)["int8"][3] == "yes"
    steep = [f.find("svg") for f in root.iter("figure")][3]
    for (a, b), k in zip(points(steep, "plain"), range(1, 9), strict=True):
        assert math.isclose(a, k / 4, rel_tol=0.02) and math.isclose(b, cases.steep(k), rel_tol=0.03), "300 and 0.1 are read from one axis"
    [plain] = [g for g in classed(steep, "series") if g.find("title").text == "plain"]
    heights = sorted(float(marker.get("transform").split(",")[1].rstrip(")")) for marker in classed(plain, "marker"))
    assert all(b - a > 20 for a, b in zip(heights, heights[1:])), "what comes after the first evaluation lies on the axis"


def rows_of(root: xml.Element, index: int = 0) -> dict[str, list[str]]:
    body = list(root.iter("tbody"))[index]
    return {text(row.find("th")): [text(cell) for cell in row.findall("td")] for row in body}


def test_a_loss_that_is_not_finite_is_left_out_of_the_line_and_told_in_the_table(tmp_path):
    files = cases.all_files(tmp_path)
    root = parsed(page([next(f for f in files if "one seed" in f)]))
    assert len(points(chart(root, "Loss against time"), "int8")) == 6 and len(points(chart(root, "Loss against time"), "plain")) == 8
    assert rows_of(root)["int8"][1:4] == ["inf", "+inf", "no"] and "nan" not in "".join(e.get("d", "") + e.get("transform", "") for e in root.iter())


def test_training_that_diverged_throughout_is_shown(tmp_path):
    result = cases.learnt(cases.SPECS[:3], 2)
    for runs in result["runs"].values():
        for run_ in runs:
            run_["curve"] = [point | {"loss": math.nan} for point in run_["curve"]]
    for bench, of in (("accuracy", {"results": [result]}), ("rivals", cases.rivals.judged({"what": cases.STEPS_WHAT, "rows": cases.added(cases.SPECS[:3])}, result, 0.02))):
        root = shown(tmp_path, bench, of)
        assert not [e.attrib for e in root.iter() if e.tag in ("path", "rect", "line", "circle") and "nan" in str(e.attrib)]
        assert rows_of(root)["int8"][bench == "accuracy"] in ("nan", "+nan")


def test_hook_shows_what_it_costs(tmp_path):
    result = cases.hook()
    root, rows = shown(tmp_path, "hook", result), result["rows"]
    for title, key in (("A backward, median", "backward_ms"), ("The host in the hook, for a bucket", "host_us"), ("The GPU, for a bucket", "device_us")):
        svg = chart(root, title)
        x, zero = scale(svg, "x-axis"), float(classed(svg, "zero")[0].get("x1"))
        wanted = [row[key] for row in rows if row[key] is not None]
        assert [x(zero + float(bar.get("width"))) for bar in classed(svg, "bar")] == pytest.approx(wanted, rel=0.01)
    assert f"waits for the GPU with {rows[2]['spec']}." in text(classed(root, "verdict")[0])


def test_step_shows_times_and_lanes_at_one_scale(tmp_path):
    result = cases.steps()
    root, rows = shown(tmp_path, "step", result), result["rows"]
    names = [f"{r['spec']} {r['schedule'] or ''}".strip() for r in rows]
    svg = chart(root, "A step, median")
    x = scale(svg, "x-axis")
    zero = float(classed(svg, "zero")[0].get("x1"))
    bars, whiskers = classed(svg, "bar"), classed(svg, "whisker")
    for name, r, bar, whisker in zip(names, rows, bars, whiskers, strict=True):
        assert bar.find("title").text.startswith(name + ": ")
        assert x(zero + float(bar.get("width"))) == pytest.approx(r["p50_ms"], abs=0.1)
        ends = [float(p) for p in re.findall(r"M([\d.]+),[\d.]+V", whisker.get("d"))]
        assert [x(p) for p in ends] == pytest.approx([r["p75_ms"], r["p90_ms"]], abs=0.1)
    assert [x(float(f.get("x1"))) for f in classed(svg, "floor")] == pytest.approx([r["floor_ms"] for r in rows], abs=0.1)
    assert x(float(classed(svg, "level")[0].get("x1"))) == pytest.approx(rows[0]["p50_ms"], abs=0.1)

    drawn = classed(root, "lanes")
    assert len(drawn) == len(rows)
    per_ms = set()
    for name, r, svg in zip(names, rows, drawn, strict=True):
        assert svg.get("aria-label").startswith(name + ": ") and "".join(text(t) for t in classed(svg, "name")).replace(" ", "") == name.replace(" ", "")
        x = scale(svg, "x-axis")
        per_ms.add(round(1 / (x(101.0) - x(100.0)), 3))
        lanes = [text(t) for t in svg.findall("text") if "tick" in t.get("class")]
        rows_at = {float(t.get("y")): text(t) for t in svg.findall("text") if "tick" in t.get("class")}
        assert lanes == [lane for lane in ("forward", "backward", "optimizer", "encode", "comm", "decode") if any(e["lane"] == lane for e in r["events"])]
        seen = []
        for event in classed(svg, "event"):
            lane = min(rows_at.items(), key=lambda item: abs(item[0] - float(event.get("y")) - float(event.get("height")) / 2))[1]
            left = float(event.get("x"))
            seen.append((lane, x(left), x(left + float(event.get("width")))))
        assert sorted(seen) == [(e["lane"], pytest.approx(e["start_ms"], abs=0.1), pytest.approx(e["stop_ms"], abs=0.1)) for e in sorted(r["events"], key=lambda e: (e["lane"], e["start_ms"]))]
        assert [x(float(i.get("x")) + float(i.get("width"))) for i in classed(svg, "idle")] == pytest.approx([r["period_ms"]] * len(lanes), abs=0.1)
        busy = dict(zip(lanes, (text(t) for t in classed(svg, "value"))))
        assert busy["comm"] == ("7.5 ms" if r["schedule"] else "7.0 ms") if "comm" in busy else r["spec"] == "no_sync"
    assert len(per_ms) == 1, f"steps are drawn at scales of {per_ms} pixels per ms"
    assert list(rows_of(root)) == names
    assert rows_of(root)["int8 decoupled"] == ["41.0", "42.5", "47.0", "1.519", "21.0", "3.8", "1.500", "12.0", "38.0", "0.927", "10.5"]


@pytest.mark.parametrize("bench, result, title, key, factor", [
    ("kernels", cases.kernels(), "Encode: cpu (avx2), 16,777,216 of float32, 1 thread", "of_axpy", 1.0),
    ("collectives", cases.collectives(), "An exchange, median of the slowest rank", "measured_ms", 1.0),
    ("bandwidth", {"what": cases.STEPS_WHAT, "rows": cases.added()}, "What communication adds to a step, median", "added_ms", 1.0),
    ("bandwidth", cases.bandwidth(sizes=(1 << 20,)), "Time of an exchange of 1 MiB", "time_us", 1e-3),
])
def test_bars_are_as_long_as_their_numbers(tmp_path, bench, result, title, key, factor):
    root = shown(tmp_path, bench, result)
    svg = chart(root, title)
    x, bars = scale(svg, "x-axis"), classed(svg, "bar")
    rows = [r for r in result["rows"] if bench != "kernels" or (r["what"], r["isa"]) == ("encode", "avx2")]
    begin = float(bars[0].get("x"))
    largest = max(r[key] for r in rows) * factor
    assert abs(x(begin)) < 1e-6 * largest
    assert [x(begin + float(b.get("width"))) for b in bars] == [pytest.approx(factor * r[key], abs=0.004 * largest) for r in rows]
    if floors := classed(svg, "floor"):
        floor = "floor_us" if "floor_us" in rows[0] else "floor_ms"
        assert [x(float(f.get("x1"))) for f in floors] == [pytest.approx(factor * r[floor], abs=0.004 * largest) for r in rows]
    assert [b.find("title").text.split()[0].rstrip(":,") for b in bars] == [r["spec"] for r in rows]
    assert set(rows_of(root)) == {r["spec"] for r in result["rows"]}


def test_bandwidth_by_size_is_logarithmic_and_beside_its_floor(tmp_path):
    result = cases.bandwidth()
    root = shown(tmp_path, "bandwidth", result)
    for title, key, factor in (("Time of an exchange", "time_us", 1e-3), ("Effective bandwidth", "effbw_gbps", 1.0), ("Bus bandwidth", "busbw_gbps", 1.0), ("Algorithm bandwidth", "algbw_gbps", 1.0)):
        svg = chart(root, title)
        for spec in dict.fromkeys(r["spec"] for r in result["rows"]):
            want = [(r["size_bytes"], factor * r[key]) for r in result["rows"] if r["spec"] == spec]
            for (a, b), (c, d) in zip(points(svg, spec), want, strict=True):
                assert math.isclose(a, c, rel_tol=0.02) and math.isclose(b, d, rel_tol=0.03), (title, spec, a, b, c, d)
    svg = chart(root, "Time of an exchange")
    x, y = scale(svg, "x-axis"), scale(svg, "y-axis")
    [floor] = [g for g in classed(svg, "series") if g.find("title").text == "floor of none"]
    path = [tuple(map(float, p.split(","))) for p in re.split("[ML]", floor.find("path").get("d"))[1:]]
    assert [y(b) / x(a) for a, b in path] == pytest.approx([8e-6] * len(path), rel=0.05)  # ms per byte, at 125 MB/s


def test_of_a_spec_by_two_collectives_both_lines_have_its_colour(tmp_path):
    result = cases.bandwidth(("int8",))
    result["rows"] += [row | {"collective": "integer_sum", "time_us": 2 * row["time_us"]} for row in result["rows"]]
    svg = chart(shown(tmp_path, "bandwidth", result), "Time of an exchange")
    one, other = ([g for g in classed(svg, "series") if g.find("title").text == name][0] for name in ("int8 sum", "int8 integer_sum"))
    assert colour(one) == colour(other) and one.get("class") != other.get("class")
    assert classed(one, "marker")[0].get("d") != classed(other, "marker")[0].get("d")
    ratio = [b / a for (_, a), (_, b) in zip(points(svg, "int8 sum"), points(svg, "int8 integer_sum"), strict=True)]
    assert ratio == pytest.approx([2.0] * 10, rel=0.05)


def test_rivals_shows_loss_against_added_time_and_the_best(tmp_path):
    losses = cases.learnt()
    result = cases.rivals.judged({"what": cases.STEPS_WHAT, "rows": cases.added()}, losses, 0.07)
    (tmp_path / "r.json").write_text(json.dumps(cases.named("rivals", result)))
    root = parsed(page([str(tmp_path / "r.json")]))
    svg = [f.find("svg") for f in root.iter("figure")][0]
    for i, spec in enumerate(cases.SPECS):
        [(x, y)] = points(svg, spec)
        assert x == pytest.approx(80 / 2**i, abs=0.3) and y == pytest.approx(0.05 * i, abs=0.002)
    ringed = {g.find("title").text for g in classed(svg, "series") if classed(g, "ring")}
    assert ringed == {"torch:fp16"}, "of ours none is in the band"
    y, [band] = scale(svg, "y-axis"), classed(svg, "band")
    assert y(float(band.get("y"))) == pytest.approx(0.07, abs=0.002)
    assert "Within 0.07 nats of plain DDP: of ours none is, of theirs torch:fp16 adds 40.0 ms." in text(root)
    assert rows_of(root)["int8"][:2] == ["+0.1000", "no"] and rows_of(root, 1)["int8"][2] == "+0.1000"


def test_a_log_is_shown_per_step(tmp_path):
    (tmp_path / "run.jsonl").write_text(cases.log(10, every=20))
    root = parsed(page([str(tmp_path / "run.jsonl")]))
    for name, value in {"exposed": 2.0, "encode": 0.5, "comm": 6.0, "decode": 0.25}.items():
        assert points(chart(root, "Times of a step"), name) == [(pytest.approx(20 * i, abs=0.5), pytest.approx(value, abs=0.03)) for i in range(10)]
    assert [y for _, y in points(chart(root, "Bytes of a step"), "sent")] == pytest.approx([250] * 10, rel=0.01)
    assert points(chart(root, "Norm of the residual"), "residual") == [(pytest.approx(20 * i, abs=0.5), pytest.approx(0.01 * (20 * i + 1), abs=0.01)) for i in range(10)]
    assert "python train.py" in text(root) and "int8 and none" in text(root)


def test_a_log_gives_what_each_interval_added():
    lines = [{"step": 0, **cases.stats(1, exposed_ms=10.0)}, {"step": 10, **cases.stats(11, exposed_ms=4.0, bytes_wire=600_000)},
             {"step": 10, **cases.stats(11)}, {"step": 20, **cases.stats(10, exposed_ms=3.0, residual_norm=None)}, {"step": 30, **cases.stats(20, exposed_ms=5.0)}]
    steps = log.since(lines)
    assert [s["step"] for s in steps] == [0, 10, 20, 30]
    assert [s["exposed_ms"] for s in steps] == pytest.approx([10.0, (44 - 10) / 10, 3.0, (100 - 30) / 10])  # the third was reset before
    assert steps[1]["wire"] == 35_000 and steps[2]["wire"] == 250_000 and steps[2]["residual_norm"] is None
    every = log.since([{"step": i, **cases.stats(i + 1, exposed_ms=(i + 1) / 2 if i else 0.5)} for i in range(101)])
    few = log.since(log.thinned([{"step": i, **cases.stats(i + 1, exposed_ms=(i + 1) / 2 if i else 0.5)} for i in range(101)], 30))
    assert len(few) == 26 and few[-1]["step"] == 100
    assert sum(s["exposed_ms"] * s["steps"] for s in few) == pytest.approx(sum(s["exposed_ms"] * s["steps"] for s in every)), "thinning loses time"


# --- the page ---


def test_several_files_on_one_page_and_a_spec_has_one_look(tmp_path):
    files = cases.all_files(tmp_path)
    html = page(files)
    root = parsed(html)
    assert len(list(root.iter("section"))) == len(files)
    looks: dict[str, set[str]] = {}
    for svg in root.iter("svg"):
        for series in classed(svg, "series"):
            looks.setdefault(series.find("title").text.removeprefix("floor of "), set()).add(colour(series))
        for bar in classed(svg, "row"):
            looks.setdefault(bar.find("rect/title").text.split(": ")[0].split(" ")[0].rstrip(","), set()).add(colour(bar))
    assert set(cases.SPECS) <= set(looks) and all(len(found) == 1 for found in looks.values()), looks
    assert looks["plain"] == looks["no_sync"] == {"grey"} and looks["int8"] != looks[cases.LONG]
    for section, file in zip(root.iter("section"), files):
        said = text(section)
        assert pathlib.Path(file).name in said and "0.1.0" in said and "2.9.0" in said
        if file.endswith(".json"):
            assert f"$ python -m commopt bench {pathlib.Path(file).stem.split()[0]} --spec '{cases.LONG}'" in said
    assert "buckets" in text(root) and "6 MiB" in text(root) and "2,629,130" in text(root)


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    html = page(cases.all_files(tmp_path))
    root = parsed(html)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|src=", html), "a reference"
    assert {e.tag for e in root.iter()} <= {"html", "head", "meta", "title", "style", "body", "main", "header", "nav", "ul", "li", "a", "section", "h1", "h2", "h3", "h4", "small", "p", "code", "dl", "div",
                                            "dt", "dd", "span", "figure", "figcaption", "svg", "g", "path", "rect", "line", "circle", "text", "table", "thead", "tbody", "tr", "th", "td", "wbr", "details", "summary", "pre"}
    assert all(a.get("href").startswith("#") for a in root.iter("a"))
    assert "prefers-color-scheme:dark" in html and len(html) < 2_000_000


BAD = "<script>alert(1)</script>&\"'\x00\ud800"


@pytest.mark.parametrize("bench, result", [
    ("accuracy", cases.accuracy((BAD, "int8"))), ("step", cases.steps((BAD,))), ("kernels", cases.kernels((BAD,))), ("collectives", cases.collectives((BAD,))),
    ("bandwidth", cases.bandwidth((BAD,))), ("bandwidth", {"what": {BAD: BAD}, "rows": cases.added((BAD, "int8"))}),
])
def test_text_is_escaped(tmp_path, bench, result):
    (tmp_path / "result.json").write_text(json.dumps(cases.named(bench, result) | {"command": BAD, "date": BAD}))
    html = page([str(tmp_path / "result.json")])
    root = parsed(html)
    assert "<script" not in html and not list(root.iter("script"))
    assert text(root).count("<script>alert(1)</script>&\"'\ufffd\ufffd") >= 4


def test_markup_is_escaped_by_construction():
    assert tag("text", "a < b", ["&", tag("b", "\"")], x=1.5, class_="p\"q", none=None) == "<text x=\"1.5\" class=\"p&quot;q\">a &lt; b&amp;<b>&quot;</b></text>"
    assert tag("p", tag("b").lower()) == "<p>&lt;b&gt;&lt;/b&gt;</p>", "what is made from markup is text again"


# --- axes ---


@pytest.mark.parametrize("low, high, want", [
    (0.0, 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]), (2.3, 2.44, ["2.30", "2.32", "2.34", "2.36", "2.38", "2.40", "2.42", "2.44"]),
    (0.0, 7e4, ["0", "20,000", "40,000", "60,000", "80,000"]),
    (1.0, 1000.0, ["1", "3", "10", "30", "100", "300", "1,000"]), (0.03, 3.0, ["0.05", "0.1", "0.2", "0.5", "1", "2"]), (5.0, 5.0, ["4.4", "4.6", "4.8", "5.0", "5.2", "5.4", "5.6"]),
])
def test_ticks_are_round(low, high, want):
    found = axis([low, high], 40.0, 400.0)
    assert [label for _, label in found.ticks] == want
    assert all(found(value) == pytest.approx(found.start + (found.stop - found.start) * (
        math.log(value / found.low) / math.log(found.high / found.low) if found.log else (value - found.low) / (found.high - found.low))) for value, _ in found.ticks)


@pytest.mark.parametrize("seed", range(200))
def test_on_any_axis_labels_stand_apart_and_values_within(seed):
    draw = torch.Generator().manual_seed(seed)
    values = (10.0 ** (torch.rand(6, generator=draw, dtype=torch.float64) * 12 - 5)) * torch.tensor([1.0, -1.0])[torch.randint(0, 1 + seed % 2, (6,), generator=draw)]
    some = (values / 10**6 + values[0] if seed % 5 == 0 else values).tolist()
    for start, stop, across in ((60.0, 400.0, True), (240.0, 30.0, False)):
        found = axis(some, start, stop, zero=seed % 3 == 0)
        assert all(min(start, stop) - 1e-6 <= found(v) <= max(start, stop) + 1e-6 for v in some)
        assert len(found.ticks) >= 2 and found.log == (seed % 3 != 0 and min(some) > 0 and max(some) / min(some) >= 50)
        ends = [(found(v) - 3.85 * len(label), found(v) + 3.85 * len(label)) if across else (-found(v) - 8, -found(v) + 8) for v, label in found.ticks]
        assert all(a[1] < b[0] for a, b in zip(ends, ends[1:])), [label for _, label in found.ticks]
        assert len({label for _, label in found.ticks}) == len(found.ticks)


def test_numbers_as_one_writes_them():
    assert [number(v) for v in (0.0, 1.0, 1234567.0, 0.05, 2.5, 1e9, 2.5e-7, -3.0)] == ["0", "1", "1,234,567", "0.05", "2.5", "1e9", "2.5e-7", "-3"]
    assert [binary(v) for v in (8.0, 1024.0, 1 << 20, 3 << 29)] == ["8 B", "1 KiB", "1 MiB", "1.5 GiB"]
    assert wrapped("a,bb,ccc dddd", 5) == ["a,bb,", "ccc", "dddd"] and wrapped("x" * 12, 5) == ["xxxxx", "xxxxx", "xx"] and wrapped("int8", 5) == ["int8"]


# --- colours ---


def oklab(rgb: torch.Tensor) -> torch.Tensor:
    lms = rgb @ torch.tensor([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566], [0.0883024619, 0.2817188376, 0.6299787005]], dtype=torch.float64).T
    return lms.clamp(min=0) ** (1 / 3) @ torch.tensor([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099], [0.0259040371, 0.7827717662, -0.8086757660]], dtype=torch.float64).T


DEFICIENCIES = {  # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("palette, background", [(colours.LIGHT, "#ffffff"), (colours.DARK, "#15181d")])
def test_colours_are_told_apart_by_everybody(palette, background):
    rgb = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in (*palette, background)], dtype=torch.float64)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for name, matrix in DEFICIENCIES.items():
        seen = oklab((linear[:-1] @ torch.tensor(matrix, dtype=torch.float64).T).clamp(0, 1))
        assert torch.pdist(seen).min() >= 0.12, name
    light = linear @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64) + 0.05
    assert (torch.maximum(light[:-1], light[-1]) / torch.minimum(light[:-1], light[-1])).min() >= 3


def test_more_specs_than_colours_differ_in_more_than_colour():
    page_colours = colours.Colours()
    looks = [page_colours.of(f"spec{i}") for i in range(56)]
    assert len({(look.classes.split()[0], look.marker) for look in looks}) == 56 and page_colours.of("spec3") == looks[3]
    assert len({look.classes for look in looks[:32]}) == 32


# --- the command ---


def test_the_default_page_and_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("k.json").write_text(json.dumps(cases.named("kernels", cases.kernels())))
    assert main(["report", "k.json"]) == 0
    said = capsys.readouterr().out
    assert "report.html" in said and (tmp_path / "report.html").as_uri() in said
    assert main(["report", "k.json", "k.json", "-o", "two.html"]) == 0 and "two.html" in capsys.readouterr().out
    assert pathlib.Path("two.html").read_text().count("<section") == 2
    assert main(["report", "k.json", "-o", "-"]) == 0 and capsys.readouterr().out == pathlib.Path("report.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k.json", "report.html", "two.html"]


@pytest.mark.parametrize("content, words", [
    (None, ["result.json", "no such file", "bench step --json", "commopt.jsonl"]),
    ("", ["empty", "bench step --json", "every"]),
    ("loss 3.2\n", ["not JSON", "bench step --json"]),
    (b"\xff\xfe\x00", ["not text"]),
    ("[1, 2]", ["JSON of something else", "bench step --json"]),
    ('{"specs": []}', ["JSON of something else"]),
    ('{"what": {}, "rows": []}', ["JSON of something else", '"bench": "step"']),
    ('{"bench": "speed"}', ["'speed'", "accuracy, bandwidth"]),
    ('{"bench": "step", "what": {"world": 2}, "rows": []}', ["has no rows", "bench step --json"]),
    ('{"bench": "step", "rows": [3]}', ["has no what"]),
    ('{"bench": "accuracy", "what": {"task": "gpt"}, "runs": {"plain": []}}', ["has no results", "bench accuracy --json"]),
    ('{"bench": "kernels", "what": {"commopt": "9"}, "rows": [{"spec": "int8"}]}', ["'what'", "commopt 9", "measure again"]),
    ('{"bench": "accuracy", "results": [{"what": {"task": "gpt", "seeds": 1, "commopt": "9"}, "runs": {"plain": []}}]}', ["commopt 9", "measure again"]),
    ('{"bench": "accuracy", "results": [{"what": {"task": "chess", "commopt": "9"}, "runs": {}}]}', ["commopt 9", "measure again"]),
    ('{"bench": "accuracy", "results": {"plain": 3}}', ["an unknown version", "measure again"]),
    ('{"bench": "step", "what": {"commopt": "9"}, "rows": [3]}', ["commopt 9", "measure again"]),
    ('{"log": {}}\n', ["log without a step", "50"]),
    ('{"log": {}}\n{"step": 3}\n{"step": 4}\n', ["line 2", "something else"]),
    (json.dumps({"step": 0, **cases.stats(1)}) + "\nnonsense\n" + json.dumps({"step": 1, **cases.stats(2)}), ["line 2", "not JSON"]),
])
def test_bad_files_are_named(tmp_path, content, words, capsys):
    file = tmp_path / "result.json"
    if content is not None:
        file.write_bytes(content) if isinstance(content, bytes) else file.write_text(content)
    assert main(["report", str(file), "-o", str(tmp_path / "r.html")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and str(file) in said.err and all(word in said.err for word in words), said.err
    assert not (tmp_path / "r.html").exists()


def test_what_the_user_has_is_not_overwritten(tmp_path, capsys):
    file = tmp_path / "k.json"
    file.write_text(before := json.dumps(cases.named("kernels", cases.kernels())))
    assert main(["report", str(file), "-o", f"{tmp_path}/../{tmp_path.name}/k.json"]) == 2 and "one of the files" in capsys.readouterr().err
    assert main(["report", str(file), "-o", str(tmp_path / "no" / "r.html")]) == 2 and str(tmp_path / "no") in capsys.readouterr().err
    assert file.read_text() == before and list(tmp_path.iterdir()) == [file]


def test_a_bench_says_what_it_is_and_its_json_becomes_a_page(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "--spec", "int8", "--n", "65536", "--turns", "1", "--no-torch", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["bench"] == "kernels" and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\+00:00", result["date"])
    assert result["command"] == f"python -m commopt bench kernels --spec int8 --n 65536 --turns 1 --no-torch --json {file}"
    root = parsed(page([str(file)]))
    drawn = [float(text(v)) for f in root.iter("figure") for v in classed(f, "value")]
    assert sorted(drawn) == sorted(float(f"{row['of_axpy']:.2f}") for row in result["rows"])


# --- the log of a training run ---


def _train(rank, world, path):
    ddp = DDP(Given((64, 33), (40, 50)))
    handle = commopt.attach(ddp, "int4", start_step=0)
    sink = commopt.jsonl(path)
    handle.log_to(sink, every=2)
    for step in range(6):
        ddp(ddp.module.random(rank, step)).backward()
    stats = handle.stats()
    sink(stats | {"residual_norm": math.nan, "exposed_ms": math.inf}, 99)
    return {key: stats[key] for key in ("steps", "bytes_raw", "bytes_wire")}


def test_rank_0_logs_json_lines_that_a_report_reads(tmp_path):
    file = tmp_path / "run.jsonl"
    totals = run(2, _train, path=str(file))[0]
    lines = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in file.read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 0, 2, 4, 99], "both ranks wrote, or one too seldom"
    assert lines[0]["log"]["ranks"] == 2 and lines[0]["log"]["commopt"] == commopt.__version__ and lines[0]["log"]["command"]
    assert {key: lines[-1][key] for key in totals} == totals and totals["steps"] == 6
    assert lines[-1]["residual_norm"] is None and lines[-1]["exposed_ms"] is None and lines[-2]["residual_norm"] > 0
    run(2, _train, path=str(file))
    with file.open("a") as more:
        more.write('{"step": 100, "ste')  # cut off
    root = parsed(page([str(file)]))
    assert [text(h) for h in root.iter("h3")] == ["Run 1 of 2", "Run 2 of 2"] and len(list(root.iter("figure"))) == 6
    assert "Step 0 to 99 with int4" in text(root)


def _alone(rank, world, path):
    (path / "gone").mkdir()
    sink = commopt.jsonl(path / "gone" / "run.jsonl")
    sink(cases.stats(1), 0)
    (path / "gone" / "run.jsonl").unlink()
    (path / "gone").rmdir()
    records = []
    logging.getLogger("commopt").addFilter(lambda record: records.append(record.getMessage()))
    sink(cases.stats(2), 1)
    assert len(records) == 1 and "step 1" in records[0] and "run.jsonl" in records[0]
    for wrong in (path / "no" / "run.jsonl", path):
        with pytest.raises(OSError):
            commopt.jsonl(wrong)


def test_a_log_that_cannot_be_written_is_told_at_once_and_later_stops_nothing(tmp_path):
    run(1, _alone, path=tmp_path)
    with pytest.raises(RuntimeError, match="init_process_group"):
        commopt.jsonl(tmp_path / "run.jsonl")
