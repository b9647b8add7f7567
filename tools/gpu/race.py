"""Timing on a GPU: CUDA graphs over rotating copies of the weights, contestants interleaved, medians.

One launch is a graph of enough calls that the weights they touch exceed the L2 cache several times. All contestants are
captured first and then replayed in turn (A, B, C, A, B, C, ...), so that clocks and heat treat them alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

WORKING_SET = 320 << 20  # bytes of distinct weights that one graph touches; the L2 cache of an H200 has 60 MB
FEWEST_CALLS, GRAPH_US = 32, 2000  # of a graph: enough calls of short kernels, not too much time for long ones
WARM, REPLAYS = 2, 20
AHEAD = 300_000  # cycles, 0.15 ms: longer than it takes to launch a graph
INFINITE = float("inf")
Call = Callable[[], object]


@dataclass(frozen=True)
class Contestant:
    name: str
    calls: list[Call]  # one for each copy of the weights
    bytes: int
    flops: int
    plan: str = ""
    floor_us: float = 0.0  # of one call, roughly


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call; `bytes` and `flops` are what it must read and do at least."""

    layer: str
    m: int
    kernel: str
    median: float
    p10: float
    p90: float
    bytes: int
    flops: int
    plan: str = ""


def copies(size: int) -> int:
    """How many copies of `size` bytes of weights fill the working set."""
    return max(2, min(64, -(-WORKING_SET // size)))


def calls_in_graph(contestant: Contestant) -> int:
    enough = min(FEWEST_CALLS, int(GRAPH_US / max(contestant.floor_us, 1)) + 1)
    return max(len(contestant.calls), enough)


def pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return start, stop


def capture(calls: list[Call], count: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    return graph


def timed(call: Call) -> float:
    """Microseconds between two events around a call, once. The GPU is busy until the call has reached it: on an idle
    one the first event would be long past when the graph arrives, and its launch would count.
    """
    start, stop = pair()
    torch.cuda._sleep(AHEAD)  # type: ignore[no-untyped-call]
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e3


def once(call: Call) -> float:
    """Median microseconds of one large call."""
    return statistics.median([timed(call) for _ in range(12)][2:])


def replay_in_turn(graphs: dict[str, Call], replays: int, hopeless: float = INFINITE) -> dict[str, list[float]]:
    """Microseconds of each replay; who is `hopeless` times slower than the best after the first two rounds stops."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(WARM):
        for graph in graphs.values():
            timed(graph)
    running = list(graphs)
    for replay in range(replays):
        for name in running:
            times[name].append(timed(graphs[name]))
        if replay == 1:
            best = min(min(times[name]) for name in running)
            running = [name for name in running if min(times[name]) <= hopeless * best]
    return times


@dataclass(frozen=True)
class Racer:
    """A contestant whose calls are captured: `count` of them in a graph."""

    contestant: Contestant
    count: int
    graph: torch.cuda.CUDAGraph


def ready(contestant: Contestant) -> Racer:
    """Calls and captures a contestant; whatever is wrong with it shows here."""
    count = calls_in_graph(contestant)
    racer = Racer(contestant, count, capture(contestant.calls, count))
    torch.cuda.synchronize()
    return racer


def race(layer: str, m: int, racers: list[Racer], replays: int = 0, hopeless: float = INFINITE) -> list[Timing]:
    graphs: dict[str, Call] = {r.contestant.name: r.graph.replay for r in racers}
    times = replay_in_turn(graphs, replays or REPLAYS, hopeless) if racers else {}
    result = []
    for racer in racers:
        c = racer.contestant
        ordered = sorted(t / racer.count for t in times[c.name])
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        result.append(Timing(layer, m, c.name, statistics.median(ordered), low, high, c.bytes, c.flops, c.plan))
    return result
