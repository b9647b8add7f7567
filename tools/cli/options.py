"""Makes options for typer of the groups in compiler/options.py; and the arguments that several commands share."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from instantrt.compiler.options import Option, options_of, types_of

if TYPE_CHECKING:
    from instantrt.compiler.artifact.manifest import Artifact

EACH = re.compile(r"<list\[(\w+)\]>")  # how typer shows what may be repeated
FEW = 3  # values of a choice that fit into the column of types; more are said in the help text

Folder = Annotated[Path, typer.Argument(help="output folder of compile")]
Out = Annotated[Path, typer.Option("-o", "--out", help="output folder")]
Which = Annotated[str | None, typer.Option("--target", help="which artifact; else the only one that runs here")]
Repository = Annotated[Path, typer.Argument(help="folder that compile --triton wrote")]
Environment = Annotated[Path, typer.Option(help="virtual environment with the server's wheel")]
Command = Callable[..., None]


def say_which(folder: Path, target: str | None, artifact: Artifact) -> None:
    """A line about an artifact that was taken of several though no `target` names it, beside what a command prints."""
    from instantrt.compiler.artifact.manifest import read_manifest

    if target is None and len(found := read_manifest(folder)) > 1:
        names = ", ".join(each.target for each in found)
        print(f"taking {artifact.target}, of {names} the only one that this machine can run", file=sys.stderr)


class ShowsTypes:
    """What a command's --help says of types: a flag takes no value, and one at a time is given of what is repeated."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]  # of the command that this is mixed into
        for p in params:
            if p.param_type_name == "option" and p.metavar is None:
                each = EACH.fullmatch(p.display_type(ctx))
                p.metavar = "" if p.is_flag else f"<{each[1].lower()}>" if each else None
        return params


class PlainCommand(ShowsTypes, TyperCommand):
    """A command."""


class PlainGroup(ShowsTypes, TyperGroup):
    """A command of several; alone it says which, as --help does, and nothing has failed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        found: list[str] = super().parse_args(ctx, args or ([] if ctx.resilient_parsing else ["--help"]))
        return found


def takes(panels: dict[type, str]) -> Callable[[Command], Command]:
    """Decorates a command that takes, as **options, all options of some groups, each group under a title in --help.

    They come before the command's own keyword-only parameters.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        made = [
            parameter(f.name, f.default, option, types_of(group)[f.name], panel)
            for group, panel in panels.items()
            for f, option in options_of(group)
        ]
        ordered = sorted([*made, *own], key=lambda p: p.kind)  # stable: those made come first of their kind
        command.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
        return command

    return decorate


def parameter(name: str, default: Any, option: Option, types: tuple[Any, ...], panel: str) -> inspect.Parameter:
    """An option as a function's parameter, the way typer reads it."""
    kind = option.line or types[0]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    long = len(choices) > FEW
    values = f": {', '.join(choices[:-1])} or {choices[-1]}" if long else ""
    flag = f"--{name.replace('_', '-')}"
    if default is True:
        flag += f"/--no-{name.replace('_', '-')}"
    if get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]], list(default)  # type: ignore[misc]
    elif default is None:
        kind = kind | None
    about = typer.Option(
        flag,
        help=option.help + values,
        metavar=f"<{flag[2:]}>" if long else None,
        rich_help_panel=panel or None,
        case_sensitive=False,  # A16W8 is what documentation calls it
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, about])
