"""Generation with an artifact: the same tokens by every client, and sampling that keeps its promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from instantrt.compiler.llm import LLM, Generation
from instantrt.compiler.serving.runtime.sampling import Sampler, Sampling
from instantrt.compiler.serving.runtime.text import Text
from instantrt.tools.cli.generate import float_text, took
from tests.conftest import ROOT, TINY, compiled

PROMPT = "The server receives a request"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    compiled(folder / "shared", quant="none")
    compiled(folder / "concat", quant="none", portable=True)
    compiled(folder / "a16w8", quant="a16w8")
    return folder


def generated(folder: Path, count: int) -> str:
    with LLM(folder) as llm:
        return llm.generate(PROMPT, max_tokens=count).text


def test_every_client_generates_what_transformers_does(artifacts: Path) -> None:
    want = float_text(TINY, Text(TINY).encode(PROMPT), 24)
    for name in ("shared", "concat"):
        assert generated(artifacts / name, 24) == want
    client = [sys.executable, ROOT / "examples/plain_client.py", artifacts / "shared/x86", PROMPT]
    plain = subprocess.run(client, capture_output=True, text=True, check=True).stdout
    assert plain.startswith(want)


def command(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    called = [sys.executable, "-m", "instantrt", "generate", folder, "--prompt", PROMPT, *options]
    return subprocess.run(called, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_counts_tokens(artifacts: Path) -> None:
    """One that completes no character counts as well."""
    done = command(artifacts / "shared", "--max-tokens", "9", "--threads", "1", "--no-spinning")
    assert done.returncode == 0
    assert "[9 tokens in " in done.stderr


def test_rates_count_the_tokens_of_the_first_piece_once() -> None:
    """Text comes in whole characters: the first piece of it may be several tokens, none of which came after it."""
    generation = Generation(prompt_tokens=10)
    generation.tokens, generation.times = [1, 2, 3, 4], [(12.0, 3), (12.5, 1)]
    assert took(generation, 10.0) == "4 tokens in 2.50 s, 5 tokens/s of the prompt, 2 tokens/s after it"
    generation.tokens, generation.times = [1], [(12.0, 1)]
    assert took(generation, 10.0) == "1 token in 2.00 s, 5 tokens/s of the prompt"
    generation = Generation(prompt_tokens=10)
    for text, tokens, finish in (("ab", [1, 2], ""), ("c", [3], "length")):
        generation.piece(text, tokens, finish)
    assert [count for _, count in generation.times] == [2, 1]
    assert len(generation.tokens) == 3


@pytest.mark.parametrize("count", ["0", "-5"])
def test_no_tokens_are_no_number_of_tokens(artifacts: Path, count: str) -> None:
    done = command(artifacts / "shared", "--max-tokens", count)
    assert done.returncode == 2
    assert "--max-tokens" in done.stderr
    assert done.stderr.endswith("FAILED\n")
    assert done.stdout == ""


def test_quantized_text_stays_the_same_for_a_while(artifacts: Path) -> None:
    assert generated(artifacts / "a16w8", 8) == generated(artifacts / "shared", 8)


def test_sampling_is_repeatable_and_bounded() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

    def drawn(sampling: Sampling) -> list[int]:
        sampler = Sampler(sampling, [])
        return [sampler.choose(logits) for _ in range(400)]

    assert set(drawn(Sampling())) == {0}
    warm = drawn(Sampling(temperature=1.0, seed=7))
    assert warm == drawn(Sampling(temperature=1.0, seed=7))
    assert np.bincount(warm, minlength=4) / 400 == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.08)
    assert set(drawn(Sampling(temperature=1.0, top_k=2))) == {0, 1}
    assert set(drawn(Sampling(temperature=1.0, top_p=0.6))) == {0, 1}
    assert set(drawn(Sampling(temperature=1.0, top_p=0.4))) == {0}


def test_the_chat_template_is_the_models(artifacts: Path) -> None:
    text = Text(artifacts / "shared/x86")
    rendered = text.render('[{"role": "user", "content": "Hello"}]')
    assert rendered == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert text.end_tokens == {0}
