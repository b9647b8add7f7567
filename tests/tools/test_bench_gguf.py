"""What `instantrt bench gguf` reads and feeds, its page is its JSON's, and every preset is what a compilation takes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from instantrt.compiler.frontend.gguf.file import open_gguf
from instantrt.compiler.frontend.gguf.folder import made_folder
from instantrt.compiler.quant.gguf import KINDS
from instantrt.compiler.request import Request
from instantrt.tools.bench.cpu import WINDOW, write_inputs
from instantrt.tools.bench.cpu_contests import MADE, MODEL, OF_GGUF
from instantrt.tools.bench.gguf import OUT, markdown, rate
from tests.commands import invoke
from tests.conftest import ROOT, TINY
from tests.gguf_files import llama

TEXT = ROOT / "examples" / "text" / "bench.txt"


def test_every_preset_is_one_that_a_compilation_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Request] = []

    def taken(request: Request, **_: Any) -> list[Any]:
        requests.append(replace(request, out=tmp_path))
        return []

    monkeypatch.setattr("instantrt.compiler.compile.compile_model", taken)
    file = tmp_path / "tiny.gguf"
    llama(file)
    given = {MODEL: str(file), MADE: str(tmp_path)}
    forms = [form for form in OF_GGUF.forms.values() if form.python == "ours"]
    for form in forms:
        done = invoke(*(given.get(word, word) for word in form.words[2:]))
        assert done.exit_code == 0, done.output
    assert len({str(request) for request in requests}) == len(forms)


def test_the_page_is_of_the_numbers() -> None:
    """A ratio to llama.cpp is of a round, not of medians; bytes are beside the file's."""
    speeds = {"auto": [10.0, 40.0, 30.0], "llama.cpp": [10.0, 20.0, 10.0]}
    sides = {
        name: {
            "bits": 4,
            "bytes": 3 << 20,
            "loss": 2.5,
            "kl": 0.25,
            "apart": 2e-3,
            "rounds": dict.fromkeys(OF_GGUF.rounds, rounds),
        }
        for name, rounds in speeds.items()
    }
    about = {
        "compile_s": 1.5,
        "weights_per_s": [2e8, 3e8, 4e8],
        "machine": "m",
        "text": "t",
        "versions": [],
        "not_given": ["llama"],
        "idle_cpu_s": 0,
    }
    page = markdown({"tiny.gguf": {"sides": sides, "bytes": 2 << 20, **about}})
    (row,) = (line for line in page.splitlines() if line.startswith("| auto"))
    assert "| 2.5000 | 0.25000 | 2.0e-03 | 3.0 (1.50x) | 30; 2 x (1.5 to 2.5)" in row
    assert "reading 300 M weights/s (200 to 400)" in page
    assert "`--llama` was not given" in page


def test_every_quantized_weight_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head that is tied to the table too; floats are not counted."""
    llama(tmp_path / "tiny.gguf")
    made = made_folder(tmp_path / "tiny.gguf")
    times = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    quantized = [each for each in open_gguf(tmp_path / "tiny.gguf").tensors.values() if each.kind in KINDS]
    assert rate(made.weights, 2) == [sum(math.prod(each.shape) for each in quantized)] * 3


@pytest.mark.parametrize("begin", [[], [7]])
def test_each_window_begins_as_a_text_does(tmp_path: Path, begin: list[int]) -> None:
    """And all of the text is there."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    words = tokenizer.encode(TEXT.read_text("utf-8"), add_special_tokens=False).ids
    if begin:
        name = tokenizer.id_to_token(*begin)
        tokenizer.post_processor = TemplateProcessing(single=f"{name} $A", special_tokens=[(name, *begin)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_inputs("gguf", tmp_path, [TEXT], tmp_path / "inputs.npz")
    ids = np.load(tmp_path / "inputs.npz")["ids"]
    windows = [ids[at : at + WINDOW].tolist() for at in range(0, len(ids), WINDOW)]
    assert all(window[: len(begin)] == begin for window in windows)
    assert [token for window in windows for token in window[len(begin) :]] == words


def test_the_page_that_lies_here_is_its_jsons() -> None:
    assert OUT.with_suffix(".md").read_text("utf-8") == markdown(json.loads(OUT.read_text("utf-8"))["results"])
