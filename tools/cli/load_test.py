"""`instantrt load-test REPOSITORY --plot load.png`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from instantrt.passes.core.errors import UserError, require
from instantrt.tools.cli.console import console
from instantrt.tools.cli.options import Environment, Repository
from instantrt.tools.serving.server import ENVIRONMENT, TAKE_TEXT, Server, serving, text_models

if TYPE_CHECKING:
    from instantrt.tools.serving.load import Result
    from instantrt.tools.serving.text_load import TextResult

GENERATE = TAKE_TEXT[0]
TOKENS = 64


def main(
    repository: Repository,
    model: Annotated[str | None, typer.Option(help="which model, where several take text")] = None,
    clients: Annotated[
        list[int] | None, typer.Option(min=1, help="how many at a time; may be repeated; 1, 8 and 64")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="replies for each client")] = 4,
    total: Annotated[int | None, typer.Option(min=1, help="replies in all, instead")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help=f"generated, exactly so many; {TOKENS}")] = None,
    beside: Annotated[
        Path | None, typer.Option(help="output folder of compile: an encoder in this process takes turns")
    ] = None,
    environment: Environment = ENVIRONMENT,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="PNG or SVG file")] = None,
) -> None:
    """Prints a row for each number of clients; replies that are lost or differ are an error."""
    if plot_to is not None:
        require("report", "--plot")
    name, counts = which(repository, model), clients or [1, 8, 64]
    loads = [(count, total if total is not None else requests * count) for count in counts]
    kind = name.rpartition("_")[2]
    refuse(name, {"--beside": beside} if kind == GENERATE else {"--max-tokens": max_tokens})
    with serving(repository, (name,), environment=environment.absolute()) as server:
        if kind == GENERATE:
            wrong = generating(server, name, loads, TOKENS if max_tokens is None else max_tokens, plot_to)
        else:
            wrong = reading(server, name, loads, beside, plot_to)
    if wrong:
        noun = "prompt" if kind == GENERATE else "text"
        raise UserError(f"{wrong} replies are lost, or differ from the same {noun}'s alone")


def which(repository: Path, model: str | None) -> str:
    """The model that is meant, or the only one that takes text."""
    found = text_models(repository)
    if model in found:
        return model
    if model is None and len(found) == 1:
        return found[0]
    raise UserError(
        "which model?" if model is None else "no such model that takes text",
        where=str(repository),
        expected=", ".join(found) or "a model that takes text",
        found=model or "",
        fix="name one with --model" if found else "",
    )


def refuse(name: str, options: dict[str, object]) -> None:
    """Options that belong to other models."""
    for option, value in options.items():
        if value is not None:
            raise UserError(f"{option} says nothing to this model", where=name, fix="leave it out")


def generating(
    server: Server, name: str, loads: Sequence[tuple[int, int]], max_tokens: int, plot_to: Path | None
) -> int:
    """How many replies were wrong."""
    from instantrt.tools.serving.load import PROMPTS, measure, plot

    body: dict[str, object] = {"max_tokens": max_tokens, "min_tokens": max_tokens}
    results = [measure(server, name, clients=c, requests=r, body=body, prompts=PROMPTS) for c, r in loads]
    console.print(table(results))
    if plot_to is not None:
        plot(results, plot_to)
    return sum(r.wrong for r in results)


def reading(
    server: Server, name: str, loads: Sequence[tuple[int, int]], beside: Path | None, plot_to: Path | None
) -> int:
    """How many replies of an encoder were wrong."""
    from instantrt.tools.serving.text_load import in_process, measure_texts, plot_texts

    with in_process(beside, name.rpartition("_")[2]) if beside is not None else nullcontext() as here:
        results = [measure_texts(server, name, clients=c, requests=r, here=here) for c, r in loads]
    console.print(text_table(results))
    if plot_to is not None:
        plot_texts(results, plot_to)
    return sum(r.wrong for r in results)


def table(results: Sequence[Result]) -> Table:
    names = ("clients", "requests", "tokens/s", "first p50", "p99", "gap p50", "p99 ms", "wrong", "memory")
    out = headed(names)
    for r in results:
        times = [f"{1e3 * t:.1f}" for t in (*r.first, *r.gap)]
        out.add_row(str(r.clients), str(r.requests), f"{r.rate:.0f}", *times, str(r.wrong), grown(r.growth))
    return out


def text_table(results: Sequence[TextResult]) -> Table:
    compared = any(r.beside for r in results)
    names = ("clients", "requests", "texts/s", "p50", "p99 ms", "wrong", "memory")
    out = headed((*names, "here", "share") if compared else names)
    for r in results:
        cells = [str(r.clients), str(r.requests), f"{r.rate:.1f}", *(f"{1e3 * t:.1f}" for t in r.latency), str(r.wrong)]
        low, middle, high = r.share if compared else (0.0, 0.0, 0.0)
        more = (f"{r.beside_rate:.1f}", f"{middle:.0%} ({100 * low:.0f}-{100 * high:.0f})") if compared else ()
        out.add_row(*cells, grown(r.growth), *more)
    return out


def headed(names: Sequence[str]) -> Table:
    out = Table(box=None, pad_edge=False)
    for name in names:
        out.add_column(name, justify="right")
    return out


def grown(growth: float | None) -> str:
    return "" if growth is None else f"{growth:+.1%}"
