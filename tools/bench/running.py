"""How fast and how exact CPU artifacts run: the parts decode, prefill and perplexity of `instantrt bench compile`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.compile import compile_model
from instantrt.compiler.llm import load_artifact
from instantrt.compiler.request import Request
from instantrt.passes.core.lazy import Array, whole
from instantrt.passes.core.quant import InstantQuant
from instantrt.tools.bench.layers import FLOAT32, MODES, layer_chain, lowered, write_weights
from instantrt.tools.bench.synthetic import QWEN2_05B, write_checkpoint

Result = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]


def decode(folder: Path) -> Result:
    """Speed of one token against float32, the sessions taking turns; error of the per-channel forms in float64."""
    import onnxruntime as ort

    tensors = write_weights(folder, [(8192, 2048), (2048, 8192)] * 4)
    sessions: dict[str, ort.InferenceSession] = {}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    graphs = {"float32": layer_chain(tensors), **{mode: lowered(tensors, mode) for mode in MODES}}
    for name, graph in graphs.items():
        path = folder / f"{len(sessions)}.onnx"
        write_model(graph, path)
        sessions[name] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((1, 1, 2048), np.float32)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(30):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, {"x": x})
            times[name].append(time.perf_counter() - started)
    base = np.array(times["float32"])
    result: Result = {
        name: {"times_as_fast_as_float32": round(float(np.median(base / np.array(taken))), 2)}
        for name, taken in times.items()
    }
    result["error"] = per_channel_error(folder)
    return result


def per_channel_error(folder: Path) -> Result:
    """One layer, 16 tokens with outlier channels: |y - W x| / |W x| for exact weights (the floor) and the artifact."""
    import onnxruntime as ort

    tensors = write_weights(folder, [(2048, 2048)])
    w = whole(tensors["l0.weight"]).astype(np.float64)
    x = np.random.default_rng(2).standard_normal((1, 16, 2048), np.float32)
    x[..., ::100] *= 30
    want = x[0].astype(np.float64) @ w.T
    source = InstantQuant("l0", tensors["l0.weight"], 8, 2048, False, FLOAT32)
    q = np.concatenate([(c.astype(np.float64) - z) * s for _, (c, s, z) in source.tiles()])
    path = folder / "error.onnx"
    write_model(lowered(tensors, "A16W8 per-channel"), path)
    got = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0][0]
    floor = np.linalg.norm(x[0] @ q.T - want) / np.linalg.norm(want)
    ours = np.linalg.norm(got - want) / np.linalg.norm(want)
    return {"weight_only_floor": float(f"{floor:.4g}"), "two_limbs": float(f"{ours:.4g}")}


def quartiles(values: Array) -> list[float]:
    return [round(float(v), 2) for v in np.percentile(values, (25, 50, 75))]


def prefill(folder: Path) -> Result:
    """A prompt of 512 tokens on a model of Qwen2-0.5B's shape, 152,064 words: logits of all tokens and of the last.

    The two take turns; quartiles of the milliseconds of ten rounds, and of the ratios within a round.
    """
    write_checkpoint(folder / "model", QWEN2_05B)
    models = {}
    for logits in ("all", "last"):
        request = Request(folder / "model", ("x86",), folder / logits, quant="a16w8", group_size=128, logits=logits)
        compile_model(request)
        models[logits] = load_artifact(folder / logits)
    ids = np.random.default_rng(0).integers(0, 1000, (1, 512))
    empty = np.zeros((1, QWEN2_05B["num_key_value_heads"], 0, 64), np.float32)
    past = {s.name: empty for s in models["all"].artifact.inputs if s.name.startswith("past_key_values.")}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(11):
        for name, model in models.items():
            started = time.perf_counter()
            model(input_ids=ids, attention_mask=np.ones_like(ids), position_ids=np.arange(512)[None], **past)
            times[name].append((time.perf_counter() - started) * 1e3)
    base, last = (np.array(times[name][1:]) for name in models)  # the first round warms up

    return {name: {"quartiles": quartiles(v)} for name, v in (("all", base), ("last", last), ("ratio", base / last))}


PERPLEXITY = (
    "none",
    "a16w8",
    "a16w8 --cpu-preset fast",
    "a16w8 --group-size 32",
    "a16w8 --group-size 128",
    "a16w8 --group-size 128 --cpu-preset fast",
    "a16w8 --lm-head int8 --embeddings int8",
    "a8w8",
    "a16w4 --group-size 32",
    "a16w4 --group-size 32 --cpu-preset fast",
    "a16w4 --group-size 64",
    "a16w4 --group-size 128",
    "a16w4",
)


def perplexities(folder: Path) -> Result:
    """Of each mode on the evaluation text, and the increase over float in percent."""
    from instantrt.compiler.accuracy.perplexity import artifact_logits, perplexity_of, text_windows, transformers_logits

    model = ROOT / "examples" / "tiny-qwen2"
    parts = text_windows(model, ROOT / "examples" / "text" / "evaluation.txt")
    base = perplexity_of(transformers_logits(model), parts)
    result: Result = {"transformers float32": {"perplexity": round(base, 3)}}
    for mode in PERPLEXITY:
        command = [sys.executable, "-m", "instantrt", "compile", str(model), "--target=x86", f"--out={folder / 'out'}"]
        subprocess.run([*command, "--quant", *mode.split()], check=True, stdout=subprocess.DEVNULL)
        value = perplexity_of(artifact_logits(folder / "out"), parts)
        result[mode] = {"perplexity": round(value, 3), "increase_percent": round((value / base - 1) * 100, 3)}
    return result
