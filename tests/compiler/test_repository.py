"""Artifacts as Triton model repositories: which models there are, what their configurations say, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from instantrt.compiler.artifact.manifest import Artifact, TensorSpec, write_manifest
from instantrt.compiler.serving.config import bare_config, encoder_config, generate_config
from instantrt.compiler.serving.readme import ONNXRUNTIME, REQUIREMENTS
from instantrt.compiler.serving.repository import RUNTIME, RUNTIME_FILES
from instantrt.passes.core.errors import UserError
from tests.conftest import ROOT
from tests.repositories import write_repository

CPU = Artifact(
    target="x86",
    kind="onnx",
    path="x86/model.onnx",
    inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
    outputs=(TensorSpec("logits", "float32", ("batch", "sequence", 4096)),),
    quant={},
    llm={"layers": 1, "kv_heads": 2, "head_dim": 64, "vocab": 4096, "max_length": 1024},
    digests={"x86/model.onnx": "12", "x86/model.onnx.data": "34", "x86/tokenizer.json": "56"},
    limits={"cache": "shared"},
    source={"model": "tiny"},
)
RECORD = {"builder": "tensorrt", "version": "10.13.0", "sm": 89, "options": {}, "profiles": [{}, {}]}
ENGINE = replace(
    CPU,
    target="sm89",
    kind="engine",
    path="sm89/model.engine",
    inputs=(*CPU.inputs, TensorSpec("past_key_values.0.key", "bfloat16", ("batch", 2, "past", 64))),
    digests={"sm89/model.engine": "78", "sm89/tokenizer.json": "56", "plugins/libwoq.so": "90"},
    limits={"cache": "concat"},
    engine=RECORD,
)


def output(folder: Path, *artifacts: Artifact, model: str = "tiny") -> Path:
    """A compile's output folder with empty files."""
    for artifact in artifacts:
        path = folder / artifact.path
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in (path.name, "tokenizer.json", "config.json"):
            (path.parent / name).write_text(name)
        if artifact.kind == "onnx":
            (path.parent / "model.onnx.data").write_text("weights")
        for plugin in artifact.plugins:
            (folder / plugin).parent.mkdir(exist_ok=True)
            (folder / plugin).write_text("library")
            (folder / plugin).with_suffix(".choices").write_text("# measured")
    write_manifest(folder, [replace(a, source={"model": model}) for a in artifacts])
    return folder


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_the_engine_config() -> None:
    assert bare_config("tiny_sm89", ENGINE) == (
        """name: "tiny_sm89"
platform: "tensorrt_plan"
max_batch_size: 0
input: [
  { name: "input_ids", data_type: TYPE_INT64, dims: [-1, -1] },
  { name: "past_key_values.0.key", data_type: TYPE_BF16, dims: [-1, 2, -1, 64] }
]
output: [
  { name: "logits", data_type: TYPE_FP32, dims: [-1, -1, 4096] }
]
instance_group: [
  { count: 1, kind: KIND_GPU, profile: ["0", "1"] }
]
"""
    )


def test_a_tensor_type_that_triton_lacks_is_refused() -> None:
    odd = replace(CPU, inputs=(TensorSpec("x", "float8_e4m3fn", (1,)),))
    with pytest.raises(UserError, match="no such tensor type"):
        bare_config("odd", odd)


@pytest.mark.parametrize(("longest", "served"), [(1024, 1024), (131072, 4096), (0, 4096)])
def test_the_served_length(longest: int, served: int) -> None:
    config = generate_config("tiny_generate", replace(CPU, llm={**(CPU.llm or {}), "max_length": longest}))
    assert f'{{ key: "max_length", value: {{ string_value: "{served}" }} }}' in config


def test_both_models_of_an_artifact(tmp_path: Path) -> None:
    out, folder = output(tmp_path / "out", CPU), tmp_path / "repository"
    (served,) = write_repository(out, folder)
    assert served.models == ("tiny", "tiny_generate")
    side = {"tokenizer.json", "config.json", "model.onnx", "model.onnx.data"}
    assert files(folder) == {
        "README.md",
        "requirements.txt",
        *(f"tiny/{name}" for name in ("config.pbtxt", "1/model.onnx", "1/model.onnx.data")),
        *(f"tiny_generate/1/{name}" for name in (*side, *RUNTIME_FILES, "artifact.json") if name != "encoder_model.py"),
        "tiny_generate/config.pbtxt",
    }
    weights = [folder / model / "1" / "model.onnx.data" for model in served.models]
    assert len({path.stat().st_ino for path in weights}) == 1
    assert (folder / "tiny_generate/1/config.json").stat().st_ino != (out / "x86/config.json").stat().st_ino


def test_what_the_generate_model_holds_its_files_against(tmp_path: Path) -> None:
    """The model and its plugins; a tokenizer may be edited."""
    engine = replace(ENGINE, plugins=("plugins/libwoq.so",))
    write_repository(output(tmp_path / "out", CPU, engine), tmp_path / "repository")
    records = [
        json.loads((tmp_path / "repository" / f"tiny_{target}_generate" / "1" / "artifact.json").read_text("utf-8"))
        for target in ("x86", "sm89")
    ]
    assert records == [
        {"files": {"model.onnx": "12", "model.onnx.data": "34"}, "engine": None},
        {
            "files": {"model.engine": "78", "libwoq.so": "90"},
            "engine": {"builder": "tensorrt", "version": "10.13.0"},
        },
    ]


@pytest.mark.parametrize("lost", ["sm89/model.engine", "plugins/libwoq.so"])
def test_what_cannot_be_checked_is_not_served(tmp_path: Path, lost: str) -> None:
    digests = {name: digest for name, digest in ENGINE.digests.items() if name != lost}
    out = output(tmp_path / "out", replace(ENGINE, plugins=("plugins/libwoq.so",), digests=digests))
    with pytest.raises(UserError, match=rf"{lost}: the manifest has no digest"):
        write_repository(out, tmp_path / "repository")


@pytest.mark.parametrize(
    ("artifact", "rows"),
    [
        (CPU, 16),
        (ENGINE, 16),
        (replace(ENGINE, limits={"cache": "shared", "max_batch": 8}), 8),
    ],
    ids=["onnx", "row by row", "as built"],
)
def test_the_served_batch(artifact: Artifact, rows: int) -> None:
    config = generate_config("tiny_generate", artifact)
    assert f'{{ key: "max_batch", value: {{ string_value: "{rows}" }} }}' in config


def test_a_model_that_is_no_language_model_has_no_generate_model(tmp_path: Path) -> None:
    out = output(tmp_path / "out", replace(CPU, llm=None), model="minilm.onnx")
    (served,) = write_repository(out, tmp_path / "repository")
    assert served.models == ("minilm",)
    text = (tmp_path / "repository" / "README.md").read_text("utf-8")
    assert "| x86 | none: it is no causal language model | python |" in text
    assert "generate_stream" not in text


SIZES = {"layers": 1, "vocab": 4096, "width": 8, "max_length": 64, "token_types": False, "lowercase": False}
PROMPTS = {"prompts": {}, "default_prompt": ""}
ENCODER = replace(CPU, llm=None, encoder={**SIZES, **PROMPTS, "task": "classify", "labels": ["a"]})


@pytest.mark.parametrize("artifact", [CPU, ENCODER], ids=["generates", "classifies"])
def test_without_a_tokenizer_the_bare_model_is_alone_and_the_reason_is_said(tmp_path: Path, artifact: Artifact) -> None:
    digests = {name: digest for name, digest in CPU.digests.items() if name != "x86/tokenizer.json"}
    write_repository(output(tmp_path / "with", artifact), tmp_path / "both")
    (served,) = write_repository(output(tmp_path / "out", replace(artifact, digests=digests)), tmp_path / "repository")
    assert (tmp_path / "both" / served.of_text).is_dir()
    assert served.models == ("tiny",)
    assert not (tmp_path / "repository" / served.of_text).exists()
    said = f"| x86 | none: {served.no_text} | python |"
    assert "no tokenizer.json" in said
    assert said in (tmp_path / "repository" / "README.md").read_text("utf-8")


def test_an_encoder_has_the_inputs_that_say_something_to_it() -> None:
    """Pairs for labels, prompts where there are some."""
    embeds = replace(ENCODER, encoder={**SIZES, "task": "embed", "labels": [], "prompts": {"query": "find "}})
    optional = ("text_pair", "prompt_name")
    for artifact, taken in ((ENCODER, [True, False]), (embeds, [False, True])):
        config = encoder_config("tiny", artifact)
        found = [f'"{name}", data_type: TYPE_STRING, dims: [1], optional: true' in config for name in optional]
        assert found == taken


def test_several_artifacts_are_named_after_their_targets(tmp_path: Path) -> None:
    engine = replace(ENGINE, plugins=("plugins/libwoq.so",))
    out = output(tmp_path / "out", CPU, engine, model="tiny.onnx")
    served = write_repository(out, tmp_path / "repository")
    assert [each.models for each in served] == [("tiny_x86", "tiny_x86_generate"), ("tiny_sm89", "tiny_sm89_generate")]
    own = ("model.engine", "libwoq.so", "libwoq.choices", "tokenizer.json", "model.py")
    generate = {f"tiny_sm89_generate/1/{name}" for name in own}
    assert {"tiny_sm89/1/model.plan", "plugins/libwoq.so", "plugins/libwoq.choices", *generate} <= files(
        tmp_path / "repository"
    )
    needed = (tmp_path / "repository" / "requirements.txt").read_text("utf-8").splitlines()
    assert {"onnxruntime==1.32.0", "tensorrt==10.13.0"} <= set(needed)
    text = (tmp_path / "repository" / "README.md").read_text("utf-8")
    assert '--backend-config=tensorrt,plugins="plugins/libwoq.so"' in text
    assert "| sm89 | `tiny_sm89_generate` | python |" in text
    config = (tmp_path / "repository" / "tiny_sm89_generate" / "config.pbtxt").read_text("utf-8")
    assert '{ key: "runtime", value: { string_value: "tensorrt" } }' in config
    assert "{ count: 1, kind: KIND_GPU, gpus: [0] }" in config


@pytest.mark.parametrize(
    ("artifact", "reason"),
    [
        (replace(ENGINE, engine={**RECORD, "builder": "tensorrt_rtx"}), "no backend for TensorRT-RTX engines"),
        (replace(ENGINE, limits={"cache": "shared", "max_batch": 8}), "does not alias past and present"),
    ],
)
def test_what_only_the_generate_model_can_serve(tmp_path: Path, artifact: Artifact, reason: str) -> None:
    out, folder = output(tmp_path / "out", artifact), tmp_path / "repository"
    (served,) = write_repository(out, folder)
    assert served.models == ("tiny_generate",)
    assert "none: Triton" in (folder / "README.md").read_text("utf-8")
    assert reason in (folder / "README.md").read_text("utf-8")


def test_what_triton_cannot_serve_is_said(tmp_path: Path) -> None:
    out, folder = output(tmp_path / "out", replace(ENGINE, kind="kit")), tmp_path / "repository"
    with pytest.raises(UserError, match="a build kit is not a model yet"):
        write_repository(out, folder)
    assert not folder.exists()


def test_the_same_artifact_gives_the_same_bytes_and_replaces_the_old(tmp_path: Path) -> None:
    out, folder = output(tmp_path / "out", CPU), tmp_path / "repository"
    write_repository(out, folder)
    first = {name: (folder / name).read_bytes() for name in files(folder)}
    (folder / "tiny" / "1" / "stale").write_text("")
    write_repository(out, folder)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == first
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    out, folder = output(tmp_path / "out", CPU), tmp_path / "repository"
    (folder / "photos").mkdir(parents=True)
    with pytest.raises(UserError, match="not a model repository"):
        write_repository(out, folder)
    assert files(folder) == set()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        write_repository(out, tmp_path / "file")


def test_a_failure_leaves_no_half_written_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, folder = output(tmp_path / "out", CPU), tmp_path / "repository"

    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("instantrt.compiler.serving.repository.generate_config", full)
    with pytest.raises(UserError, match=r"could not be written\n.*No space left"):
        write_repository(out, folder)
    assert not folder.exists()


def test_the_runtime_imports_nothing_of_this_project(tmp_path: Path) -> None:
    """Beside the model it must run with its four libraries alone."""
    code = f"""
import importlib, json, pathlib, sys
pathlib.Path("1").symlink_to({str(RUNTIME)!r})
sys.path.insert(0, ".")
sys.modules["triton_python_backend_utils"] = sys
before = set(sys.modules)
for name in {RUNTIME_FILES!r}:
    importlib.import_module("1." + name.removesuffix(".py"))
print(json.dumps(sorted({{m.partition(".")[0] for m in set(sys.modules) - before}})))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = set(json.loads(done.stdout))
    assert {"numpy", "onnxruntime", "jinja2", "tokenizers"} <= found
    assert not found & {"compiler", "passes", "plugins", "tools", "torch", "transformers", "onnx", "onnx_graphsurgeon"}


def test_the_versions_are_those_of_the_tests() -> None:
    tested = (ROOT / "tests" / "serving" / "requirements.txt").read_text("utf-8").splitlines()
    assert {line.partition(" ")[0] for line in (*REQUIREMENTS, ONNXRUNTIME)} <= set(tested)
