from .base import Schedule, register


@register("with_optimizer")
class WithOptimizer(Schedule):
    """As pipelined, but backward does not wait: optimizer.step() does, and takes a bucket's step while the buckets behind it
    are still under way. What looks at gradients before that, such as clipping by their norm, waits for them there.

        step = forward + max(backward + optimizer, communication) + the last bucket's exchange and step

    For torch's optimizers that treat each parameter for itself; for others it is pipelined. The optimizer steps as it does
    alone. PyTorch's _OptimizerHookState, which needs a functional optimizer of its own kind, has the idea.
    """

    waits = "step"
