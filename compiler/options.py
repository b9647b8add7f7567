"""Every option of a compilation, written once: name, type, default, help, what needs it, and what it becomes.

A group is a dataclass whose fields are made by `option`. `Request` is all groups together; the command line makes its
options of them (tools/cli/options.py); `EngineOptions` alone goes to the process that builds an engine and into kits.
To add an option is to add a field here, and to read it where it is used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from instantrt.compiler.kinds import check_kind
from instantrt.compiler.quant.config import Quant, Search
from instantrt.passes.core.errors import UserError
from instantrt.passes.ort import Preset

Builder = Literal["auto", "tensorrt-rtx", "tensorrt", "kit"]
HeadFormat = Literal["float", "int8"]
TableFormat = Literal["stored", "int8"]
Logits = Literal["last", "all"]
KvCache = Literal["concat", "in-place"]
CacheType = Literal["float32", "float16", "int8", "uint4"]

# What a compilation may lack. An option that needs it says nothing without: that is an error.
CPU, GPU, QUANTIZED, FLOAT = "a CPU target", "a GPU target", "quantization", "a float checkpoint"
KERNELS = "a target that the library has kernels for"
# What one model may lack where options are for many, which a script compiles with the same ones: that is a note.
INEXACT = "layers whose form it decides (docs/targets/x86.md has them)"
LLM, A8W8 = "a causal LM", "a checkpoint that runs as A8W8"

T = TypeVar("T")
Rule = tuple[Callable[[Any], bool], str]  # does a value fit, and in words what does
ABOVE_ZERO: Rule = (lambda value: 0 < value < math.inf, "a number above 0")
PART: Rule = (lambda value: 0 < value <= 1, "a number above 0, at most 1")
LEVELS: Rule = (lambda value: 0 <= value <= 5, "0 to 5")
GPUS = ("none", "ampere_plus", "same_compute_capability")  # TensorRT's HardwareCompatibilityLevel
LEVEL: Rule = (lambda value: value.lower() in ("", *GPUS), " or ".join(GPUS))
MIB: Rule = (lambda value: 1 <= value < 1 << 20, "MiB, 1 to 1048575")  # not bytes


@dataclass(frozen=True)
class Option:
    """What there is to know of a field besides its name, type and default.

    needs     all that a compilation must have
    wants     what it says nothing without either, which not every model has
    rule      what a value that is not None has to fulfil
    trtexec   the word for TensorRT's own tool, with {} for the value; "" where it has none
    flag      the member of TensorRT's BuilderFlag that it sets
    line      its type on the command line, where that is another
    """

    help: str
    needs: tuple[str, ...] = ()
    wants: str = ""
    rule: Rule | None = None
    trtexec: str = ""
    flag: str = ""
    line: Any = None


def option(
    default: T,
    help: str,
    *needs: str,
    wants: str = "",
    rule: Rule | None = None,
    trtexec: str = "",
    flag: str = "",
    line: Any = None,
) -> T:
    """A field of a group."""
    return field(default=default, metadata={"option": Option(help, needs, wants, rule, trtexec, flag, line)})


def options_of(group: Any) -> Iterator[tuple[Field[Any], Option]]:
    """The fields of a group, or of a value of one, that are options; others are said in Python and JSON alone."""
    return ((f, f.metadata["option"]) for f in fields(group) if f.metadata)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How weights become integers."""

    quant: Quant | None = option(None, "what to quantize to; else what the checkpoint is, float or quantized")
    group_size: int | None = option(
        None, "consecutive inputs that share a scale; -1 per channel; else by target and model", QUANTIZED
    )
    search: Search | None = option(
        None,
        "how scales are chosen: for the least error on inputs of random tokens, or by weights alone; else by target",
        QUANTIZED,
        FLOAT,
    )
    weight_only: bool = option(False, "8-bit GPTQ checkpoints run as A16W8 instead of A8W8", QUANTIZED, wants=A8W8)
    enable_quant: bool | None = None  # the spec's switch; None: as the other fields say
    quant_config: Mapping[str, Any] | None = option(
        None, "JSON file that says how to quantize, by the keys in docs/quantization.md", line=Path
    )
    ignore: tuple[str, ...] = option((), "module pattern that stays float; may be repeated", QUANTIZED)
    calibration: Path | None = option(
        None,
        "text that weight-only codes are fitted to; else none, for encoders words at random",
        QUANTIZED,
        FLOAT,
    )
    lm_head: HeadFormat | None = option(
        None, "the head of a float checkpoint; else int8 for a causal LM on a CPU", QUANTIZED, FLOAT
    )
    embeddings: TableFormat | None = option(
        None, "the table of embeddings; stored: as in the checkpoint; else int8 beside such a head by default"
    )


@dataclass(frozen=True, kw_only=True)
class CpuArtifacts:
    """What ONNX Runtime is to run."""

    cpu_preset: Preset = option(
        "auto",
        "bits of 16-bit activations that products keep: exact 14, fast 8, auto 8 where weights are in groups, else 14",
        CPU,
        wants=INEXACT,
    )
    portable: bool = option(
        False, "standard ONNX attention instead of ONNX Runtime's GroupQueryAttention", CPU, wants=LLM
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """How a checkpoint may be read."""

    trust_remote_code: bool = option(False, "run the model's own Python")
    truncate_dim: int | None = option(
        None, "keep this many numbers of a sentence embedding, the first", rule=(lambda value: value > 0, "1 or more")
    )
    requantize: bool = option(False, "take a GGUF file's weights dequantized, for --quant or as floats")
    adapter: tuple[Path, ...] = option((), "folder of a LoRA adapter (PEFT) that is merged into the model")
    base: Path | None = option(None, "folder of the model that an adapter is for, where that is what is compiled")
    cache: Path | None = option(
        None, "folder that keeps exported graphs, or none; else $INSTANTRT_CACHE, else ~/.cache/instantrt"
    )


@dataclass(frozen=True, kw_only=True)
class Engines:
    """Who builds engines, and what they accept."""

    builder: Builder = option("auto", "who builds; kit: what a GPU machine needs to finish the build", GPU)
    max_batch: int = option(1, "sequences that run together", GPU)
    max_length: int | None = option(
        None, "tokens of a sequence, cache included; else what the model can, in engines at most 2048"
    )
    opt_length: int | None = option(None, "the length to tune for; else 512, or the longest", GPU)


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """What a causal LM's artifact takes and gives."""

    logits: Logits = option("last", "of each sequence's last token, or of all tokens")
    kv_cache: KvCache = option(
        "concat", "present is a longer copy of past, or both are one buffer of the longest length", GPU
    )
    kv_cache_type: CacheType | None = option(
        None,
        "what the cache holds; else float32 on a CPU (float16 on kernels of ours), in engines what they compute in",
    )


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What a user may ask of TensorRT's builder. None, False and "" leave its own default."""

    memory_limit: int | None = option(
        None, "MiB of scratch memory", GPU, rule=MIB, trtexec="--memPoolSize=workspace:{}"
    )
    optimization_level: int | None = option(None, "0 to 5", GPU, rule=LEVELS, trtexec="--builderOptimizationLevel={}")
    weight_streaming: bool = option(
        False, "weights may stay on the host", GPU, trtexec="--allowWeightStreaming", flag="WEIGHT_STREAMING"
    )
    version_compatible: bool = option(
        False, "for newer TensorRT too", GPU, trtexec="--versionCompatible", flag="VERSION_COMPATIBLE"
    )
    hardware_compatible: str = option(
        "",
        "for other GPUs too: ampere_plus or same_compute_capability",
        GPU,
        rule=LEVEL,
        trtexec="--hardwareCompatibilityLevel={}",
    )
    timing_cache: Path | None = option(None, "file of timings that builds share", GPU)

    def __post_init__(self) -> None:
        settle(self)

    @property
    def asked(self) -> list[tuple[Option, Any]]:
        """What is not left to the builder, each with its value."""
        return [(o, value) for f, o in options_of(self) if (value := getattr(self, f.name)) != f.default]


@dataclass(frozen=True, kw_only=True)
class Plugins:
    """Our own kernels."""

    plugin: Path | None = option(
        None, "library of our kernels for quantized linears, exact zero points; auto: the installed one", KERNELS
    )
    plugin_rounding: bool = option(
        False, "with a plugin: many rows may use weights rounded to 16 bits, for cuBLASLt; takes memory", GPU
    )
    plugin_batch_invariant: bool = option(
        False, "with a plugin: a row's products have the same bits however many rows come with it; slower", GPU
    )


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """What quantization may cost: worst layers get finer formats until it does not cost more."""

    max_kl: float | None = option(
        None, "bound on the mean KL to the float model's next token, in nats", QUANTIZED, FLOAT, rule=ABOVE_ZERO
    )
    max_ppl_increase: float | None = option(
        None, "bound on the increase of perplexity, in percent", QUANTIZED, FLOAT, rule=ABOVE_ZERO
    )
    min_cosine: float | None = option(
        None,
        "bound on the smallest cosine of an encoder's answers to the float model's",
        QUANTIZED,
        rule=PART,
    )
    text: Path | None = option(None, "text in UTF-8 to measure on")


@dataclass(frozen=True, kw_only=True)
class Size:
    """What quantized weights may take: the finer formats go to the layers where they count."""

    max_size: float | None = option(
        None,
        "bound on the artifact's weights, in MiB: worst layers get the finer formats",
        QUANTIZED,
        FLOAT,
        rule=ABOVE_ZERO,
    )
    bits_per_weight: float | None = option(
        None,
        "bound on the mean of quantized weights, scales and zero points included",
        QUANTIZED,
        FLOAT,
        rule=ABOVE_ZERO,
    )


@dataclass(frozen=True, kw_only=True)
class Checking:
    """What an artifact has to show before it is published."""

    smoke: bool = option(True, "run each artifact once, against the twin, before it is published")


@dataclass(frozen=True, kw_only=True)
class Looking:
    """For who wants to see what happens."""

    dump_passes: Path | None = option(None, "new folder for the graph after each pass, as text")


def settle(options: Any) -> None:
    """Makes paths and tuples of strings, and refuses values that do not exist: the `__post_init__` of a group."""
    for name, types in types_of(options.__class__).items():
        value = getattr(options, name)
        check_kind(name, value, *types)
        if Path in types and isinstance(value, str | os.PathLike):
            object.__setattr__(options, name, Path(value))
        if tuple[str, ...] in types:
            object.__setattr__(options, name, (value,) if isinstance(value, str) else tuple(value))
        if tuple[Path, ...] in types:
            object.__setattr__(
                options, name, tuple(map(Path, [value] if isinstance(value, str | os.PathLike) else value))
            )
        choices = [choice for each in types if get_origin(each) is Literal for choice in get_args(each)]
        if choices and value not in choices and not (value is None and type(None) in types):
            raise UserError(f"{name} has no such value", expected=" or ".join(choices), found=repr(value))
    for f, about in options_of(options):
        value = getattr(options, f.name)
        if about.rule is not None and value is not None and not about.rule[0](value):
            raise UserError(f"{f.name} is out of range", expected=about.rule[1], found=str(value))


@cache
def types_of(group: type) -> Mapping[str, tuple[Any, ...]]:
    """Field -> the types that its value may have."""
    hints = get_type_hints(group)
    return {
        f.name: get_args(hint) if get_origin(hint := hints[f.name]) in (Union, UnionType) else (hint,)
        for f in fields(group)
    }
