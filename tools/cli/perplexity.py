"""Prints the perplexity of a model on a text: `instantrt perplexity DIR`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from instantrt.tools.cli.generate import check_float
from instantrt.tools.cli.options import Which, say_which


def main(
    folder: Annotated[Path, typer.Argument(help="output folder of compile, or a float checkpoint")],
    text: Annotated[Path, typer.Option(help="the text")] = Path("examples/text/evaluation.txt"),
    target: Which = None,
    window: Annotated[int, typer.Option(min=2, help="tokens that see one another")] = 256,
) -> None:
    """Prints one JSON object."""
    from instantrt.compiler.accuracy.perplexity import (
        artifact_logits,
        longest_of,
        perplexity_of,
        text_windows,
        transformers_logits,
    )
    from instantrt.compiler.artifact.manifest import MANIFEST, find_artifact
    from instantrt.compiler.here import runs_on_cpu

    if (folder / MANIFEST).is_file():
        artifact = find_artifact(folder, target, runs_on_cpu)
        say_which(folder, target, artifact)
        logits = artifact_logits(folder, artifact.target)
        parts = text_windows((folder / artifact.path).parent, text, artifact.longest, window)
    else:
        check_float(folder)
        logits, parts = transformers_logits(folder), text_windows(folder, text, longest_of(folder), window)
    value = perplexity_of(logits, parts)
    print(json.dumps({"model": str(folder), "tokens": sum(p.shape[1] for p in parts), "perplexity": round(value, 4)}))
