"""Weight-only codes that a text decides: each column's rounding error goes into the columns that are still to come.

GPTQ (Frantar et al., 2022, "Accurate Post-Training Quantization for Generative Pre-trained Transformers"): of a linear
y = x W^T, with H = x^T x over the text and H^-1 = U^T U (U upper triangular), column k is rounded, and the columns j
behind it lose (w_k - what it became) / U_kk * U_kj, which is least squares. Scales and zero points of a group are
searched when it begins, each column's error weighted by H's diagonal. The loudest columns come first, whose errors cost
most, groups as a whole, so that no input has to be sorted; then every code is rounded again, the others given.

Layers come in the graph's order, each on what the quantized layers before it make of the text, and aims at what the
float model gives (Li et al., 2025, "GPTAQ"): with x what the float layers make of it and x' what the quantized ones do,
|x W^T - x' V^T|^2 is least at V = W + W ((x - x')^T x') H^-1, H = x'^T x'. Of that step T / (T + AIM K) is taken, as T
tokens of text say less of K inputs than of all texts.

Of an encoder, whose linears have biases, what the weights change on average goes into those
(passes/qdq/correct_biases), so that x counts about its mean: H = (x - m)^T (x - m).

A weight is in memory while it is quantized, its codes then wait in a file without a name until they are written.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.data import llm_feeds, read_text, reader_of, sentences_of, tokenizer_of, windows, words
from instantrt.compiler.accuracy.importance import searched
from instantrt.compiler.accuracy.texts import text_batches
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.say import At, Say
from instantrt.compiler.serving.runtime.texts import TextReader
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation, Wiring
from instantrt.passes.core.evaluate_node import evaluate_each
from instantrt.passes.core.lazy import FLOAT32, TILE_BYTES, Array, InMemory, Tile, convert
from instantrt.passes.core.linear import bias_behind, linear
from instantrt.passes.core.quant import Codes, Quantizer, QuantTensor, dequantize
from instantrt.passes.core.streaming import split_rows
from instantrt.passes.qdq.insert_qdq import Decisions

WINDOW = 256  # tokens that see one another
LEAST, MOST = 512, 1 << 13  # tokens of a text: fewer say nothing of a layer's inputs; more are not read
# Added to H's diagonal: this much of itself, as a few channels may be a thousand times the others, whose columns would
# else be fitted to the noise of the text; and of its mean, for channels that are never on.
DAMPING, FLOOR = 0.1, 1e-4
OF_ENCODERS = 0.3  # their texts have few tokens (docs/facts.md, "Formats of an encoder")
GENERATED, SHORTEST = 6144, 4  # tokens of words at random (docs/facts.md, "Formats of an encoder")
BLOCK = 32  # columns whose errors reach the rest of the weight together
SMALL = 32  # rows that are inverted at once
AIM = 4  # docs/facts.md, "What calibration aims at"
SWEEPS = 2  # over all codes, rounding them again (docs/facts.md, "Formats of an encoder")


@dataclass(frozen=True)
class Calibrated(Quantizer):
    """Codes that are there already: equal where the weight and the format are, of one text."""

    codes: Codes = field(compare=False, repr=False)

    def tiles(self) -> Iterator[Tile]:
        step = max(1, TILE_BYTES // self.codes.codes.shape[1])
        for start in range(0, len(self.codes.codes), step):
            yield Tile(start, Codes(*(np.asarray(part[start : start + step]) for part in self.codes)))


class Seen(NamedTuple):
    """What a text says of the inputs of a layer, channels in the order in which a weight's columns are rounded.

    order    place -> channel [K]: groups by their energy, and the channels of each by theirs, the loudest first
    h        x^T x, damped [K, K]
    factor   U [K, K], upper triangular, U^T U = h^-1
    energy   the diagonal of x^T x [K]
    lag      x'^T (x - x') [K, K], as much of it as is believed
    means    of x' and of x [K], where they count about these
    """

    order: Array
    h: Array
    factor: Array
    energy: Array
    lag: Array
    means: tuple[Array, ...] = ()


class Course:
    """The graph on all feeds, as far as it has come: by float weights, or by the codes that were made."""

    def __init__(self, graph: gs.Graph, feeds: Sequence[Mapping[str, Array]], wiring: Wiring) -> None:
        self.graph, self.runs = graph, [Evaluation(graph, each, wiring=wiring) for each in feeds]

    def advance(self, node: gs.Node) -> None:
        for run, outputs in zip(
            self.runs, evaluate_each(node, [run.values for run in self.runs], self.graph), strict=True
        ):
            run.store(node, outputs)

    def rows(self, name: str, width: int) -> Array:
        return np.concatenate([run.values[name].reshape(-1, width) for run in self.runs])

    def give(self, node: gs.Node, product: Array) -> None:
        """`product` [rows, N] is what the linear `node` makes of its inputs."""
        name = node.inputs[0].name
        for run, y in zip(
            self.runs, split_rows(product, [run.values[name].shape[:-1] for run in self.runs]), strict=True
        ):
            run.store(node, [y])


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
    wiring, made, weights, began = Wiring(graph), dict[str, QuantTensor](), 0, time.monotonic()
    ours, floats = Course(graph, feeds, wiring), Course(graph, feeds, wiring)
    at, rows, aims = "", np.empty(0), np.empty(0)  # the last input, and its rows on either side
    before, inputs = ("", False, 0), None  # and what is known of it
    with tempfile.TemporaryFile() as file:
        for node in ours.runs[0].needed(*(node.outputs[0].name for node in graph.nodes if node.name in chosen)):
            if (quant := chosen.get(node.name)) is None:
                ours.advance(node)
                floats.advance(node)
                continue
            x, centred = node.inputs[0].name, correctable[quant.name]
            if at != x:
                at, rows, aims = x, ours.rows(x, quant.shape[1]), floats.rows(x, quant.shape[1])
            if quant.name not in made:  # a module may be used several times
                if inputs is None or before != (x, centred, quant.group_size):
                    real, aim = (  # of what has a row for each token, without padding
                        each[kept] if len(each) == len(kept) else each.copy() for each in (rows, aims)
                    )
                    before = x, centred, quant.group_size
                    inputs = seen(real, aim, quant.name, quant.group_size, damping, centred=centred)
                made[quant.name] = fitted(quant, inputs, file)
                weights += math.prod(quant.shape)
            product = through(made[quant.name], rows)
            if correctable[quant.name]:  # the bias behind it is still the float model's
                product += np.frombuffer(made[quant.name].correction, FLOAT32)
            ours.give(node, product)
            floats.give(node, through(quant, aims))
            rate = weights / (time.monotonic() - began) / 1e6
            say(At(f"calibrating what follows {len(made)} of {len(chosen)} layers, {rate:.1f} M weights/s"))
    return {**decisions, **made}


def fitted(quant: QuantTensor, inputs: Seen, file: IO[bytes]) -> QuantTensor:
    """`quant` with its codes, which wait in `file`, and what its bias needs where its inputs count about their mean."""
    codes = Codes(*(spilled(part, file) for part in fitted_codes(quant, inputs)))
    of = {f.name: getattr(quant.source, f.name) for f in fields(Quantizer)}
    made, means = replace(quant, source=Calibrated(**of, codes=codes)), inputs.means
    correction = through(quant, means[1]) - through(made, means[0]) if means else np.empty(0, FLOAT32)
    return replace(made, correction=correction.tobytes())


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


def seen(x: Array, aim: Array, layer: str, group: int, damping: float = DAMPING, *, centred: bool = False) -> Seen:
    """Of the inputs x [T, K] of `layer`, whose weight has groups of that size; `aim`: the same in the float model.

    Both are lost.
    """
    means = (x.mean(axis=0), aim.mean(axis=0)) if centred else ()
    for each, mean in zip((x, aim), means, strict=False):
        np.subtract(each, mean, out=each)
    h = x.T @ x
    aim -= x
    lag = (len(x) / (len(x) + AIM * len(h))) * (x.T @ aim)
    if not (np.isfinite(h).all() and np.isfinite(lag).all()):
        raise UserError(
            "what reaches this layer is not finite", where=layer, fix="leave --calibration out, or --search none"
        )
    order = loudest_first(h.diagonal(), group)
    h, lag = h[np.ix_(order, order)], lag[np.ix_(order, order)]
    energy = h.diagonal().copy()
    h[np.diag_indices_from(h)] += damping * energy + (FLOOR * energy.mean() or 1)  # 1: nothing is ever on
    return Seen(order, h, inverse_factor(h), energy, lag, means)


def loudest_first(energy: Array, group: int) -> Array:
    """The channels [K] of inputs of that energy: groups by their sum, the channels of a group together."""
    grouped = energy.reshape(-1, group)
    groups = np.argsort(-grouped.sum(axis=1), kind="stable")
    within = np.argsort(-grouped, axis=1, kind="stable")[groups]
    return np.asarray((groups[:, None] * group + within).ravel())


def inverse_factor(h: Array) -> Array:
    """U, upper triangular, with U^T U = h^-1, by halves.

    h = R R^T of R = [[A, B], [0, C]]: C from the last block, B = h_12 C^-T, A from what B leaves of the first; then
    U = R^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]].
    Of a small h, with J the order reversed, J h J = L L^T gives R = J L J.
    """
    half = len(h) // 2
    if half < SMALL:
        return np.triu(np.linalg.inv(np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]))
    out = np.zeros_like(h)
    out[half:, half:] = last = inverse_factor(h[half:, half:])
    b = h[:half, half:] @ last.T
    out[:half, :half] = first = inverse_factor(h[:half, :half] - b @ b.T)
    out[:half, half:] = -first @ (b @ last)
    return out


def fitted_codes(quant: QuantTensor, inputs: Seen) -> Codes:
    """The codes of a weight whose inputs are these."""
    columns = columns_of(quant, inputs)
    codes, scale, zero = feed_back(quant, columns.copy(), inputs)
    descend(codes, columns, scale, zero, inputs.h, 2**quant.bits - 1)
    group = quant.group_size
    places, groups = np.argsort(inputs.order), np.argsort(inputs.order[::group] // group)
    return Codes(*(np.ascontiguousarray(part.T) for part in (codes[places], scale[groups], zero[groups])))


def columns_of(quant: QuantTensor, inputs: Seen) -> Array:
    """The columns that are to be rounded of a float weight, [K, N] float32."""
    assert isinstance(quant.source, Quantizer)
    parts = [convert(tile.parts[0], FLOAT32)[:, inputs.order].T for tile in quant.source.weight.tiles()]
    w = np.concatenate(parts, axis=1)
    w += inputs.factor.T @ (inputs.factor @ (inputs.lag @ w))
    return w


def feed_back(quant: QuantTensor, w: Array, inputs: Seen) -> Codes:
    """GPTQ of the columns w [K, N], which are lost, a block of them after another: codes [K, N], scales and zero points
    [G, N], in the order of `inputs`."""
    assert isinstance(quant.source, Quantizer)
    (n, k), group, top, factor = quant.shape, quant.group_size, 2**quant.bits - 1, inputs.factor
    codes, grids = np.empty((k, n), np.uint8), list[Codes]()
    step = BLOCK // group * group or math.gcd(group, BLOCK)
    for start in range(0, k, step):
        end = min(start + step, k)
        errors = np.empty((end - start, n), np.float32)
        for i in range(start, end):
            if i % group == 0:
                grids.append(grid(quant.source, w[i : i + group], inputs.energy[i : i + group]))
                scale, zero = grids[-1].scale[:, 0], grids[-1].zero[:, 0].astype(np.float32)
            code = np.clip(np.rint(w[i] / scale + zero), 0, top)
            codes[i] = code
            errors[i - start] = (w[i] - (code - zero) * scale) / factor[i, i]
            w[i + 1 : end] -= factor[i, i + 1 : end, None] * errors[i - start]
        w[end:] -= factor[start:end, end:].T @ errors
    return Codes(codes, *(np.concatenate(part, axis=1).T for part in list(zip(*grids, strict=True))[1:]))


def grid(like: Quantizer, columns: Array, energy: Array) -> Codes:
    """One group `[g, N]` with scales and zero points `[N, 1]` searched for inputs of that energy."""
    rows = InMemory(np.ascontiguousarray(columns.T))
    tiles = replace(searched(like, energy), weight=rows, group_size=len(columns)).tiles()
    return Codes(*map(np.concatenate, zip(*(tile.parts for tile in tiles), strict=True)))


def descend(codes: Array, w: Array, scale: Array, zero: Array, h: Array, top: int) -> None:
    """Rounds every code SWEEPS times more, the others given, to the one with the least error of the outputs: a descent
    by coordinates (Behdin et al., 2023, "QuantEase"), which sees of each column also those that were rounded after it.

    codes [K, N], changed in place, of the weight w [K, N], which is lost; scale, zero [G, N]. With D = W - Q and
    G = H D, code k is best at q_k + G_k / H_kk, and G loses H_k times what it moved by.
    """
    group = len(codes) // len(scale)
    for i in range(len(w)):
        w[i] -= (codes[i].astype(FLOAT32) - zero[i // group]) * scale[i // group]
    gradient = h @ w
    for start in [*range(0, len(codes), BLOCK)] * SWEEPS:
        block = slice(start, min(start + BLOCK, len(codes)))
        own, near, moved = gradient[block].copy(), h[block, block], np.empty_like(w[block])
        for i, column in enumerate(range(block.start, block.stop)):
            step = scale[column // group]
            code = np.clip(np.rint(codes[column] + own[i] / (near[i, i] * step)), 0, top)
            moved[i] = (code - codes[column]) * step
            codes[column] = code
            own[i + 1 :] -= near[i + 1 :, i, None] * moved[i]
        gradient -= h[:, block] @ moved
