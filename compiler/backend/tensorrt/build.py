"""Builds a TensorRT engine from an ONNX file: full TensorRT (10.x, 11.x) or TensorRT-RTX, one road for both.

The build runs in a child process (child.py), because a few paths of the builder abort the process they run in; an
abort becomes an error with the builder's last message. The plan is streamed beside its final name and renamed when it
is complete, so a failure, a full disk or Ctrl-C leaves nothing that looks finished.

    build(spec) --spec, JSON on stdin--> child --events, JSON lines--> progress, warnings, result or refusals
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from instantrt.compiler.backend.tensorrt.header import MAGIC, Flavour, Header, parse_header
from instantrt.compiler.options import EngineOptions
from instantrt.passes.core.errors import UserError

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # input -> min, opt, max
PRODUCT = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
INSTALL = {"tensorrt": "pip install 'tensorrt{}'", "tensorrt_rtx": "pip install 'instantrt[rtx]'"}


@dataclass(frozen=True)
class EngineSpec:
    """One build: everything the child process needs, as plain data.

    `sms` is empty for "the GPU of this machine"; TensorRT-RTX builds for any list of SMs that it knows.
    `releases` are those of full TensorRT that build for the target and parse its graph, as a version specifier.
    `layers` receives the builder's table of kernels as text.
    """

    flavour: Flavour
    onnx: Path
    engine: Path
    layers: Path
    profiles: tuple[Profile, ...] = ()
    sms: tuple[int, ...] = ()
    plugins: tuple[Path, ...] = ()
    options: EngineOptions = field(default_factory=EngineOptions)
    releases: str = ""

    def __post_init__(self) -> None:
        for number, profile in enumerate(self.profiles):
            check_profile(profile, f"profile {number}")

    @property
    def title(self) -> str:
        """What is built, in words. `onnx` may lie in a folder that is gone when a user reads of it."""
        return f"engine for {', '.join(f'sm{sm}' for sm in self.sms) or 'the GPU of this machine'}"

    @property
    def partial(self) -> Path:
        return self.engine.with_name(self.engine.name + ".partial")

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> EngineSpec:
        data: dict[str, Any] = json.loads(text)
        options = EngineOptions(**data.pop("options"))
        for key in ("onnx", "engine", "layers"):
            data[key] = Path(data[key])
        data["plugins"] = tuple(Path(p) for p in data["plugins"])
        return cls(**data, options=options)


@dataclass(frozen=True)
class Built:
    """A finished engine file."""

    engine: Path
    layers: Path
    version: str  # of the builder, as in 1.7.1.116
    bytes: int
    warnings: tuple[str, ...]


def install(spec: EngineSpec) -> str:
    """The command that installs a builder for `spec`."""
    return INSTALL[spec.flavour].format(spec.releases)


Progress = Callable[[float, str], None]  # fraction done, phase

# The builder frees weights of a megabyte and more all the time. glibc's allocator learns from the first of them to keep
# such blocks in its heaps, where they leave holes: a quarter more memory for an engine. A fixed threshold hands each
# back. What is small it may keep: the heap would be cut and grown again all the time (docs/facts.md, "Memory of a
# build").
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_TOP_PAD_": str(32 << 20),
}


def silent(fraction: float, phase: str) -> None:
    """Progress for nobody."""


def build(spec: EngineSpec, progress: Progress = silent) -> Built:
    """Builds one engine; raises UserError with the builder's words when it cannot."""
    if importlib.util.find_spec(spec.flavour) is None:
        raise UserError(f"{PRODUCT[spec.flavour]} is not installed", where=spec.title, fix=install(spec))
    if not spec.onnx.is_file():
        raise UserError("the lowered model is not there", where=str(spec.onnx))
    spec.engine.parent.mkdir(parents=True, exist_ok=True)
    try:
        product = PRODUCT[spec.flavour]
        order = ChildOrder({"build": spec.to_json()}, spec.title, product, FAULT.format(product))
        done, warnings = _run_child(order, progress)
        spec.partial.replace(spec.engine)
    except BaseException:
        spec.partial.unlink(missing_ok=True)
        spec.layers.unlink(missing_ok=True)
        raise
    return Built(spec.engine, spec.layers, warnings=tuple(warnings), **done)


def load(flavour: Flavour, engine: Path, plugins: Sequence[Path] = ()) -> str:
    """Deserializes an engine on this machine's GPU, in a child process; the version of the runtime that did it.

    Call `read_header` and compare digests first: an engine is code.
    """
    words = {"load": {"flavour": flavour, "engine": str(engine), "plugins": list(map(str, plugins))}}
    done, _ = _run_child(ChildOrder(words, str(engine), PRODUCT[flavour]), silent)
    return str(done["version"])


def read_header(engine: Path) -> Header:
    """What built an engine; a UserError for a truncated or foreign file."""
    header, found = parse_header(engine), engine.stat().st_size
    if header is None:
        starts = " or ".join(repr(m.decode()) for m in MAGIC)
        raise UserError(
            "not a TensorRT engine",
            where=str(engine),
            expected=f"a file that starts with {starts}",
            found=f"another file of {found} bytes" if found else "an empty file",
        )
    if header.flavour == "tensorrt_rtx" and header.size != found:
        raise UserError(
            "the engine is truncated",
            where=str(engine),
            expected=f"{header.size} bytes",
            found=f"{found} bytes",
            fix="copy it again",
        )
    return header


FAULT = (
    "this is a fault of {}: a layer may be quantized in another way (--quant, --group-size, --lm-head) or stay float "
    "(--ignore); --builder kit leaves the lowered model, for full TensorRT to build or for a report to NVIDIA"
)


@dataclass(frozen=True)
class ChildOrder:
    """What a child is to do. Errors name it by `where`; `fix` is what to do when `product` takes its process down."""

    words: Mapping[str, Any]
    where: str
    product: str
    fix: str = ""


def _run_child(order: ChildOrder, progress: Progress) -> tuple[dict[str, Any], list[str]]:
    """Runs the child and follows its events: the result and the warnings."""
    done: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None
    said: list[tuple[str, str]] = []  # severity, text
    phase = "starting"
    with tempfile.TemporaryFile("w+") as stderr, _child(stderr) as child:
        assert child.stdin
        assert child.stdout
        try:
            with child.stdin as stdin:
                stdin.write(json.dumps(order.words))
            for line in child.stdout:
                event = json.loads(line)
                if "progress" in event:
                    fraction, phase = event["progress"]
                    progress(fraction, phase)
                elif "message" in event:
                    said.append(tuple(event["message"]))
                elif "refused" in event:
                    failure = event
                elif "done" in event:
                    done = event["done"]
        except BrokenPipeError:
            pass  # the child died before it read its input; its exit status says so below
        status = child.wait()
        stderr.seek(0)
        tail = stderr.read()[-2000:].strip()
    if failure:
        raise _refusal(order.where, failure, said)
    if done is None or status:
        raise _abort(order, status, phase, said, tail)
    return done, [text for severity, text in said if severity == "WARNING"]


@contextmanager
def _child(stderr: Any) -> Iterator[subprocess.Popen[str]]:
    """The child in a session of its own, so that Ctrl-C reaches this process alone, which then ends the child."""
    command = [sys.executable, "-m", "instantrt.compiler.backend.tensorrt.child"]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        env={**ALLOCATOR, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


def _refusal(where: str, failure: Mapping[str, Any], said: Sequence[tuple[str, str]]) -> UserError:
    """The child's own account of why it did not build: one reason, or one line for each refused node."""
    reasons: list[str] = failure["refused"] or [text for severity, text in said if severity == "ERROR"][-1:]
    return UserError(
        failure["what"],
        where=where,
        expected=failure.get("expected", ""),
        found="\n".join(reasons),
        fix=failure.get("fix", ""),
    )


def _abort(order: ChildOrder, status: int, phase: str, said: Sequence[tuple[str, str]], tail: str) -> UserError:
    """The child ended without an account: a signal, or an exception of ours (then its traceback is the tail)."""
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    last = said[-1][1] if said else "none"
    fault = order.fix if status < 0 else ""
    return UserError(
        f"the process of {order.product} ended ({how}) during: {phase}",
        where=order.where,
        found=f"last message: {last}" + (f"\n{tail}" if tail else ""),
        fix="the machine ran out of memory, or someone ended the process" if how == "SIGKILL" else fault,
    )


def check_profile(profile: Profile, where: str) -> None:
    """min <= opt <= max in every dimension, no negative sizes, one rank an input."""
    for name, (low, opt, high) in profile.items():
        ordered = len(low) == len(opt) == len(high) and all(
            0 <= a <= b <= c for a, b, c in zip(low, opt, high, strict=True)
        )
        if not ordered or 0 in high:
            raise UserError(
                f"the profile contradicts itself at input {name}",
                where=where,
                expected="0 <= min <= opt <= max in every dimension, and max at least 1",
                found=f"min {list(low)}, opt {list(opt)}, max {list(high)}",
                fix="make --opt-length and --max-length, --max-batch agree",
            )
