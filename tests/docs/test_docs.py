"""What the documentation names is there: commands, options, files, folders, and the headings that code cites."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from instantrt.tools.cli.app import Subcommand, app
from tests.conftest import ROOT

PAGES = sorted(
    p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")) if p.is_file()
)
FOLDERS = ("compiler", "passes", "plugins", "tools", "instantrt", "tests")
CODE = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*")]
FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
CITED = re.compile(r'docs/facts\.md, "([^"]+)"')
FILE = re.compile(r"^(?:compiler|passes|plugins|tools|tests|docs|benchmarks|examples)(?:/[\w.-]+)+$")
COMMANDS = typer.main.get_command(app)


def commands(page: Path) -> Iterator[str]:
    """Every `instantrt ...` and `compile ...` on a page: lines of code blocks, and code within text."""
    text = page.read_text("utf-8")
    for block in FENCE.findall(text):
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())
    yield from SPAN.findall(FENCE.sub("", text))


def problem(line: str) -> str | None:
    """What is wrong with a command line; None for one that parses, or that is none of ours."""
    try:
        words = shlex.split(line.removeprefix("$ "), comments=True)
    except ValueError:
        return None
    words = [w.rpartition("/")[2] if w.endswith("bin/instantrt") else w for w in words]
    if words[:1] == ["compile"] and len(words) > 2:  # "`compile` stays" is no command line
        words = ["instantrt", *words]
    if words[:1] != ["instantrt"] or len(words) < 2:
        return None
    asked: Any = COMMANDS
    for at, word in enumerate(words[1:], 1):
        if asked.context_settings.get("ignore_unknown_options"):  # it hands them on
            return None
        if word.startswith("-"):
            known = {option for p in asked.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
            if word.split("=")[0] not in known:
                return f"{' '.join(words[:at])} has no {word}"
        elif hasattr(asked, "commands"):
            if word == "..." or not word.islower():  # a placeholder
                return None
            for each in word.split("|"):
                if each not in asked.commands:
                    return f"{' '.join(words[:at])} has no subcommand {each}"
            asked = asked.commands[word.partition("|")[0]]
            asked = asked.load() if isinstance(asked, Subcommand) else asked
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_and_files_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    if page.name == "CHANGELOG.md":  # speaks of the past, too
        text = ""
    wrong = [found for line in commands(page) if text and (found := problem(line))]
    text = re.sub(r"Write\s+`[^`]+`", "", text)  # what a walk makes
    wrong += [f"no file {name}" for name in SPAN.findall(text) if FILE.match(name) and not (ROOT / name).exists()]
    assert not wrong


def test_a_wrong_command_is_found() -> None:
    assert problem("instantrt compile x --target x86 --quant a16w8 -o build/") is None
    assert problem("instantrt compiel x") == "instantrt has no subcommand compiel"
    assert problem("instantrt check build/ --target x86") == "instantrt check build/ has no --target"


def headings() -> set[str]:
    return {line.removeprefix("## ") for line in (ROOT / "docs/facts.md").read_text("utf-8").splitlines()}


def test_cited_facts_exist() -> None:
    known = headings()
    for path in CODE:
        if path.suffix in (".py", ".h", ".cu", ".cpp", ".sh") and path != Path(__file__):
            lines = re.sub(r"\s*\n\s*(?:#|//)?\s*", " ", path.read_text("utf-8"))
            missing = [heading for heading in CITED.findall(lines) if heading not in known]
            assert not missing, f"{path}: docs/facts.md has no {missing}"


def test_every_folder_is_on_the_architecture_page() -> None:
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    for top in ("plugins", "passes", "compiler", "tools"):
        for init in ROOT.glob(f"{top}/**/__init__.py"):
            name = ".".join(init.parent.relative_to(ROOT).parts)
            assert f"::: instantrt.{name}\n" in page, f"{name} is missing"


def test_the_documentation_needs_no_network() -> None:
    assert "font: false" in (ROOT / "mkdocs.yml").read_text("utf-8")
    for path in ROOT.glob("docs/**/*"):
        if path.suffix in (".css", ".svg", ".md"):
            assert not re.search(r"""(src|@import|url\()\s*=?\s*["']?https?:""", path.read_text("utf-8")), path
