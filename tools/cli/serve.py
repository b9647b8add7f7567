"""`instantrt serve REPOSITORY`."""

from __future__ import annotations

from typing import Annotated

import typer

from instantrt.passes.core.errors import UserError
from instantrt.tools.cli.options import Environment, Repository
from instantrt.tools.serving.server import ENVIRONMENT, serving

PORTS = 65535


def main(
    repository: Repository,
    model: Annotated[list[str] | None, typer.Option(help="what to load; may be repeated; all that take text")] = None,
    environment: Environment = ENVIRONMENT,
    http_port: Annotated[int, typer.Option(min=0, max=PORTS, help="0 takes a free one")] = 0,
    grpc_port: Annotated[int, typer.Option(min=0, max=PORTS, help="0 takes a free one")] = 0,
) -> None:
    """Serves, and prints the addresses."""
    try:
        with serving(
            repository, tuple(model or ()), environment=environment.absolute(), http=http_port, grpc=grpc_port
        ) as server:
            print(f"ready: http {server.http}, grpc {server.grpc}, log {server.log}", flush=True)
            server.process.wait()
            raise UserError("the server ended by itself", found=server.tail())
    except KeyboardInterrupt:
        print("stopped")
