"""tokenizer.json as transformers has it: of folders whose tokens are said in other files, or in those as well.

Artifacts read text by tokenizer.json alone. A folder may have none, but a vocabulary; and what its config and its lists
of tokens say over that file transformers adds when it opens it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer, normalizers

from instantrt.compiler.frontend.known_tensors import listed
from instantrt.compiler.json_file import read_json
from instantrt.compiler.serving.runtime.text import SPECIAL_TOKENS, token_text
from instantrt.compiler.serving.runtime.texts import GENERIC
from instantrt.passes.core.errors import UserError, tried

FILE, CONFIG, MAP, ADDED = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
VOCABULARIES = ("vocab.txt", "vocab.json", "*.model", "tiktoken*")  # what transformers makes a tokenizer of
LISTS = ("additional_special_tokens", "extra_special_tokens")
# Of BERT's normalizer: key of the config, the attribute that it is, and what it is where nothing says it.
NORMAL = (("strip_accents", "strip_accents", None), ("tokenize_chinese_chars", "handle_chinese_chars", True))
SAVE = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) says more, and writes the file where it can"


def made_tokenizer(folder: Path) -> tuple[Path, TemporaryDirectory[str] | None, str]:
    """(`folder`, or one that differs in its tokenizer.json; what holds it; what a user should know).

    UserError where tokenizer.json is not the whole tokenizer, and transformers cannot say what is.
    """
    alone = not (folder / FILE).is_file()
    why = without_file(folder) if alone else missing(folder)
    if not why:
        return folder, None, ""
    held = TemporaryDirectory(prefix=f"{folder.name}.")
    try:
        with tried("making tokenizer.json with transformers", where=str(folder), fix=SAVE):
            from transformers import AutoTokenizer

            own = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            own.backend_tokenizer.save(str(Path(held.name) / FILE))
    except UserError as error:
        held.cleanup()
        if alone:  # nothing here reads a text by it
            return folder, None, f"there is no tokenizer.json, and none can be made: {error.found}"
        raise UserError(f"tokenizer.json {why}", where=str(folder), found=error.found, fix=SAVE) from None
    for path in folder.iterdir():
        if path.name != FILE:
            (Path(held.name) / path.name).symlink_to(path.resolve())
    return Path(held.name), held, f"tokenizer.json {why}: it is made by transformers"


def without_file(folder: Path) -> str:
    found = sorted(path.name for pattern in VOCABULARIES for path in folder.glob(pattern) if path.is_file())
    return f"is not there, but {found[0]} is" if found else ""


def missing(folder: Path) -> str:
    """What other files say that tokenizer.json does not; nothing where they agree, or it cannot be read at all."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / FILE))
    except Exception:  # of any type; who reads a text says it
        return ""
    config, names, added = (said(folder / name) for name in (CONFIG, MAP, ADDED))
    unknown = [
        token
        for token, number in tokens_of(config, names, added)
        if (known := tokenizer.token_to_id(token)) is None or number not in (None, known)
    ]
    if unknown:
        return listed(list(dict.fromkeys(map(json.dumps, unknown))), "lacks tokens that other files name")
    before, wanted = space_before(tokenizer), config.get("add_prefix_space")
    if isinstance(wanted, bool) and before not in (None, wanted):
        put = "puts a space before a text" if before else "puts no space before a text"
        return f"{put}, and {CONFIG} says add_prefix_space: {json.dumps(wanted)}"
    if config.get("tokenizer_class", GENERIC[0]) in GENERIC:
        return ""
    tokenizer.no_padding()
    around, normal = tokenizer.encode("").tokens, tokenizer.normalizer
    lower = config.get("do_lower_case")
    if isinstance(normal, normalizers.BertNormalizer) and isinstance(lower, bool) and lower != normal.lowercase:
        return f"{'keeps' if lower else 'changes'} capitals, and {CONFIG} says do_lower_case: {json.dumps(lower)}"
    for key, attribute, usual in NORMAL if isinstance(normal, normalizers.BertNormalizer) else ():
        has, wanted = getattr(normal, attribute), config.get(key, usual)
        if has is not wanted and wanted in (True, False, None):
            return f"has {key}: {json.dumps(has)}, and with {CONFIG} it is {json.dumps(wanted)}"
    for key in ("cls_token", "sep_token"):
        token = token_text({**config, **names}.get(key))
        if around and token is not None and token not in around:
            return f"puts {' '.join(around)} around a text, and the {key} is {token}"
    return ""


def space_before(tokenizer: Tokenizer) -> bool | None:
    """Does a text of bytes get a space before it? None where no step of the tokenizer says so."""
    step = tokenizer.pre_tokenizer
    known: Mapping[str, Any] = json.loads(step.__getstate__()) if step is not None else {}
    steps = (each for each in known.get("pretokenizers", [known]) if each.get("type") == "ByteLevel")
    return next((each["add_prefix_space"] for each in steps), None)


def said(path: Path) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    except UserError:  # as above
        return {}
    return found


def tokens_of(
    config: Mapping[str, Any], names: Mapping[str, Any], added: Mapping[str, Any]
) -> Iterator[tuple[str, int | None]]:
    """(text, number where it is said) of every token that a file names."""
    decoder = config.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if (text := token_text(token)) is not None and str(number).isdecimal() and len(str(number)) < 10:
            yield text, int(number)
    for text, number in added.items():
        if type(number) is int:
            yield text, number
    for file in (config, names):
        lists = [token for key in LISTS if isinstance(file.get(key), list) for token in file[key]]
        for token in (*(file.get(key) for key in SPECIAL_TOKENS), *lists):
            if (text := token_text(token)) is not None:
                yield text, None
