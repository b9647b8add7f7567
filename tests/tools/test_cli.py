"""The command line: what it offers, what it refuses to be told in vain, what it says on the way."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import fields
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import onnx_graphsurgeon as gs
import pytest
from rich.console import Console

from instantrt.compiler.accuracy.data import Data, tokenizer_of
from instantrt.compiler.accuracy.layer_errors import LayerErrors
from instantrt.compiler.accuracy.verify import Verdict
from instantrt.compiler.artifact.manifest import MANIFEST
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.compile import VerificationError, compile_model
from instantrt.compiler.decide import resolve
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.options import CPU, GPU, KERNELS, Builder, KvCache, Logits, options_of
from instantrt.compiler.plan import plan
from instantrt.compiler.quant.config import Quant
from instantrt.compiler.quant.readers import announced_reader
from instantrt.compiler.request import Request, check_options
from instantrt.compiler.say import At
from instantrt.passes.core.errors import UserError, tried
from instantrt.tools.cli.app import BENCHES, COMMANDS, EXAMPLES, Subcommand
from instantrt.tools.cli.console import Stages, tell
from instantrt.tools.cli.ending import exit_on_error, say_as_typed
from instantrt.tools.cli.show import show_engine
from instantrt.tools.cli.show_accuracy import show_verdict
from instantrt.tools.cli.start import compile_main, main
from tests.checkpoints import HERE, config_of
from tests.commands import invoke, refused
from tests.compiler.accuracy_models import float_graph
from tests.conftest import ROOT, TINY, plugin_library
from tests.models import make

UNSAID = {"enable_quant", "layers"}  # in JSON alone
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnx_graphsurgeon", "matplotlib", "numpy")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two linears in an .onnx file."""
    write_model(float_graph(), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


def words_of(output: str) -> str:
    """What is shown, without the boxes around it and the places where lines end."""
    return " ".join(output.replace("│", " ").split())


def test_what_needs_no_model_imports_no_library_of_one() -> None:
    calls = [["--help"], ["--version"], ["targets"], *([n, "--help"] for n in COMMANDS if n != "gpu-check")]
    code = f"""
import sys
from instantrt.tools.cli.app import app
for words in {calls}:
    try:
        app(words)
    except SystemExit:
        pass
    print(words, [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [f"{words} []" for words in calls]


@pytest.mark.parametrize("name", ["main", "compile_main"])
def test_a_command_ends_without_freeing_what_it_made(name: str) -> None:
    """What others do at the end is done, and all that was said is there."""
    code = f"""
import atexit, sys
from instantrt.tools.cli.start import {name}
class Large:
    def __del__(self):
        print("freed", file=sys.stderr)
large = Large()
atexit.register(lambda: print("ended", file=sys.stderr))
sys.argv[1:] = ["--help"]
{name}()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "ended\n"
    assert "--help" in done.stdout


@pytest.mark.parametrize(("output", "status", "said"), [(">&-", 0, ""), (">/dev/full", 1, "No space left on device")])
def test_a_command_whose_output_goes_nowhere(output: str, status: int, said: str) -> None:
    command = ["sh", "-c", f'"$0" -m instantrt targets {output}', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == status
    assert said in done.stderr
    assert bool(said) == bool(done.stderr)


def test_help_names_every_command_and_each_has_its_own() -> None:
    shown = words_of(invoke("--help", COLUMNS="80", TERM="dumb").output)
    for prefix, table in (((), COMMANDS), (("bench",), BENCHES)):
        for name, (_, line) in table.items():
            if not prefix:
                assert f"{name} {line}" in shown
            if name != "gpu-check":  # its help is that of a program which may run without this one
                own = invoke(*prefix, name, "--help", COLUMNS="80", TERM="dumb")
                assert (own.exit_code, line in words_of(own.output)) == (0, True), own.output
                assert not re.search(r"<(bool|list|\w*_)", own.output.partition("Options")[2])  # a flag takes no value
                assert max(map(len, own.output.splitlines())) <= 80


def test_the_example_of_each_command_is_one_that_it_takes() -> None:
    for name, line in EXAMPLES.items():
        called, command, *words = shlex.split(line)
        assert (called, command) == ("instantrt", name)
        Subcommand(name, *COMMANDS[name]).make_context(name, words)  # a UsageError for what it does not have
        assert f"Example: {line}" in words_of(invoke(name, "--help", COLUMNS="80", TERM="dumb").output)


def test_completion_knows_commands_options_and_values() -> None:
    def completions(line: str) -> list[str]:
        environment = {"_INSTANTRT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        command = [sys.executable, "-m", "instantrt"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
        return done.stdout.split()

    assert completions("instantrt co") == ["compile"]
    assert completions("instantrt compile --wei") == ["--weight-only", "--weight-streaming"]
    assert completions("instantrt compile m --lm-head i") == ["int8"]
    assert completions("instantrt bench fo") == ["formats"]
    assert completions("instantrt bench formats st") == ["stream"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("compil", TINY), "No such command 'compil'. Did you mean 'compile'?"),
        (("build", TINY, "--quant", "a16w8"), "--quant is an option of instantrt compile, not of this command"),
        (("compile", TINY, "--list-targets"), "--list-targets is a command now: instantrt targets"),
        (("compile", TINY, "--target", "x86", "-o", ""), "an empty path for -o; the current folder is ."),
        (("check", ""), "an empty path for folder"),
        (
            ("check", "x", "--text", "t"),
            "--text is an option of instantrt compile and embed and classify and diff and perplexity, not of",
        ),
        (
            ("compile", TINY, "--quantt", "a16w8"),
            "No such option: --quantt (Possible options: --quant, --quant",
        ),
    ],
)
def test_a_wrong_command_line_says_what_is_right(words: tuple[str | Path, ...], says: str) -> None:
    done = invoke(*words)
    assert done.exit_code == 2
    assert says in words_of(done.output)


def test_what_the_system_refuses_has_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, exit_on_error():
        raise OSError(30, "Read-only file system", "/there/x86")
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: [Errno 30] Read-only file system: '/there/x86'\nFAILED\n"


@pytest.mark.parametrize("again", [False, True])
def test_an_interruption_waits_for_an_import_unless_it_comes_again(again: bool, tmp_path: Path) -> None:
    """C code that is imported prints a traceback of its own, or makes another error of it."""
    ask = "os.kill(os.getpid(), signal.SIGINT)\n"
    module = f"import os, signal, time\n{ask}{ask if again else ''}time.sleep(0.1)\nprint('imported', flush=True)\n"
    (tmp_path / "slow.py").write_text(module)
    code = (
        "from instantrt.tools.cli.ending import exit_on_error\nwith exit_on_error():\n import slow, time; time.sleep(9)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (130, "" if again else "imported\n")
    assert done.stderr == "interrupted; nothing half-written was left\nFAILED\n"


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_gone_ends_a_command_as_an_interruption_does(ignored: bool) -> None:
    """Else a server outlives it, and half-written folders stay; `nohup` goes on."""
    before = f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"  # whoever runs the tests
    code = (
        "import os, signal\nfrom instantrt.tools.cli.ending import exit_on_error\n"
        f"{before}with exit_on_error():\n os.kill(os.getpid(), signal.SIGHUP)\n print('on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == ((0, "on\n") if ignored else (130, ""))


def test_a_bug_of_ours_says_so_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, exit_on_error():
        raise KeyError("instantrt")
    assert stop.value.code == 1
    said, fix, last = capsys.readouterr().err.splitlines()
    assert (said, last) == ("error: internal error: KeyError: 'instantrt'", "FAILED")
    assert "a bug of InstantRT: run again with --debug" in fix
    with pytest.raises(SystemExit), exit_on_error():
        raise MemoryError("Unable to allocate 40. GiB")
    assert capsys.readouterr().err.startswith(
        "error: there is not enough memory\n  found:    Unable to allocate 40. GiB"
    )


@pytest.mark.parametrize(
    "words",
    [
        "instantrt check WHERE",
        "instantrt --debug check WHERE",
        "instantrt check --debug WHERE",
        "instantrt check WHERE --debug",
        "compile WHERE --target x86",
        "compile WHERE --target x86 --debug",
    ],
)
def test_debug_shows_the_traceback_of_any_command(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, *rest = words.replace("WHERE", str(tmp_path / "nothing")).split()
    monkeypatch.setattr(sys, "argv", [script, *rest])
    with pytest.raises(SystemExit) as stop:
        (compile_main if script == "compile" else main)()
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert said.endswith("\nFAILED\n")
    assert said.count("\nerror: ") + said.startswith("error: ") == 1
    assert ("Traceback" in said) == ("--debug" in words)


def test_what_other_libraries_raise_is_said_with_what_was_tried() -> None:
    def fail(error: Exception, cause: Exception | None = None) -> None:
        with tried("doing it", where="there", fix="another way"):
            raise error from cause

    with pytest.raises(UserError) as caught:
        fail(RuntimeError("\n outermost"), KeyError("first\nsecond"))
    assert str(caught.value).splitlines() == [
        "there: doing it failed",
        "  found:    KeyError: 'first\\nsecond'",
        "  fix:      another way",
    ]
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(UserError, match=r"found:    ValueError: of many\n"):
        fail(ValueError("of many\nlines"))
    with pytest.raises(UserError, match=r"^ours$"):
        fail(RuntimeError("wrapped"), UserError("ours"))
    with pytest.raises(PermissionError):
        fail(PermissionError(13, "denied"))
    with pytest.raises(UserError, match="OSError: no such model"):
        fail(OSError("no such model"))
    with pytest.raises(MemoryError):
        fail(MemoryError())


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: reading the tokenizer failed\n  found:    Exception: "):
        tokenizer_of(tmp_path)


def test_a_manifest_of_another_version_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"format": 1, "artifacts": []}')
    for words in (["check", tmp_path], ["generate", tmp_path, "--prompt", "x"], ["diff", tmp_path, "--model", TINY]):
        assert refused(*words).what == "a manifest of another version"


def test_a_folder_within_the_output_names_the_output(tiny_compiled: Path) -> None:
    for inner in ("x86", "x86/model.onnx"):
        error = refused("check", tiny_compiled / inner)
        assert (error.what, error.fix) == ("nothing that compile wrote is here", f"name {tiny_compiled}")


def test_another_model_than_the_artifacts_is_refused(tiny_compiled: Path, small: Path) -> None:
    assert refused("diff", tiny_compiled, "--model", small).what == "the artifact is of another model"


def test_every_field_of_a_request_is_an_option_and_help_shows_its_values() -> None:
    shown = invoke("compile", "--help", COLUMNS="80", TERM="dumb").output
    assert max(map(len, shown.splitlines())) <= 80
    given = {f.name for f in fields(Request)} - UNSAID - {"model", "targets"}
    assert [name for name in given if f"--{name.replace('_', '-')} " not in shown] == []
    words = words_of(shown)
    for value in (v for choices in (Quant, Builder, Logits, KvCache) for v in get_args(choices)):
        assert value in words
    for panel in ("Quantization", "CPU artifacts", "Language models", "Engines", "Accuracy: layers", "Looking"):
        assert f"─ {panel} " in shown


def test_options_reach_the_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Request] = []
    monkeypatch.setattr("instantrt.compiler.compile.compile_model", lambda request, **k: made.append(request) or [])
    config, library = tmp_path / "q.json", plugin_library(tmp_path)
    config.write_text(json.dumps({"weight_only_quant": True, "customized_quant_config": {"weight_format": "int8"}}))
    arguments = ["m", "--target", "x86", "--target", "sm89", "--quant-config", config, "--ignore", "a", "-o", "o"]
    more = ["--kv-cache", "in-place", "--max-batch", "4", "--portable", "--plugin-rounding", "--plugin", library]
    done = invoke("compile", *arguments, *more)
    assert done.exit_code == 0, done.output
    assert made == [
        Request(
            model=Path("m"),
            targets=("x86", "sm89"),
            out=Path("o"),
            quant_config={"weight_format": "int8"},
            weight_only=True,
            ignore=("a",),
            kv_cache="in-place",
            max_batch=4,
            portable=True,
            plugin_rounding=True,
            plugin=library,
        )
    ]


def test_a_value_that_does_not_exist_is_refused_by_the_list_of_those_that_do() -> None:
    done = invoke("compile", TINY, "--target", "x86", "--quant", "a16w9")
    assert done.exit_code == 2
    assert "Invalid value for '--quant': 'a16w9' is not one of 'a16w8'" in words_of(done.output)


@pytest.mark.parametrize(
    "words",
    [
        *(f"load-test REPOSITORY {option} 0" for option in ("--clients", "--requests", "--total", "--max-tokens")),
        *(f"serve REPOSITORY {option} {port}" for option in ("--http-port", "--grpc-port") for port in (-1, 65536)),
        "diff OUT --model MODEL --tokens 1",
    ],
)
def test_a_number_out_of_range_is_refused_before_any_work(words: str) -> None:
    done = invoke(*words.split())
    assert (done.exit_code, "Input should be" in done.output) == (2, True), done.output


def test_a_format_is_understood_as_documentation_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Request] = []
    monkeypatch.setattr("instantrt.compiler.compile.compile_model", lambda request, **k: made.append(request) or [])
    assert invoke("compile", TINY, "--target", "X86", "--quant", "A16W8").exit_code == 0
    assert made[0].quant == "a16w8"


@pytest.mark.parametrize("words", [(), ("bench",), ("bench", "rescaled")])
def test_a_group_of_commands_alone_says_which_they_are(words: tuple[str, ...]) -> None:
    done, asked = invoke(*words), invoke(*words, "--help")
    assert (done.exit_code, done.output) == (asked.exit_code, asked.output) == (0, done.output)
    assert "─ Commands " in done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--quant none --group-size 32", "--quant none leaves nothing for --group-size to say"),
        ("--quant a16w8 --quant-config CONFIG", "--quant and --quant-config both say how to quantize"),
        ("--max-length 64", "--max-length does nothing without a GPU target or a causal LM"),
        ("--optimization-level 6", "--optimization-level is out of range"),
        ("--portable --target sm89", "--portable does nothing without a CPU target"),
    ],
)
def test_an_error_calls_options_as_they_were_typed(words: str, says: str, small: Path) -> None:
    config = small.parent / "q.json"
    config.write_text('{"weight_format": "int8"}')
    typed = words.replace("CONFIG", str(config)).split()
    typed += [] if "--target" in typed else ["--target", "x86"]
    assert refused("compile", small, *typed, "-o", small.parent / "o").what.startswith(says)


def test_a_note_calls_options_as_they_were_typed(tmp_path: Path) -> None:
    words = ("--target", "x86", "--cpu-preset", "exact", "--dry-run", "-o", tmp_path)
    assert "note: --cpu-preset does nothing without layers" in invoke("compile", TINY, *words).output


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        ("--quant a16w8 --cpu-preset fast", True),
        ("--quant a16w8 --cpu-preset exact", True),
        ("--quant a16w8 --group-size 16 --cpu-preset exact", True),
        ("--quant a16w8 --group-size 16 --cpu-preset fast", False),
        ("--quant a16w8 --group-size 16", False),
    ],
)
def test_a_preset_that_changes_nothing_is_said(words: str, idle: bool, small: Path) -> None:
    """Of a model without a cache: the note is there if the graph is the one without the option, and only then."""

    def lowered(typed: str) -> tuple[list[str], bool]:
        given = dict(zip(*[iter(typed.replace("--", "").replace("-", "_").split())] * 2, strict=True))
        given = {name: int(value) if value.isdigit() else value for name, value in given.items()}
        made = plan(Request(small, ("x86",), small.parent / "o", **given))
        return [node.op for node in made.lowered["x86"].nodes], any("cpu_preset does nothing" in n for n in made.notes)

    found, said = lowered(words)
    plain, _ = lowered(words.partition(" --cpu-preset")[0])
    assert said == idle
    assert idle == ("--cpu-preset" in words and found == plain)


def test_what_was_not_typed_is_called_as_it_is_in_files() -> None:
    error = UserError("group_size does not divide it", where="a/group_size/b", expected="quant, group_size", fix="bits")
    say_as_typed(error, ["quant", "max-length"])
    assert (error.what, error.expected) == ("group_size does not divide it", "quant, group_size")
    head = UserError("lm_head int8 does nothing", where="lm_head, and 3 more", found="lm_head, ignored by 'lm_head'")
    say_as_typed(head, ["lm-head"])
    assert str(head).splitlines() == [
        "lm_head, and 3 more: --lm-head int8 does nothing",
        "  found:    lm_head, ignored by 'lm_head'",
    ]
    say_as_typed(error, ["group-size"])
    assert str(error) == "\n".join(
        [
            "a/group_size/b: --group-size does not divide it",
            "  expected: quant, --group-size",
            "  fix:      bits",
        ]
    )


def test_a_text_alone_is_refused() -> None:
    assert refused("compile", TINY, "--target", "x86", "--text", "t.txt").what == "--text does nothing by itself"


OTHER: dict[str, Any] = {"cpu_preset": "fast", "builder": "kit", "kv_cache": "in-place"}
OTHER |= {"timing_cache": Path("t"), "hardware_compatible": "ampere_plus"}
OTHER |= {"max_batch": 2, "max_length": 600, "opt_length": 4, "memory_limit": 9, "optimization_level": 2}


@pytest.mark.parametrize(("lacking", "target"), [(CPU, "sm89"), (GPU, "x86"), (KERNELS, "x86")])
def test_an_option_that_no_target_has_use_for_is_refused(lacking: str, target: str, tmp_path: Path) -> None:
    for name in (f.name for f, option in options_of(Request) if lacking in option.needs):
        needed = {"plugin": plugin_library(tmp_path)} if name.startswith("plugin") else {}
        given = needed if name == "plugin" else {**needed, name: OTHER.get(name, True)}
        with pytest.raises(UserError, match=f"{name} does nothing without {lacking}"):
            compile_model(Request(TINY, (target,), tmp_path, **given))
        check_options(Request(TINY, ("sm89", "x86"), tmp_path, **given))


def model_of(folder: Path) -> FloatModel:
    """A checkpoint without its graph: enough to resolve a request."""
    config, tensors = config_of(folder), read_checkpoint(folder)
    return FloatModel(gs.Graph(), folder, config, tensors, None, reader=announced_reader(folder, config))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"group_size": 32}, "group_size"),
        ({"weight_only": True}, "weight_only"),
        ({"ignore": ("nothing.*",)}, "ignore"),
        ({"lm_head": "int8"}, "lm_head"),
        ({"max_kl": 0.1}, "max_kl"),
        ({"quant": "none", "ignore": ("*",)}, "ignore"),
    ],
)
def test_what_only_quantization_has_use_for_is_refused_without(given: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=f"^{TINY}: {name} does nothing without quantization"):
        resolve(Request(TINY, ("x86",), Path("o"), **given), model_of(TINY))
    if "quant" not in given:
        resolve(Request(TINY, ("x86",), Path("o"), **{"quant": "a16w8", **given}), model_of(TINY))


def test_a_quantized_checkpoint_has_decided_about_its_head() -> None:
    model = model_of(HERE / "gptq-int4-g128-sym")
    with pytest.raises(UserError, match="lm_head does nothing without a float checkpoint"):
        resolve(Request(model.folder, ("x86",), Path("o"), lm_head="int8"), model)


def test_a_config_may_ignore_modules_of_a_quantized_checkpoint() -> None:
    model = model_of(HERE / "gptq-int4-g128-sym")
    custom = {"quant_method": "gptq", "ignore": ["lm_head"]}
    config = resolve(Request(model.folder, ("x86",), Path("o"), ignore=("b",), quant_config=custom), model)
    assert config is not None
    assert config.ignore == ("lm_head", "b")


def test_quantization_that_is_switched_off_and_asked_for_is_refused() -> None:
    with pytest.raises(UserError, match="quantization disabled"):
        Request(TINY, ("x86",), Path("o"), quant="a16w8", enable_quant=False)


def test_a_text_that_is_not_there_is_known_before_any_work(tmp_path: Path) -> None:
    text, out = tmp_path / "none.txt", tmp_path / "o"
    error = refused("compile", TINY, "--target", "x86", "--verify", "--text", text, "-o", out)
    assert error.what == "the text cannot be read"
    assert not out.exists()


@pytest.mark.parametrize("name", ["o[/bold]x", "o[bold]x", "o:smile:x"])
def test_a_path_is_printed_as_it_is(name: str, small: Path) -> None:
    out = small.parent / name
    done = invoke("compile", small, "--target", "x86", "--quant", "a16w8", "--verify", "-o", out)
    assert done.exit_code == 0, done.output
    assert f"{out / 'x86/model.onnx'}  " in done.output
    assert str(out / "report/x86/report.html") in done.output


def test_artifacts_that_fail_are_shown_with_their_report(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Verdict, "passed", False)
    out = small.parent / "o"
    done = invoke("compile", small, "--target", "x86", "--quant", "a16w8", "--verify", "-o", out)
    assert isinstance(done.exception, VerificationError)
    assert f"{out / 'x86/model.onnx'}  " in done.output
    assert str(out / "report/x86/report.html") in done.output
    assert "PASSED" not in done.output


def test_a_stage_has_a_line_when_it_begins_and_its_time_when_it_ends(small: Path) -> None:
    """In a pipe, too, as plain text; and the stages are all of the time."""
    command = [sys.executable, "-m", "instantrt", "compile", small, "--target", "x86", "-o", small.parent / "o"]
    lines: list[str] = []
    came: list[float] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line.rstrip("\n"))
            came.append(time.monotonic())
    assert all(line and line.isprintable() for line in lines)
    begun = [line for line, after in pairwise(lines) if re.match(r"  \d+\.\d s", after)]
    words = ["starting", "reading", "normalizing", "deciding", "lowering", "writing", "running"]
    assert [line.split()[0] for line in begun] == words
    rows = [row for line in lines if (row := re.fullmatch(r" +([\d.]+) s +(\d+)%  (.*)", line))]
    assert [row[3] for row in rows] == begun
    whole = float(lines[-1].removeprefix("PASSED in ").removesuffix(" s"))
    assert sum(float(row[1]) for row in rows) == pytest.approx(whole, rel=0.05, abs=0.1)
    assert sum(int(row[2]) for row in rows) == pytest.approx(100, abs=5)
    assert came[-1] - came[0] > whole / 2


def test_a_long_stage_says_where_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instantrt.tools.cli.console.PAUSE", 0.0)
    with Stages() as stages:
        stages.begin("writing", 100_000_000, weights=50_000_000)
        stages.progress("layer.3.weight", 40_000_000)
        stages.begin("building")
        stages.progress("54% tactics", 0)
        stages.say("calibrating")
        stages.say(At("3 of 9 layers"))
    rate = r"[\d,]+ M weights/s, [\d,]+ MB/s"
    said = rf"writing\n  40%, {rate}, 0 s left\n  \d\.\d s, {rate}\nbuilding\n  54% tactics\n"
    said += r"  \d\.\d s\ncalibrating\n  3 of 9 layers\n"
    assert re.match(said, capsys.readouterr().out)


def test_a_terminal_sums_only_what_ran_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, sums in ((True, ["searching"]), (False, ["reading", "searching"])):
        file = StringIO()
        screen = Console(file=file, force_terminal=terminal, force_interactive=terminal)
        monkeypatch.setattr("instantrt.tools.cli.console.console", screen)
        with Stages() as stages:
            for name in ("reading", "searching", "searching"):
                stages.begin(name)
            stages.summary()
        assert re.findall(r"\d\.\d\d s +\d+%  (\w+)", file.getvalue()) == sums


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_has_prose_in_lines_of_whole_words(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    file, path = StringIO(), "/" + "long-and-" * 10 + "whole"
    monkeypatch.setattr("instantrt.tools.cli.console.console", Console(file=file, force_terminal=terminal, width=40))
    text = f"note: one two three four five six seven eight\n  at {path} it is"
    tell(text, highlight=False)
    lines = ["note: one two three four five six seven", "  eight", "  at", f"    {path}", "    it is"]
    assert file.getvalue().splitlines() == (lines if terminal else text.splitlines())


def test_the_plan_says_how_much_memory_each_target_takes(tmp_path: Path) -> None:
    targets = ("--target", "x86", "--target", "sm89", "--target", "sm90")
    done = invoke("compile", TINY, *targets, "--quant", "a16w8", "--dry-run", "-o", tmp_path / "o")
    assert "Memory for x86, sm90: below 1.5 GB" in done.output
    assert "Memory for sm89: 2 to 3 times the engine's weights" in done.output


def test_explain_says_nothing_more_of_a_linear_that_was_joined(tmp_path: Path) -> None:
    shown = invoke("compile", TINY, "--target", "x86", "--quant", "a16w4", "--explain", "--dry-run", "-o", tmp_path)
    assert "with k_proj and" in shown.output
    assert "LowerPerChannel" not in shown.output


def test_no_ratio_of_perplexities_is_shown_of_tokens_at_random(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"perplexity_ratio": 1.25, "kl_mean": 0.5, "top1_agreement": 0.9, "top5_agreement": 0.8}
    for kind, begins in (("generated", "quantization: KL 0.5, "), ("text", "quantization: perplexity ratio 1.25")):
        verdict = Verdict("x86", {}, Data(kind), (), None, figures, {"float": 123.45678}, LayerErrors((), {}), (), "")
        show_verdict(verdict, Path("o"))
        said = capsys.readouterr().out
        assert begins in said
        assert "float 123.46\n" in said


@pytest.mark.slow
def test_explain_says_what_attention_costs_in_its_plain_form(tmp_path: Path) -> None:
    make("qwen3", tmp_path / "m", head_dim=20)
    arguments = ["compile", tmp_path / "m", "--target", "x86", "--explain", "--dry-run", "-o", tmp_path / "o"]
    shown = " ".join(invoke(*arguments).output.replace("│", " ").split())
    assert "head size 20 is no multiple of 8" in shown
    assert "every step copies the cache, 0.3 kB for each token in it" in shown


def test_an_engines_layers_alike_share_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    fused, written = "Int4 fused", "Int8 expanded"
    weights = {
        f"model.layers.{i}.mlp.{part}": fused for i in range(40) for part in ("(gate_proj+up_proj)", "down_proj")
    }
    show_engine("sm89", {"weights": {**weights, "model.layers.3.mlp.down_proj": written}}, every_weight=True)
    shown = capsys.readouterr().out
    note = (
        "note: sm89: 1 of 80 quantized weights is written out as float on every run (model.layers.3.mlp.down_proj, say)"
    )
    assert note in shown
    assert len(shown.splitlines()) < 12
    for row in ("{0-39}.mlp.(gate_proj+up_proj) │ Int4", "{0-2,4-39}.mlp.down_proj", "model.layers.3.mlp.down_proj"):
        assert row in shown
