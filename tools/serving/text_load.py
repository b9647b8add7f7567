"""Concurrent clients of an encoder, a text a request, beside `Embedder` or `Classifier` in this process.

Every text is first asked alone; under load its answer must be the same, so a lost, mixed or wrong answer counts.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from instantrt.compiler.encoder import Classifier, Embedder
from instantrt.passes.core.errors import UserError
from instantrt.tools.serving.load import PROMPTS, TIMEOUT, Pair, draw, drive, percentiles, resident, under_load
from instantrt.tools.serving.server import Server

Array = npt.NDArray[np.float32]
WORDS = " ".join(PROMPTS).split()
LENGTHS = (48, 16, 240, 32, 96, 24, 128, 64)  # words of a text, each about a token; neighbours wait together
TEXTS = tuple(
    " ".join(islice(cycle(WORDS[number:] + WORDS[:number]), length)) for number, length in enumerate(LENGTHS * 2)
)
ROUNDS = 7
TOLERANCE = 1e-3  # of the largest number of an answer; other texts' answers differ by a hundred times as much


@dataclass(frozen=True)
class Answer:
    """Of one text its vector, or the scores of its labels in the order of their names; when it was asked, and given."""

    started: float
    ended: float
    values: Array


@dataclass(frozen=True)
class TextResult:
    """What one number of clients saw; times in seconds."""

    clients: int
    requests: int  # of a round
    rates: tuple[float, ...]  # texts a second in each round
    beside: tuple[float, ...]  # in this process, in the same rounds; empty where nobody asked
    latency: Pair  # p50, p99
    wrong: int
    growth: float | None  # of the server's memory, relative to after the warm-up

    @property
    def rate(self) -> float:
        return float(np.median(self.rates))

    @property
    def beside_rate(self) -> float:
        return float(np.median(self.beside))

    @property
    def share(self) -> tuple[float, float, float]:
        """Quartiles of the rounds' ratios: the server's rate to that in this process."""
        low, middle, high = np.percentile(np.array(self.rates) / np.array(self.beside), (25, 50, 75))
        return float(low), float(middle), float(high)


def ask(address: str, model: str, text: str) -> Answer:
    """The answer to one text over HTTP; a vector as bytes, as Triton's own clients have it."""
    body: dict[str, Any] = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": [text]}]}
    if model.endswith("_embed"):
        body["outputs"] = [{"name": "embedding", "parameters": {"binary_data": True}}]
    with closing(http.client.HTTPConnection(address, timeout=TIMEOUT)) as connection:
        started = time.perf_counter()
        connection.request("POST", f"/v2/models/{model}/infer", json.dumps(body))
        response = connection.getresponse()
        raw = response.read()
        ended = time.perf_counter()
    length = int(response.headers.get("Inference-Header-Content-Length", len(raw)))
    reply: dict[str, Any] = json.loads(raw[:length])
    if "error" in reply:
        raise UserError("the server refused a request", found=str(reply["error"]))
    if raw[length:]:
        return Answer(started, ended, np.frombuffer(raw[length:], np.float32))
    found = {each["name"]: each["data"] for each in reply["outputs"]}
    scores = by_name(dict(zip(found["label"], found["score"], strict=True)))
    return Answer(started, ended, np.array(scores, np.float32))


def by_name(scores: dict[str, float]) -> list[float]:
    return [scores[label] for label in sorted(scores)]


@contextmanager
def in_process(folder: Path, kind: str) -> Iterator[Callable[[str], Array]]:
    """The artifact in `folder` as a function of one text.

    kind   embed or classify
    """
    if kind == "embed":
        with Embedder(folder) as embedder:
            yield embedder.encode
    else:
        with Classifier(folder) as classifier:
            yield lambda text: np.array(by_name(classifier.classify(text)), np.float32)


def differs(found: Array, expected: Array) -> bool:
    return bool(found.shape != expected.shape or np.abs(found - expected).max() > TOLERANCE * np.abs(expected).max())


def measure_texts(
    server: Server, model: str, *, clients: int, requests: int, here: Callable[[str], Array] | None = None
) -> TextResult:
    """Each text alone, then at least `requests` under load, all texts as often, after a warm-up.

    here   takes turns with the server, called by as many threads as there are clients
    """

    def ask_one(text: str) -> Answer:
        return ask(server.http, model, text)

    alone = {text: ask_one(text).values for text in TEXTS}
    asked = -(-requests // len(TEXTS)) * len(TEXTS)
    if here is not None and any(differs(here(text), values) for text, values in alone.items()):
        raise UserError(
            "the artifact in this process gives other answers than the server", fix="name that of the repository"
        )
    drive(clients, min(asked, 2 * clients), TEXTS, ask_one)
    before = resident(server.process.pid)
    replies, rates, beside = [], [], []
    for _ in range(ROUNDS):
        found, seconds = drive(clients, asked, TEXTS, ask_one)
        replies += found
        rates.append(asked / seconds)
        if here is not None:
            beside.append(asked / drive(clients, asked, TEXTS, here)[1])
    good, growth = under_load(server, before, replies)
    return TextResult(
        clients=clients,
        requests=asked,
        rates=tuple(rates),
        beside=tuple(beside),
        latency=percentiles([reply.ended - reply.started for reply in good]),
        wrong=sum(reply is None or differs(reply.values, alone[text]) for text, reply in replies),
        growth=growth,
    )


def plot_texts(results: Sequence[TextResult], path: Path) -> None:
    """Throughput and latency against the number of clients."""
    rates = {"Triton": [r.rate for r in results]}
    if all(r.beside for r in results):
        rates["in the process"] = [r.beside_rate for r in results]
    draw(path, [r.clients for r in results], "texts/s", rates, {"": [r.latency for r in results]})
