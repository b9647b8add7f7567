"""Drives an artifact with ONNX Runtime alone: `python plain_client.py build/x86 "Once upon a time"`."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

folder, prompt = Path(sys.argv[1]), sys.argv[2]
session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

new = tokenizer.encode(prompt).ids
past = {
    i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
    for i in session.get_inputs()
    if i.name.startswith("past_key_values.")
}
total, generated = 0, []
for _ in range(24):
    total += len(new)
    feeds = {
        "input_ids": np.array([new]),
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(total - len(new), total)[None],
    }
    logits, *present = session.run(None, {**feeds, **past})
    past = dict(zip(past, present, strict=True))  # the outputs come in the order of the inputs
    new = [int(logits[0, -1].argmax())]
    generated += new
print(tokenizer.decode(generated))
