"""The numbers themselves."""

from collections.abc import Iterable

from .markup import Child, Markup, tag

Column = tuple[str, bool]  # its title with the unit; whether it has numbers, which are aligned to the right


def table(columns: list[Column], rows: Iterable[list[str]]) -> Markup:
    """The first cell of a row names it."""
    head = tag("tr", [tag("th", title, scope="col", class_="number" if numeric else None) for title, numeric in columns])
    body = [tag("tr", [tag("td" if i else "th", cell if i else _broken(cell), scope=None if i else "row", class_="number" if columns[i][1] else None)
                       for i, cell in enumerate(row)]) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="table", tabindex=0)


def _broken(name: str) -> list[Child]:
    """May be broken behind its commas, where the page is narrow."""
    first, *others = name.split(",")
    return [first, *([",", tag("wbr"), other] for other in others)]
