"""The tensors of a base with those of an adapter: replaced where it brings them whole, and summed where it is LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from instantrt.compiler.frontend.account import attempt
from instantrt.compiler.frontend.adapter.config import MERGE
from instantrt.compiler.frontend.adapter.folder import Adapter
from instantrt.compiler.frontend.facts import ModelFacts, Shape
from instantrt.compiler.frontend.known_tensors import listed
from instantrt.compiler.frontend.merged import MergedTensor
from instantrt.compiler.frontend.pieces import FLOATS, Piece
from instantrt.compiler.frontend.side_files import Report
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FileTensor

PREFIX = "base_model.model."
LORA = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)")
ANOTHER = "the adapter is for another base"
Parts = dict[str, FileTensor]


def adapted(pieces: Sequence[Piece], facts: ModelFacts, adapter: Adapter, report: Report) -> list[Piece]:
    """`pieces` with the adapter; what it unties is there under its own name. `report` is told what is wrong."""
    loras, whole = sorted_out(adapter, facts, report)
    for error in (*wrong_targets(adapter, facts, loras), *unsaved(adapter, facts, whole)):
        report(error)
    before: dict[str, FileTensor] = {}
    for piece in pieces:
        before.setdefault(piece.name, piece.tensor)
    now = dict(before)
    touched = {*whole, *(f"{path}.weight" for path in loras)}
    for names in facts.groups:  # of one parameter: each has its own from here on
        first = next((now[name] for name in names if name in now), None)
        if first is not None and touched.intersection(names):
            now.update({name: first for name in names if name not in now})
    for name, tensor in whole.items():
        tied = [n for n, held in now.items() if held is now.get(name) and n not in whole]
        now.update(dict.fromkeys([name] if saved(adapter, name) else [name, *tied], tensor))
    for path, parts in loras.items():
        now.update(attempt(report, merged, path, parts, now, adapter, facts) or {})
    # A second piece of the same name stays: the account tells of it.
    own = [replace(p, tensor=now[p.name]) if p.tensor is before[p.name] else p for p in pieces]
    return own + [Piece(name, name, tensor) for name, tensor in now.items() if name not in before]


def sorted_out(adapter: Adapter, facts: ModelFacts, report: Report) -> tuple[dict[str, Parts], dict[str, FileTensor]]:
    """(the LoRA tensors of each module by its path, the parameters that the adapter brings whole)."""
    loras: dict[str, Parts] = {}
    whole: dict[str, FileTensor] = {}
    lost: list[str] = []
    for name, tensor in adapter.tensors.items():
        inner = name.removeprefix(PREFIX)
        found, plain = LORA.fullmatch(inner), inner.replace(".base_layer.", ".")
        if tensor.dtype not in FLOATS:
            report(bad_tensor(tensor, "is not a float tensor", "a float type", str(tensor.dtype)))
        elif found is not None and f"{found[1]}.weight" in facts.parameters:
            if loras.setdefault(found[1], {}).setdefault(found[2], tensor) is not tensor:
                lost.append(name)
        elif plain not in facts.parameters or plain in whole:
            lost.append(name)
        elif tensor.shape != facts.parameters[plain]:
            report(other_size(tensor, facts.parameters[plain]))
        else:
            whole[plain] = tensor
    if lost:
        report(
            UserError(
                f"nothing in the base takes tensor {lost[0]} of the adapter",
                where=str(adapter.files[1]),
                expected=f"names of {facts.name}'s modules behind {PREFIX!r}, as peft saves a LoRA",
                found=listed(lost[1:], "others") or lost[0],
                fix=f"pass the base that the adapter was trained on; or {MERGE}",
            )
        )
    return loras, whole


def bad_tensor(tensor: FileTensor, what: str, expected: str, found: str) -> UserError:
    fix = "pass the base that the adapter was trained on, or copy the adapter again"
    where = str(tensor.path)
    return UserError(
        f"tensor {tensor.name} of the adapter {what}", where=where, expected=expected, found=found, fix=fix
    )


def other_size(tensor: FileTensor, shape: Shape) -> UserError:
    """Of a parameter that the adapter brings whole."""
    found = f"shape {list(tensor.shape)}"
    if len(shape) == 2 and tensor.shape[1:] == shape[1:]:
        return UserError(
            f"the adapter brings {tensor.name} with another number of rows: its vocabulary was resized",
            where=str(tensor.path),
            expected=f"shape {list(shape)}, as config.json of the base announces",
            found=found,
            fix=f"resize the base first (resize_token_embeddings), or {MERGE}",
        )
    return bad_tensor(tensor, f"has another shape: {ANOTHER}", f"shape {list(shape)}", found)


def wrong_targets(adapter: Adapter, facts: ModelFacts, loras: Mapping[str, Parts]) -> Iterator[UserError]:
    """Modules that the config targets and the file has nothing of, and the other way around."""
    config = adapter.config
    if config["target_modules"] is None and loras:  # of old files: peft then goes by the base's family
        return
    modules = {name.removesuffix(".weight") for name, shape in facts.parameters.items() if len(shape) == 2}
    targets = {path for path in modules if config.targets(path, facts)}
    if config["ensure_weight_tying"]:  # what is tied to a target has its tensors, too
        groups = [{name.removesuffix(".weight") for name in names} for names in facts.groups]
        targets.update(path for paths in groups if paths & targets for path in paths)
    absent, strange = sorted(targets - set(loras)), sorted(set(loras) - targets)
    if not targets:
        yield UserError(
            "the adapter targets no module of the base",
            where=str(config.path),
            expected=f"modules of {facts.name}",
            found=f"target_modules {config['target_modules']!r}"[:200],
            fix="pass the base that the adapter was trained on",
        )
    elif absent or strange:
        yield UserError(
            f"the adapter has {'no' if absent else 'LoRA'} tensors of {(absent or strange)[0]}",
            where=str(adapter.files[1]),
            expected="those of the modules that target_modules and its kin say",
            found=listed((absent or strange)[1:], "others, too"),
            fix="pass the base that the adapter was trained on, or copy the adapter again",
        )


def unsaved(adapter: Adapter, facts: ModelFacts, whole: Mapping[str, FileTensor]) -> Iterator[UserError]:
    """Parameters that the config says the adapter brings whole, and the file has not."""
    biased = adapter.config["bias"]
    for name in facts.parameters:
        path, _, leaf = name.rpartition(".")
        trained = leaf == "bias" and (biased == "all" or (biased != "none" and adapter.config.targets(path, facts)))
        if (trained or saved(adapter, name)) and name not in whole:
            why = f"bias: {biased}" if trained else "modules_to_save"
            yield UserError(
                f"the adapter has no tensor {name}", where=str(adapter.files[1]), expected=f"what {why} says"
            )
            return


def saved(adapter: Adapter, name: str) -> bool:
    """Is a parameter in one of `modules_to_save`, which are copies: what is tied to the module is not?"""
    ends = adapter.config["modules_to_save"] or []
    modules = [name[:i] for i, letter in enumerate(name) if letter == "."]
    return any(module.endswith(end) for module in modules for end in ends)


def merged(
    path: str, parts: Parts, now: Mapping[str, FileTensor], adapter: Adapter, facts: ModelFacts
) -> dict[str, FileTensor]:
    """The parameters of a module with its LoRA, by name."""
    config, embedding, weight = adapter.config, path not in facts.linears, f"{path}.weight"
    a, b, bias = "lora_A.weight", "lora_B.weight", "lora_B.bias"
    if embedding:
        a, b = "lora_embedding_A", "lora_embedding_B"
    wanted = {
        a,
        b,
        *(["lora_magnitude_vector"] * config["use_dora"]),
        *([bias] * (config["lora_bias"] and not embedding)),
    }
    if set(parts) != wanted:
        raise UserError(
            f"the adapter of {path} is not whole",
            where=str(adapter.files[1]),
            expected=", ".join(sorted(wanted)),
            found=", ".join(sorted(parts)),
            fix="copy the adapter again, or correct use_dora and lora_bias",
        )
    shape, rank, scale = facts.parameters[weight], config.rank(path), config.scale(path)
    turned = embedding or path in facts.turned
    outputs, inputs = reversed(shape) if turned else shape
    sizes = {a: (rank, inputs), b: (outputs, rank), bias: (outputs,), "lora_magnitude_vector": (outputs,)}
    for part, tensor in parts.items():
        if tensor.shape != sizes[part]:
            what = f"has another shape: {ANOTHER}, or of another rank"
            raise bad_tensor(tensor, what, f"shape {list(sizes[part])}, rank {rank}", f"shape {list(tensor.shape)}")
    base = now.get(weight)
    if base is None or base.dtype not in FLOATS or base.shape != shape:  # told with the other parameters
        return {}
    left, right = (parts[a], parts[b]) if turned else (parts[b], parts[a])
    magnitude = parts.get("lora_magnitude_vector")
    sums: dict[str, FileTensor] = {
        weight: MergedTensor.over(base, left, right, scale, turned=turned, magnitude=magnitude)
    }
    if bias in parts:
        if f"{path}.bias" not in now:
            raise bad_tensor(parts[bias], "has no bias of the base to be added to", f"{path}.bias", "none")
        sums[f"{path}.bias"] = MergedTensor.over(now[f"{path}.bias"], parts[bias], None, scale)
    return sums
