"""What the command line shows of accuracy: verdicts, and what a budget came to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.table import Table

from instantrt.compiler.accuracy.budget import Raised
from instantrt.compiler.accuracy.report import HTML, cards, number
from instantrt.compiler.accuracy.verify import Verdict
from instantrt.compiler.accuracy.weigh import kind_of
from instantrt.tools.cli.console import console, tell

GENERATED = "generated"  # data: perplexity says nothing of tokens at random
SHOWN = 12  # violations that a terminal shows; the report has all


def show_verdict(verdict: Verdict, folder: Path) -> None:
    """One table and the violations; the report's path last."""
    if verdict.data.warning:
        tell(verdict.data.warning, "bold yellow")
    table = Table(
        "kind", "form", "against", "relative L2", "bound", "arithmetic", title=f"accuracy of {verdict.target}"
    )
    for c in verdict.comparisons:
        table.add_row(c.kind, c.form, c.reference, number(c.relative_l2), number(c.bound), c.arithmetic)
    console.print(table)
    if verdict.note:
        tell(verdict.note)
    f = verdict.figures
    if "cosine_min" in f:
        each = ", ".join(f"{title} {value}" for title, value in cards(f).items())
        tell(f"quantization, {f['rows']:.0f} answers: {each}")
    elif f:
        ratio = f"perplexity ratio {f['perplexity_ratio']:.5f}, " if verdict.data.kind != GENERATED else ""
        tell(
            f"quantization: {ratio}KL {f['kl_mean']:.3g}, top-1 {f['top1_agreement']:.2%}, "
            f"top-5 {f['top5_agreement']:.2%}"
        )
    if verdict.perplexities:
        each = ", ".join(f"{form} {value:.5g}" for form, value in verdict.perplexities.items())
        tell(f"perplexity of each form: {each}")
    for violation in verdict.violations[:SHOWN]:
        tell(violation, "red")
    if len(verdict.violations) > SHOWN:
        console.print(f"... and {len(verdict.violations) - SHOWN} more in the report")
    console.print(f"{folder / verdict.target / HTML}", soft_wrap=True)


def show_raised(raised: Raised, targets: str) -> None:
    """What a budget made of each kind of layer, and what that cost."""
    kinds: dict[str, Counter[str]] = {}
    for path, form in raised.formats.items():
        kinds.setdefault(kind_of(path), Counter())[form] += 1
    table = Table("layers", "formats", title=f"formats chosen for {targets}")
    for kind, forms in kinds.items():
        table.add_row(kind, ", ".join(f"{count} x {form}" for form, count in sorted(forms.items())))
    if raised.layers:
        console.print(table)
    share = raised.bytes / max(1, raised.bytes_before)
    before, after = raised.before["perplexity_ratio"], raised.after["perplexity_ratio"]
    ratios = f"perplexity ratio {before:.5f} -> {after:.5f}, " if raised.data != GENERATED else ""
    filled = f", {raised.filled}" if raised.filled else ""
    layers = "1 layer" if raised.raised == 1 else f"{raised.raised} layers"
    tell(
        f"{layers} in a finer format: +{raised.bytes / 1e6:,.2f} MB ({share:+.1%}){filled}; "
        f"KL {raised.before['kl_mean']:.4g} -> {raised.after['kl_mean']:.4g}, "
        f"{ratios}{raised.trials} trials on {raised.after['tokens']:.0f} tokens ({raised.data})"
    )
