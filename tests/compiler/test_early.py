"""What options and the files of a checkpoint decide is said before anything is exported."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

from instantrt.compiler.early import check_early
from instantrt.compiler.frontend.own_names import own_names
from instantrt.compiler.plan import plan
from instantrt.compiler.request import Request
from instantrt.passes.core.errors import UserError
from tests.checkpoints import HERE, config_of
from tests.conftest import TINY

GPTQ = HERE / "gptq-int4-g128-sym"


@pytest.mark.parametrize(
    ("model", "target", "given", "says"),
    [
        (TINY, "x86", {"kv_cache_type": "float16"}, "no float16 cache on a CPU"),
        (TINY, "sm89", {"kv_cache_type": "uint4"}, "no uint4 cache in this engine"),
        (TINY, "sm89", {"kv_cache_type": "float32"}, "no float32 cache in this engine"),
        (TINY, "sm89", {"kv_cache_type": "int8", "kv_cache": "in-place"}, "no int8 cache in place"),
        (TINY, "sm70", {"kv_cache_type": "int8"}, "no int8 cache in this engine"),
        (TINY, "x86", {"max_length": 1 << 20}, "max_length is more than the model was made for"),
        (TINY, "x86", {"group_size": 32}, "group_size does nothing without quantization"),
        (TINY, "sm70", {"quant": "a8w8"}, "IQ-INT8 .A8W8. is not supported on sm70"),
        (TINY, "x86", {"quant": "a16w8", "max_ppl_increase": 1}, "perplexity needs a text"),
        (TINY, "x86", {"quant": "a16w8", "min_cosine": 0.9}, "min_cosine is of encoders"),
        (TINY, "x86", {"text": Path("none.txt")}, "the text cannot be read"),
        (GPTQ, "x86", {"quant": "a16w8"}, "the checkpoint has weights of another width"),
        (GPTQ, "x86", {"quant": "none"}, "the checkpoint holds its weights only quantized"),
        (GPTQ, "x86", {"max_kl": 1.0}, "max_kl does nothing without a float checkpoint"),
        ("BertModel", "x86", {"max_length": 2}, "max_length leaves no token of a text"),
        ("BertModel", "x86", {"kv_cache_type": "float16"}, "kv_cache_type does nothing without a causal LM"),
        ("BertModel", "x86", {"logits": "all"}, "logits does nothing without a causal LM"),
        ("BertModel", "x86", {"quant": "a16w8", "max_kl": 1.0}, "a budget is of causal LMs"),
        ("BertModel", "x86", {"quant": "a16w8", "lm_head": "int8"}, "lm_head int8 does nothing"),
    ],
)
def test_nothing_is_exported_before_it_is_refused(
    model: Path | str, target: str, given: dict[str, Any], says: str, tmp_path: Path
) -> None:
    said: list[str] = []
    if isinstance(model, str):  # a checkpoint of another class: no weight is read before
        (tmp_path / "model.safetensors").symlink_to(TINY / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": [model]}))
        around = TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 0), ("[SEP]", 1)])
        tokenizer = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1}, "[CLS]"))
        tokenizer.post_processor = around
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        model = tmp_path
    with pytest.raises(UserError, match=says):
        plan(Request(model, (target,), tmp_path / "o", **given), said.append)
    assert said == []


def test_another_width_is_said_in_the_words_of_the_request(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_early(Request(GPTQ, ("x86",), tmp_path / "o", quant="a16w8"))
    assert (caught.value.expected, caught.value.found) == ("4 bits (uint4)", "8 bits (quant a16w8)")
    assert caught.value.fix.startswith("leave it out")


@pytest.mark.parametrize("said", [{"text_config": []}, {"text_config": None}, {"max_position_embeddings": -1}])
def test_what_is_wrong_with_a_config_is_left_to_the_frontend(said: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(TINY / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config_of(TINY), **said}))
    check_early(Request(tmp_path, ("x86",), tmp_path / "o", quant="a16w8", group_size=32))


def test_errors_name_the_users_files_not_those_made_for_a_model(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    with TemporaryDirectory(prefix="m.") as first, TemporaryDirectory(prefix="adapted.") as second:
        (Path(first) / "config.json").touch()
        (Path(second) / "config.json").symlink_to(Path(first) / "config.json")
        (Path(second) / "tokenizer.json").symlink_to(tmp_path / "adapter" / "tokenizer.json")
        held = [TemporaryDirectory(dir=tmp_path) for _ in range(2)]
        held[0].name, held[1].name = first, second
        change = own_names((held[0], held[1]), file)
        said = f"in {second}/tokenizer.json: {first}, and '{second}/config.json'"
        assert change(said) == f"in {tmp_path}/adapter/tokenizer.json: {file}, and '{file}'"
        assert own_names(held[0], tmp_path)(f"{first}/config.json, x") == f"{tmp_path}/config.json, x"
