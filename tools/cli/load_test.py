"""`instantrt load-test REPOSITORY --plot load.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from instantrt.passes.core.errors import UserError, require
from instantrt.tools.cli.console import console
from instantrt.tools.cli.options import Environment, Repository
from instantrt.tools.serving.server import ENVIRONMENT, serving

if TYPE_CHECKING:
    from instantrt.tools.serving.load import Result


def main(
    repository: Repository,
    model: Annotated[str | None, typer.Option(help="which model, where several generate")] = None,
    clients: Annotated[list[int] | None, typer.Option(help="how many at a time; may be repeated; 1, 8 and 64")] = None,
    requests: Annotated[int, typer.Option(help="replies for each client")] = 4,
    total: Annotated[int | None, typer.Option(help="replies in all, instead")] = None,
    max_tokens: Annotated[int, typer.Option(help="of each reply; exactly so many")] = 64,
    environment: Environment = ENVIRONMENT,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="PNG or SVG file")] = None,
) -> None:
    """Prints a row for each number of clients; replies that are lost or differ are an error."""
    from instantrt.tools.serving.load import PROMPTS, measure, plot

    body: dict[str, object] = {"max_tokens": max_tokens, "min_tokens": max_tokens}
    results = []
    if plot_to is not None:
        require("report", "--plot")
    with serving(repository, (model,) if model else (), environment=environment.absolute()) as server:
        name = model or next(iter(sorted(p.parent.name for p in repository.glob("*_generate/config.pbtxt"))))
        for count in clients or [1, 8, 64]:
            asked = total if total is not None else requests * count
            results.append(measure(server, name, clients=count, requests=asked, body=body, prompts=PROMPTS))
    console.print(table(results))
    if plot_to is not None:
        plot(results, plot_to)
    if wrong := sum(r.wrong for r in results):
        raise UserError(f"{wrong} replies are lost, or differ from the same prompt's alone")


def table(results: Sequence[Result]) -> Table:
    out = Table(box=None, pad_edge=False)
    names = ("clients", "requests", "tokens/s", "first p50", "p99", "gap p50", "p99 ms", "wrong", "memory")
    for name in names:
        out.add_column(name, justify="right")
    for r in results:
        times = [f"{1e3 * t:.1f}" for t in (*r.first, *r.gap)]
        growth = "" if r.growth is None else f"{r.growth:+.1%}"
        out.add_row(str(r.clients), str(r.requests), f"{r.rate:.0f}", *times, str(r.wrong), growth)
    return out
