"""Do TensorRT-RTX engines that were built on a CPU load and run on this GPU, and compute what they should?

    instantrt gpu-check rtx prepare DIR             on a machine without a GPU: engines, inputs, expected outputs
    instantrt gpu-check rtx run DIR --out OUT.json  on the GPU machine: loads, runs and compares each

`prepare` compiles examples/tiny-qwen2 with the compiler itself, in each mode for any GPU (the builder's own default)
and in one mode for single and several SMs, with and without nodes of the plugin, and one layer of the sizes of a 7 B
model. Outputs to compare with are ONNX Runtime's of the Q/DQ twin, for a prompt and for the token after it; tokens are
those that the artifact for CPUs generates. On a GPU whose SM TensorRT-RTX does not serve, `run` says so, and records
the runtime's own words of one engine (docs/facts.md, "SMs of TensorRT-RTX"). On others it takes four kinds of steps,
each in a process with a time limit:

    load    an engine from here: does it load, are its outputs and its tokens those
    build   the same after the engine was built on the GPU machine, for any GPU and for its own
    make    builds a model of Qwen2-1.5B's sizes, whose weights are made there (rtx_speed.py)
    speed   times that beside float16 in PyTorch, in turn: steps of 1 and 8 sequences, and a prompt of 512 tokens

The first needs numpy, packaging, the driver and TensorRT-RTX's two wheels (libraries and bindings, 97 MB); what builds
needs onnx as well, and the last torch and transformers.

Where the GPU machine reaches no package registry and takes less than all that at once, the runtime travels in
pieces, in two ignored folders, the second with the engines. Here, with the minor version of Python that runs there:

    rtx='tensorrt_rtx_cu13_libs==1.7.1.116 tensorrt_rtx_cu13_bindings==1.7.1.116'
    options='--no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64'
    pip download $options -d build/wheels $rtx
    pip install $options --no-index --find-links build/wheels --no-compile --target build/site $rtx
    mkdir build/rtx1 build/rtx2
    tar c -C build/site . | xz -6 | split -b 42M - build/rtx1/piece. && mv build/rtx1/piece.ab build/rtx2
    cmake -S plugins -B build/plugins -DTensorRT_ROOT=DIR -DCMAKE_CUDA_ARCHITECTURES=89-real     of the GPU there
    cmake --build build/plugins --target instantrt_plugins
    from='from instantrt.tools.bench.synthetic import *;'
    python -c "$from write_checkpoint(Path('build/big'), QWEN2_15B)"
    python -c "$from write_checkpoint(Path('build/wide'), {**QWEN2_7B, 'num_hidden_layers': 1, 'vocab_size': 128})"
    instantrt gpu-check rtx prepare build/rtx2 --plugin build/plugins/libinstantrt_plugins.so --big build/big \\
        --wide build/wide

That is 69 MB in two pieces, and 20 MB of engines. `--plugin`, `--big` and `--wide` may be left out.

There: bring build/rtx1, then build/rtx2, and

    mkdir -p /tmp/site && cat build/rtx1/piece.aa build/rtx2/piece.ab | tar xJ -C /tmp/site
    PYTHONPATH=/tmp/site:. python -m instantrt.tools.gpu.rtx run build/rtx2 --out rtx.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from instantrt.compiler.backend.tensorrt.gpu import describe, gpus, no_rtx_here
from instantrt.compiler.quant.config import Quant
from instantrt.compiler.serving.runtime.cuda import Device
from instantrt.compiler.serving.runtime.tensorrt_engine import BFLOAT16, TYPES, open_engine, widened
from instantrt.tools.gpu import rtx_speed
from instantrt.tools.gpu.watch import ChildJob, emit, run_all

Array = npt.NDArray[Any]
ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-qwen2"
ARCHIVE = "engines.tar.xz"  # of <variant>.engine and <mode>.npz: what engines share is in it once
TOKENS = 24  # of the prompt
ALLOWED = 0.05  # relative error of an output: 16-bit arithmetic against float32
LIMIT = 120  # seconds without a word from an engine's process: the runtime compiles its kernels when it loads one


@dataclass(frozen=True)
class Variant:
    """One engine; no SMs: the builder's default, which is to run on whatever comes later, too."""

    quant: Quant
    group: int = -1
    sms: tuple[int, ...] = ()
    model: str = ""  # wide: what --wide names; else the example
    plugin: bool = False  # its weight-only linears are nodes of our own

    @property
    def mode(self) -> str:
        """What engines share that differ in their SMs alone."""
        parts = (self.model, self.quant, f"g{self.group}" if self.group > 0 else "", "plugin" if self.plugin else "")
        return "-".join(filter(None, parts))

    @property
    def name(self) -> str:
        return "-".join([self.mode, *(f"sm{sm}" for sm in self.sms)]) + ("" if self.sms else "-default")


VARIANTS = (
    Variant("a16w4", 128), Variant("a16w8"), Variant("a8w8"), Variant("a16w4", 128, (80,)),
    Variant("a16w4", 128, (86,)), Variant("a16w4", 128, (89,)), Variant("a16w4", 128, (120,)),
    Variant("a16w4", 128, (80, 86, 89, 120)), Variant("a16w4", 128, model="wide"), Variant("a16w4", 128, plugin=True),
)  # fmt: skip
BUILDS = ("a16w4-g128", "a16w4-g128-plugin")  # modes whose lowered model travels, to be built there
CAPABILITIES = ("default", "current")  # what an engine is built for there
SPEEDS = (Variant("a8w8"), Variant("a16w4", 128), Variant("a16w8"))  # of the model in rtx_speed.py
LIBRARY = "libinstantrt_plugins.so"
PROMPTS, GREEDY, LENGTH = (5, 24, 60), 24, 256  # tokens of the prompts, tokens after each, and what engines take
SECONDS = {"make": 220, "load": LIMIT, "build": LIMIT, "speed": 100}  # without a word from a step's process
ONE = ((("load",), 30, 1),)  # where no engine loads
STAGES = ((("make", "load", "build"), 240, 6), (("speed",), 200, 1))  # kinds, seconds of all, processes at a time


def prepare(
    folder: Path,
    variants: tuple[Variant, ...] = VARIANTS,
    plugin: Path | None = None,
    big: Path | None = None,
    one_layer: Path | None = None,
) -> None:
    """FOLDER/engines.tar.xz; the arrays of a mode are called step/in/name and step/out/name, prompt/N and tokens/N.

    plugin   the library of the plugin; without it nothing with a plugin is prepared
    big      a checkpoint of the sizes of which the speed is to be measured
    one_layer   a checkpoint of one wide layer
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if plugin is not None:
            shutil.copy(plugin, Path(scratch, LIBRARY))
            os.environ.update(linked(Path(scratch)))
        variants = tuple(v for v in variants if (plugin or not v.plugin) and (one_layer or not v.model))
        for mode in dict.fromkeys(v.mode for v in variants):
            each = [v for v in variants if v.mode == mode]
            compile_mode(Path(scratch), each, one_layer if one_layer and each[0].model else MODEL)
        for variant in SPEEDS if big is not None else ():
            assert big is not None
            outline_mode(Path(scratch), big, variant)
        with tarfile.open(folder / ARCHIVE, "w:xz", preset=9) as archive:
            for path in sorted(Path(scratch).iterdir()):
                print(f"{path.name:40} {path.stat().st_size / 1e6:6.1f} MB", flush=True)
                if path.is_file() and not path.is_symlink():
                    archive.add(path, path.name)


def linked(folder: Path) -> dict[str, str]:
    """The environment in which TensorRT-RTX takes plugins: docs/facts.md, "Plugins in TensorRT-RTX"."""
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    if found is None or found.origin is None:
        return {}
    link = folder / "libtensorrt_rtx.so"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(found.origin).with_name("libtensorrt_rtx.so.1"))
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]))}


def repeated(checkpoint: Path, folder: Path) -> Path:
    """A copy whose rows of weights repeat: its engine travels compressed."""
    model = folder / "checkpoint"
    shutil.copytree(checkpoint, model)
    path = model / "model.safetensors"
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            row = 2 * entry["shape"][-1]
            if "proj.weight" in name:
                file.seek(8 + size + start)
                rows = file.read(16 * row)
                for at in range(start, end, len(rows)):
                    file.seek(8 + size + at)
                    file.write(rows[: end - at])
    return model


TARGET = "sm89"  # any that TensorRT-RTX builds for: one lowering serves them all


def compile_mode(folder: Path, variants: list[Variant], checkpoint: Path = MODEL) -> None:
    """One lowered graph and its twin, an engine for each variant, and what the artifact for CPUs generates."""
    from instantrt.compiler.backend.onnx_writer import write_model
    from instantrt.compiler.backend.tensorrt.build import EngineSpec, build
    from instantrt.compiler.backend.tensorrt.profiles import profiles
    from instantrt.compiler.plan import plan
    from instantrt.compiler.request import Request

    first = variants[0]
    library = folder / LIBRARY if first.plugin else None
    with tempfile.TemporaryDirectory() as scratch:
        model = repeated(checkpoint, Path(scratch)) if first.model else checkpoint
        request = Request(
            model=model, targets=(TARGET,), out=Path(scratch), quant=first.quant, group_size=first.group,
            max_length=LENGTH, opt_length=64, plugin=library,
        )  # fmt: skip
        planned = plan(request)
        assert planned.model.llm is not None
        graph, onnx = planned.lowered[TARGET], Path(scratch, f"{first.mode}.onnx")
        write_model(graph, onnx)
        ranges = profiles(graph.inputs, request.engine_limits(planned.model.llm.max_length), llm=True)
        plugins = (library,) if library else ()
        for variant in variants:
            engine = folder / f"{variant.name}.engine"
            build(EngineSpec("tensorrt_rtx", onnx, engine, Path(scratch, "layers"), ranges, variant.sms, plugins))
        if first.mode in BUILDS:
            (folder / f"{first.mode}.json").write_text(json.dumps({"config": {}, "profiles": ranges}))
            for path in Path(scratch).glob(f"{first.mode}.onnx*"):
                shutil.copy(path, folder)
        twin = Path(scratch, "twin.onnx")
        write_model(planned.twins[TARGET].canonical.copy(), twin)
        vocabulary = int(graph.outputs[0].shape[-1])
        arrays = expected(twin, vocabulary) | on_cpu(first, model, Path(scratch), vocabulary)
        np.savez(folder / f"{first.mode}.npz", **arrays)  # type: ignore[arg-type]


def on_cpu(variant: Variant, model: Path, scratch: Path, vocabulary: int) -> dict[str, Array]:
    """What the artifact for x86 CPUs generates greedily from prompts, and how far its choice is ahead each time."""
    from instantrt.compiler.compile import compile_model
    from instantrt.compiler.request import Request
    from instantrt.compiler.serving.runtime.opening import open_engine
    from instantrt.compiler.serving.runtime.scheduler import SequenceLimits

    out = scratch / "cpu"
    request = Request(
        model=model, targets=("x86",), out=out, quant=variant.quant, group_size=variant.group, smoke=False
    )
    (artifact,) = compile_model(request)
    engine = open_engine(
        out / "x86" / "model.onnx", (), SequenceLimits(1, LENGTH, 1), runtime="onnxruntime",
        cache=str(artifact.limits["cache"]),
    )  # fmt: skip
    random, arrays = np.random.default_rng(1), dict[str, Array]()
    for number, size in enumerate(PROMPTS):
        prompt = random.integers(1, min(500, vocabulary), size)
        tokens, margins = greedy(engine, prompt)
        arrays |= {f"prompt/{number}": prompt, f"tokens/{number}": tokens, f"margins/{number}": margins}
    engine.close()
    return arrays


def greedy(engine: Any, prompt: Array) -> tuple[Array, Array]:
    """GREEDY tokens after a prompt, and by how much the logit of each was above all others."""
    logits, tokens, margins = engine.prefill(0, prompt, 0), list[int](), list[float]()
    for done in range(len(prompt), len(prompt) + GREEDY):
        tokens.append(int(logits.argmax()))
        second, first = np.partition(logits, -2)[-2:]
        margins.append(float(first - second))
        (logits,) = engine.decode(np.array(tokens[-1:]), np.array([done]))
    return np.array(tokens), np.array(margins, np.float32)


def outline_mode(folder: Path, checkpoint: Path, variant: Variant) -> None:
    """The lowered model of a large checkpoint without its weights, and its profiles."""
    from instantrt.compiler.backend.tensorrt.profiles import profiles
    from instantrt.compiler.plan import plan
    from instantrt.compiler.request import Request

    request = Request(
        model=checkpoint, targets=(TARGET,), out=folder, quant=variant.quant, group_size=variant.group,
        max_length=rtx_speed.LENGTH, opt_length=rtx_speed.PAST, max_batch=max(rtx_speed.ROWS), kv_cache="in-place",
    )  # fmt: skip
    planned = plan(request)
    assert planned.model.llm is not None
    graph = planned.lowered[TARGET]
    ranges = profiles(graph.inputs, request.engine_limits(planned.model.llm.max_length), llm=True)
    config = json.loads((checkpoint / "config.json").read_text())
    name = f"{rtx_speed.MODEL}-{variant.mode}"
    (folder / f"{name}.json").write_text(json.dumps({"config": config, "profiles": ranges}))
    rtx_speed.outline(graph, folder / f"{name}.onnx")


def expected(twin: Path, vocabulary: int) -> dict[str, Array]:
    """A prompt on an empty cache, then a token on what it left there."""
    from instantrt.compiler.accuracy.runners import session

    run = session(twin, as_written=True)
    names = [output.name for output in run.get_outputs()]
    shapes = {i.name: i.shape for i in run.get_inputs() if i.name.startswith("past_key_values.")}
    ids = np.random.default_rng(0).integers(1, min(4000, vocabulary), (1, TOKENS + 1))
    past = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}
    found: dict[str, Array] = {}
    for step, (start, end) in {"prefill": (0, TOKENS), "decode": (TOKENS, TOKENS + 1)}.items():
        feeds = {
            "input_ids": ids[:, start:end], "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end)[None], **past,
        }  # fmt: skip
        outputs = dict(zip(names, run.run(None, feeds), strict=True))
        outputs["logits"] = outputs["logits"][:, -1:]  # what the engines give
        past = {name: outputs[name.replace("past_key_values.", "present.")] for name in shapes}
        found |= {f"{step}/in/{name}": value for name, value in feeds.items()}
        found |= {f"{step}/out/{name}": value for name, value in outputs.items()}
    return found


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
    data.update(run_engine(trt, folder / f"{name}.engine", folder / f"{mode}.npz", plugins(folder, mode), data))


def build_step(trt: Any, folder: Path, name: str, data: dict[str, Any]) -> None:
    mode, _, capability = name.rpartition("-")
    said, engine = data.setdefault("build_said", []), folder / f"{name}.built"
    ranges = json.loads((folder / f"{mode}.json").read_text())["profiles"]
    libraries = plugins(folder, mode)
    plan = build_here(trt, folder / f"{mode}.onnx", ranges, capability, libraries, said)
    engine.write_bytes(plan)
    data["built_bytes"] = len(plan)
    data.update(run_engine(trt, engine, folder / f"{mode}.npz", libraries, data))


def make_step(trt: Any, folder: Path, name: str, data: dict[str, Any]) -> None:
    said = data.setdefault("build_said", [])
    rtx_speed.make(folder, name, lambda onnx, ranges: build_here(trt, onnx, ranges, "default", (), said), data)


def speed_step(trt: Any, folder: Path, name: str, data: dict[str, Any]) -> None:
    def keep() -> None:
        (folder / f"speed {name}.kept").write_text(json.dumps(data))

    rtx_speed.measure(folder, name, trt, data, keep)


KINDS = {"make": make_step, "load": load_step, "build": build_step, "speed": speed_step}


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


def run_engine(
    trt: Any, path: Path, arrays_of: Path, libraries: Sequence[Path], data: dict[str, Any]
) -> dict[str, Any]:
    """What the runtime says of the engine, the relative error of each output, and what it generates."""
    said: list[str] = []
    data["said"] = said
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
    return data


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
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("prepare", "run", "one"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", nargs="?", help="of `one`: load, build or speed")
    parser.add_argument("name", nargs="?", help="of `one`")
    parser.add_argument("--plugin", type=Path, help="of `prepare`: the plugin library")
    parser.add_argument("--wide", type=Path, help="of `prepare`: a checkpoint of one wide layer")
    parser.add_argument("--big", type=Path, help="of `prepare`: the checkpoint whose sizes the speed is measured with")
    parser.add_argument("--out", type=Path, default=Path("rtx.json"))
    args = parser.parse_args(words)
    if args.action == "prepare":
        prepare(args.folder, plugin=args.plugin, big=args.big, one_layer=args.wide)
    elif args.action == "one":
        one(args.folder, args.kind, args.name)
    else:
        sys.exit(0 if run(args.folder, args.out) else 1)


if __name__ == "__main__":
    main()
