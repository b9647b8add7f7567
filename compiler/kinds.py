"""Refuses, in Python, what a command line or JSON cannot say: a word for a number, nothing for a path."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from instantrt.passes.core.errors import FOUND, UserError

KINDS: Mapping[Any, tuple[type, ...]] = {  # a number may be NumPy's
    bool: (bool,),
    int: (Integral,),
    float: (Real,),
    str: (str,),
    Path: (str, os.PathLike),
    type(None): (type(None),),
}


def check_kind(name: str, value: Any, *types: Any) -> None:
    """Refuses a value that is of none of `types`: keys of KINDS, a Literal, tuple[X, ...] or Mapping."""
    if not any(fits(value, kind) for kind in types):
        expected = " or ".join(called(kind) for kind in types)
        raise UserError(f"{name} has a value of another kind", expected=expected, found=repr(value)[:FOUND])


def fits(value: Any, kind: Any) -> bool:
    """May `value` stand where a `kind` is due? One stands for a tuple of one; a Literal has a list of its own."""
    origin = get_origin(kind)
    if origin is tuple:
        (each, _) = get_args(kind)
        several = isinstance(value, Collection) and not isinstance(value, bytes | Mapping)
        return fits(value, each) or (several and all(fits(item, each) for item in value))
    if origin is Mapping:
        return isinstance(value, Mapping)
    if isinstance(value, bool) and kind is not bool and origin is not Literal:  # True is an int in Python
        return False
    return origin is Literal or isinstance(value, KINDS[kind])


def called(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is tuple:
        return f"{get_args(kind)[0].__name__}, one or several"
    return "nothing" if kind is type(None) else (origin or kind).__name__
