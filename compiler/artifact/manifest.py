"""What a compilation leaves behind: manifest.json, the public record of every artifact in the output folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from instantrt.compiler.json_file import read_json
from instantrt.passes.core.errors import UserError

MANIFEST = "manifest.json"
KINDS = ("onnx", "engine", "kit")
CACHES = ("shared", "concat")
MODEL, ENGINE, KIT = "model.onnx", "model.engine", "kit.json"  # what an artifact of each kind is, in its folder
FORMAT = 2
BUILDERS = ("tensorrt", "tensorrt_rtx")
TASKS = ("embed", "hidden", "classify", "classify_tokens", "fill_mask")  # of a model without a cache


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of an artifact; a dimension is a size or the name of a dynamic one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Artifact:
    """One compiled model for one target.

    path      relative to the manifest
    kind      onnx | engine | kit
    quant     module path -> what it was quantized to
    llm       sizes of the causal LM's interface (layers, kv_heads, head_dim, vocab, max_length), None for others
    encoder   likewise of a model without a cache (task, layers, vocab, width, max_length, token_types), and how its
              texts are prepared (lowercase, prompts, default_prompt) and its labels are called; None for others
    digests   file -> sha256, relative to the manifest
    source    what it was made of: the model's name, `files` (name -> sha256), the request without paths, and for a
              folder `account`: how many tensors are used by what, and what is harmless, and why
    engine    builder, version, sm, profiles, options, how each weight is read; None for what is not an engine
    """

    target: str
    kind: str
    path: str
    inputs: tuple[TensorSpec, ...] = field(repr=False)  # here and below: of a real model several thousand characters
    outputs: tuple[TensorSpec, ...] = field(repr=False)
    quant: Mapping[str, str] = field(repr=False)
    llm: Mapping[str, int] | None
    digests: Mapping[str, str] = field(repr=False)
    source: Mapping[str, Any] = field(repr=False)
    limits: Mapping[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    engine: Mapping[str, Any] | None = field(default=None, repr=False)
    encoder: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def longest(self) -> int:
        """Tokens of a sequence that it takes, 0 where nothing says it."""
        return int(self.limits.get("max_length") or (self.llm or self.encoder or {}).get("max_length", 0))


def write_manifest(folder: Path, artifacts: Iterable[Artifact]) -> None:
    body = {"format": FORMAT, "artifacts": [asdict(a) for a in artifacts]}
    (folder / MANIFEST).write_text(json.dumps(body, indent=2) + "\n", "utf-8")


def read_manifest(folder: Path) -> list[Artifact]:
    if not (folder / MANIFEST).is_file():
        above = next((each for each in folder.absolute().parents[:2] if (each / MANIFEST).is_file()), None)
        raise UserError(
            "nothing that compile wrote is here",
            where=str(folder),
            expected=f"the folder that was given to compile as --out; it holds {MANIFEST}",
            found=f"no {MANIFEST}" if folder.is_dir() else "a file" if folder.is_file() else "no such folder",
            fix=f"name {above}" if above is not None else "",
        )
    body = read_json(folder / MANIFEST)
    if body.get("format") != FORMAT:
        raise UserError(
            "a manifest of another version",
            where=str(folder / MANIFEST),
            expected=str(FORMAT),
            found=repr(body.get("format")),
            fix="compile into another folder",
        )
    try:
        artifacts = [artifact_from_json(raw) for raw in body["artifacts"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError("not a manifest of ours", where=str(folder / MANIFEST), found=str(error)) from None
    if not artifacts:
        raise UserError("the manifest lists no artifact", where=str(folder / MANIFEST), fix="compile again")
    return artifacts


def names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def texts(value: Any) -> bool:
    return isinstance(value, dict) and names(list(value.values()))


def sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(d) in (int, str) for d in value)


def tensor(value: Any) -> bool:
    keys = {"name", "dtype", "shape"}
    return (
        isinstance(value, dict)
        and set(value) == keys
        and names([value["name"], value["dtype"]])
        and sizes(value["shape"])
    )


def path(value: Any) -> bool:
    """The system takes no path with a zero byte, or with half a character."""
    return isinstance(value, str) and "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


def language_model(value: Any) -> bool:
    counts = {"layers", "kv_heads", "head_dim", "vocab", "max_length"}
    return value is None or (isinstance(value, dict) and set(value) == counts and all(map(is_count, value.values())))


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


ENCODER: dict[str, Callable[[Any], bool]] = {
    "task": lambda value: value in TASKS,
    **dict.fromkeys(("layers", "vocab", "width", "max_length"), is_count),
    **dict.fromkeys(("token_types", "lowercase"), lambda value: isinstance(value, bool)),
    "labels": names,
    "prompts": texts,
    "default_prompt": lambda value: isinstance(value, str),
}


def encoder(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and set(value) == set(ENCODER) and all(ENCODER[key](value[key]) for key in value)
    )


def limits(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    counts = [value[name] for name in ("max_batch", "max_length", "opt_length") if name in value]
    return all(map(is_count, counts)) and value.get("cache", CACHES[0]) in CACHES


def engine(value: Any) -> bool:
    kinds = {"version": str, "sm": int, "options": dict}
    return value is None or (
        isinstance(value, dict)
        and value.get("builder") in BUILDERS
        and all(isinstance(value.get(k), t) for k, t in kinds.items())
    )


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "target": (lambda value: isinstance(value, str), "a name"),
    "kind": (lambda value: value in KINDS, "onnx, engine or kit"),
    "path": (path, "a path"),
    "inputs": (lambda value: isinstance(value, list) and all(map(tensor, value)), "tensors: name, dtype, shape"),
    "outputs": (lambda value: isinstance(value, list) and all(map(tensor, value)), "tensors: name, dtype, shape"),
    "quant": (texts, "layers and their formats"),
    "llm": (language_model, "layers, kv_heads, head_dim, vocab and max_length, or null"),
    "encoder": (encoder, f"{', '.join(ENCODER)}; or null"),
    "digests": (texts, "files and their digests"),
    "source": (lambda value: isinstance(value, dict), "an object"),
    "limits": (limits, "an object of counts, and a cache that is shared or concat"),
    "plugins": (names, "names of files"),
    "engine": (engine, "builder, version, sm and options, or null"),
}


def artifact_from_json(raw: Mapping[str, Any]) -> Artifact:
    """The inverse of `asdict`; KeyError, TypeError or ValueError where `raw` is something else."""
    if not isinstance(raw, dict):
        raise TypeError(f"an artifact is an object, not {raw!r}")
    for key, (holds, expected) in RULES.items():
        if key in raw and not holds(raw[key]):
            raise ValueError(f"{key} is {shorten(repr(raw[key]), 80)}, not {expected}")
    if raw["kind"] == "engine" and raw.get("engine") is None:
        raise ValueError("an artifact of kind engine without its engine's builder and version")
    if raw["llm"] is not None and "cache" not in raw["limits"]:
        raise ValueError("a causal LM without its kind of cache in limits")
    in_place = raw["llm"] is not None and raw["kind"] == "engine" and raw["limits"]["cache"] == CACHES[0]
    if in_place and not raw["limits"].get("max_batch"):
        raise ValueError("an engine whose cache is one buffer, without its max_batch in limits")
    return Artifact(
        **{
            **raw,
            "inputs": tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in raw["inputs"]),
            "outputs": tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in raw["outputs"]),
            "plugins": tuple(raw.get("plugins", ())),
        }
    )


def find_artifact(
    folder: Path, target: str | None = None, runs: Callable[[Artifact], bool] = lambda artifact: True
) -> Artifact:
    """The artifact for `target`; else the only one there is, or the only one of several that `runs` here."""
    artifacts = read_manifest(folder)
    found = [a for a in artifacts if target in (None, a.target)]
    fitting = found if len(found) == 1 else [a for a in found if runs(a)]
    if len(fitting) == 1:
        return fitting[0]
    none = "no artifact of several runs here" if target is None else f"no artifact for target {target}"
    raise UserError(
        "which artifact?" if fitting else none,
        where=str(folder),
        expected="one of " + ", ".join(a.target for a in fitting or artifacts),
        fix="name one with --target" + ("" if fitting or target is not None else ", and hear why it does not"),
    )
