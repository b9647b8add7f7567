"""The pages of measurements on GPUs: each is what its JSON gives, and what a person has to explain is not forgotten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from instantrt.tools.gpu import check, page, predictions, rtx
from instantrt.tools.gpu.words import described
from tests.conftest import ROOT

FOLDER = ROOT / "benchmarks" / "gpu"
REPORTS = [path for path in sorted(FOLDER.glob("*.json")) if '"bench": {' in path.read_text("utf-8")]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_page_is_what_its_json_gives(path: Path) -> None:
    """`python -m instantrt.tools.gpu.page FILE` writes it again; its plots are there, and the folder's page has it."""
    report, notes = json.loads(path.read_text("utf-8")), page.notes_of(path)
    assert path.with_suffix(".md").read_text("utf-8") == page.markdown(report, notes, path.stem)
    assert path.with_suffix(".png").is_file()
    assert path.with_name(f"{path.stem}_speedup.png").is_file()
    assert f"({path.stem}.md)" in (FOLDER / "README.md").read_text("utf-8")
    assert page.unexplained(report, notes) == []


def test_the_readme_says_what_the_report_it_names_says() -> None:
    (line,) = page.LINE.findall((ROOT / "README.md").read_text("utf-8"))
    (path,) = [path for path in REPORTS if f"(benchmarks/gpu/{path.stem}.md)" in " ".join(line.split())]
    assert line == page.headline(json.loads(path.read_text("utf-8")), path.stem)


def timing(kernel: str, m: int, us: float, layer: str = "qwen2-7b gate_up", floor: float = 5.0) -> dict[str, Any]:
    return {"layer": layer, "m": m, "kernel": kernel, "median": us, "floor_us": floor, "bytes": 40e6, "plan": "row"}


def report() -> dict[str, Any]:
    timings = [
        timing("int4 g128", 1, 10.0), timing("cublas fp16", 1, 25.0), timing("humming int4", 1, 12.5),
        timing("cublas bf16", 1, 9.0), timing("int4 g128", 1, 4.0, "o"), timing("cublas fp16", 1, 6.4, "o"),
        timing("int4 g128", 1, 1.0, "alone"), timing("int4 g128", 3, 1.0), timing("int4 g128 again", 1, 10.0),
    ]  # fmt: skip
    far = {"kernel": "int4 g128", "layer": "o", "m": 1, "unit": "us", "of": "as they were", "predicted": [2.0, 3.0]}
    predictions = [{**far, "measured": 4.0, "off": 1 / 3}, {**far, "layer": "x", "measured": 3.3, "off": 0.1}]
    roofs = {"read_bytes_per_us": 4e6, "read_bytes_per_us_by_mb": {"6": 2e6}, "empty_node_us": 0.7}
    return {
        "commit": "0123456789abcdef-dirty", "sources": "digest", "gpu": "a GPU", "before": {"name": "a GPU"},
        "bench": {"passed": True, "seconds": 7, "timings": timings, "roofs": roofs, "predictions": predictions},
        "tune": {"passed": False, "seconds": 1, "rows": [
            {"format": "int8", "layer": "o", "m": 1, "plan": plan, "us": us, "chosen": chosen}
            for plan, us, chosen in (("a", 3.0, True), ("b", 2.0, False))
        ]},
    }  # fmt: skip


def test_what_a_page_says() -> None:
    said = page.markdown(report(), {}, "card").splitlines()
    assert "| int4 g128 | 2.00 (1.60 to 2.50) |" in said
    assert "| humming int4 | 2.00 (one layer) |" in said
    assert "| qwen2-7b gate_up | 1 | 10.0 (2.50x) |  |  | 25.0 | 12.5 (2.00x) humming int4 |" in said
    assert "| o | 1 | 4.00 (1.60x) |  |  | 6.40 |  |" in said
    assert "| int8 | o | 1 | a | 3.00 | b | 2.00 | 50% |" in said
    assert any(line.startswith("* tune: **FAILED** in 1 s") for line in said)
    assert not any("int4 g128 again" in line for line in said)


def test_what_is_far_off_is_explained_or_said() -> None:
    made, row = report(), "| int4 g128 | o | 1 | as they were | 2 to 3 us | 4.00 | **+33%** | {} |"
    assert page.unexplained(made, {}) == ["int4 g128 o m=1, as they were"]
    assert row.format("**not explained**") in page.markdown(made, {}, "card").splitlines()
    for key in ("int4 g128 o m=1, as they were", "int4 g128 m=1, as they were"):
        notes = {"predictions": {key: "because"}}
        assert page.unexplained(made, notes) == []
        lines = page.markdown(made, notes, "card").splitlines()
        assert row.format("[1]") in lines
        assert "[1] because" in lines


def test_a_page_is_written_beside_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "card.json").write_text(json.dumps(report()))
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["page", str(tmp_path / "card.json"), "--readme"])
    page.main()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "card.json", "card.md", "card.png", "card_speedup.png"
    ]  # fmt: skip
    readme = (tmp_path / "README.md").read_text()
    assert page.headline(report(), "card") in readme
    assert "2.00 at M = 1." in " ".join(readme.split())
    assert max(map(len, page.headline(report(), "card").splitlines())) <= 120
    assert readme.count("GPU kernels, timed on") == 1


def test_help_is_as_wide_as_the_terminal() -> None:
    doc = "One two three four five six.\nSeven.\n\n    name   what it does and more\n    x      y\n"
    shown = described(doc, 24).splitlines()
    assert shown == [
        "One two three four five",
        "six. Seven.",
        "",
        "    name   what it does",
        "           and more",
        "    x      y",
    ]
    for module in (check, predictions, rtx, page):
        assert max(map(len, described(module.__doc__, 80).splitlines())) <= 80
