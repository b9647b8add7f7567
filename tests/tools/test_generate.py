"""Generation with an artifact: the same tokens by every client, and sampling that keeps its promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from compiler.frontend.model import FloatModel
from passes.errors import UserError
from tests.compiler.test_build import compiled
from tests.conftest import ROOT, TINY
from tools.generate import Model, Sampling, chat_prompt, end_tokens, float_text, stream

PROMPT = "The server receives a request"


@pytest.fixture(scope="module")
def artifacts(tiny_float: FloatModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    compiled(tiny_float, folder / "shared", quant="none")
    compiled(tiny_float, folder / "concat", quant="none", portable=True)
    compiled(tiny_float, folder / "a16w8", quant="a16w8")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


def test_every_client_generates_what_transformers_does(artifacts: Path, tokenizer: Tokenizer) -> None:
    want = float_text(TINY, PROMPT, 24)
    for name in ("shared", "concat"):
        assert "".join(stream(Model(artifacts / name), tokenizer, PROMPT, 24, Sampling())) == want
    client = [sys.executable, ROOT / "examples/plain_client.py", artifacts / "shared/x86", PROMPT]
    plain = subprocess.run(client, capture_output=True, text=True, check=True).stdout
    assert plain.startswith(want)


def test_quantized_text_stays_the_same_for_a_while(artifacts: Path, tokenizer: Tokenizer) -> None:
    texts = ["".join(stream(Model(artifacts / n), tokenizer, PROMPT, 8, Sampling())) for n in ("shared", "a16w8")]
    assert texts[0] == texts[1]


def test_sampling_is_repeatable_and_bounded() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

    def drawn(sampling: Sampling) -> list[int]:
        choose = sampling.chooser()
        return [choose(logits) for _ in range(400)]

    assert set(drawn(Sampling())) == {0}
    warm = drawn(Sampling(temperature=1.0, seed=7))
    assert warm == drawn(Sampling(temperature=1.0, seed=7))
    assert np.bincount(warm, minlength=4) / 400 == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.08)
    assert set(drawn(Sampling(temperature=1.0, top_k=2))) == {0, 1}
    assert set(drawn(Sampling(temperature=1.0, top_p=0.6))) == {0, 1}
    assert set(drawn(Sampling(temperature=1.0, top_p=0.4))) == {0}


def test_limits_are_refused(artifacts: Path) -> None:
    model = Model(artifacts / "shared")
    with pytest.raises(UserError, match="empty"):
        next(model.tokens([], 4, Sampling().chooser()))
    with pytest.raises(UserError, match="at most 1023 tokens"):
        next(model.tokens([5] * 1024, 4, Sampling().chooser()))
    assert len(list(model.tokens([5] * 1000, 100, Sampling().chooser()))) == 25
    assert len(list(model.tokens([5, 6], 3, Sampling().chooser()))) == 3


def test_the_chat_template_is_the_models(artifacts: Path) -> None:
    text = chat_prompt(artifacts / "shared/x86", "Hello")
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert end_tokens(artifacts / "shared/x86") == {0}


def test_a_chat_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(Exception, match="unsafe"):
        chat_prompt(tmp_path, "Hello")
