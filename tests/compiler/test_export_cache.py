"""A second compile takes what the first left: without torch, byte for byte; and nothing in the folder can harm it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import grimp
import numpy as np
import pytest

from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.compile import Watch, compile_model
from instantrt.compiler.frontend import export_cache
from instantrt.compiler.frontend.export_cache import MOST, NONE, VARIABLE, cache_folder, digest_of, keep, prune, recall
from instantrt.compiler.frontend.hf import load_checkpoint, open_checkpoint
from instantrt.compiler.request import Request
from instantrt.passes.core.lazy import Array, whole
from tests.checkpoints import TINY, config_of, whole_checkpoint, write_checkpoint
from tests.conftest import contents
from tests.models import make

ABOUT = {"config": {"hidden_size": 64}}
WARM = """
import json, sys
from pathlib import Path
from instantrt.compiler.compile import Watch, compile_model
from instantrt.compiler.inspect import inspect
from instantrt.compiler.request import Request

class Said(Watch):
    say = staticmethod(print)

for model in map(Path, sys.argv[2:]):
    inspect(model)
    compile_model(Request(model, "x86", Path(sys.argv[1]) / model.name, smoke=False), watch=Said())
print(*sorted({"torch", "transformers", "onnxscript", "onnx_ir"} & set(sys.modules)))
"""


class Said(Watch):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def models(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name -> (checkpoint, what becomes of its graph where those before it were compiled)."""

    def tie(config: dict[str, Any], tensors: dict[str, Array]) -> None:
        config["tie_word_embeddings"] = True
        del tensors["lm_head.weight"]

    quantized = whole_checkpoint("gptq-int4-g128-desc_act", folder / "quantized", tie)
    config = {key: value for key, value in config_of(quantized).items() if key != "quantization_config"}
    stored = {n: t for n, t in read_checkpoint(TINY).items() if ".layers." not in n or ".layers.0." in n}
    tensors = {name: whole(tensor) for name, tensor in stored.items() if name != "lm_head.weight"}
    head = tensors["model.embed_tokens.weight"]
    make("apertus", folder / "sources", num_hidden_layers=1)
    beta = {name: whole(tensor) for name, tensor in read_checkpoint(folder / "sources").items()}
    return {
        "tied": (write_checkpoint(folder / "tied", config, tensors), "exporting"),
        "copied": (write_checkpoint(folder / "copied", config, {**tensors, "lm_head.weight": head}), "taking"),
        "quantized": (quantized, "taking"),
        "untied": (write_checkpoint(folder / "untied", config, {**tensors, "lm_head.weight": head * 2}), "exporting"),
        "buffer": (write_checkpoint(folder / "buffer", config_of(folder / "sources"), beta), "exporting"),
    }


def exporting(folder: Path, cache: Path) -> bool:
    """Is a model's graph exported, and not one of an earlier export? It is stopped before it is."""

    def stop(text: str) -> None:
        if text.startswith("exporting"):
            raise InterruptedError

    try:
        load_checkpoint(open_checkpoint(folder, cache=cache), stop)
    except InterruptedError:
        return True
    return False


@pytest.mark.slow
def test_a_second_compile_imports_no_torch_and_writes_the_same_bytes(tmp_path: Path) -> None:
    """What the graph depends on is in its key: models of one config that differ there do not take one another's."""
    cache, checkpoints = tmp_path / "cache", models(tmp_path / "models")
    for name, (model, becomes) in checkpoints.items():
        said = Said()
        compile_model(Request(model, "x86", tmp_path / "cold" / name, smoke=False, cache=cache), watch=said)
        began = [line.split()[0] for line in said.lines]
        assert [stage for stage in began if stage != "importing"][:2] == ["reading", becomes], name
    folders = [str(model) for model, _ in checkpoints.values()]
    command = [sys.executable, "-c", WARM, str(tmp_path / "warm"), *folders]
    environment = {**os.environ, VARIABLE: str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "exporting" not in done.stdout
    assert done.stdout.count("taking the graph of an earlier export") == len(folders)
    assert done.stdout.endswith("\n\n"), "no line of modules"
    assert contents(tmp_path / "warm") == contents(tmp_path / "cold")
    buffer, _ = checkpoints["buffer"]
    tensors = {name: whole(tensor) for name, tensor in read_checkpoint(buffer).items()}
    tensors["model.layers.0.mlp.act_fn.beta"] *= np.float32(1.5)
    another = write_checkpoint(tmp_path / "another", config_of(buffer), tensors)
    assert [exporting(folder, cache) for folder in (buffer, another)] == [False, True]


def test_nothing_is_kept_where_none_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.delenv(VARIABLE)
    open_checkpoint(TINY, cache=NONE)
    assert not home.exists()
    open_checkpoint(TINY)
    assert entry(home / "instantrt").stat().st_mode & 0o777 == 0o600


def test_a_model_that_brings_its_code_is_not_kept(tmp_path: Path) -> None:
    """The code may be another the next time."""
    (tmp_path / "configuration.py").write_text(
        "from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    model_type = 'own_llama'\n"
    )
    (tmp_path / "modeling.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration import Own\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = Own\n"
    )
    code = {"AutoConfig": "configuration.Own", "AutoModelForCausalLM": "modeling.OwnForCausalLM"}
    make("llama", tmp_path / "llama", num_hidden_layers=1)
    config = {**config_of(tmp_path / "llama"), "model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    tensors = {name: whole(tensor) for name, tensor in read_checkpoint(tmp_path / "llama").items()}
    write_checkpoint(tmp_path, {**config, "auto_map": code}, tensors)
    opened = open_checkpoint(tmp_path, trust_remote_code=True, cache=tmp_path / "cache")
    assert opened.taken.facts.name == "OwnForCausalLM"
    assert opened.kept is None
    assert not (tmp_path / "cache").exists()


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    """Even to an entry that is right."""
    path.rename(path.parent.parent / "moved")
    path.symlink_to(path.parent.parent / "moved")


def folder_of_this_name(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_another_name(path: Path) -> None:
    keep(path.with_name("0" * 64), b"[5]")
    path.with_name("0" * 64).replace(path)


def large(path: Path) -> None:
    os.truncate(path, 1 << 40)


SPOILT: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"X"),
    "foreign": lambda path: path.write_bytes(b"%PDF-1.7" * 100),
    "of another name": of_another_name,
    "no value": lambda path: path.write_bytes(digest_of(path.name, b"[") + b"["),
    "a link": link,
    "a pipe": pipe,
    "a folder": folder_of_this_name,
    "a hole of a terabyte": large,
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_no_entry_is_as_if_it_were_not_there(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert recall(folder, ABOUT, lambda: b"[1]", json.loads) == ([1], False)
    assert recall(folder, ABOUT, lambda: b"[2]", json.loads) == ([1], True)
    SPOILT[how](entry(folder))
    assert recall(folder, ABOUT, lambda: b"[3]", json.loads) == ([3], False)
    if how != "a folder":  # which nothing replaces
        assert recall(folder, ABOUT, lambda: b"[4]", json.loads) == ([3], True)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_an_entry_of_another_user_is_not_read(tmp_path: Path) -> None:
    recall(tmp_path, ABOUT, lambda: b"[1]", json.loads)
    os.chown(entry(tmp_path), 12345, -1)
    assert recall(tmp_path, ABOUT, lambda: b"[2]", json.loads) == ([2], False)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may be longer than a kilobyte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "cache", Path("/proc/nothing")):
        assert recall(folder, ABOUT, lambda: b"[1]", json.loads) == ([1], False)
    with full_disk():
        assert recall(tmp_path / "full", ABOUT, lambda: b"[1]" + b" " * 2048, json.loads) == ([1], False)
    assert list((tmp_path / "full").iterdir()) == []


def test_what_raises_is_not_kept(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise ValueError("no graph")

    with pytest.raises(ValueError, match="no graph"):
        recall(tmp_path / "cache", ABOUT, fail, json.loads)
    assert not (tmp_path / "cache").exists()


def test_the_code_and_what_is_asked_are_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = export_cache.code()
    for i, change in enumerate([{}, {"torch": "0"}, {"sources": "0"}, {"python": "3"}]):
        assert change.keys() <= versions.keys()
        assert "" not in versions.values(), "every library is found by its name"
        monkeypatch.setattr(export_cache, "code", lambda change=change: {**versions, **change})
        for j, about in enumerate([ABOUT, {"config": {"hidden_size": 65}}]):
            said = json.dumps([i, j]).encode()
            assert recall(tmp_path, about, lambda said=said: said, json.loads) == ([i, j], False)


def test_libraries_of_one_version_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two commits of a `.dev0` do: what was installed is written down with its digests."""
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "library_of_ours-1.0.dev0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: library-of-ours\nVersion: 1.0.dev0\n")
    seen = set()
    for digest in "ab":
        (folder / "RECORD").write_text(f"library_of_ours.py,sha256={digest},1\n")
        seen.add(export_cache.installed("library-of-ours"))
    assert [each.split()[0] for each in seen] == ["1.0.dev0"] * 2


def test_all_code_that_exports_is_in_the_key() -> None:
    """Of ours: what the modules that make entries import, at any depth."""
    graph = grimp.build_graph("instantrt", cache_dir=None, exclude_type_checking_imports=True)
    makers = [f"instantrt.compiler.frontend.{name}" for name in ("skeleton", "facts", "export", "export_cache")]
    used = {*makers, *(module for maker in makers for module in graph.find_upstream_modules(maker))}
    packages = {"instantrt." + ".".join(folder.parts[-2:]) for folder in export_cache.SOURCES}
    assert {module.rpartition(".")[0] for module in used} == packages


def test_the_entries_that_were_used_last_stay(tmp_path: Path) -> None:
    names = [str(i) * 64 for i in range(6)]
    for i, name in enumerate([*names, names[0] + ".tmp", "notes.txt"]):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, MOST // 4)
        os.utime(tmp_path / name, (i, i))
    os.utime(tmp_path / "notes.txt", (0, 0))  # the oldest, and not ours
    prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0] + ".tmp", *names[3:], "notes.txt"]


def test_reading_an_entry_makes_it_young(tmp_path: Path) -> None:
    recall(tmp_path, ABOUT, lambda: b"1", json.loads)
    os.utime(entry(tmp_path), (0, 0))
    recall(tmp_path, ABOUT, lambda: b"1", json.loads)
    assert entry(tmp_path).stat().st_mtime > 0


def test_nobody_sees_a_part(tmp_path: Path) -> None:
    """Two compiles that write what a third reads."""
    path, data = tmp_path / "cache" / ("1" * 64), bytes(1 << 20)
    keep(path, data)
    writers = [Thread(target=lambda: [keep(path, data) for _ in range(20)]) for _ in range(2)]
    for writer in writers:
        writer.start()
    seen = {export_cache.read(path) for _ in range(200) if any(writer.is_alive() for writer in writers)}
    for writer in writers:
        writer.join()
    assert seen == {data}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("asked", "variable", "home", "folder"),
    [
        (None, None, None, "/home/one/.cache/instantrt"),
        (None, "", "/x", "/x/instantrt"),
        (None, None, "relative", "/home/one/.cache/instantrt"),  # not by the convention
        (None, "/v", "/x", "/v"),
        (Path("/a"), "/v", "/x", "/a"),
        (Path("/a"), "none", None, "/a"),
        (None, "none", "/x", None),
        (NONE, "/v", "/x", None),
    ],
)
def test_where_the_folder_is(
    asked: Path | None, variable: str | None, home: str | None, folder: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/one")
    for name, value in ((VARIABLE, variable), ("XDG_CACHE_HOME", home)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_folder(asked) == (folder and Path(folder))


def test_the_tests_have_a_folder_of_their_own() -> None:
    folder = cache_folder()
    assert folder is not None
    assert ".pytest_cache" in folder.parts
