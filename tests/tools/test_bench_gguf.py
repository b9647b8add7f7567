"""The page of `instantrt bench gguf` is its JSON's, and every preset is what a compilation takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from instantrt.compiler.request import Request
from instantrt.tools.bench.cpu_contests import MADE, MODEL, OF_GGUF
from instantrt.tools.bench.gguf import markdown
from tests.commands import invoke
from tests.gguf_files import llama


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
        name: {"bits": 4, "bytes": 3 << 20, "loss": 2.5, "kl": 0.25, "rounds": dict.fromkeys(OF_GGUF.rounds, rounds)}
        for name, rounds in speeds.items()
    }
    about = {"compile_s": 1.5, "machine": "m", "text": "t", "versions": [], "not_given": ["llama"], "idle_cpu_s": 0}
    page = markdown({"tiny.gguf": {"sides": sides, "bytes": 2 << 20, **about}})
    (row,) = (line for line in page.splitlines() if line.startswith("| auto"))
    assert "| 2.5000 | 0.25000 | 3.0 (1.50x) | 30; 2 x (1.5 to 2.5)" in row
    assert "`--llama` was not given" in page
