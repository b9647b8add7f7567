"""What the generate model loads is what was written: every other file is refused before anything reads it."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file, save_file

from instantrt.compiler.artifact import hashing as artifact_hashing
from instantrt.compiler.artifact.digest import CHUNK, sha256
from instantrt.compiler.artifact.hashing import Hashing
from instantrt.compiler.checkpoint import INDEX, SINGLE
from instantrt.compiler.frontend import hf
from instantrt.compiler.serving.runtime import opening
from instantrt.compiler.serving.runtime.integrity import RECORD, check_folder
from instantrt.passes.core.errors import UserError
from tests.compiler.tensorrt_stand_in import PLAN
from tests.conftest import TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An engine with a plugin, as a repository holds them."""
    (tmp_path / "model.engine").write_bytes(PLAN)
    (tmp_path / "libwoq.so").write_bytes(b"\x7fELF")
    (tmp_path / "tokenizer.json").write_text("{}")
    files = {name: sha256(tmp_path / name) for name in ("model.engine", "libwoq.so")}
    record = {"files": files, "engine": {"builder": "tensorrt", "version": "10.13.0.35"}}
    (tmp_path / RECORD).write_text(json.dumps(record))
    return tmp_path


def test_what_was_written_is_taken(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"edited": true}')
    (folder / "libstranger.so").write_bytes(b"nobody checked this one")
    assert check_folder(folder, "engine") == (folder / "libwoq.so",)


def test_the_digest_of_a_file_larger_than_a_chunk(tmp_path: Path) -> None:
    data = bytes(range(256)) * (CHUNK // 128 + 1)
    (tmp_path / "large").write_bytes(data)
    assert sha256(tmp_path / "large") == hashlib.sha256(data).hexdigest()


def test_large_files_are_hashed_by_a_process_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        tmp_path / name: bytes([index]) * size for index, (name, size) in enumerate([("a", 9), ("é b", 10), ("c", 99)])
    }
    for path, data in files.items():
        path.write_bytes(data)
    wanted = {path.name: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    monkeypatch.setattr(artifact_hashing, "LARGE", 10)
    with Hashing() as hashing:
        hashing.begin([tmp_path / "nothing", tmp_path, *files])
        hashing.begin(files)  # which all have begun
        ((begun, child),) = hashing.children
        assert [path.name for path in begun] == ["é b", "c"]
        assert hashing.by_name(files) == hashing.by_name(files) == wanted
        assert child.returncode == 0
        assert [*hashing.known] == begun
        hashing.known[tmp_path / "c"] = "taken before"
        assert hashing.by_name(files)["c"] == "taken before"


def test_a_process_that_ends_early_costs_its_digests_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"one")
    monkeypatch.setattr(artifact_hashing, "LARGE", 1)
    with Hashing() as hashing:
        killed = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE, text=True)
        hashing.children.append(([tmp_path / "a"], killed))
        assert hashing.by_name([tmp_path / "a"]) == {"a": hashlib.sha256(b"one").hexdigest()}
    with Hashing() as hashing:
        hashing.begin([tmp_path / "a"])
        ((_, child),) = hashing.children
    assert child.returncode is not None  # none outlives the block
    with Hashing() as hashing, pytest.raises(UserError, match="files changed meanwhile"):
        hashing.by_name([tmp_path / "gone"])
    monkeypatch.setattr(sys, "executable", "/nothing")
    with Hashing() as hashing:
        hashing.begin([tmp_path / "a"])
        assert hashing.by_name([tmp_path / "a"]) == {"a": hashlib.sha256(b"one").hexdigest()}


def test_a_file_that_is_another_since_its_digest_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"one")
    monkeypatch.setattr(artifact_hashing, "LARGE", 1)
    with Hashing() as hashing:
        hashing.begin([tmp_path / "a"])
        (tmp_path / "new").write_bytes(b"three")
        (tmp_path / "new").replace(tmp_path / "a")
        with pytest.raises(UserError, match="a: the model's files changed meanwhile"):
            hashing.by_name([tmp_path / "a"])


def test_a_killed_command_leaves_no_process_that_hashes(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)  # none of it on the disk, and minutes of hashing
    code = "import sys; from pathlib import Path; from instantrt.compiler.artifact.hashing import Hashing\n"
    code += (
        "with Hashing() as h: h.begin([Path(sys.argv[1])]); print(h.children[0][1].pid, flush=True); sys.stdin.read()"
    )
    command, pipe = [sys.executable, "-c", code, str(tmp_path / "large")], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as parent:
        assert parent.stdout is not None
        state = Path(f"/proc/{int(parent.stdout.readline())}/stat")
        time.sleep(0.5)  # for it to begin
        assert ") Z " not in state.read_text()
        parent.kill()
    deadline = time.monotonic() + 10
    while state.exists() and ") Z " not in state.read_text():  # ended, and nobody's to wait for
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_files_to_hash_are_known_before_torch_is_imported(tmp_path: Path) -> None:
    """Whatever they are called."""
    tensors, names = load_file(TINY / SINGLE), ("first of two", "second")
    parts = dict(zip(names, (dict(islice(tensors.items(), 5)), dict(islice(tensors.items(), 5, None))), strict=True))
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    weights = {tensor: name for name, part in parts.items() for tensor in part}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}))
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    events: list[object] = []
    hf.open_checkpoint(tmp_path, cache=tmp_path / "cache", say=events.append, reads=lambda f: events.append({*f}))
    assert events == [{tmp_path / name for name in names}, hf.IMPORTING]


def edit_record(folder: Path, old: str, new: str) -> None:
    text = (folder / RECORD).read_text()
    assert old in text
    (folder / RECORD).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: (folder / "model.engine").write_bytes(PLAN + b"!"),
            "model.engine is not what the compiler wrote: expected sha256 .*, found [0-9a-f]{64}: copy it again",
        ),
        (lambda folder: (folder / "libwoq.so").write_bytes(b"\x7fELF2"), "libwoq.so is not what the compiler wrote"),
        (lambda folder: (folder / "model.engine").unlink(), "found no such file"),
        (
            lambda folder: edit_record(folder, "10.13.0.35", "10.14.0.1"),
            "expected tensorrt 10.14.0.1, found tensorrt 10.13.0.35",
        ),
        (
            lambda folder: edit_record(folder, "model.engine", "engine.model"),
            "model.engine .* expected a digest in its record, found none",
        ),
    ],
    ids=["engine", "plugin", "missing", "version", "no digest"],
)
def test_what_was_changed_is_refused_before_it_is_loaded(
    folder: Path, damage: Callable[[Path], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the entry that Triton calls, which imports TensorRT only after that."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace())
    model = importlib.import_module("instantrt.compiler.serving.runtime.model")
    monkeypatch.setattr(opening.importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    monkeypatch.setattr(model, "Text", lambda path: None)
    monkeypatch.setattr(model, "__file__", str(folder / "model.py"))
    damage(folder)
    values = {"max_batch": 1, "max_length": 8, "max_queue": 1, "threads": 0, "runtime": "tensorrt", "cache": "shared"}
    config = {"parameters": {name: {"string_value": str(value)} for name, value in values.items()}}
    with pytest.raises(RuntimeError, match=words):
        model.TritonPythonModel().initialize({"model_config": json.dumps(config), "model_instance_device_id": "0"})


def test_a_file_that_is_no_engine_is_refused(folder: Path) -> None:
    (folder / "model.engine").write_bytes(b"#!/bin/sh")
    record = json.loads((folder / RECORD).read_text())
    record["files"]["model.engine"] = sha256(folder / "model.engine")
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(RuntimeError, match=r"expected tensorrt 10\.13\.0\.35, found no engine"):
        check_folder(folder, "engine")
