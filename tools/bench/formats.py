"""Quantized checkpoints of every format against transformers on their dequantized weights, and how fast they stream.

`instantrt bench formats perplexity DIR...` compiles each checkpoint and compares perplexities;
`instantrt bench formats stream` reads and writes a synthetic GPTQ layer; `search` compares 4-bit scales with and
without a search, `defaults` what a request may leave open, and `frontier` (frontier.py) all formats.
All but the last print a JSON object; benchmarks/ keeps what was measured.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import onnx_graphsurgeon as gs
import typer

from instantrt.compiler.accuracy.metrics import Tokens, compare_tokens
from instantrt.compiler.accuracy.perplexity import Logits, artifact_logits, perplexity_of, text_windows
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.frontend.skeleton import read_by_transformers
from instantrt.compiler.plan import Plan, plan
from instantrt.compiler.quant.config import Quant, Search
from instantrt.compiler.quant.readers import announced_reader
from instantrt.compiler.quant.stored import StoredLayer
from instantrt.compiler.request import Request
from instantrt.compiler.write import write_planned
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array, InMemory, whole
from instantrt.passes.core.quant import Codes, QuantTensor, dequantize
from instantrt.passes.core.rewrite import take_over
from instantrt.passes.core.search import SearchedQuant
from instantrt.passes.ort import Preset
from instantrt.passes.ort.nbits import BlockwiseMatch, matmul_nbits
from instantrt.passes.ort.tables import SCALE_TYPE
from instantrt.passes.qdq.insert_qdq import Quantized
from instantrt.tools.bench import frontier
from instantrt.tools.bench.layers import peak_kb
from instantrt.tools.bench.synthetic import write_safetensors
from instantrt.tools.cli.options import PlainCommand, PlainGroup

main = typer.Typer(cls=PlainGroup, add_completion=False, pretty_exceptions_enable=False)
main.command("frontier", cls=PlainCommand)(frontier.main)
TEXT = Path("examples/text/evaluation.txt")


def dequantized(quant: QuantTensor) -> Array:
    """W [N, K] in float32, inputs in the model's own order."""
    w = np.concatenate([dequantize(Codes(*tile.parts), quant.group_size) for tile in quant.tiles()])
    return w if quant.order is None else w[:, np.argsort(quant.order.indices)]


def reference_model(planned: Plan) -> Any:
    """A model of transformers, in float32, with the dequantized weights of what was planned."""
    import torch
    from transformers import AutoModelForCausalLM

    hf_config = read_by_transformers(planned.model.config)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    state = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        decision = planned.twins["x86"].decisions.get(name.removesuffix(".weight"))
        stored = planned.model.tensors.get(name)
        if not isinstance(decision, QuantTensor) and stored is None:
            continue  # tied to another
        found = dequantized(decision) if isinstance(decision, QuantTensor) else whole(planned.model.tensors[name])
        state[name] = torch.from_numpy(found.astype(np.float32)).reshape(parameter.shape)
    model.load_state_dict(state, strict=False)
    return model


def logits_of(model: Any) -> Logits:
    """The logits of a model of transformers."""
    import torch

    def run(ids: Array) -> Array:
        with torch.no_grad():
            logits: Array = model(torch.from_numpy(ids)).logits.numpy()
        return logits

    return run


@main.command("perplexity", cls=PlainCommand)
def compare(
    folders: Annotated[list[Path], typer.Argument(help="quantized checkpoints")],
    quant: Annotated[Quant | None, typer.Option(metavar="<format>", help="a8w4, say")] = None,
    preset: Annotated[Preset, typer.Option(help="of 16-bit activations")] = "exact",
    text: Annotated[Path, typer.Option(help="the text")] = TEXT,
) -> None:
    """Print the artifact's perplexity and that of the dequantized weights, for each checkpoint."""
    rows = {}
    for folder in folders:
        with tempfile.TemporaryDirectory() as out:
            request = Request(model=folder, targets=("x86",), out=Path(out), quant=quant, cpu_preset=preset)
            planned = plan(request)
            write_planned(request, planned)
            parts = text_windows(folder, text)
            expected = perplexity_of(logits_of(reference_model(planned)), parts)
            found = perplexity_of(artifact_logits(Path(out)), parts)
        kinds = Counter(str(q) for q in planned.twins["x86"].quantized.values())
        rows[folder.name] = {
            "layers": dict(kinds),
            "dequantized": round(expected, 4),
            "artifact": round(found, 4),
            "difference_percent": round(100 * (found / expected - 1), 4),
        }
        print(folder.name, json.dumps(rows[folder.name]), flush=True)
    print(json.dumps(rows, indent=2))


CHOICES: dict[str, dict[str, Any]] = {
    f"{quant} {'by channel' if group == -1 else f'g{group}'} {preset}": {
        "quant": quant, "group_size": group, "cpu_preset": preset
    }
    for quant, groups in (("a16w8", (-1, 128, 64, 32)), ("a16w4", (128, 64, 32)))
    for group in groups
    for preset in get_args(Preset)
}  # fmt: skip


@main.command("defaults", cls=PlainCommand)
def compare_defaults(
    model: Annotated[Path, typer.Argument(help="float checkpoint of a causal LM")],
    text: Annotated[Path, typer.Option(help="the text")] = TEXT,
    choice: Annotated[list[str] | None, typer.Option(help="'a16w8 g64 auto', say; else all")] = None,
) -> None:
    """Print the loss in nats a token, the KL to the float artifact and the bytes of what a request may leave open."""
    parts = text_windows(model, text)
    rows: dict[str, dict[str, float]] = {}
    exact, size = logits_and_mib(model, parts, quant="none")
    for name in choice or CHOICES:
        try:
            found, mib = logits_and_mib(model, parts, **CHOICES[name])
        except UserError as error:  # a group that does not divide its layers
            print(f"{name}: {error.what}", flush=True)
            continue
        tokens = Tokens.join([compare_tokens(*each) for each in zip(exact, found, parts, strict=True)])
        increase, kl = float(np.nanmean(tokens.nll - tokens.nll_reference)), float(tokens.kl.mean())
        rows[name] = {"nll_increase": round(increase, 4), "kl": round(kl, 5), "mib": mib}
        print(name, json.dumps(rows[name]), flush=True)
    nll = round(float(np.nanmean(tokens.nll_reference)), 4)
    print(json.dumps({"tokens": len(tokens.kl), "float": {"nll": nll, "mib": size}, **rows}, indent=2))


def logits_and_mib(model: Path, parts: list[Array], **fields: Any) -> tuple[list[Array], float]:
    """What an artifact says of each part of a text, and its size."""
    with tempfile.TemporaryDirectory() as out:
        request = Request(model, ("x86",), Path(out), logits="all", **fields)
        write_planned(request, plan(request))
        run = artifact_logits(Path(out))
        size = sum(file.stat().st_size for file in Path(out, "x86").glob("model.onnx*"))
        return [np.concatenate([*run(ids)])[None] for ids in parts], round(size / 2**20, 1)


@main.command("search", cls=PlainCommand)
def compare_searches(
    models: Annotated[list[Path], typer.Argument(help="float checkpoints of causal LMs")],
    text: Annotated[Path, typer.Option(help="the text")] = TEXT,
) -> None:
    """Print what 4 bits lose by the plain formula and with searched scales (KL to float, nats), and the search's rate.

    The rate is in million weights a second of one thread's CPU time, of a layer of 4096 x 4096.
    """
    found: dict[str, Any] = {"kl": {}}
    for model in models:
        parts, kls = text_windows(model, text), dict[str, float]()
        exact, _ = logits_and_mib(model, parts, quant="none")
        for how in get_args(Search):
            logits, _ = logits_and_mib(model, parts, quant="a16w4", search=how)
            each = [compare_tokens(*pair).kl for pair in zip(exact, logits, parts, strict=True)]
            kls[how] = round(float(np.concatenate(each).mean()), 5)
        found["kl"][model.absolute().name] = kls
        print(model.absolute().name, json.dumps(kls), flush=True)
    found["million_weights_per_second"] = {f"g{group}": search_rate(group) for group in (16, 32, 64, 128)}
    print(json.dumps(found, indent=2))


def search_rate(group: int) -> float:
    """Million weights a second of CPU time, of all threads."""
    random, size = np.random.default_rng(0), 4096
    w = InMemory(random.standard_normal((size, size), np.float32))
    energy = random.random(size, np.float32).tobytes()
    source = SearchedQuant("w", w, 4, group, False, SCALE_TYPE, importance=energy)
    started = time.process_time()
    for _ in source.tiles():
        pass
    return round(size * size / (time.process_time() - started) / 1e6, 1)


@main.command(cls=PlainCommand)
def stream(
    rows: Annotated[int, typer.Option(min=1, help="K of the synthetic layers")] = 4096,
    columns: Annotated[int, typer.Option(min=1, help="N of the synthetic layers")] = 11008,
    layers: Annotated[int, typer.Option(min=1, help="how many, each in its own file")] = 8,
) -> None:
    """Print how fast GPTQ layers are read, decoded and written as MatMulNBits, and the memory that it took."""
    found = {}
    for bits, order in ((4, False), (4, True), (8, False)):
        with tempfile.TemporaryDirectory() as folder:
            found[f"{bits} bits{', sorted inputs' if order else ''}"] = stream_once(
                Path(folder), bits, rows, columns, layers, order=order
            )
    print(json.dumps(found, indent=2))


def stream_once(folder: Path, bits: int, k: int, n: int, layers: int, *, order: bool) -> dict[str, float]:
    """One model of equal layers: written by NumPy, read by our reader, written as an artifact."""
    random, group = np.random.default_rng(0), 128
    g_idx = random.permutation(np.arange(k) // group) if order else np.arange(k) // group
    tensors = {
        "qweight": random.integers(-(2**31), 2**31, (k * bits // 32, n), np.int32),
        "qzeros": random.integers(-(2**31), 2**31, (k // group, n * bits // 32), np.int32),
        "scales": (random.random((k // group, n), np.float32) + 0.1).astype(np.float16),
        "g_idx": g_idx.astype(np.int32),
    }
    write_safetensors(
        folder / "model.safetensors", {f"{i}.{name}": a for i in range(layers) for name, a in tensors.items()}
    )
    del tensors
    raw = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, "desc_act": order}
    reader = announced_reader(folder, {"quantization_config": raw})
    assert reader is not None
    stored = read_checkpoint(folder)
    x = gs.Variable("x", np.float32, ["rows", k])
    graph = gs.Graph([], [x], [], opset=23)
    for i in range(layers):
        quant = reader.read(StoredLayer(str(i), (n, k), stored))
        assert isinstance(quant, QuantTensor)
        node = gs.Node("MatMul", str(i), {}, [x], [gs.Variable(f"y{i}", np.float32, ["rows", n])])
        layout = Quantized(node, x, quant, str(i))
        graph.nodes.append(node)
        graph.outputs += node.outputs
        matmul_nbits(graph, BlockwiseMatch(layout, group), x, take_over(node))
        graph.nodes.remove(node)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far (Linux)
    before = peak_kb()
    started = time.perf_counter()
    write_model(graph, folder / "model.onnx")
    seconds = time.perf_counter() - started
    grown = peak_kb() - before
    return {
        "million_weights": layers * k * n / 1e6,
        "million_weights_per_second": round(layers * k * n / seconds / 1e6, 1),
        "artifact_mb": round((folder / "model.onnx.data").stat().st_size / 1e6, 1),
        "peak_memory_grew_mb": round(grown / 1e3, 1),
    }
