"""The one road: it verifies, serves and publishes as asked, tells who watches, and leaves nothing half done."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import onnx_graphsurgeon as gs
import pytest

from instantrt import Request, compile_model
from instantrt.compiler import compile as road
from instantrt.compiler.artifact.hashing import Hashing
from instantrt.compiler.artifact.manifest import MANIFEST, Artifact, read_manifest
from instantrt.compiler.artifact.staging import Staging
from instantrt.compiler.compile import VerificationError
from instantrt.compiler.plan import Plan, plan
from instantrt.compiler.watch import Watch
from instantrt.compiler.write import write_planned
from instantrt.passes.core.errors import UserError
from tests.conftest import TEXT, TINY, contents


@dataclass
class Seen(Watch):
    """What a watch was told, in order."""

    names: list[str] = field(default_factory=list)
    total: int = 0
    written: int = 0
    last: str = ""

    def say(self, text: str) -> None:
        self.names.append(text)

    def planned(self, plan: Plan) -> None:
        self.names.append(f"planned {', '.join(plan.lowered)}")

    def writing(self, total: int) -> None:
        self.names.append("writing")
        self.total = total

    def progress(self, name: str, size: int) -> None:
        self.written += size
        self.last = name

    def verdicts(self, verdicts: Any) -> None:
        self.names.append(f"{len(verdicts)} verdicts")

    def served(self, served: Any) -> None:
        self.names.append("served " + ", ".join(name for each in served for name in each.models))


def digests(artifacts: list[Artifact]) -> dict[str, Any]:
    return {artifact.path: artifact.digests for artifact in artifacts}


@pytest.mark.slow
def test_one_call_compiles_verifies_and_serves(tmp_path: Path) -> None:
    """And all of it, or nothing, takes its place."""
    out, triton, seen = tmp_path / "out", tmp_path / "triton", Seen()
    artifacts = compile_model(
        Request(TINY, "x86", out, quant="a16w8", max_length=100), verify=True, triton=str(triton), watch=seen
    )
    assert digests(artifacts) == digests(read_manifest(out))
    assert {p.name for p in out.iterdir()} == {"x86", "report", MANIFEST}
    words = json.loads((out / "report" / "x86" / "report.json").read_text())["polygraphy"].split()
    assert words[2] == str(out / "x86" / "model.onnx")
    assert all(Path(word).is_file() for word in words if word.startswith("/"))
    assert {"tiny-qwen2", "tiny-qwen2_generate"} <= {p.name for p in triton.iterdir()}
    told = iter(seen.names)
    order = ("planned x86", "writing", "1 verdicts", "served tiny-qwen2, tiny-qwen2_generate")
    assert all(each in told for each in order), seen.names
    assert 0.9 < seen.written / seen.total <= 1

    before = contents(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        full = Mock(side_effect=OSError(28, "No space left on device"))
        patch.setattr("instantrt.compiler.serving.repository.generate_config", full)
        with pytest.raises(UserError, match="No space left"):
            compile_model(Request(TINY, "x86", out, quant="a16w4"), verify=True, triton=triton)
    assert contents(tmp_path) == before


def damaged(request: Request, planned: Plan, staging: Staging, hashing: Hashing, watch: Watch) -> list[Artifact]:
    """The artifacts with some of their weights' bytes inverted, as a writer with a fault would leave them."""
    artifacts = WRITE(request, planned, staging, hashing, watch)
    data = staging.staged(request.out) / "x86" / "model.onnx.data"
    raw = bytearray(data.read_bytes())
    raw[: 1 << 16] = bytes(255 - byte for byte in raw[: 1 << 16])
    data.write_bytes(raw)
    return artifacts


WRITE = road.stage_artifacts


@pytest.mark.slow
def test_an_artifact_that_fails_is_published_and_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, triton = tmp_path / "out", tmp_path / "triton"
    compile_model(Request(TINY, "x86", out, quant="a16w8"), triton=triton)
    served, seen = contents(triton), Seen()
    monkeypatch.setattr(road, "stage_artifacts", damaged)
    with pytest.raises(VerificationError, match="not what they should be") as caught:
        compile_model(Request(TINY, "x86", out, quant="a8w8", smoke=False), verify=True, triton=triton, watch=seen)
    assert digests(caught.value.artifacts) == digests(read_manifest(out))
    assert caught.value.artifacts[0].source["request"]["quant"] == "a8w8"
    (verdict,) = caught.value.verdicts
    assert not verdict.passed
    assert verdict.violations[0] in caught.value.found
    assert f"{triton} is as it was" in caught.value.found
    assert (out / "report" / "x86" / "report.json").is_file()
    assert contents(triton) == served
    assert "1 verdicts" in seen.names
    assert not any(name.startswith("served") for name in seen.names)


def test_what_verify_and_triton_need_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, triton = tmp_path / "out", tmp_path / "triton"
    monkeypatch.setattr(road, "stage_artifacts", lambda *a: pytest.fail("written first"))

    def refused(request: Request, words: str) -> None:
        with pytest.raises(UserError, match=words):
            compile_model(request, verify=True, triton=triton)

    refused(Request(TINY, "x86", out, text=tmp_path / "nowhere"), "the text cannot be read")
    (out / "report" / "x86").mkdir(parents=True)
    (out / "report" / "x86" / "notes.txt").write_text("mine")
    refused(Request(TINY, "x86", out, text=TEXT), "this is no report of ours")
    refused(Request(TINY, "sm90", tmp_path / "kit", builder="kit"), "nothing here can be served")
    refused(Request(TINY, "sm90", out, portable=True), "portable does nothing without a CPU target")
    assert not triton.exists()


def values(graph: gs.Graph) -> dict[str, int]:
    """Which object each constant's values are."""
    return {name: id(t._values) for name, t in graph.tensors().items() if isinstance(t, gs.Constant)}


def test_the_size_of_a_plan_is_what_is_written_and_asking_changes_nothing(tmp_path: Path) -> None:
    request = Request(TINY, ("x86", "sm90"), tmp_path, quant="a16w4", group_size=64, builder="kit")
    planned = plan(request)
    before = {target: values(graph) for target, graph in planned.lowered.items()}
    sizes = {target: planned.size(target) for target in planned.lowered}
    assert {target: values(graph) for target, graph in planned.lowered.items()} == before
    write_planned(request, planned)
    assert sizes == {target: (tmp_path / target / "model.onnx.data").stat().st_size for target in planned.lowered}
    assert {target: values(graph) for target, graph in planned.lowered.items()} != before, "small ones are loaded now"


def test_no_garbage_is_looked_for_in_what_was_loaded(tmp_path: Path) -> None:
    """After an export that is all of torch: half a second, each time."""
    seen: dict[str, tuple[int, bool]] = {}

    def say(text: str) -> None:
        gc.collect() if text.startswith("reading") else None
        seen[text.split(maxsplit=1)[0]] = sum(each["collections"] for each in gc.get_stats()), gc.get_freeze_count() > 0

    plan(Request(TINY, "x86", tmp_path), say)
    assert (seen["reading"][1], seen["normalizing"]) == (False, (seen["reading"][0], True))
    assert not gc.get_freeze_count()
