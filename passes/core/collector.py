"""What the garbage collector need not look at: graphs, and all that torch is, hold millions of objects in cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector: it finds nothing in a graph, and takes a third of the passes' time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def settled() -> Iterator[None]:
    """The garbage collector leaves alone what there is now: it would look through all of torch, again and again."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
