"""What an engine of ours says of two rows of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

PROMPT, TOKENS = 12, 3


def rows_of(engine: Any) -> list[npt.NDArray[Any]]:
    """A prompt in two pieces, one beside it, steps of both."""
    out = [engine.prefill(0, np.arange(5, 5 + PROMPT - 4), 0), engine.prefill(0, np.arange(40, 44), PROMPT - 4)]
    out.append(engine.prefill(1, np.arange(90, 97), 0))
    for step in range(TOKENS):
        out.extend(engine.decode(np.array([7, 8]) + step, np.array([PROMPT, 7]) + step).copy())
    return out
