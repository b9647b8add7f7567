"""Peak memory of the ledger on a model of Qwen2-7B's shape with two layers: `python -m benchmarks.accuracy_memory`.

Writes a checkpoint of random weights (3.1 GB) to a temporary folder and fills the ledger in a child process, whose
largest resident set it prints. Memory-mapped pages would count as well; there are none.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, LAYERS = 3584, 18944, 152064, 28, 4, 2
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
    "dtype": "bfloat16",
}


def shapes() -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for i in range(LAYERS):
        base = f"model.layers.{i}"
        for name, n in (("q", HIDDEN), ("k", kv), ("v", kv)):
            found[f"{base}.self_attn.{name}_proj.weight"] = (n, HIDDEN)
            found[f"{base}.self_attn.{name}_proj.bias"] = (n,)
        found[f"{base}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        found[f"{base}.mlp.gate_proj.weight"] = found[f"{base}.mlp.up_proj.weight"] = (INNER, HIDDEN)
        found[f"{base}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        found[f"{base}.input_layernorm.weight"] = found[f"{base}.post_attention_layernorm.weight"] = (HIDDEN,)
    return found


def write_checkpoint(folder: Path) -> None:
    """Random bfloat16 weights as a safetensors file, row by row: this process stays small too."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header, offset = {}, 0
    for name, shape in shapes().items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes().items():
            left = int(np.prod(shape))
            while left:
                count = min(left, 1 << 24)
                values = random.standard_normal(count, np.float32) * np.float32(0.02)
                values += 1 if "norm" in name else 0
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= count


def child(folder: Path) -> None:
    from compiler.accuracy.data import load_data
    from compiler.accuracy.ledger import Forms, ledger
    from compiler.build import plan
    from compiler.request import Request

    request = Request(folder, ("x86",), folder / "out", quant="a16w8", group_size=128)
    planned = plan(request)
    exported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    feeds, ids = next(load_data(planned.model).each(planned.model.llm))
    assert ids is not None
    started = time.monotonic()
    filled = ledger(Forms(planned.canonical, planned.model.graph, planned.lowered["x86"]), feeds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{len(filled.rows)} layers, {ids.size} tokens, {len(filled.findings)} findings, "
        f"{time.monotonic() - started:.0f} s, peak RSS {peak / 2**20:.2f} GiB ({exported / 2**20:.2f} after the export)"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        subprocess.run([sys.executable, "-m", "benchmarks.accuracy_memory", folder], check=True)


if __name__ == "__main__":
    child(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
