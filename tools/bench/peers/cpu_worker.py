"""A process of `instantrt bench cpu`, or `bench formats frontier`, that holds one model and does one measurement at a
time, as its pipe says.

python cpu_worker.py KIND PATH INPUTS.npz: each line that it reads is [measurement, arguments ...] in JSON, each that it
writes [value, CPU seconds used while it waited].
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
STEPS = 32  # decoded in one measurement
FIRST = 8  # tokens before the first one
ROWS = 64  # of logits in float64 at once: a vocabulary may have 262,144 tokens
AT_ONCE = 2048  # tokens that an encoder reads in a measurement, in calls of fewer


class Measures:
    """What every model is asked for."""

    def peak(self) -> float:
        """MB of resident memory at most (Linux); getrusage would also count the process that started this one."""
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


class DecoderMeasures(Measures):
    """What a causal LM is asked for."""

    def __init__(self, kind: type[Any], path: Path, inputs: Path) -> None:
        self.model, self.ids = kind(path), np.load(inputs)["ids"]
        self.contexts: dict[tuple[int, int], Any] = {}

    def load(self) -> float:
        """Seconds from nothing but imports until there are a prompt's logits, and those of a token after it."""
        started = time.perf_counter()
        self.model.load()
        context = self.model.context(1, FIRST + STEPS)
        context.fill(self.ids[:FIRST])
        context.step(self.ids[FIRST])
        seconds = time.perf_counter() - started
        context.close()
        return seconds

    def prefill(self, length: int) -> float:
        """Tokens a second of a prompt."""
        context = self.model.context(1, length + STEPS)
        started = time.perf_counter()
        context.fill(self.ids[:length])
        seconds = time.perf_counter() - started
        context.close()
        return length / seconds

    def decode(self, length: int, rows: int = 1) -> float:
        """Tokens a second of all rows, after `length` tokens in each."""
        if (rows, length) in self.contexts:
            context = self.contexts[rows, length]
            context.rewind(length)
        else:
            context = self.contexts[rows, length] = self.model.context(rows, length + STEPS)
            context.fill(self.ids[:length])
        first, *rest = self.ids[length : length + STEPS]
        context.step(first)  # not timed: it may wake threads, or make anew what was rewound
        started = time.perf_counter()
        for token in rest:
            context.step(token)
        return rows * len(rest) / (time.perf_counter() - started)

    def loss(self, window: int, exact: str) -> list[float]:
        """Of all tokens but the first of each whole window: nats a token, the mean KL to what the folder `exact` holds,
        and the largest difference of logits from those, over the largest of those.

        The first to be asked leaves its logits [window - 1, vocab] there.
        """
        logits_of, losses, kls, apart, largest = self.model.every_position(), [], [], 0.0, 0.0
        for start in range(0, len(self.ids) - window + 1, window):
            ids = self.ids[start : start + window]
            logits, kept = logits_of(ids)[:-1], Path(exact, f"{start}.npy")
            if not kept.exists():
                np.save(kept, logits.astype(np.float32))
            known = np.load(kept, mmap_mode="r")
            for at in range(0, window - 1, ROWS):
                found, right = (each[at : at + ROWS].astype(np.float64) for each in (logits, known))
                apart, largest = max(apart, np.abs(found - right).max()), max(largest, np.abs(right).max())
                q, p = log_softmax(found), log_softmax(right)
                losses.append(-np.take_along_axis(q, ids[at + 1 : at + 1 + len(q), None], -1))
                kls.append(np.maximum((np.exp(p) * (p - q)).sum(-1), 0))  # a rounding below zero is zero
        return [*(float(np.concatenate(each).mean()) for each in (losses, kls)), float(apart / largest)]


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    less: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return less


class EncoderMeasures(Measures):
    """What an encoder is asked for."""

    def __init__(self, kind: type[Any], path: Path, inputs: Path) -> None:
        self.model, self.inputs = kind(path), np.load(inputs)

    def encode(self, ids: Array, mask: Array) -> Array:
        """Hidden states [B, S, H] of `ids [B, S]`."""
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden: Array = self.model.run({name: value for name, value in feeds.items() if name in self.model.names})
        return hidden

    def load(self) -> float:
        """Seconds from nothing but imports until there is what a short text becomes."""
        started = time.perf_counter()
        self.model.load()
        ids = self.inputs["ids"][None, :FIRST]
        self.encode(ids, np.ones_like(ids))
        return time.perf_counter() - started

    def batch(self, rows: int, tokens: int) -> float:
        """Tokens a second of calls with so many texts of so many tokens."""
        ids = np.resize(self.inputs["ids"], (rows, tokens))
        calls = max(1, AT_ONCE // ids.size)
        started = time.perf_counter()
        for _ in range(calls):
            self.encode(ids, np.ones_like(ids))
        return calls * ids.size / (time.perf_counter() - started)

    def vectors(self, out: str) -> None:
        """Writes the mean of each sentence's hidden states [sentences, H]."""
        means = []
        for ids, mask in zip(self.inputs["sentences"], self.inputs["mask"], strict=True):
            held = int(mask.sum())
            means.append(self.encode(ids[None, :held], mask[None, :held])[0].mean(0))
        np.save(out, np.array(means))


KINDS: dict[str, tuple[type[Any], str]] = {  # what is asked, and the class of cpu_models.py that answers
    "ours": (DecoderMeasures, "OurModel"),
    "llama": (DecoderMeasures, "LlamaModel"),
    "genai": (DecoderMeasures, "GenAiModel"),
    "openvino": (DecoderMeasures, "OpenVinoModel"),
    "our encoder": (EncoderMeasures, "OurEncoder"),
    "onnx encoder": (EncoderMeasures, "OnnxEncoder"),
    "openvino encoder": (EncoderMeasures, "OpenVinoEncoder"),
}


def main(kind: str, path: str, inputs: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    measures, model = KINDS[kind]
    held = measures(getattr(import_module("cpu_models"), model), Path(path), Path(inputs))
    used = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - used
        name, *arguments = json.loads(line)
        value = getattr(held, name)(*arguments)
        print(json.dumps([value, idle]), file=answers, flush=True)
        used = time.process_time()


if __name__ == "__main__":
    main(*sys.argv[1:])
