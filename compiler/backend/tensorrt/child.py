"""The process that one TensorRT engine is built in: build.py starts it by its module's name.

Reads its order, {"build": EngineSpec} or {"load": {flavour, engine, plugins}}, from standard input; writes events as
JSON lines to standard output:

    {"progress": [0.42, "Optimizing graph"]}          {"message": ["WARNING", "..."]}
    {"refused": ["..."], "what": "...", "fix": "..."}  {"done": {version, bytes}}

One code path serves TensorRT 10, 11 and RTX. Enum members are named, never numbered: their integers moved between
releases (docs/facts.md, "Enumerators move").
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from packaging.specifiers import SpecifierSet

from instantrt.compiler.backend.tensorrt.build import PRODUCT, EngineSpec, install

# On a machine without a driver every error is followed by one that says just this; and that inputs are int64 is known.
NOISE = ("cudaError 35", "has Int64 binding")
CHUNK = 64 << 20


class Refused(Exception):  # noqa: N818 -- it is an answer, and reads as one
    """The build cannot be done, for reasons that a user can act on."""

    def __init__(self, what: str, reasons: Sequence[str] = (), *, expected: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.event = {"refused": list(reasons), "what": what, "expected": expected, "fix": fix}


class Events:
    """JSON lines to the parent. A parent that is gone ends this process."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def send(self, **event: Any) -> None:
        try:
            self.stream.write(json.dumps(event) + "\n")
            self.stream.flush()
        except BrokenPipeError:
            os._exit(1)


def main() -> None:
    # What the builder's libraries print on standard output must not mix with events.
    events = Events(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the compiler
    order = json.loads(sys.stdin.read())
    try:
        if "load" in order:
            events.send(done=load(**order["load"], events=events))
        else:
            events.send(done=build(EngineSpec.from_json(order["build"]), events))
    except Refused as refused:
        events.send(**refused.event)
    except OSError as error:
        # Beside the plan, whose errors PlanFile collects: the table of layers, or the timings.
        disk = Refused("the builder could not read or write a file", [str(error)], fix="free some disk space")
        events.send(**disk.event)


def build(spec: EngineSpec, events: Events) -> dict[str, Any]:
    """Parse, configure, build: the engine lies at `spec.partial` when this returns."""
    trt = importlib.import_module(spec.flavour)
    check_version(trt, spec)
    logger = make_logger(trt, events)
    builder = trt.Builder(logger)
    load_plugins(trt, spec.plugins)
    network = builder.create_network(network_flags(trt))
    parser = parse(trt, network, logger, spec)
    config = configure(trt, builder, spec)
    config.progress_monitor = make_monitor(trt, events)
    cache = attach_timing_cache(config, spec)
    size = write_plan(trt, builder, network, config, spec)
    del parser  # owns memory that the network's weights point into: it must outlive the build
    if cache is not None and spec.options.timing_cache:
        spec.options.timing_cache.write_bytes(bytes(cache.serialize()))
    spec.layers.write_text(logger.layers or inspect(trt, logger, spec.partial), encoding="utf-8")
    return {"version": trt.__version__, "bytes": size}


def is_rtx(trt: Any) -> bool:
    return hasattr(trt, "ComputeCapability")


def check_version(trt: Any, spec: EngineSpec) -> None:
    """Refuses a TensorRT that does not build for this GPU, or does not parse what was lowered for another."""
    if is_rtx(trt) != (spec.flavour == "tensorrt_rtx"):
        raise Refused(f"the package {spec.flavour} is not {PRODUCT[spec.flavour]}")
    if not is_rtx(trt) and not SpecifierSet(spec.releases).contains(trt.__version__):
        raise Refused(
            "this TensorRT does not build for this target",
            [f"TensorRT {trt.__version__}"],
            expected=f"TensorRT {spec.releases}",
            fix=install(spec),
        )


def network_flags(trt: Any) -> int:
    """Strongly typed and, where it still is a choice, explicit batch: 3 on TensorRT 10, 1 on 11 and RTX."""
    members = trt.NetworkDefinitionCreationFlag.__members__
    return sum(1 << int(members[name]) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if name in members)


def make_logger(trt: Any, events: Events) -> Any:
    class BuilderLog(trt.ILogger):  # type: ignore[misc]
        """Passes warnings and errors on; keeps the table of kernels, which only verbose messages carry."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.layers = ""
            self.spoke = False

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                self.layers = message
            elif severity <= trt.ILogger.WARNING and not any(noise in message for noise in NOISE):
                name = "WARNING" if severity == trt.ILogger.WARNING else "ERROR"
                self.spoke = True
                events.send(message=[name, message.strip()])

    return BuilderLog()


def load(flavour: str, engine: str, plugins: Sequence[str], events: Events) -> dict[str, Any]:
    """Deserializes an engine, which must have been checked before: engines are code."""
    trt = importlib.import_module(flavour)
    logger = make_logger(trt, events)
    load_plugins(trt, plugins)
    loaded = trt.Runtime(logger).deserialize_cuda_engine(Path(engine).read_bytes())
    if loaded is None:
        raise Refused(f"TensorRT {trt.__version__} cannot load this engine", [] if logger.spoke else ["no GPU here"])
    return {"version": trt.__version__}


def load_plugins(trt: Any, libraries: Sequence[Path | str]) -> None:
    if not libraries:
        return
    if not hasattr(trt.INetworkDefinition, "add_plugin_v3"):
        # The RTX parser looks this name up when it meets a plugin node, and ends the process when it is missing
        # (docs/facts.md, "Plugins in TensorRT-RTX").
        try:
            ctypes.CDLL("libtensorrt_rtx.so")
        except OSError as error:
            raise Refused(
                "this TensorRT-RTX cannot load plugins",
                [str(error)],
                fix="lower without plugins, or link libtensorrt_rtx.so to libtensorrt_rtx.so.1 on LD_LIBRARY_PATH",
            ) from error
    for library in libraries:
        if not trt.get_plugin_registry().load_library(str(library)):
            raise Refused(f"TensorRT refused the plugin library {library}")


# Reasons in the parser's words that say little to who did not write the parser.
PLAIN_WORDS = {
    "false": "TensorRT has no such operation",
    "Plugin not found": "TensorRT has no such operation, and no plugin of this name is loaded",
    "Failed to convert ONNX date type": "TensorRT has no tensors of this type",
    "shiftIsAllZeros": "TensorRT takes no zero points other than zero",
    "input type of UINT8": "TensorRT takes no unsigned codes",
    "Scale coefficients must all be positive": "a scale is zero or negative",
}


def parse(trt: Any, network: Any, logger: Any, spec: EngineSpec) -> Any:
    """The parser, after it filled `network`; refuses with every unsupported node at once, not the first one."""
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(spec.onnx)):
        reasons = [refusal(parser.get_error(i)) for i in range(parser.num_errors)]
        raise Refused(
            f"{PRODUCT[spec.flavour]} {trt.__version__} cannot read this graph",
            reasons or ["the parser gave no reason"],
        )
    return parser


def refusal(error: Any) -> str:
    words = next((plain for key, plain in PLAIN_WORDS.items() if key in error.desc()), "")
    where = f"{error.node_name() or 'an input or initializer'} ({error.node_operator() or error.func()})"
    return f"{where}: {words or error.desc()}" + (f" [{error.desc()}]" if words and words != error.desc() else "")


def configure(trt: Any, builder: Any, spec: EngineSpec) -> Any:
    config, options = builder.create_builder_config(), spec.options
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    set_targets(trt, config, spec)
    for number, profile in enumerate(spec.profiles):
        add_profile(builder, config, number, profile)
    if options.memory_limit:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.memory_limit << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if is_rtx(trt) and (options.version_compatible or options.hardware_compatible):
        raise Refused(
            "TensorRT-RTX has no version-compatible or hardware-compatible engines",
            fix="name several targets: one RTX engine may serve a list of SMs",
        )
    for flag in (option.flag for option, _ in options.asked if option.flag):
        config.set_flag(trt.BuilderFlag.__members__[flag])
    if options.hardware_compatible:
        levels = trt.HardwareCompatibilityLevel.__members__
        if options.hardware_compatible.upper() not in levels:
            raise Refused(
                f"unknown hardware compatibility level {options.hardware_compatible}",
                expected=", ".join(levels).lower(),
            )
        config.hardware_compatibility_level = levels[options.hardware_compatible.upper()]
    return config


def set_targets(trt: Any, config: Any, spec: EngineSpec) -> None:
    """RTX builds for the SMs it is told; full TensorRT for the GPU it runs on."""
    if not is_rtx(trt) or not spec.sms:
        return
    known = trt.ComputeCapability.__members__
    config.num_compute_capabilities = len(spec.sms)
    for index, sm in enumerate(spec.sms):
        if f"SM{sm}" not in known or not config.set_compute_capability(known[f"SM{sm}"], index):
            names = ", ".join(name.lower() for name in known if name.startswith("SM"))
            raise Refused(f"TensorRT-RTX {trt.__version__} does not build for sm{sm}", expected=names)


def add_profile(builder: Any, config: Any, number: int, shapes: Any) -> None:
    profile = builder.create_optimization_profile()
    for name, (low, opt, high) in shapes.items():
        profile.set_shape(name, low, opt, high)
    if config.add_optimization_profile(profile) < 0:
        raise Refused(f"the builder refused profile {number}", [f"{name}: {shape}" for name, shape in shapes.items()])


def make_monitor(trt: Any, events: Events) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Turns the builder's nested phases into one fraction, sent at most ten times a second."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, steps done, steps
            self.last = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (parent_phase, 0, max(1, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            parent, _, steps = self.phases[phase_name]
            self.phases[phase_name] = (parent, step + 1, steps)
            if time.monotonic() - self.last > 0.1:
                self.last = time.monotonic()
                events.send(progress=[min(1.0, self.fraction(phase_name)), phase_name])
            return True  # cancelling is the parent's: it ends this process

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def fraction(self, phase: str) -> float:
            inner = 0.0
            name: str | None = phase
            while name in self.phases:
                parent, done, steps = self.phases[name]
                inner, name = (done + inner) / steps, parent
            return inner

    return Monitor()


def attach_timing_cache(config: Any, spec: EngineSpec) -> Any:
    """The timings of an earlier build on this GPU; RTX measures nothing and has none."""
    path = spec.options.timing_cache
    if path is None or spec.flavour == "tensorrt_rtx":
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise Refused("the timing cache belongs to another GPU or TensorRT", [str(path)], fix="delete the file")
    return cache


class PlanFile:
    """Where the plan goes: counts, and keeps the first error, which the builder itself would ignore."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            return 0
        self.size += len(data)
        return len(data)

    def close(self) -> None:
        try:
            self.file.close()
        except OSError as error:
            self.error = self.error or error
        if self.error:
            raise Refused("the engine could not be written", [str(self.error)], fix="free some disk space")


def write_plan(trt: Any, builder: Any, network: Any, config: Any, spec: EngineSpec) -> int:
    """Builds; streams the plan where the release can (half the memory), else writes it in slices."""
    plan = PlanFile(spec.partial)
    if hasattr(builder, "build_serialized_network_to_stream"):

        class PlanStream(trt.IStreamWriter):  # type: ignore[misc]
            def write(self, data: Any) -> int:
                return plan.write(data)

        ok = builder.build_serialized_network_to_stream(network, config, PlanStream())
    else:
        memory = builder.build_serialized_network(network, config)
        ok = memory is not None
        for part in slices(memory) if ok else ():
            plan.write(part)
    plan.close()
    if not ok or not plan.size:
        raise Refused(f"{PRODUCT[spec.flavour]} {trt.__version__} could not build this graph")
    return plan.size


def slices(memory: Any) -> Iterator[memoryview]:
    view = memoryview(memory)
    for start in range(0, len(view), CHUNK):
        yield view[start : start + CHUNK]


def inspect(trt: Any, logger: Any, plan: Path) -> str:
    """The table of kernels where the builder did not log it: full TensorRT, which runs beside its GPU."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        return ""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE))


if __name__ == "__main__":
    main()
