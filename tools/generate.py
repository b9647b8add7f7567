"""Generates text with a compiled artifact: `python -m tools.generate DIR --prompt TEXT`.

The whole interface is used as documented: token ids, mask, positions and past go in, logits and present come out.
Where the artifact allows it, past and present are one buffer of the maximum length, bound once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import jinja2.sandbox
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import typer
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from compiler.artifact import Artifact, find_artifact
from compiler.checkpoint import read_json
from passes.errors import UserError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def chooser(self) -> Callable[[Array], int]:
        """A function from logits [vocab] to a token id; its randomness starts from `seed`."""
        random = np.random.default_rng(self.seed)

        def choose(logits: Array) -> int:
            if self.temperature == 0:
                return int(logits.argmax())
            order = np.argsort(-logits, kind="stable")
            if self.top_k:
                order = order[: self.top_k]
            scaled = logits[order].astype(np.float64) / self.temperature
            p = np.exp(scaled - scaled.max())
            p /= p.sum()
            kept = np.cumsum(p) - p < self.top_p
            return int(random.choice(order[kept], p=p[kept] / p[kept].sum()))

        return choose


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
        from tools.engine import EngineModel

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


def end_tokens(folder: Path) -> set[int]:
    """The ids that end a text, from the generation config or the model's."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            eos = read_json(folder / name).get("eos_token_id")
            if eos is not None:
                return set(eos) if isinstance(eos, list) else {eos}
    return set()


def chat_prompt(folder: Path, message: str) -> str:
    """`message` as the first turn of a chat, by the model's own template (sandboxed: it came with the model)."""
    path = folder / "chat_template.jinja"
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    template = path.read_text("utf-8") if path.is_file() else config.get("chat_template")
    if not isinstance(template, str):
        raise UserError("the model has no chat template", where=str(folder), fix="use --prompt without --chat")
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    tokens = {key: config.get(key) for key in ("bos_token", "eos_token")}
    messages = [{"role": "user", "content": message}]
    return sandbox.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)


def stream(model: CausalLm, tokenizer: Tokenizer, prompt: str, max_tokens: int, sampling: Sampling) -> Iterator[str]:
    """The generated text in pieces that are whole characters."""
    decoder, stop = DecodeStream(skip_special_tokens=True), end_tokens(model.folder)
    for token in model.tokens(tokenizer.encode(prompt).ids, max_tokens, sampling.chooser()):
        if token in stop:
            return
        piece = decoder.step(tokenizer, token)
        if piece:
            yield piece


def float_text(folder: Path, prompt: str, max_tokens: int) -> str:
    """What transformers generates greedily from the float checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False)
    text: str = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def main(
    folder: Annotated[Path, typer.Argument(help="output folder of compile")],
    prompt: Annotated[str, typer.Option(help="the text to continue")],
    target: Annotated[str | None, typer.Option(help="which artifact, where there are several")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt through the chat template")] = False,
    max_tokens: Annotated[int, typer.Option(help="how many tokens at most")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps all")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    compare: Annotated[Path | None, typer.Option(help="float checkpoint: print what it generates, too")] = None,
) -> None:
    """Generate text with a compiled artifact, streaming it to the terminal."""
    model = open_model(folder, target)
    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    text = chat_prompt(model.folder, prompt) if chat else prompt
    if compare is not None:
        greedy = "".join(stream(model, tokenizer, text, max_tokens, Sampling()))
        print(f"float     {json.dumps(float_text(compare, text, max_tokens), ensure_ascii=False)}")
        print(f"compiled  {json.dumps(greedy, ensure_ascii=False)}")
        return
    started, count = time.monotonic(), 0
    for piece in stream(model, tokenizer, text, max_tokens, Sampling(temperature, top_k, top_p, seed)):
        print(piece, end="", flush=True)
        count += 1
    seconds = time.monotonic() - started
    print(f"\n[{count} pieces in {seconds:.2f} s]", file=sys.stderr)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
