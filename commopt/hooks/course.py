"""What each step compresses with: the same on all ranks."""

from ..compressors import STEADY, Compressor, parse

Active = tuple[Compressor, dict[str, Compressor]]  # of one step: the spec, and that of each rule


class Course:
    """spec, rules, start_step: see `State`. paused: whether the next step averages exactly all the same.

    now: what this step compresses with; None: nothing, it averages exactly.
    """

    def __init__(self, spec: str | Compressor, rules: dict[str, str | Compressor], start_step: int):
        self.spec, self.rules = parse(spec), {patterns: parse(rule) for patterns, rule in rules.items()}
        if not isinstance(start_step, int) or start_step < 0:
            raise ValueError(f"start_step must be the number of a step, 0 or more, got {start_step!r}")
        self.start_step = start_step
        self.paused = False
        self.now: Active | None = None
        self._said = _text(None)  # made once: every step says it

    def turn(self, step: int) -> bool:
        """The step begins. Whether it compresses with something else than the one before."""
        before, self.now = self.now, None if self.paused or step < self.start_step else self._at(step - self.start_step)
        if turned := self.now != before:
            self._said = _text(self.now)
        return turned

    @property
    def warming_up(self) -> bool:
        return self.now != self._at(STEADY)

    def _at(self, compressed: int) -> Active:
        """Spec and rules in that compressed step, counted from 0."""
        return self.spec.at(compressed), {patterns: rule.at(compressed) for patterns, rule in self.rules.items()}

    def __str__(self) -> str:
        """What this step does."""
        return self._said


def _text(active: Active | None) -> str:
    if active is None:
        return "exact averages"
    spec, rules = active
    return str(spec) + "".join(f", {patterns} {rule}" for patterns, rule in rules.items())
