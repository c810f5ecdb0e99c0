"""Hosts with a wire between them: it is as slow as it says, and the loss is right across it."""

from __future__ import annotations

import argparse
import socket
import time

import network
import pytest
from harness import hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(hosts.why_not()), reason=f"hosts on one machine: {hosts.why_not()}"),
]


@pytest.mark.parametrize("latency", [0.0, 0.005])
def test_a_wire_has_its_latency(latency: float) -> None:
    with hosts.joined(latency, 0.0):
        with hosts.inside(0):
            server = socket.create_server((hosts.address(0), 0))
        with hosts.inside(1):
            client = socket.create_connection(server.getsockname())
        with server, client, server.accept()[0] as accepted:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            times = []
            for _ in range(9):
                begun = time.monotonic()
                client.send(b"there")
                assert accepted.recv(5) == b"there"
                accepted.send(b"back")
                assert client.recv(4) == b"back"
                times.append(time.monotonic() - begun)
        assert 2 * latency <= min(times) < 2 * latency + 0.004


def test_a_wire_loses_what_it_says() -> None:
    sent = 200  # as many as a socket holds
    with hosts.joined(0.0, 0.25):
        ends = []
        for host in hosts.HOSTS:
            with hosts.inside(host):
                end = socket.socket(type=socket.SOCK_DGRAM)
                end.bind((hosts.address(host), 0))
                end.settimeout(0.5)
                ends.append(end)
        with ends[0], ends[1]:
            arrived = 0
            for _ in range(sent):
                ends[0].sendto(b"x", ends[1].getsockname())
                time.sleep(0.001)
            try:
                for _ in range(sent):
                    arrived += len(ends[1].recv(1))
            except TimeoutError:
                pass
    assert 0.6 * sent < arrived < 0.9 * sent


def test_the_loss_is_right_and_waits_for_few_round_trips() -> None:
    """One for the notes, one for the partials and their acknowledgement; each of two latencies."""
    asked = argparse.Namespace(repeats=9, world_size=2, seconds=network.SECONDS, quick=True)
    latency = 0.02
    found = network.measure(1e3 * latency, 0.01, asked)
    for rank in found["error"]:
        assert rank["loss"] < 1e-6 and rank["gradient"] < 1e-6
    for rank in found["measure_times"]:
        fastest = min(rank["seconds"][network.NAMES[0]]["total"])
        assert latency < fastest < 6 * latency
