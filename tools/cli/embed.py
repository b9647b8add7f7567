"""Vectors of texts by a compiled artifact: `instantrt embed DIR --text TEXT`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from instantrt.passes.core.errors import UserError
from instantrt.tools.cli.console import console
from instantrt.tools.cli.options import Folder, Which, say_which

Given = Annotated[list[str] | None, typer.Option(help="a text; may be repeated")]
Lines = Annotated[Path | None, typer.Option(help="a file in UTF-8 with a text in each line")]
Threads = Annotated[int, typer.Option(min=0, help="0 is one a core")]
TABLE = 10  # texts that a table of all pairs has room for
SHOWN = 24  # characters of a text
PART = 256  # texts from one step of the progress to the next


def main(
    folder: Folder,
    text: Given = None,
    file: Lines = None,
    target: Which = None,
    prompt: Annotated[str | None, typer.Option(help="the name of one of the model's prompts")] = None,
    out: Annotated[Path | None, typer.Option(help="the vectors as a NumPy file: float32 [texts, width]")] = None,
    threads: Threads = 0,
) -> None:
    """Writes the vectors, or prints how alike a few texts are: the cosine of each pair."""
    import numpy as np

    from instantrt.compiler.encoder import Embedder

    texts = texts_of(text, file)
    if out is None and len(texts) > TABLE:
        raise UserError("many texts, and no file for their vectors", found=f"{len(texts)} texts", fix="--out FILE.npy")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        found = "a folder" if out.is_dir() else f"no folder {out.parent}"
        raise UserError("not a file that can be written", where=str(out), found=found, fix="--out FILE.npy")
    with Embedder(folder, target, threads=threads) as model:
        say_which(folder, target, model.artifact)
        vectors = np.zeros((len(texts), model.width), np.float32)
        for part in with_progress(range(0, len(texts), PART), len(texts)):
            vectors[part : part + PART] = model.encode(texts[part : part + PART], prompt_name=prompt)
    if out is not None:
        try:
            with open(out, "wb") as opened:
                np.save(opened, vectors)
        except OSError as error:
            if out.is_file():
                out.unlink()
            found = error.strerror or str(error)
            raise UserError("the vectors could not be written", where=str(out), found=found) from None
        print(f"{out}: {len(vectors)} vectors of {vectors.shape[1]} numbers")
    else:
        show_alike(texts, vectors)


def texts_of(given: list[str] | None, file: Path | None) -> list[str]:
    """What the command line says, then every line of a file, empty ones too: vectors are found by their lines."""
    texts = list(given or ())
    if file is not None:
        try:
            texts += file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("the texts cannot be read", where=str(file), found=str(error)) from None
    if not texts:
        raise UserError("no text", where=str(file) if file is not None else "", fix="--text TEXT, or --file FILE")
    return texts


def with_progress(steps: Sequence[int], total: int) -> Any:
    """The steps, with a bar and texts a second where there are several; what it came to is said last."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    began = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    with Progress(*columns, console=console, transient=True, disable=len(steps) < 2) as progress:
        task = progress.add_task("texts", total=total, rate="")
        for step in steps:
            yield step
            done = min(step + PART, total)
            rate = f"{done / max(time.monotonic() - began, 1e-9):.0f} texts/s"
            progress.update(task, completed=done, rate=rate)
    if len(steps) > 1:
        console.print(f"{total} texts, {total / (time.monotonic() - began):.0f} a second")


def show_alike(texts: list[str], vectors: Any) -> None:
    """The cosine of each pair of a few texts; of one text the vector itself."""
    if len(texts) == 1:
        print(" ".join(f"{value:.6g}" for value in vectors[0]))
        return
    import numpy as np

    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    table = Table("", *(str(index + 1) for index in range(len(texts))), title="cosines")
    for index, (text, row) in enumerate(zip(texts, unit @ unit.T, strict=True), 1):
        short = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
        table.add_row(f"{index} {short}", *(f"{value:.2f}" for value in row))
    console.print(table)
