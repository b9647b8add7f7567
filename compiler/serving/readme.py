"""README.md of a Triton model repository."""

from __future__ import annotations

from collections.abc import Iterable

from instantrt.compiler.serving.config import GENERATE_INPUTS, MAX_BATCH, MAX_LENGTH, MAX_QUEUE, MAX_TEXTS, Served

REQUIREMENTS = (
    "jinja2==3.1.6",
    "numpy==1.26.4  # Triton 2.51 and older read NumPy 2 arrays wrongly",
    "tokenizers==0.23.3",
)
ONNXRUNTIME = "onnxruntime==1.32.0"


def requirements(served: Iterable[Served]) -> tuple[str, ...]:
    """What the models that take text import, with versions: an engine is read by the version that built it alone."""
    engines = [each.artifact.engine for each in served if not each.no_text]
    runtimes = {f"{e['builder'].replace('_', '-')}=={e['version']}" if e else ONNXRUNTIME for e in engines}
    return (*REQUIREMENTS, *sorted(runtimes))


def readme(served: Iterable[Served]) -> str:
    """What is in the repository and how to start it."""
    served = tuple(served)
    generate = [name for each in served for name in each.models if name.endswith("_generate")]
    parts = [TITLE, models_table(served)]
    if generate:
        parts.append(GENERATE.format(name=generate[0], inputs=inputs_table(), **LIMITS))
    if encoders := [each for each in served if each.artifact.encoder is not None and not each.no_text]:
        parts.append(TEXTS.format(name=encoders[0].of_text, max_texts=MAX_TEXTS))
    if any(each.artifact.kind == "engine" and not each.no_text for each in served):
        parts.append(ENGINES)
    if any(each.artifact.kind == "onnx" and each.artifact.llm is not None and not each.no_bare for each in served):
        parts.append(BARE_ONNX)
    engines = [each.artifact for each in served if each.artifact.kind != "onnx"]
    if plugins := sorted({plugin.rsplit("/", 1)[-1] for artifact in engines for plugin in artifact.plugins}):
        parts.append(PLUGINS.format(libraries=";".join(f"plugins/{name}" for name in plugins)))
    return "\n".join(parts)


def models_table(served: Iterable[Served]) -> str:
    rows = ["| artifact | model | backend |", "|---|---|---|"]
    for each in served:
        backend = "tensorrt" if each.artifact.kind == "engine" else "onnxruntime"
        cells = ((each.name, backend, each.no_bare), (each.of_text, "python", each.no_text))
        rows += [f"| {each.artifact.target} | {f'none: {no}' if no else f'`{n}`'} | {b} |" for n, b, no in cells]
    return "\n".join(rows) + "\n"


def inputs_table() -> str:
    rows = ["| input | type | meaning; default |", "|---|---|---|"]
    rows += [f"| `{name}` | {kind.removeprefix('TYPE_')} | {meaning} |" for name, kind, _, meaning in GENERATE_INPUTS]
    return "\n".join(rows)


LIMITS = {"max_batch": MAX_BATCH, "max_length": MAX_LENGTH, "max_queue": MAX_QUEUE}
TITLE = """# Triton model repository

Written by `instantrt compile --triton`. Start the server on it where Triton Inference Server is installed:

```
tritonserver --model-repository . --model-control-mode explicit --load-model '*'
```

A server without one of the backends below loads the others when they are named, each with its own `--load-model`.
"""
GENERATE = """## Generate

The generate models take text and stream text. They need the Python backend and, in the Python that it runs:

```
pip install -r requirements.txt
curl -N localhost:8000/v2/models/{name}/generate_stream \\
    -d '{{"text_input": "Once upon a time", "max_tokens": 20, "stream": true}}'
```

{inputs}

They are decoupled: ask over gRPC streams, or over HTTP's `generate` and `generate_stream`.

Outputs: `text_output` and `output_ids` hold what is new in this response; `finish_reason` is empty until the last one,
then `stop` or `length`; `num_input_tokens` and `num_output_tokens` count.

Requests that arrive together run as one batch; they join and leave it between two tokens. Those cancelled over gRPC,
and `generate_stream` requests whose client has gone, leave at once. Where nothing is written before the end, nobody
notices that a client has gone: a request over HTTP's `generate` runs on to its last token. These parameters in
`config.pbtxt` may be edited:

| parameter | default | meaning |
|---|---|---|
| `max_batch` | {max_batch}, or what an engine was built for | sequences that run together; others wait |
| `max_length` | {max_length}, or less if the model has less | tokens of a sequence with its prompt; more is refused |
| `max_queue` | {max_queue} | requests that wait; more are refused |
| `threads` | 0 | of ONNX Runtime; 0 takes all cores that the process may use |
| `spinning` | false | `true`: idle threads of ONNX Runtime keep their cores: faster where nobody needs them |

`runtime` and `cache` say what the artifact is; with the cache `concat` (from `--portable`, and where
attention is not causal) rows run one by one. `prompts` is `whole` where tokens see those after them.

The cache takes `max_batch * max_length` tokens of address space; memory is taken as sequences grow.

When it loads, a generate model compares the SHA-256 of its model, weights and plugins with `1/artifact.json`, and
refuses what was changed. That reads every byte once, at half a gigabyte a second or more. Bare models are not checked.

The names are those of TensorRT-LLM's models, which Triton's OpenAI front end (`python/openai` in the server's sources)
sends to every backend but vLLM. It takes no relative path to a repository, and would load the bare models, too:

```
python3 openai_frontend/main.py --model-repository "$PWD" --tokenizer "$PWD/{name}/1" \\
    --model-control-mode explicit --load-model {name}
```

A front end without `--load-model` needs a repository with the generate models alone.
"""
TEXTS = """## Texts

The models that take texts need the Python backend and `pip install -r requirements.txt` in the Python that it runs. Of
each text they give its vector, `embedding`, or its labels, the best first: `label` and `score`.

```
curl localhost:8000/v2/models/{name}/infer -d '{{"inputs": [{{"name": "text", "datatype": "BYTES", "shape": [2, 1],
    "data": ["How are you?", "Fine."]}}]}}'
```

A request has up to {max_texts} texts. Those of requests that wait together run together, short ones with short ones
(Triton's dynamic batching). Where the model has prompts, `prompt_name` chooses one for each text. Longer texts are cut.
"""
ENGINES = """## Generate with engines

The engine, its caches and its plugins live in the generate model's own process: no server flag is needed.

An engine from `--kv-cache in-place` decodes its sequences as one batch, in shapes that never change, so that a step
is one CUDA graph. `max_batch` and `max_length` cannot exceed what it was built for (`--max-batch`, `--max-length`),
and the cache, the engine's `--max-length` for each row, is taken when it loads. An engine from `--kv-cache
concat` runs its sequences one after the other, and takes memory for a row when that is first used.
"""
BARE_ONNX = """## Bare ONNX models

Inputs and outputs are those of the ONNX file: `input_ids`, `attention_mask`, `position_ids` and the cache in; `logits`
and the cache out. The caller keeps the cache between calls; an empty one has length 0.
"""
PLUGINS = """## Plugins

Triton takes plugin libraries for the whole server. The engines need:

```
tritonserver --model-repository . --backend-config=tensorrt,plugins="{libraries}"
```
"""
