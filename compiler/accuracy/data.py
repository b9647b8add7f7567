"""What a comparison runs on: a text, prompts, or, where there is nothing better, generated data (said loudly)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.texts import sentences, text_batches
from instantrt.compiler.frontend.model import EncoderShape, FloatModel, LlmShape
from instantrt.compiler.serving.runtime.texts import TextReader
from instantrt.passes.core.errors import UserError, tried
from instantrt.passes.core.lazy import Array

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WINDOW = 128  # tokens that see one another
BATCH = 4  # windows that run together: 512 tokens, so that logits of a large vocabulary stay below a gigabyte
GENERATED = 4 * WINDOW
STARTS = "#▁Ġ"  # what marks tokens as the beginning of a word, or as no beginning
WORDS = 2, 20  # of a text at random: as many as the first at least, fewer than the second


@dataclass(frozen=True)
class Data:
    """Batches of token ids [B, S]; for a model that is no LLM, of named inputs."""

    kind: str  # text, prompts or generated
    batches: tuple[Array, ...] = ()
    feeds: tuple[Mapping[str, Array], ...] = ()
    decode: Callable[[list[int]], str] = str
    file: str = ""  # where a text is from
    texts: int = 0  # how many an encoder is given

    def __str__(self) -> str:
        tokens = sum(batch.size for batch in self.batches)
        much = f": {tokens:,} tokens" if self.batches else f": {self.texts:,} texts" if self.texts else " inputs"
        return " ".join(filter(None, (self.kind, self.file))) + much

    @property
    def warning(self) -> str:
        if self.kind != "generated":
            return ""
        if self.feeds:
            return "GENERATED DATA: random inputs stand in for real ones. Errors are indicative."
        return (
            "GENERATED DATA: random inputs stand in for text. Errors and KL are indicative, perplexity says nothing; "
            "give --text FILE."
        )

    def each(self, llm: LlmShape | None) -> Iterator[tuple[Mapping[str, Array], Array | None]]:
        """(feeds, token ids or None) of every batch."""
        if llm is None:
            yield from ((feed, None) for feed in self.feeds)
            return
        for ids in self.batches:
            yield llm_feeds(ids, llm), ids


def token_feeds(ids: Array) -> dict[str, Array]:
    """What `ids [B, S]` are with nothing before them: themselves, a mask and positions."""
    positions = np.tile(np.arange(ids.shape[1], dtype=np.int64), (len(ids), 1))
    return {"input_ids": ids, "attention_mask": np.ones_like(positions), "position_ids": positions}


def llm_feeds(ids: Array, llm: LlmShape) -> dict[str, Array]:
    """The inputs of a causal LM for `ids [B, S]` with an empty cache."""
    nothing = np.zeros((len(ids), llm.kv_heads, 0, llm.head_dim), np.float32)
    return token_feeds(ids) | dict.fromkeys(llm.cache_names("past_key_values"), nothing)


def encoder_feeds(ids: Array, encoder: EncoderShape) -> dict[str, Array]:
    """The inputs of an encoder for whole texts `ids [B, S]`."""
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: feeds[name] for name in encoder.input_names()}


def windows(ids: Iterable[int], window: int = WINDOW, batch: int = BATCH) -> tuple[Array, ...]:
    """A text's tokens as batches of whole windows, and what is left as a last, shorter one."""
    flat = np.fromiter(ids, np.int64)
    whole = len(flat) // window
    rows = flat[: whole * window].reshape(whole, window)
    batches = [rows[i : i + batch] for i in range(0, whole, batch)]
    rest = flat[None, whole * window :]
    return (*batches, rest) if rest.shape[1] > 1 else tuple(batches)


def load_data(
    model: FloatModel,
    text: Path | None = None,
    prompts: Iterable[str] = (),
    limit: int | None = None,
    *,
    longest: int | None = None,
) -> Data:
    """The data a user asked for; `limit` caps the tokens of a text, `longest` those that see one another."""
    prompts = tuple(prompts)
    window = min(WINDOW, longest or model.longest or WINDOW)
    if text is None and not prompts:
        return generated(model, window)
    if model.llm is None and model.encoder is None:
        raise UserError("a text says nothing to a model that reads none", fix="leave --text and --prompt out")
    if model.encoder is not None:
        reader = reader_of(model, longest or model.longest)
        texts = list(prompts) or sentences_of(text)
        feeds = tuple(text_batches(texts, reader))
        file = text.name if text is not None else ""
        return Data("prompts" if prompts else "text", feeds=feeds, file=file, texts=len(texts))
    tokenizer = tokenizer_of(model.folder)
    if prompts:
        rows = [np.array([tokenizer.encode(p).ids[:window]], np.int64) for p in prompts]
        short = [p for p, row in zip(prompts, rows, strict=True) if row.shape[1] < 2]
        if short:
            raise UserError("a prompt of less than two tokens predicts nothing", found=repr(short[0]))
        return Data("prompts", tuple(rows), decode=tokenizer.decode)
    assert text is not None
    ids = tokenizer.encode(read_text(text)).ids[:limit]
    if len(ids) < 2:
        raise UserError("the text is empty", where=str(text), expected="at least two tokens")
    return Data("text", windows(ids, window), decode=tokenizer.decode, file=text.name)


def tokenizer_of(folder: Path) -> Tokenizer:
    from instantrt.compiler.serving.runtime.text import open_tokenizer

    with opening(folder):
        return open_tokenizer(folder)


def reader_of(model: FloatModel, longest: int) -> TextReader:
    """What reads texts for an encoder; `longest` tokens of each, 0: all."""
    assert model.encoder is not None
    with opening(model.folder):
        return TextReader(model.folder, {**model.text, "max_length": longest}, model.encoder.input_names())


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """A UserError where the tokenizer in `folder` is not there, or cannot be read."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError("no tokenizer for the text", where=str(folder), expected="tokenizer.json")
    with tried("reading the tokenizer", where=str(folder / "tokenizer.json"), fix="copy it again from the model"):
        yield


def sentences_of(text: Path | None) -> list[str]:
    """The first sentences of a file; UserError where it has none."""
    found = sentences(read_text(text) if text is not None else "")
    if not found:
        raise UserError("the text has no sentences", where=str(text), expected="sentences of three words or more")
    return found


def words(tokenizer: Tokenizer, count: int) -> list[str]:
    """`count` texts of a few words, at random and always the same; none where the tokenizer has few words.

    Vocabularies are about in the order of how often a token occurs: the one of rank r is drawn in proportion to
    1 / (r + 10) (Zipf; Mandelbrot), so that what is in every text is in these, too.
    """
    tokens = {token_id: token.lstrip(STARTS) for token, token_id in tokenizer.get_vocab().items()}
    known = [token_id for token_id, token in sorted(tokens.items()) if len(token) > 1 and token.isalpha()]
    if 2 * len(known) < len(tokens):
        return []
    random, often = np.random.default_rng(0), 1 / (np.arange(len(known)) + 10)
    sizes = random.integers(*WORDS, count)
    drawn = random.choice(known, sizes.sum(), p=often / often.sum())
    parts = np.split(drawn, np.cumsum(sizes)[:-1])
    return list(map(str, tokenizer.decode_batch([part.tolist() for part in parts])))


def read_text(text: Path) -> str:
    try:
        return text.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("the text cannot be read", where=str(text), expected="UTF-8 text", found=str(error)) from None


def generated(model: FloatModel, window: int = WINDOW, tokens: int = GENERATED) -> Data:
    """Random token ids, or random inputs of any other model; the same ones every time."""
    random = np.random.default_rng(0)
    if model.llm is not None:
        ids = random.integers(0, model.llm.vocab, tokens)
        return Data("generated", windows(ids, window))
    if model.encoder is not None:
        ids = random.integers(0, model.encoder.vocab, tokens)
        window = min(window, model.encoder.max_length or window)
        return Data("generated", feeds=tuple(encoder_feeds(each, model.encoder) for each in windows(ids, window)))
    return Data("generated", feeds=({t.name: random_input(t, random) for t in model.graph.inputs},))


def random_input(tensor: gs.Variable, random: np.random.Generator) -> Array:
    """Standard normal floats; integers that are 0 or 1 (masks, segment and token ids are all happy with those)."""
    dynamic = 8
    shape = [d if isinstance(d, int) and d > 0 else dynamic for d in tensor.shape]
    dtype = np.dtype(tensor.dtype)
    drawn = random.standard_normal(shape) if dtype.kind == "f" else random.integers(0, 2, shape)
    return np.asarray(drawn).astype(dtype)
