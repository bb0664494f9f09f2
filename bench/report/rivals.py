"""Of `bench rivals`: loss against what communication adds, the training behind it, and the best of each side."""

from typing import Any

from .. import rivals
from . import accuracy, bandwidth
from .colours import Colours
from .legend import legend, mark
from .lines import Point, Series, lines
from .markup import Child, tag
from .table import table
from .units import fixed


def body(result: dict[str, Any], colours: Colours) -> Child:
    rows, runs, verdict = result["rows"], result["trained"]["runs"], rivals.verdict(result)
    looks = legend([(row["spec"], colours.of(row["spec"])) for row in rows])
    return [
        tag("p", verdict[0].upper() + verdict[1:] + ".", class_="verdict"), looks,
        tag("div", against_time(result, colours), bandwidth.added(rows, colours), class_="figures"), numbers(rows),
        tag("h3", "The training behind it"), accuracy.charts(runs, colours), accuracy.numbers(runs),
    ]


def against_time(result: dict[str, Any], colours: Colours) -> Child:
    """What a spec costs in loss and in time, both beyond the best there is: the lower and the further left the better."""
    runs, best = result["trained"]["runs"], result["best"]
    plain = accuracy.mean_end(runs["plain"])
    series = []
    for row in result["rows"]:
        low, high = (end - plain for end in accuracy.ends(runs[row["spec"]]))
        about = f"{row['spec']}: {row['above_plain']:+.4f} nats, {row['added_ms']:,.1f} ms"
        series.append(Series(row["spec"], colours.of(row["spec"]), [Point(row["added_ms"], row["above_plain"], low, high, about)],
                             ringed=row["spec"] in (best["ours"], best["theirs"])))
    lowest = min((p.low for s in series for p in s.points if p.finite), default=0.0)
    marks = [mark("band", f"within {best['band']:g} nats of plain DDP"), mark("ring", "the best there of ours, and of theirs"), mark("seeds", "span of the seeds")]
    return lines(series, title="Loss against time", x="ms that communication adds to a step", y="loss above plain DDP's, nats per byte",
                 band=(min(lowest, 0.0), best["band"]), marks=marks)


def numbers(rows: list[dict]) -> Child:
    columns = [("spec", False), ("loss above plain, nats", True), ("in band", False)] + [(title, True) for title in ("sent, MB", "added, ms", "of plain", "floor, ms", "step, ms")]
    return table(columns, [[row["spec"], fixed(row["above_plain"], 4, sign=True), "yes" if row["in_band"] else "no", fixed(row["sent"] / 1e6, 3), fixed(row["added_ms"], 1),
                            fixed(row["of_plain"], 3), fixed(row["floor_ms"], 1), fixed(row["step_ms"], 1)] for row in rows])
