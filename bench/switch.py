"""A switch in user space that holds every frame for a latency before it passes it on: what netem does, for kernels without it.

    python switch.py PARENT SECONDS RANKS NAMESPACE DEVICE [NAMESPACE DEVICE]...

Makes DEVICE in each network namespace, a TAP whose cable ends here, prints a line when all are there, and serves each port by a
process of its own. Behind a port are RANKS ranks, whose interfaces have address(0), address(1), ... in the order of the ports.
Frames come whole from TCP, up to 64 KiB with checksums to be filled in, and leave so: a process in Python keeps up with 2 Gbit/s.
All end with the process PARENT, by whatever signal, and the devices with them. Imports nothing but the standard library, so that
it starts at once.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import struct
import sys
import time
from collections import deque

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0  # see linux/if_tun.h
_TAP, _NO_PROTOCOL, _VIRTIO_HEADER = 0x0002, 0x1000, 0x4000
_CHECKSUM, _TCP4, _TCP6, _ECN = 1, 2, 4, 8
_NEWNET = 0x40000000
_PDEATHSIG, _TIMERSLACK = 1, 29  # see prctl(2)
_HEADER = 10  # bytes before a frame, which say what of it is left to the receiver
_OURS = bytes.fromhex("02004d4d")  # addresses given by hand begin with 02
_LARGEST = 1 << 17
_AT_A_TIME = 16  # frames of one port, before others and what is due get their turn


def open_tap(libc: ctypes.CDLL, namespace: str, device: str) -> int:
    """The file whose frames are those that leave the device, and that takes those which arrive."""
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), _NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _TAP | _NO_PROTOCOL | _VIRTIO_HEADER))
    fcntl.ioctl(tap, _TUNSETOFFLOAD, _CHECKSUM | _TCP4 | _TCP6 | _ECN)
    return tap


def address(rank: int) -> str:
    """Of a rank's interface, which tells where it is."""
    return (_OURS + rank.to_bytes(2, "big")).hex(":")


def serve(source: int, taps: list[int], ranks: int, latency: float) -> None:
    """Passes on the frames that come from one port, each `latency` seconds after it was read, in their order."""
    others = [tap for tap in taps if tap != source]
    held: deque[tuple[float, bytes]] = deque()  # due, frame
    while True:
        readable, _, _ = select.select([source], [], [], max(0.0, held[0][0] - time.perf_counter()) if held else None)
        for _ in range(_AT_A_TIME if readable else 0):
            try:
                frame = os.read(source, _LARGEST)
            except OSError:  # none is left, or the device is not up yet
                break
            held.append((time.perf_counter() + latency, frame))
        now = time.perf_counter()
        while held and held[0][0] <= now:
            _, frame = held.popleft()
            known, rank = frame[_HEADER : _HEADER + 4] == _OURS, int.from_bytes(frame[_HEADER + 4 : _HEADER + 6], "big")
            for tap in [taps[rank // ranks]] if known else others:  # all get what is for all
                with contextlib.suppress(OSError):  # nobody takes it: as lost as on any network
                    os.write(tap, frame)


def ends_with(parent: int) -> None:
    """This process ends when `parent`, which has made it, does."""
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that wanted this switch is gone")


def main() -> None:
    parent, latency, ranks, ports = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    ends_with(parent)
    libc = ctypes.CDLL(None, use_errno=True)
    taps = [open_tap(libc, namespace, device) for namespace, device in zip(ports[::2], ports[1::2])]
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)  # a network does not wait for a processor
    libc.prctl(_TIMERSLACK, 1)
    print("ready", flush=True)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):  # whoever reads these has what it wanted
        os.dup2(nowhere, stream)
    switch, mine = os.getpid(), taps[0]
    for tap in taps[1:]:
        if os.fork() == 0:
            ends_with(switch)
            mine = tap
            break
    serve(mine, taps, ranks, latency)


if __name__ == "__main__":
    main()
