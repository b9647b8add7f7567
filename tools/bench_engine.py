"""Engine builds measured on this machine: `python -m tools.bench_engine decoder-12 --out FILE.json`.

Writes a checkpoint of random weights in a known model's shape, compiles it as a user would, and records time, size and
the memory of all processes together.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "decoder-12": {
        **QWEN2,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "qwen2-7b": {
        **QWEN2,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
}
CHUNK = 16 << 20


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of a Qwen2 checkpoint."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    table = (config["vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, width in (("q", hidden), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (width, hidden)
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (width,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return {**shapes, "model.norm.weight": (hidden,)}


def write_checkpoint(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json and model.safetensors with bfloat16 values between 2^-7 and 2^-5, of both signs."""
    folder.mkdir(parents=True)
    header, offset = {}, 0
    for name, shape in tensor_shapes(config).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, offset, CHUNK):
            bits = np.frombuffer(random.bytes(min(CHUNK, offset - start)), np.uint16)
            file.write(((bits & 0x80FF) | 0x3C00).tobytes())
    (folder / "config.json").write_text(json.dumps(config))


def processes(root: int) -> Iterator[int]:
    """`root` and all that it started."""
    yield root
    for children in Path(f"/proc/{root}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from processes(int(child))


@dataclass
class Usage:
    """What a process tree used. Memory is anonymous: mapped files can be dropped when others need the room."""

    peak: int = 0  # bytes, of all processes together
    builder_peak: int = 0  # bytes, of the process that builds the engine
    builder_seconds: float = 0.0  # for how long such a process was there
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def sample(self, root: int, interval: float) -> None:
        total = builder = 0
        for pid in processes(root):
            size = anonymous(pid)
            total += size
            if b"trt_child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                builder = size
                self.builder_seconds += interval
        self.peak, self.builder_peak = max(self.peak, total), max(self.builder_peak, builder)


def anonymous(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def run_measured(command: list[str]) -> Usage:
    """Runs `command`, sampling its memory ten times a second."""
    usage, started, interval = Usage(), time.monotonic(), 0.1
    child = subprocess.Popen(command)
    done = threading.Event()

    def sample() -> None:
        while not done.wait(interval):
            try:
                usage.sample(child.pid, interval)
            except (FileNotFoundError, ProcessLookupError):
                continue  # a process ended while it was read

    sampler = threading.Thread(target=sample)
    sampler.start()
    status = child.wait()
    done.set()
    sampler.join()
    if status:
        sys.exit(status)
    usage.seconds = time.monotonic() - started
    times = resource.getrusage(resource.RUSAGE_CHILDREN)
    usage.cpu_seconds = times.ru_utime + times.ru_stime
    return usage


def main(
    shape: Annotated[str, typer.Argument(help=" or ".join(SHAPES))],
    work: Annotated[Path, typer.Option(help="scratch folder; emptied afterwards")] = Path("build/bench"),
    out: Annotated[Path | None, typer.Option(help="where to write the record")] = None,
    option: Annotated[list[str] | None, typer.Option(help="option for compile, instead of int4 g128 for sm89")] = None,
) -> None:
    """Compile a model of random weights and record what it took."""
    options = option or ["--target=sm89", "--quant=a16w4", "--group-size=128", "--builder=tensorrt-rtx"]
    model, target = work / "model", work / "out"
    shutil.rmtree(work, ignore_errors=True)
    write_checkpoint(model, SHAPES[shape])
    load = round(os.getloadavg()[0], 1)  # what else the machine was doing: with it, wall time says little
    try:
        command = [sys.executable, "-m", "compiler", str(model), *options, "-o", str(target)]
        usage = run_measured(command)
        artifacts = json.loads((target / "manifest.json").read_text())["artifacts"]
        record = {
            "shape": shape,
            "options": options,
            "checkpoint_bytes": (model / "model.safetensors").stat().st_size,
            **{key: round(value, 1) for key, value in asdict(usage).items()},
            "load_average_before": load,
            "engines": {a["target"]: a["engine"]["bytes"] for a in artifacts if a["kind"] == "engine"},
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU",
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    text = json.dumps(record, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
