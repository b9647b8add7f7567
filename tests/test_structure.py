"""How the tests are laid out: what several share is in modules that hold no test."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
ROOMS = ("compiler", "passes", "plugins", "tools")
# Lines of a file whose path begins so, the first that does; of any other REST. docs/architecture.md says the same.
BUDGETS = {
    **{f"passes/{room}/": 150 for room in ("float", "qdq", "ort", "tensorrt")},
    "plugins/weight_only_gemm/op": 80,
}
REST = 400
CHILD = """
from tests.NAME import a
import tests.b
"""


def imported(source: str) -> set[str]:
    """Names that a source imports, anywhere in it: also in the programs that it has for children."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.search(r"(?m)^from tests\.", node.value)
        ):
            found |= imported(node.value)
    return found


def of_tests(source: str) -> list[str]:
    return sorted(name for name in imported(source) if any(part.startswith("test_") for part in name.split(".")))


def test_no_test_module_is_imported() -> None:
    """Who imports one gets its marks and fixtures, too, and neither of the two can be changed alone."""
    found = {str(path.relative_to(HERE)): of_tests(path.read_text()) for path in HERE.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}
    child = CHILD.replace("NAME", "test_c")
    assert of_tests(child) == of_tests(f"PROGRAM = {child!r}") == ["tests.test_c.a"]


def sources() -> list[Path]:
    return [path for room in ROOMS for path in (HERE.parent / room).rglob("*.py") if not path.is_symlink()]


def test_files_keep_to_their_budgets() -> None:
    """And those that are known not to are no more."""
    lines = {path.relative_to(HERE.parent).as_posix(): path.read_text().count("\n") for path in sources()}
    due = {path: next((most for at, most in BUDGETS.items() if path.startswith(at)), REST) for path in lines}
    assert {due[path] for path in lines} == {*BUDGETS.values(), REST}
    assert [path for path, count in lines.items() if count > due[path]] == []


def test_a_class_name_means_one_thing() -> None:
    """Who reads a name need not ask which of two classes it is."""
    trees = [ast.parse(path.read_text()) for path in sources()]
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert len(names) > 200
    names.pop("TritonPythonModel")  # Triton calls the class of every entry so
    assert [name for name, count in names.items() if count > 1] == []
