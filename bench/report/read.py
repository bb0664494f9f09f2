"""What is in a file: the result of a bench, or what a training run has logged."""

import json
from pathlib import Path
from typing import Any, NamedTuple

LOGGED = {"step", "steps", "bytes_raw", "bytes_wire"}  # what every line of a log has
_HOW = ("expected the JSON of a bench (`python -m commopt bench step --json FILE`) or the lines that a training run logs "
        "(`handle.log_to(commopt.jsonl(FILE))`)")


class Found(NamedTuple):
    """kind: the name of a bench, or "log". result: what the bench wrote; of a log {"what": ..., "runs": [lines of each]}."""

    name: str
    kind: str
    result: dict[str, Any]


def read(path: str, kinds: list[str]) -> Found:
    """ValueError, which says what was expected and how to get it, unless the file holds one of these kinds."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text; {_HOW}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}; {_HOW}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; {_HOW}. A log begins with the first step that is a multiple of log_to's `every`")
    try:
        value = json.loads(text)
    except ValueError as error:
        return _log(path, text, error)
    if not isinstance(value, dict) or not {"bench", "log", "step"} & set(value):
        raise ValueError(f"{path} is JSON of something else; {_HOW}" + (
            ". A bench's JSON from before commopt wrote its name into it can be given one: \"bench\": \"step\"" if isinstance(value, dict) and {"what", "rows", "runs"} & set(value) else ""))
    if "bench" not in value:
        return _log(path, text, None)
    if value["bench"] not in kinds:
        raise ValueError(f"{path} is of the bench {value['bench']!r}, which has no report; known are {', '.join(k for k in kinds if k != 'log')}")
    rows = "runs" if value["bench"] == "accuracy" else "rows"
    if not value.get("what") or not value.get(rows):
        raise ValueError(f"{path} is of the bench {value['bench']}, but has no {rows if value.get('what') else 'what'}: measure again with "
                         f"`python -m commopt bench {value['bench']} --json {path}`")
    return Found(path, value["bench"], value)


def _log(path: str, text: str, error: ValueError | None) -> Found:
    """The runs in a file of lines: each begins with one that says what it is. The last line may have been cut off."""
    lines, runs, what = text.splitlines(), [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            if runs and number == len(lines):
                break
            raise ValueError(f"{path} is not JSON: {error}; {_HOW}" if not runs else f"{path}, line {number} is not JSON; {_HOW}") from None
        if isinstance(value, dict) and isinstance(value.get("log"), dict):
            what = value["log"]
            runs.append([])
        elif isinstance(value, dict) and LOGGED <= set(value):
            runs = runs or [[]]
            runs[-1].append(value)
        else:
            raise ValueError(f"{path}, line {number} is JSON of something else; {_HOW}")
    runs = [run for run in runs if run]
    if not runs:
        raise ValueError(f"{path} is a log without a step: `handle.log_to(sink, every=50)` writes every 50th step, and none has come yet")
    return Found(path, "log", {**{key: what[key] for key in ("command", "date") if key in what},
                               "what": {key: value for key, value in what.items() if key not in ("command", "date")}, "runs": runs})
