"""What a user asks for: one frozen value, with the same field names on the command line, in Python and in JSON."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from instantrt import plugins
from instantrt.compiler.backend.tensorrt.profiles import EngineLimits
from instantrt.compiler.options import (
    CPU,
    GPU,
    KERNELS,
    Accuracy,
    Checking,
    Checkpoint,
    CpuArtifacts,
    EngineOptions,
    Engines,
    LanguageModel,
    Looking,
    Plugins,
    Quantization,
    Size,
    options_of,
    settle,
    types_of,
)
from instantrt.compiler.target import CPU_PLUGIN, Backend, Target, find_target
from instantrt.passes.core.errors import UserError

PACKAGED_PLUGINS = Path(plugins.__file__).parent / "lib"
AUTO = Path("auto")
ELF, CREATORS = b"\x7fELF", (b"getCreators", b"getPluginCreators")  # what IPluginRegistry::loadLibrary looks for
SERVES = re.compile(rb"InstantRT serves by (libinstantrt_\w+\.so)")  # as plugin.cpp and operators.cpp have it
MADE_BY = {  # the library's file -> the goal of the Makefile, and what it needs
    "libinstantrt_plugins.so": ("plugins TENSORRT=DIR", "nvcc and DIR/include of TensorRT"),
    "libinstantrt_plugins_sm70.so": ("plugins-sm70 TENSORRT=DIR", "NVRTC 12 and DIR/include of TensorRT"),
    CPU_PLUGIN: ("plugins-cpu", "a C++ compiler"),
}
BOUNDS = ("max_kl", "max_ppl_increase", "max_size", "bits_per_weight")  # on the loss and on the size
HEAD = struct.Struct("<40xQ10xHH2x")  # of ELF, 64 bits: where its table of sections is, a row's size, how many
LAYER_FORMAT = re.compile(r"float|a(16w[48]|8w8):(-1|[1-9]\d*)")


@dataclass(frozen=True)  # the last base comes first: manifests record the options in this order
class Request(
    Looking,
    Checking,
    Size,
    Accuracy,
    Plugins,
    EngineOptions,
    LanguageModel,
    Engines,
    Checkpoint,
    CpuArtifacts,
    Quantization,
):
    """Compile `model` for `targets` into `out`, with the options of every group (compiler/options.py).

    Where a path or a tuple of names is due, a string will do.

    model     folder with config.json and safetensors, a .gguf file, or an .onnx file
    targets   names of target.py
    layers    module path -> format (`a16w4:32`, `a16w8:-1`, `float`), as a budget chose them
    """

    model: Path
    targets: tuple[str, ...]
    out: Path
    layers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settle(self)
        if not self.targets:
            raise UserError("no target", fix="--target x86; instantrt targets shows all")
        if self.quant is not None and self.quant_config is not None:
            raise UserError("quant and quant_config both say how to quantize", fix="give one of them")
        if self.enable_quant is False and (self.quant_config is not None or self.quant not in (None, "none")):
            raise UserError(
                "a custom quantization config with quantization disabled",
                found=f"enable_quant = false and {'customized_quant_config' if self.quant_config else self.quant}",
                fix="set enable_quant to true, or leave the config out",
            )
        for name in ("group_size", "weight_only", "enable_quant"):
            if self.quant == "none" and getattr(self, name):
                raise UserError(f"quant none leaves nothing for {name} to say", fix="give one of them")
        for path, form in self.layers.items():
            if not isinstance(form, str) or not LAYER_FORMAT.fullmatch(form):
                raise UserError("a layer's format", where=str(path), expected="float, or as a16w4:32", found=repr(form))
        if self.max_size is not None and self.bits_per_weight is not None:
            raise UserError("max_size and bits_per_weight both bound the size", fix="give one of them")
        for name in ("plugin_rounding", "plugin_batch_invariant"):
            if getattr(self, name) and self.plugin is None:
                raise UserError(f"{name} without a plugin", fix="--plugin FILE")
        if self.plugin_rounding and self.plugin_batch_invariant:
            raise UserError(
                "plugin_rounding and plugin_batch_invariant: cuBLASLt takes over by the number of rows",
                fix="give one of them",
            )
        for target in self.resolved_targets():
            self.check_old_tensorrt(target)
            self.check_plugin(target)
        self.engine_limits()

    def check_old_tensorrt(self, target: Target) -> None:
        """What a GPU cannot have whose last TensorRT is an old one, refused before any work."""
        if target.whole_operators:
            return
        if self.kv_cache == "in-place":
            raise UserError(
                f"--kv-cache in-place is not supported on {target.name} ({target.family})",
                found=f"TensorRT {target.tensorrt} has no TensorScatter",
                fix=f"leave it out, or compile for {target.name} apart",
            )

    def library(self, target: Target) -> Path | None:
        """The plugin library for `target`; None where it has no use for one, as a CPU has for one of GPUs."""
        if self.plugin is None or not target.plugin:
            return None
        if self.plugin == AUTO:
            return PACKAGED_PLUGINS / target.plugin
        return self.plugin if target.sm is not None or serves(self.plugin) == target.plugin else None

    def check_plugin(self, target: Target) -> None:
        """Is there a library for `target`, and is it not one for other GPUs, or older than what is asked of it?"""
        library = self.library(target)
        if self.plugin is not None and self.plugin != AUTO and target.plugin:
            if not self.plugin.is_file():
                library = self.plugin
            elif target.sm is None:
                refuse_cut_off(self.plugin)
        if library is None:
            return
        if not library.is_file():
            goal, needs = MADE_BY[target.plugin]
            raise UserError(
                "no plugin library here",
                where=str(library),
                fix=f"`make {goal}` in a checkout, with {needs}, makes one",
            )
        found = serves(library)
        if found not in ("", target.plugin):
            raise UserError(
                f"a plugin library for other targets than {target.name} ({target.family})",
                where=str(library),
                expected=target.plugin,
                found=found,
                fix=f"--plugin auto takes each from this installation; or compile for {target.name} apart",
            )
        if target.sm is None:
            return
        code = library.read_bytes()
        if not (code.startswith(ELF) and any(name in code for name in CREATORS)):
            raise UserError(
                "no plugin library: TensorRT would find no plugin in it",
                where=str(library),
                expected="a shared library that exports getCreators",
                found="one that does not" if code.startswith(ELF) else "no shared library",
                fix="`make plugins TENSORRT=DIR` makes libinstantrt_plugins.so",
            )
        if found and self.plugin_batch_invariant and b"batch_invariant" not in code:  # the name of its attribute
            raise UserError(
                "a plugin library that is older than plugin_batch_invariant: TensorRT would ignore that in silence",
                where=str(library),
                fix="build the library anew, or leave plugin_batch_invariant out",
            )

    @property
    def has_budget(self) -> bool:
        return any(getattr(self, name) is not None for name in BOUNDS)

    def resolved_targets(self) -> tuple[Target, ...]:
        """The target rows, each once, in the order asked for."""
        return tuple(dict.fromkeys(find_target(name) for name in self.targets))

    def longest_sequence(self) -> int | None:
        """Tokens that none of the artifacts will take more of; None where one takes as many as the model can."""
        engines = all(target.backend is Backend.TENSORRT for target in self.resolved_targets())
        return self.engine_limits().max_length if engines else self.max_length

    def engine_limits(self, longest: int = 0) -> EngineLimits:
        """What an engine accepts; `longest` is the model's own maximum, 0 where it has none."""
        if longest and (self.max_length or 0) > longest:
            raise UserError(
                "max_length is more than the model was made for",
                expected=f"at most {longest}",
                found=str(self.max_length),
            )
        max_length = self.max_length if self.max_length is not None else min(2048, longest or 2048)
        return EngineLimits(
            self.max_batch, max_length, self.opt_length if self.opt_length is not None else min(512, max_length)
        )

    @property
    def model_name(self) -> str:
        """Of the folder or file: "." has one, too, and a link keeps its own."""
        return Path(os.path.abspath(self.model)).name  # noqa: PTH100

    def engine_options(self) -> EngineOptions:
        return EngineOptions(**{f.name: getattr(self, f.name) for f in fields(EngineOptions)})


DEFAULTS = {f.name: f.default for f in fields(Request)}
PATHS = tuple(name for name, types in types_of(Request).items() if {Path, tuple[Path, ...]} & {*types})
UNRECORDED = (
    "targets",
    "min_cosine",
    *PATHS,
    *(f.name for f, _ in options_of(Checking)),
)  # what no byte of an artifact depends on


def check_options(request: Request) -> None:
    """Refuses what no target has use for."""
    backends = {target.backend for target in request.resolved_targets()}
    for backend, lacking in ((Backend.ONNXRUNTIME, CPU), (Backend.TENSORRT, GPU)):
        if backend not in backends:
            refuse_idle(request, lacking, where=", ".join(request.targets))
    if all(request.library(target) is None for target in request.resolved_targets()):
        refuse_idle(request, KERNELS, where=", ".join(request.targets))


def check_lengths(request: Request) -> None:
    """A model that is no causal LM has sequences in the profiles of engines only."""
    if request.max_length is not None and all(t.backend is not Backend.TENSORRT for t in request.resolved_targets()):
        raise UserError(f"max_length does nothing without {GPU} or a causal LM", where=str(request.model))


def refuse_of_llm(request: Request) -> None:
    """Refuses options of a language model for a model that is none, a budget among them."""
    if request.has_budget:
        what, fix = "a budget is of causal LMs: it weighs next tokens", "--min-cosine with --verify bounds an encoder"
        raise UserError(what, where=str(request.model), fix=fix)
    for f, _ in options_of(LanguageModel):
        if getattr(request, f.name) != f.default:
            raise UserError(f"{f.name} does nothing without a causal LM", where=str(request.model), fix="leave it out")


def refuse_cosine(minimum: float | None, where: str) -> None:
    """Refuses a bound on an encoder's answers for a model that is none."""
    if minimum is not None:
        what, fix = "min_cosine is of encoders: it compares whole answers", "--max-kl bounds a causal LM"
        raise UserError(what, where=where, fix=fix)


def refuse_idle(request: Request, lacking: str, where: str, fix: str = "leave it out") -> None:
    """Refuses an option that says nothing without what this compilation lacks."""
    for f, option in options_of(request):
        if lacking in option.needs and getattr(request, f.name) != f.default:
            raise UserError(f"{f.name} does nothing without {lacking}", where=where, fix=fix)


def idle_notes(request: Request, lacking: Collection[str]) -> list[str]:
    """What to say of options that say nothing to this model, and may to others."""
    given = ((f.name, o.wants) for f, o in options_of(request) if getattr(request, f.name) != f.default)
    return [f"{name} does nothing without {wants}" for name, wants in given if wants in lacking]


JSON_KEYS: dict[str, tuple[str, type]] = {
    "enable_quant": ("enable_quant", bool),
    "weight_only_quant": ("weight_only", bool),
    "customized_quant_config": ("quant_config", dict),
}


def fields_from_json(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Request fields from a JSON config: the spec's three arguments, or a customized_quant_config alone."""
    if not set(raw) & set(JSON_KEYS):
        return {"quant_config": dict(raw)}
    unknown = sorted(set(raw) - set(JSON_KEYS))
    if unknown:
        raise UserError("unknown key", expected=", ".join(JSON_KEYS), found=", ".join(map(repr, unknown)))
    for key, (_, kind) in JSON_KEYS.items():
        if key in raw and not isinstance(raw[key], kind):
            expected = f"a JSON {'object' if kind is dict else 'boolean'}"
            raise UserError(f"{key} has a value of another kind", expected=expected, found=repr(raw[key]))
    return {JSON_KEYS[key][0]: value for key, value in raw.items()}


def serves(library: Path) -> str:
    """The name that the library of ours at this path goes by; "" where it says none, or is not there."""
    found = SERVES.search(library.read_bytes()) if library.is_file() else None
    return found[1].decode() if found else ""


def refuse_cut_off(library: Path) -> None:
    """An ELF file says in its head where the table at its end is: what ends before that cannot be loaded."""
    with library.open("rb") as file:
        head = file.read(HEAD.size)
    if len(head) < HEAD.size or not head.startswith(ELF):
        return
    table, size, count = HEAD.unpack(head)
    there, end = library.stat().st_size, table + size * count
    if there < end:
        raise UserError(
            "a plugin library that is cut off",
            where=str(library),
            expected=f"{end:,} bytes",
            found=f"{there:,}",
            fix="copy it again; `make plugins-cpu` makes one",
        )
