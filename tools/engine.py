"""Runs a causal LM's engine on a GPU, full TensorRT or TensorRT-RTX: `tools.generate` uses it for engines.

Everything lives in device memory: caches are bound once; per step the ids go in and one row of logits comes out.
Prefill and decode are the engine's two profiles, each with an execution context of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compiler.artifact import Artifact
from compiler.check import check_digests, check_header, check_runtime, inside
from compiler.gpu import describe, gpus
from passes.errors import UserError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
PREFILL, DECODE = 0, 1
TYPES = {"INT64": "int64", "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}  # TensorRT's names, torch's


class EngineModel:
    """A causal LM's engine, with the interface of `tools.generate.Model`."""

    def __init__(self, folder: Path, artifact: Artifact) -> None:
        if artifact.engine is None or artifact.llm is None:
            raise UserError("not a causal LM's engine", where=str(folder / artifact.path), found=artifact.kind)
        if all(gpu.sm != artifact.engine["sm"] for gpu in gpus()):
            raise UserError(
                f"the engine was built for sm{artifact.engine['sm']}",
                where=artifact.path,
                found=f"this machine: {describe()}",
            )
        check_digests(folder, artifact)  # engines are code: nothing is loaded before this
        check_runtime(check_header(inside(folder, artifact.path), artifact.engine), folder, compatible=False)
        self.artifact, self.folder = artifact, (folder / artifact.path).parent
        self.trt = importlib.import_module(artifact.engine["builder"])
        self.runtime = self.trt.Runtime(self.trt.Logger(self.trt.Logger.WARNING))
        for library in artifact.plugins:
            self.trt.get_plugin_registry().load_library(str(folder / library))
        self.engine = self.runtime.deserialize_cuda_engine((folder / artifact.path).read_bytes())

    def tokens(self, prompt: list[int], max_tokens: int, choose: Callable[[Array], int]) -> Iterator[int]:
        """The tokens that follow `prompt`, one by one; the caller stops at an end token."""
        limit = self.artifact.limits["max_length"]
        if not 0 < len(prompt) < limit:
            raise UserError("the prompt does not fit", expected=f"1 to {limit - 1} tokens", found=str(len(prompt)))
        sequence = Sequence(self)
        step, made = prompt, 0
        while True:
            token = choose(sequence.run(step))
            yield token
            made += 1
            if made >= max_tokens or len(prompt) + made > limit:
                return
            step = [token]


class Sequence:
    """The caches of one sequence on the device, and the steps that fill them."""

    def __init__(self, model: EngineModel) -> None:
        import torch

        self.torch, self.model, self.done = torch, model, 0
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.contexts = [self.context(PREFILL), self.context(DECODE)]
        self.in_place = model.artifact.limits["cache"] == "shared"
        self.length = model.artifact.limits["max_length"]
        llm = model.artifact.llm or {}
        self.names = [f"{i}.{part}" for i in range(llm["layers"]) for part in ("key", "value")]
        size = llm["kv_heads"] * self.length * llm["head_dim"]
        # A cache that grows by copies needs two buffers to go to and fro; in place, past and present are one.
        self.past = [self.empty(f"past_key_values.{name}", (size,)) for name in self.names]
        self.present = self.past if self.in_place else [torch.empty_like(buffer) for buffer in self.past]

    def context(self, profile: int) -> Any:
        engine, trt = self.model.engine, self.model.trt
        if hasattr(trt, "CudaGraphStrategy"):  # TensorRT-RTX records and replays CUDA graphs by itself
            config = engine.create_runtime_config()
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
        context.set_optimization_profile_async(profile, self.stream.cuda_stream)
        return context

    def empty(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Device memory for the tensor called `name`, in its type."""
        dtype = getattr(self.torch, TYPES[self.model.engine.get_tensor_dtype(name).name])
        return self.torch.empty(shape, dtype=dtype, device="cuda")

    def run(self, ids: list[int]) -> Array:
        """Logits `[vocab]` after `ids`, which follow what ran before."""
        torch, total = self.torch, self.done + len(ids)
        context = self.contexts[DECODE if self.done and len(ids) == 1 else PREFILL]
        with torch.cuda.stream(self.stream):
            inputs = {
                "input_ids": torch.tensor([ids], device="cuda"),
                "attention_mask": torch.ones((1, total), dtype=torch.int64, device="cuda"),
                "position_ids": torch.arange(self.done, total, device="cuda")[None],
            }
            for name, tensor in inputs.items():
                context.set_input_shape(name, tuple(tensor.shape))
                context.set_tensor_address(name, tensor.data_ptr())
            self.bind_caches(context)
            logits = self.empty("logits", tuple(context.get_tensor_shape("logits")))
            context.set_tensor_address("logits", logits.data_ptr())
            if not context.execute_async_v3(self.stream.cuda_stream):
                raise UserError("the engine failed to run", where=self.model.artifact.path)
            row = logits[0, -1].float().cpu().numpy()
        self.past, self.present, self.done = self.present, self.past, total
        return np.asarray(row)

    def bind_caches(self, context: Any) -> None:
        llm = self.model.artifact.llm or {}
        for name, past, present in zip(self.names, self.past, self.present, strict=True):
            shape = (1, llm["kv_heads"], self.length if self.in_place else self.done, llm["head_dim"])
            context.set_input_shape(f"past_key_values.{name}", shape)
            context.set_tensor_address(f"past_key_values.{name}", past.data_ptr())
            context.set_tensor_address(f"present.{name}", present.data_ptr())
