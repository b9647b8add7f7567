"""What may be seen of a compilation while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instantrt.compiler.accuracy.verify import Verdict
    from instantrt.compiler.plan import Plan
    from instantrt.compiler.serving.config import Served
    from instantrt.compiler.smoke.ran import Ran


class Watch:
    """What may be seen of a compilation while it runs. Nothing here looks: override what you want to."""

    def say(self, text: str) -> None:
        """A stage begins, or, where `text` is an At, is there."""

    def planned(self, plan: Plan) -> None:
        """Everything is decided, and nothing written."""

    def writing(self, total: int) -> None:
        """A stage begins: `total` bytes of weights will be written."""

    def progress(self, name: str, size: int) -> None:
        """`size` more of them are, of the tensor `name`."""

    def ran(self, ran: Ran) -> None:
        """An artifact ran once, and is what it was made of."""

    def verdicts(self, verdicts: Sequence[Verdict]) -> None:
        """The artifacts were verified."""

    def served(self, served: Sequence[Served]) -> None:
        """The Triton repository was staged."""


SILENT = Watch()
