"""config.pbtxt of the models in a Triton repository: a function of the manifest and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from instantrt.compiler.artifact.manifest import Artifact, TensorSpec
from instantrt.passes.core.errors import UserError

# What the generate model starts with; its config.pbtxt may be edited.
MAX_BATCH = 16
MAX_TEXTS = 256  # of one call of an encoder
MAX_LENGTH = 4096  # the cache of every row is as long, so a model's own limit may be too much
MAX_QUEUE = 1024
DTYPES = {
    "bool": "TYPE_BOOL",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
}
TEXTS = ("embed", "classify")  # what an encoder may make of a text
CHAT = 'a chat as JSON, `[{"role": "user", "content": "..."}]`, put through the model\'s chat template'
TAKEN = "taken, and changes nothing: the output is there for whoever asks for it"
# The names that TensorRT-LLM's models have in Triton, so that Triton's OpenAI front end drives these, too. The server
# refuses inputs that are not declared: what the front end always sends is here even where there is nothing to choose.
# Name, type, size, and what a reader is told: meaning; default.
GENERATE_INPUTS = (
    ("text_input", "TYPE_STRING", 1, "the prompt, as it is; either this or `messages`"),
    ("messages", "TYPE_STRING", 1, CHAT),
    ("max_tokens", "TYPE_INT32", 1, "how many tokens at most; 64"),
    ("min_tokens", "TYPE_INT32", 1, "no end of text before so many; 0"),
    ("stop_words", "TYPE_STRING", -1, "the text ends before the first of these"),
    ("stream", "TYPE_BOOL", 1, "true: a response for each piece of text; false: one response"),
    ("temperature", "TYPE_FP32", 1, "0 is greedy; 0"),
    ("top_k", "TYPE_INT32", 1, "0 keeps all; 0"),
    ("top_p", "TYPE_FP32", 1, "1 keeps all; 1"),
    ("repetition_penalty", "TYPE_FP32", 1, "1 changes nothing; 1"),
    ("frequency_penalty", "TYPE_FP32", 1, "0 changes nothing; 0"),
    ("presence_penalty", "TYPE_FP32", 1, "0 changes nothing; 0"),
    ("seed", "TYPE_UINT64", 1, "of the sampling: the same seed gives the same text, alone or in a batch; 0"),
    ("exclude_input_in_output", "TYPE_BOOL", 1, "false: the text begins with the prompt; true"),
    ("return_num_input_tokens", "TYPE_BOOL", 1, TAKEN),
    ("return_num_output_tokens", "TYPE_BOOL", 1, "likewise"),
)
GENERATE_OUTPUTS = (
    ("text_output", "TYPE_STRING", 1),
    ("output_ids", "TYPE_INT32", -1),
    ("finish_reason", "TYPE_STRING", 1),
    ("num_input_tokens", "TYPE_UINT32", 1),
    ("num_output_tokens", "TYPE_UINT32", 1),
)
KIT = "a build kit is not a model yet: build it on its GPU machine"


class Word(str):
    """An identifier of the text format, which has no quotes."""


@dataclass(frozen=True)
class Served:
    """What stands for one artifact in a repository; a reason where a model does not."""

    name: str
    artifact: Artifact
    no_bare: str
    no_text: str

    @property
    def of_text(self) -> str:
        """What the model is called that takes text: it generates, embeds or classifies."""
        return f"{self.name}_{(self.artifact.encoder or {}).get('task', 'generate')}"

    @property
    def models(self) -> tuple[str, ...]:
        bare = () if self.no_bare else (self.name,)
        return bare if self.no_text else (*bare, self.of_text)

    @property
    def reasons(self) -> str:
        """Why models are missing."""
        return " and ".join(dict.fromkeys(filter(None, (self.no_bare, self.no_text))))


def why_no_bare(artifact: Artifact) -> str:
    """Why Triton's own backends cannot serve it, or nothing: docs/facts.md, "Triton and shared caches"."""
    builder = (artifact.engine or {}).get("builder")
    reasons = {
        KIT: artifact.kind == "kit",
        "Triton's ONNX Runtime would not find the library of its operators: compile without --plugin": (
            artifact.kind == "onnx" and bool(artifact.plugins)
        ),
        "Triton has no backend for TensorRT-RTX engines: compile with --builder tensorrt": builder == "tensorrt_rtx",
        "Triton's TensorRT backend does not alias past and present: compile with --kv-cache concat": (
            artifact.kind == "engine" and artifact.limits.get("cache") == "shared"
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def why_no_text(artifact: Artifact) -> str:
    """Why there is no model that takes text, or nothing."""
    encoder, tokenizer = artifact.encoder, str(PurePosixPath(artifact.path).with_name("tokenizer.json"))
    reasons = {
        KIT: artifact.kind == "kit",
        "it is no causal language model": artifact.llm is None and encoder is None,
        "it makes neither one vector nor one label of a text": encoder is not None and encoder["task"] not in TEXTS,
        "texts are read on a CPU alone": encoder is not None and artifact.kind == "engine",
        # A plan knows no files yet.
        "the model's folder has no tokenizer.json": bool(artifact.digests) and tokenizer not in artifact.digests,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def runtime(artifact: Artifact) -> str:
    """The Python module that runs the artifact."""
    return str(artifact.engine["builder"]) if artifact.engine else "onnxruntime"


def bare_config(name: str, artifact: Artifact) -> str:
    """config.pbtxt of an engine or an ONNX model as it is."""
    engine = artifact.kind == "engine"
    instance: dict[str, Any] = {"count": 1, "kind": Word("KIND_GPU" if engine else "KIND_CPU")}
    if profiles := (artifact.engine or {}).get("profiles"):
        instance["profile"] = [str(i) for i in range(len(profiles))]  # without it only the first is used
    return text_format(
        {
            "name": name,
            "platform": "tensorrt_plan" if engine else "onnxruntime_onnx",
            "max_batch_size": 0,
            "input": [tensor(spec) for spec in artifact.inputs],
            "output": [tensor(spec) for spec in artifact.outputs],
            "instance_group": [instance],
        }
    )


def parameters(artifact: Artifact) -> dict[str, Any]:
    """What a causal LM is opened with, where nobody says otherwise."""
    assert artifact.llm is not None
    in_place = artifact.kind == "engine" and artifact.limits["cache"] == "shared"
    return {
        # An engine's batch was decided when it was built; what runs row by row takes any.
        "max_batch": artifact.limits["max_batch"] if in_place else MAX_BATCH,
        "max_length": artifact.limits.get("max_length") or min(artifact.llm["max_length"] or MAX_LENGTH, MAX_LENGTH),
        "max_queue": MAX_QUEUE,
        "threads": 0,
        "runtime": runtime(artifact),
        "cache": artifact.limits["cache"],
        **({} if artifact.engine else {"spinning": "false"}),  # a server shares its CPUs with other models
        **{name: artifact.limits[name] for name in ("prompts",) if name in artifact.limits},
    }


def generate_config(name: str, artifact: Artifact) -> str:
    """config.pbtxt of the model that takes text and streams text."""
    device = {"kind": Word("KIND_GPU"), "gpus": [0]} if artifact.kind == "engine" else {"kind": Word("KIND_CPU")}
    inputs = [
        {"name": name, "data_type": Word(kind), "dims": [dim], "optional": Word("true")}
        for name, kind, dim, _ in GENERATE_INPUTS
    ]
    return text_format(
        {
            "name": name,
            "backend": "python",
            "max_batch_size": 1,  # of one request; requests are batched inside
            "model_transaction_policy": {"decoupled": Word("true")},
            "input": inputs,
            "output": [{"name": name, "data_type": Word(kind), "dims": [dim]} for name, kind, dim in GENERATE_OUTPUTS],
            "instance_group": [{"count": 1, **device}],
            "parameters": [{"key": key, "value": {"string_value": str(v)}} for key, v in parameters(artifact).items()],
        }
    )


def encoder_config(name: str, artifact: Artifact) -> str:
    """config.pbtxt of the model that takes texts and gives vectors, or labels with their scores."""
    assert artifact.encoder is not None
    labels = len(artifact.encoder["labels"])
    of_labels = (("label", "TYPE_STRING", labels), ("score", "TYPE_FP32", labels))
    outputs = of_labels if labels else (("embedding", "TYPE_FP32", int(artifact.encoder["width"])),)
    optional = (("text_pair", labels > 0), ("prompt_name", bool(artifact.encoder["prompts"])))
    text = {"data_type": Word("TYPE_STRING"), "dims": [1]}
    more = [{"name": name, **text, "optional": Word("true")} for name, taken in optional if taken]
    return text_format(
        {
            "name": name,
            "backend": "python",
            "max_batch_size": MAX_TEXTS,
            "input": [{"name": "text", **text}, *more],
            "output": [{"name": name, "data_type": Word(kind), "dims": [dim]} for name, kind, dim in outputs],
            "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],
            "dynamic_batching": {},
            "parameters": [
                {"key": key, "value": {"string_value": value}}
                for key, value in (("threads", "0"), ("spinning", "false"))
            ],
        }
    )


def tensor(spec: TensorSpec) -> dict[str, Any]:
    if spec.dtype not in DTYPES:
        raise UserError("Triton has no such tensor type", where=spec.name, expected=", ".join(DTYPES), found=spec.dtype)
    dims = [d if isinstance(d, int) else -1 for d in spec.shape]
    return {"name": spec.name, "data_type": Word(DTYPES[spec.dtype]), "dims": dims}


def text_format(message: Mapping[str, Any]) -> str:
    """A protobuf message in its text format, one field a line."""
    return "".join(f"{key}: {value_text(value)}\n" for key, value in message.items())


def value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k}: {value_text(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        parts = [value_text(v) for v in value]
        return "[\n  " + ",\n  ".join(parts) + "\n]" if parts and "{" in parts[0] else "[" + ", ".join(parts) + "]"
    if isinstance(value, str) and not isinstance(value, Word):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
