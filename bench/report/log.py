"""Of a training run, what `handle.log_to(commopt.jsonl(file))` wrote: residual, bytes and times against steps.

What a handle counts grows from the start on. A point is what was added since the point before: its time is the mean over the
steps between the two, and so it stays when lines are left out because a run has more of them than can be seen.
"""

import math
from typing import Any

from .colours import Colours
from .legend import legend
from .lines import Point, Series, lines
from .markup import Child, Markup, tag
from .table import table
from .units import fixed, unit_of

POINTS, ROWS = 400, 20  # of a run: in a chart and in the table, at most
TIMES = ("exposed", "encode", "comm", "decode")


def body(result: dict[str, Any], colours: Colours) -> Child:
    return [[tag("h3", f"Run {i + 1} of {len(result['runs'])}") if len(result["runs"]) > 1 else None, _run(lines, colours)] for i, lines in enumerate(result["runs"])]


def _run(written: list[dict], colours: Colours) -> Child:
    steps = since(thinned(written, POINTS))
    unit, name = unit_of([step["wire"] for step in steps])
    specs = list(dict.fromkeys(step["spec"] for step in steps))
    last = steps[-1]
    between = [f"{len(specs) - 2} others"] if len(specs) > 3 else specs[1:-1]  # during a warm-up there are many
    span = " to ".join(dict.fromkeys(f"{line['step']:,}" for line in (written[0], last)))
    said = f"Step {span} with {', then '.join([specs[0], *between, *specs[1:][-1:]])}"
    if last["wire"] > 0:
        said += f"; at the end {last['raw'] / last['wire']:.1f} times fewer bytes than the gradients have, and computation waits {last['exposed_ms']:.2f} ms a step"
    named = lambda names: legend([(name, colours.of(name)) for name in names])

    def series(name: str, key: str, divisor: float = 1.0, unit: str = "") -> Series:
        number = lambda step: math.nan if step[key] is None else step[key] / divisor
        return Series(name, colours.of(name), [Point(step["step"], number(step), about=f"{name}, step {step['step']:,}: {number(step):,.4g} {unit}".rstrip()) for step in steps])

    charts = [
        lines([series(name, f"{name}_ms", unit="ms") for name in TIMES], title="Times of a step", x="step", y="ms", from_zero=True,
              marks="comm: of all messages under way, which overlap"),
        lines([series("gradients", "raw", unit, name), series("sent", "wire", unit, name)], title="Bytes of a step", x="step", y=name, from_zero=True),
        lines([series("residual", "residual_norm")], title="Norm of the residual", x="step", y="norm of what this rank has not sent yet", from_zero=True),
    ]
    return [tag("p", said + ".", class_="verdict"), named([*TIMES, "gradients", "sent", "residual"]), tag("div", charts, class_="figures"), numbers(since(thinned(written, ROWS)))]


def thinned(written: list[dict], most: int) -> list[dict]:
    """Every k-th line, and the last one."""
    every = math.ceil(len(written) / most)
    return written[::-1][::every][::-1]


def since(written: list[dict]) -> list[dict[str, Any]]:
    """What was added from each line to the next, per step. Where the handle's count of steps has not grown with the number of
    the step it was reset in between, and the line stands for itself."""
    found, before = [], None
    for line in written:
        if before and line["step"] == before["step"]:
            continue  # two sinks wrote it
        begun = {"steps": 0, "bytes_raw": 0, "bytes_wire": 0}
        if before and line["steps"] - before["steps"] == line["step"] - before["step"]:
            begun = before
        steps = line["steps"] - begun["steps"]

        def per_step(now: float | None, then: float | None) -> float | None:
            return None if now is None or steps <= 0 else max(0.0, (now - (then or 0.0)) / steps)

        total = lambda source, name: source[f"{name}_ms"] * source["steps"] if source.get(f"{name}_ms") is not None else None
        found.append({
            "step": line["step"], "steps": steps, "raw": per_step(line["bytes_raw"], begun["bytes_raw"]) or 0.0, "wire": per_step(line["bytes_wire"], begun["bytes_wire"]) or 0.0,
            **{f"{name}_ms": per_step(total(line, name), total(begun, name)) or 0.0 for name in TIMES}, "predicted_ms": line.get("predicted_ms"),
            "residual_norm": line.get("residual_norm"), "nonfinite_steps": line.get("nonfinite_steps"), "spec": _specs(line.get("spec"))})
        before = line
    return found


def _specs(by_bucket: dict[str, Any] | None) -> str:
    """Those of all buckets, each once."""
    specs = [spec for of in (by_bucket or {}).values() for spec in (of if isinstance(of, list) else [of])]
    return " and ".join(dict.fromkeys(map(str, specs))) or "–"


def numbers(steps: list[dict[str, Any]]) -> Markup:
    columns = [("step", True), ("spec", False)] + [(title, True) for title in (
        "gradients, MB", "sent, MB", "residual norm", "exposed, ms", "encode, ms", "comm, ms", "decode, ms", "predicted, ms", "non-finite steps")]
    return table(columns, [[
        fixed(step["step"], 0), step["spec"], fixed(step["raw"] / 1e6, 3), fixed(step["wire"] / 1e6, 3),
        "–" if step["residual_norm"] is None else f"{step['residual_norm']:.4g}", *(fixed(step[f"{name}_ms"], 2) for name in TIMES),
        fixed(step["predicted_ms"], 1), fixed(step["nonfinite_steps"], 0)] for step in steps])
