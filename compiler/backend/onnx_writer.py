"""Writes a graph of lazy constants as .onnx with external data: every source is read once, every byte written once.

Constants of the same content lie in one place, whatever their shapes: a tied table's, which two operators read.

Their digests are taken meanwhile, of what the page cache still holds.
"""

from __future__ import annotations

import hashlib
import math
import os
import textwrap
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.compiler.artifact.digest import CHUNK, sha256
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FOUR_BIT, Array, Source, View, view_of
from instantrt.passes.core.quant import in_pairs
from instantrt.passes.core.subgraphs import graphs, tensors

DATA_SUFFIX = ".data"
INLINE_LIMIT = 1 << 10  # shape inference wants to see axes and shapes; weights are always larger
ALIGNMENT = 4096  # so that a runtime can map the pages as they are
STRIP_BYTES = 1024  # columns are written this wide at least: narrower writes cost more than the data
STRIP_MEMORY = 30 << 20  # and as wide as this allows, which malloc keeps (`KEPT`); codes of four bits take twice it
PIECE, TURNED = 128, 1 << 13  # columns of a strip that are turned together, and how many rows of them at a time
THREADS = 2
LARGE = 16  # the part of a file that a source has that is written before the others

Progress = Callable[[str, int], None]  # (tensor, bytes just written)


@dataclass(frozen=True)
class Placed:
    """A view and where its bytes go."""

    name: str
    view: View
    offset: int


def write_model(graph: gs.Graph, path: Path, progress: Progress = lambda name, size: None) -> dict[str, str]:
    """Writes `path` and `path.data`; returns the sha256 of each. The caller owns the folder and renames it.

    At most two sources are in flight, each holding a few tiles: memory does not grow with the model. What was written
    is valid ONNX, or a UserError.
    """
    load_inline(graph)
    placed, total = layout(graph)
    data = path.with_name(path.name + DATA_SUFFIX)
    model = exported(graph, placed, data.name)
    try:
        digests = {data.name: write_data(placed, total, data, progress)}
        path.write_bytes(model.SerializeToString(deterministic=True))
    except OSError as error:
        raise UserError(
            "the artifact could not be written",
            where=str(path.parent),
            expected=f"{total / 1e9:.2f} GB of free space",
            found=os.strerror(error.errno) if error.errno else str(error),
        ) from None
    check_graph(path)
    return {path.name: sha256(path), **digests}


def exported(graph: gs.Graph, placed: Iterable[Placed], data: str) -> onnx.ModelProto:
    """The graph with what is `placed` in the file `data` beside it."""
    if graph.import_domains is not None:  # copies of a graph share the list, and the exporter adds to it
        graph.import_domains = list(graph.import_domains)
    model: onnx.ModelProto = gs.export_onnx(graph)
    offsets = {p.name: p for p in placed}
    for tensor in (t for each in graphs(model.graph) for t in each.initializer):
        if tensor.name in offsets:
            p = offsets[tensor.name]
            fields = (("location", data), ("offset", p.offset), ("length", p.view.nbytes))
            tensor.ClearField("external_data")
            tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in fields)
    return model


def check_graph(path: Path) -> None:
    """Types, shapes and operators of an ONNX file as the standard has them; its external data is not read.

    Whatever a pass overlooked, no file is handed out that no runtime loads.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(
            "the artifact is not a valid ONNX model",
            where=path.name,
            found=textwrap.shorten(str(error), 400),
            fix="if onnx.checker takes the model that was given, please report this",
        ) from None


def layout(graph: gs.Graph) -> tuple[list[Placed], int]:
    """Where each constant goes that has its bytes in the data file, and that file's size.

    In the order of the graph, but that those of one source lie together: a digest can follow while they are written.
    """
    views = [(t.name, v) for t in tensors(graph).values() if (v := view_of(t)) is not None and not is_inline(v)]
    first: dict[Source, int] = {}
    for index, (_, view) in enumerate(views):
        first.setdefault(view.source, index)
    placed: list[Placed] = []
    offsets: dict[Hashable, int] = {}
    total = 0
    for name, view in sorted(views, key=lambda each: first[each[1].source]):
        offset = offsets.setdefault(view.content, total)
        placed.append(Placed(name, view, offset))
        if offset == total:
            total += -(-view.nbytes // ALIGNMENT) * ALIGNMENT
    return placed, total


def is_inline(view: View) -> bool:
    """Is the constant so small that the model file itself holds its bytes?"""
    return view.nbytes < INLINE_LIMIT and view.dtype not in FOUR_BIT


def load_inline(graph: gs.Graph) -> None:
    """Gives each small lazy constant its values."""
    for tensor in tensors(graph).values():
        view = view_of(tensor)
        if view is not None and is_inline(view):
            tensor.values = view.load()


def write_data(placed: list[Placed], total: int, path: Path, progress: Progress) -> str:
    """Two threads write the large sources, then the others in the order of the file; this one returns its sha256.

    It is taken of what they have written, meanwhile.
    """
    placed = list({p.offset: p for p in placed}.values())
    digest, ends = hashlib.sha256(), [*(p.offset for p in placed[1:]), total]
    by_source: dict[Source, list[Placed]] = defaultdict(list)
    for p in placed:
        by_source[p.view.source].append(p)
    with path.open("wb+", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
        if total:
            os.posix_fallocate(file.fileno(), 0, total)  # a full disk is known now, not after an hour
        try:
            fd = file.fileno()
            # A table of tokens that comes last would keep one thread at work alone.
            first = sorted(by_source.items(), key=lambda each: sum(p.view.nbytes for p in each[1]) < total / LARGE)
            jobs = {s: pool.submit(write_source, s, views, fd, progress) for s, views in first}
            for p, end in zip(placed, ends, strict=False):
                jobs[p.view.source].result()
                take_in(digest, fd, p.offset, end)
        except BaseException:  # an interruption may come while jobs are still handed out
            pool.shutdown(cancel_futures=True)
            raise
    return digest.hexdigest()


def take_in(digest: hashlib._Hash, fd: int, start: int, stop: int) -> None:
    """Updates `digest` with the bytes from `start` to `stop` of a file."""
    chunk = memoryview(bytearray(min(CHUNK, stop - start)))
    while start < stop and (size := os.preadv(fd, [chunk[: stop - start]], start)):
        digest.update(chunk[:size])
        start += size


def write_source(source: Source, views: list[Placed], fd: int, progress: Progress) -> None:
    """Reads `source` once and puts each tile's part of every view in its place."""
    whole = [p for p in views if crosses_bytes(p.view)]
    rows = [p for p in views if p.view.axis == 0 and p not in whole]
    strips = [Strip(p, fd) for p in views if p.view.axis != 0 and p not in whole]
    positions = {p.name: p.offset for p in rows}
    held: dict[str, list[Array]] = {p.name: [] for p in whole}
    for tile in source.tiles():
        for p in whole:
            held[p.name].append(p.view.block(tile))
        for p in rows:
            data = pack(p.view.block(tile))
            pwrite(fd, data, positions[p.name])
            positions[p.name] += data.nbytes
        for strip in strips:
            strip.put(strip.placed.view.block(tile))
        progress(views[0].name, sum(tile_bytes(p.view, len(tile.parts[0])) for p in views))
    for strip in strips:
        strip.flush()
    for p in whole:
        pwrite(fd, pack(np.concatenate(held[p.name], axis=p.view.axis).reshape(-1)), p.offset)


def tile_bytes(view: View, rows: int) -> int:
    return view.nbytes * rows // max(1, view.shape[view.axis])


def crosses_bytes(view: View) -> bool:
    """A four-bit tensor with odd rows, as a vector has them, packs across tiles: such a one is written whole."""
    row = view.shape[1:] if view.axis == 0 else view.shape[-1:]
    return view.dtype in FOUR_BIT and math.prod(row) % 2 == 1


class Strip:
    """Collects columns of a row-major matrix until they are wide enough to be worth a write per row.

    They come as rows of the transpose: PIECE of them are `piece` [PIECE, rows], which is turned, as many rows at a time
    as the processor's caches hold, into one of `pieces` [count, rows, PIECE]. These together are a strip.

    start, filled   columns that are written, and columns that are held
    """

    def __init__(self, placed: Placed, fd: int) -> None:
        view = placed.view
        self.placed, self.fd = placed, fd
        self.rows, self.width = int(np.prod(view.shape[:-1])), view.shape[-1]
        self.row_bytes = view.nbytes // self.rows
        columns = max(STRIP_BYTES, STRIP_MEMORY // self.rows) * self.width // self.row_bytes
        count = -(-min(self.width, columns) // PIECE)
        self.piece = np.empty((PIECE, self.rows), view.dtype)
        self.pieces = np.empty((count, self.rows, PIECE), view.dtype)
        self.start, self.filled = 0, 0

    def put(self, block: Array) -> None:
        """Takes columns [rows, n]."""
        lines = block.reshape(self.rows, -1).T
        while len(lines):
            at = self.filled % PIECE
            taken, lines = lines[: PIECE - at], lines[PIECE - at :]
            self.piece[at : at + len(taken)] = taken
            self.filled += len(taken)
            if self.filled % PIECE == 0:
                self.turn()
            if self.filled == len(self.pieces) * PIECE:
                self.flush()

    def turn(self) -> None:
        """The last piece, filled or not, becomes one of the strip's."""
        for row in range(0, self.rows, TURNED):
            rows = slice(row, row + TURNED)
            self.pieces[(self.filled - 1) // PIECE, rows] = transposed(self.piece[:, rows])

    def flush(self) -> None:
        """Writes the columns that are held, a few rows at a time: a row's pieces are put side by side, then packed."""
        if not self.filled:
            return
        if self.filled % PIECE:
            self.turn()
        count, offset = -(-self.filled // PIECE), self.placed.offset + self.start * self.row_bytes // self.width
        line = np.dtype((np.void, PIECE * self.pieces.itemsize))
        step = 1 + TURNED // (1 + count)
        for row in range(0, self.rows, step):
            lines = np.ascontiguousarray(self.pieces[:count, row : row + step].view(line)[..., 0].T)
            data = pack(lines.view(self.pieces.dtype)[:, : self.filled])
            if self.filled == self.width:
                pwrite(self.fd, data, offset + row * self.row_bytes)
            else:
                flat, size = memoryview(data.reshape(-1).view(np.uint8).data), data.nbytes // len(lines)
                for i in range(len(lines)):
                    write_all(self.fd, flat[i * size : (i + 1) * size], offset + (row + i) * self.row_bytes)
        self.start += self.filled
        self.filled = 0


def transposed(rows: Array) -> Array:
    """rows `[n, K]` of 1, 2, 4 or 8 bytes each as `[K, n]`, contiguous: columns of 8 bytes, then these as they are.

    n is a multiple of 8.
    """
    each = 8 // rows.itemsize
    plain = rows.view(f"u{rows.itemsize}")
    words = np.empty((len(rows) // each, rows.shape[1], each), plain.dtype)
    for i in range(each):
        words[..., i] = plain[i::each]
    return np.ascontiguousarray(words.view(np.uint64)[..., 0].T).view(rows.dtype)


def pack(values: Array) -> Array:
    """The bytes of an array in row-major order; four-bit types two a byte, the first in the low nibble."""
    if values.dtype not in FOUR_BIT:
        return np.ascontiguousarray(values)
    codes = np.ascontiguousarray(values).view(np.uint8).reshape(-1) & 0xF
    if len(codes) % 2:
        codes = np.append(codes, np.uint8(0))
    return in_pairs(codes)


def pwrite(fd: int, data: Array, offset: int) -> None:
    write_all(fd, memoryview(data.reshape(-1).view(np.uint8).data), offset)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
