"""What a mask lets a query see, from its values: it is computed for a few short batches, never read off a name.

A mask follows from the interface's integers alone, so it costs milliseconds whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.errors import first_line
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import Array, view_of
from instantrt.passes.core.names import IDS, MASK, PAST, POSITIONS
from instantrt.passes.core.rewrite import producer

VISIBLE = -1000.0  # what adds less to a score leaves nothing of it; position biases of short rows are far smaller
LENGTHS = (MASK, POSITIONS)  # the inputs whose values may decide; of others only shapes may
MOST = 1 << 26  # bytes of a constant that a mask may be made of
PRODUCTS = ("MatMul", "Gemm", "Attention")  # what makes hidden states; a mask that depends on them is not looked at


@dataclass(frozen=True)
class Probe:
    """A call of `new` tokens after `past`: of each row the tokens that are padding on the left and on the right."""

    past: int
    new: int
    padding: tuple[tuple[int, int], ...]

    @property
    def mask(self) -> Array:
        """attention_mask [B, T]."""
        columns = np.arange(self.past + self.new)
        return np.array([(columns >= left) & (columns < len(columns) - right) for left, right in self.padding])

    def feeds(self, inputs: list[gs.Variable]) -> Iterator[tuple[str, Array]]:
        """What the interface's inputs are for it; caches and ids are zeros, of which only the shape is asked."""
        positions = np.maximum(np.cumsum(self.mask, axis=1) - 1, 0)[:, self.past :]
        values = {MASK: self.mask, POSITIONS: positions, IDS: np.zeros_like(positions)}
        for tensor in inputs:
            if tensor.name in values:
                yield tensor.name, values[tensor.name].astype(tensor.dtype)
            elif tensor.name.startswith(PAST):
                _, heads, _, width = tensor.shape
                yield tensor.name, np.zeros((len(self.padding), heads, self.past, width), tensor.dtype)


# Five rows, so that no other dimension is taken for the batch: a prompt, what follows a cache, and single tokens of
# rows that end at different places. Right padding behind a cache is for single tokens: there a row ends where it ends.
PROMPT = Probe(0, 6, ((0, 0), (2, 0), (5, 0), (0, 1), (0, 3)))
PROBES = (
    PROMPT,
    Probe(4, 3, ((0, 0), (1, 0), (3, 0), (4, 0), (0, 0))),
    Probe(7, 1, ((0, 0), (2, 0), (0, 1), (0, 4), (0, 7))),
)


def sees_ahead(graph: gs.Graph) -> bool:
    """Does any attention of a causal LM's interface let a token of a prompt see those after it?

    What such a prompt gives depends on all of it: it cannot be run in pieces.
    """
    for mask in masks(graph):
        found = values_of(graph, mask, dict(PROMPT.feeds(graph.inputs)))
        if isinstance(found, str) or found.ndim < 2:
            continue
        seen = found if found.dtype == np.bool_ else found > VISIBLE
        seen = np.broadcast_to(seen, (*seen.shape[:-2], PROMPT.new, PROMPT.new))
        if np.triu(seen, 1).any():
            return True
    return False


def masks(graph: gs.Graph) -> Iterator[gs.Tensor]:
    """What is added to scores before a softmax, or chooses among them, once each."""
    found: dict[int, gs.Tensor] = {}
    for node in graph.nodes:
        added = producer(node.inputs[0], "Add") if node.op == "Softmax" else None
        for tensor in added.inputs if added is not None else node.inputs[3:4] if node.op == "Attention" else ():
            if tensor.name:
                found[id(tensor)] = tensor
    yield from found.values()


def unlike_causal(graph: gs.Graph, mask: gs.Tensor) -> str:
    """Why GroupQueryAttention, which hides all keys after the query by itself, would not do what `mask` says; or "".

    The mask has to be float32 [B, 1, S, T], hide those keys, and let the last query of each row see the row's end,
    which is where the lowering reads the row's length (docs/facts.md, "GroupQueryAttention").
    """
    for probe in PROBES:
        found = values_of(graph, mask, dict(probe.feeds(graph.inputs)))
        reason = found if isinstance(found, str) else unlike(probe, found)
        if reason:
            return reason
    return ""


def values_of(graph: gs.Graph, mask: gs.Tensor, feeds: Mapping[str, Array]) -> Array | str:
    """The mask that `feeds` give, or why it cannot be known from them."""
    if isinstance(mask, gs.Constant):
        return "the mask is a constant"
    evaluation = Evaluation(graph, feeds)
    try:
        needed = evaluation.needed(mask.name)
    except KeyError as error:
        return f"the mask depends on the input {error.args[0]}"
    for node in needed:
        if node.op in PRODUCTS:
            return f"the mask depends on hidden states, by {node.name}"
        for tensor in node.inputs:
            if tensor.name in feeds and tensor.name not in LENGTHS and node.op != "Shape":
                return f"the mask depends on the values of {tensor.name}"
            view = view_of(tensor)
            if view is not None and view.nbytes > MOST:
                return f"the mask depends on the weight {tensor.name}"
    if not needed:
        return "the mask is an input of the model"
    try:
        return evaluation.peek(mask.name)
    except Exception as error:  # ONNX Runtime's errors have no common class
        return f"the mask cannot be computed apart: {first_line(error)}"


def unlike(probe: Probe, mask: Array) -> str:
    """What of the mask that `probe` gives is not as GroupQueryAttention reads it, or ""."""
    allowed, new = probe.mask, probe.new
    rows, total = allowed.shape
    if mask.dtype != np.float32:
        return f"the mask is {mask.dtype}, where one to add is expected"
    if mask.shape != (rows, 1, new, total):
        found = ", ".join(str(size) for size in mask.shape)
        return f"the mask is [{found}] for {rows} rows of {new} tokens in {total}, not [{rows}, 1, {new}, {total}]"
    seen, keys = mask[:, 0] > VISIBLE, np.arange(total)
    end = np.where(allowed, keys, -1).max(axis=1)
    first = np.where(probe.past, end + 1 - new, 0)  # a prompt starts at 0, wherever it ends
    if (seen & (keys > (first[:, None] + np.arange(new))[..., None])).any():
        return "the mask lets a query see keys after it, which GroupQueryAttention hides"
    last = total - 1 - mask[:, 0, -1, ::-1].argmax(axis=1)  # the last of the largest, as the lowering reads it
    if (last < end).any() or (probe.past and (last > end).any()):  # behind a prompt's end lies padding alone
        return "the last key that the last query sees is not the row's end"
    return ""
