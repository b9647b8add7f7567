"""The files of a checkpoint's folder: read, harmless with the reason, or refused by name.

What can change the model's numbers and is not read is refused. Files that are no weights and that nobody knows are
nobody's business.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from instantrt.compiler.checkpoint import INDEX, SINGLE, weight_map_of
from instantrt.compiler.quant.readers import BESIDE
from instantrt.passes.core.errors import UserError

Report = Callable[[UserError], None]
DEEPEST = 3  # folders that are looked into for weights


@dataclass(frozen=True)
class Accounted:
    """Things of one name, numbers in it written `*`, and what became of all `count` of them."""

    name: str
    count: int
    why: str


@dataclass(frozen=True)
class Rule:
    """What is known of files with a name like `pattern`. They are refused where `fix` says a way out.

    alone   they are refused only where no safetensors weights lie beside them
    """

    pattern: str
    why: str
    fix: str = ""
    alone: bool = False


FLOAT_MODEL = "compile the model that it was quantized from, with --quant"
APART = "move the adapter into a folder of its own, and pass --adapter FOLDER to have it merged"
SAVE = "load it with transformers and save_pretrained(folder): safetensors are read"
COPY = "download or copy the checkpoint again, with what its links point to"
TOKENS = "text to tokens and back; copied beside the artifact where it is of use there"
READ = "the model"
MERGED = "merged into the model"
AUTHORS = "weights in the format of the model's authors, not of transformers"
OTHER_FORMAT = "weights in another format: the safetensors are read"
TRAINING = "of the training"
RULES = (
    Rule("adapter_config.json", "a LoRA adapter (PEFT), which changes the weights of its base model", APART),
    Rule("adapter_model.*", "the weights of a LoRA adapter (PEFT)", APART),
    Rule("modules.json", READ),
    Rule("model_index.json", "a diffusers pipeline of pictures or sound", "export a model of it to ONNX; compile that"),
    Rule("quant_model_description*.json", "weights quantized by msModelSlim", FLOAT_MODEL),
    Rule("quanto_qmap.json", "weights quantized by quanto", FLOAT_MODEL),
    Rule("quantization_map.json", "weights quantized by quanto", FLOAT_MODEL),
    Rule("smash_config.json", "a model that Pruna has changed", FLOAT_MODEL),
    Rule("mlc-chat-config.json", "weights in the format of MLC", FLOAT_MODEL),
    Rule("qmodel.pt", "weights quantized by HQQ", FLOAT_MODEL),
    Rule("*.gguf", OTHER_FORMAT),
    Rule("*.ggml", "GGML weights", "compile the model that they were converted from", alone=True),
    Rule("consolidated*.safetensors", AUTHORS, SAVE, alone=True),
    Rule("consolidated*.pth", AUTHORS, SAVE, alone=True),
    Rule("diffusion_pytorch_model*", "the weights of a diffusion model", "compile it from an .onnx file", alone=True),
    Rule("weights*.npz", "weights in the format of MLX", SAVE, alone=True),
    Rule("*.nemo", "a NeMo archive", "convert it to a Hugging Face folder", alone=True),
    Rule("tf_model*.h5", OTHER_FORMAT, SAVE, alone=True),
    Rule("flax_model*.msgpack", OTHER_FORMAT, SAVE, alone=True),
    Rule("openvino_model*", "a copy compiled for OpenVINO", SAVE, alone=True),
    Rule("model.*.safetensors", "a variant: transformers reads it only where it is asked for by name"),
    Rule("optimizer*", TRAINING),
    Rule("scheduler*", TRAINING),
    Rule("rng_state*", TRAINING),
    Rule("training_args.bin", TRAINING),
    Rule("trainer_state.json", TRAINING),
    Rule("generation_config.json", "how to sample from the logits"),
    Rule("tokenizer*", TOKENS),
    Rule("special_tokens_map.json", TOKENS),
    Rule("added_tokens.json", TOKENS),
    Rule("vocab.*", TOKENS),
    Rule("merges.txt", TOKENS),
    Rule("chat_template*", TOKENS),
    Rule("*preprocessor_config.json", "prepares pictures or sound, of which a language model gets none"),
    Rule("processor_config.json", "prepares pictures or sound, of which a language model gets none"),
    Rule("params.json", "the config in the format of the model's authors; config.json is read"),
    Rule("*_sentence_transformers.json", READ),
    Rule("sentence_*_config.json", READ),
    Rule("*.safetensors.index*.json", "an index that transformers reads only where it is asked for by name"),
    Rule("recipe.yaml", "how it was quantized; config.json says the same"),
    Rule("*.safetensors", "weights besides those that are read; transformers does not read them either"),
    *(
        Rule(f"*.{suffix}", OTHER_FORMAT)
        for suffix in ("bin", "pt", "pth", "ckpt", "h5", "msgpack", "ot", "npz", "onnx", "engine", "tflite", "mlmodel")
    ),
)
WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|npz|onnx)$")


def account_of_files(folder: Path, report: Report, known: Mapping[str, str] | None = None) -> tuple[Accounted, ...]:
    """What becomes of each file; `report` is told of every one that is refused.

    known   files that are read, and what they are, in a folder that is no model's
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists() and matters(path.name):
            link = f"a link to {path.readlink()}, which is not there"
            report(UserError(f"{path.name} cannot be read", where=str(folder), found=link, fix=COPY))
    read = dict.fromkeys(weight_files(folder, names), READ) if known is None else known
    found = []
    for name in names:
        rule = None if name in read else next((rule for rule in RULES if fnmatch(name, rule.pattern)), None)
        if name in read:
            found.append((name, read[name]))
        elif rule is not None and rule.fix and not (rule.alone and read):
            report(UserError(f"{name}: {rule.why}", where=str(folder), fix=rule.fix))
        elif rule is not None:
            found.append((name, rule.why))
    found += [(name, "weights of another folder, which are not read") for name in weights_below(folder)]
    return entries(found)


def matters(name: str) -> bool:
    """Would a file of this name be read, or refused?"""
    return name in ("config.json", INDEX, *BESIDE) or any(
        r.fix and not r.alone and fnmatch(name, r.pattern) for r in RULES
    )


def weight_files(folder: Path, names: list[str]) -> set[str]:
    """The files that `read_checkpoint` reads, and those that say how; what is wrong with them is told there."""
    if INDEX in names:
        try:
            shards = set(weight_map_of(folder / INDEX).values())
        except UserError:
            shards = set()
        weights = {INDEX, *shards} & set(names)
    else:
        known = ("adapter_model.*", "consolidated*", "diffusion_pytorch_model*")
        every = [n for n in names if n.endswith(".safetensors") and not any(fnmatch(n, k) for k in known)]
        weights = {SINGLE} if SINGLE in names else set(every)
    return weights | ({"config.json", *BESIDE} & set(names) if weights else set())


def weights_below(folder: Path) -> Iterator[str]:
    """Weights in folders of the folder, hidden ones aside."""
    for root, folders, files in os.walk(folder):
        below = Path(root).relative_to(folder)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if len(below.parts) < DEEPEST else []
        if below.parts:
            yield from (str(below / name) for name in sorted(files) if WEIGHTS.search(name))


def entries(found: Iterable[tuple[str, str]]) -> tuple[Accounted, ...]:
    """(name, why) -> one entry for all whose names differ in numbers alone."""
    counts: dict[tuple[str, str], list[str]] = {}
    for name, why in found:
        counts.setdefault((re.sub(r"\d+", "*", name), why), []).append(name)
    return tuple(
        Accounted(name if len(names) > 1 else names[0], len(names), why) for (name, why), names in counts.items()
    )
