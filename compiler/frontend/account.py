"""The account of a checkpoint: every tensor is used by a parameter or by the quantization, harmless, or an error.

It is taken before anything is exported. `report` is told what is wrong: it raises where a model is compiled, and
collects where one is inspected, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from instantrt.compiler.checkpoint import same_bytes
from instantrt.compiler.frontend.facts import ModelFacts
from instantrt.compiler.frontend.known_tensors import UNUSED_PARTS, harmless_names, listed, no_place
from instantrt.compiler.frontend.model import CLASSIFIERS, EncoderShape
from instantrt.compiler.frontend.pieces import FLOATS, Piece
from instantrt.compiler.frontend.side_files import FLOAT_MODEL, MERGED, READ, WEIGHTS, Accounted, Report, entries
from instantrt.compiler.quant.stored import Reader, StoredLayer, check_no_bias
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FLOAT32, Array, FileTensor, convert, whole
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import Reject


@dataclass(frozen=True)
class Account:
    """How many tensors the parameters and the quantization use; what is harmless, and why; the files likewise."""

    parameters: int = 0
    quantization: int = 0
    harmless: tuple[Accounted, ...] = ()
    files: tuple[Accounted, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user who compiles should know: tensors and weights that are not used."""
        weights = [entry for entry in self.files if entry.why not in (READ, MERGED) and WEIGHTS.search(entry.name)]
        unused = listed([entry.name for entry in (*self.harmless, *weights)], "not used, and harmless")
        return (f"{unused}; `instantrt inspect` says why",) if unused else ()


@dataclass(frozen=True)
class Taken:
    """`tensors` by the names that the model has for them; `layers` is how each linear is stored.

    The file may change the model: `untied` are the parameters that are no longer tied in `facts`, `buffers` the values
    of those that it saves. `count` is how many tensors the file has.
    """

    account: Account
    tensors: Mapping[str, FileTensor]
    layers: Mapping[str, QuantTensor | Reject]
    facts: ModelFacts
    untied: tuple[str, ...]
    buffers: Mapping[str, Array]
    count: int


class Asked(Mapping[str, FileTensor]):
    """A checkpoint's tensors, remembering which were found by whoever asked."""

    def __init__(self, tensors: Mapping[str, FileTensor]) -> None:
        self.tensors, self.found = tensors, set[str]()

    def __getitem__(self, name: str) -> FileTensor:
        tensor = self.tensors[name]
        self.found.add(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def take_account(
    facts: ModelFacts,
    pieces: Sequence[Piece],
    reader: Reader | None,
    files: tuple[Accounted, ...],
    report: Report,
) -> Taken:
    """Asks of every tensor of the file what it is for, and of every parameter where it is."""
    copies: dict[Piece, str] = {}
    placed = by_model_name(pieces, copies, report)
    tensors = {name: piece.tensor for name, piece in placed.items()}
    untied = different_ties(facts, placed, copies)
    facts = replace(facts, ties={name: tied for name, tied in facts.ties.items() if name not in untied})
    buffers = {name for name in facts.saved if name in tensors}
    asked = Asked(tensors)
    values = dict(buffer_values(facts, tensors, report))
    told = not_cut(facts, tensors, report)
    layers, failed = read_layers(facts, reader, asked, told, report)
    quantized = {path for path, quant in layers.items() if isinstance(quant, QuantTensor)}
    parameters = facts.parameters
    lost = missing(facts.groups, {*tensors, *told}, quantized | failed)
    used = {name for name in asked.found if name not in parameters or tensors[name].dtype not in FLOATS}
    harmless, unknown = {piece.own: why for piece, why in copies.items()}, []
    known = harmless_names(facts)
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        if name in parameters or name in buffers or name in used or name in told or path in failed:
            continue
        why = known(name, tensor)
        if path in quantized and reader is not None:
            why = UNUSED_PARTS.get((reader.method, part), why)
            if part == "bias":
                used.add(name)
                attempt(report, check_no_bias, tensor)
                continue
        if why:
            harmless[placed[name].own] = why
        else:
            unknown.append(name)
    for error in in_order(facts, tensors, lost, unknown, quantized | failed, reader):
        report(error)
    of_parameters = {*parameters, *buffers} - used
    quantization = {placed[name].own for name in used}
    counted = {p.own for name, p in placed.items() if name in of_parameters and p not in copies} - quantization
    spare = [(own, why) for own, why in harmless.items() if own not in counted | quantization]
    account = Account(len(counted), len(quantization), entries(spare), files)
    return Taken(account, tensors, layers, facts, untied, values, len({piece.own for piece in pieces}))


def attempt(report: Report, check: Callable[..., Any], *args: Any) -> Any:
    """What `check` returns, or None and a report of what it raised."""
    try:
        return check(*args)
    except UserError as error:
        report(error)
        return None


def by_model_name(pieces: Sequence[Piece], copies: dict[Piece, str], report: Report) -> dict[str, Piece]:
    """The tensors by the names that the model has for them today; of two that become one, equal ones are copies."""
    placed: dict[str, Piece] = {}
    for piece in pieces:
        first = placed.setdefault(piece.name, piece)
        if first is piece:
            continue
        if same_bytes(first.tensor, piece.tensor):
            copies[piece] = f"equal to {first.own}, byte for byte"
        else:
            what, where = f"two tensors for {piece.name}, and they differ", str(piece.tensor.path.parent)
            report(UserError(what, where=where, found=f"{first.own} and {piece.own}"))
    return placed


def different_ties(facts: ModelFacts, placed: Mapping[str, Piece], copies: dict[Piece, str]) -> tuple[str, ...]:
    """A tied parameter that the file has twice is one where both are equal, and two where they differ: their names.

    So does transformers: docs/facts.md, "Tied weights that differ".
    """
    untied = []
    for names in facts.groups:
        held = [placed[name] for name in names if name in placed]
        for piece in held[1:]:
            if piece.tensor is held[0].tensor:
                continue
            if same_bytes(piece.tensor, held[0].tensor):
                copies[piece] = f"equal to {held[0].own}, to which it is tied, byte for byte"
            else:
                untied.append(piece.name)
    return tuple(untied)


def buffer_values(facts: ModelFacts, tensors: Mapping[str, FileTensor], report: Report) -> Iterator[tuple[str, Array]]:
    """What the file holds for the buffers that the model saves."""
    for name in facts.saved:
        tensor, shape = tensors.get(name), facts.buffers[name]
        if tensor is None:
            continue
        if tensor.shape != shape:
            report(other_shape(tensor, shape, facts))
            continue
        values = whole(tensor)
        yield name, convert(values, FLOAT32) if tensor.dtype in FLOATS else values


def not_cut(facts: ModelFacts, tensors: Mapping[str, FileTensor], report: Report) -> set[str]:
    """Reports what the file has in one and the model in parts, if it cannot be cut; these tensors and parameters."""
    joined = {name: parts for name, parts in facts.chunked.items() if name in tensors}
    quantized = {module(name) for name in joined if tensors[name].dtype not in FLOATS}
    in_one, told = dict[str, list[str]](), set[str]()
    for name, parts in joined.items():
        shape = facts.joined(parts)
        if module(name) in quantized:
            in_one[module(name)] = list(map(module, parts))
            told.update((name, *(f"{module(part)}.weight" for part in parts)))
        elif shape is not None:
            report(other_shape(tensors[name], shape, facts))
            told.update((name, *parts))
    if in_one:
        first, *others = in_one
        error = UserError(
            f"{facts.name} has in parts what is quantized in one here: quantized tensors are not cut",
            where=str(tensors[next(iter(joined))].path),
            expected=f"{', '.join(in_one[first])}, or floats",
            found=f"{first} {listed(others, 'and others')}".rstrip(),
            fix=FLOAT_MODEL,
        )
        report(error)
    return told


def module(name: str) -> str:
    return name.rpartition(".")[0]


def read_layers(
    facts: ModelFacts, reader: Reader | None, tensors: Asked, told: set[str], report: Report
) -> tuple[dict[str, QuantTensor | Reject], set[str]]:
    """(how the reader finds each linear stored, the paths of those that it cannot read)."""
    layers: dict[str, QuantTensor | Reject] = {}
    failed = set[str]()
    for path, shape in facts.linears.items() if reader is not None else ():
        assert reader is not None
        known = f"{path}.weight" in told
        quant = None if known else attempt(report, reader.read, StoredLayer(path, shape, tensors))
        if quant is None:
            failed.add(path)
        else:
            layers[path] = quant
    return layers, failed


def in_order(
    facts: ModelFacts,
    tensors: Mapping[str, FileTensor],
    lost: list[str],
    unknown: list[str],
    quantized: set[str],
    reader: Reader | None,
) -> Iterator[UserError]:
    """What is wrong, by how much it tells: a prefix, tensors that name their writer, parameters, then what is left."""
    prefix = wrong_prefix(lost, tensors)
    strange, telling = no_place(unknown, tensors, facts, reader) if unknown else (None, False)
    absent = no_tensor(lost, prefix, facts) if lost else None
    yield from filter(None, (absent if prefix else None, strange if telling else None))
    yield from wrong_parameters(facts, tensors, quantized, reader.mark if reader is not None else "")
    yield from filter(None, (None if prefix else absent, None if telling else strange))


def wrong_parameters(
    facts: ModelFacts, tensors: Mapping[str, FileTensor], quantized: set[str], mark: str
) -> Iterator[UserError]:
    """The tensor of a parameter has its shape, and is a float unless a reader knows what it is.

    mark   the tensor that a quantized layer has
    """
    for name, shape in facts.parameters.items():
        tensor, path = tensors.get(name), module(name)
        if tensor is None or (path in quantized and tensor.dtype not in FLOATS):
            continue
        if path in quantized and name == f"{path}.weight" and mark != "weight":
            yield UserError("a layer is stored both quantized and as floats", where=name)
        elif tensor.dtype not in FLOATS:
            yield UserError(
                f"tensor {tensor.name} is not a float tensor",
                where=str(tensor.path),
                found=str(tensor.dtype),
                fix="its scales are missing, or the checkpoint's config does not say how it is quantized",
            )
        elif tensor.shape != shape:
            yield other_shape(tensor, shape, facts)


def other_shape(tensor: FileTensor, shape: tuple[int, ...], facts: ModelFacts) -> UserError:
    fix = "config.json belongs to another model, or the file was cut"
    model = facts.shape
    if (
        isinstance(model, EncoderShape)
        and model.task in CLASSIFIERS
        and is_of_classes(tensor.shape, shape, model.width)
    ):
        labels = f"{tensor.shape[0]} labels, not {model.width}"
        fix = f"id2label in config.json, or num_labels where it names none, has to say {labels}"
    return UserError(
        f"tensor {tensor.name} disagrees with the model's config",
        where=str(tensor.path),
        expected=f"shape {list(shape)}",
        found=f"shape {list(tensor.shape)} {tensor.dtype}",
        fix=fix,
    )


def is_of_classes(found: tuple[int, ...], expected: tuple[int, ...], classes: int) -> bool:
    """Does a tensor differ only in how many classes it is of?"""
    return len(found) == len(expected) and found[1:] == expected[1:] and expected[0] == classes


def missing(groups: Iterable[list[str]], tensors: set[str], quantized: set[str]) -> list[str]:
    """The first name of every parameter that is in the file under none of its names, and not quantized either."""
    held = {f"{path}.weight" for path in quantized} | tensors
    return [names[0] for names in groups if held.isdisjoint(names)]


def no_tensor(lost: list[str], prefix: str, facts: ModelFacts) -> UserError:
    shards = "check that all shards are there and that config.json belongs to them"
    return UserError(
        f"the checkpoint has no tensor {lost[0]}",
        where=lost[0],
        expected=f"every parameter that the config announces for {facts.name}",
        found=f"names that begin with {prefix!r}" if prefix else listed(lost[1:], "also missing"),
        fix="save the model itself, not what wraps it" if prefix else shards,
    )


def wrong_prefix(lost: list[str], tensors: Mapping[str, FileTensor]) -> str:
    """What stands in front of missing names in the file, or nothing."""
    missing = set(lost)
    for name in tensors:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in missing:
                return ".".join(parts[:i]) + "."
    return ""
