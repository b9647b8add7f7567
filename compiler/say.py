"""Whom a stage that begins tells what it does."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
