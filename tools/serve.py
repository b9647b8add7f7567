"""Starts Triton Inference Server on a model repository, on loopback: `python -m tools.serve REPOSITORY`.

The server is the `tritonserver` on the PATH, or the one in the nvidia-pytriton wheel of this Python's environment.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from passes.errors import UserError

START_SECONDS = 120.0
STOP_SECONDS = 20.0  # for requests in progress, then for the rest
LIBRARY = "libtriton_python.so"
STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Installation:
    """A server and what it needs around it."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def find_server(scratch: Path) -> Installation:
    """The installed server; `scratch` holds the backend folder of a wheel, whose stub must lie beside its library."""
    if (found := shutil.which("tritonserver")) is not None:
        return Installation((found,))
    package = importlib.util.find_spec("pytriton")
    if package is None or package.origin is None:
        raise UserError(
            "no tritonserver",
            expected="tritonserver on the PATH, or the nvidia-pytriton wheel beside this Python",
            found=sys.executable,
            fix="make serving, then .venv-serve/bin/python -m tools.serve",
        )
    home = Path(package.origin).parent / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    backend = scratch / "python"
    backend.mkdir()
    sources = [*(home / "backends" / "python").glob("*.*"), home / "python_backend_stubs" / version / STUB]
    for source in sources:
        (backend / source.name).symlink_to(source)
    libraries = [str(home.parent.parent / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
    environment = {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [*libraries, os.environ.get("LD_LIBRARY_PATH", "")])),
        # The stub embeds Python, which finds its environment through the first python3 on the PATH.
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
        "VIRTUAL_ENV": sys.prefix,
    }
    return Installation((str(home / "bin" / "tritonserver"), "--backend-directory", str(scratch)), environment)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    log: Path

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Returns when every model is loaded; an error with the end of the log where that does not happen."""
        deadline = time.monotonic() + seconds
        while not self.ready():
            if (code := self.process.poll()) is not None:
                raise UserError(f"the server ended with code {code}", where=str(self.log), found=self.tail())
            if time.monotonic() > deadline:
                raise UserError(f"the server is not ready after {seconds:.0f} s", found=self.tail())
            time.sleep(0.1)


@contextmanager
def serving(
    repository: Path, models: tuple[str, ...] = (), *, http: int = 0, grpc: int = 0, log: Path | None = None
) -> Iterator[Server]:
    """A server that is ready, with the named models or all that generate; stopped at the end."""
    names = models or tuple(sorted(p.parent.name for p in repository.glob("*_generate/config.pbtxt")))
    missing = [name for name in names if not (repository / name / "config.pbtxt").is_file()]
    if missing or not names:
        raise UserError(
            "no such model" if missing else "no generate model",
            where=str(repository),
            expected=", ".join(sorted(p.parent.name for p in repository.glob("*/config.pbtxt")))
            or "a model repository",
            found=", ".join(missing),
        )
    free = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="serve.") as scratch:
        folder = Path(scratch) / "backends"
        folder.mkdir()
        log = log or Path(scratch) / "server.log"
        server = start(find_server(folder), repository, names, (http or free[0], grpc or free[1]), log)
        try:
            server.wait_ready()
            yield server
        finally:
            stop(server.process)


def start(
    installed: Installation, repository: Path, models: tuple[str, ...], ports: tuple[int, int], log: Path
) -> Server:
    http, grpc = ports
    options = {
        "model-repository": str(repository),
        "model-control-mode": "explicit",
        "http-address": "127.0.0.1",
        "http-port": str(http),
        "grpc-address": "127.0.0.1",
        "grpc-port": str(grpc),
        "allow-metrics": "false",
        "exit-timeout-secs": str(int(STOP_SECONDS)),
    }
    command = [*installed.command, *(f"--{key}={value}" for key, value in options.items())]
    command += [f"--load-model={name}" for name in models]
    with log.open("wb") as file:
        # Its own session: Ctrl-C reaches this process, which stops the server in order.
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **installed.environment},
            start_new_session=True,
        )
    return Server(process, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)


def stop(process: subprocess.Popen[bytes]) -> int:
    """Asks the server to end, then makes it; returns its exit code."""
    process.terminate()
    try:
        return process.wait(STOP_SECONDS + 10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def main(
    repository: Annotated[Path, typer.Argument(help="folder that compile --triton wrote")],
    model: Annotated[list[str] | None, typer.Option(help="what to load; may be repeated; all that generate")] = None,
    http_port: Annotated[int, typer.Option(help="0 takes a free one")] = 0,
    grpc_port: Annotated[int, typer.Option(help="0 takes a free one")] = 0,
) -> None:
    """Serve a model repository until interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with serving(repository, tuple(model or ()), http=http_port, grpc=grpc_port) as server:
            print(f"ready: http {server.http}, grpc {server.grpc}, log {server.log}", flush=True)
            server.process.wait()
            raise UserError("the server ended by itself", found=server.tail())
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
