"""Generates text with a compiled artifact: `instantrt generate DIR --prompt TEXT`.

The whole interface is used as documented: token ids, mask, positions and past go in, logits and present come out.
Where the artifact allows it, past and present are one buffer of the maximum length, bound once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Protocol

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import typer

from instantrt.compiler.artifact.manifest import Artifact, find_artifact
from instantrt.compiler.serving.runtime.sampling import Sampler, Sampling
from instantrt.compiler.serving.runtime.text import Detokenizer, Text
from instantrt.passes.core.errors import UserError, require

Array = npt.NDArray[Any]


class Model:
    """A causal LM artifact for a CPU, driven through ONNX Runtime."""

    def __init__(self, folder: Path, target: str | None = None, threads: int = 0) -> None:
        self.artifact: Artifact = find_artifact(folder, target)
        if self.artifact.kind != "onnx" or self.artifact.llm is None:
            raise UserError("not a causal LM for ONNX Runtime", where=str(folder), found=self.artifact.kind)
        self.folder = (folder / self.artifact.path).parent
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle cores belong to others
        path = folder / self.artifact.path
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def tokens(self, prompt: list[int], max_tokens: int, choose: Callable[[Array], int]) -> Iterator[int]:
        """The tokens that follow `prompt`, one by one; the caller stops at an end token."""
        if not prompt:
            raise UserError("the prompt is empty")
        llm = self.artifact.llm or {}
        limit = llm["max_length"] or len(prompt) + max_tokens
        if len(prompt) >= limit:
            raise UserError("the prompt is too long", expected=f"at most {limit - 1} tokens", found=str(len(prompt)))
        length = min(limit, len(prompt) + max_tokens)
        cache = Cache(self.session, llm, length, shared=self.artifact.limits["cache"] == "shared")
        step, done = prompt, 0
        while True:
            logits = cache.run(np.array([step], np.int64), done)
            done += len(step)
            token = choose(logits[0, -1])
            yield token
            if done >= length or done - len(prompt) + 1 >= max_tokens:
                return
            step = [token]


class CausalLm(Protocol):
    """What can be asked for tokens."""

    folder: Path

    def tokens(self, prompt: list[int], max_tokens: int, choose: Callable[[Array], int]) -> Iterator[int]:
        """The tokens that follow `prompt`."""
        ...


def open_model(folder: Path, target: str | None) -> CausalLm:
    """The artifact's runner: ONNX Runtime on this CPU, or an engine on this machine's GPU."""
    artifact = find_artifact(folder, target)
    if artifact.kind == "engine":
        from instantrt.tools.engine import EngineModel

        return EngineModel(folder, artifact)
    return Model(folder, target)


class Cache:
    """The keys and values of one sequence, in one buffer a layer where the artifact allows it."""

    def __init__(self, session: ort.InferenceSession, llm: Any, length: int, *, shared: bool) -> None:
        self.session, self.shared = session, shared
        self.parts = [f"{i}.{part}" for i in range(llm["layers"]) for part in ("key", "value")]
        shape = (1, llm["kv_heads"], length if shared else 0, llm["head_dim"])
        self.past = [ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for _ in self.parts]

    def run(self, ids: Array, done: int) -> Array:
        """logits [1, S, vocab] of new tokens [1, S] after `done` old ones."""
        sequence = ids.shape[1]
        binding = self.session.io_binding()
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((1, done + sequence), np.int64),
            "position_ids": np.arange(done, done + sequence, dtype=np.int64)[None],
        }
        for name, values in feeds.items():
            binding.bind_cpu_input(name, values)
        binding.bind_output("logits")
        for part, value in zip(self.parts, self.past, strict=True):
            binding.bind_ortvalue_input(f"past_key_values.{part}", value)
            if self.shared:
                binding.bind_ortvalue_output(f"present.{part}", value)
            else:
                binding.bind_output(f"present.{part}")
        self.session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        if not self.shared:
            self.past = outputs[1:]
        logits: Array = outputs[0].numpy()
        return logits


def stream(
    model: CausalLm, text: Text, prompt: list[int], max_tokens: int, sampling: Sampling
) -> Iterator[tuple[str, int]]:
    """The generated text in pieces that are whole characters, each with the number of tokens so far."""
    pieces, count = Detokenizer(text.tokenizer, stop_words=()), 0
    for token in model.tokens(prompt, max_tokens, Sampler(sampling, prompt).choose):
        count += 1
        if token in text.end_tokens:
            break
        yield pieces.add(token), count
    yield pieces.finish(), count


def float_text(folder: Path, prompt: list[int], max_tokens: int) -> str:
    """What transformers generates greedily from the float checkpoint."""
    require("hf", "--compare")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return str(AutoTokenizer.from_pretrained(folder).decode(out[0, len(prompt) :], skip_special_tokens=True))


def main(
    folder: Annotated[Path, typer.Argument(help="output folder of compile")],
    prompt: Annotated[str, typer.Option(help="the text to continue")],
    target: Annotated[str | None, typer.Option(help="which artifact, where there are several")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt through the chat template")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="how many tokens at most")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps all")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    compare: Annotated[Path | None, typer.Option(help="float checkpoint: print what it generates, too")] = None,
) -> None:
    """Generate text with a compiled artifact, streaming it to the terminal."""
    model = open_model(folder, target)
    text = Text(model.folder)
    try:
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        ids = text.chat(json.dumps([{"role": "user", "content": prompt}])) if chat else text.encode(prompt)
    except ValueError as error:
        raise UserError(str(error)) from None
    if compare is not None:
        greedy = "".join(piece for piece, _ in stream(model, text, ids, max_tokens, Sampling()))
        print(f"float     {json.dumps(float_text(compare, ids, max_tokens), ensure_ascii=False)}")
        print(f"compiled  {json.dumps(greedy, ensure_ascii=False)}")
        return
    started, count = time.monotonic(), 0
    for piece, made in stream(model, text, ids, max_tokens, sampling):
        print(piece, end="", flush=True)
        count = made
    seconds = time.monotonic() - started
    print(f"\n[{count} tokens in {seconds:.2f} s]", file=sys.stderr)
