"""What serving costs and what batching brings, through the real server: `instantrt bench triton`.

Contestants take turns in every round, so that whatever else the machine does meets all of them; ratios are of one
round, and the median round counts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer

from instantrt.compiler.compile import compile_model
from instantrt.compiler.json_file import read_json
from instantrt.compiler.llm import LLM
from instantrt.compiler.quant.config import Quant
from instantrt.compiler.request import Request
from instantrt.tools.bench.synthetic import sized, write_checkpoint
from instantrt.tools.markdown import table
from instantrt.tools.places import BENCHMARKS, EXAMPLE
from instantrt.tools.serving.load import PROMPTS, Result, load, measure, plot
from instantrt.tools.serving.server import Server, serving

ROUNDS = 7
TOKENS = 48
PROMPT = PROMPTS[0]


def scaled_example(folder: Path) -> Path:
    """The example's architecture and tokenizer with 105 M random weights, so that a decode step takes its time."""
    layers = 8
    config = sized(read_json(EXAMPLE / "config.json"), 1024, 3072, layers, 16, 4, 4096)
    write_checkpoint(folder, {**config, "layer_types": ["full_attention"] * layers}, tokenizer=True)
    return folder


def serve_compiled(model: Path, quant: Quant, scratch: Path) -> tuple[Path, Path, str]:
    """The output folder, the repository, and the name of the generate model of `model`."""
    out, repository = scratch / f"{model.name}-{quant}", scratch / f"{model.name}-{quant}-triton"
    compile_model(Request(model=model, targets=("x86",), out=out, quant=quant), triton=repository)
    return out, repository, f"{model.name}_generate"


def through_triton(server: Server, name: str, clients: int) -> float:
    """Tokens a second of `clients` that ask at once, once each."""
    body: dict[str, object] = {"max_tokens": TOKENS, "min_tokens": TOKENS}
    replies, seconds = load(server.http, name, clients=clients, requests=clients, body=body, prompts=(PROMPT,))
    tokens = sum(len(reply.tokens) for _, reply in replies if reply is not None)
    assert tokens == clients * TOKENS
    return tokens / seconds


def generate_loop(out: Path, pipe: Connection) -> None:
    """Tokens a second of `LLM`, prefill included as it is for a client, each time that `pipe` asks."""
    with LLM(out) as llm:
        while pipe.recv():
            started = time.perf_counter()
            done = llm.generate(PROMPT, max_tokens=TOKENS, min_tokens=TOKENS)
            assert len(done.tokens) == TOKENS
            pipe.send(TOKENS / (time.perf_counter() - started))


@contextmanager
def generating(out: Path) -> Iterator[Callable[[], float]]:
    """A process with an `LLM`, that measures when called."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=generate_loop, args=(out, there), daemon=True)
    process.start()

    def run() -> float:
        here.send(True)
        rate: float = here.recv()
        return rate

    yield run
    here.send(False)
    process.join(10)


def compare(out: Path, repository: Path, name: str) -> dict[str, Any]:
    """One client through Triton against `LLM` in a process of its own, and eight clients against one."""
    with generating(out) as generate, serving(repository, (name,)) as server:
        turns = [
            (generate(), through_triton(server, name, 1), through_triton(server, name, 8)) for _ in range(ROUNDS + 1)
        ]
    turns = turns[1:]  # the first warms up
    return {
        "generate_step_ms": round(1e3 / statistics.median(g for g, _, _ in turns), 1),
        "one_client_of_generate": round(statistics.median(one / g for g, one, _ in turns), 3),
        "eight_clients_of_one": round(statistics.median(eight / one for _, one, eight in turns), 2),
        "rounds": [[round(v, 1) for v in turn] for turn in turns],
    }


def soak(repository: Path, name: str, requests: int) -> Result:
    body: dict[str, object] = {"max_tokens": 8, "min_tokens": 8}
    with serving(repository, (name,)) as server:
        return measure(server, name, clients=16, requests=requests, body=body, prompts=PROMPTS, warm_up=requests // 10)


def clients_plot(repository: Path, name: str, path: Path) -> list[Result]:
    body: dict[str, object] = {"max_tokens": TOKENS, "min_tokens": TOKENS}
    with serving(repository, (name,)) as server:
        results = [
            measure(server, name, clients=n, requests=2 * n, body=body, prompts=PROMPTS) for n in (1, 2, 4, 8, 16, 64)
        ]
    plot(results, path)
    return results


def markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    lines = [
        "# What serving costs, and what batching brings",
        "",
        "Written by `instantrt bench triton`: the real Triton server on the machine that runs the clients.",
        "",
        "The example's architecture with 105 M random weights. Ratios are of one round, in which all take turns; the",
        f"median of {ROUNDS} rounds. {record['cores']} cores, load {record['load'][0]:.1f} before and"
        f" {record['load'][1]:.1f} after: what is above the number of cores is other work on the",
        "machine, which scatters the rounds; triton.json has them all.",
        "",
    ]
    titles = ("weights", "one step in the process (`LLM`)", "one client : in the process", "eight clients : one")
    rows = []
    for quant, row in record["models"].items():
        one, eight = row["one_client_of_generate"], row["eight_clients_of_one"]
        rows.append((quant, f"{row['generate_step_ms']} ms", f"{one:.1%}", f"{eight:.2f} x"))
    lines += [*table(titles, rows), "", "![clients against throughput and latency](triton.png)", ""]
    s = record["soak"]
    lines += [
        f"Soak on the example model: {s['requests']} requests of {s['clients']} clients, {s['wrong']} lost or different"
        f" from the same prompt's alone, {s['growth']:+.1%} memory after the first tenth.",
        "",
    ]
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="where triton.json, .md and .png go")] = BENCHMARKS,
    requests: Annotated[int, typer.Option(min=1, help="of the soak")] = 10_000,
) -> None:
    """Measure serving and write the record."""
    with tempfile.TemporaryDirectory(prefix="bench.") as folder:
        scratch = Path(folder)
        scaled = scaled_example(scratch / "scaled")
        record: dict[str, Any] = {"cores": os.cpu_count(), "load": [os.getloadavg()[0]], "models": {}}
        for quant in ("none", "a16w8"):
            compiled = serve_compiled(scaled, quant, scratch)
            record["models"][quant] = compare(*compiled)
            print(quant, json.dumps(record["models"][quant]), flush=True)
        record["clients"] = [asdict(r) for r in clients_plot(*compiled[1:], out / "triton.png")]
        _, repository, name = serve_compiled(EXAMPLE, "a16w8", scratch)
        record["soak"] = asdict(soak(repository, name, requests))
    record["load"].append(os.getloadavg()[0])
    (out / "triton.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    (out / "triton.md").write_text(markdown(record), "utf-8")
    print(markdown(record))
