"""An adapter's folder: its config, its tensors and its files, and the base that it changes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from instantrt.compiler.artifact.staging import TOKENIZER_FILES
from instantrt.compiler.checkpoint import read_header
from instantrt.compiler.frontend.adapter.config import CONFIG, AdapterConfig, read_adapter_config
from instantrt.compiler.frontend.side_files import MERGED, Accounted, Report, account_of_files
from instantrt.compiler.quant.stored import Reader
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FileTensor

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MODULES = "modules.json"  # of sentence-transformers
ONE = "merge one of them into its base with peft's merge_and_unload, and pass the other over that"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of these is a tokenizer, whole


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter; `tensors` by their names in the file."""

    folder: Path
    config: AdapterConfig
    tensors: Mapping[str, FileTensor]

    @property
    def files(self) -> tuple[Path, ...]:
        """Those that decide what the merged weights are."""
        return self.folder / CONFIG, self.folder / WEIGHTS

    def account(self, report: Report) -> tuple[Accounted, ...]:
        """What becomes of its files, and of the keys of its config that are not read."""
        found = account_of_files(self.folder, report, dict.fromkeys((CONFIG, WEIGHTS), MERGED))
        keys = (Accounted(f"{CONFIG}: {key}", 1, why) for key, why in self.config.harmless.items())
        return tuple(replace(each, name=f"{self.folder.name}/{each.name}") for each in (*found, *keys))

    @property
    def beside(self) -> dict[str, Path]:
        """The files of a tokenizer that it brings."""
        return {name: self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file()}


def is_adapter(folder: Path) -> bool:
    """Is `folder` an adapter, and no model?"""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def open_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`."""
    if not (folder / CONFIG).is_file():
        below = ", ".join(sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG}"))[:12])
        raise UserError(
            "no adapter here",
            where=str(folder),
            expected=f"{CONFIG} and {WEIGHTS}, as peft's save_pretrained writes them",
            found=below or ("a folder without them" if folder.is_dir() else "no folder"),
            fix="name one of these folders" if below else "",
        )
    config = read_adapter_config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        pickle = (folder / PICKLE).is_file()
        raise UserError(
            f"no {WEIGHTS}",
            where=str(folder),
            found=f"{PICKLE}: pickles are never loaded" if pickle else "",
            fix="load it with peft and save_pretrained(folder): safetensors are read",
        )
    return Adapter(folder, config, read_header(folder / WEIGHTS))


def model_and_adapter(model: Path, adapters: Sequence[Path], base: Path | None) -> tuple[Path, Adapter | None]:
    """(the model whose weights are read, what is merged into them): `model` may be the adapter itself."""
    itself = is_adapter(model)
    found = [model, *adapters] if itself else [*adapters]
    if len(found) > 1:
        raise UserError("several adapters", where=str(found[0]), found=", ".join(map(str, found[1:])), fix=ONE)
    if base is not None and not itself:
        raise UserError("base is for a model that is an adapter itself", where=str(model), fix="leave it out")
    opened = open_adapter(found[0]) if found else None
    return base_of(opened, base) if itself and opened is not None else model, opened


def base_of(adapter: Adapter, asked: Path | None) -> Path:
    """The folder of the model that an adapter is for: `asked`, or what its config names, from its folder."""
    named = adapter.config["base_model_name_or_path"]
    if asked is None and named and os.path.isdir(adapter.folder / named):  # noqa: PTH112 -- False for what is no path
        asked = adapter.folder / named
    if asked is None:
        raise UserError(
            "the base of the adapter is not here",
            where=str(adapter.folder),
            expected="a path from this folder, or an absolute one, as base_model_name_or_path",
            found=repr(named),
            fix="download the base, and pass --base FOLDER",
        )
    if is_adapter(asked):
        raise UserError("an adapter over an adapter", where=str(asked), found=CONFIG, fix=ONE)
    return asked


def overlaid(base: Path, adapter: Adapter) -> tuple[Path, TemporaryDirectory[str] | None]:
    """(the folder `base`, with the tokenizer that an adapter brings instead of its own; what holds it).

    Who loads the tokenizer of an adapter gets all of it from there: docs/facts.md, "Adapters of PEFT".
    """
    beside: dict[str, Path] = adapter.beside
    if not beside:
        return base, None
    whole = any(name in beside for name in TOKENIZER)
    held = TemporaryDirectory(prefix="adapted.")
    own = {p.name: p for p in base.iterdir() if not (whole and p.name in TOKENIZER_FILES)}
    for name, path in {**own, **beside}.items():
        (Path(held.name) / name).symlink_to(path.resolve())
    return Path(held.name), held


def names_of(adapter: Adapter, base: Path) -> list[str]:
    """What a user should know of which adapter is merged into what."""
    named: Any = adapter.config["base_model_name_or_path"]
    other = f"; it names {named} as its base" if named and Path(named).name != base.name else ""
    brought = f"; the tokenizer's files are the adapter's: {', '.join(adapter.beside)}" if adapter.beside else ""
    return [f"the adapter {adapter.folder.name} is merged into {base.name}{other}{brought}"]


def check_base(reader: Reader | None, base: Path, adapter: Adapter) -> None:
    """What is stored in codes takes no sum; and what follows a sentence's model is read beside the model alone."""
    if (adapter.folder / MODULES).is_file() and not (base / MODULES).is_file():
        raise UserError(
            f"the adapter brings {MODULES}, which is read in its base's folder",
            where=str(adapter.folder),
            found=f"none in {base}",
            fix="copy it there, with the folders that it names; or remove it to compile the model alone",
        )
    if reader is not None:
        raise UserError(
            f"the base of the adapter is quantized ({reader.method}): what LoRA adds has no place among its codes",
            where=str(base),
            expected="float weights",
            found=f"the adapter {adapter.folder.name}",
            fix="compile the adapter over the float model, with --quant"
            + ("; or --requantize, which takes a GGUF file's weights as floats" if reader.method == "gguf" else ""),
        )
