"""The whole comparison on the example model: perplexities, Polygraphy alone, the page in a real browser, budgets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy.bisect import find_culprits
from instantrt.compiler.accuracy.budget import Raised, Room, search
from instantrt.compiler.accuracy.data import load_data
from instantrt.compiler.accuracy.forms import Budget, Subject
from instantrt.compiler.accuracy.importance import input_energy, search_scales
from instantrt.compiler.accuracy.ladder import override
from instantrt.compiler.accuracy.layer_errors import layers_of, quantized_bytes
from instantrt.compiler.accuracy.polygraphy_files import polygraphy_files
from instantrt.compiler.accuracy.report import HTML, JSON, PNG, number, write_report
from instantrt.compiler.accuracy.runners import Runner
from instantrt.compiler.accuracy.subjects import subjects
from instantrt.compiler.accuracy.verify import AS_CLOSE, AS_FLOAT, REFITTED, Verdict, not_looked_at, verify
from instantrt.compiler.accuracy.weigh import share, stream_of
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.defaults import EVERY_GROUP
from instantrt.compiler.plan import Plan, plan
from instantrt.compiler.quant import instant
from instantrt.compiler.quant.config import QuantConfig
from instantrt.compiler.request import Request
from instantrt.compiler.write import write_planned
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation, Wiring
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import Reject
from instantrt.passes.core.search import SearchedQuant
from instantrt.passes.qdq.insert_qdq import Decisions
from tests.conftest import ROOT, TEXT, TINY

pytestmark = pytest.mark.slow

SCREENSHOTS = ROOT / "build" / "screenshots"  # kept for whoever wants to look


@dataclass(frozen=True)
class Compiled:
    subject: Subject
    planned: Plan
    request: Request
    out: Path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The example model for x86 with weights of four bits by channel, all else as it is."""
    out = tmp_path_factory.mktemp("accuracy")
    request = Request(TINY, ("x86",), out, quant="a16w4", group_size=-1, lm_head="float", embeddings="stored")
    planned = plan(request)
    artifacts = write_planned(request, planned)
    return Compiled(subjects(planned, request, artifacts)[0], planned, request, out)


@pytest.fixture(scope="module")
def verdict(compiled: Compiled) -> Verdict:
    """Everything on the whole text, with the report in out/report."""
    folder = compiled.out / "report"
    folder.mkdir()
    data = load_data(compiled.planned.model, TEXT)
    found = verify(compiled.subject, data, folder)
    write_report(found, folder)
    return found


def dequantized(canonical: onnx.ModelProto, folder: Path) -> dict[str, np.ndarray]:
    """Module path -> weight [N, K], from the twin's file alone."""
    onnx.load_external_data_for_model(canonical, str(folder))
    values = {t.name: numpy_helper.to_array(t) for t in canonical.graph.initializer}
    found = {}
    for node in canonical.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in values:
            codes, scale, zero = (values[name].astype(np.float64) for name in node.input)
            found[node.input[0].removesuffix(".codes")] = ((codes - zero) * scale).T
    return found


def transformers_perplexity(model: torch.nn.Module) -> float:
    """A plain loop over the text: the same windows, one after the other."""
    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(TEXT.read_text("utf-8")).ids
    total, count = 0.0, 0
    for at in range(0, len(ids), 128):
        window = torch.tensor([ids[at : at + 128]])
        with torch.inference_mode():
            logits = model(window).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
        count += window.shape[1] - 1
    return float(np.exp(total / count))


def test_perplexities_equal_a_transformers_loop_on_dequantized_weights(
    compiled: Compiled, verdict: Verdict, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    before = transformers_perplexity(model)
    write_model(compiled.subject.canonical.copy(), tmp_path / "twin.onnx")
    weights = dequantized(onnx.load(tmp_path / "twin.onnx", load_external_data=False), tmp_path)
    assert len(weights) == 28
    for path, w in weights.items():
        model.get_submodule(path).weight.data = torch.from_numpy(w.astype(np.float32))
    after = transformers_perplexity(model)
    assert verdict.perplexities["float"] == pytest.approx(before, rel=1e-3)
    assert verdict.perplexities["twin"] == pytest.approx(after, rel=1e-3)
    assert verdict.figures["perplexity_ratio"] == pytest.approx(after / before, rel=1e-3)
    assert abs(after / before - 1) > 1.5e-3  # the two are told apart


def test_polygraphy_objects_to_a_wrong_graph(compiled: Compiled, tmp_path: Path) -> None:
    """As our own sums do: its comparator has a result for each output, of which none is empty."""
    wrong = compiled.subject.lowered.copy()
    logits = next(tensor for tensor in wrong.outputs if tensor.name == "logits")
    maker = logits.inputs[0]
    maker.outputs[0] = gs.Variable("logits/right", logits.dtype, logits.shape)
    factor = gs.Constant("logits/wrong", np.float32([1.1]))
    wrong.nodes.append(gs.Node("Mul", "logits/Mul", {}, [maker.outputs[0], factor], [logits]))
    subject = replace(compiled.subject, lowered=wrong)
    data = load_data(compiled.planned.model, TEXT, limit=64)
    found = verify(subject, data, tmp_path, forms=("twin", "lowered"))
    assert "Polygraphy: lowered and twin differ" in found.violations


def test_polygraphy_takes_outputs_of_any_layout(compiled: Compiled, tmp_path: Path) -> None:
    """The product with a head stored as [vocab, width], an engine's float one, comes out column by column."""
    logits = np.asfortranarray(np.random.default_rng(0).standard_normal((1, 32, 64), np.float32))
    runners: dict[str, Runner] = dict.fromkeys(("twin", "lowered"), lambda feeds: {"logits": logits})
    for delivers in ("last", "all"):
        subject = replace(compiled.subject, logits=delivers)
        data = load_data(compiled.planned.model, TEXT, limit=64)
        _, objections = polygraphy_files(subject, data, runners, tmp_path, lambda path: path, ["lowered"])
        assert objections == []


def test_a_right_artifact_passes_and_the_two_kinds_stay_apart(verdict: Verdict) -> None:
    assert verdict.passed, verdict.violations
    kinds = {c.kind: c for c in verdict.comparisons}
    assert set(kinds) == {"quantization", "lowering"}
    assert kinds["quantization"].bound is None
    assert kinds["quantization"].relative_l2 > 1e-2
    assert kinds["lowering"].bound is not None
    assert kinds["lowering"].relative_l2 < 1e-2
    assert len(verdict.layer_errors.rows) == 29
    assert all(row.bytes_after < row.bytes_before for row in verdict.layer_errors.rows if row.quant != "float")


def test_page_and_json_have_the_same_numbers_and_need_no_network(compiled: Compiled, verdict: Verdict) -> None:
    folder = compiled.out / "report"
    body = json.loads((folder / JSON).read_text())
    page = (folder / HTML).read_text()
    assert body["quantization"] == verdict.figures
    assert [row["layer"] for row in body["layers"]] == [row.layer for row in verdict.layer_errors.rows]
    assert sum(body["kl_histogram"]["counts"]) == body["quantization"]["tokens"]
    for value in (f"{body['quantization']['perplexity']:.5g}", number(body["quantization"]["kl_mean"])):
        assert value in page
    for row in body["layers"]:
        assert row["layer"] in page
        assert f'<td class="n">{number(row["piled_up"])}</td>' in page
    assert page.count("<svg") == 3
    tokens = len(Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(TEXT.read_text("utf-8")).ids)
    about = ("tiny-qwen2", "x86, x86-64, VNNI", "quant a16w4", f"text evaluation.txt: {tokens:,} tokens")
    for words in (*about, "28 x A16W4 per-channel asymmetric, 1 x float"):
        assert words in page
        assert any(words in value for value in body["about"].values())
    heads = {head for line in re.findall(r"<th.*", page) for head in re.findall(r"<th[^>]*>([^<]*)</th>", line)}
    described = ", ".join(re.findall(r"<dt>([^<]*)</dt>", page))
    assert [h for h in ("bound", "weights", "steps", "added", "piled up", "probe") if h not in heads] == []
    assert [h for h in ("bound", "weights", "steps", "added", "piled up", "probe") if h not in described] == []
    assert "Worst tokens" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(\s*["']?http|<script""", page)
    with Image.open(folder / PNG) as picture:
        assert picture.size[0] > 1000


def test_the_page_is_drawn_by_a_real_browser(compiled: Compiled, verdict: Verdict, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser: chromium is not installed (apt-get install chromium)")
    assert verdict.passed
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    shot = SCREENSHOTS / "accuracy.png"
    shot.unlink(missing_ok=True)
    quiet = ["quic", "background-networking", "component-update", "sync", "gpu"]
    command = [browser, "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    where = [f"--user-data-dir={tmp_path}", "--window-size=1200,3200", f"--screenshot={shot}"]
    page = (compiled.out / "report" / HTML).as_uri()
    subprocess.run([*command, *where, page], check=True, capture_output=True, timeout=120)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    near = {name: (np.abs(pixels - colour).sum(axis=2) < 12).sum() for name, colour in PALETTE.items()}
    assert pixels.shape[1] == 1200
    # Bars and histogram are filled areas; lines and the verdict in green are thin.
    assert near["blue"] > 20_000, near
    assert near["grey"] > 2_000, near
    assert near["orange"] > 300, near
    assert near["verdict"] > 100, near


PALETTE = {"blue": (0, 114, 178), "grey": (153, 153, 153), "orange": (213, 94, 0), "verdict": (0, 115, 90)}


def polygraphy(command: str) -> subprocess.CompletedProcess[str]:
    name, *arguments = command.split()
    assert name == "polygraphy"
    tool = Path(sys.executable).with_name(name)
    return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_the_command_repeats_the_comparison_with_polygraphy_alone(verdict: Verdict) -> None:
    done = polygraphy(verdict.command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout
    strict = re.sub(r"(--l2-threshold) \S+", r"\1 1e-9", verdict.command)
    assert polygraphy(strict).returncode != 0


def test_forms_that_cannot_be_compared_are_refused(compiled: Compiled, tmp_path: Path) -> None:
    data = load_data(compiled.planned.model, TEXT, limit=16)
    quantized = replace(compiled.subject, floating=None)
    assert quantized.default_forms() == ("twin", "artifact")
    cases = (
        (compiled.subject, ("float",), "two forms"),
        (compiled.subject, ("float", "onnx"), "no such form"),
        (quantized, ("float", "twin"), "the checkpoint is quantized"),
        (compiled.subject, ("twin", "engine"), "no .engine file"),
    )
    for subject, forms, message in cases:
        with pytest.raises(UserError, match=message):
            verify(subject, data, tmp_path, forms=forms)


def test_a_budget_buys_what_it_needs_and_no_more(compiled: Compiled) -> None:
    planned = compiled.planned
    data = load_data(planned.model, TEXT, limit=64)
    some = ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj")
    decisions = {path: q for path, q in planned.twins["x86"].decisions.items() if path in some}

    def spend(budget: Budget) -> Raised:
        return search(planned.model.graph, planned.model, decisions, data, budget, lambda text: None)

    loose = spend(Budget(max_kl=1.0))
    limit = loose.before["kl_mean"] / 3
    tight = spend(Budget(max_kl=limit))
    assert loose.steps == ()
    assert loose.decisions == decisions
    assert tight.before["kl_mean"] > limit >= tight.after["kl_mean"], (tight.before, tight.after)
    assert 0 < tight.bytes < 2 * tight.bytes_before
    rates = [step.gain / step.bytes for step in tight.steps]
    assert rates == sorted(rates, reverse=True)  # cheapest error first
    assert spend(Budget(max_kl=limit)).layers == tight.layers  # deterministic
    assert {tight.decisions[path] != decisions[path] for path in tight.layers} == {True}
    assert override(decisions, tight.layers) == tight.decisions


def test_a_budget_keeps_the_search_of_scales(compiled: Compiled) -> None:
    """The checkpoint is float: a search makes other codes of it, in every format on the ladder."""
    planned = compiled.planned
    some = [f for f in pipeline.linears(planned.model.graph) if f.path.startswith("model.layers.0.mlp")]
    config = QuantConfig(weight_format="uint4", group_size=128)
    energy = {f.path: np.linspace(0, 1, f.shape[1], dtype=np.float32) for f in some}
    decisions = search_scales({f.path: instant.instant(f, config, np.dtype(np.float32)) for f in some}, energy)
    data = load_data(planned.model, TEXT, limit=64)
    found = search(planned.model.graph, planned.model, decisions, data, Budget(max_kl=1e-5), lambda text: None)
    quants = [q for q in found.decisions.values() if isinstance(q, QuantTensor)]
    assert found.steps
    assert quants
    assert {(type(q.source), q.source.remember) for q in quants} == {(SearchedQuant, True)}


def test_a_bound_on_size_is_filled_with_what_counts(compiled: Compiled) -> None:
    planned = compiled.planned
    model, data = planned.model, load_data(planned.model, TEXT, limit=64)
    some = ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj")
    decisions = {path: q for path, q in planned.twins["x86"].decisions.items() if path in some}

    def size_of(chosen: Decisions) -> int:
        return sum(quantized_bytes(q) if isinstance(q, QuantTensor) else 1 << 20 for q in chosen.values())

    def spend(limit: int, budget: Budget) -> Raised:
        room = Room(limit, size_of, EVERY_GROUP, frozenset(), "max_size", (2**20, "MiB"))
        return search(model.graph, model, decisions, data, budget, lambda text: None, room)

    limit = size_of(decisions) * 3 // 2
    found = spend(limit, Budget())
    assert found.steps
    assert size_of(found.decisions) <= limit
    assert found.filled == f"{size_of(found.decisions) / 2**20:.4g} of {limit / 2**20:.4g} MiB"
    assert found.after["kl_mean"] < found.before["kl_mean"] / 2
    assert override(decisions, found.layers) == found.decisions
    with pytest.raises(UserError, match=r"that small\n  expected: at least 0\.\d+ MiB"):
        spend(size_of(decisions) // 2, Budget())
    with pytest.raises(UserError, match=r"as small and as accurate\n  found:    nearest: KL"):
        spend(limit, Budget(max_kl=1e-9))


def test_the_size_that_a_refusal_names_is_enough() -> None:
    room = Room(1, lambda decisions: 1234567, EVERY_GROUP, frozenset(), "max_size", (2**20, "MiB"))
    with pytest.raises(UserError) as refused:
        room.left({})
    assert refused.value.expected.startswith("at least 1.178 MiB")  # 1.17737


def test_room_for_floats_leaves_the_twin_as_it_is(tmp_path: Path) -> None:
    """What is lowered to be measured is a copy, where nothing is left to quantize, too."""
    ignore = ("model.layers.[123].*", "*.mlp.*", "*.[qko]_proj", "lm_head")
    planned = plan(Request(TINY, ("x86",), tmp_path, quant="a16w4", group_size=32, ignore=ignore, max_size=1e3))
    assert not planned.twins["x86"].quantized
    shapes = [graph.outputs[0].shape[1] for graph in (planned.twins["x86"].canonical, planned.lowered["x86"])]
    assert shapes == ["sequence", 1]


def test_an_error_is_weighed_by_the_stream_it_is_added_to(compiled: Compiled) -> None:
    graph = compiled.planned.model.graph
    layers = {layer.path.removeprefix("model.layers.0."): layer for layer in layers_of(graph, graph)}
    wiring, llm = Wiring(graph), compiled.planned.model.llm
    streams = {path: stream_of(layer.y, wiring) for path, layer in layers.items()}
    names = {path: stream.name for path, stream in streams.items() if stream is not None}
    attention, mlp = names["self_attn.o_proj"], names["mlp.down_proj"]
    assert {names[f"self_attn.{part}_proj"] for part in "qkvo"} == {attention}
    assert {names[f"mlp.{part}_proj"] for part in ("gate", "up", "down")} == {mlp} != {attention}
    assert "lm_head" not in names
    feeds, _ = next(iter(load_data(compiled.planned.model, TEXT, limit=16).each(llm)))
    kept = [name for layer in layers.values() for name in (layer.x, layer.y)] + [attention]
    run = Evaluation(graph, feeds, keep=kept, wiring=wiring)
    values = {name: run.peek(name) for name in kept} | dict(feeds)
    output, stream = layers["self_attn.o_proj"], streams["self_attn.o_proj"]
    assert stream is not None
    error = np.full_like(values[output.y], 0.01)
    found = share(output, stream, error, values, wiring)
    assert found == pytest.approx((error**2).sum(-1).mean() * (1 / (values[attention] ** 2).sum(-1)).mean(), rel=1e-3)
    before, inside = layers["self_attn.v_proj"], streams["self_attn.v_proj"]
    assert inside is not None
    assert share(before, inside, np.zeros_like(values[before.y]), values, wiring) < 1e-10 < found
    assert share(before, inside, 0.1 * values[before.y], values, wiring) > 1e-6


def test_the_energy_of_inputs(compiled: Compiled) -> None:
    model = compiled.planned.model
    data = load_data(model, TEXT, limit=48)
    energy = input_energy(model.graph, model.llm, data)
    path, name = next((f.path, f.x.name) for f in pipeline.linears(model.graph) if f.path.endswith("1.mlp.down_proj"))
    runs = (Evaluation(model.graph, feeds).take(name) for feeds, _ in data.each(model.llm))
    x = np.concatenate([each.reshape(-1, len(energy[path])) for each in runs])
    np.testing.assert_allclose(energy[path], (x.astype(np.float64) ** 2).mean(axis=0), rtol=1e-5)


def test_budgets_that_cannot_be_kept_are_refused(compiled: Compiled) -> None:
    decisions = compiled.planned.twins["x86"].decisions
    with pytest.raises(UserError, match="no quantized layer"):
        override(decisions, {"lm_head": "float"})
    with pytest.raises(UserError, match="does not divide"):
        override(decisions, {"model.layers.0.mlp.up_proj": "a16w4:7"})
    kept = override(decisions, {"model.layers.0.mlp.up_proj": "float", "model.layers.1.mlp.up_proj": "a16w8:64"})
    assert isinstance(kept["model.layers.0.mlp.up_proj"], Reject)
    finer = kept["model.layers.1.mlp.up_proj"]
    assert isinstance(finer, QuantTensor)
    assert (finer.bits, finer.group_size) == (8, 64)


def test_codes_that_were_fitted_elsewhere_are_held_against_the_float_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads round the inputs of layers otherwise; other tokens stand for them here. Damage is still damage."""
    request = Request(TINY, ("x86",), tmp_path, quant="a16w4", group_size=32)
    planned = plan(request)
    artifacts = write_planned(request, planned)
    assert not subjects(planned, request, artifacts, again=True)[0].refitted
    monkeypatch.setattr("instantrt.compiler.fit.TOKENS", 96)
    other = plan(request)
    assert not subjects(other, request, artifacts)[0].refitted  # as `compile --verify` looks at what it wrote
    (again,) = subjects(other, request, artifacts, again=True)
    data = load_data(planned.model, TEXT, limit=300)
    with pytest.raises(UserError, match="against the float model"):
        verify(again, data, tmp_path, forms=("twin", "artifact"))
    for folder, close in ((tmp_path / "right", AS_CLOSE), (tmp_path / "wrong", 0.5)):
        folder.mkdir()
        monkeypatch.setattr("instantrt.compiler.accuracy.verify.AS_CLOSE", close)
        found = verify(again, data, folder)
        assert found.note == REFITTED
        assert [c.arithmetic == AS_FLOAT for c in found.comparisons] == [False, close == AS_CLOSE]
        assert found.passed
        assert all(row.lowering is None for row in found.layer_errors.rows)
    assert not find_culprits(other, request, artifacts, data, print)
    weights = tmp_path / "x86" / "model.onnx.data"
    body = bytearray(weights.read_bytes())
    body[len(body) // 2] ^= 0x55
    weights.write_bytes(body)
    with pytest.raises(UserError, match=r"digest|changed|sha256"):
        subjects(other, request, artifacts, again=True)


def test_the_report_says_that_an_engine_was_not_run(compiled: Compiled) -> None:
    engine = replace(compiled.subject, file=Path("sm89/model.engine"))
    assert engine.default_forms()[-1] == "lowered"
    assert not_looked_at(engine, engine.default_forms()).startswith("The engine itself was not run")
    assert not_looked_at(replace(engine, file=None), engine.default_forms()).startswith("There is no engine yet")
    assert not_looked_at(engine, ("twin", "engine")) == ""
    for forms in (compiled.subject.default_forms(), ("twin", "lowered")):  # no engine is made of a CPU's graph
        assert not_looked_at(compiled.subject, forms) == ""
