"""The grammar of specs: `name[:key=value[,key=value...]]`, for example `topk:ratio=0.01` or `int4:block=64,ef=false`.

A spec names a frozen dataclass; its keys are the fields, with their types and defaults, and `parse(str(c)) == c`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints


class Table:
    """The classes of one kind ("compressor", "schedule") by the name that a spec gives them."""

    def __init__(self, kind: str):
        self.kind = kind
        self.classes: dict[str, type] = {}
        self._composed: dict[str, type] = {}

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator: makes the class a frozen dataclass that specs can name."""
        if not name or set(name) & set(":,= "):
            raise ValueError(f"a {self.kind}'s name must be a word without ':', ',', '=' or blanks, got {name!r}")

        def decorate(cls: type) -> type:
            if name in self.classes:
                raise ValueError(f"{self.kind} {name!r} is already registered, by {self.classes[name].__qualname__}")
            cls = dataclasses.dataclass(frozen=True)(cls)
            cls.name = name
            cls.__str__ = to_string
            self.classes[name] = cls
            return cls

        return decorate

    def composed(self, beginning: str) -> Callable[[type], type]:
        """Class decorator: specs that begin so are made of others, and the class's `read` makes an instance of one."""

        def decorate(cls: type) -> type:
            self._composed[beginning] = cls
            return cls

        return decorate

    def parse(self, spec: Any) -> Any:
        """The instance that `spec` describes; an instance is returned as it is."""
        if type(spec) in (*self.classes.values(), *self._composed.values()):
            return spec
        if not isinstance(spec, str):
            raise ValueError(f"a {self.kind} must be a spec like {self._example()!r}, got {spec!r}")
        for beginning, cls in self._composed.items():
            if spec.strip().startswith(beginning):
                return cls.read(spec.strip())
        name, colon, rest = spec.strip().partition(":")
        if name not in self.classes:
            raise ValueError(f"unknown {self.kind} {name!r} in {spec!r}; known are {', '.join(sorted(self.classes))}")
        cls, values = self.classes[name], {}
        for item in rest.split(",") if colon else ():
            key, equals, text = (part.strip() for part in item.partition("="))
            if not equals or key not in keys(cls):
                known = ", ".join(f"{k}={_show(d)} ({_type_name(t)})" for k, (t, d) in keys(cls).items())
                raise ValueError(f"{spec!r}: {item!r} is not a key=value that {name} takes; it takes {known or 'none'}")
            if key in values:
                raise ValueError(f"{spec!r}: {key} is given twice")
            values[key] = _read(text, keys(cls)[key][0], key, spec)
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{spec!r}: {error}") from None

    def _example(self) -> str:
        return next(iter(self.classes), "name")


def keys(cls: type) -> dict[str, tuple[type, Any]]:
    """Key -> (type, default) of a registered class."""
    hints = get_type_hints(cls)
    return {f.name: (hints[f.name], f.default) for f in dataclasses.fields(cls)}


def to_string(self) -> str:
    """The shortest spec that parses to this."""
    given = [f"{k}={_show(getattr(self, k))}" for k, (_, default) in keys(type(self)).items() if getattr(self, k) != default]
    return self.name + (":" + ",".join(given) if given else "")


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(hint: Any) -> str:
    return " | ".join(get_args(hint)) if get_origin(hint) is Literal else hint.__name__


def _read(text: str, hint: Any, key: str, spec: str) -> Any:
    try:
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        if get_origin(hint) is Literal:
            return {choice: choice for choice in get_args(hint)}[text]
        return hint(text)
    except (KeyError, ValueError):
        wanted = "true or false" if hint is bool else _type_name(hint)
        raise ValueError(f"{spec!r}: {key} must be {wanted}, got {text!r}") from None
