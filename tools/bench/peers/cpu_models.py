"""What a worker runs: causal LMs and encoders, ours and those of peers, by one interface each.

Of a causal LM: `load`; `context`, rows of tokens that are filled, stepped on and rewound; and `every_position`, the
logits of all of a text. Every token is given, none is sampled, but in a batch of onnxruntime-genai, which takes tokens
once; the rows of a batch are alike. An encoder has `load`, `names` of what it takes, and `run`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Logits = Callable[[Array], Array]  # ids [S] -> logits [S, vocab]
THREADS = 2
UBATCH = 512  # llama.cpp's default for the tokens that run at once
OPENVINO = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class PeerModel:
    """What lies at `path`, in a library of its own; to import that is no part of loading."""

    package: str

    def __init__(self, path: Path) -> None:
        self.lib: Any = import_module(self.package)
        self.path = path


class OurModel:
    """An artifact of `instantrt compile` on what `LLM` runs; all contexts share the rows of its one cache."""

    rows, length = 8, 1088  # of the longest that a worker asks for: 1,024 tokens and those after them

    def __init__(self, path: Path) -> None:
        from instantrt.compiler.artifact.manifest import find_artifact
        from instantrt.compiler.llm import LLM

        import_module("instantrt.compiler.serving.runtime.onnx_engine")  # its import is not part of loading

        self.path = path
        most = find_artifact(path).longest or self.length
        self.llm = LLM(path, max_batch=self.rows, max_length=min(self.length, most), threads=THREADS)

    def load(self) -> None:
        self.engine: Any = self.llm.load()

    def context(self, rows: int, length: int) -> OurContext:
        assert rows <= self.rows
        assert length <= self.llm.limits.length, f"the artifact takes {self.llm.limits.length} tokens, not {length}"
        return OurContext(self.engine, rows)

    def every_position(self) -> Logits:
        from instantrt.compiler.accuracy.perplexity import artifact_logits

        logits_of = artifact_logits(self.path)
        return lambda ids: np.concatenate([*logits_of(ids[None])])


class OurContext:
    """A shorter context is the beginning of a longer one, so that they may share a row."""

    def __init__(self, engine: Any, rows: int) -> None:
        from instantrt.compiler.serving.runtime.onnx_engine import ConcatEngine

        self.engine, self.rows, self.copies = engine, rows, isinstance(engine, ConcatEngine)

    def fill(self, ids: Array) -> None:
        self.ids, self.done = ids, np.full(self.rows, len(ids))
        for row in range(self.rows):
            self.engine.prefill(row, ids, 0)

    def rewind(self, length: int) -> None:
        if self.copies:  # a cache that is as long as its sequence cannot be cut
            self.fill(self.ids[:length])
        self.done = np.full(self.rows, length)

    def step(self, token: int) -> None:
        self.engine.decode(np.full(self.rows, token), self.done)
        self.done = self.done + 1

    def close(self) -> None:
        """The cache stays."""


class LlamaModel(PeerModel):
    """A GGUF file in llama.cpp."""

    package = "llama_cpp"

    def load(self) -> None:
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(os.fsencode(self.path), self.lib.llama_model_default_params())

    def context(self, rows: int, length: int) -> LlamaContext:
        return LlamaContext(self.lib, self.model, rows, length)

    def every_position(self) -> Logits:
        self.load()
        vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        context = self.context(1, UBATCH)

        def logits_of(ids: Array) -> Array:
            context.clear()
            context.run([(token, i, 0, True) for i, token in enumerate(ids)])
            return np.ctypeslib.as_array(self.lib.llama_get_logits(context.handle), (len(ids), vocab)).copy()

        return logits_of


class LlamaContext:
    def __init__(self, lib: Any, model: Any, rows: int, length: int) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = rows * length, rows
        params.n_batch = params.n_ubatch = params.n_outputs_max = UBATCH
        params.n_threads = params.n_threads_batch = THREADS
        self.lib, self.rows, self.handle = lib, rows, lib.llama_init_from_model(model, params)
        self.memory, self.batch = lib.llama_get_memory(self.handle), lib.llama_batch_init(UBATCH, 0, 1)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.memory, True)

    def run(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, row, whether its logits are wanted) of each."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), position, 1
            batch.seq_id[i][0], batch.logits[i] = row, wanted
        if status := self.lib.llama_decode(self.handle, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        self.lib.llama_synchronize(self.handle)

    def fill(self, ids: Array) -> None:
        self.clear()
        last = len(ids) - 1
        for row in range(self.rows):
            for start in range(0, len(ids), UBATCH):
                part = enumerate(ids[start : start + UBATCH], start)
                self.run([(token, i, row, i == last) for i, token in part])
        self.done = len(ids)

    def rewind(self, length: int) -> None:
        for row in range(self.rows):
            self.lib.llama_memory_seq_rm(self.memory, row, length, -1)
        self.done = length

    def step(self, token: int) -> None:
        self.run([(token, self.done, row, True) for row in range(self.rows)])
        self.done += 1

    def close(self) -> None:
        self.lib.llama_free(self.handle)


class GenAiModel(PeerModel):
    """A folder of onnxruntime-genai's model builder."""

    package = "onnxruntime_genai"

    def load(self) -> None:
        config = self.lib.Config(str(self.path))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
        self.model = self.lib.Model(config)

    def context(self, rows: int, length: int) -> GenAiContext:
        return GenAiContext(self.lib, self.model, rows, length)

    def every_position(self) -> Logits:
        self.load()

        def logits_of(ids: Array) -> Array:
            context = self.context(1, len(ids) + 1)
            context.fill(ids)
            logits: Array = context.generator.get_output("logits")[0]
            return logits

        return logits_of


class GenAiContext:
    def __init__(self, lib: Any, model: Any, rows: int, length: int) -> None:
        params = lib.GeneratorParams(model)
        params.set_search_options(max_length=length, batch_size=rows)
        self.rows, self.generator = rows, lib.Generator(model, params)
        self.fresh: Callable[[], Any] = lambda: lib.Generator(model, params)

    def fill(self, ids: Array) -> None:
        if self.generator.token_count():
            self.generator = self.fresh()
        self.ids = ids
        self.generator.append_tokens(np.tile(ids, (self.rows, 1)).astype(np.int32))

    def rewind(self, length: int) -> None:
        if self.rows == 1:
            self.generator.rewind_to(length)
        else:  # a batch can only begin again
            self.fill(self.ids)

    def step(self, token: int) -> None:
        if self.rows == 1:
            self.generator.append_tokens(np.full((1, 1), token, np.int32))
        else:  # a batch takes tokens once: it goes on with its own
            self.generator.generate_next_token()

    def close(self) -> None:
        del self.generator


class OpenVinoModel(PeerModel):
    """A folder that optimum-intel exported, with a cache that is a state."""

    package = "openvino"

    def load(self, *, last: bool = True) -> None:
        core = self.lib.Core()
        model = core.read_model(self.path / "openvino_model.xml")
        if last:
            keep_last_position(model)
        self.model = core.compile_model(model, "CPU", OPENVINO)

    def context(self, rows: int, length: int) -> OpenVinoContext:
        del length  # a state grows
        return OpenVinoContext(self.model, rows)

    def every_position(self) -> Logits:
        self.load(last=False)
        context = self.context(1, 0)

        def logits_of(ids: Array) -> Array:
            context.fill(ids)
            logits: Array = context.request.get_tensor("logits").data[0].copy()
            return logits

        return logits_of


def keep_last_position(model: Any) -> None:
    """The head runs for the last token alone, as openvino-genai has it."""
    (logits,) = (output for output in model.outputs if "logits" in output.get_names())
    hidden = logits.get_node().input_value(0).get_node().input(0)
    last = import_module("openvino").opset13.slice(hidden.get_source_output(), [-1], [2**31 - 1], [1], [1])
    hidden.replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


class OpenVinoContext:
    def __init__(self, model: Any, rows: int) -> None:
        self.request, self.rows = model.create_infer_request(), rows

    def run(self, ids: Array) -> None:
        rows, tokens = ids.shape
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, self.done + tokens), np.int64),
            "position_ids": np.tile(np.arange(self.done, self.done + tokens), (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        self.request.infer(feeds)
        self.done += tokens

    def fill(self, ids: Array) -> None:
        self.request.reset_state()
        self.done, self.ids = 0, ids
        self.run(np.tile(ids, (self.rows, 1)))

    def rewind(self, length: int) -> None:
        """A state cannot be cut: the prompt runs again."""
        self.fill(self.ids[:length])

    def step(self, token: int) -> None:
        self.run(np.full((self.rows, 1), token))

    def close(self) -> None:
        del self.request


class OurEncoder:
    """An artifact of `instantrt compile`."""

    def __init__(self, path: Path) -> None:
        from instantrt.compiler.llm import load_artifact

        self.open: Callable[..., Any] = lambda: load_artifact(path, threads=THREADS)

    def load(self) -> None:
        self.model: Any = self.open()
        self.names = {spec.name for spec in self.model.artifact.inputs}

    def run(self, feeds: dict[str, Array]) -> Array:
        first: Array = next(iter(self.model(**feeds).values()))
        return first


class OnnxEncoder(PeerModel):
    """An ONNX file in ONNX Runtime, as it comes."""

    package = "onnxruntime"

    def load(self) -> None:
        options = self.lib.SessionOptions()
        options.intra_op_num_threads = THREADS
        self.session = self.lib.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        self.names = {spec.name for spec in self.session.get_inputs()}

    def run(self, feeds: dict[str, Array]) -> Array:
        first: Array = self.session.run(None, feeds)[0]
        return first


class OpenVinoEncoder(PeerModel):
    """An ONNX file in OpenVINO."""

    package = "openvino"

    def load(self) -> None:
        self.model = self.lib.Core().compile_model(self.path, "CPU", OPENVINO)
        self.names = {name for port in self.model.inputs for name in port.get_names()}

    def run(self, feeds: dict[str, Array]) -> Array:
        first: Array = self.model(feeds)[0]
        return first
