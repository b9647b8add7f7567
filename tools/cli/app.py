"""The command `instantrt`: its subcommands, each imported when it is called."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from instantrt.passes.core.errors import MissingExtra, UserError
from instantrt.tools.cli.ending import debug, say_as_typed, typed
from instantrt.tools.cli.options import PlainCommand, PlainGroup

CLI, BENCH = "instantrt.tools.cli.", "instantrt.tools.bench."
COMMANDS = {  # name -> (module, what --help says)
    "compile": (f"{CLI}compile", "Compile a model into quantized artifacts, one for each target."),
    "build": (f"{CLI}build", "Finish a build kit on the machine with the GPU it was made for."),
    "inspect": (f"{CLI}inspect", "Say what a checkpoint is, and what is wrong with it."),
    "check": (f"{CLI}check", "Verify an output folder: digests, versions, loading."),
    "targets": (f"{CLI}targets", "Print what can be compiled for."),
    "generate": (f"{CLI}generate", "Generate text with a compiled artifact."),
    "embed": (f"{CLI}embed", "Make vectors of texts with a compiled artifact."),
    "classify": (f"{CLI}classify", "Label texts with a compiled artifact."),
    "diff": (f"{CLI}diff", "Say whether an artifact is right, and what quantization cost."),
    "perplexity": (f"{CLI}perplexity", "Print the perplexity of a model on a text."),
    "serve": (f"{CLI}serve", "Serve a Triton model repository until interrupted."),
    "load-test": (f"{CLI}load_test", "Serve a model repository, load it, print what the clients saw."),
    "gpu-check": (f"{CLI}gpu_check", "Build, test and time the kernels on a machine with a GPU."),
}
EXAMPLES = {  # what --help ends with
    "compile": "instantrt compile Qwen2.5-0.5B --target x86 --quant a16w8 -o build",
    "build": "instantrt build build/sm90 -o engine",
    "inspect": "instantrt inspect Qwen2.5-0.5B",
    "check": "instantrt check build",
    "targets": "instantrt targets",
    "generate": 'instantrt generate build --prompt "The capital of France is" --max-tokens 16',
    "embed": "instantrt embed build --file sentences.txt --out vectors.npy",
    "classify": 'instantrt classify build --text "I liked it" --top 1',
    "diff": "instantrt diff build --model Qwen2.5-0.5B --text text.txt",
    "perplexity": "instantrt perplexity build --text text.txt",
    "serve": "instantrt serve repository --http-port 8000",
    "load-test": "instantrt load-test repository --clients 1 --clients 8 --plot load.png",
}
BENCHES = {
    "compile": (f"{BENCH}compile", "What the CPU road reaches: time of a compile, rate, memory, perplexity."),
    "cpu": (f"{BENCH}cpu", "CPU artifacts beside llama.cpp, onnxruntime-genai and OpenVINO: loss, speed, memory."),
    "gguf": (f"{BENCH}gguf", "GGUF files as they come, beside llama.cpp: loss, bytes, speed."),
    "engine": (f"{BENCH}engine", "Build engines for models of random weights: time, size, memory."),
    "rescaled": (f"{BENCH}rescaled", "Write a copy of a checkpoint that is as good, and harder to quantize."),
    "formats": (f"{BENCH}formats", "Quantized checkpoints of every format, against transformers."),
    "triton": (f"{BENCH}triton", "What serving costs and what batching brings."),
    "accuracy": (f"{BENCH}accuracy", "Peak memory of comparing the layers of a large model."),
}
FORMER = {"--inspect": "inspect", "--check": "check", "--list-targets": "targets"}  # options before they were commands
SETTINGS: dict[str, Any] = {"pretty_exceptions_enable": False}


class Subcommand(TyperCommand):
    """A line of --help, until it is called, or its own help or completion is asked for."""

    def __init__(self, name: str, module: str, help: str) -> None:
        super().__init__(name, help=help)
        self.module = module

    def load(self) -> Any:
        """The command itself: its module's `main`, a function or a Typer of several."""
        app = main = import_module(self.module).main
        if not isinstance(main, typer.Typer):
            app = typer.Typer(add_completion=False, **SETTINGS)
            app.command(self.name, cls=Loaded)(main)
        command = typer.main.get_command(app)
        command.name, command.help = self.name, self.help
        if self.module.startswith(CLI) and self.name in EXAMPLES:
            command.epilog = f"Example: {EXAMPLES[self.name]}"
        command.params.append(debug_option())
        return command

    def make_context(self, *args: Any, **extra: Any) -> Any:
        return self.load().make_context(*args, **extra)


class Loaded(PlainCommand):
    """A subcommand that says whose an option is that it does not have, and calls its own as they were typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = [*args]  # parsing takes them away
        try:
            rest = super().parse_args(ctx, args)
        except Exception as error:  # typer's class for it is not public
            if isinstance(said := getattr(error, "message", None), str):
                error.message = said.removeprefix("Value error, ")  # type: ignore[attr-defined]  # pydantic's words
            flag: Any = getattr(error, "option_name", None)
            if flag in FORMER:
                ctx.fail(f"{flag} is a command now: instantrt {FORMER[flag]}")
            if flag is not None and not any(flag in p.opts for p in self.params):
                owners = [name for name in COMMANDS if flag in flags_of(name)]
                if owners:
                    ctx.fail(f"{flag} is an option of instantrt {' and '.join(owners)}, not of this command")
            raise
        for p in self.params:
            if ctx.params.get(p.name) == Path() and "" in words and "." not in words:  # of a variable that is not set
                ctx.fail(f"an empty path for {p.opts[0]}; the current folder is .")
        return rest

    def invoke(self, ctx: Any) -> Any:
        source = ctx.get_parameter_source
        given = [p for p in self.params if (found := source(p.name)) is not None and found.name == "COMMANDLINE"]
        typed.set([flag.removeprefix("--") for p in given for flag in p.opts if flag.startswith("--")])
        try:
            return super().invoke(ctx)
        except UserError as error:
            say_as_typed(error, typed.get())
            raise


def flags_of(name: str) -> list[str]:
    """The options of a subcommand; none where it needs an extra that is not installed."""
    with suppress(MissingExtra):
        return [flag for p in Subcommand(name, *COMMANDS[name]).load().params for flag in p.opts]
    return []


def print_version(asked: bool) -> None:
    if asked:
        print(version("instantrt"))
        raise typer.Exit


def show_tracebacks(asked: bool) -> None:
    if asked:
        debug.set(True)


@cache
def debug_option() -> Any:
    """What the root has before the subcommand, each subcommand has behind it."""
    return next(p for p in typer.main.get_command(app).params if "--debug" in p.opts)


class Commands(PlainGroup):
    """All subcommands."""

    def __init__(self, **about: Any) -> None:
        super().__init__(**about)
        bench = PlainGroup(name="bench", help="Measure this machine, or this compiler on it.")
        for group, table in ((self, COMMANDS), (bench, BENCHES)):
            for name, each in table.items():
                group.add_command(Subcommand(name, *each))
        self.add_command(bench)


app = typer.Typer(name="instantrt", cls=Commands, **SETTINGS)


@app.callback()
def root(
    show: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    tracebacks: Annotated[
        bool, typer.Option("--debug", callback=show_tracebacks, expose_value=False, help="show an error's traceback")
    ] = False,
) -> None:
    """Compile language models ahead of time: TensorRT engines and ONNX Runtime artifacts with quantized weights."""


def main() -> None:
    """What start.py calls."""
    app(prog_name="instantrt")


def compile_main() -> None:
    Subcommand("compile", *COMMANDS["compile"]).load()(prog_name="compile")
