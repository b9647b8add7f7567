"""What is made once in a run is made by one, whole, and again if that one failed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from time import sleep

import pytest

from tests.once import kept, made_once


def test_the_second_waits_for_what_the_first_makes(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = []
    tmp_path_factory.getbasetemp()  # which threads would each make for themselves

    def make(folder: Path) -> None:
        made.append(folder)
        sleep(0.1)
        (folder / "file").write_text("whole")

    with ThreadPoolExecutor() as pool:
        folders = list(pool.map(lambda _: made_once(tmp_path_factory, "once", make), range(4)))
    assert len(made) == 1
    assert {(folder / "file").read_text() for folder in folders} == {"whole"}


def test_what_failed_is_made_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        made_once(tmp_path_factory, "again", fail)
    folder = made_once(tmp_path_factory, "again", lambda new: (new / "file").write_text("whole"))
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_what_is_kept_is_made_again_when_a_source_or_the_tool_changes(
    pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    made, source = [], tmp_path / "source"
    source.write_text("1")

    def make(folder: Path) -> None:
        made.append(source.read_text())
        (folder / "file").write_text(source.read_text())

    for text, tool, expected in (("1", "a", "1"), ("1", "a", "1"), ("2", "a", "2"), ("2", "b", "2")):
        source.write_text(text)
        folder = kept(pytestconfig, f"kept_{tmp_path.name}", [tmp_path], tool, make)
        assert (folder / "file").read_text() == expected
    assert made == ["1", "2", "2"]
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name], "the older ones are gone"
    rmtree(folder.parent)
