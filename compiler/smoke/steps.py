"""What every form of a model is asked: short random inputs, the same ones every time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.data import token_feeds
from instantrt.compiler.frontend.model import EncoderShape, Interface, LlmShape
from instantrt.compiler.smoke.names import CACHED, PAST, PRESENT
from instantrt.passes.core.evaluate_node import numpy_type
from instantrt.passes.core.lazy import Array

PROMPT, SHORTER, DECODES = 8, 3, 2  # tokens of a prompt, of those the second row lacks, and tokens after it
TEXT = 24  # tokens of a text: more than a window of the smallest models
LARGEST = 1 << 26  # elements of all inputs of any model
BY_ROW = ("decode 1", "decode 2", "row")  # how the steps begin that a batch of both rows in one cache does, too
CHANGED = "last token changed"


@dataclass(frozen=True)
class Call:
    """One call. `after` is the step whose cache it goes on with.

    tokens, keys   where an output says something, [B, S] and [B, T]; None where all of it does
    """

    name: str
    feeds: Mapping[str, Array]
    after: str = ""
    tokens: Array | None = None
    keys: Array | None = None

    def counted(self, name: str, shape: tuple[int, ...]) -> Array | None:
        """Where a tensor of that name and shape says something, of its first axes; None where all of it does."""
        if name.startswith(PRESENT) and len(shape) == 4:
            if self.keys is None or shape[2] != self.keys.shape[1]:
                return None
            return np.broadcast_to(self.keys[:, None], shape[:3])
        if self.tokens is None or shape[:2] == self.tokens.shape:
            return self.tokens
        # GPT-2's layers read the tokens of all rows in one
        return self.tokens.ravel() if len(shape) == 2 and shape[0] == self.tokens.size else None


@dataclass(frozen=True)
class Prompts:
    """Two sequences of different lengths, and the tokens that follow both: int64 [S0], [S1], [DECODES, 2]."""

    rows: tuple[Array, Array]
    tokens: Array


def prompts_of(llm: LlmShape) -> Prompts:
    random = np.random.default_rng(0)
    room = llm.max_length or PROMPT + DECODES
    longest = min(PROMPT, max(1, room - DECODES))
    decodes = min(DECODES, room - longest)
    rows = [random.integers(0, llm.vocab, length) for length in (longest, max(1, longest - SHORTER))]
    return Prompts((rows[0], rows[1]), random.integers(0, llm.vocab, (decodes, 2)))


def steps_of(graph: gs.Graph, interface: Interface | None, *, right: bool) -> list[Call]:
    """What a model with that interface is asked; of any other the first that it takes will do."""
    if isinstance(interface, LlmShape):
        return llm_steps(graph, interface, right=right)
    return encoder_steps(graph, interface) if interface is not None else list(attempts(graph.inputs))


def llm_steps(graph: gs.Graph, llm: LlmShape, *, right: bool) -> list[Call]:
    """A prefill, tokens with its cache, rows of two lengths, the prompt with another last token, the second row alone.

    right   rows may also be padded on the right
    """
    prompts = prompts_of(llm)
    longest, length = len(prompts.rows[0]), len(prompts.rows[1])
    inputs = {t.name for t in graph.inputs}
    other = prompts.rows[0].copy()
    other[-1] = (other[-1] + 1 + llm.vocab // 2) % llm.vocab
    steps = row_steps(graph, prompts, 0, ("prefill", "decode"))
    if "attention_mask" in inputs and longest > length:
        sides = [("left", slice(longest - length, None)), *([("right", slice(0, length))] if right else [])]
        for side, here in sides:
            mask = np.ones((2, longest), np.int64)
            mask[1] = 0
            mask[1, here] = 1
            ids = np.tile(prompts.rows[0], (2, 1))
            ids[1, here] = prompts.rows[1]
            steps.append(new(graph, f"padded on the {side}", ids, mask))
            if side == "left" and len(prompts.tokens):
                steps.append(follow(graph, steps[-1], "decode of padded rows", prompts.tokens[0][:, None]))
    return [*steps, new(graph, CHANGED, other[None]), *row_steps(graph, prompts, 1, ("row", "row"))]


def row_steps(graph: gs.Graph, prompts: Prompts, row: int, names: tuple[str, str]) -> list[Call]:
    """One of the sequences by itself, and the tokens that follow it."""
    steps = [new(graph, names[0], prompts.rows[row][None])]
    for index, ids in enumerate(prompts.tokens):
        steps.append(follow(graph, steps[-1], f"{names[1]} {index + 1}", ids[None, row : row + 1]))
    return steps


def new(graph: gs.Graph, name: str, ids: Array, mask: Array | None = None) -> Call:
    """ids [B, S] with an empty cache; mask [B, S]."""
    mask = np.ones_like(ids) if mask is None else mask
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    feeds = {**token_feeds(ids), "attention_mask": mask, "position_ids": positions, **caches(graph, len(ids))}
    return step(graph, name, feeds, "")


def caches(graph: gs.Graph, batch: int, length: int = 0) -> dict[str, Array]:
    """Input -> a cache of `length` zeros in each row."""
    return {
        t.name: np.zeros([batch if i == 0 else d if isinstance(d, int) else length for i, d in enumerate(t.shape)], f)
        for t in graph.inputs
        if t.name.startswith(PAST) and (f := numpy_type(t.dtype)) is not None
    }


def follow(graph: gs.Graph, before: Call, name: str, ids: Array) -> Call:
    """ids [B, 1] after another step."""
    assert before.keys is not None
    mask = np.concatenate([before.keys.astype(np.int64), np.ones_like(ids)], axis=1)
    positions = mask.sum(axis=1, keepdims=True) - 1
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return step(graph, name, feeds, before.name)


def step(graph: gs.Graph, name: str, feeds: Mapping[str, Array], after: str) -> Call:
    """What `graph` takes of `feeds`, in its types."""
    keys = feeds["attention_mask"].astype(bool)
    return typed(Call(name, feeds, after, keys[:, -feeds["input_ids"].shape[1] :], keys), graph)


def typed(step: Call, graph: gs.Graph) -> Call:
    """The step in the types of `graph`, without what that does not take."""
    types = {t.name: numpy_type(t.dtype) for t in graph.inputs}
    return replace(step, feeds={n: v.astype(types[n], copy=False) for n, v in step.feeds.items() if n in types})


def encoder_steps(graph: gs.Graph, shape: EncoderShape) -> list[Call]:
    """Rows of two lengths, whose tokens are of two kinds where the model has them."""
    length = min(TEXT, shape.max_length or TEXT)
    ids = np.random.default_rng(0).integers(0, shape.vocab, (2, length))
    mask = np.ones_like(ids)
    mask[1, -(length // 3) :] = 0
    types = np.tile(np.arange(length) >= length // 2, (2, 1)).astype(np.int64)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return [typed(Call("rows of two lengths", feeds), graph)]


def attempts(inputs: Sequence[gs.Variable]) -> Iterator[Call]:
    """Inputs for any model: the first that it takes will do. Later ones are smaller, in size and in value.

    There are none where a model declares sizes of its own that make too much of them.
    """
    for index, (leading, others, below) in enumerate(
        ((2, 8, 8), (2, 8, 2), (1, 8, 2), (8, 8, 2), (1, 4, 2), (1, 1, 1))
    ):
        random = np.random.default_rng(index)
        sizes = {t.name: sizes_of(t, leading, others) for t in inputs}
        if sum(map(math.prod, sizes.values())) <= LARGEST:
            yield Call(f"run {index}", {t.name: drawn(t, random, sizes[t.name], below) for t in inputs})


def sizes_of(tensor: gs.Variable, leading: int, others: int) -> list[int]:
    return [d if isinstance(d, int) and d >= 0 else others if i else leading for i, d in enumerate(tensor.shape or ())]


def drawn(tensor: gs.Variable, random: np.random.Generator, sizes: list[int], below: int) -> Array:
    """Values of the tensor's type: standard normal floats, integers from 0 on, words."""
    dtype = numpy_type(tensor.dtype)
    if dtype.kind in "OUS":
        return np.asarray(random.integers(0, below, sizes)).astype(np.str_)
    if dtype.kind in "biu":
        return np.asarray(random.integers(0, below, sizes)).astype(dtype)
    return np.asarray(random.standard_normal(sizes)).astype(dtype)


def fed(steps: Sequence[Call], prompts: Prompts | None = None) -> dict[str, Array]:
    """What a process reads: the inputs of each step, and the prompts that its engine has in one cache."""
    given = {f"{step.name}|{name}": value for step in steps for name, value in step.feeds.items()}
    if prompts is not None:
        given |= {f"{CACHED}|{row}": ids for row, ids in enumerate(prompts.rows)} | {f"{CACHED}|tokens": prompts.tokens}
    return given


def alone(step: str) -> tuple[str, ...]:
    """The steps of each row by itself that one of both rows in one cache is held against; any other step alone."""
    if not step.startswith(CACHED):
        return (step,)
    index = int(step.removeprefix(CACHED))
    return (f"decode {index}", f"row {index}") if index else ("prefill", "row")
