"""What was run, as a result says it: command, versions, link, ranks and all else in its `what`."""

from collections.abc import Callable
from typing import Any

from .markup import Child, Markup, tag
from .scale import number
from .units import binary

TITLES: dict[str, tuple[str, Callable[[Any], str]]] = {  # where the key of `what` is not the title, or its number has a unit
    "world": ("ranks", str),
    "machine": ("ranks on a machine", str),
    "threads": ("threads of a rank", str),
    "buckets": ("buckets", lambda sizes: ", ".join(binary(size) for size in sizes)),
    "bucket_mb": ("bucket cap", lambda size: f"{size:g} MiB"),
    "latency": ("latency found", lambda seconds: f"{number(1e3 * seconds)} ms"),
    "rate": ("rate found", lambda rate: f"{number(8e-6 * rate)} Mbit/s for a rank"),
    "accumulate": ("passes a step", str),
    "lr": ("learning rate", lambda rate: f"{rate:g}"),
}


def circumstances(result: dict[str, Any]) -> list[Child]:
    what = dict(result["what"])
    if result.get("bench") == "kernels" and "machine" in what:  # there the name of the processor
        titles = {**TITLES, "machine": ("machine", str)}
    else:
        titles = TITLES
    said: list[Child] = [tag("p", tag("code", f"$ {result['command']}"), class_="command")] if result.get("command") else []
    items = []
    for key, value in what.items():
        title, form = titles.get(key, (key.replace("_", " "), _plainly))
        try:
            text = "–" if value is None else form(value)
        except (TypeError, ValueError):  # what a later version writes in another way
            text = str(value)
        items.append(_item(title, text))
    if result.get("date"):
        items.append(_item("date", str(result["date"])))
    return said + ([tag("dl", items)] if items else [])


def _item(title: str, text: str) -> Markup:
    return tag("div", tag("dt", title), tag("dd", text))


def _plainly(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plainly, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else number(value) if isinstance(value, float) else str(value)
