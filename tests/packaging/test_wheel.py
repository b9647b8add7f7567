"""The wheel holds this package and nothing else, and works where nothing else of the project is.

An environment here is a real one that holds the wheel and, as links, the packages that its metadata asks for: what is
imported and not declared fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from packaging.requirements import Requirement

from instantrt.compiler import request
from instantrt.compiler.request import PACKAGED_PLUGINS, Request
from instantrt.compiler.target import find_target
from instantrt.passes.core.errors import UserError
from tests.conftest import LIBRARY, ROOT, TINY
from tests.once import made_once

pytestmark = pytest.mark.slow
ROOMS = ("compiler", "passes", "plugins", "tools")
LIBRARIES = ("libinstantrt_plugins.so", "libinstantrt_register_trt10.so")
CHOICES = "libinstantrt_plugins.choices"  # measured, and put there by a person
HF = "needs torch, transformers, onnxscript, gguf, regex: pip install 'instantrt[hf]'"
SDIST = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"


def build_wheel(source: Path, out: Path) -> Path:
    """From the source distribution, as a package index would have it."""
    made = subprocess.run([sys.executable, "-c", SDIST, out], cwd=source, check=True, stdout=subprocess.PIPE, text=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "-w", out, out / made.stdout.split()[-1]], check=True)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as it is committed: no library, no leftovers of a build."""
    folder = tmp_path_factory.mktemp("source")
    for name in (*ROOMS, "instantrt"):
        ignored = shutil.ignore_patterns("lib", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def needed(requirements: list[str], extras: set[str], seen: set[str]) -> Iterator[metadata.Distribution]:
    """The installed distributions that `requirements` ask for, and what those ask for."""
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        key = str(requirement)
        if key in seen or (marker is not None and not any(marker.evaluate({"extra": e}) for e in (extras or {""}))):
            continue
        seen.add(key)
        found = metadata.distribution(requirement.name)
        yield found
        yield from needed(found.requires or [], requirement.extras, seen)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes an environment that holds the wheel with an extra, or without; returns the folder of its programs."""

    def make(extra: str) -> Path:
        home = tmp_path_factory.mktemp(extra or "base")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
        python = home / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
        subprocess.run(pip, check=True)
        site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
        (ours,) = metadata.distributions(path=[str(site)])
        for each in needed(ours.requires or [], {extra}, set()):
            for name in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
                if not (site / name).exists():
                    (site / name).symlink_to(str(each.locate_file(name)))
        return home / "bin"

    return make


@pytest.fixture(scope="module")
def base(environment: Callable[[str], Path]) -> Path:
    return environment("")


def run(programs: Path, *words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    return subprocess.run(
        [programs / "instantrt", *words], cwd=cwd, env=environ, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def compiled(environment: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT with the example for a CPU and a build kit, made beside a project whose own packages have the same names."""

    def make(project: Path) -> None:
        for name in ROOMS:
            (project / name).mkdir()
            (project / name / "__init__.py").write_text("raise RuntimeError('the package of another project')")
        words = ("compile", TINY, "--target", "x86", "--target", "sm89", "--quant", "a16w8", "-o", "out")
        done = run(environment("hf"), *words, cwd=project, PYTHONPATH=str(project))
        assert done.returncode == 0, done

    return made_once(tmp_path_factory, "project", make) / "out"


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .onnx file with two linear layers."""
    random, path = np.random.default_rng(0), tmp_path_factory.mktemp("onnx") / "mlp.onnx"
    weights = [numpy_helper.from_array(random.standard_normal((64, 64), np.float32), name) for name in ("w", "v")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 64]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], weights)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"instantrt"}
    assert len(tops) == 2
    kinds = ("*.py", "*.j2", "*.cu", "*.h", "*.cpp", "*.json", "*.map", "CMakeLists.txt")
    ours = {file.relative_to(ROOT).as_posix() for room in ROOMS for kind in kinds for file in (ROOT / room).rglob(kind)}
    missing = {name for name in ours if not name.startswith("tools/gpu/")} - {
        n.removeprefix("instantrt/") for n in names
    }
    assert not missing
    assert "instantrt/py.typed" in names
    assert wheel.name.endswith("-py3-none-any.whl")


def test_carries_the_plugin_library_that_was_installed_into_it(source: Path, tmp_path: Path) -> None:
    library = source / "plugins" / "lib"
    library.mkdir()
    for name in (CHOICES, *LIBRARIES):
        (library / name).write_bytes(LIBRARY)
    try:
        file = build_wheel(source, tmp_path)
    finally:
        shutil.rmtree(library)
    with zipfile.ZipFile(file) as archive:
        carried = sorted(name for name in archive.namelist() if name.startswith("instantrt/plugins/lib/"))
    assert carried == [f"instantrt/plugins/lib/{name}" for name in (CHOICES, *LIBRARIES)]
    assert "-py3-none-" in file.name
    assert "-any" not in file.name


def test_auto_is_the_packaged_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PACKAGED_PLUGINS.resolve().relative_to(ROOT) == Path("plugins/lib")
    monkeypatch.setattr(request, "PACKAGED_PLUGINS", tmp_path)
    with pytest.raises(UserError, match="no plugin library here") as refused:
        Request(tmp_path, ("sm89",), tmp_path, plugin=Path("auto"))
    assert "make plugins TENSORRT=DIR" in refused.value.fix
    (tmp_path / LIBRARIES[0]).write_bytes(LIBRARY)
    asked = Request(tmp_path, ("sm89",), tmp_path, plugin=Path("auto"))
    assert asked.library(find_target("sm89")) == tmp_path / LIBRARIES[0]


def test_base_checks_and_runs_what_was_compiled(base: Path, compiled: Path) -> None:
    done = run(base, "check", compiled, cwd=compiled.parent)
    assert (done.returncode, done.stderr, done.stdout[-7:]) == (0, "", "PASSED\n")
    words = ("generate", compiled, "--target", "x86", "--prompt", "Once upon a time", "--max-tokens", "4")
    said = run(base, *words, cwd=compiled.parent)
    assert said.returncode == 0, said
    assert said.stdout.strip()


def test_base_compiles_an_onnx_file(base: Path, two_layers: Path, tmp_path: Path) -> None:
    done = run(base, "compile", two_layers, "--target", "x86", "--quant", "a16w8", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done
    done = run(base, "check", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout[-7:]) == (0, "", "PASSED\n")


def test_base_says_what_finishes_a_build_kit(base: Path, compiled: Path, tmp_path: Path) -> None:
    done = run(base, "build", compiled / "sm89", "-o", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "TensorRT-RTX: not installed: pip install 'instantrt[rtx]'" in done.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("compile {model} --target x86 --quant a16w8 -o new", f"reading a Hugging Face checkpoint {HF}"),
        ("inspect {model}", f"reading a Hugging Face checkpoint {HF}"),
        ("generate {out} --target x86 --prompt Once --compare {model}", f"running a float checkpoint {HF}"),
        ("perplexity {model} --text {text}", f"running a float checkpoint {HF}"),
        (
            "compile {file} --target x86 --quant a16w8 --verify -o new",
            "an accuracy report needs polygraphy, matplotlib: pip install 'instantrt[accuracy]'",
        ),
        ("load-test {out} --plot load.png", "--plot needs matplotlib: pip install 'instantrt[report]'"),
    ],
)
def test_a_missing_extra_is_one_line(
    base: Path, compiled: Path, two_layers: Path, tmp_path: Path, command: str, said: str
) -> None:
    places = {"model": TINY, "out": compiled, "file": two_layers, "text": ROOT / "examples/text/evaluation.txt"}
    done = run(base, *(word.format(**places) for word in command.split()), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, f"error: {said}\nFAILED\n")
    assert not list(tmp_path.iterdir())
