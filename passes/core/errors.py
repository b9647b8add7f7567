"""The one error that a user can cause. Everything else that fails is a bug of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

FOUND = 200  # characters of another library's error that a user is shown


class UserError(Exception):
    """What went wrong, where, what was expected, what was found, and what to do about it.

    Printed without a traceback. Only `what` is required; name the file, tensor or layer in `where`.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", found: str = "", fix: str = "") -> None:
        self.what, self.where, self.expected, self.found, self.fix = what, where, expected, found, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        labelled = (("expected", self.expected), ("found", self.found), ("fix", self.fix))
        under = "\n" + " " * 12  # the lines of a text that has several
        said = [(label, under.join(text.splitlines())) for label, text in labelled if text]
        return "\n".join(lines + [f"  {label + ':':<10}{text}" for label, text in said])

    def reword(self, change: Callable[[str], str]) -> None:
        """Changes every text of it."""
        for field in ("what", "where", "expected", "found", "fix"):
            setattr(self, field, change(getattr(self, field)))


def reword(error: BaseException | None, change: Callable[[str], str]) -> None:
    """Changes what an error of ours says, and the file that an error of the system names."""
    if isinstance(error, UserError):
        error.reword(change)
    if isinstance(error, OSError) and isinstance(error.filename, str | Path):
        error.filename = change(str(error.filename))


@contextmanager
def reworded(change: Callable[[str], str]) -> Iterator[None]:
    """Whatever goes wrong in the block is said as `change` has it: a file of ours in the user's words."""
    try:
        yield
    except Exception as error:
        reword(error, change)
        raise


@contextmanager
def tried(what: str, *, where: str = "", fix: str = "") -> Iterator[None]:
    """For calls into other libraries on what a user gave: anything that they raise becomes a UserError.

    It says that `what` failed, and why in the first line of the first cause. An error of ours passes, as it is where
    a library wrapped it, and so does what the system says: no memory, no permission.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from cause.__cause__
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{what} failed", where=where, found=in_a_line(cause), fix=fix) from error


def in_a_line(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return shorten(f"{type(error).__name__}: {lines[0]}", FOUND)


def first_line(said: object) -> str:
    """Of an error or a text; the name of its class where it says nothing."""
    return next(iter(str(said).strip().splitlines()), type(said).__name__)


EXTRAS = {  # of this package -> the modules that tell whether it is installed
    "hf": ("torch", "transformers", "onnxscript", "gguf", "regex"),
    "accuracy": ("polygraphy", "matplotlib"),
    "report": ("matplotlib",),
}


class MissingExtra(UserError):  # noqa: N818 -- says what is missing
    """Something was asked for whose packages are not installed."""


def require(extra: str, purpose: str) -> None:
    """Raises MissingExtra where `purpose` finds a module of `extra` missing; imports none of them.

    Before the import, not around it: what is wrong inside an installed package keeps its traceback.
    """
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise MissingExtra(f"{purpose} needs {', '.join(missing)}: pip install 'instantrt[{extra}]'")
