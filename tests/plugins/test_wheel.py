"""`pip wheel .`: the plugin library travels where there is one, and the wheel's name says for which machines it is."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from instantrt.compiler import request
from instantrt.compiler.request import PACKAGED_PLUGINS, Request
from instantrt.compiler.target import find_target
from instantrt.passes.core.errors import UserError
from tests.conftest import ROOT

pytest.importorskip("setuptools.command.bdist_wheel")
LIBRARIES = ("libinstantrt_plugins.so", "libinstantrt_register_trt10.so")


def wheel(source: Path, out: Path) -> tuple[str, list[str]]:
    """The platform in the wheel's name, and its files in plugins/lib."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*command, str(source)], check=True)
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        carried = [name for name in archive.namelist() if name.startswith("instantrt/plugins/lib/")]
    return file.stem.split("-", 2)[2], sorted(carried)


def test_a_wheel_carries_what_was_installed_into_the_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "plugins", source / "plugins", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    (source / "instantrt").mkdir()
    (source / "instantrt/plugins").symlink_to("../plugins")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    assert wheel(source, tmp_path / "pure") == ("py3-none-any", [])
    (source / "plugins/lib").mkdir()
    for name in LIBRARIES:
        (source / "plugins/lib" / name).write_bytes(b"\x7fELF")
    tag, carried = wheel(source, tmp_path / "platform")
    assert tag.startswith("py3-none-")
    assert not tag.endswith("any")
    assert carried == [f"instantrt/plugins/lib/{name}" for name in LIBRARIES]
    shutil.rmtree(source / "plugins/lib")
    assert wheel(source, tmp_path / "again") == ("py3-none-any", []), "nothing is left of an earlier build"


def test_auto_is_the_packaged_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PACKAGED_PLUGINS.resolve().relative_to(ROOT) == Path("plugins/lib")
    monkeypatch.setattr(request, "PACKAGED_PLUGINS", tmp_path)
    with pytest.raises(UserError, match="no plugin library here") as refused:
        Request(tmp_path, ("sm89",), tmp_path, plugin=Path("auto"))
    assert "make plugins TENSORRT=DIR" in refused.value.fix
    (tmp_path / LIBRARIES[0]).write_bytes(b"\x7fELF")
    asked = Request(tmp_path, ("sm89",), tmp_path, plugin=Path("auto"))
    assert asked.library(find_target("sm89")) == tmp_path / LIBRARIES[0]
