"""Few rows on a GPU: there the time goes into launching kernels, and how one calls decides.

``latency`` is the wall time of forward and backward on an idle device, until it is idle again.
``graph`` is their share of the replay of a CUDA graph that holds such calls on every batch of the
rotation, one after the other. The times of ``timing.py`` are in between: the host is ahead of the
device, as it is in training.
"""

import time
from typing import Any

import torch
from contenders.cases import Rotation
from contenders.contender import Runner

from .device import Device
from .progress import LOST, DeviceLostError, Entry, describe_error
from .timing import GRAPH, LATENCY, Times

ROUNDS = 50
GRAPH_ROUNDS = 20


def call(runner: Runner, arguments: Any) -> None:
    result = runner.forward(arguments)
    if runner.has_backward:
        runner.backward(result)


def time_latency(runner: Runner, rotation: Rotation, device: Device) -> list[float]:
    times = []
    for _ in range(ROUNDS):
        arguments = runner.prepare(rotation.next())
        device.wait()
        begin = time.perf_counter()
        call(runner, arguments)
        device.wait()
        times.append(time.perf_counter() - begin)
    return times


def synchronises(runner: Runner, rotation: Rotation) -> str:
    """What a call waits for the device with, so that it cannot be captured; "" if it does not."""
    arguments = runner.prepare(rotation.full_turn()[0])
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(runner, arguments)
    except RuntimeError as error:
        return describe_error(error)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return ""


def capture(runner: Runner, rotation: Rotation) -> torch.cuda.CUDAGraph:
    batches = rotation.full_turn()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as the documentation of CUDA graphs asks for
        for batch in batches[:2]:
            call(runner, runner.prepare(batch))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for batch in batches:
            call(runner, runner.prepare(batch))
    return graph


def time_graph(runner: Runner, rotation: Rotation, device: Device) -> list[float]:
    graph = capture(runner, rotation)
    times = []
    for _ in range(1 + GRAPH_ROUNDS):
        rotation.full_turn()  # what a replay has overwritten
        device.get_ahead()
        begin = device.mark()
        graph.replay()
        end = device.mark()
        times.append(device.seconds(begin, end) / rotation.count)
    device.wait()
    return times[1:]


def time_launches(
    runners: list[Runner], rotation: Rotation, device: Device, times: dict[str, Times], entry: Entry
) -> None:
    """Add both to the times of a case, and to its entry what could not be captured.

    A capture that fails leaves allocator and random numbers unusable. It is tried only with what
    does not synchronise, and if it fails all the same, this process is of no more use.
    """
    latencies = entry.for_each(LATENCY, runners, lambda each: time_latency(each, rotation, device))
    for name, seconds in latencies.items():
        times[name][LATENCY] = seconds
    for runner in runners:
        graph = f"{GRAPH} of {runner.name}"
        if graph in entry.failed or graph in entry.progress.culprits():
            continue
        if reason := synchronises(runner, rotation):
            entry.fail(graph, f"it synchronises: {reason}")
            continue
        try:
            times[runner.name][GRAPH] = time_graph(runner, rotation, device)
        except Exception as error:
            entry.fail(graph, f"{LOST}: {describe_error(error)}")
            raise DeviceLostError(f"{graph}: {describe_error(error)}") from error
