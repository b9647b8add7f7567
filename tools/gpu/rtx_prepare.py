"""What `instantrt gpu-check rtx` takes to a GPU machine, made on one without a GPU: engines, inputs, expected outputs.

The compiler itself compiles examples/tiny-qwen2 in each mode for any GPU (the builder's own default) and in one mode
for single and several SMs, with and without nodes of the plugin, and one layer of the sizes of a 7 B model. Outputs to
compare with are ONNX Runtime's of the Q/DQ twin, for a prompt and for the token after it; tokens are those that the
artifact for CPUs generates.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from instantrt.compiler.quant.config import Quant
from instantrt.tools.gpu import rtx_speed
from instantrt.tools.places import EXAMPLE

Array = npt.NDArray[Any]
ARCHIVE = "engines.tar.xz"  # of <variant>.engine and <mode>.npz: what engines share is in it once
TOKENS = 24  # of the prompt


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
SPEEDS = (Variant("a8w8"), Variant("a16w4", 128), Variant("a16w8"))  # of the model in rtx_speed.py
LIBRARY = "libinstantrt_plugins.so"
PROMPTS, GREEDY, LENGTH = (5, 24, 60), 24, 256  # tokens of the prompts, tokens after each, and what engines take
TARGET = "sm89"  # any that TensorRT-RTX builds for: one lowering serves them all


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
            compile_mode(Path(scratch), each, one_layer if one_layer and each[0].model else EXAMPLE)
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
    from safetensors.numpy import save_file

    from instantrt.compiler.checkpoint import SINGLE, read_checkpoint
    from instantrt.passes.core.lazy import whole

    stored = {name: whole(tensor) for name, tensor in read_checkpoint(checkpoint).items()}
    same = {name: np.resize(w[:16], w.shape) if "proj.weight" in name else w for name, w in stored.items()}
    model = folder / "checkpoint"
    shutil.copytree(checkpoint, model, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(same, model / SINGLE)
    return model


def compile_mode(folder: Path, variants: list[Variant], checkpoint: Path = EXAMPLE) -> None:
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
