"""The output folder: what is not lost in it, and that all of a run appears at once or nothing does."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from instantrt.compiler.accuracy.subjects import request_of
from instantrt.compiler.artifact.manifest import KIT, MANIFEST, read_manifest
from instantrt.compiler.artifact.staging import Staging, check_out, copy_file
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.check import check
from instantrt.compiler.compile import check_places, compile_model
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.plan import Twin
from instantrt.compiler.request import Request
from instantrt.compiler.target import find_target
from instantrt.compiler.write import source
from instantrt.passes.core.errors import UserError
from tests.conftest import TINY, contents
from tests.graphs import model_file
from tests.repositories import write_repository

X86, ARM, SM90 = map(find_target, ("x86", "armv9", "sm90"))


def old_and_new(folder: Path, staging: Staging) -> None:
    """A file and a folder, there and aside; the folder's content changes."""
    for place, text in ((folder, "old"), (staging.staged(folder), "new")):
        (place / "x86").mkdir(parents=True)
        (place / "x86" / text).write_text(text)
        (place / MANIFEST).write_text(text)


def test_what_lies_aside_takes_its_place_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a", tmp_path / "b" / "c"
    first.mkdir()
    rename, moved = Path.rename, []
    monkeypatch.setattr(Path, "rename", lambda path, to: (moved.append(to.name), rename(path, to)))
    with Staging() as staging:
        old_and_new(first, staging)
        (staging.staged(first) / ".scratch").mkdir()
        (staging.staged(first) / "link").symlink_to(tmp_path)
        (staging.staged(second) / "file").write_text("new")
        assert staging.final(staging.staged(second) / "file") == second / "file"
        assert staging.final(tmp_path) == tmp_path
        assert (first / MANIFEST).read_text() == "old"
    assert moved == ["x86", "x86", "file", MANIFEST, MANIFEST], "the manifest last"
    assert contents(tmp_path).keys() == {"a/x86/new", "a/manifest.json", "b/c/file"}
    assert {p.name for p in first.iterdir()} == {"x86", MANIFEST}
    assert (first / MANIFEST).read_text() == "new"


@pytest.mark.parametrize("of_system", [False, True])
def test_errors_name_the_place_of_a_file_not_where_it_is_staged(of_system: bool, tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        with Staging() as staging:
            path = str(staging.staged(out) / ".lowered.a1_b" / "model.onnx")
            raise OSError(28, "No space left", path) if of_system else UserError("no", where=path, found=f"'{path}'")

    with pytest.raises(OSError if of_system else UserError) as caught:
        fail(tmp_path / "out")
    assert os.fspath(tmp_path / "out" / "model.onnx") in str(caught.value)
    assert "/." not in str(caught.value)


def test_an_interruption_of_the_clearing_leaves_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, times = shutil.rmtree, iter([True])

    def interrupted(path: Path, **how: bool) -> None:
        if next(times, False):
            raise KeyboardInterrupt
        remove(path, **how)

    def publish(out: Path) -> None:
        with Staging() as staging:
            (staging.staged(out) / "model.onnx").touch()

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("failing", range(1, 6))
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the four moves in turn; the fifth stands for whatever came before them."""
    rename, moves = Path.rename, []

    def interrupted(path: Path, target: Path) -> Path:
        moves.append(target)
        if len(moves) == failing:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    folder = tmp_path / "out"
    folder.mkdir()

    def write() -> None:
        with Staging() as staging:
            old_and_new(folder, staging)
            staging.staged(tmp_path / "never" / "made")
            if failing == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {name: (folder / name).read_text() for name in contents(folder)} == {"x86/old": "old", MANIFEST: "old"}


@pytest.fixture
def out(tiny_compiled: Path, tmp_path: Path) -> Path:
    """An x86 artifact, to be changed."""
    return Path(shutil.copytree(tiny_compiled, tmp_path / "out"))


def test_what_compile_did_not_write_is_not_replaced(out: Path) -> None:
    check_out(out, [X86, ARM])
    (out / "x86" / "notes").mkdir()
    check_out(out, [X86])
    (out / "x86" / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out/x86: .* would be lost\n.*notes/a.txt\n"):
        check_out(out, [X86])
    check_out(out, [ARM])
    (out / "armv9").write_text("a file")
    with pytest.raises(UserError, match="would be lost"):
        check_out(out, [ARM])
    (out / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"config.json, .* and \d more"):
        check_out(out, [X86])


def test_a_kit_counts_as_ours(tmp_path: Path) -> None:
    folder = tmp_path / "sm90"
    folder.mkdir()
    (folder / KIT).write_text(json.dumps({"digests": {"model.onnx": ""}}))
    (folder / "model.onnx").write_text("")
    check_out(tmp_path, [SM90])
    (folder / "model.engine").write_text("built by hand")
    with pytest.raises(UserError, match=r"found: +sm90/model.engine"):
        check_out(tmp_path, [SM90])


def test_a_model_is_not_replaced_by_its_artifact(out: Path) -> None:
    model = out / "x86" / "model.onnx"
    before = contents(out)
    with pytest.raises(UserError, match=r"model.onnx: this lies in the folder that the artifact for x86 replaces"):
        compile_model(Request(model, ("x86",), out))
    with pytest.raises(UserError, match="this lies in the folder"):
        check_out(out, [X86], [out / "x86" / "repository"])
    check_out(out, [ARM], [model])
    assert contents(out) == before


def test_a_place_that_cannot_be_written_is_known_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nothing")
    impossible = ["file", "file/deeper", "link", "x" * 300, "/proc/x", "/proc/self/x"]
    for out in (tmp_path / name for name in impossible):
        with pytest.raises(UserError, match=r"not a folder that can be written(.|\n)*found:(.|\n)*another with -o"):
            check_out(out, [X86])
        with pytest.raises(UserError, match=r"not a folder that can be written(.|\n)*another for --triton"):
            check_places(Request(TINY, ("x86",), tmp_path / "out"), triton=out)
        with pytest.raises(UserError, match=r"not a folder that can be written(.|\n)*another for --dump-passes"):
            check_places(Request(TINY, ("x86",), tmp_path / "out", dump_passes=out))
    check_out(tmp_path / "new" / "folder", [X86])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]  # what was tried is gone


def test_a_second_compile_keeps_the_artifacts_of_the_first(out: Path) -> None:
    (first,) = read_manifest(out)
    compile_model(Request(TINY, ("armv9",), out, quant="a16w4", group_size=32))
    kept, second = read_manifest(out)
    assert kept == first
    assert [line.partition(":")[0] for line in check(out)] == ["x86", "armv9"]
    assert (kept.source["request"]["quant"], second.source["request"]["quant"]) == ("a16w8", "a16w4")
    with pytest.raises(UserError, match="the artifacts are of several requests"):
        request_of(out, TINY, None)
    assert request_of(out, TINY, "x86")[0].quant == "a16w8"
    assert [s.name for s in write_repository(out, out.parent / "triton")] == ["tiny-qwen2_x86", "tiny-qwen2_armv9"]
    shutil.rmtree(out / "x86")
    compile_model(Request(TINY, ("armv9",), out, quant="none"))
    assert [a.target for a in read_manifest(out)] == ["armv9"]


def test_each_artifact_says_what_it_was_made_of(out: Path, tmp_path: Path) -> None:
    weights = {"w": np.ones((64, 64), np.float32)}
    other = model_file(tmp_path / "other.onnx", "y = MatMul(x, w)", weights)
    compile_model(Request(other, ("armv9",), out, quant="none"))
    assert [a.source["model"] for a in read_manifest(out)] == ["tiny-qwen2", "other.onnx"]
    names = [s.name for s in write_repository(out, tmp_path / "triton")]
    assert names == ["tiny-qwen2_x86", "other_armv9"]


def test_a_target_that_fails_leaves_the_others_as_they_were(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(out)

    def full(graph: object, path: Path, progress: object) -> dict[str, str]:
        if path.parent.name == "armv9":
            raise UserError("the artifact could not be written")
        return write_model(graph, path, progress)  # type: ignore[arg-type]

    monkeypatch.setattr("instantrt.compiler.write.write_model", full)
    with pytest.raises(UserError, match="could not be written"):
        compile_model(Request(TINY, ("x86", "armv9"), out, quant="a16w4"))
    assert contents(out) == before
    assert not [p for p in out.iterdir() if p.name not in ("x86", MANIFEST)]


def test_the_current_folder_has_a_name(tiny_float: FloatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(TINY)
    twin = Twin({}, tiny_float.graph, tiny_float.graph)
    assert source(Request(tmp_path / "link", ("x86",), tmp_path), twin)["model"] == "link"
    monkeypatch.chdir(TINY)
    assert source(Request(Path(), ("x86",), tmp_path), twin)["model"] == TINY.name


@pytest.mark.parametrize("reason", [None, errno.EXDEV])
def test_side_files_are_copies(reason: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        assert reason
        raise OSError(reason, os.strerror(reason))

    (tmp_path / "a").write_bytes(bytes(range(256)) * 1000)
    if reason:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(b"edited")
    assert (tmp_path / "b").stat().st_size == 256_000
