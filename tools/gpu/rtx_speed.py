"""How fast a Qwen2-shaped model decodes on TensorRT-RTX beside PyTorch, where no checkpoint can travel.

`outline` writes a model's lowered graph without its large constants; `fill` makes these on the GPU machine, of the
types and shapes that they have, with a seed: codes are any, scales and weights of a size that keeps numbers finite.
What is compared are times, so the float model beside it has the same sizes and weights of its own.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from instantrt.compiler.serving.runtime.cuda import Device
from instantrt.compiler.serving.runtime.tensorrt_engine import open_engine

Array = npt.NDArray[Any]
INLINE = 1 << 13  # bytes of a constant up to which it travels
SEED_BYTES = 1 << 24  # of noise, repeated as often as a constant is long
LENGTH, PAST, ROWS = 1024, 512, (1, 8)  # tokens of a cache, those before the step that is timed, sequences together
ROUNDS, STEPS = 5, 40  # times that each is measured in turn, and steps a time
SPREAD = 0.02  # of a weight, as transformers initializes them
MODEL = "qwen2-1.5b"


def known(folder: Path, mode: str) -> dict[str, Any]:
    """What travels with the graph of a mode: `config`, the model's config.json, and `profiles`, its engine's."""
    found: dict[str, Any] = json.loads((folder / f"{mode}.json").read_text())
    return found


def outline(graph: Any, path: Path) -> None:
    """`path` as write_model would, without `path.data`: constants up to INLINE bytes are in it."""
    from instantrt.compiler.backend.onnx_writer import DATA_SUFFIX, exported, layout, load_inline
    from instantrt.passes.core.lazy import FOUR_BIT, view_of
    from instantrt.passes.core.subgraphs import tensors

    load_inline(graph)
    for tensor in tensors(graph).values():
        view = view_of(tensor)
        if view is not None and view.nbytes <= INLINE and view.dtype not in FOUR_BIT:
            tensor.values = view.load()
    model = exported(graph, layout(graph)[0], path.name + DATA_SUFFIX)
    path.write_bytes(model.SerializeToString(deterministic=True))


def fill(path: Path) -> int:
    """Writes the constants that `path` lacks; returns their bytes."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    codes = {n.input[1]: n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    types = {t.name: t.data_type for t in model.graph.initializer}
    random, end = np.random.default_rng(0), 0
    with path.with_name(f"{path.name}.data").open("wb") as file:
        for tensor in model.graph.initializer:
            place = {e.key: e.value for e in tensor.external_data}
            if not place:
                continue
            size, offset = int(place["length"]), int(place["offset"])
            piece = noise(random, tensor.data_type, size, types.get(codes.get(tensor.name, "")))
            file.seek(offset)
            for start in range(0, size, len(piece)):
                file.write(piece[: size - start])
            end = max(end, offset + size)
        file.truncate(end)
    return end


def noise(random: np.random.Generator, kind: int, size: int, codes: int | None) -> memoryview:
    """Bytes of a constant; `codes`: the type of what it scales, if it does."""
    from onnx import TensorProto, helper

    four, eight = (TensorProto.INT4, TensorProto.UINT4), (TensorProto.INT8, TensorProto.UINT8)
    if kind in (*four, *eight):
        return memoryview(random.bytes(min(size, SEED_BYTES)))
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    values = random.standard_normal(min(size, SEED_BYTES) // dtype.itemsize, np.float32) * SPREAD
    if codes is not None:  # the deviation of uniform codes is 4.6 or 74
        values = SPREAD / (4.6 if codes in four else 74) * (1 + np.abs(values))
    return memoryview(np.ascontiguousarray(values.astype(dtype)).view(np.uint8).data)


def decode_steps(engine: Any, rows: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """STEPS decode steps of an engine: by themselves, and each with the next token on the host."""
    device, ids, done = engine.device, np.ones(rows, np.int64), np.full(rows, PAST)
    engine.decode(ids, done)
    engine.decode(ids, done)

    def alone() -> None:
        for _ in range(STEPS):
            engine.run(rows)
        device.call("cuStreamSynchronize", device.stream)

    def whole() -> None:
        tokens = ids
        for _ in range(STEPS):
            tokens = engine.decode(tokens, done).argmax(-1)

    return alone, whole


class Torch:
    """The float16 model of transformers with a static cache; a decode step is a CUDA graph where it can be captured."""

    def __init__(self, config: Mapping[str, Any], device: str = "cuda") -> None:
        import torch
        from transformers import AutoModelForCausalLM, Qwen2Config

        self.torch, self.device = torch, device
        self.wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
        known = Qwen2Config(**{k: v for k, v in config.items() if k not in ("architectures", "dtype", "model_type")})
        with torch.device(device):
            self.model: Any = AutoModelForCausalLM.from_config(known, dtype=torch.float16, attn_implementation="sdpa")
        self.model.eval()
        self.config = known
        self.how: dict[str, str] = {}

    def forward(self, cache: Any, ids: Any, start: int) -> Any:
        """Logits after `ids`, which follow `start` tokens."""
        torch, (rows, count) = self.torch, ids.shape
        positions = torch.arange(start, start + count, device=self.device)
        mask = torch.arange(LENGTH, device=self.device)[None] <= positions[:, None]
        return self.model(
            input_ids=ids, past_key_values=cache, cache_position=positions, use_cache=True, logits_to_keep=1,
            position_ids=positions[None].expand(rows, -1), attention_mask=mask[None, None].expand(rows, 1, -1, -1),
        ).logits  # fmt: skip

    def cache(self) -> Any:
        from transformers import StaticCache

        return StaticCache(config=self.config, max_cache_len=LENGTH)

    def prefill(self) -> Callable[[], None]:
        ids = self.torch.ones(1, PAST, dtype=self.torch.int64, device=self.device)
        with self.torch.inference_mode():
            self.forward(cache := self.cache(), ids, 0)

        def once() -> None:
            with self.torch.inference_mode():
                cache.reset()
                self.forward(cache, ids, 0).argmax(-1).tolist()

        return once

    def decode_steps(self, rows: int) -> tuple[Callable[[], None], Callable[[], None]]:
        torch = self.torch
        ids, cache = torch.ones(rows, 1, dtype=torch.int64, device=self.device), self.cache()

        def eager() -> Any:
            with torch.inference_mode():
                return self.forward(cache, ids, PAST).argmax(-1)

        run, chosen, self.how[f"decode {rows}"] = eager, eager(), "eager"
        try:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(3):
                    eager()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chosen = eager()

            def run() -> Any:
                graph.replay()
                return chosen

            run()
            torch.cuda.synchronize()
            self.how[f"decode {rows}"] = "CUDA graph"
        except Exception as error:
            run = eager
            self.how[f"decode {rows}"] = f"eager: {type(error).__name__}: {error}"[:300]

        def alone() -> None:
            for _ in range(STEPS):
                run()
            self.wait()

        def whole() -> None:
            for _ in range(STEPS):
                ids.copy_(torch.tensor(run().tolist()))

        return alone, whole


def contest(engine: Any, other: Torch | None) -> dict[str, Any]:
    """Milliseconds of each in turn, the median of ROUNDS, and tokens a second."""
    ids = np.ones(PAST, np.int64)
    work: dict[str, tuple[Callable[[], None], int, int]] = {}  # what, how many times, tokens each time
    work["prefill engine"] = (lambda: engine.prefill(0, ids, 0)), 1, PAST
    if other is not None:
        work["prefill torch"] = other.prefill(), 1, PAST
    for rows in ROWS:
        for name, runner in (("engine", engine), ("torch", other)):
            if runner is not None:
                alone, whole = decode_steps(engine, rows) if runner is engine else runner.decode_steps(rows)
                work |= {f"step {rows} {name}": (alone, STEPS, rows), f"decode {rows} {name}": (whole, STEPS, rows)}
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(ROUNDS + 1):  # the first is for warmth
        for name, (run, count, _) in work.items():
            engine.device.enter()
            started = time.perf_counter()
            run()
            if number:
                times[name].append((time.perf_counter() - started) / count)
    return {
        name: {
            "ms": round(1e3 * (best := statistics.median(each)), 4),
            "tokens_per_second": round(work[name][2] / best, 1),
            "ms_of_all": [round(1e3 * t, 4) for t in each],
        }
        for name, each in times.items()
    }


def make(folder: Path, mode: str, build: Callable[[Path, Any], bytes], data: dict[str, Any]) -> None:
    """Fills and builds the model of one mode."""
    path, started = folder / f"{mode}.onnx", time.monotonic()
    data["weights_bytes"] = fill(path)
    data["fill_seconds"] = round(time.monotonic() - started, 1)
    engine, started = build(path, known(folder, mode)["profiles"]), time.monotonic()
    partial = folder / f"{mode}.plan.partial"
    data["engine_bytes"] = partial.write_bytes(engine)
    partial.rename(folder / f"{mode}.plan")
    path.with_name(f"{path.name}.data").unlink()


def measure(trt: Any, folder: Path, mode: str, data: dict[str, Any]) -> None:
    """Times the model of one mode, by itself, which is kept if the process is lost, and then beside PyTorch's."""
    plan = folder / f"{mode}.plan"
    if not plan.is_file():
        raise RuntimeError(f"{plan.name} was not built")
    started = time.monotonic()
    engine = open_engine(plan, (), trt, Device(0), max(ROWS), LENGTH)
    data["loaded"], data["load_seconds"] = True, round(time.monotonic() - started, 1)
    data["alone"] = contest(engine, None)
    (folder / f"speed {mode}.kept").write_text(json.dumps(data))
    started = time.monotonic()
    try:
        other = Torch(known(folder, mode)["config"])
        data["times"] = contest(engine, other)
        data["torch"] = other.how
    except Exception as error:
        data["torch"] = f"{type(error).__name__}: {error}"[:1000]
    data["torch_seconds"] = round(time.monotonic() - started, 1)
