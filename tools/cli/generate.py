"""Generates text with a compiled artifact: `instantrt generate DIR --prompt TEXT`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from instantrt.passes.core.errors import UserError, require, tried
from instantrt.tools.cli.options import Folder, Which, say_which

if TYPE_CHECKING:
    from instantrt.compiler.llm import Generation, Prompt


def check_float(folder: Path) -> None:
    """Refuses what transformers loads no float model from, before anything is generated."""
    from instantrt.compiler.frontend.gguf import refuse_gguf

    require("hf", "running a float checkpoint")
    refuse_gguf(folder)
    if not (folder / "config.json").is_file():
        found = "no config.json" if folder.is_dir() else "no such folder"
        raise UserError("no float checkpoint here", where=str(folder), expected="a folder of transformers", found=found)


def float_text(folder: Path, prompt: list[int], max_tokens: int) -> str:
    """What transformers generates greedily from the float checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tried("loading the float model with transformers", where=str(folder)):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return str(AutoTokenizer.from_pretrained(folder).decode(out[0, len(prompt) :], skip_special_tokens=True))


def main(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="the text to continue")],
    target: Which = None,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt through the chat template")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="how many tokens at most")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps all")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU: 0 is one a core")] = 0,
    spinning: Annotated[
        bool | None, typer.Option("--spinning/--no-spinning", help="CPU: idle threads keep their cores between steps")
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="float checkpoint: print what it generates, too")] = None,
) -> None:
    """Streams the text to the terminal, and says last how long it took."""
    from instantrt.compiler.llm import LLM

    if compare is not None:
        check_float(compare)
    given: Prompt = [{"role": "user", "content": prompt}] if chat else prompt
    with LLM(folder, target, threads=threads, spinning=spinning) as llm:
        say_which(folder, target, llm.artifact)
        if compare is not None:
            greedy = llm.generate(given, max_tokens=max_tokens)
            print(f"float     {json.dumps(float_text(compare, llm.encode(given), max_tokens), ensure_ascii=False)}")
            print(f"compiled  {json.dumps(greedy.text, ensure_ascii=False)}")
            return
        started = time.monotonic()
        generation = llm.submit(
            given, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        for piece in generation:
            print(piece, end="", flush=True)
    print(f"\n[{took(generation, started)}]", file=sys.stderr)


def took(generation: Generation, started: float) -> str:
    """Tokens and seconds, and the rates before and after the first piece of text, which may have several tokens."""
    (first, with_it), (last, _) = generation.times[0], generation.times[-1]
    made = len(generation.tokens)
    words = [f"{made} token{'' if made == 1 else 's'} in {last - started:.2f} s"]
    words += [f"{generation.prompt_tokens / (first - started):.0f} tokens/s of the prompt"] if first > started else []
    words += [f"{(made - with_it) / (last - first):.0f} tokens/s after it"] if made > with_it and last > first else []
    return ", ".join(words)
