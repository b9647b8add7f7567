"""A process that holds one model for `instantrt bench cpu` and does one measurement at a time, as its pipe says.

python cpu_worker.py make KIND MODEL OUT ...   writes what a peer runs, from a checkpoint
python cpu_worker.py KIND PATH IDS             loads, and answers lines of JSON: [measurement, arguments ...]

It runs where the peer is installed, so it imports nothing of ours, but for our own artifacts. An answer is its value
and the seconds of CPU that this process used since the last one: of an idle worker there should be none.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

THREADS = 2
STEPS = 32  # decoded in one measurement
FIRST = 8  # tokens of the prompt that a first token follows


class Ours:
    """An artifact of `instantrt compile`, on the engine that `LLM` runs."""

    rows, length = 8, 1024 + 2 * STEPS

    def __init__(self, path):
        import instantrt.compiler.serving.runtime.onnx_engine  # noqa: F401  # else its import is timed
        from instantrt.compiler.llm import LLM

        self.path = path
        self.llm = LLM(path, max_batch=self.rows, max_length=self.length, threads=THREADS)

    def load(self):
        self.engine = self.llm.load()

    def context(self, rows, length):
        return OurContext(self.engine, rows)

    def every(self):
        """ids [S] -> logits [S, vocab]"""
        from instantrt.compiler.accuracy.perplexity import artifact_logits

        logits = artifact_logits(self.path)
        return lambda ids: logits(ids[None])[0]


class OurContext:
    """The first rows of the engine's cache: contexts share them, as a shorter one is the beginning of a longer one."""

    def __init__(self, engine, rows):
        self.engine, self.rows = engine, rows

    def fill(self, ids):
        for row in range(self.rows):
            self.engine.prefill(row, ids, 0)
        self.done = np.full(self.rows, len(ids))

    def rewind(self, length):
        self.done = np.full(self.rows, length)

    def step(self, token):
        self.engine.decode(np.full(self.rows, token), self.done)
        self.done = self.done + 1


class LlamaCpp:
    def __init__(self, path):
        import llama_cpp

        self.lib, self.path = llama_cpp, path

    def load(self):
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(os.fsencode(self.path), self.lib.llama_model_default_params())

    def context(self, rows, length):
        return LlamaContext(self.lib, self.model, rows, length)

    def every(self):
        self.load()
        vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        context = LlamaContext(self.lib, self.model, 1, 512)

        def logits(ids):
            context.clear()
            context.run([(token, i, 0, True) for i, token in enumerate(ids)])
            found = self.lib.llama_get_logits(context.handle)
            return np.ctypeslib.as_array(found, (len(ids), vocab)).copy()

        return logits


class LlamaContext:
    def __init__(self, lib, model, rows, length):
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = rows * length, rows
        params.n_batch = params.n_ubatch = 512
        params.n_outputs_max = 512
        params.n_threads = params.n_threads_batch = THREADS
        self.lib, self.rows, self.handle = lib, rows, lib.llama_init_from_model(model, params)
        self.batch = lib.llama_batch_init(512, 0, 1)

    def clear(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.handle), True)

    def run(self, tokens):
        """(token, position, row, whether its logits are wanted) of at most 512"""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), position, 1
            batch.seq_id[i][0], batch.logits[i] = row, wanted
        status = self.lib.llama_decode(self.handle, batch)
        assert status == 0, status

    def fill(self, ids):
        self.clear()
        for row in range(self.rows):
            for start in range(0, len(ids), 512):
                part = ids[start : start + 512]
                self.run([(t, start + i, row, start + i == len(ids) - 1) for i, t in enumerate(part)])
        self.done = len(ids)

    def rewind(self, length):
        for row in range(self.rows):
            self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.handle), row, length, -1)
        self.done = length

    def step(self, token):
        self.run([(token, self.done, row, True) for row in range(self.rows)])
        self.lib.llama_get_logits_ith(self.handle, 0)  # waits
        self.done += 1


class GenAi:
    def __init__(self, path):
        import onnxruntime_genai

        self.lib, self.path = onnxruntime_genai, path

    def load(self):
        config = self.lib.Config(str(self.path))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
        self.model = self.lib.Model(config)

    def context(self, rows, length):
        return GenAiContext(self.lib, self.model, rows, length)

    def every(self):
        self.load()

        def logits(ids):
            context = GenAiContext(self.lib, self.model, 1, 512)
            context.fill(ids)
            return context.generator.get_output("logits")[0]

        return logits


class GenAiContext:
    def __init__(self, lib, model, rows, length):
        self.rows = rows
        params = lib.GeneratorParams(model)
        params.set_search_options(max_length=length, batch_size=rows)
        self.new = lambda: lib.Generator(model, params)
        self.generator = self.new()

    def fill(self, ids):
        if self.generator.token_count():
            self.generator = self.new()
        self.ids = ids
        self.generator.append_tokens(np.tile(ids, (self.rows, 1)).astype(np.int32))

    def rewind(self, length):
        if self.rows > 1:  # it rewinds one row only
            self.fill(self.ids)
        else:
            self.generator.rewind_to(length)

    def step(self, token):
        self.generator.append_tokens(np.full((self.rows, 1), token, np.int32))


class OpenVino:
    def __init__(self, path):
        import openvino

        self.lib, self.path = openvino, path

    def load(self, every=False):
        core = self.lib.Core()
        model = core.read_model(self.path / "openvino_model.xml")
        if not every:
            last_position(model)
        self.model = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"})

    def context(self, rows, length):
        return OpenVinoContext(self.model, rows)

    def every(self):
        self.load(every=True)
        context = OpenVinoContext(self.model, 1)

        def logits(ids):
            context.fill(ids)
            return context.request.get_tensor("logits").data[0].copy()

        return logits


def last_position(model):
    """Before the head, as openvino-genai does."""
    from openvino import opset13 as ops

    (head,) = (o for o in model.outputs if "logits" in o.get_names())
    matmul = head.get_node().input_value(0).get_node()
    x = matmul.input(0)
    last = ops.slice(x.get_source_output(), [-1], [2**31 - 1], [1], [1])
    x.replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


class OpenVinoContext:
    def __init__(self, model, rows):
        self.request, self.rows = model.create_infer_request(), rows

    def run(self, ids):
        rows, tokens = ids.shape
        self.request.infer(
            {
                "input_ids": ids,
                "attention_mask": np.ones((rows, self.done + tokens), np.int64),
                "position_ids": np.tile(np.arange(self.done, self.done + tokens), (rows, 1)),
                "beam_idx": np.arange(rows, dtype=np.int32),
            }
        )
        self.done += tokens

    def fill(self, ids):
        self.request.reset_state()
        self.done, self.ids = 0, ids
        self.run(np.tile(ids, (self.rows, 1)))

    def rewind(self, length):
        assert length == len(self.ids)
        self.fill(self.ids)

    def step(self, token):
        self.run(np.full((self.rows, 1), token))


class Measure:
    """What a worker is asked for."""

    def __init__(self, model, ids):
        self.model, self.ids, self.contexts = model, ids, {}

    def load(self):
        """Seconds until there are the logits behind a short prompt, and a token after it."""
        started = time.perf_counter()
        self.model.load()
        context = self.model.context(1, 512 + STEPS)
        context.fill(self.ids[:FIRST])
        seconds = time.perf_counter() - started
        self.contexts[1, 512] = context
        return seconds

    def context(self, rows, length):
        if (rows, length) not in self.contexts:
            self.contexts[rows, length] = self.model.context(rows, length + STEPS)
        return self.contexts[rows, length]

    def prefill(self, length):
        """Tokens a second of a prompt."""
        context = self.context(1, length)
        started = time.perf_counter()
        context.fill(self.ids[:length])
        return length / (time.perf_counter() - started)

    def decode(self, length, rows=1):
        """Tokens a second of all rows after so many."""
        known = (rows, length) in self.contexts
        context = self.context(rows, length)
        if known:
            context.rewind(length)
        else:
            context.fill(self.ids[:length])
        context.step(self.ids[length])  # the first is not timed: what was rewound may be made again
        started = time.perf_counter()
        for token in self.ids[length + 1 : length + STEPS]:
            context.step(token)
        return rows * (STEPS - 1) / (time.perf_counter() - started)

    def nll(self, window):
        """Nats a token, but for the first of each window."""
        logits_of, losses = self.model.every(), []
        for start in range(0, len(self.ids) - window + 1, window):
            ids = self.ids[start : start + window]
            logits = logits_of(ids)[:-1].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            chosen = np.take_along_axis(logits, ids[1:, None], -1)[:, 0]
            losses.append(np.log(np.exp(logits).sum(-1)) - chosen)
        return float(np.concatenate(losses).mean())

    def peak(self):
        """MB of this process so far, after a whole prompt and a few tokens."""
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


KINDS = {"ours": Ours, "llama.cpp": LlamaCpp, "genai": GenAi, "openvino": OpenVino}


def main(kind, path, ids):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries say things
    measure = Measure(KINDS[kind](Path(path)), np.load(ids))
    last = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - last
        name, *arguments = json.loads(line)
        value = getattr(measure, name)(*arguments)
        print(json.dumps([value, idle]), file=answers, flush=True)
        last = time.process_time()


if __name__ == "__main__":
    main(*sys.argv[1:])
