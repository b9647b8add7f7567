"""A folder's tokenizer.json says what transformers makes of the whole folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from instantrt.compiler.frontend import load
from instantrt.compiler.frontend.tokenizer_file import CONFIG, FILE, MAP, made_tokenizer
from instantrt.passes.core.errors import UserError
from tests.compiler.encoder_models import make
from tests.conftest import TINY

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[X]", "a", "b", "##b", "c", "A", "C", "new", "<", ">"]
TEXT = "Ab <new> c C A"
NEW = {"content": "<new>", "special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
Change = Callable[[Path], None]


def written(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / CONFIG).write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    own = AutoTokenizer.from_pretrained(folder)
    own.backend_tokenizer.enable_padding(length=9)
    own.backend_tokenizer.save(str(folder / FILE))


def config(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **fields}))

    return change


def another_space(folder: Path) -> None:
    shutil.copy(TINY / FILE, folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / CONFIG).write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": True}))


# What is changed -> the words of the note; nothing where the file is right as it is.
FOLDERS: dict[str, tuple[Change, str]] = {
    "as it is": (lambda folder: None, ""),
    "a vocabulary": (lambda folder: (folder / FILE).unlink(), "is not there, but vocab.txt is"),
    "capitals": (config(do_lower_case=False), "changes capitals"),
    "accents": (config(strip_accents=False), "has strip_accents: null, and with tokenizer_config.json it is false"),
    "Chinese letters": (config(tokenize_chinese_chars=False), "has tokenize_chinese_chars: true"),
    "a class that takes the file": (config(do_lower_case=False, tokenizer_class="PreTrainedTokenizerFast"), ""),
    "a token in the config": (config(added_tokens_decoder={"15": NEW}), 'lacks tokens that other files name: "<new>"'),
    "a token in a list": (lambda folder: (folder / "added_tokens.json").write_text('{"<new>": 15}'), '"<new>"'),
    "a special token": (config(pad_token="<new>"), '"<new>"'),
    "another number": (config(added_tokens_decoder={"7": {**NEW, "content": "[X]"}}), '"[X]"'),
    "another first token": (
        lambda folder: (folder / MAP).write_text('{"cls_token": "[X]"}'),
        "puts [CLS] [SEP] around",
    ),
    "a space before a text": (another_space, "puts no space before a text"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_ids_are_those_of_transformers(what: str, tmp_path: Path) -> None:
    written(tmp_path)
    change, words = FOLDERS[what]
    change(tmp_path)
    folder, held, note = made_tokenizer(tmp_path)
    assert words in note
    assert (held is None) == (not words) == (folder == tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / FILE))
    tokenizer.no_padding()
    assert tokenizer.encode(TEXT).ids == AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    assert (folder / "vocab.txt").is_file()


def test_what_transformers_cannot_read(tmp_path: Path) -> None:
    """Is refused where it would change ids, and told where no text is read."""
    written(tmp_path)
    config(added_tokens_decoder={"15": {**NEW, "lstrip": "?"}})(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json lacks tokens"):
        made_tokenizer(tmp_path)
    for name in (FILE, "vocab.txt"):
        (tmp_path / name).unlink()
    assert made_tokenizer(tmp_path) == (tmp_path, None, "")
    (tmp_path / "spiece.model").write_bytes(b"?")
    folder, held, note = made_tokenizer(tmp_path)
    assert (folder, held) == (tmp_path, None)
    assert "none can be made" in note


@pytest.mark.slow
def test_a_model_has_the_tokenizer(tmp_path: Path) -> None:
    make("bert", "AutoModel", tmp_path)
    written_config = (tmp_path / "config.json").read_text()
    written(tmp_path)
    (tmp_path / "config.json").write_text(written_config)
    (tmp_path / FILE).unlink()
    model = load(tmp_path)
    assert (model.folder / FILE).is_file()
    assert any("made by transformers" in note for note in model.notes)
