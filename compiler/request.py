"""What a user asks for: one frozen value, with the same field names on the command line, in Python and in JSON."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from instantrt import plugins
from instantrt.compiler.backend.tensorrt.build import EngineOptions
from instantrt.compiler.backend.tensorrt.choose import Builder
from instantrt.compiler.backend.tensorrt.profiles import Limits
from instantrt.compiler.quant.config import Quant
from instantrt.compiler.target import Backend, Target, find_target
from instantrt.passes.core.errors import UserError
from instantrt.passes.ort.linear import Preset

PACKAGED_PLUGINS = Path(plugins.__file__).parent / "lib"
AUTO = Path("auto")
SERVES = re.compile(rb"InstantRT serves by (libinstantrt_plugins\w*\.so)")  # as plugin.cpp has it
PATHS = ("model", "out", "timing_cache", "plugin", "text", "dump_passes")
LISTS = ("targets", "ignore")
LAYER_FORMAT = re.compile(r"float|a(16w[48]|8w8):(-1|[1-9]\d*)")
Logits = Literal["last", "all"]
KvCache = Literal["concat", "in-place"]
HeadFormat = Literal["float", "int8"]
TableFormat = Literal["stored", "int8"]


@dataclass(frozen=True)
class Request:
    """Compile `model` for `targets` into `out`. Where a path or a tuple of names is due, a string will do.

    model            folder with config.json and safetensors, or an .onnx file
    targets          names from `compile --list-targets`
    quant            a16w8, a16w4, a8w8, a8w4 or none; None takes what the checkpoint is, float or quantized
    group_size       -1 per channel, else consecutive inputs that share a scale
    weight_only      8-bit GPTQ checkpoints run as A16W8 instead of A8W8 (the spec's `weight_only_quant`)
    enable_quant     the spec's switch; None means: as the other fields say
    quant_config     the spec's `customized_quant_config`
    ignore           module patterns that stay float
    lm_head          float or int8
    embeddings       stored (as in the checkpoint) or int8
    cpu_preset       exact: 16-bit activations keep 14 bits of each token or block; fast: int8 activations by block
    plugin           engines: plugin library whose WeightOnlyGemm runs the weight-only linears, exact zero points;
                     `auto` is the library for the target that this installation carries
    plugin_rounding  plugin: many rows may use weights rounded to 16 bits once, for cuBLASLt; takes scratch memory
    portable         standard ONNX attention instead of ONNX Runtime's GroupQueryAttention
    max_kl           budget: mean KL of the next token against the float model, in nats; worst layers get finer formats
    max_ppl_increase the same for the increase of perplexity on `text`, in percent
    text             what the budget is measured on, and `--verify`
    dump_passes      new folder for the graph as text after each pass, for who works on the compiler
    layers           module path -> format (`a16w4:32`, `a16w8:-1`, `float`), as a budget chose them

    For TensorRT targets:
    builder          auto, tensorrt-rtx, tensorrt, or kit: what a GPU machine needs to finish the build
    max_batch        sequences that run together
    max_length       tokens of a sequence, cache included; None: 2048, or the model's own maximum where that is less
    opt_length       the length to tune for; None: 512, or max_length where that is less
    logits           last (of each sequence) or all
    kv_cache         concat (present is a longer copy of past) or in-place (one buffer of max_length)
    memory_limit     MiB of scratch memory
    optimization_level, weight_streaming, version_compatible, hardware_compatible, timing_cache: as TensorRT has them
    """

    model: Path
    targets: tuple[str, ...]
    out: Path
    quant: Quant | None = None
    group_size: int | None = None
    weight_only: bool = False
    enable_quant: bool | None = None
    quant_config: Mapping[str, Any] | None = None
    ignore: tuple[str, ...] = ()
    lm_head: HeadFormat = "float"
    embeddings: TableFormat = "stored"
    cpu_preset: Preset = "exact"
    portable: bool = False
    trust_remote_code: bool = False
    builder: Builder = "auto"
    max_batch: int = 1
    max_length: int | None = None
    opt_length: int | None = None
    logits: Logits = "last"
    kv_cache: KvCache = "concat"
    memory_limit: int | None = None
    optimization_level: int | None = None
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware_compatible: str = ""
    timing_cache: Path | None = None
    plugin: Path | None = None
    plugin_rounding: bool = False
    max_kl: float | None = None
    max_ppl_increase: float | None = None
    text: Path | None = None
    dump_passes: Path | None = None
    layers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in PATHS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        for name in LISTS:
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if not self.targets:
            raise UserError("no target", fix="--target x86; compile --list-targets shows all")
        allowed = (
            ("quant", self.quant, (None, *get_args(Quant))),
            ("lm_head", self.lm_head, get_args(HeadFormat)),
            ("embeddings", self.embeddings, get_args(TableFormat)),
            ("cpu_preset", self.cpu_preset, get_args(Preset)),
            ("builder", self.builder, get_args(Builder)),
            ("logits", self.logits, get_args(Logits)),
            ("kv_cache", self.kv_cache, get_args(KvCache)),
        )
        for name, value, values in allowed:
            if value not in values:
                expected = " or ".join(str(v) for v in values if v)
                raise UserError(f"{name} has no such value", expected=expected, found=repr(value))
        if self.quant is not None and self.quant_config is not None:
            raise UserError("quant and quant_config both say how to quantize", fix="give one of them")
        if self.enable_quant is False and (self.quant_config is not None or self.quant not in (None, "none")):
            raise UserError(
                "a custom quantization config with quantization disabled",
                found=f"enable_quant = false and {'customized_quant_config' if self.quant_config else self.quant}",
                fix="set enable_quant to true, or leave the config out",
            )
        for name, limit in (("max_kl", self.max_kl), ("max_ppl_increase", self.max_ppl_increase)):
            if limit is not None and not limit > 0:
                raise UserError(f"{name} is no bound", expected="a number above 0", found=str(limit))
        if self.quant == "none" and (self.group_size is not None or self.weight_only or self.enable_quant):
            raise UserError("quant none leaves nothing for group_size, weight_only or enable_quant to say")
        for path, form in self.layers.items():
            if not LAYER_FORMAT.fullmatch(form):
                raise UserError("a layer's format", where=path, expected="float, or as a16w4:32", found=repr(form))
        if self.plugin_rounding and self.plugin is None:
            raise UserError("plugin_rounding without a plugin", fix="--plugin FILE")
        for target in self.resolved_targets():
            self.check_old_tensorrt(target)
            self.check_plugin(target)
        self.engine_limits()
        self.engine_options()

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
        """The plugin library for `target`, or for none that has use for one."""
        if self.plugin != AUTO:
            return self.plugin
        return PACKAGED_PLUGINS / target.plugin if target.plugin else None

    def check_plugin(self, target: Target) -> None:
        """Is there a library for `target`, and is it not one for other GPUs?"""
        library = self.library(target)
        if library is None:
            return
        if not library.is_file():
            goal, compiler = ("plugins-sm70", "NVRTC 12") if target.sm == 70 else ("plugins", "nvcc")
            raise UserError(
                "no plugin library here",
                where=str(library),
                fix=f"`make {goal} TENSORRT=DIR` in a checkout, with {compiler} and DIR/include of TensorRT, makes one",
            )
        serves = SERVES.search(library.read_bytes())
        if serves and target.plugin not in ("", serves[1].decode()):
            raise UserError(
                f"a plugin library for other GPUs than {target.name} ({target.family})",
                where=str(library),
                expected=target.plugin,
                found=serves[1].decode(),
                fix=f"--plugin auto takes each from this installation; or compile for {target.name} apart",
            )

    @property
    def has_budget(self) -> bool:
        return self.max_kl is not None or self.max_ppl_increase is not None

    def resolved_targets(self) -> tuple[Target, ...]:
        """The target rows, each once, in the order asked for."""
        return tuple(dict.fromkeys(find_target(name) for name in self.targets))

    def engine_limits(self, longest: int = 0) -> Limits:
        """What an engine accepts; `longest` is the model's own maximum, 0 where it has none."""
        if longest and (self.max_length or 0) > longest:
            raise UserError(
                "max_length is more than the model was made for",
                expected=f"at most {longest}",
                found=str(self.max_length),
            )
        max_length = self.max_length if self.max_length is not None else min(2048, longest or 2048)
        return Limits(
            self.max_batch, max_length, self.opt_length if self.opt_length is not None else min(512, max_length)
        )

    @property
    def model_name(self) -> str:
        """Of the folder or file: "." has one, too, and a link keeps its own."""
        return Path(os.path.abspath(self.model)).name  # noqa: PTH100

    def engine_options(self) -> EngineOptions:
        return EngineOptions(
            memory_limit=self.memory_limit << 20 if self.memory_limit is not None else None,
            optimization_level=self.optimization_level,
            weight_streaming=self.weight_streaming,
            version_compatible=self.version_compatible,
            hardware_compatible=self.hardware_compatible,
            timing_cache=self.timing_cache,
        )


# What a compilation may lack -> the fields that then say nothing.
CPU, GPU, QUANTIZATION, FLOAT = "a CPU target", "a GPU target", "quantization", "a float checkpoint"
WITHOUT = {
    CPU: ("cpu_preset", "portable"),
    GPU: (
        *("builder", "max_batch", "max_length", "opt_length", "logits", "kv_cache", "memory_limit"),
        *("optimization_level", "weight_streaming", "version_compatible", "hardware_compatible", "timing_cache"),
        *("plugin", "plugin_rounding"),
    ),
    QUANTIZATION: ("group_size", "weight_only", "ignore", "lm_head", "max_kl", "max_ppl_increase"),
    FLOAT: ("lm_head",),
}
DEFAULTS = {f.name: f.default for f in fields(Request)}


def check_options(request: Request) -> None:
    """Refuses what no target has use for."""
    backends = {target.backend for target in request.resolved_targets()}
    for backend, lacking in ((Backend.ONNXRUNTIME, CPU), (Backend.TENSORRT, GPU)):
        if backend not in backends:
            refuse_idle(request, lacking, where=", ".join(request.targets))


def refuse_idle(request: Request, lacking: str, where: str, fix: str = "leave it out") -> None:
    """Refuses a field that says nothing without what this compilation lacks."""
    for name in WITHOUT[lacking]:
        if getattr(request, name) != DEFAULTS[name]:
            raise UserError(f"{name} does nothing without {lacking}", where=where, fix=fix)


JSON_KEYS = {
    "enable_quant": "enable_quant",
    "weight_only_quant": "weight_only",
    "customized_quant_config": "quant_config",
}


def fields_from_json(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Request fields from a JSON config: the spec's three arguments, or a customized_quant_config alone."""
    if not set(raw) & set(JSON_KEYS):
        return {"quant_config": dict(raw)}
    unknown = sorted(set(raw) - set(JSON_KEYS))
    if unknown:
        raise UserError("unknown key", expected=", ".join(JSON_KEYS), found=", ".join(map(repr, unknown)))
    for key, kind in (("enable_quant", bool), ("weight_only_quant", bool), ("customized_quant_config", dict)):
        if key in raw and not isinstance(raw[key], kind):
            expected = f"a JSON {'object' if kind is dict else 'boolean'}"
            raise UserError(f"{key} has a value of another kind", expected=expected, found=repr(raw[key]))
    return {JSON_KEYS[key]: value for key, value in raw.items()}
