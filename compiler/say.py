"""Whom a stage that begins tells what it does."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]


class At(str):
    """What the stage under way is at: no other one begins. May be said as often as it changes."""

    __slots__ = ()
