"""adapter_config.json: every key is read, harmless with the reason, or refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from instantrt.compiler.frontend.facts import ModelFacts
from instantrt.compiler.json_file import read_json
from instantrt.passes.core.errors import FOUND, UserError

CONFIG = "adapter_config.json"
MERGE = "merge it with peft: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)"
PLAIN = "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
ALL_LINEAR = "all-linear"
LONGEST = 0.1  # seconds of this process for one name, which takes microseconds
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # those that leave the base's weights as they are


def number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300  # as an integer it may be none of float's


def rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def switch(value: Any) -> bool:
    return isinstance(value, bool)


def text(value: Any) -> bool:
    return isinstance(value, str)


def one_or_several(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or of(value) or (isinstance(value, list) and all(map(of, value)))


def mapped(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(of, value.values())))


NAMES = (one_or_several(text), "a name, or a list of names")
# Key -> (its default in peft, what fits, and in words).
READ: Mapping[str, tuple[Any, Callable[[Any], bool], str]] = {
    "peft_type": (None, lambda value: value == "LORA", "LORA"),
    "base_model_name_or_path": (None, lambda value: value is None or text(value), "a name or a path"),
    "r": (8, rank, "an integer above 0"),
    "lora_alpha": (8, number, "a finite number"),
    "rank_pattern": (None, mapped(rank), "integers above 0 by names of modules"),
    "alpha_pattern": (None, mapped(number), "finite numbers by names of modules"),
    "use_rslora": (False, switch, "true or false"),
    "use_dora": (False, switch, "true or false"),
    "lora_bias": (False, switch, "true or false"),
    "ensure_weight_tying": (False, switch, "true or false"),
    "bias": ("none", lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "target_modules": (None, *NAMES),
    "exclude_modules": (None, *NAMES),
    "modules_to_save": (None, lambda value: not text(value) and one_or_several(text)(value), "a list of names"),
    "layers_to_transform": (None, one_or_several(lambda value: type(value) is int), "an integer, or a list of them"),
    "layers_pattern": (None, *NAMES),
}
HARMLESS: Mapping[str, str] = {
    "peft_version": "who wrote it",
    "auto_mapping": "the class that peft would load the base with: the base's config.json says it",
    "task_type": "the class that peft would wrap around the base, whose config.json says what it is",
    "revision": "of the base on a hub: the folder that is there counts",
    "inference_mode": "of the training",
    "lora_dropout": "of the training",
    "loftq_config": "how it was initialized: init_lora_weights says what that did to the base",
    "eva_config": "how it was initialized: init_lora_weights says what that did to the base",
    "corda_config": "how it was initialized: init_lora_weights says what that did to the base",
    "lora_ga_config": "how it was initialized: init_lora_weights says what that did to the base",
    "fan_in_fan_out": "how the base stores its matrices, which its modules say",
    "megatron_core": "peft reads it beside megatron_config alone",
    "qalora_group_size": "peft reads it beside use_qalora alone",
    "runtime_config": "where it is computed; peft ignores it in files",
}
REFUSED: Mapping[str, str] = {
    "trainable_token_indices": "rows of the embedding that are trained apart",
    "target_parameters": "LoRA on parameters that are no modules",
    "layer_replication": "layers that are there several times",
    "alora_invocation_tokens": "an adapter that only some tokens meet",
    "use_qalora": "QA-LoRA, which pools its inputs",
    "megatron_config": "layers of Megatron",
    "monteclora_config": "MonteCLoRA, which samples",
    "arrow_config": "a router of several adapters",
    "kasa_config": "KaSA, which changed the base's weights when it was initialized",
    "velora_config": "VeLoRA, which compresses activations",
    "use_bdlora": "block-diagonal LoRA",
}


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says of a LoRA: the keys of READ, with peft's defaults, and what is harmless."""

    path: Path
    said: Mapping[str, Any]
    harmless: Mapping[str, str]

    def __getitem__(self, key: str) -> Any:
        return self.said.get(key, READ[key][0])

    def rank(self, path: str) -> int:
        """The inner size of the adapter of the module at `path`."""
        found: int = self.by_pattern("rank_pattern", "r", path)
        return found

    def scale(self, path: str) -> float:
        """What multiplies B A there."""
        rank, alpha = self.rank(path), float(self.by_pattern("alpha_pattern", "lora_alpha", path))
        return alpha / (math.sqrt(rank) if self["use_rslora"] else rank)

    def by_pattern(self, patterns: str, default: str, path: str) -> Any:
        """The value of the first pattern that fits the end of `path`; else its own, or the one for all."""
        chosen: Mapping[str, Any] = self[patterns] or {}
        key = next((k for k in chosen if self.matches(rf"(.*\.)?({k})$", path)), path)
        return chosen.get(key, self[default])

    def targets(self, path: str, facts: ModelFacts) -> bool:
        """Would peft put an adapter on the module at `path`? As its `check_target_module_exists` does."""
        wanted, excluded = self["target_modules"] or [], self["exclude_modules"]
        if excluded and self.named(excluded, path):
            return False
        if any(self.matches(rf"(^|.*\.){name}($|\..*)", path) for name in self["modules_to_save"] or ()):
            return False
        if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
            return path in facts.linears and path != facts.head
        return self.named(wanted, path) and (isinstance(wanted, str) or self.in_layers(path))

    def named(self, names: str | list[str], path: str) -> bool:
        """Is `path` what the pattern says, or one of the names, or does it end in one?"""
        if isinstance(names, str):
            return self.matches(names, path, to_the_end=True) is not None
        return any(path == name or path.endswith(f".{name}") for name in names)

    def in_layers(self, path: str) -> bool:
        """Is it in one of the layers that are to be changed?"""
        wanted, lists = self["layers_to_transform"], self["layers_pattern"]
        if wanted is None or wanted == []:
            return True
        patterns = [lists] if isinstance(lists, str) else lists
        tries = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        found = next((match for t in tries if (match := self.matches(t, path))), None)
        return found is not None and int(found["idx"]) in ([wanted] if isinstance(wanted, int) else wanted)

    def matches(self, pattern: str, path: str, *, to_the_end: bool = False) -> Any:
        """What `re` would find, or nothing."""
        try:
            compiled = compile_pattern(pattern)
            return (compiled.fullmatch if to_the_end else compiled.match)(path, timeout=LONGEST)
        except TimeoutError:
            what, fix = "a pattern that takes for ever to compare with a name", "write it without repeats in repeats"
            found = shorten(f"{pattern!r}, and {path}", FOUND)
            raise UserError(what, where=str(self.path), found=found, fix=fix) from None
        except (re.error, RecursionError, OverflowError) as error:
            found = f"{shorten(repr(pattern), FOUND)}: {error}"
            raise UserError("a pattern that is no regular expression", where=str(self.path), found=found) from None


@cache
def compile_pattern(pattern: str) -> Any:
    """Of a package whose matching can be stopped; what it alone understands is refused."""
    import regex

    re.compile(pattern)
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise re.error(str(error)) from None


def read_adapter_config(path: Path) -> AdapterConfig:
    """The config at `path`; refuses what is not read and could change the model."""
    raw = read_json(path)
    for key, value in {"peft_type": None, **raw}.items():
        check(key, value, str(path))
    said = {key: value for key, value in raw.items() if key in READ}
    return AdapterConfig(path, said, dict(harmless(raw)))


def check(key: str, value: Any, where: str) -> None:
    if key in READ:
        _, fits, words = READ[key]
        if not fits(value):
            fix = MERGE if key == "peft_type" else "copy the adapter again"
            raise UserError(f"{key} of the adapter", where=where, expected=words, found=repr(value)[:200], fix=fix)
    elif key == "init_lora_weights":
        if value not in INITS:
            what = "the adapter changed its base's weights when it was initialized"
            raise UserError(what, where=where, found=f"{key}: {value!r}"[:200], fix=PLAIN)
    elif key not in HARMLESS and value:
        what = REFUSED.get(key, "nobody here knows what it does")
        raise UserError(
            f"{key} of the adapter is not supported: {what}", where=where, found=repr(value)[:200], fix=MERGE
        )


def harmless(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, why) of those that are on and not read."""
    for key, value in raw.items():
        if key == "init_lora_weights":
            yield key, "how it was initialized, which left the base's weights as they were"
        elif key not in READ and value:
            yield key, HARMLESS[key]
