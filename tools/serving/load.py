"""Concurrent streaming clients against a generate model.

Every prompt is first asked alone; under load its greedy reply must be the same, so a lost, mixed or wrong reply counts.
"""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from instantrt.passes.core.errors import UserError
from instantrt.tools.serving.server import Server

PROMPTS = (
    "Once upon a time",
    "The list of",
    "In the history of",
    "def main(",
    "The server",
    "When the water",
    "A function that",
    "Return the",
)
TIMEOUT = 120.0
Given = TypeVar("Given")
Reply = TypeVar("Reply")
Pair = tuple[float, float]  # p50, p99


@dataclass(frozen=True)
class StreamedReply:
    """One streamed reply: when it was asked for, when each piece came, what it says."""

    started: float
    arrivals: tuple[float, ...]
    tokens: tuple[int, ...]
    text: str
    finish: str

    @property
    def first(self) -> float:
        return self.arrivals[0] - self.started


@dataclass(frozen=True)
class Result:
    """What one number of clients saw; times in seconds."""

    clients: int
    requests: int
    tokens: int
    seconds: float
    first: tuple[float, float]  # p50, p99 of the time to the first piece
    gap: tuple[float, float]  # p50, p99 between two pieces of one reply, for each token
    wrong: int
    growth: float | None  # of the server's memory, relative to after the warm-up

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def ask(address: str, model: str, body: dict[str, object]) -> StreamedReply:
    """One streamed generation over HTTP."""
    with closing(http.client.HTTPConnection(address, timeout=TIMEOUT)) as connection:
        started = time.perf_counter()
        connection.request("POST", f"/v2/models/{model}/generate_stream", json.dumps({"stream": True, **body}))
        response = connection.getresponse()
        arrivals: list[float] = []
        tokens: list[int] = []
        text: list[str] = []
        finish = ""
        for event in events(response):
            if "error" in event:
                raise UserError("the server refused a request", found=str(event["error"]))
            ids = event["output_ids"]
            new: list[int] = ids if isinstance(ids, list) else [ids]
            tokens += new
            arrivals += [time.perf_counter()] * max(1, len(new))
            text.append(str(event["text_output"]))
            finish = str(event["finish_reason"])
        return StreamedReply(started, tuple(arrivals), tuple(tokens), "".join(text), finish)


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON bodies of a stream of server-sent events, or of an error."""
    while line := response.readline():
        if line.startswith((b"data: ", b"{")):
            yield json.loads(line.removeprefix(b"data: "))


def drive(
    clients: int, requests: int, given: Sequence[Given], ask_one: Callable[[Given], Reply]
) -> tuple[list[tuple[Given, Reply | None]], float]:
    """`requests` replies by `clients` at a time, each with what was asked, None where it is lost; and the seconds."""
    lock, todo = threading.Lock(), iter(range(requests))
    replies: list[tuple[Given, Reply | None]] = []

    def client() -> None:
        while True:
            with lock:
                number = next(todo, None)
            if number is None:
                return
            asked = given[number % len(given)]
            try:
                reply: Reply | None = ask_one(asked)
            except (OSError, http.client.HTTPException, UserError):
                reply = None
            with lock:
                replies.append((asked, reply))

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client) for _ in range(clients)]:
            future.result()
    return replies, time.perf_counter() - started


def load(
    address: str, model: str, *, clients: int, requests: int, body: dict[str, object], prompts: Sequence[str]
) -> tuple[list[tuple[str, StreamedReply | None]], float]:
    """`requests` streamed replies by `clients` at a time, each with its prompt; and the seconds it took."""
    return drive(clients, requests, prompts, lambda prompt: ask(address, model, {**body, "text_input": prompt}))


def measure(
    server: Server,
    model: str,
    *,
    clients: int,
    requests: int,
    body: dict[str, object],
    prompts: Sequence[str],
    warm_up: int = 0,
) -> Result:
    """Each prompt alone, then all under load, after as much of the same as a warm-up."""
    alone = {prompt: ask(server.http, model, {**body, "text_input": prompt}).tokens for prompt in prompts}
    load(server.http, model, clients=clients, requests=warm_up or 2 * clients, body=body, prompts=prompts)
    before = resident(server.process.pid)
    replies, seconds = load(server.http, model, clients=clients, requests=requests, body=body, prompts=prompts)
    good, growth = under_load(server, before, replies)
    gaps = [np.diff(reply.arrivals) for reply in good]
    return Result(
        clients=clients,
        requests=requests,
        tokens=sum(len(reply.tokens) for reply in good),
        seconds=seconds,
        first=percentiles([reply.first for reply in good]),
        gap=percentiles(list(itertools.chain(*gaps)) or [0.0]),
        wrong=sum(reply is None or reply.tokens != alone[prompt] for prompt, reply in replies),
        growth=growth,
    )


def under_load(
    server: Server, before: int, replies: Iterable[tuple[object, Reply | None]]
) -> tuple[list[Reply], float | None]:
    """The replies that came, and the share that the server's memory has grown by since it was `before`."""
    after = resident(server.process.pid)
    good = [reply for _, reply in replies if reply is not None]
    if not good:
        raise UserError("no request was answered", where=server.http, found=server.tail())
    return good, after / before - 1 if before else None


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    p50, p99 = np.percentile(np.array(values), (50, 99))
    return float(p50), float(p99)


def resident(leader: int) -> int:
    """Bytes of memory that the processes of `leader`'s group hold; 0 where this system does not say."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text("utf-8").rpartition(")")[2].split()
            if int(fields[2]) == leader:
                memory = (status.parent / "smaps_rollup").read_text("utf-8").split("Pss:")[1]
                total += int(memory.split()[0]) << 10
        except (OSError, IndexError, ValueError):  # it ended meanwhile
            continue
    return total


def plot(results: Sequence[Result], path: Path) -> None:
    """Throughput and latency against the number of clients."""
    rates = {"": [r.rate for r in results]}
    times = {"first token": [r.first for r in results], "between tokens": [r.gap for r in results]}
    draw(path, [r.clients for r in results], "tokens/s", rates, times)


def draw(
    path: Path,
    clients: Sequence[int],
    unit: str,
    rates: Mapping[str, Sequence[float]],
    times: Mapping[str, Sequence[Pair]],
) -> None:
    """Rates, and p50 and p99 of times in seconds, by the names of their lines, against the number of clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    throughput, latency = figure.subplots(1, 2)
    throughput.set(xlabel="clients", ylabel=unit, title="throughput")
    latency.set(xlabel="clients", ylabel="milliseconds", title="latency")
    for name, values in rates.items():
        throughput.plot(clients, values, "o-", label=name)
    for (name, pairs), color in zip(times.items(), ("tab:orange", "tab:green"), strict=False):
        for label, style, values in zip(("p50", "p99"), ("o-", "o:"), zip(*pairs, strict=True), strict=True):
            latency.plot(clients, [1e3 * v for v in values], style, color=color, label=f"{name} {label}".strip())
    throughput.set_ylim(0, None)
    latency.set_yscale("log")
    latency.legend(fontsize="small")
    if len(rates) > 1:
        throughput.legend(fontsize="small")
    for axes in (throughput, latency):
        axes.set_xscale("log", base=2)
        axes.set_xticks(clients, [str(c) for c in clients])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
