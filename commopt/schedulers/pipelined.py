from .base import Schedule, register


@register("pipelined")
class Pipelined(Schedule):
    """Each exchange begins when its bucket is ready, and DDP waits for all of them when backward is over. While one travels
    the next is encoded and the one before it decoded, whether they are buckets or pieces of one (see `Plan.pieces`): on the CPU
    kernels and network run without the GIL, in a thread for each phase; on a device on a stream beside the one that computes.
    The default.

        step = forward + max(backward, communication) + the last bucket's transfer + the encoding of one of its pieces, the decoding of one

    Li et al., PyTorch Distributed: Experiences on Accelerating Data Parallel Training, VLDB 2020.
    """

    waits = "backward"
