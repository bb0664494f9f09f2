"""What each rank has not sent yet, keyed by parameter name: DDP rebuilds its buckets, and a residual must move with its
parameters. One float32 copy of the compressed gradients, held as one flat tensor per plan, with a view per parameter."""

import torch
import torch.distributed as dist
from torch import Tensor

from .plan import Plan


class Residuals:
    def __init__(self):
        self.views: dict[str, Tensor] = {}  # name -> float32 [numel] or [slots, numel], a view of a plan's or a loaded tensor
        self._flats: dict[int, tuple[Plan, Tensor, Tensor | None]] = {}  # plan number -> plan, residual, undo
        self._scale: Tensor | None = None

    def serve(self, plan: Plan) -> None:
        """Gives a new plan its residual, made of what its parameters had before."""
        names = [p.name for p in plan.parameters]
        if not plan.wants_residual:
            return
        for number, (old, flat, undo) in list(self._flats.items()):
            if [p.name for p in old.parameters] == names and flat.device == plan.device and old.slots == plan.slots:
                plan.residual = flat  # the same bucket with another spec: nothing moves
                del self._flats[number]
                self._flats[plan.number] = (plan, flat, undo)
                return
        flat = plan.fresh_residual()
        for name, view in zip(names, flat.split([p.numel for p in plan.parameters], -1)):
            if name in self.views:
                _take_over(view, self.views[name])
            self.views[name] = view
        plan.residual = flat
        held = {view.untyped_storage().data_ptr() for view in self.views.values()}
        self._flats = {i: f for i, f in self._flats.items() if f[1].untyped_storage().data_ptr() in held}
        self._flats[plan.number] = (plan, flat, None if self._scale is None else flat.clone())

    def follow(self, scale: Tensor, backoff: float) -> None:
        """Called before a step's first exchange, when a GradScaler has decided about the step before it. A scale that fell
        by the factor `backoff` means that it skipped that step: every residual goes back to what it was before. Decided on
        the device. Any other change of the scale leaves residuals alone, which are in unscaled units.

        scale: float32 [1], the loss scale now. Costs a copy of the residual, which nothing needs without a GradScaler.
        """
        if self._scale is None:
            self._scale = scale.clone()
        taken = (scale / self._scale.to(scale.device) - backoff).abs() > 1e-6
        for number, (plan, flat, undo) in self._flats.items():
            if undo is None:
                undo = flat.clone()
            else:
                torch.where(taken.to(flat.device), flat, undo, out=undo)
                flat.copy_(undo)
            self._flats[number] = (plan, flat, undo)
        self._scale.copy_(scale)

    def norm(self) -> float:
        norms = [torch.linalg.vector_norm(flat[0] if flat.dim() > 1 else flat).cpu() for _, flat, _ in self._flats.values()]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def mean(self, group: dist.ProcessGroup) -> dict[str, Tensor]:
        """The mean residual of all ranks by name, on the CPU. A collective call."""
        means = {}
        for name in sorted(self.views):
            mean = self.views[name].detach().to("cpu", copy=True).mul_(1.0 / dist.get_world_size(group))
            dist.all_reduce(mean, group=group)
            means[name] = mean
        return means

    def load(self, values: dict[str, Tensor], sizes: dict[str, int]) -> None:
        """Takes over saved residuals, float32 [numel] or [slots, numel]; parameters without one start from nothing.
        sizes: name -> numel of every parameter. ValueError before anything is changed."""
        for name, value in values.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"state['residual'][{name!r}] must be a tensor, got {type(value).__name__}")
            if value.dim() not in (1, 2) or sizes.get(name) != value.shape[-1]:
                raise ValueError(f"state['residual'][{name!r}] is {list(value.shape)}, but the model's parameter has {sizes.get(name, 'no')} elements")
        for name, view in self.views.items():
            if name not in values:
                view.zero_()
        for name, value in values.items():
            if name in self.views:
                _take_over(self.views[name], value)
            else:
                self.views[name] = value.detach().to(torch.float32, copy=True)
        # What was before a skipped step belongs to another history.
        self._flats = {number: (plan, flat, None) for number, (plan, flat, _) in self._flats.items()}
        self._scale = None


def _take_over(view: Tensor, earlier: Tensor) -> None:
    """view <- what was kept earlier, with another number of slots perhaps: a slot that is new is zero."""
    view, earlier = (t if t.dim() > 1 else t[None] for t in (view, earlier.detach()))
    view.zero_()[: len(earlier)].copy_(earlier[: len(view)])
