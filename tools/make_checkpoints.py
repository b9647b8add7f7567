"""Checkpoints written by the real libraries, to test the readers with: `python -m tools.make_checkpoints make|slim`.

`make` quantizes a float model with GPTQModel or llmcompressor where they are installed, and stores beside each
checkpoint what that library itself dequantizes. `slim` cuts such a folder down to one layer for tests/checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import typer

from compiler.checkpoint import DTYPES, read_checkpoint, read_json
from passes.lazy import Array, FileTensor

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
REFERENCE = "reference_dequant.npz"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """The format itself: header size, JSON header, bytes. NumPy has no bfloat16, so the library cannot write these."""
    header, offset = {}, 0
    for name, array in tensors.items():
        where = [offset, offset + array.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[array.dtype], "shape": list(array.shape), "data_offsets": where}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def values(tensor: FileTensor) -> Array:
    return np.concatenate([tile.parts[0] for tile in tensor.tiles()])


@app.callback()
def main() -> None:
    """Checkpoints written by the real libraries, to test the readers with."""


@app.command()
def slim(source: Path, out: Path, float_model: Path = Path("examples/tiny-qwen2")) -> None:
    """Keeps layer 0 of SOURCE. Tensors equal to the float model's are left out; the tests put them back from there.

    The library's dequantized matrices become SHA-256 digests of their float32 bytes.
    """
    config = read_json(source / "config.json")
    config["num_hidden_layers"] = 1
    config["layer_types"] = config.get("layer_types", [])[:1]
    base = read_checkpoint(float_model)
    kept = {}
    for name, tensor in read_checkpoint(source).items():
        other_layer = ".layers." in name and ".layers.0." not in name
        same = name in base and base[name].dtype == tensor.dtype and (values(base[name]) == values(tensor)).all()
        if not other_layer and not same:
            kept[name] = values(tensor)
    reference = np.load(source / REFERENCE)
    digests = {
        name: hashlib.sha256(np.ascontiguousarray(reference[name], np.float32).tobytes()).hexdigest()
        for name in reference.files
        if ".layers.0." in name and not name.endswith(".fp16")
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "reference.json").write_text(json.dumps(digests, indent=2) + "\n")
    if (source / "quantize_config.json").is_file():
        shutil.copyfile(source / "quantize_config.json", out / "quantize_config.json")
    write_safetensors(out / "model.safetensors", kept)


if __name__ == "__main__":
    app()
