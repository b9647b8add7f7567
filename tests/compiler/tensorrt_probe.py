"""Runs the engine builder's code on the real bindings of full TensorRT; `test_bindings` starts it in a process.

The builder library is not on any machine without a GPU, so the objects it would make are mocks with the exact
specification of the bindings' own classes: a name that this TensorRT does not have is an AttributeError here.
Subclasses of the bindings (logger, monitor, stream writer) and all enums are the real ones.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import NonCallableMagicMock

import tensorrt_bindings as trt

from instantrt.compiler.backend.tensorrt import child as trt_child
from instantrt.compiler.backend.tensorrt.build import EngineSpec
from instantrt.compiler.options import EngineOptions
from instantrt.compiler.target import find_target

sys.modules["tensorrt"] = trt
Builder, Parser, Runtime = trt.Builder, trt.OnnxParser, trt.Runtime
PLAN = b"ftrt" + bytes(60)


class Recorded:
    """Events, kept."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def send(self, **event: Any) -> None:
        self.events.append(event)


def exactly(cls: type) -> Any:
    """A mock with the attributes of `cls`: no other can be read or set."""
    return NonCallableMagicMock(spec_set=cls)


def fake_builder(calls: dict[str, Any]) -> Any:
    builder, config = exactly(Builder), exactly(trt.IBuilderConfig)
    builder.create_optimization_profile.return_value = exactly(trt.IOptimizationProfile)
    builder.create_builder_config.return_value = config
    config.add_optimization_profile.return_value = 0
    config.set_timing_cache.return_value = True
    config.create_timing_cache.return_value = exactly(trt.ITimingCache)
    config.create_timing_cache.return_value.serialize.return_value = b"timings"
    calls["config"], calls["builder"] = config, builder

    def build(_network: Any, config: Any) -> bytes:
        monitor = config.progress_monitor
        assert isinstance(monitor, trt.IProgressMonitor)
        monitor.phase_start("Building", None, 2)
        assert monitor.step_complete("Building", 0)
        monitor.phase_finish("Building")
        return PLAN

    def build_to_stream(network: Any, config: Any, writer: Any) -> bool:
        assert isinstance(writer, trt.IStreamWriter)
        return bool(writer.write(build(network, config)))

    if hasattr(Builder, "build_serialized_network_to_stream"):  # 10.13 and newer
        builder.build_serialized_network_to_stream.side_effect = build_to_stream
    else:
        builder.build_serialized_network.side_effect = build
    return builder


def builds_for(target: str, spec: EngineSpec) -> bool:
    """Does our code take this TensorRT for `target`?"""
    try:
        trt_child.check_version(trt, replace(spec, releases=find_target(target).tensorrt))
    except trt_child.Refused:
        return False
    return True


def main(folder: Path) -> None:
    calls: dict[str, Any] = {}
    trt.Builder = lambda logger: fake_builder(calls)
    parser = exactly(Parser)
    parser.parse_from_file.return_value = True
    trt.OnnxParser = lambda network, logger: parser
    runtime = exactly(Runtime)
    engine, inspector = exactly(trt.ICudaEngine), exactly(trt.EngineInspector)
    runtime.deserialize_cuda_engine.return_value = engine
    engine.create_engine_inspector.return_value = inspector
    inspector.get_engine_information.return_value = "Layers:"
    trt.Runtime = lambda logger: runtime
    options = EngineOptions(
        memory_limit=1 << 10,
        optimization_level=3,
        weight_streaming=True,
        version_compatible=True,
        hardware_compatible="ampere_plus",
        timing_cache=folder / "timing.cache",
    )
    profile = {"x": ((1, 1), (1, 8), (2, 16))}
    spec = EngineSpec("tensorrt", folder / "m.onnx", folder / "m.engine", folder / "l.txt", (profile,), (), (), options)
    events = Recorded()
    done = trt_child.build(spec, events)  # type: ignore[arg-type]
    config, flags = calls["config"], trt.BuilderFlag
    print(
        json.dumps(
            {
                "version": done["version"],
                "rtx": trt_child.is_rtx(trt),
                "builds_for": [target for target in ("sm70", "sm75", "sm90") if builds_for(target, spec)],
                "network_flags": calls["builder"].create_network.call_args.args[0],
                "flags": [
                    call.args[0] == flag
                    for call, flag in zip(
                        config.set_flag.call_args_list, (flags.WEIGHT_STREAMING, flags.VERSION_COMPATIBLE), strict=True
                    )
                ],
                "pool": config.set_memory_pool_limit.call_args.args == (trt.MemoryPoolType.WORKSPACE, 1 << 30),
                "hardware": config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS,
                "level": config.builder_optimization_level,
                "progress": [e["progress"] for e in events.events if "progress" in e],
                "plan": spec.partial.read_bytes() == PLAN,
                "cache": (folder / "timing.cache").read_bytes().decode(),
                "layers": spec.layers.read_text(),
            }
        )
    )


main(Path(sys.argv[1]))
