"""Elements of HTML and SVG as text that is escaped by construction: only what `tag` made is taken as it is."""

import html
import re
from collections.abc import Iterable
from typing import Union

_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that needs no escaping."""


Child = Union[str, None, Iterable["Child"]]


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """tag("text", "a < b", x=3, class_="tick") -> <text x="3" class="tick">a &lt; b</text>. Of a name's trailing underscore and
    of attributes that are None nothing is left; other underscores are hyphens."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{_escaped(_number(value))}"' for key, value in attributes.items() if value is not None)
    if name in ("meta", "wbr"):  # have no end in HTML
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Child) -> Markup:
    if children is None:
        return Markup()
    if isinstance(children, str):
        return children if isinstance(children, Markup) else Markup(_escaped(children))
    return Markup("".join(map(join, children)))


def _number(value: object) -> str:
    """Hundredths of a pixel are enough."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return html.escape(_NOT_IN_XML.sub("\ufffd", text))
