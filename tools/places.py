"""Where a checkout has what the tools read and write."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "tiny-qwen2"
TEXT = ROOT / "examples" / "text" / "bench.txt"
EVALUATION = TEXT.with_name("evaluation.txt")
BENCHMARKS = ROOT / "benchmarks"
