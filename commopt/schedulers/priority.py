from .base import Schedule, register


@register("priority")
class Priority(Schedule):
    """What the next forward needs first is sent first. Communication goes on when backward is over, and each bucket's
    optimizer step is taken just before the next forward uses the bucket (see `deferral`).

        step = max(forward + backward, communication) + what is left of the forward when the last bucket comes

    Buckets go in pieces on a fixed grid (see `Plan.pieces`), also where they are summed as they are, so that the first layers' part
    of a large one need not wait for the rest of it, nor behind another.

    A rank that chose for itself what to send next could wait for another one that chose otherwise, for ever: here the order
    is planned on rank 0, from what all ranks have measured, and all launch in that order (see `order`, `launcher`). It is
    planned in the first steps and looked at again every 64.

    Jayarajan et al., Priority-based Parameter Propagation for Distributed DNN Training, MLSys 2019; Peng et al., A Generic
    Communication Scheduler for Distributed DNN Training Acceleration (ByteScheduler), SOSP 2019; Hashemi et al., TicTac:
    Accelerating Distributed Deep Learning with Communication Scheduling, MLSys 2019, which plans the order.
    """

    waits = "use"
    planned = True
