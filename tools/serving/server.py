"""Starts Triton Inference Server on a model repository, on loopback.

The server is the `tritonserver` on the PATH, or the one in an environment that holds the nvidia-pytriton wheel.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from instantrt.passes.core.errors import UserError
from instantrt.tools.places import ROOT

START_SECONDS = 120.0
STOP_SECONDS = 20.0  # for requests in progress, then for the rest
LAST_LINES = 15  # of its log, where it failed
STUB = "triton_python_backend_stub"
ENVIRONMENT = ROOT / ".venv-serve"
WHEEL = """import json, sys, sysconfig
from importlib.util import find_spec
print(json.dumps([find_spec("pytriton").origin, "%d.%d" % sys.version_info[:2], sysconfig.get_config_var("LIBDIR")]))"""


@dataclass(frozen=True)
class Installation:
    """A server and what it needs around it."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def find_server(scratch: Path, environment: Path) -> Installation:
    """The installed server; `scratch` holds the backend folder of a wheel, whose stub must lie beside its library."""
    if (found := shutil.which("tritonserver")) is not None:
        return Installation((found,))
    python = environment / "bin" / "python"
    found_wheel = subprocess.run([python, "-c", WHEEL], capture_output=True, check=False) if python.exists() else None
    if found_wheel is None or found_wheel.returncode != 0:
        raise UserError(
            "no tritonserver",
            expected=f"tritonserver on the PATH, or the nvidia-pytriton wheel in {environment}",
            fix="make serving, or name an environment with --environment",
        )
    package, version, libdir = json.loads(found_wheel.stdout)
    home = Path(package).parent / "tritonserver"
    backend = scratch / "python"
    backend.mkdir()
    for source in (*(home / "backends" / "python").glob("*.*"), home / "python_backend_stubs" / version / STUB):
        (backend / source.name).symlink_to(source)
    libraries = (str(home.parent.parent / "nvidia_pytriton.libs"), libdir, os.environ.get("LD_LIBRARY_PATH"))
    variables = {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        # The stub embeds Python, which finds its environment through the first python3 on the PATH.
        "PATH": os.pathsep.join((str(python.parent), os.environ.get("PATH", ""))),
        "VIRTUAL_ENV": str(environment),
    }
    return Installation((str(home / "bin" / "tritonserver"), "--backend-directory", str(scratch)), variables)


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

    def tail(self) -> str:
        """The last lines of the log, without those of its tables of settings, which are 250 columns wide."""
        lines = self.log.read_text("utf-8", "replace").splitlines()
        return "\n".join([line for line in lines if line and line[0] not in "|+"][-LAST_LINES:])

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait_ready(self) -> None:
        """Returns when every model is loaded; an error with the end of the log where that does not happen."""
        deadline = time.monotonic() + START_SECONDS
        while not self.ready():
            if (code := self.process.poll()) is not None:
                raise UserError(f"the server ended with code {code}", where=str(self.log), found=self.tail())
            if time.monotonic() > deadline:
                raise UserError(f"the server is not ready after {START_SECONDS:.0f} s", found=self.tail())
            time.sleep(0.1)


TAKE_TEXT = ("generate", "embed", "classify")  # how such models are called, behind the model's own name


def text_models(repository: Path) -> tuple[str, ...]:
    """The models there that take text."""
    return tuple(sorted(p.parent.name for kind in TAKE_TEXT for p in repository.glob(f"*_{kind}/config.pbtxt")))


@contextmanager
def serving(
    repository: Path,
    models: tuple[str, ...] = (),
    *,
    environment: Path = ENVIRONMENT,
    http: int = 0,
    grpc: int = 0,
) -> Iterator[Server]:
    """A server that is ready, with the named models or all that take text; stopped at the end."""
    names = models or text_models(repository)
    missing = [name for name in names if not (repository / name / "config.pbtxt").is_file()]
    if missing or not names:
        raise UserError(
            "no such model" if missing else "no model that takes text",
            where=str(repository),
            expected=", ".join(sorted(p.parent.name for p in repository.glob("*/config.pbtxt")))
            or "a model repository",
            found=", ".join(missing),
            fix="name the folder that `instantrt compile --triton` wrote",
        )
    free = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="serve.") as scratch:
        folder = Path(scratch) / "backends"
        folder.mkdir()
        log = Path(scratch) / "server.log"
        server = start(find_server(folder, environment), repository, names, (http or free[0], grpc or free[1]), log)
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
        # Its own process group: Ctrl-C reaches this process, which stops the server in order. Not a session of its own:
        # a kernel that is fair to sessions would give it a share that other programs do not get.
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **installed.environment},
            process_group=0,
        )
    return Server(process, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)


def stop(process: subprocess.Popen[bytes]) -> int:
    """Asks the server to end, then makes it and what it started; returns its exit code."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS + 10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a server that crashed leaves its backends behind
    return process.wait()
