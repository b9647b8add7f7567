"""An engine as a form of a model, on the module that built it: TensorRT or TensorRT-RTX, as its header says."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from instantrt.compiler.backend.tensorrt.build import PRODUCT, read_header
from instantrt.compiler.backend.tensorrt.gpu import describe
from instantrt.compiler.serving.runtime import tensorrt_engine
from instantrt.compiler.serving.runtime.cuda import Device
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array

ON_CPU = "run this on the GPU machine; --forms float,twin,lowered checks the lowered graph on this CPU"
TYPES: dict[str, type[np.generic]] = {
    **tensorrt_engine.TYPES,
    "BF16": ml_dtypes.bfloat16,
    "BOOL": np.bool_,
}


class EngineRunner:
    """The engine on this machine's GPU, a sequence at a time, in its first profile and the types it was built for.

    It is loaded inside `with`. `every_position` refuses an engine that has the logits of the last token alone. `module`
    and `device` are what a test stands in for.
    """

    def __init__(
        self,
        path: Path,
        plugins: Sequence[Path],
        outputs: Sequence[str],
        *,
        every_position: bool = True,
        module: Any = None,
        device: Callable[[int], Device] = Device,
    ) -> None:
        self.path, self.plugins, self.outputs, self.open_device = path, plugins, outputs, device
        self.every_position = every_position
        self.header = read_header(path)
        self.module = module or self.imported()

    def imported(self) -> Any:
        """The module that the engine's header names."""
        product, version = PRODUCT[self.header.flavour], self.header.version
        if importlib.util.find_spec(self.header.flavour) is None:
            raise UserError(
                f"the engine runs with {product} {version} on a GPU, which this Python lacks",
                where=str(self.path),
                fix=ON_CPU,
            )
        return importlib.import_module(self.header.flavour)

    def __enter__(self) -> EngineRunner:
        trt = self.module
        try:
            self.device = self.open_device(0)
        except (OSError, RuntimeError) as error:
            raise UserError(
                "an engine runs on a GPU", where=str(self.path), found=f"{describe()} ({error})", fix=ON_CPU
            ) from None
        try:
            self.runtime, self.engine = tensorrt_engine.load_engine(self.path, self.plugins, trt)
        except RuntimeError as error:
            raise UserError(
                "the engine cannot be loaded here",
                where=str(self.path),
                expected=f"{PRODUCT[self.header.flavour]} {self.header.version} and the GPU it was built for",
                found=f"{trt.__version__} and {describe()} ({error})",
            ) from None
        self.context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        inputs = trt.TensorIOMode.INPUT
        self.inputs = [name for name in names if self.engine.get_tensor_mode(name) == inputs]
        self.results = [name for name in names if name not in self.inputs]
        return self

    def __exit__(self, *raised: object) -> None:
        del self.context, self.engine, self.runtime, self.device

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(TYPES[self.engine.get_tensor_dtype(name).name])

    def __call__(self, given: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {name: given[name].astype(self.dtype(name), copy=False) for name in self.inputs}
        rows = range(len(next(iter(feeds.values()))))
        parts = [self.run({name: value[row : row + 1] for name, value in feeds.items()}) for row in rows]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One execution: every input uploaded, every output of `outputs` fetched."""
        arrays = {name: np.ascontiguousarray(value) for name, value in feeds.items()}  # alive while on their way
        held: list[int] = []

        def room(size: int) -> int:
            held.append(self.device.allocate(max(1, size)))  # a tensor without elements has an address too
            return held[-1]

        try:
            for name, array in arrays.items():
                address = room(array.nbytes)
                self.device.upload(address, array)
                self.set_shape(name, array.shape)
                self.context.set_tensor_address(name, address)
            fetched = {}
            for name in self.results:
                array = np.empty(tuple(self.context.get_tensor_shape(name)), self.dtype(name))
                fetched[name] = (array, room(array.nbytes))
                self.context.set_tensor_address(name, fetched[name][1])
            if not self.context.execute_async_v3(self.device.stream.value):
                raise UserError("the engine failed to run", where=str(self.path))
            for name in self.outputs:
                self.device.download(*fetched[name])
        finally:
            for address in held:
                self.device.free(address)
        if self.every_position:
            self.check_positions(feeds, fetched["logits"][0] if "logits" in fetched else None)
        return {name: fetched[name][0] for name in self.outputs}

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self.context.set_input_shape(name, shape):
            low, _, high = self.engine.get_tensor_profile_shape(name, 0)
            raise UserError(
                f"the engine does not take this shape of {name}",
                where=str(self.path),
                expected=f"{list(low)} to {list(high)}",
                found=str(list(shape)),
                fix="a shorter text (--tokens), or an engine with a larger --max-length and --kv-cache concat",
            )

    def check_positions(self, feeds: Mapping[str, Array], logits: Array | None) -> None:
        """What logits are compared with has one row a token."""
        if logits is not None and "input_ids" in feeds and logits.shape[1] != feeds["input_ids"].shape[1]:
            raise UserError(
                "the engine delivers the logits of the last token alone",
                where=str(self.path),
                expected=f"{feeds['input_ids'].shape[1]} positions",
                found=str(logits.shape[1]),
                fix="compile with --logits all to compare the engine itself",
            )
