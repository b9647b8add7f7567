"""A sentence-transformers folder: what modules.json puts behind the language model, and how texts are prepared for it.

Each kind of module says what of its config matters; a kind, a key or a value that is not known is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from instantrt.compiler.artifact.manifest import path as is_path
from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.frontend.sentence import SentenceModule, SentencePipeline
from instantrt.compiler.json_file import read_json
from instantrt.passes.core.errors import FOUND, UserError
from instantrt.passes.core.lazy import FileTensor

COPY = "copy the model again, with the folders that modules.json names"
LONGEST_PATH = 200  # characters: the system takes 255 of a name
MODULES = "modules.json"
SETTINGS = "sentence_*_config.json"  # among the files that every folder has
PROMPTS = "config_sentence_transformers.json"
MOST_MODULES = 100  # each is exported; pipelines have three or four
WITHOUT = "remove modules.json to compile the language model alone, whose output is last_hidden_state"
# In the order in which several of them are joined: the keys of older files, whose values are true or false.
POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")  # classes of torch.nn
EMBEDDING = (None, "sentence_embedding")  # the one tensor that goes from module to module
# Kind of module -> key of its config -> the values that are known; None: any number, read by the kind itself.
KEYS: Mapping[str, Mapping[str, tuple[Any, ...] | None]] = {
    "Pooling": {
        "word_embedding_dimension": None,
        "embedding_dimension": None,
        "pooling_mode": None,
        "include_prompt": (True,),
        **dict.fromkeys(POOLINGS, (True, False)),
    },
    "Dense": {
        "in_features": None,
        "out_features": None,
        "bias": (True, False),
        "activation_function": (*(f"torch.nn.modules.{m}.{n}" for m in ("activation", "linear") for n in ACTIVATIONS),),
        "module_input_name": EMBEDDING,
        "module_output_name": EMBEDDING,
        "use_residual": (False,),
    },
    "LayerNorm": {"dimension": None},
    "Normalize": {"module_input_name": EMBEDDING, "module_output_name": EMBEDDING},
    "Dropout": {"dropout": None},
}
NO_CONFIG = ("Normalize", "Dropout")  # whose folder may be empty, or not there
TRANSFORMER = {
    "max_seq_length": None,
    "do_lower_case": (True, False),
    "transformer_task": ("feature-extraction",),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},),  # and no chat
    "module_output_name": ("token_embeddings",),
    "unpad_inputs": None,  # how it is run
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
}


def read_pipeline(folder: Path, truncate_dim: int | None = None) -> SentencePipeline | None:
    """What modules.json in `folder` says; None where there is none, or where it is a file of something else."""
    listed = list_of_modules(folder / MODULES)
    if listed is None:
        return None
    where = str(folder / MODULES)
    if len(listed) > MOST_MODULES:
        most, found = f"at most {MOST_MODULES} modules", str(len(listed))
        raise UserError("a pipeline of more modules than any has", where=where, expected=most, found=found, fix=WITHOUT)
    (first, at), *others = [(kind_of(each, where), path_of(each, folder)) for each in listed] or [("nothing", folder)]
    if first != "Transformer":
        raise refused("begins with", first, where)
    if not at.is_dir():
        raise UserError("the folder of the language model is not there", where=where, found=at.name, fix=COPY)
    if any(kind == "Transformer" for kind, _ in others):
        raise refused("has several of", first, where)
    modules = [read_module(kind, at, folder, where) for kind, at in others]
    kept = tuple(module for module in modules if module.kind != "Dropout")  # which does nothing outside of a training
    if [module.kind for module in kept].count("Pooling") != 1 or kept[0].kind != "Pooling":
        raise UserError(
            "a pipeline that does not begin with a pooling of tokens",
            where=where,
            expected="Transformer, Pooling, ...",
            found=", ".join(["Transformer", *(module.kind for module in kept)]),
            fix=WITHOUT,
        )
    said = read_json(folder / PROMPTS) if (folder / PROMPTS).is_file() else {}
    pipeline = SentencePipeline(at, kept, **texts_of(folder, at, said))
    if truncate_dim is None and said.get("truncate_dim") is not None:
        truncate_dim = size_of(said, "truncate_dim", folder / PROMPTS)
    return pipeline if truncate_dim is None else truncated(pipeline, truncate_dim)


def list_of_modules(path: Path) -> list[Mapping[str, Any]] | None:
    if not path.is_file():
        return None
    listed = read_json(path, (dict, list))
    if not isinstance(listed, list) or not all(isinstance(each, dict) and "type" in each for each in listed):
        return None
    return listed


def kind_of(module: Mapping[str, Any], where: str) -> str:
    kind = str(module["type"])
    own, _, name = kind.rpartition(".")
    if own.partition(".")[0] != "sentence_transformers" or (name not in KEYS and name != "Transformer"):
        raise refused("has", name if own.startswith("sentence_transformers") else kind, where)
    return name


def refused(how: str, kind: str, where: str) -> UserError:
    return UserError(
        f"a sentence-transformers pipeline that {how} {kind}",
        where=where,
        expected=", ".join(["Transformer", *KEYS]),
        found=kind,
        fix=WITHOUT,
    )


def path_of(module: Mapping[str, Any], folder: Path) -> Path:
    """The folder of a module, which lies in the model's own or is it."""
    path = module.get("path", "")
    if not is_path(path) or len(path) > LONGEST_PATH:
        found = shorten(repr(path), FOUND)
        raise UserError("a module without a path to its folder", where=str(folder / MODULES), found=found)
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise UserError("a module outside of the folder", where=str(folder / MODULES), found=repr(path))
    return folder / str(path)


def read_module(kind: str, at: Path, folder: Path, where: str) -> SentenceModule:
    name = at.relative_to(folder).as_posix()
    path = at / "config.json"
    config = read_json(path) if path.is_file() or kind not in NO_CONFIG else {}
    check_keys(config, KEYS[kind], f"{name}/config.json", where)
    if kind == "Pooling":
        return SentenceModule(kind, name, modes=poolings(config, path))
    if kind == "Dense":
        sizes = size_of(config, "in_features", path), size_of(config, "out_features", path)
        activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
        return SentenceModule(kind, name, sizes=sizes, bias=config.get("bias", True), activation=activation)
    if kind == "LayerNorm":
        return SentenceModule(kind, name, sizes=(size_of(config, "dimension", path),) * 2)
    return SentenceModule(kind, name)


def check_keys(config: Mapping[str, Any], keys: Mapping[str, tuple[Any, ...] | None], name: str, where: str) -> None:
    """Refuses a key that is not known, and a value that would change results and is not."""
    for key, value in config.items():
        values = keys.get(key, ())
        if values is not None and not any(type(value) is type(each) and value == each for each in values):
            raise UserError(
                f"{key} of a sentence-transformers module is not known"
                if key not in keys
                else f"{key} of a sentence-transformers module has a value that is not supported",
                where=f"{where}, {name}",
                expected=", ".join(keys) if key not in keys else ", ".join(map(repr, values)),
                found=f"{key!r}: {value!r}",
                fix=WITHOUT,
            )


def poolings(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The ways of pooling, in the order in which they are joined; of none, the mean."""
    said = config.get("pooling_mode")
    if said is None:
        return tuple(mode for key, mode in POOLINGS.items() if config.get(key)) or ("mean",)
    modes = tuple(said) if isinstance(said, list) else (said,)
    if not modes or not {*map(str, modes)} <= {*POOLINGS.values()}:
        raise UserError(
            "a way of pooling that is not known",
            where=str(path),
            expected=", ".join(POOLINGS.values()),
            found=repr(said),
        )
    return modes


def size_of(said: Mapping[str, Any], key: str, where: Path) -> int:
    size = said.get(key)
    if type(size) is not int or size < 1:
        raise UserError(f"{key} is no size", where=str(where), found=repr(size))
    return size


def texts_of(folder: Path, at: Path, prompts: Mapping[str, Any]) -> dict[str, Any]:
    """How texts are prepared: the settings beside the language model, and the `prompts` of the whole."""
    settings = next((path for each in (at, folder) for path in sorted(each.glob(SETTINGS))), None)
    said = read_json(settings) if settings is not None else {}
    check_keys(said, TRANSFORMER, settings.name if settings is not None else "", str(folder))
    longest = said.get("max_seq_length")
    texts, default = prompts.get("prompts") or {}, prompts.get("default_prompt_name") or ""
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise UserError("prompts are no texts by name", where=str(folder / PROMPTS), found=repr(texts))
    if not isinstance(default, str) or (default and default not in texts):
        raise UserError(
            "the default prompt is none of the prompts",
            where=str(folder / PROMPTS),
            expected=", ".join(texts),
            found=repr(default),
        )
    if longest is not None and (type(longest) is not int or longest < 1):
        raise UserError("max_seq_length is no length", where=str(settings), found=repr(longest))
    lowercase = bool(said.get("do_lower_case", False))
    return {"max_length": longest or 0, "lowercase": lowercase, "prompts": texts, "default_prompt": default}


def truncated(pipeline: SentencePipeline, width: int) -> SentencePipeline:
    """The first `width` numbers of an embedding, as models that are trained so allow; unit vectors stay such."""
    first = SentenceModule("Truncate", sizes=(0, width))
    at = len(pipeline.modules) - (pipeline.modules[-1].kind == "Normalize")
    return replace(pipeline, modules=(*pipeline.modules[:at], first, *pipeline.modules[at:]))


def files_of(pipeline: SentencePipeline, root: Path) -> list[Path]:
    """What decides of the modules and of how texts are prepared; weights are files of their tensors."""
    configs = (root / module.path / "config.json" for module in pipeline.modules if module.path)
    return [path for path in (root / MODULES, root / PROMPTS, *configs) if path.is_file()]


def tensors_of(pipeline: SentencePipeline, root: Path) -> dict[str, FileTensor]:
    """The weights of the modules, named after their folders: `2_Dense.linear.weight`."""
    return {
        f"{module.name}.{name}": replace(tensor, name=f"{module.name}.{name}")
        for module in pipeline.modules
        if module.kind in ("Dense", "LayerNorm")
        for name, tensor in read_checkpoint(root / module.path).items()
    }
