"""Models as users have them -> FloatModel: a FLOAT graph whose weights are references, and the checkpoint's tensors.

In come a Hugging Face folder, a GGUF file or an .onnx file, hostile until checked; no weight is read here. Torch and
transformers are imported here only, and only where a model is new (`export_cache`). A new source of models is a module
beside `hf` and `onnx_file`, told apart in `load`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from instantrt.compiler.frontend.adapter.folder import Adapter, model_and_adapter, names_of, overlaid
from instantrt.compiler.frontend.gguf import gguf_at
from instantrt.compiler.frontend.gguf.folder import made_folder
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.frontend.own_names import own_names
from instantrt.compiler.frontend.sentence_files import MODULES, list_of_modules
from instantrt.passes.core.errors import UserError, reworded, tried


def load(
    model: Path,
    *,
    trust_remote_code: bool = False,
    max_length: int | None = None,
    truncate_dim: int | None = None,
    cache: Path | None = None,
    requantize: bool = False,
    adapter: Sequence[Path] = (),
    base: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    reads: Callable[[Iterable[Path]], None] = lambda files: None,
) -> FloatModel:
    """Reads a Hugging Face folder, a GGUF file or an ONNX file, told apart by what is there.

    max_length   tokens that no sequence will exceed; None: as many as the model can
    truncate_dim  numbers that are kept of a sentence embedding, the first ones; None: all
    requantize   a GGUF file's weights are floats, dequantized
    adapter      folder of a LoRA that is merged into the weights: one
    base         of the model, where `model` is the folder of an adapter
    cache        folder of earlier exports, `none` for none; None: where INSTANTRT_CACHE or the system says. As
                 `trust_remote_code`, it may be given where nothing has use for it
    say          is told whether the graph is exported, or of an earlier export
    reads        is told where the weights lie, before what takes long
    """
    model, lora = model_and_adapter(model, adapter, base)
    gguf = gguf_at(model)
    if lora is not None and model.suffix == ".onnx":
        raise UserError("an adapter goes over a checkpoint's folder, or a GGUF file", where=str(model))
    check_model_options(model, gguf, truncate_dim=truncate_dim, requantize=requantize)
    if gguf is not None or model.is_dir():
        from instantrt.compiler.frontend import hf

        what, newer = "checkpoint" if gguf is None else "GGUF file", "a newer transformers may know it"
        fix = f"{newer}; --debug says more"
        with ExitStack() as outside, tried(f"reading the {what}", where=str(gguf or model), fix=fix):
            made = made_folder(gguf, requantize=requantize, cache=cache, say=say) if gguf is not None else None
            if made is not None:
                # what `tried` makes of errors, too
                outside.enter_context(reworded(own_names(made.held, gguf or model)))
            opened = hf.open_checkpoint(
                model if made is None else made.path,
                trust_remote_code=trust_remote_code,
                max_length=max_length,
                truncate_dim=truncate_dim,
                cache=cache,
                say=say,
                weights=None if made is None else made.weights,
                adapter=lora,
                reads=reads,
            )
            loaded = hf.load_checkpoint(opened, say)
            if made is not None:
                loaded = replace(loaded, notes=(*made.notes, *loaded.notes), held=made.held)
            return with_tokenizer(with_adapter(loaded, lora, model))
    if model.is_file() and model.suffix == ".onnx":
        from instantrt.compiler.frontend import onnx_file

        with tried("reading the graph", where=str(model), fix="onnx.checker.check_model may say what is wrong with it"):
            reads([model])
            loaded = onnx_file.load_onnx(model)
            reads(loaded.files)
            return loaded
    raise UserError(
        "no model here",
        where=str(model),
        expected="a folder with config.json and *.safetensors, a .gguf file, or an .onnx file",
        found="nothing" if not model.exists() else f"a {model.suffix or 'plain'} file",
        fix=f"name its folder, {model.parent}"
        if model.is_file() and (model.parent / "config.json").is_file()
        else "models are read from disk; download the checkpoint first",
    )


def check_model_options(model: Path, gguf: Path | None, *, truncate_dim: int | None, requantize: bool) -> None:
    """Refuses what is for models of another kind; `gguf` is the file that `model` is, or has its weights in."""
    if gguf is not None and model.is_dir() and list_of_modules(model / MODULES) is not None:
        raise UserError(
            "a GGUF file is a language model, and a pipeline around one is not read",
            where=str(model / MODULES),
            expected=f"the safetensors that {MODULES} is about",
            found=gguf.name,
            fix=f"name the file itself to compile the language model alone: {gguf}",
        )
    if truncate_dim is not None and (gguf is not None or not model.is_dir()):
        raise UserError("truncate_dim is for a sentence-transformers folder", where=str(model), fix="leave it out")
    if requantize and gguf is None:
        raise UserError("requantize is for a GGUF file", where=str(model), fix="leave it out")


def with_tokenizer(loaded: FloatModel) -> FloatModel:
    """A model whose folder has a tokenizer.json that says all of its tokenizer."""
    from instantrt.compiler.frontend.tokenizer_file import made_tokenizer

    folder, held, note = made_tokenizer(loaded.folder)
    notes = (*loaded.notes, *filter(None, [note]))
    return replace(loaded, folder=folder, held=(loaded.held, held), notes=notes)


def with_adapter(loaded: FloatModel, adapter: Adapter | None, base: Path) -> FloatModel:
    """A model whose weights have the adapter, with its files, too: the tokenizer that it brings is the model's."""
    if adapter is None:
        return loaded
    folder, held = overlaid(loaded.folder, adapter)
    own = (adapter.beside.get(path.name, path) for path in loaded.files)
    notes = (*names_of(adapter, base), *loaded.notes)
    return replace(
        loaded,
        folder=folder,
        files=(*own, *adapter.files),
        notes=notes,
        held=(loaded.held, held),
        adapter=adapter.folder,
    )
