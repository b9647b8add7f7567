"""Do TensorRT-RTX engines that were built on a CPU load and run on this GPU, and compute what they should?

    instantrt gpu-check rtx prepare DIR             on a machine without a GPU: engines, inputs, expected outputs
    instantrt gpu-check rtx run DIR --out OUT.json  on the GPU machine: loads, runs and compares each

What is prepared: rtx_prepare.py. On a GPU whose SM TensorRT-RTX does not serve, `run` says so, and records the
runtime's own words of one engine (docs/facts.md, "SMs of TensorRT-RTX"). On others it takes four kinds of steps, each
in a process with a time limit:

    load    an engine from here: does it load, are its outputs and its tokens those
    build   the same after the engine was built on the GPU machine, for any GPU and for its own
    make    builds a model of Qwen2-1.5B's sizes, whose weights are made there (rtx_speed.py)
    speed   times that beside float16 in PyTorch, in turn: steps of 1 and 8 sequences, and a prompt of 512 tokens

The first needs numpy, packaging, the driver and TensorRT-RTX's two wheels (libraries and bindings, 97 MB); what builds
needs onnx as well, and the last torch and transformers. docs/gpu.md says how they travel to a machine without a
package registry.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from instantrt.compiler.backend.tensorrt.gpu import describe, gpus, no_rtx_here
from instantrt.compiler.serving.runtime.cuda import Device
from instantrt.compiler.serving.runtime.tensorrt_engine import BFLOAT16, TYPES, open_engine, widened
from instantrt.tools.gpu import rtx_speed
from instantrt.tools.gpu.rtx_prepare import (
    ARCHIVE,
    BUILDS,
    GREEDY,
    LENGTH,
    LIBRARY,
    PROMPTS,
    SPEEDS,
    VARIANTS,
    greedy,
    linked,
    prepare,
)
from instantrt.tools.gpu.watch import ChildJob, emit, run_all
from instantrt.tools.gpu.words import parser

Array = npt.NDArray[Any]
ALLOWED = 0.05  # relative error of an output: 16-bit arithmetic against float32
LIMIT = 120  # seconds without a word from an engine's process: the runtime compiles its kernels when it loads one
CAPABILITIES = ("default", "current")  # what an engine is built for there
SECONDS = {"make": 220, "load": LIMIT, "build": LIMIT, "speed": 100}  # without a word from a step's process
ONE = ((("load",), 30, 1),)  # where no engine loads
STAGES = ((("make", "load", "build"), 240, 6), (("speed",), 200, 1))  # kinds, seconds of all, processes at a time


def run(folder: Path, out: Path) -> bool:
    """Every engine of FOLDER in a process of its own; writes what happened and returns whether all was well."""
    if not gpus():
        sys.exit("no GPU: the driver library libcuda.so.1 finds none. Run this on a machine with an NVIDIA GPU.")
    if not (folder / ARCHIVE).is_file():
        sys.exit(f"there is no {folder / ARCHIVE}: instantrt gpu-check rtx prepare {folder}")
    if lost := no_rtx_here():
        print(f"{describe()}: {lost}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(folder / ARCHIVE) as archive:
            archive.extractall(scratch, filter="data")
        environment = {**linked(Path(scratch)), "CUDA_MODULE_LOADING": "LAZY"}
        outcomes = []
        for kinds, seconds, workers in STAGES if not lost else ONE:
            jobs = [
                ChildJob(command(scratch, kind, name), [f"{kind} {name}"], SECONDS[kind], environment)
                for kind in kinds
                for name in steps(Path(scratch), kind)
            ]
            jobs = jobs[:1] if lost else jobs
            outcomes += run_all(jobs, seconds, workers)
        results = {
            o.name: {"outcome": o.outcome, "message": o.message, "seconds": o.seconds}
            | (o.data or kept(Path(scratch), o.name))
            for o in outcomes
        }
    said = {"not_served": lost} if lost else {}
    out.write_text(json.dumps({"gpu": describe(), **said, "engines": results}, indent=1) + "\n")
    for name, result in results.items():
        told = result.get("times") or result.get("alone") or result.get("errors") or result["message"][-300:]
        print(f"{name:40} {result['outcome']:8} {result['seconds']:6.1f} s {json.dumps(told)[:600]}")
    return all(o.outcome == "passed" for o in outcomes)


def command(scratch: str, kind: str, name: str) -> Callable[[Sequence[str]], list[str]]:
    return lambda left: [sys.executable, "-m", "instantrt.tools.gpu.rtx", "one", scratch, kind, name]


def steps(folder: Path, kind: str) -> list[str]:
    """What there is to do of a kind: the names of its steps."""
    modes = {path.stem for path in folder.glob("*.onnx")}
    speeds = [name for v in SPEEDS if (name := f"{rtx_speed.MODEL}-{v.mode}") in modes]
    if kind == "load":
        engines = {path.stem for path in folder.glob("*.engine")}
        first = [v.name for v in VARIANTS if v.name in engines]
        return [*first, *sorted(engines - set(first))]
    if kind == "build":
        return [f"{mode}-{capability}" for mode in BUILDS if mode in modes for capability in CAPABILITIES]
    return speeds


def kept(folder: Path, name: str) -> dict[str, Any]:
    """What a step had found before its process was lost."""
    path = folder / f"{name}.kept"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def one(folder: Path, kind: str, name: str) -> None:
    """One step, a child of `run`: an engine from elsewhere, one that is built here, or the speed of one."""
    emit(start=f"{kind} {name}")
    data: dict[str, Any] = {"gpu": describe(), "loaded": False}
    try:
        trt = runtime_module()
        data["tensorrt_rtx"] = trt.__version__
        KINDS[kind](trt, folder, name, data)
    except Exception as error:
        emit(end=f"{kind} {name}", outcome="failed", message=f"{type(error).__name__}: {error}", data=data)
        return
    worst = max(data.get("errors", {}).values(), default=0.0)
    outcome = "passed" if worst <= ALLOWED else "failed"
    message = f"relative error {worst:.3g}, allowed {ALLOWED}" if "errors" in data else ""
    emit(end=f"{kind} {name}", outcome=outcome, message=message, data=data)


def load_step(trt: Any, folder: Path, name: str, data: dict[str, Any]) -> None:
    mode = next(v.mode for v in VARIANTS if v.name == name)
    run_engine(trt, folder / f"{name}.engine", folder / f"{mode}.npz", plugins(folder, mode), data)


def build_step(trt: Any, folder: Path, name: str, data: dict[str, Any]) -> None:
    mode, _, capability = name.rpartition("-")
    said, engine = data.setdefault("build_said", []), folder / f"{name}.built"
    ranges = rtx_speed.known(folder, mode)["profiles"]
    libraries = plugins(folder, mode)
    plan = build_here(trt, folder / f"{mode}.onnx", ranges, capability, libraries, said)
    engine.write_bytes(plan)
    data["built_bytes"] = len(plan)
    run_engine(trt, engine, folder / f"{mode}.npz", libraries, data)


def make_step(trt: Any, folder: Path, name: str, data: dict[str, Any]) -> None:
    said = data.setdefault("build_said", [])
    rtx_speed.make(folder, name, lambda onnx, ranges: build_here(trt, onnx, ranges, "default", (), said), data)


KINDS = {"make": make_step, "load": load_step, "build": build_step, "speed": rtx_speed.measure}


def plugins(folder: Path, mode: str) -> tuple[Path, ...]:
    return (folder / LIBRARY,) if mode.endswith("plugin") else ()


def build_here(trt: Any, onnx: Path, ranges: Any, capability: str, libraries: Sequence[Path], said: list[str]) -> bytes:
    """An engine for any GPU or for the one of this machine, in this process; RuntimeError with the builder's words."""
    from instantrt.compiler.backend.tensorrt.child import add_profile, network_flags

    log = logger(trt, said)
    for library in libraries:
        if not trt.get_plugin_registry().load_library(str(library)):
            raise RuntimeError(f"the plugin library is refused: {said[-3:]}")
    builder = trt.Builder(log)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        raise RuntimeError(f"not parsed: {[parser.get_error(i).desc() for i in range(parser.num_errors)][:3]}")
    config = builder.create_builder_config()
    if capability == "current":
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(trt.ComputeCapability.CURRENT, 0):
            raise RuntimeError(f"the builder refuses the GPU of this machine: {said[-3:]}")
    for number, profile in enumerate(ranges):
        add_profile(builder, config, number, profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"not built: {said[-3:]}")
    return bytes(plan)


def runtime_module() -> Any:
    """TensorRT-RTX by its own name, or its bindings, which are all of it."""
    found = [name for name in ("tensorrt_rtx", "tensorrt_rtx_bindings") if importlib.util.find_spec(name)]
    return importlib.import_module(found[0] if found else "tensorrt_rtx")


def logger(trt: Any, said: list[str]) -> Any:
    """Keeps warnings and errors."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                said.append(f"{severity.name}: {message}"[:1000])

    return Log()


def run_engine(trt: Any, path: Path, arrays_of: Path, libraries: Sequence[Path], data: dict[str, Any]) -> None:
    """`data` gets what the runtime says of the engine, the relative error of each output, and what it generates."""
    said = data.setdefault("said", list[str]())
    plan = path.read_bytes()
    log = logger(trt, said)
    runtime = trt.Runtime(log)
    for library in libraries:
        data["plugin"] = bool(runtime.get_plugin_registry().load_library(str(library)))
    validity, diagnostics = runtime.get_engine_validity(plan)
    flags = trt.EngineInvalidityDiagnostics.__members__
    data["validity"] = str(validity)
    data["diagnostics"] = [flag for flag, value in flags.items() if int(diagnostics) & int(value)]
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError(f"not loaded: {validity} {data['diagnostics']} {said[-3:]}")
    data["loaded"] = True
    device = Device(0)
    with np.load(arrays_of) as file:
        arrays = dict(file)
    errors: dict[str, float] = {}
    for number, step in enumerate(("prefill", "decode")):
        given, wanted = (part(arrays, f"{step}/{side}/") for side in ("in", "out"))
        got = execute(engine, device, number, given, list(wanted))
        errors |= {f"{step} {group}": error for group, error in compared(got, wanted).items()}
    data["errors"] = errors
    del engine
    data["greedy"] = generated(open_engine(path, libraries, trt, Device(0), 1, LENGTH), arrays)


def generated(engine: Any, arrays: Mapping[str, Array]) -> list[dict[str, Any]]:
    """What our own runtime generates, beside the artifact for CPUs: the first token that differs and its margin."""
    results = []
    for number in range(len(PROMPTS)):
        wanted, margins = arrays[f"tokens/{number}"], arrays[f"margins/{number}"]
        tokens, _ = greedy(engine, arrays[f"prompt/{number}"])
        differ = np.flatnonzero(tokens != wanted)
        result = {"tokens": tokens.tolist(), "equal": int(differ[0]) if len(differ) else GREEDY, "of": GREEDY}
        if len(differ):
            result |= {
                "wanted": wanted.tolist(),
                "margin": float(margins[differ[0]]),
                "median": float(np.median(margins)),
            }
        results.append(result)
    engine.close()
    return results


def part(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def execute(
    engine: Any, device: Device, profile: int, given: Mapping[str, Array], wanted: list[str]
) -> dict[str, Array]:
    """The outputs, as float32, of one run in one profile."""
    context = engine.create_execution_context()
    context.set_optimization_profile_async(profile, device.stream.value)
    kept = {name: as_type(value, engine.get_tensor_dtype(name).name) for name, value in given.items()}
    for name, value in kept.items():
        address = device.allocate(max(value.nbytes, 256))
        device.upload(address, value)
        if not context.set_input_shape(name, value.shape):
            raise RuntimeError(f"the engine was not built for {name} of shape {value.shape}")
        context.set_tensor_address(name, address)
    outputs: dict[str, tuple[Array, int]] = {}
    for name in wanted:
        array = np.empty(tuple(context.get_tensor_shape(name)), TYPES[engine.get_tensor_dtype(name).name])
        outputs[name] = array, device.allocate(max(array.nbytes, 256))
        context.set_tensor_address(name, outputs[name][1])
    if not context.execute_async_v3(device.stream.value):
        raise RuntimeError("the engine failed to run")
    for array, address in outputs.values():
        device.download(array, address)
    return {name: widened(array) for name, (array, _) in outputs.items()}


def as_type(value: Array, name: str) -> Array:
    """`value` as a TensorRT type; float32 to bfloat16 by rounding half to even."""
    if TYPES[name] is not BFLOAT16:
        return np.ascontiguousarray(value, TYPES[name])
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(BFLOAT16)


def compared(got: Mapping[str, Array], wanted: Mapping[str, Array]) -> dict[str, float]:
    """The largest relative error of the logits, and that of the caches; infinite where it is no number."""
    errors: dict[str, float] = {}
    for name, want in wanted.items():
        error = float(np.linalg.norm(got[name] - want) / np.linalg.norm(want))
        group = "logits" if name == "logits" else "caches"
        errors[group] = max(errors.get(group, 0.0), error if np.isfinite(error) else float("inf"))
    return errors


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    options = parser(__doc__, prog)
    options.add_argument("action", choices=("prepare", "run", "one"))
    options.add_argument("folder", type=Path)
    options.add_argument("kind", nargs="?", help="of `one`: load, build or speed")
    options.add_argument("name", nargs="?", help="of `one`")
    options.add_argument("--plugin", type=Path, help="of `prepare`: the plugin library")
    options.add_argument("--wide", type=Path, help="of `prepare`: a checkpoint of one wide layer")
    options.add_argument("--big", type=Path, help="of `prepare`: the checkpoint whose sizes the speed is measured with")
    options.add_argument("--out", type=Path, default=Path("rtx.json"))
    args = options.parse_args(words)
    if args.action == "prepare":
        prepare(args.folder, plugin=args.plugin, big=args.big, one_layer=args.wide)
    elif args.action == "one":
        one(args.folder, args.kind, args.name)
    else:
        sys.exit(0 if run(args.folder, args.out) else 1)


if __name__ == "__main__":
    main()
