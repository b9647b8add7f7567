"""Do TensorRT-RTX engines that were built on a CPU load and run on this GPU, and compute what they should?

    instantrt gpu-check rtx prepare DIR             on a machine without a GPU: engines, inputs, expected outputs
    instantrt gpu-check rtx run DIR --out OUT.json  on the GPU machine: loads, runs and compares each

`prepare` compiles examples/tiny-qwen2 with the compiler itself, in each mode for any GPU (the builder's own default)
and in one mode for single and several SMs; the outputs are ONNX Runtime's of the Q/DQ twin, for a prompt and for the
token after it. `run` needs numpy, the driver and TensorRT-RTX's two wheels (libraries and bindings, 97 MB), nothing
else of this project's dependencies; each engine is in a process of its own, with a time limit.

Where the GPU machine reaches no package registry and takes less than all that at once, the runtime travels in
pieces, in two ignored folders, the second with the engines. Here, with the minor version of Python that runs there:

    rtx='tensorrt_rtx_cu13_libs==1.7.1.116 tensorrt_rtx_cu13_bindings==1.7.1.116'
    options='--no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64'
    pip download $options -d build/wheels $rtx
    pip install $options --no-index --find-links build/wheels --no-compile --target build/site $rtx
    mkdir build/rtx1 build/rtx2
    tar c -C build/site . | xz -6 | split -b 42M - build/rtx1/piece. && mv build/rtx1/piece.ab build/rtx2
    instantrt gpu-check rtx prepare build/rtx2                             68 MB in two pieces, 13 MB of engines

There: bring build/rtx1, then build/rtx2, and

    mkdir -p /tmp/site && cat build/rtx1/piece.aa build/rtx2/piece.ab | tar xJ -C /tmp/site
    PYTHONPATH=/tmp/site:. python -m instantrt.tools.gpu.rtx run build/rtx2 --out rtx.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from instantrt.compiler.backend.tensorrt.gpu import describe, gpus
from instantrt.compiler.quant.config import Quant
from instantrt.compiler.serving.runtime.cuda import Device
from instantrt.compiler.serving.runtime.tensorrt_engine import BFLOAT16, TYPES, widened
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

    @property
    def mode(self) -> str:
        return self.quant + (f"-g{self.group}" if self.group > 0 else "")

    @property
    def name(self) -> str:
        return "-".join([self.mode, *(f"sm{sm}" for sm in self.sms)]) + ("" if self.sms else "-default")


VARIANTS = (
    Variant("a16w4", 128), Variant("a16w8"), Variant("a8w8"), Variant("a16w4", 128, (80,)),
    Variant("a16w4", 128, (89,)), Variant("a16w4", 128, (120,)), Variant("a16w4", 128, (80, 86, 89, 120)),
)  # fmt: skip


def prepare(folder: Path, variants: tuple[Variant, ...] = VARIANTS) -> None:
    """FOLDER/engines.tar.xz; the arrays of a mode are called step/in/name and step/out/name."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for mode in dict.fromkeys(v.mode for v in variants):
            compile_mode(Path(scratch), [v for v in variants if v.mode == mode])
        with tarfile.open(folder / ARCHIVE, "w:xz", preset=9) as archive:
            for path in sorted(Path(scratch).iterdir()):
                print(f"{path.name:40} {path.stat().st_size / 1e6:6.1f} MB", flush=True)
                archive.add(path, path.name)


def compile_mode(folder: Path, variants: list[Variant]) -> None:
    """One lowered graph and its twin, and an engine for each variant."""
    from instantrt.compiler.backend.onnx_writer import write_model
    from instantrt.compiler.backend.tensorrt.build import EngineSpec, build
    from instantrt.compiler.backend.tensorrt.profiles import profiles
    from instantrt.compiler.plan import plan
    from instantrt.compiler.request import Request

    first, target = variants[0], "sm89"  # any that TensorRT-RTX builds for: one lowering serves them all
    with tempfile.TemporaryDirectory() as scratch:
        request = Request(
            model=MODEL, targets=(target,), out=Path(scratch), quant=first.quant, group_size=first.group,
            max_length=256, opt_length=64,
        )  # fmt: skip
        planned = plan(request)
        assert planned.model.llm is not None
        graph, onnx = planned.lowered[target], Path(scratch, "model.onnx")
        write_model(graph, onnx)
        ranges = profiles(graph.inputs, request.engine_limits(planned.model.llm.max_length), llm=True)
        for variant in variants:
            engine = folder / f"{variant.name}.engine"
            build(EngineSpec("tensorrt_rtx", onnx, engine, Path(scratch, "layers"), ranges, variant.sms))
        twin = Path(scratch, "twin.onnx")
        write_model(planned.twins[target].canonical.copy(), twin)
        np.savez(folder / f"{first.mode}.npz", **expected(twin))  # type: ignore[arg-type]


def expected(twin: Path) -> dict[str, Array]:
    """A prompt on an empty cache, then a token on what it left there."""
    from instantrt.compiler.accuracy.runners import session

    run = session(twin, as_written=True)
    names = [output.name for output in run.get_outputs()]
    shapes = {i.name: i.shape for i in run.get_inputs() if i.name.startswith("past_key_values.")}
    ids = np.random.default_rng(0).integers(1, 4000, (1, TOKENS + 1))
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
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(folder / ARCHIVE) as archive:
            archive.extractall(scratch, filter="data")
        names = sorted(path.stem for path in Path(scratch).glob("*.engine"))
        command = [sys.executable, "-m", "instantrt.tools.gpu.rtx", "one", scratch]
        outcomes = run_all([ChildJob(lambda left: [*command, *left], [name], LIMIT) for name in names], 480, 1)
    results = {o.name: {"outcome": o.outcome, "message": o.message, **(o.data or {})} for o in outcomes}
    out.write_text(json.dumps({"gpu": describe(), "engines": results}, indent=1) + "\n")
    for name, result in results.items():
        print(f"{name:32} {result['outcome']:8} {json.dumps(result.get('errors', result['message'][-300:]))}")
    return all(o.outcome == "passed" for o in outcomes)


def one(folder: Path, name: str) -> None:
    """Loads, runs and compares one engine: a child of `run`."""
    emit(start=name)
    data: dict[str, Any] = {"gpu": describe(), "loaded": False}
    try:
        trt = runtime_module()
        data["tensorrt_rtx"] = trt.__version__
        data |= run_engine(trt, folder, name, data)
    except Exception as error:
        emit(end=name, outcome="failed", message=f"{type(error).__name__}: {error}", data=data)
        return
    worst = max(data["errors"].values())
    outcome = "passed" if worst <= ALLOWED else "failed"
    emit(end=name, outcome=outcome, message=f"relative error {worst:.3g}, allowed {ALLOWED}", data=data)


def runtime_module() -> Any:
    """TensorRT-RTX by its own name, or its bindings, which are all of it."""
    found = [name for name in ("tensorrt_rtx", "tensorrt_rtx_bindings") if importlib.util.find_spec(name)]
    return importlib.import_module(found[0] if found else "tensorrt_rtx")


def run_engine(trt: Any, folder: Path, name: str, data: dict[str, Any]) -> dict[str, Any]:
    """What the runtime says of the engine, and the relative error of each output."""
    said: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                said.append(f"{severity.name}: {message}")

    data["said"] = said
    plan = (folder / f"{name}.engine").read_bytes()
    runtime = trt.Runtime(Log())
    validity, diagnostics = runtime.get_engine_validity(plan)
    flags = trt.EngineInvalidityDiagnostics.__members__
    data["validity"] = str(validity)
    data["diagnostics"] = [flag for flag, value in flags.items() if int(diagnostics) & int(value)]
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError(f"not loaded: {validity} {data['diagnostics']} {said[-3:]}")
    data["loaded"] = True
    device = Device(0)
    (mode,) = [v.mode for v in VARIANTS if v.name == name]
    with np.load(folder / f"{mode}.npz") as file:
        arrays = dict(file)
    errors: dict[str, float] = {}
    for number, step in enumerate(("prefill", "decode")):
        given, wanted = (part(arrays, f"{step}/{side}/") for side in ("in", "out"))
        got = execute(engine, device, number, given, list(wanted))
        errors |= {f"{step} {group}": error for group, error in compared(got, wanted).items()}
    return {**data, "errors": errors}


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
    parser.add_argument("engine", nargs="?", help="of `one`")
    parser.add_argument("--out", type=Path, default=Path("rtx.json"))
    args = parser.parse_args(words)
    if args.action == "prepare":
        prepare(args.folder)
    elif args.action == "one":
        one(args.folder, args.engine)
    else:
        sys.exit(0 if run(args.folder, args.out) else 1)


if __name__ == "__main__":
    main()
