"""Weight-only codes that a text decides: each column's rounding error goes into the columns that are still to come.

GPTQ (Frantar et al., 2022, "Accurate Post-Training Quantization for Generative Pre-trained Transformers"): of a linear
y = x W^T, with H = x^T x over the text and H^-1 = U^T U (U upper triangular), column k is rounded, and the columns j
behind it lose (w_k - what it became) / U_kk * U_kj, which is least squares. Scales and zero points of a group are
searched when it begins, each column's error weighted by H's diagonal.

Of an encoder, whose linears have biases, what the weights change on average goes into those
(passes/qdq/correct_biases), so that x counts about its mean: H = (x - m)^T (x - m).

Layers come in the graph's order, each on what the quantized layers before it make of the text; a weight is in memory
while it is quantized, its codes then wait in a file without a name until they are written.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.data import llm_feeds, read_text, reader_of, sentences_of, tokenizer_of, windows, words
from instantrt.compiler.accuracy.importance import searched
from instantrt.compiler.accuracy.texts import text_batches
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.say import Say
from instantrt.compiler.serving.runtime.texts import TextReader
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation, Wiring
from instantrt.passes.core.evaluate_node import evaluate_each
from instantrt.passes.core.lazy import FLOAT32, TILE_BYTES, Array, InMemory, Tile, convert
from instantrt.passes.core.linear import bias_behind, linear
from instantrt.passes.core.quant import UINT8, Codes, Quantizer, QuantTensor, dequantize
from instantrt.passes.core.streaming import split_rows
from instantrt.passes.qdq.insert_qdq import Decisions

WINDOW = 256  # tokens that see one another
LEAST, MOST = 512, 1 << 13  # tokens of a text: fewer say nothing of a layer's inputs; more are not read
# Added to H's diagonal: this much of itself, as a few channels may be a thousand times the others, whose columns would
# else be fitted to the noise of the text; and of its mean, for channels that are never on.
DAMPING, FLOOR = 0.1, 1e-4
OF_ENCODERS = 0.3  # their texts have few tokens (docs/facts.md, "Formats of an encoder")
GENERATED, SHORTEST = 2048, 4  # tokens of words at random (docs/facts.md, "Formats of an encoder")
BLOCK = 32  # columns whose errors reach the rest of the weight together
SMALL = 32  # rows that are inverted at once
EVERY = 5.0  # seconds from one line of progress to the next


@dataclass(frozen=True)
class Calibrated(Quantizer):
    """Codes that are there already: equal where the weight and the format are, of one text."""

    codes: Codes = field(compare=False, repr=False)

    def tiles(self) -> Iterator[Tile]:
        step = max(1, TILE_BYTES // self.codes.codes.shape[1])
        for start in range(0, len(self.codes.codes), step):
            yield Tile(start, Codes(*(np.asarray(part[start : start + step]) for part in self.codes)))


def tokens_of(folder: Path, text: Path) -> list[int]:
    """The beginning of `text` by the tokenizer of the model in `folder`; UserError where there is too little of it."""
    ids = tokenizer_of(folder).encode(read_text(text)).ids[:MOST]
    refuse_short(text, len(ids))
    return ids


def refuse_short(text: Path, tokens: int) -> None:
    if tokens < LEAST:
        expected = f"at least {LEAST} tokens, better {MOST:,}"
        raise UserError("the calibration text is too short", where=str(text), expected=expected, found=str(tokens))


def feeds_of_text(model: FloatModel, text: Path) -> list[Mapping[str, Array]]:
    """The beginning of `text` as `model` reads it: a causal LM in windows; an encoder sentence by sentence, with its
    special tokens, and words at random, as few sentences are fitted too well. UserError for a model that reads none,
    and where there is too little of the text."""
    if model.llm is not None:
        window = min(WINDOW, model.llm.max_length or WINDOW)
        return [llm_feeds(each, model.llm) for each in windows(tokens_of(model.folder, text), window, batch=1)]
    if model.encoder is None:
        raise UserError("calibration reads a text; this model reads none", where=str(model.folder))
    reader = reader_of(model, model.longest)
    feeds: list[Mapping[str, Array]] = list(text_batches(sentences_of(text), reader, MOST))
    refuse_short(text, sum(int(each["attention_mask"].sum()) for each in feeds))
    return feeds + of_words(reader)


def feeds_of_words(model: FloatModel) -> list[Mapping[str, Array]]:
    """Words at random as an encoder reads them; none where it has no tokenizer, or that few words."""
    if model.encoder is None or not (model.folder / "tokenizer.json").is_file():
        return []
    return of_words(reader_of(model, model.longest))


def of_words(reader: TextReader) -> list[Mapping[str, Array]]:
    texts = words(reader.tokenizer, GENERATED // SHORTEST)
    return list(text_batches(texts, reader, GENERATED)) if texts else []


def calibrate(
    graph: gs.Graph,
    model: FloatModel,
    decisions: Decisions,
    heads: Set[str],
    feeds: Sequence[Mapping[str, Array]],
    say: Say,
) -> Decisions:
    """The decisions with codes calibrated on `feeds` for the linears of `graph` that multiply floats, but for `heads`;
    of an encoder with corrections of the biases, too. Where no linear does, the decisions themselves."""
    chosen: dict[str, QuantTensor] = {}  # name of a node -> its weight
    correctable: dict[str, bool] = {}  # name of a weight -> has each of its products a bias behind it?
    for node in graph.nodes:
        found = linear(node)
        quant = decisions.get(found.path) if found is not None and found.path not in heads else None
        if isinstance(quant, QuantTensor) and isinstance(quant.source, Quantizer) and quant.activations == "float":
            chosen[node.name] = quant
            has_bias = model.encoder is not None and bias_behind(node, quant.shape[0]) is not None
            correctable[quant.name] = correctable.get(quant.name, True) and has_bias
    if not chosen:
        return decisions
    damping = DAMPING if model.encoder is None else OF_ENCODERS
    kept = np.concatenate([each["attention_mask"].astype(bool).ravel() for each in feeds])  # what is no padding
    say(f"calibrating {len(chosen)} layers on {kept.sum():,} tokens")
    wiring, made, began = Wiring(graph), dict[str, QuantTensor](), time.monotonic()
    runs = [Evaluation(graph, each, wiring=wiring) for each in feeds]
    before, said, told, weights = ("", False), (np.empty(0), np.empty(0)), began, 0  # the last input, and what is known
    mean = np.empty(0)  # of that input
    with tempfile.TemporaryFile() as file:
        for node in runs[0].needed(*(node.outputs[0].name for node in graph.nodes if node.name in chosen)):
            if (quant := chosen.get(node.name)) is None:
                for run, outputs in zip(runs, evaluate_each(node, [run.values for run in runs], graph), strict=True):
                    run.store(node, outputs)
                continue
            x, centred = node.inputs[0].name, correctable[quant.name]
            rows = np.concatenate([run.values[x].reshape(-1, quant.shape[1]) for run in runs])
            if quant.name not in made:  # a module may be used several times
                if (x, centred) != before:
                    real = rows[kept] if len(rows) == len(kept) else rows  # else it has no row for each token
                    mean = real.mean(axis=0) if centred else np.zeros(0, FLOAT32)
                    before, said = (x, centred), factor_of(real - mean if centred else real, quant.name, damping)
                codes = Codes(*(spilled(part, file) for part in feed_back(quant, *said)))
                of = {f.name: getattr(quant.source, f.name) for f in fields(Quantizer)}
                fitted = replace(quant, source=Calibrated(**of, codes=codes))
                correction = through(quant, mean) - through(fitted, mean) if centred else np.empty(0, FLOAT32)
                made[quant.name] = replace(fitted, correction=correction.tobytes())
                weights += math.prod(quant.shape)
            product = through(made[quant.name], rows)
            if correctable[quant.name]:  # the bias behind it is still the float model's
                product += np.frombuffer(made[quant.name].correction, FLOAT32)
            for run, y in zip(runs, split_rows(product, [run.values[x].shape[:-1] for run in runs]), strict=True):
                run.store(node, [y])
            if time.monotonic() - told > EVERY:
                told = time.monotonic()
                rate = weights / (told - began) / 1e6
                say(f"calibrating what follows {len(made)} of {len(chosen)} layers, {rate:.1f} M weights/s")
    return {**decisions, **made}


def through(quant: QuantTensor, rows: Array) -> Array:
    """rows [M, K] or [K] times the weight that is in codes, or will be."""
    if isinstance(quant.source, Calibrated):
        parts = (dequantize(Codes(*tile.parts), quant.group_size) for tile in quant.tiles())
    else:
        assert isinstance(quant.source, Quantizer)
        parts = (convert(tile.parts[0], FLOAT32) for tile in quant.source.weight.tiles())
    return np.concatenate([rows @ part.T for part in parts], axis=-1)


def spilled(part: Array, file: IO[bytes]) -> Array:
    """The same values, mapped from the end of a file: they take memory only while they are read."""
    at = file.seek(0, os.SEEK_END)
    file.write(np.ascontiguousarray(part).data)
    file.flush()
    return np.memmap(file, part.dtype, "r", at, part.shape)


def factor_of(x: Array, layer: str, damping: float = DAMPING) -> tuple[Array, Array]:
    """U [K, K], upper triangular, U^T U = H^-1, H damped, and H's diagonal [K], of the inputs x [T, K] of `layer`.

    With J the order of channels reversed, J H J = L L^T gives H = R R^T for the upper triangular R = J L J: U = R^-1.
    """
    h = x.T @ x
    if not np.isfinite(h).all():
        raise UserError(
            "what reaches this layer is not finite", where=layer, fix="leave --calibration out, or --search none"
        )
    size = h.diagonal().copy()
    h[np.diag_indices_from(h)] += damping * size + (FLOOR * size.mean() or 1)  # 1: nothing is ever on
    return inverse(np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]), size


def inverse(upper: Array) -> Array:
    """Of an upper triangular matrix, by halves: an eighth of the work of a general one."""
    half = len(upper) // 2
    if half < SMALL:
        return np.triu(np.linalg.inv(upper))
    out = np.zeros_like(upper)
    out[:half, :half], out[half:, half:] = inverse(upper[:half, :half]), inverse(upper[half:, half:])
    out[:half, half:] = -out[:half, :half] @ (upper[:half, half:] @ out[half:, half:])
    return out


def feed_back(quant: QuantTensor, factor: Array, energy: Array) -> Codes:
    """The codes of a weight whose inputs have what `factor_of` gives, blocks of columns in turn."""
    assert isinstance(quant.source, Quantizer)
    (n, k), group, top = quant.shape, quant.group_size, 2**quant.bits - 1
    w = np.concatenate([convert(tile.parts[0], FLOAT32).T for tile in quant.source.weight.tiles()], axis=1)  # [K, N]
    codes = np.empty((k, n), np.uint8)
    grids: list[Codes] = []
    step = BLOCK // group * group or math.gcd(group, BLOCK)
    for start in range(0, k, step):
        end = min(start + step, k)
        errors = np.empty((end - start, n), np.float32)
        for i in range(start, end):
            if i % group == 0:
                grids.append(grid(quant.source, w[i : i + group], energy[i : i + group]))
                scale, zero = grids[-1].scale[:, 0], grids[-1].zero[:, 0].astype(np.float32)
            code = np.clip(np.rint(w[i] / scale + zero), 0, top)
            codes[i] = code
            errors[i - start] = (w[i] - (code - zero) * scale) / factor[i, i]
            w[i + 1 : end] -= factor[i, i + 1 : end, None] * errors[i - start]
        w[end:] -= factor[start:end, end:].T @ errors
    scale, zero = (np.concatenate(parts, axis=1) for parts in zip(*(each[1:] for each in grids), strict=True))
    return Codes(np.ascontiguousarray(codes.T), scale, zero)


def grid(like: Quantizer, columns: Array, energy: Array) -> Codes:
    """One group `[g, N]` with scales and zero points `[N, 1]` searched for inputs of that energy, where they are codes.

    A zero point that is none comes from the layer's own formula.
    """
    source = searched(like, energy) if like.zero_dtype == UINT8 else like
    rows = InMemory(np.ascontiguousarray(columns.T))
    tiles = replace(source, weight=rows, group_size=len(columns)).tiles()
    return Codes(*map(np.concatenate, zip(*(tile.parts for tile in tiles), strict=True)))
