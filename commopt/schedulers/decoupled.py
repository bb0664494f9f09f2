from .base import Schedule, register


@register("decoupled")
class Decoupled(Schedule):
    """The two halves of each exchange have each their own time: the reduce-scatter overlaps with backward and the all-gather
    with the next forward, where a bucket's optimizer step is taken just before the bucket is used (see `deferral`).

        step = max(backward, reduce-scatter) + max(forward, all-gather) + the first and the last bucket's

    A compressed exchange of several rounds is taken apart in the same way; one of a single round, as all are between two
    ranks, goes as in `priority`. The order of all launches is planned as there.

    Zhang et al., Decoupling the All-Reduce Primitive for Accelerating Distributed Deep Learning (DeAR), ICDCS 2023.
    """

    waits = "use"
    planned = splits_sums = True
