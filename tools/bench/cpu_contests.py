"""What `instantrt bench cpu` runs, asks for and wants: of a causal LM, of random weights, of an encoder; and what
`instantrt bench formats frontier` and `instantrt bench gguf` do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from instantrt.tools.places import EXAMPLE

GGUF = str(Path(__file__).parent / "peers" / "cpu_gguf.py")
PACKAGES = {"llama": "llama-cpp-python", "genai": "onnxruntime-genai", "openvino": "openvino"}
# In the words of a command: what is compiled; the folder that it fills; a text.
MODEL, MADE, CALIBRATION = "MODEL", "MADE", "CALIBRATION"


@dataclass(frozen=True)
class Form:
    """What one configuration runs.

    python   ours, or the flag that names a peer's; `calibration`: ours, with the text that this flag names
    kind     of worker
    words    what makes it, told to that Python
    entry    what the worker opens, in the folder that was made
    files    a pattern of those that it reads there: its bytes on disk
    bits     of most weights
    """

    python: str
    kind: str
    words: tuple[str, ...]
    entry: str
    files: str
    bits: int


def ours(options: str, bits: int, kind: str = "ours") -> Form:
    command = ("-m", "instantrt", "compile", MODEL, "--target", "x86", "--no-smoke", *options.split(), "-o", MADE)
    return Form("ours", kind, command, "", "x86/model.onnx*", bits)


def llama(kind: str, bits: int) -> Form:
    return Form("llama", "llama", (GGUF, MODEL, f"{MADE}/model.gguf", kind), "model.gguf", "model.gguf", bits)


def genai(options: str, bits: int) -> Form:
    builder = f"-m onnxruntime_genai.models.builder -e cpu -c {MADE}/hub -m"
    return Form("genai", "genai", (*builder.split(), MODEL, "-o", MADE, *options.split()), "", "model.onnx*", bits)


def openvino(options: str, bits: int) -> Form:
    export = "-m optimum.commands.optimum_cli export openvino --task text-generation-with-past --model"
    words = (*export.split(), MODEL, *options.split(), MADE)
    return Form("openvino", "openvino", words, "", "openvino_model.*", bits)


def of_encoder(python: str, kind: str, code: str, bits: int, entry: str = "model.onnx") -> Form:
    """What a peer makes of the model as torch exports it."""
    return Form(python, kind, ("-c", code, MODEL, MADE), entry, "model.*", bits)


def as_it_comes(path: str) -> Form:
    """An ONNX file of the same encoder that somebody else made."""
    words = ("-c", "import shutil, sys; shutil.copyfile(sys.argv[1], sys.argv[2] + '/model.onnx')", path, MADE)
    return Form("ours", "onnx encoder", words, "model.onnx", "model.*", 8)


EXPORTED = "exported"  # where in the folder of an encoder that is
EXPORT = """
import sys
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager").eval()
names = ["input_ids", "attention_mask", "token_type_ids"]
sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=512)}
feeds = {name: torch.ones(2, 8, dtype=torch.int64) for name in names}
shapes = dict.fromkeys(names, sizes)
program = torch.onnx.export(model, (), kwargs=feeds, dynamic_shapes=shapes, input_names=names,
                            output_names=["hidden"], opset_version=18, dynamo=True, verbose=False)
program.save(sys.argv[2] + "/model.onnx", external_data=True)
"""
COPY = """
import shutil, sys
from pathlib import Path
for path in Path(sys.argv[1], "exported").glob("model.onnx*"):
    shutil.copyfile(path, Path(sys.argv[2], path.name))
"""
DYNAMIC = """
import sys
from onnxruntime.quantization import QuantType, quantize_dynamic
made = sys.argv[2] + "/model.onnx"
quantize_dynamic(sys.argv[1] + "/exported/model.onnx", made, per_channel=True, weight_type=QuantType.QInt8)
"""
# What `optimum-cli export openvino --weight-format int8` asks for; its tokens become int8 when it runs.
NNCF_WEIGHTS = """
import sys
import nncf, openvino
model = openvino.Core().read_model(sys.argv[1] + "/exported/model.onnx")
openvino.save_model(nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM), sys.argv[2] + "/model.xml")
"""
# Activations too, by a calibration, as `OVQuantizer` has it: scales that are fixed, for whole tensors.
NNCF_STATIC = """
import sys
from pathlib import Path
import nncf, numpy as np, openvino
model = openvino.Core().read_model(sys.argv[1] + "/exported/model.onnx")
ids = np.load(Path(sys.argv[1]).parent / "inputs.npz")["ids"]
names, feeds = [name for port in model.inputs for name in port.get_names()], []
for start in range(0, len(ids) - 64, 64):
    row = ids[None, start : start + 64]
    given = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
    feeds.append({name: given[name] for name in names})
made = nncf.quantize(model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds))
openvino.save_model(made, sys.argv[2] + "/model.xml")
"""

PREFILL, DECODE, DECODE_LONG, DECODE_BATCH = "prefill 512", "decode after 128", "decode after 1024", "8 rows after 128"
ENCODE = {f"{rows} x {tokens}": (rows, tokens) for rows in (1, 32) for tokens in (16, 64, 256)}  # texts x tokens
FLOAT = "float32"


@dataclass(frozen=True)
class Wanted:
    """A ratio of two measurements of a round, each of a configuration: at least so much is wanted."""

    least: float
    over: tuple[str, str]
    under: tuple[str, str]


@dataclass(frozen=True)
class Contest:
    """What is run, what each is asked for, and what is wanted.

    first    what a fresh process does after loading, before its peak memory is read; (): none is started for it
    rounds   name -> what a worker is asked: the tokens a second
    bases    (measurement, bits) -> what it is compared with, where that is there; bits None: any
    limits   on our 8 bits: (what, at most)
    speed    the measurement that the plot shows
    loss     what it is, where it is measured
    """

    forms: Mapping[str, Form]
    first: tuple[str | int, ...]
    rounds: Mapping[str, tuple[str | int, ...]]
    bases: Mapping[tuple[str, int | None], str]
    speed: str
    goals: tuple[Wanted, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    loss: str = ""


Q8, Q4, OV8 = "llama.cpp Q8_0", "llama.cpp Q4_0", "OpenVINO int8"
EIGHT, EXACT, FOUR = "8 bits", "8 bits, exact", "4 bits"
EIGHT_OURS, EXACT_OURS, FOUR_OURS = f"{EIGHT}, plugin", f"{EXACT}, plugin", f"{FOUR}, plugin"
PEERS = {
    Q8: llama("Q8_0", 8),
    Q4: llama("Q4_0", 4),
    "genai int8": genai("-p int8", 8),
    "genai int4": genai("-p int4", 4),
    OV8: openvino("--weight-format int8", 8),
}
BASES = {(measure, bits): base for measure in (DECODE, DECODE_LONG, DECODE_BATCH) for bits, base in ((8, Q8), (4, Q4))}
DECODER = Contest(
    forms={
        FLOAT: ours("--quant none", 32),
        EIGHT: ours("--quant a16w8", 8),
        EXACT: ours("--quant a16w8 --cpu-preset exact", 8),
        "A8W8": ours("--quant a8w8", 8),
        FOUR: ours("--quant a16w4", 4),
        "4 bits, exact": ours("--quant a16w4 --cpu-preset exact", 4),
        EIGHT_OURS: ours("--quant a16w8 --plugin auto", 8),
        f"{EIGHT_OURS}, int8 cache": ours("--quant a16w8 --plugin auto --kv-cache-type int8", 8),
        EXACT_OURS: ours("--quant a16w8 --cpu-preset exact --plugin auto", 8),
        "A8W8, plugin": ours("--quant a8w8 --plugin auto", 8),
        FOUR_OURS: ours("--quant a16w4 --plugin auto", 4),
        "4 bits, exact, plugin": ours("--quant a16w4 --cpu-preset exact --plugin auto", 4),
        **PEERS,
        "llama.cpp Q4_K_M": llama("Q4_K_M", 4),
        "OpenVINO int4": openvino("--weight-format int4 --group-size 32", 4),
    },
    first=("prefill", 512),
    rounds={
        PREFILL: ("prefill", 512),
        DECODE: ("decode", 128),
        DECODE_LONG: ("decode", 1024),
        DECODE_BATCH: ("decode", 128, 8),
    },
    bases=BASES | {(PREFILL, None): OV8},
    speed=DECODE,
    goals=tuple(
        goal
        for eight, exact, four in ((EIGHT, EXACT, FOUR), (EIGHT_OURS, EXACT_OURS, FOUR_OURS))
        for goal in (
            Wanted(1.25, (eight, DECODE), (Q8, DECODE)),
            Wanted(1.25, (eight, DECODE_LONG), (Q8, DECODE_LONG)),
            Wanted(1.1, (four, DECODE), (Q4, DECODE)),
            Wanted(1.1, (four, DECODE_LONG), (Q4, DECODE_LONG)),
            Wanted(0.9, (eight, PREFILL), (OV8, PREFILL)),
            Wanted(0.8, (exact, DECODE), (eight, DECODE)),
            Wanted(5, (eight, DECODE_BATCH), (eight, DECODE)),
        )
    ),
    limits={
        "loss over float32": 0.004,
        "MiB on disk": 140,
        "peak memory : bytes on disk": 1.6,
        "s to first token": 0.3,
    },
    loss="nats a token",
)
SHAPE_PREFILL = "prefill 128"
SHAPE = Contest(
    forms={
        EIGHT: ours("--quant a16w8", 8),
        FOUR: ours("--quant a16w4", 4),
        EIGHT_OURS: ours("--quant a16w8 --plugin auto", 8),
        FOUR_OURS: ours("--quant a16w4 --plugin auto", 4),
        **PEERS,
    },
    first=("prefill", 128),
    rounds={SHAPE_PREFILL: ("prefill", 128), DECODE: ("decode", 128)},
    bases=BASES | {(SHAPE_PREFILL, None): OV8},
    speed=DECODE,
    goals=tuple(
        Wanted(1, (ours, DECODE), (name, DECODE))
        for ours, bits in ((EIGHT, 8), (EIGHT_OURS, 8), (FOUR_OURS, 4))
        for name, form in PEERS.items()
        if form.bits == bits
    ),
)
DYNAMIC_INT8, STATIC_INT8 = "quantize_dynamic int8 per channel", "OpenVINO int8, calibrated"
BY_CHANNEL = "A16W8 by channel"
A8W8 = "A8W8", "A8W8, plugin"
ENCODER = Contest(
    forms={
        FLOAT: of_encoder("ours", "onnx encoder", COPY, 32),
        "A16W8": ours("--quant a16w8", 8, "our encoder"),
        BY_CHANNEL: ours("--quant a16w8 --group-size -1", 8, "our encoder"),
        "A8W8": ours("--quant a8w8", 8, "our encoder"),
        "A16W4": ours("--quant a16w4", 4, "our encoder"),
        "A16W8, plugin": ours("--quant a16w8 --plugin auto", 8, "our encoder"),
        "A8W8, plugin": ours("--quant a8w8 --plugin auto", 8, "our encoder"),
        "A16W4, plugin": ours("--quant a16w4 --plugin auto", 4, "our encoder"),
        DYNAMIC_INT8: of_encoder("ours", "onnx encoder", DYNAMIC, 8),
        "OpenVINO float": of_encoder("openvino", "openvino encoder", COPY, 32),
        OV8: of_encoder("openvino", "openvino encoder", NNCF_WEIGHTS, 8, "model.xml"),
        STATIC_INT8: of_encoder("openvino", "openvino encoder", NNCF_STATIC, 8, "model.xml"),
    },
    first=("batch", 1, 256),
    rounds={name: ("batch", *sizes) for name, sizes in ENCODE.items()},
    bases={(name, None): FLOAT for name in ENCODE},
    speed="32 x 64",
    goals=(
        *(Wanted(2.5, (ours, name), (FLOAT, name)) for ours in A8W8 for name in ENCODE),
        *(
            Wanted(1, (ours, name), (peer, name))
            for ours in A8W8
            for peer in (DYNAMIC_INT8, OV8, STATIC_INT8)
            for name in ENCODE
        ),
        Wanted(1.5, (BY_CHANNEL, "32 x 64"), (FLOAT, "32 x 64")),
    ),
    loss="1 - cosine of mean-pooled vectors",
)
FLOAT_ZEROS = EXAMPLE.with_name("float_zero_points.json")
ASKED = {
    FLOAT: "--quant none",
    EIGHT: "--quant a16w8",
    "8 bits g32": "--quant a16w8 --group-size 32",
    "8 bits by channel, exact": "--quant a16w8 --cpu-preset exact",
    "8 bits, int8 cache": "--quant a16w8 --kv-cache-type int8",
    "8 bits, uint4 cache": "--quant a16w8 --kv-cache-type uint4",
    "A8W8": "--quant a8w8",
    FOUR: "--quant a16w4",
    "4 bits, plain formula": "--quant a16w4 --search none",
    "4 bits, float zeros": f"--quant-config {FLOAT_ZEROS.name} --lm-head int8 --embeddings int8",
    "4 bits g64": "--quant a16w4 --group-size 64",
    "4 bits g16": "--quant a16w4 --group-size 16",
    "5.5 bits a weight": "--quant a16w4 --bits-per-weight 5.5",
    "6.2 bits a weight": "--quant a16w4 --bits-per-weight 6.2",
}
FITTED = {
    "4 bits, calibrated": f"--quant a16w4 --calibration {CALIBRATION}",
    "6.2 bits a weight, calibrated": f"--quant a16w4 --bits-per-weight 6.2 --calibration {CALIBRATION}",
}
PLUGIN = ", plugin"
WITH_KERNELS = {
    f"{name}{PLUGIN}": f"{(ASKED | FITTED)[name]} --plugin auto"
    for name in (
        EIGHT,
        "8 bits by channel, exact",
        "8 bits, int8 cache",
        "8 bits, uint4 cache",
        "A8W8",
        FOUR,
        "4 bits g64",
        "6.2 bits a weight",
        "6.2 bits a weight, calibrated",
    )
}


def asked(options: str) -> Form:
    """What these options of `instantrt compile` make."""
    form = ours(options, {"none": 32, "a16w8": 8, "a8w8": 8}.get(options.split()[1], 4))
    words = tuple(str(FLOAT_ZEROS) if word == FLOAT_ZEROS.name else word for word in form.words)
    return replace(form, words=words, python="calibration" if CALIBRATION in words else form.python)


FRONTIER = Contest(
    forms={
        **{name: asked(options) for name, options in (ASKED | FITTED | WITH_KERNELS).items()},
        **{f"llama.cpp {kind}": llama(kind, bits) for kind, bits in (("Q8_0", 8), ("Q4_K_M", 4), ("Q4_0", 4))},
    },
    first=(),
    rounds={DECODE: ("decode", 128), DECODE_LONG: ("decode", 1024)},
    bases={(measure, None): EIGHT for measure in (DECODE, DECODE_LONG)},
    speed=DECODE,
    loss="nats a token",
)
LINK = "import os, sys; os.symlink(sys.argv[1], sys.argv[2] + '/model.gguf')"
LLAMA, AUTO = "llama.cpp", "auto"
OF_GGUF = Contest(
    forms={
        FLOAT: ours("--requantize --quant none", 32),
        **{preset: ours(f"--cpu-preset {preset}", 4) for preset in ("exact", AUTO, "fast")},
        LLAMA: Form("llama", "llama", ("-c", LINK, MODEL, MADE), "model.gguf", "model.gguf", 4),
    },
    first=(),
    rounds={PREFILL: ("prefill", 512), DECODE: ("decode", 128), DECODE_LONG: ("decode", 1024)},
    bases={(measure, None): LLAMA for measure in (PREFILL, DECODE, DECODE_LONG)},
    speed=DECODE,
    loss="nats a token",
)
CONTESTS = {"decoder": DECODER, "shape": SHAPE, "encoder": ENCODER, "frontier": FRONTIER, "gguf": OF_GGUF}
