"""A sentence-transformers pipeline: the modules that follow a language model, and how texts are prepared for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from instantrt.passes.core.errors import UserError


@dataclass(frozen=True)
class SentenceModule:
    """One module behind the language model: its kind, the folder it has, and what of its config matters."""

    kind: str
    path: str = ""
    modes: tuple[str, ...] = ()  # of Pooling
    sizes: tuple[int, int] = (0, 0)  # (in, out) of Dense; (width, width) of LayerNorm; (0, width) of Truncate
    bias: bool = True
    activation: str = "Identity"

    @property
    def name(self) -> str:
        """Its path as torch names it, where a dot is between a module and one in it."""
        return self.path.replace(".", "//")

    def width(self, given: int) -> int:
        """Numbers that it makes of `given`; UserError where it takes another count, or keeps none or too many."""
        takes, gives = self.sizes
        if takes not in (0, given) or (self.kind == "Truncate" and not 0 < gives <= given):
            raise UserError(
                f"{self.kind} of a sentence-transformers pipeline does not fit the module before it",
                where=self.path or f"truncate_dim {gives}",
                expected=f"{takes} numbers" if takes else f"1 to {given}",
                found=f"{given} numbers" if takes else str(gives),
            )
        return given * len(self.modes) if self.kind == "Pooling" else self.sizes[1] or given


@dataclass(frozen=True)
class SentencePipeline:
    """What a sentence-transformers folder says: the language model's own folder, modules, and the settings of texts."""

    folder: Path
    modules: tuple[SentenceModule, ...]
    max_length: int = 0
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""

    def about(self) -> list[dict[str, Any]]:
        """What the graph depends on."""
        return [asdict(module) for module in self.modules]

    def width(self, hidden: int) -> int:
        """Numbers of an embedding, where the language model gives `hidden` a token."""
        for module in self.modules:
            hidden = module.width(hidden)
        return hidden
