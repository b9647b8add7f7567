"""A GGUF file as the folder of a checkpoint: what its metadata say becomes the files that a folder has.

Behind it nothing knows of GGUF but the tensors, whose codes stay where they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from instantrt.compiler.frontend.export_cache import cache_folder, recall
from instantrt.compiler.frontend.gguf.architectures import Place, config_of, places_of
from instantrt.compiler.frontend.gguf.file import GgufFile, open_gguf
from instantrt.compiler.frontend.gguf.tokenizer import tokenizer_files
from instantrt.compiler.frontend.known_tensors import listed
from instantrt.compiler.quant.gguf import FLOAT_KINDS, GgufTensor
from instantrt.passes.core.lazy import Array, FileTensor, whole

# What the file is called, its tokenizer, how it was quantized, and its parts.
KNOWN = ("general.", "tokenizer.", "quantize.", "split.")
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class MadeFolder:
    """The files that go with a model's weights, and the weights. The folder is there as long as it is `held`."""

    held: TemporaryDirectory[str]
    weights: Mapping[str, FileTensor]
    notes: tuple[str, ...]

    @property
    def path(self) -> Path:
        return Path(self.held.name)


def made_folder(
    path: Path, *, requantize: bool = False, cache: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> MadeFolder:
    """The folder of the GGUF file at `path`.

    requantize   its weights are floats
    """
    file = open_gguf(path)
    config, weights = checkpoint_of(file, str(path), requantize=requantize)

    def tokenizer() -> bytes:
        say("making the tokenizer of the file's vocabulary")
        return json.dumps(tokenizer_files(file.metadata, str(path))).encode()

    (beside, notes), _ = recall(cache_folder(cache), {"tokenizer of": file.digest}, tokenizer, json.loads)
    made = TemporaryDirectory(prefix=f"{path.stem}.")
    for name, text in {"config.json": json.dumps(config, indent=2), **beside}.items():
        (Path(made.name) / name).write_text(text, "utf-8")
    if others := listed(others_of(file.metadata), "metadata beside those of the format, not read"):
        notes = [others, *notes]
    if (path.parent / "config.json").is_file():
        notes = [f"config.json beside {path.name} is not read: its metadata are", *notes]
    return MadeFolder(made, weights, tuple(notes))


def checkpoint_of(
    file: GgufFile, where: str, *, requantize: bool = False
) -> tuple[dict[str, Any], dict[str, FileTensor]]:
    """What config.json and the weights of a file's folder are."""
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}

    def vector(name: str) -> Array:
        return whole(file.tensors[name])

    config = config_of(file.metadata, shapes, vector, where)
    return config, dict(placed(file, places_of(file.metadata, shapes, where), floats=requantize))


def others_of(metadata: Mapping[str, Any]) -> list[str]:
    """The keys that are neither the architecture's, of which each is read or refused, nor of another known kind."""
    known = (*KNOWN, f"{metadata['general.architecture']}.")
    return sorted(key for key in metadata if not key.startswith(known))


def placed(file: GgufFile, places: Mapping[str, Place], *, floats: bool) -> Iterator[tuple[str, FileTensor]]:
    """The tensors by the names that the model has for them, put back as they were before they were converted."""
    names = {place.name for place in places.values()}
    for name, place in places.items():
        file.tensors[name].check_readable()
        tensor = replace(file.tensors[name], heads=place.heads, less=place.less, floats=floats)
        stored = plain(tensor)
        yield place.name, stored
        if place.name == TABLE and HEAD not in names:  # tied: the head has the table's codes
            yield HEAD, stored


def plain(tensor: GgufTensor) -> FileTensor:
    """A tensor of floats that are the model's own is like any other."""
    if tensor.kind not in FLOAT_KINDS or tensor.heads or tensor.less:
        return tensor
    return FileTensor(tensor.path, tensor.offset, tensor.shape, FLOAT_KINDS[tensor.kind], tensor.name)
