"""Tensors that are no parameters, by name: what is known to be harmless, and what the others tell of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from instantrt.compiler.frontend.facts import ModelFacts
from instantrt.compiler.frontend.side_files import FLOAT_MODEL
from instantrt.compiler.quant.stored import Reader
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FileTensor

SHOWN = 5  # names that a message lists
LOOKED_AT = 1000  # names that are asked what they tell of the checkpoint


@dataclass(frozen=True)
class Known:
    """Tensors that files have and models have no place for, by name, and by rank where the name says too little."""

    pattern: str
    why: str
    ranks: tuple[int, ...] = ()

    def takes(self, name: str, tensor: FileTensor) -> bool:
        return re.search(self.pattern, name) is not None and (not self.ranks or len(tensor.shape) in self.ranks)


HARMLESS = (
    Known(r"(^|\.)rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)$", "computed from config.json"),
    Known(r"(^|\.)(attn|attention|self_attention|self_attn)\.bias$", "the causal mask of older versions", (4,)),
    Known(
        r"(^|\.)(attn|attention|self_attention|self_attn)\.masked_bias$", "the causal mask of older versions", (0, 1)
    ),
    Known(r"(^|\.)position_ids$", "the numbers 0, 1, 2, ...", (1, 2)),
    Known(r"(^|\.)pooler\.(dense\.)?(weight|bias)$", "makes of the first token what no output here is made of", (1, 2)),
    Known(
        r"^(cls\.seq_relationship|sop_classifier\.classifier)\.(weight|bias)$",
        "the head of another training task: which sentence follows",
        (1, 2),
    ),
    Known(r"(^|\.)num_batches_tracked$", "counts the steps of the training", (0, 1)),
)
# Of a quantized layer, by the reader's method.
UNUSED_PARTS = {
    ("compressed-tensors", "input_scale"): "a static activation scale: every token gets its own",
    ("compressed-tensors", "input_zero_point"): "of a static activation scale: every token gets its own",
}


@dataclass(frozen=True)
class Hint:
    """What a tensor without a place tells of the checkpoint, and what to do."""

    pattern: str
    found: str
    fix: str


LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
MERGE_FIRST = "merge the adapter into its base model, and save that; an adapter as peft saves it is for --adapter"
WRAPPER = "load it as it was saved, and save the language model alone"
HINTS = (
    Hint(r"lora_|\.base_layer\.|modules_to_save|\.adapter", "an adapter (LoRA) that is not merged", MERGE_FIRST),
    Hint(r"\bact\.scales$", "AWQ's scales of an activation, by which its output would be divided", FLOAT_MODEL),
    Hint(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB)$|quant_state", "bitsandbytes", FLOAT_MODEL),
    Hint(r"weight_scale_inv$", "fp8 weights in blocks", FLOAT_MODEL),
    Hint(r"_(blocks|scales)$", "mxfp4 weights", FLOAT_MODEL),
    Hint(
        r"weight_(scale_2|global_scale|packed)$|input_(scale|global_scale)$"
        r"|\.(qweight|qzeros|scales|g_idx|weight_scale|zeros|biases)$",
        "a quantized layer that no config explains",
        FLOAT_MODEL,
    ),
    Hint(r"(^|\.)(k|v|q|kv)_scale$", "scales of a quantized cache", "compile a checkpoint without them"),
    Hint(r"(^|\.)(score|classifier|v_head|reward_head|qa_outputs)\.", "a head that is no language model's", ""),
    Hint(r"(vision|visual|image|audio|multi_modal|mm_)", "a part for pictures or sound", WRAPPER),
    Hint(r"(^|\.)(mtp|medusa|eagle)", "heads of speculative decoding", "remove these tensors"),
    Hint(r"\.bias$", "a bias that config.json does not announce", "correct config.json"),
)


def harmless_names(facts: ModelFacts) -> Callable[[str, FileTensor], str]:
    """(name, tensor) -> why a tensor without a place cannot change what the model computes; else nothing."""
    skipped = re.compile("|".join(f"({pattern})" for pattern in facts.ignored)) if facts.ignored else None

    def why(name: str, tensor: FileTensor) -> str:
        if name in facts.buffers:
            return "a buffer that the model computes itself"
        known = next((each.why for each in HARMLESS if each.takes(name, tensor)), "")
        if not known and skipped is not None and skipped.search(name):
            return "transformers' class of the model does not load it either"
        return known

    return why


def no_place(
    unknown: list[str], tensors: Mapping[str, FileTensor], facts: ModelFacts, reader: Reader | None
) -> tuple[UserError, bool]:
    """The error for tensors that nobody takes, led by the one that tells most; and does it tell anything?"""
    hints = ((hint, name) for hint in HINTS for name in unknown[:LOOKED_AT] if re.search(hint.pattern, name))
    hint, name = next(hints, (None, unknown[0]))
    found, fix = (hint.found, hint.fix) if hint is not None else ("", "")
    layer, count = LAYER.search(name), facts.shape.layers
    if reader is not None and name.endswith(f".{reader.mark}"):
        found, fix = "a module quantized that is no linear layer of the model", "quantize the model again without it"
    elif layer is not None and int(layer[1]) >= count:
        found = f"layer {layer[1]}, and the config announces {count}"
    error = UserError(
        f"nothing uses tensor {tensors[name].name} of the checkpoint",
        where=str(tensors[name].path),
        expected=f"the tensors of {facts.name} as config.json announces it",
        found="; ".join(filter(None, (found, listed([each for each in unknown if each != name], "others")))),
        fix=fix or "config.json belongs to another model, or the tensor is not of this one",
    )
    return error, bool(found)


def listed(names: list[str], words: str) -> str:
    """`words: a, b, ...`, or nothing."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{words}: {', '.join(names[:SHOWN])}{more}" if names else ""
