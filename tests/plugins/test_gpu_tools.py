"""The GPU ring's own code, run here: its runner and oracle on the emulator, its report and plot on made-up timings."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from plugins.weight_only_gemm import semantics
from plugins.weight_only_gemm.op import OP
from tests.plugins.kernels import ROOT, Emulated
from tools.gpu import bench, gemm
from tools.gpu.gemm import FORMATS, GUARD, Gemm, check, exact, random_weight
from tools.gpu_check import by_outcome


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "DEVICE", "cpu")
    monkeypatch.setattr(gemm, "device_numbers", lambda: {"sm": 90, "sm_count": 4})


@pytest.mark.parametrize(("bits", "activation_bits"), FORMATS)
@pytest.mark.parametrize("gated", [0, 1])
def test_runner_and_oracle(emulated: dict[int, Emulated], gated: int, bits: int, activation_bits: int) -> None:
    weight = random_weight(48, 192, bits, 64, torch.bfloat16, bias=True)
    for m in (3, 33):
        options = {"activation_bits": activation_bits, "gated": gated, "activation": 1, "wide": 1, "sm": 80}
        check(Gemm(emulated[90].library, torch.randn(m, 192).bfloat16(), weight, options), 2e-5, 1e-5)


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_the_oracle_is_the_reference(activation_bits: int) -> None:
    weight = random_weight(48, 192, 8, 64, torch.float16, bias=True)
    x, options = torch.randn(5, 192).half(), {"gated": 1, "activation": 2, "activation_bits": activation_bits}
    attrs = OP.attributes({**options, "bits": 8, "group": 64})
    assert weight.bias is not None
    arrays = (x.numpy(), weight.codes.numpy(), weight.affine.numpy().reshape(3, -1), weight.bias.numpy())
    for ours, theirs in zip(exact(x, weight, options), semantics.exact(*arrays, attrs), strict=True):
        assert np.allclose(ours.numpy(), theirs, rtol=1e-12)


def test_wrong_results_and_stray_writes_are_seen(emulated: dict[int, Emulated]) -> None:
    weight = random_weight(48, 192, 4, 64, torch.float16)
    prepared = Gemm(emulated[90].library, torch.randn(3, 192).half(), weight, {})
    weight.affine[1, 7, 0] *= 1.01
    prepared()
    weight.affine[1, 7, 0] /= 1.01
    prepared.library = SilentLibrary()  # type: ignore[assignment]
    with pytest.raises(AssertionError, match=r"elements off|relative error"):
        check(prepared, 4e-4, 2.0**-10)
    prepared.y_memory[GUARD - 1] = 0
    with pytest.raises(AssertionError, match="bytes around y were written"):
        prepared.output()


class SilentLibrary:
    def launch(self, *_: object) -> None:
        """Leaves what an earlier launch wrote."""


def test_report_and_plot(tmp_path: Path) -> None:
    roof = {"read_bytes_per_us": 4e6, "bf16_ops_per_us": 8e8, "int8_ops_per_us": 1.4e9}
    stream = bench.with_floor(bench.Timing("70b o", 1, "int4 g128", 10.0, 9.5, 11.0, 36_000_000, 134_000_000), roof)
    assert (stream.floor_us, stream.fraction) == (9.0, 0.9)
    dense = bench.with_floor(bench.Timing("70b o", 2048, "a8w8", 400.0, 390.0, 410.0, 10**8, 280 * 10**9), roof)
    assert dense.floor_us == pytest.approx(200)
    report = {"timings": [t.__dict__ for t in (stream, dense)]}
    bench.plot(report, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(report)


def test_the_report_names_every_case(tmp_path: Path) -> None:
    tests = "import pytest\n@pytest.mark.parametrize('w', [4, 8])\ndef test_bits(w):\n    assert w == 4\n"
    (tmp_path / "test_two.py").write_text(tests + "def test_no():\n    pytest.skip('why')\n")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    subprocess.run(
        [*command, f"--junit-xml={tmp_path}/t.xml", str(tmp_path / "test_two.py")], check=False, cwd=tmp_path
    )
    expected = {"passed": ["test_bits[4]"], "failure": ["test_bits[8]"], "error": [], "skipped": ["test_no"]}
    assert by_outcome(tmp_path / "t.xml") == expected
    assert not any(by_outcome(tmp_path / "absent.xml").values())


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU: run tools.gpu_check itself")
def test_without_a_gpu_it_says_so() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tools.gpu_check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.startswith("no GPU: nvidia-smi is not on PATH.")
