"""A slow network on one Linux machine: every rank in a network namespace of its own, its egress shaped by `tc tbf`.

    rank 0: eth0 --tbf--+
    rank 1: eth0 --tbf--+-- bridge, in one more namespace
    ...                 |

Or ranks on machines of several, each machine with a switch of its own and what leaves it shaped:

    rank 0: eth0 --+-- machine 0: uplink --tbf--+
    rank 1: eth0 --+                            +-- bridge
    rank 2: eth0 --+-- machine 1: uplink --tbf--+

A latency of a link, one way, is added where the switch passes a packet on to a port: by `tc netem`, or, where the kernel has none,
by a bridge in user space, see switch.py, which keeps up with _KEEPS_UP bits per second from each port.

Nothing is made in the namespace of the machine, so that its addresses, routes and firewall neither matter nor change.
Names carry the pid: what a killed process left behind is removed by the next one that starts.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

from . import switch

DEVICE = "eth0"  # the interface of a rank, in its namespace
UPLINK = "uplink"  # that of a machine of several ranks
_PORT = 29500  # of the rendezvous, on rank 0's address: nothing else listens in a fresh namespace
_MTU = 1500
_CONGESTION = "cubic"  # Linux's default, whatever is set on this machine: others share a slow link otherwise
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21  # see capabilities(7)
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = r"[0-9]*\.?[0-9]+"
_KEEPS_UP = 2e9
EMULATE = "over a link shaped to RATE per rank, with LATENCY one way, such as 1gbit or 1gbit,1ms; needs root. Default: the loopback"  # the option's help
_numbers = itertools.count()


def bits_per_second(emulate: str) -> float:
    """The rate of RATE[,LATENCY]: "1gbit,1ms" -> 1e9."""
    return _read(emulate)[0]


def latency(emulate: str) -> float:
    """The seconds one way of RATE[,LATENCY]: "1gbit,1ms" -> 0.001, "1gbit" -> 0."""
    return _read(emulate)[1]


def _read(emulate: str) -> tuple[float, float]:
    rate, comma, late = (part.strip().lower() for part in emulate.partition(","))
    rate_match = re.fullmatch(rf"({_NUMBER})\s*([kmg]bit)(?:/s)?", rate)
    late_match = re.fullmatch(rf"({_NUMBER})\s*(us|ms|s)", late)
    if not rate_match or not float(rate_match[1]) or (comma and not late_match):
        raise ValueError("a link must be RATE or RATE,LATENCY: a number and kbit, mbit or gbit, and for one way a number and us, ms or s, "
                         f"like 100mbit or 1gbit,1ms, got {emulate!r}")
    return float(rate_match[1]) * _UNITS[rate_match[2]], float(late_match[1]) * _UNITS[late_match[2]] if comma else 0.0


def missing() -> str | None:
    """What this machine lacks for an emulated network and how to get it, or None."""
    if not os.path.exists("/proc/self/ns/net"):
        return "network namespaces are a feature of Linux: use a Linux machine or container"
    if tools := [tool for tool in ("ip", "tc") if not _path(tool)]:
        return f"{' and '.join(tools)} not found: install iproute2 (apt-get install iproute2)"
    with open("/proc/self/status") as file:
        rights = int(re.search(r"^CapEff:\s*([0-9a-f]+)", file.read(), re.MULTILINE)[1], 16)
    if not rights >> _CAP_NET_ADMIN & rights >> _CAP_SYS_ADMIN & 1:
        return "making network namespaces needs root: run it with sudo, or in a container started with --privileged"
    return None


class Link:
    """Context manager: `world` ranks on a network where each machine, of `machine` ranks, sends at most at the rate of
    `emulate`, e.g. "1gbit" or "1gbit,1ms", and what it sends arrives a latency later; None is unshaped.

    It is entered by a thread that lives as long as the network: a switch in user space ends with it."""

    def __init__(self, world: int, emulate: str | None, machine: int = 1):
        if world < 2:
            raise ValueError(f"a network needs at least 2 ranks, got {world}")
        if machine < 1:
            raise ValueError(f"a machine needs at least 1 rank, got {machine}")
        self.latency = latency(emulate) if emulate is not None else 0.0
        self.world, self.emulate, self.machine = world, emulate, machine
        prefix = f"commopt-{os.getpid()}-{next(_numbers)}"
        self._switch = f"{prefix}-switch"
        self.namespaces = [f"{prefix}-{rank}" for rank in range(world)]
        self.machines = [f"{prefix}-machine{i}" for i in range(-(-world // machine))] if machine > 1 else []
        self.entered = False
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> "Link":
        if lack := missing():
            raise RuntimeError(f"an emulated network cannot be made here: {lack}")
        _remove(name for name in _existing() if not os.path.exists(f"/proc/{name.split('-')[1]}"))
        with contextlib.ExitStack() as exits:
            exits.callback(lambda: _remove({self._switch, *self.machines, *self.namespaces} & set(_existing())))
            exits.enter_context(sigterm_raises())
            self._make(exits)
            self._exits = exits.pop_all()
        self.entered = True
        return self

    def __exit__(self, *exception) -> None:
        self.entered = False
        self._exits.close()

    def _make(self, exits: contextlib.ExitStack) -> None:
        names = {self._switch, *self.machines, *self.namespaces}
        for name in names:
            _ip("netns", "add", name)
        shaped = [(name, UPLINK) for name in self.machines] or [(name, DEVICE) for name in self.namespaces]
        self._connect_all(shaped, exits)
        for i, name in enumerate(self.machines):
            _add_bridge(name)
            _ip("-n", name, "link", "set", UPLINK, "master", "bridge")
            for rank in range(i * self.machine, min((i + 1) * self.machine, self.world)):
                _connect(self.namespaces[rank], DEVICE, name, f"port{rank}")
        for rank, name in enumerate(self.namespaces):
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", DEVICE, "address", switch.address(rank))
            _ip("-n", name, "address", "add", f"{_address(rank)}/16", "dev", DEVICE)
            if _CONGESTION in _available():
                _ip("-n", name, "route", "replace", "10.77.0.0/16", "dev", DEVICE, "src", _address(rank), "congctl", _CONGESTION)
            if self.emulate is not None:  # what is more than the burst would be cut, and counted with the headers of each piece
                _ip("-n", name, "link", "set", DEVICE, "gso_max_size", str(min(1 << 16, _burst(self.emulate) * 9 // 10)))
        for name, device in shaped if self.emulate is not None else []:
            shape(self.emulate, name, device)

    def _connect_all(self, ports: list[tuple[str, str]], exits: contextlib.ExitStack) -> None:
        """Makes each interface and its cable to the switch, on which packets take the latency."""
        netem = self.latency and _has_netem(self._switch)
        if self.latency and not netem:
            return self._connect_in_user_space(ports, exits)
        _add_bridge(self._switch)
        for i, (name, device) in enumerate(ports):
            _connect(name, device, self._switch, f"port{i}")
            if netem:
                _run([_path("tc"), "-n", self._switch, "qdisc", "add", "dev", f"port{i}", "root", "netem",
                      "delay", f"{1e6 * self.latency:.0f}us", "limit", "100000"])

    def _connect_in_user_space(self, ports: list[tuple[str, str]], exits: contextlib.ExitStack) -> None:
        if bits_per_second(self.emulate) > _KEEPS_UP:
            raise RuntimeError(f"an emulated network cannot be made here: with a latency it keeps up with {_KEEPS_UP / 1e9:.0f}gbit, got {self.emulate}. "
                               "More needs a kernel with the module sch_netem")
        arguments = [str(os.getpid()), str(self.latency), str(self.machine), *itertools.chain.from_iterable(ports)]
        process = subprocess.Popen([sys.executable, "-I", switch.__file__, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, start_new_session=True)
        exits.callback(process.wait)
        exits.callback(process.kill)
        with process.stdout:
            if (said := process.stdout.readline()) != "ready\n":
                said = (said + process.stdout.read()).strip().splitlines()[-1:]
                raise RuntimeError(f"an emulated network cannot be made here: the switch that adds a latency failed: {''.join(said)}. It needs /dev/net/tun "
                                   "(in a container: --device /dev/net/tun), or a kernel with the module sch_netem")
        for name, device in ports:
            _ip("-n", name, "link", "set", device, "mtu", str(_MTU), "up")

    def command(self, rank: int, command: list[str]) -> list[str]:
        """The command line that runs `command` in the namespace of a rank."""
        return [_path("ip"), "netns", "exec", self.namespaces[rank], *command]

    def environment(self) -> dict[str, str]:
        """What torch needs in the environment to meet on this network."""
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # c10d warns of addresses that have no name
        return {"MASTER_ADDR": _address(0), "MASTER_PORT": str(_PORT), "GLOO_SOCKET_IFNAME": DEVICE} | quiet

    def counters(self, rank: int) -> tuple[int, int]:
        """Bytes that a rank's interface sent and received."""
        return counters(self.namespaces[rank])


def counters(namespace: str | None = None, device: str = DEVICE) -> tuple[int, int]:
    """Bytes sent and received by an interface. namespace: by default the one of the rank that calls this."""
    if namespace is None:
        with open("/proc/net/dev") as file:
            return _read_counters(file.read(), device)
    return _read_counters(_run([_path("ip"), "netns", "exec", namespace, "cat", "/proc/net/dev"]), device)


def shape(rate: str | None, namespace: str | None = None, device: str = DEVICE) -> None:
    """Limits what an interface sends; None lifts the limit. namespace: by default the one that the caller runs in."""
    where = [_path("tc")] + (["-n", namespace] if namespace else [])
    if rate is None:
        if " tbf " in _run([*where, "qdisc", "show", "dev", device]):
            _run([*where, "qdisc", "del", "dev", device, "root"])
        return
    # The limit is the queue: TCP holds back long before it is full.
    bits = bits_per_second(rate)
    _run([*where, "qdisc", "replace", "dev", device, "root", "tbf",
          "rate", f"{int(bits)}bit", "burst", f"{_burst(rate)}b", "limit", f"{max(1 << 20, int(bits / 160))}b"])


def _burst(rate: str) -> int:
    """Bytes that may be sent at once after a pause. Too few, and every late timer of a busy machine loses rate; too many, and
    small messages travel for nothing."""
    return max(16 * 1024, int(bits_per_second(rate) / 8e3))


@contextlib.contextmanager
def unshaped(rate: str | None) -> Iterator[None]:
    """Called by a rank in its namespace: set-up in this block runs at full speed, and what comes after it at `rate`."""
    shape(None)
    try:
        yield
    finally:
        if rate is not None:
            shape(rate)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """In this block SIGTERM raises SystemExit, so that what was begun is cleaned up."""

    def stop(signum, frame) -> None:
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _available() -> list[str]:
    """The ways of TCP's congestion control that this kernel has."""
    with open("/proc/sys/net/ipv4/tcp_available_congestion_control") as file:
        return file.read().split()


def _address(rank: int) -> str:
    return f"10.77.{(rank + 1) // 256}.{(rank + 1) % 256}"


def _path(tool: str) -> str | None:
    return shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"an emulated network cannot be made here: `{' '.join(command)}` failed: {done.stderr.strip()}. "
                           "It needs the rights and the kernel modules for namespaces, veth, bridge and sch_tbf")
    return done.stdout


def _ip(*arguments: str) -> str:
    return _run([_path("ip"), *arguments])


def _has_netem(namespace: str) -> bool:
    """Whether the kernel has it, or can load it. Tried where nothing is sent."""
    return not subprocess.run([_path("tc"), "-n", namespace, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"], capture_output=True).returncode


def _add_bridge(namespace: str) -> None:
    _ip("-n", namespace, "link", "add", "bridge", "type", "bridge")
    _ip("-n", namespace, "link", "set", "bridge", "up")


def _connect(namespace: str, device: str, switch: str, port: str) -> None:
    """A cable from a new interface in the namespace to a new port of the switch."""
    _ip("-n", namespace, "link", "add", device, "mtu", str(_MTU), "type", "veth", "peer", "name", port, "mtu", str(_MTU), "netns", switch)
    _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
    _ip("-n", namespace, "link", "set", device, "up")


def _existing() -> list[str]:
    return [name for name in (line.split()[0] for line in _ip("netns", "list").splitlines() if line) if re.match(r"commopt-\d+-", name)]


def _remove(names) -> None:
    for name in names:  # its interfaces go with it; a process that is left in it keeps it until it ends
        subprocess.run([_path("ip"), "netns", "delete", name], capture_output=True)


def _read_counters(text: str, device: str) -> tuple[int, int]:
    line = next(line for line in text.splitlines() if line.strip().startswith(device + ":"))
    values = line.split(":")[1].split()
    return int(values[8]), int(values[0])
