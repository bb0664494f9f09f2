"""The page: a section for each file, everything within one document."""

from collections.abc import Callable
from typing import Any

import commopt

from .. import accuracy as bench_accuracy
from .. import bandwidth as bench_bandwidth
from .. import collectives as bench_collectives
from .. import hook as bench_hook
from .. import kernels as bench_kernels
from .. import rivals as bench_rivals
from .. import step as bench_step
from . import accuracy, bandwidth, collectives, hook, kernels, log, rivals, step
from .circumstances import circumstances
from .colours import Colours
from .markup import Child, Markup, tag
from .read import Found, read
from .style import style

Body = Callable[[dict[str, Any], Colours], Child]

KINDS: dict[str, tuple[Body, str]] = {  # kind of a file -> what shows it, and what its numbers are
    "accuracy": (accuracy.body, bench_accuracy.__doc__),
    "bandwidth": (bandwidth.body, bench_bandwidth.__doc__),
    "collectives": (collectives.body, bench_collectives.__doc__),
    "hook": (hook.body, bench_hook.__doc__),
    "kernels": (kernels.body, bench_kernels.__doc__),
    "rivals": (rivals.body, bench_rivals.__doc__),
    "step": (step.body, bench_step.__doc__),
    "log": (log.body, commopt.State.stats.__doc__),
}


def page(paths: list[str]) -> str:
    """The HTML of a report on these files. ValueError for one that cannot be shown."""
    found, colours = [read(path, list(KINDS)) for path in paths], Colours()
    sections = [_section(i, one, colours) for i, one in enumerate(found, 1)]
    title = "commopt report"
    names = ", ".join(dict.fromkeys(_title(one) for one in found))
    contents = tag("nav", tag("ul", [tag("li", tag("a", f"{_title(one)}: {one.name}", href=f"#s{i}")) for i, one in enumerate(found, 1)]), aria_label="Contents")
    head = tag("head", tag("meta", charset="utf-8"), tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("meta", name="color-scheme", content="light dark"), tag("title", f"{title}: {names}"), tag("style", Markup(style())))
    body = tag("body", tag("main", tag("header", tag("h1", title), tag("p", names, class_="about"), contents if len(found) > 1 else None), sections))
    return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"


def _title(one: Found) -> str:
    return "Training run" if one.kind == "log" else f"bench {one.kind}"


def _section(number: int, one: Found, colours: Colours) -> Markup:
    body, meaning = KINDS[one.kind]
    try:
        shown = body(one.result, colours)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:  # written by another version, or by hand
        raise ValueError(f"{one.name} does not have what a report of {_title(one)} needs ({type(error).__name__}: {error}); it was written by "
                         f"commopt {_version(one.result)}, this is {commopt.__version__}: measure again, or make the report with that version") from error
    heading = tag("h2", _title(one), tag("small", one.name))
    explained = tag("details", tag("summary", "What the numbers are"), tag("pre", (meaning or "").strip()))
    return tag("section", heading, circumstances(one.result), shown, explained, id=f"s{number}")


def _version(result: dict[str, Any]) -> str:
    """That a result says it was written by."""
    some = [one.get("what") for one in result.get("results", [result]) if isinstance(one, dict)]
    return next((what["commopt"] for what in some if isinstance(what, dict) and "commopt" in what), "an unknown version")
