from .base import Schedule, register


@register("plain")
class Plain(Schedule):
    """The hook encodes, sends, waits and decodes before backward goes on, as hooks do that call `work.wait()`.

        step = forward + backward + every exchange

    What the others are compared with: they give the same parameters, and sooner.
    """

    waits = "hook"
