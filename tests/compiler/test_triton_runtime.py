"""The generate model's parts without a server: scheduler, sampling, text."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from instantrt.compiler.serving.runtime.sampling import SHORTLIST, Sampler, Sampling, largest
from instantrt.compiler.serving.runtime.scheduler import CHUNK, Failure, Job, RefusedError, Scheduler, SequenceLimits
from instantrt.compiler.serving.runtime.text import Detokenizer, Text
from tests.compiler.listener import SECONDS, Listener, wait
from tests.conftest import TINY

Array = npt.NDArray[Any]
VOCAB = 4096


class FakeEngine:
    """Remembers the tokens of each row; the next token is a function of all of them, so a mixed-up row shows."""

    def __init__(self, rows: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self.batches: list[int] = []
        self.chunks: list[int] = []
        self.steps: list[str] = []
        self.go = threading.Event()
        self.go.set()
        self.broken = False

    def prefill(self, row: int, ids: Array, done: int) -> Array:
        self.go.wait(SECONDS)
        self.chunks.append(len(ids))
        self.steps.append("prefill")
        self.rows[row] = [*self.rows[row][:done], *ids.tolist()]
        assert len(self.rows[row]) == done + len(ids)
        return peak(self.rows[row])

    def decode(self, ids: Array, done: Array) -> Array:
        self.go.wait(SECONDS)
        if self.broken:
            self.broken = False
            raise RuntimeError("a worn out engine")
        self.batches.append(len(ids))
        self.steps.append("decode")
        for row, (token, length) in enumerate(zip(ids, done, strict=True)):
            assert len(self.rows[row]) == length
            self.rows[row].append(int(token))
        return np.stack([peak(self.rows[row]) for row in range(len(ids))])

    def move(self, source: int, target: int, length: int) -> None:
        self.steps.append("move")
        self.rows[target] = self.rows[source][:length]
        self.rows[source] = []


def following(tokens: list[int]) -> int:
    return 1 + sum((i + 1) * t for i, t in enumerate(tokens)) % (VOCAB - 1)


def peak(tokens: list[int]) -> Array:
    logits = np.zeros(VOCAB, np.float32)
    logits[following(tokens)] = 1
    return logits


def continuation(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(TINY)


class Running:
    def __init__(self, text: Text, limits: SequenceLimits) -> None:
        self.engine = FakeEngine(limits.rows + 1)
        self.scheduler = Scheduler(self.engine, text, limits)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.go.set()
        self.scheduler.close()

    def submit(self, prompt: tuple[int, ...], count: int, **more: Any) -> Listener:
        listener = Listener()
        self.scheduler.submit(Job(prompt, count, **more), listener)
        return listener


def test_every_sequence_gets_its_own_tokens(text: Text) -> None:
    """Sequences of many lengths, some longer than a chunk, through three rows."""
    chooser = random.Random(0)
    jobs = [
        (
            tuple(chooser.randrange(1, VOCAB) for _ in range(chooser.choice((1, 5, 40, CHUNK + 30)))),
            chooser.randrange(1, 60),
        )
        for _ in range(40)
    ]
    with Running(text, SequenceLimits(rows=3, length=1024)) as running:
        listeners = [running.submit(prompt, count) for prompt, count in jobs]
        wait(*listeners)
    assert [listener.tokens for listener in listeners] == [continuation(*job) for job in jobs]
    assert {listener.finish for listener in listeners} == {"length"}
    assert max(running.engine.batches) == 3


def test_a_long_prompt_does_not_hold_up_the_others(text: Text) -> None:
    """Decode steps go on between the chunks of its prefill, and the row next to it may become free meanwhile."""
    with Running(text, SequenceLimits(rows=2, length=8192)) as running:
        running.engine.go.clear()
        short, long = running.submit((1, 2), 3), running.submit((7,) * (CHUNK * 5), 3)
        running.engine.go.set()
        wait(short, long)
    assert max(running.engine.chunks) <= CHUNK
    assert running.engine.steps.index("decode") < running.engine.steps.index("move") < len(running.engine.steps) - 5
    assert short.tokens == continuation((1, 2), 3)
    assert long.tokens == continuation((7,) * (CHUNK * 5), 3)


def test_a_prompt_whose_tokens_see_one_another_is_run_whole(text: Text) -> None:
    """Also where another prompt left only a part of the step's budget."""
    prompts = [(7,) * 100, (8,) * (CHUNK * 3)]
    with Running(text, SequenceLimits(rows=2, length=8192, whole=True)) as running:
        running.engine.go.clear()
        listeners = [running.submit(prompt, 3) for prompt in prompts]
        running.engine.go.set()
        wait(*listeners)
    assert running.engine.chunks == [100, CHUNK * 3]


def test_cancelled_ones_leave(text: Text) -> None:
    """In a row, while joining and while waiting; the rest goes on undisturbed."""
    with Running(text, SequenceLimits(rows=2, length=100_000)) as running:
        endless, stays = running.submit((1,), 90_000), running.submit((2, 3), 300)
        waiting = running.submit((4,), 10)
        last = running.submit((5,), 10)
        while len(endless.tokens) < 5:
            time.sleep(0.001)
        running.engine.go.clear()
        waiting.gone = endless.gone = True
        running.engine.go.set()
        wait(endless, waiting, stays, last)
    assert endless.failure is not None
    assert endless.failure[0] is Failure.CANCELLED
    assert waiting.failure == (Failure.CANCELLED, "cancelled")
    assert not waiting.tokens
    assert stays.tokens == continuation((2, 3), 300)
    assert last.tokens == continuation((5,), 10)


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ((), 1, "the prompt is empty"),
        ((1,), 0, "max_tokens: expected 1 or more, found 0"),
        ((1,) * 60, 5, "the request is too long: 60 prompt tokens + max_tokens 5 exceed 64"),
    ],
)
def test_limits_are_refused(text: Text, prompt: tuple[int, ...], count: int, message: str) -> None:
    with Running(text, SequenceLimits(length=64)) as running, pytest.raises(RefusedError) as caught:
        running.submit(prompt, count)
    assert (str(caught.value), caught.value.failure) == (message, Failure.INVALID)


def test_a_full_queue_is_refused(text: Text) -> None:
    with Running(text, SequenceLimits(rows=1, length=64, queue=2)) as running:
        running.engine.go.clear()
        first = running.submit((1,), 5)
        while running.scheduler.waiting:  # until it is in its row
            time.sleep(0.001)
        others = [running.submit((i,), 5) for i in (2, 3)]
        with pytest.raises(RefusedError, match="the queue is full: 2 requests wait already") as caught:
            running.submit((4,), 5)
        running.engine.go.set()
        wait(first, *others)
    assert caught.value.failure is Failure.BUSY


def test_a_failing_step_ends_its_requests_only(text: Text) -> None:
    with Running(text, SequenceLimits(rows=2, length=64)) as running:
        running.engine.broken = True
        victim = running.submit((1,), 5)
        wait(victim)
        after = running.submit((2,), 5)
        wait(after)
    assert victim.failure == (Failure.INTERNAL, "internal error: RuntimeError: a worn out engine")
    assert after.tokens == continuation((2,), 5)


def test_a_sequence_that_fails_is_alone(text: Text) -> None:
    with Running(text, SequenceLimits(rows=3, length=64)) as running:
        running.engine.go.clear()
        victim, others = running.submit((1,), 5), [running.submit((i,), 5) for i in (2, 3)]
        victim.piece = Mock(side_effect=[None, ValueError("no such text")])  # type: ignore[method-assign]
        running.engine.go.set()
        wait(victim, *others)
    assert victim.failure == (Failure.INTERNAL, "internal error: ValueError: no such text")
    assert [other.tokens for other in others] == [continuation((i,), 5) for i in (2, 3)]


def test_unloading_tells_everybody(text: Text) -> None:
    with Running(text, SequenceLimits(rows=1, length=100_000)) as running:
        listeners = [running.submit((i,), 90_000) for i in (1, 2)]
    assert [listener.failure for listener in listeners] == [(Failure.CLOSING, "the model is being unloaded")] * 2
    with pytest.raises(RefusedError, match="unloaded"):
        running.submit((1,), 1)


def softmax(scores: Array) -> Array:
    p = np.exp(scores - scores.max())
    return np.asarray(p / p.sum())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.3, top_p=0.6),
        Sampling(temperature=1.0, top_k=20, top_p=0.5),
        Sampling(temperature=50.0, top_p=0.9),  # flat: the nucleus is wider than the shortlist
        Sampling(temperature=50.0, top_k=20, top_p=0.5),  # half of what top_k keeps, not of all
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    """Counts of many draws against the distribution that a full sort gives."""
    vocab = 2 * SHORTLIST if sampling.temperature == 50 else 64
    logits = np.random.default_rng(0).normal(size=vocab).astype(np.float32) * 2
    order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
    p = softmax(logits[order].astype(np.float64) / sampling.temperature)
    p[np.cumsum(p) - p >= sampling.top_p] = 0
    want = np.zeros(vocab)
    want[order] = p / p.sum()
    sampler = Sampler(sampling, ())
    count = 4000
    got = np.bincount([sampler.draw(logits) for _ in range(count)], minlength=vocab) / count
    assert not got[want == 0].any()
    order = np.argsort(-logits, kind="stable")
    assert np.abs(np.cumsum(got[order]) - np.cumsum(want[order])).max() < 1.95 / np.sqrt(count)  # Kolmogorov-Smirnov


def test_penalties() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.5], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.125), (1,))
    assert sampler.choose(logits) == 0
    np.testing.assert_allclose(sampler.penalized(logits), [2 / 2 - 0.375, -4, 1, 0.5])
    assert [sampler.choose(logits) for _ in range(2)] == [2, 0]
    np.testing.assert_allclose(sampler.penalized(logits), [2 / 2 - 0.625, -4, 0.5 - 0.375, 0.5])


def test_largest_is_a_stable_sort() -> None:
    scores = np.array([1, 3, 3, 2, 3, 0], np.float32)
    assert largest(scores, 6).tolist() == [1, 2, 4, 3, 0, 5]
    assert largest(scores, 4).tolist() == [1, 2, 4, 3]
    random = np.random.default_rng(0)
    for count in (1, 7, 64, 999):
        scores = random.integers(-30, 30, 1000).astype(np.float32)  # many are equal
        assert largest(scores, count).tolist() == np.argsort(-scores, kind="stable")[:count].tolist()


def test_the_coldest_draw_is_greedy() -> None:
    logits = np.array([1, 3, 2.99, -np.inf], np.float32)
    assert Sampler(Sampling(temperature=1e-300), ()).draw(logits) == 1


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty", "frequency_penalty"])
def test_what_is_no_number_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Sampling(**{name: float("inf")})


def test_text_comes_in_whole_characters(text: Text) -> None:
    detokenizer = Detokenizer(text.tokenizer, ())
    pieces = [detokenizer.add(token) for token in text.encode("héé 🙂!")]
    assert "".join(pieces) + detokenizer.finish() == "héé 🙂!"
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces  # a character of several tokens waits for its last


def test_bytes_that_make_no_character_do_not_end_a_request() -> None:
    """Tokenizers of SentencePiece have a token for each byte: a model may choose any of them."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "\u2581the": 257, "\u2581a": 258}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    detokenizer = Detokenizer(tokenizer, ())
    newline, broken, umlaut = ord("\n") + 1, 0x80 + 1, [byte + 1 for byte in "\u00fc".encode()]
    tokens = [257, newline, broken, 258, *umlaut, broken, 257, 258]
    assert "".join(map(detokenizer.add, tokens)) + detokenizer.finish() == "the\n a\u00fc the a"


@pytest.mark.parametrize(
    ("stop_words", "shown", "stopped"),
    [
        ((), "one two three", False),
        (("two",), "one ", True),
        (("two t", "e tw"), "on", True),
        (("threefold",), "one two three", False),  # held back until the end, then released
    ],
)
def test_stop_words(text: Text, stop_words: tuple[str, ...], shown: str, stopped: bool) -> None:
    detokenizer = Detokenizer(text.tokenizer, stop_words)
    said = ""
    for token in text.encode("one two three"):
        said += detokenizer.add(token)
        if detokenizer.stopped:
            break
        assert not any(word in said for word in stop_words)
    assert said + detokenizer.finish() == shown
    assert detokenizer.stopped == stopped


def test_a_template_has_what_hugging_face_gives_it(tmp_path: Path) -> None:
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    template = (
        "{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}{{ strftime_now('%Y') | length }}{{ eos_token }}"
    )
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    config = {"eos_token": "<|endoftext|>", "chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    turns = json.dumps([{"role": "user", "content": "é <"}] * 2)
    assert Text(tmp_path).render(turns) == '{"role": "user", "content": "é <"}4<|endoftext|>'


def test_a_template_sees_what_transformers_shows_it(tmp_path: Path) -> None:
    """Without tools they are none, not undefined; tokens that there are not are undefined, not a text of None."""
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "sep_token": "<|im_end|>"}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<|endoftext|>"}}))
    (tmp_path / "chat_template.jinja").write_text(
        "[{{ bos_token }}{{ sep_token }}{{ pad_token }}{{ 1 if tools is not none or documents is not none }}]"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    turns = json.dumps([{"role": "user", "content": "hi"}])
    assert Text(tmp_path).render(turns) == "[<|im_end|><|endoftext|>]hi"


def test_a_chat_gets_its_special_tokens_from_the_template_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("<|endoftext|>{{ messages[0].content }}")
    text = Text(tmp_path)
    assert text.chat(json.dumps([{"role": "user", "content": "hi"}])) == text.encode("hi")
    assert text.encode("hi").count(0) == 1


def test_a_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}{{ messages[0]['content'] }}"})
    )
    turns = json.dumps([{"role": "user", "content": "hi"}])
    assert Text(tmp_path).render(turns) == "<s>hi"
    for bad in ("{{ ''.__class__.__mro__ }}", "{{ raise_exception('no system') }}", "{{ messages[7].content.x }}"):
        (tmp_path / "chat_template.jinja").write_text(bad)
        with pytest.raises(ValueError, match="the chat template refuses them"):
            Text(tmp_path).chat(turns)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no chat template"):
        Text(tmp_path).chat(turns)
