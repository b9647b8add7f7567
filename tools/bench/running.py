"""How fast and how exact CPU artifacts run: the parts decode and perplexity of `instantrt bench compile`."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.passes.core.lazy import whole
from instantrt.passes.core.quant import InstantQuant
from instantrt.tools.bench.layers import FLOAT32, MODES, layer_chain, lowered, write_weights
from instantrt.tools.bench.results import Result, in_turns
from instantrt.tools.places import EVALUATION, EXAMPLE


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
    seconds = in_turns({name: partial(session.run, None, {"x": x}) for name, session in sessions.items()}, 30)
    result: Result = {
        name: {"times_as_fast_as_float32": round(float(np.median(seconds["float32"] / each)), 2)}
        for name, each in seconds.items()
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

    parts = text_windows(EXAMPLE, EVALUATION)
    base = perplexity_of(transformers_logits(EXAMPLE), parts)
    result: Result = {"transformers float32": {"perplexity": round(base, 3)}}
    for mode in PERPLEXITY:
        words = ("compile", str(EXAMPLE), "--target=x86", f"--out={folder / 'out'}")
        command = [sys.executable, "-m", "instantrt", *words]
        subprocess.run([*command, "--quant", *mode.split()], check=True, stdout=subprocess.DEVNULL)
        value = perplexity_of(artifact_logits(folder / "out"), parts)
        result[mode] = {"perplexity": round(value, 3), "increase_percent": round((value / base - 1) * 100, 3)}
    return result
