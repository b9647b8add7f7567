"""Labels of texts by a compiled artifact: `instantrt classify DIR --text TEXT`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from instantrt.tools.cli.console import console
from instantrt.tools.cli.embed import SHOWN, Given, Lines, Threads, texts_of
from instantrt.tools.cli.options import Folder, Which, say_which


def main(
    folder: Folder,
    text: Given = None,
    file: Lines = None,
    target: Which = None,
    top: Annotated[int, typer.Option(min=1, help="how many labels at most")] = 3,
    threads: Threads = 0,
) -> None:
    """Prints the best labels of each text with their scores."""
    from instantrt.compiler.encoder import Classifier

    texts = texts_of(text, file)
    with Classifier(folder, target, threads=threads) as model:
        say_which(folder, target, model.artifact)
        found = model.classify(texts)
    table = Table("text", "labels")
    for each, labels in zip(texts, found, strict=True):
        short = each if len(each) <= 2 * SHOWN else each[: 2 * SHOWN - 1] + "…"
        table.add_row(short, ", ".join(f"{label} {score:.3f}" for label, score in list(labels.items())[:top]))
    console.print(table)
