"""What is made once in a run is made by one, whole, and again if that one failed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest

from tests.once import made_once


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
