"""The one error that a user can cause. Everything else that fails is a bug and shows its traceback."""

from importlib.util import find_spec


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
        return "\n".join(lines + [f"  {label + ':':<10}{text}" for label, text in labelled if text])


EXTRAS = {  # of this package -> the modules that tell whether it is installed
    "hf": ("torch", "transformers", "onnxscript"),
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
