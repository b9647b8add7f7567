"""A GGUF file as a checkpoint: its header, what its metadata say of the model, its tokenizer, and the folder of it."""

from __future__ import annotations

import re
from pathlib import Path

from instantrt.passes.core.errors import UserError

SUFFIX = ".gguf"
SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


def gguf_at(model: Path) -> Path | None:
    """The GGUF file that `model` is, or that is all the weights of the folder `model`; None where there is none.

    A projector of pictures (`mmproj`) beside a language model is no model of its own.
    """
    if model.suffix.lower() == SUFFIX and not model.is_dir():
        return model if model.is_file() else None
    if not model.is_dir() or any(model.glob("*.safetensors")):
        return None
    files = sorted(path for path in model.iterdir() if path.suffix.lower() == SUFFIX and path.is_file())
    files = [path for path in files if not path.name.lower().startswith("mmproj")]
    firsts = [path for path in files if not (named := SPLIT.match(path.name)) or int(named[2]) == 1] or files[:1]
    if len(firsts) > 1:
        raise UserError(
            "several GGUF files, and nothing says which of them is the model",
            where=str(model),
            expected="one of them",
            found=", ".join(path.name for path in firsts[:12]),
            fix=f"name the file itself: {firsts[0]}",
        )
    return firsts[0] if firsts else None


def refuse_gguf(folder: Path) -> None:
    """transformers has no use for one."""
    if gguf_at(folder) is not None:
        fix = "compile it with --requantize: that artifact is the float model"
        raise UserError("a GGUF file, where a checkpoint's folder is due", where=str(folder), fix=fix)
