from typing import Literal

from .base import Schedule, register


@register("delayed")
class Delayed(Schedule):
    """Nothing waits for the exchange of a step: what it brings is applied one step later, with a correction that makes up for it.

        step = max(forward + backward, communication)

    Delay alone makes training diverge at learning rates that the synchronous one takes well: with momentum 0.9 it bears a
    fifth of them. What corrects it:

    half    A step has k >= 2 backward passes, all but the last under ddp.no_sync(). Of step t, a_t is the gradient of the first
            h = k // 2 and b_t that of the others, which are computed while a_t travels; b_t travels during the next step's first h.
            m(x) is the mean of x over ranks, `step` the optimizer's:

                ~theta_t+1, _    = step(theta_t, state_t, (k / h) m(a_t))     what optimizer.step() does: an estimate
                theta_t+1, state = step(theta_t, state_t, m(a_t) + m(b_t))    when b_t has come: parameters and state as they were

            a_t+1 is computed at ~theta_t+1 and b_t+1 at theta_t+1. No applied gradient is older than its step, and ranks hold the
            same bits throughout. See `halves`. Memory: two gradients, and a copy of the parameters and of the optimizer's state.
            Liu et al., ACCO: Accumulate while COmmunicate, arXiv 2406.02613, 2024.
    local   This rank's own gradient g_t at once, and what the others' differed from it by one step ago:

                x_t = g_t + (m(g_t-1) - g_t-1)

            For any number of passes. Ranks drift apart by one correction, lr (m(g_t) - g_t), and are brought together every 64 steps:
            see `local_first`. Memory: two gradients. With Adam and data that differs from rank to rank it costs accuracy.

    Both average exactly as they go in their first two steps, refuse a GradScaler, optimizer.step(closure), sparse gradients
    and DDP's join(), and stop a training that diverges: see `divergence`.
    """

    correction: Literal["half", "local"] = "half"

    waits = "next step"
