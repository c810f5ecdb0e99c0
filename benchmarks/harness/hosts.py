"""Hosts on one machine: network namespaces, and between them a wire with latency and loss.

Linux and root, with the command ``ip``. Each host has a TUN device, and the wire is a process that
reads the packets of one and writes them to the other, later, or not at all. It needs no netem.
"""

import ctypes
import fcntl
import os
import random
import select
import struct
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TextIO

DEVICE = "wire"
HOSTS = (0, 1)
_NAMESPACES = Path("/run/netns")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_PACKET = 65_536
_OWNER = "EAFT_EXT_HOSTS_OWNER"


def why_not() -> str:
    """Why there are no hosts here; "" where there are."""
    if not Path("/dev/net/tun").exists():
        return "needs Linux with /dev/net/tun"
    trial = f"eaft-trial{os.getpid()}"
    try:
        for what in ("add", "del"):
            subprocess.run(["ip", "netns", what, trial], capture_output=True, check=True)
    except FileNotFoundError:
        return "needs the command ip, of iproute2"
    except subprocess.CalledProcessError as error:
        return f"needs root that may make network namespaces: {error.stderr.decode().strip()}"
    return ""


def address(host: int) -> str:
    """Of a host, as the other reaches it."""
    return f"10.77.0.{host + 1}"


def enter(host: int) -> None:
    """Let this thread, and those that it starts from now on, use a host's network."""
    with (_NAMESPACES / _name(host)).open() as network:
        _use(network)


@contextmanager
def inside(host: int) -> Iterator[None]:
    """The same for a while."""
    with Path("/proc/thread-self/ns/net").open() as own:
        enter(host)
        try:
            yield
        finally:
            _use(own)


@contextmanager
def joined(latency: float, loss: float) -> Iterator[None]:
    """Both hosts, joined by a wire: seconds from one to the other, and the share that is lost."""
    with ExitStack() as undo:
        os.environ[_OWNER] = str(os.getpid())
        undo.callback(os.environ.pop, _OWNER)
        ends = []
        for host in HOSTS:
            _ip("netns", "add", _name(host))
            undo.callback(_ip, "netns", "del", _name(host))
            tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            undo.callback(os.close, tun)
            made = struct.pack("16sH", f"{_name(host)}".encode(), _IFF_TUN | _IFF_NO_PI)
            fcntl.ioctl(tun, _TUNSETIFF, made)
            _ip("link", "set", _name(host), "netns", _name(host))
            there = ("-n", _name(host))
            _ip(*there, "link", "set", _name(host), "name", DEVICE)
            _ip(*there, "address", "add", f"{address(host)}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _ip(*there, "link", "set", device, "up")
            ends.append(tun)
        wire = get_context("fork").Process(target=_carry, args=(*ends, latency, loss), daemon=True)
        wire.start()
        undo.callback(wire.join)
        undo.callback(wire.kill)
        yield


def _name(host: int) -> str:
    """Of what this process made, or one that it comes from: others may have been left behind."""
    return f"eaft{os.environ[_OWNER]}h{host}"


def _use(network: TextIO) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(network.fileno(), _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "cannot change to another network", network.name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _carry(one: int, other: int, latency: float, loss: float) -> None:
    """From each device to the other; for ever."""
    chance = random.Random(0)
    under_way: deque[tuple[float, int, bytes]] = deque()  # in the order of their arrival
    to = {one: other, other: one}
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        # A sleep is too long by some 60 microseconds: the last 0.1 ms are waited for awake.
        ready, _, _ = select.select([one, other], [], [], wait and max(0.0, wait - 1e-4))
        now = time.monotonic()
        for end in ready:
            packet = os.read(end, _PACKET)
            if chance.random() >= loss:
                under_way.append((now + latency, to[end], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, packet = under_way.popleft()
            os.write(end, packet)
