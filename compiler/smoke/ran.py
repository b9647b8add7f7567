"""What the smoke run says of an artifact: Ran, or a SmokeError."""

from __future__ import annotations

from dataclasses import dataclass

from instantrt.compiler.accuracy.bounds import Bound
from instantrt.compiler.smoke.compare import Distance
from instantrt.passes.core.errors import UserError


class SmokeError(UserError):
    """An artifact that does not run, or is not what it was made of. Nothing was written."""


@dataclass(frozen=True)
class Ran:
    """One target: its answer that came closest to the bound, of no step where none was compared, and notes on it.

    limit   what `bound` explains of that answer
    """

    target: str
    distance: Distance
    bound: Bound
    limit: float = 0.0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_kb: int = 0

    def __str__(self) -> str:
        return "\n  ".join((f"{self.target}: ran{self.how()}", *self.notes))

    def how(self) -> str:
        d = self.distance
        if not d.step:
            return ""
        if not d.relative:
            return "; no difference from the twin"
        return f"; relative error to the twin {d.relative:.0e}, bound {self.limit:.0e} ({self.bound.name})"


def ort_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
