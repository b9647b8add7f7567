"""The tokenizer of a GGUF file, in the files that a checkpoint has.

transformers makes it of the vocabulary. What it leaves open is said here: how a text is split before the merges of some
families, and the tokens that are put around it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from instantrt.compiler.frontend.gguf.values import Keys
from instantrt.passes.core.errors import UserError, tried

PREFIX = "tokenizer.ggml"
CONTROL, DEFINED = 3, 4  # types of tokens that are found whole in a text; the first are no text
# Those that end an answer, whatever else the file says: llama.cpp knows them by their text, too.
ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
BEGUN = ("llama-bpe", "llama3", "llama-v3")  # Llama 3's, whose texts begin with bos although no key says so
WHOLE = (*BEGUN, "tekken")  # a piece that is a token is not made of merges
GPT2 = ("gpt-2", "gpt2")
MOST_PAIRS = 10**8  # ways to divide all tokens in two, which are tried where a file has no merges
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_files(metadata: Mapping[str, Any], where: str) -> tuple[dict[str, str], list[str]]:
    """(file name -> text, what a user should know); no files where the file has no tokenizer."""
    keys = Keys(metadata, PREFIX, where)
    if keys.text("model", "none") in ("none", "no_vocab"):
        return {}, ["the file has no tokenizer: text cannot be given"]
    tokens = keys.list("tokens", str)
    last = len(tokens) - 1
    ids = {name: keys.integer(key, least=0, most=last) for name, key in SPECIAL.items() if key in keys}
    types = keys.list("token_type", int, [])
    keys.expect(len(types) in (0, len(tokens)), "token_type", f"a list of {len(tokens)}")
    pre = keys.text("pre", "default")
    made = built(keys, tokens, types, pre)
    if keys.text("model") == "gpt2":
        found_whole(made, tokens, types)
    if pre in DIGITS_APART:
        made["pre_tokenizer"] = digits_apart()
    if pre in WHOLE:
        made["model"]["ignore_merges"] = True
    if keys.flag("add_space_prefix", True) is False and (made["pre_tokenizer"] or {}).get("type") == "Metaspace":
        made["pre_tokenizer"]["prepend_scheme"] = "never"
    around = {
        "bos_token": keys.flag("add_bos_token", keys.text("model") == "llama" or pre in BEGUN),
        "eos_token": keys.flag("add_eos_token", False),
    }
    texts = {name: tokens[at] for name, at in ids.items()}
    made["post_processor"] = template(around, ids, texts)
    ends = [keys.integer(key, least=0, most=last) for key in ("eot_token_id", "eom_token_id") if key in keys]
    ends += [at for at, text in enumerate(tokens) if types and types[at] == CONTROL and text in ENDS]
    files = {
        "tokenizer.json": json.dumps(made, ensure_ascii=False),
        "tokenizer_config.json": config(texts, around),
        "generation_config.json": generation(ids, ends),
    }
    chat = metadata.get("tokenizer.chat_template")
    if chat is not None:
        files["chat_template.jinja"] = Keys(metadata, "tokenizer", where).text("chat_template")
    known = (*GPT2, *DIGITS_APART, *splits_of_transformers())
    notes = []
    if keys.text("model") == "gpt2" and pre not in known:
        notes.append(f"how {pre!r} splits a text is not known: it is split as GPT-2's")
    others = [key for key in metadata if key.startswith("tokenizer.chat_template.")]
    if others:
        notes.append(f"other chat templates than the first are left: {', '.join(others)}")
    return files, notes


def splits_of_transformers() -> tuple[str, ...]:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return tuple(GGUF_PRE_TOKENIZER_SPLITS)


def built(keys: Keys, tokens: list[str], types: list[int], pre: str) -> dict[str, Any]:
    """What transformers makes of the vocabulary: tokenizer.json."""
    from transformers.integrations.gguf import convert_gguf_tokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    given: dict[str, Any] = {"tokenizer_type": keys.text("model"), "pre_tokenizer_type": pre, "tokens": tokens}
    given["token_type"] = types or None
    if "merges" in keys:
        given["merges"] = keys.list("merges", str)
        wrong = next((merge for merge in given["merges"] if merge.count(" ") != 1), None)
        keys.expect(wrong is None, "merges", "pairs of tokens with a space between them", wrong)
    if "scores" in keys:
        given["scores"] = keys.list("scores", (int, float))
        keys.expect(len(given["scores"]) == len(tokens), "scores", f"a list of {len(tokens)}")
    if given["tokenizer_type"] == "llama" and "scores" not in given:
        raise UserError("a vocabulary of SentencePiece without scores", where=keys.where, expected=f"{PREFIX}.scores")
    pairs = sum(len(token) ** 2 for token in tokens)
    if "merges" not in given and pairs > MOST_PAIRS:
        raise UserError("tokens too long to find their merges", where=keys.where, found=f"{pairs:.0e} pairs of parts")
    architecture = str(keys.metadata.get("general.architecture"))
    with tried("making the tokenizer of the file's vocabulary", where=keys.where):
        tokenizer, _ = convert_gguf_tokenizer(architecture, given)
    made: dict[str, Any] = json.loads(tokenizer.to_str())
    return made


def found_whole(made: dict[str, Any], tokens: list[str], types: list[int]) -> None:
    """Adds to tokenizer.json what transformers leaves out: tokens found whole that are not in the letters of bytes.

    It takes them for a converter's mistake. DeepSeek's <|User|> is one, in letters of its own, and spaces are.
    """
    known = {each["id"] for each in made["added_tokens"]}
    lost = {at: tokens[at] for at, kind in enumerate(types) if kind in (CONTROL, DEFINED) and tokens[at]}
    lost = {at: text for at, text in lost.items() if at not in known}
    letters = {at: text for text, at in made["model"]["vocab"].items()}  # two of a spelling are one there
    vocabulary = dict(enumerate(tokens)) | letters | lost
    made["model"]["vocab"] = {text: at for at, text in vocabulary.items()}
    rules = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": at, "content": text, **rules, "special": types[at] == CONTROL} for at, text in lost.items()]
    made["added_tokens"] = sorted([*made["added_tokens"], *added], key=lambda each: int(each["id"]))


def digits_apart() -> dict[str, Any]:
    """GPT-2's split, with every digit a piece of its own."""
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, levels]}


def template(around: Mapping[str, bool], ids: Mapping[str, int], texts: Mapping[str, str]) -> dict[str, Any]:
    """The post-processor that puts bos and eos around a text, where they are to be and the file has them."""
    put = {name for name, wanted in around.items() if wanted and name in ids}

    def special(name: str) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": texts[name], "type_id": 0}}] if name in put else []

    parts = [*special("bos_token"), {"Sequence": {"id": "A", "type_id": 0}}, *special("eos_token")]
    tokens = {texts[name]: {"id": texts[name], "ids": [ids[name]], "tokens": [texts[name]]} for name in sorted(put)}
    pair = [*parts, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": parts, "pair": pair, "special_tokens": tokens}


def config(texts: Mapping[str, str], around: Mapping[str, bool]) -> str:
    flags = {f"add_{name}": wanted for name, wanted in around.items()}
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **texts, **flags}
    return json.dumps(said, indent=2, ensure_ascii=False)


def generation(ids: Mapping[str, int], ends: list[int]) -> str:
    """Where an answer begins and ends."""
    every = list(dict.fromkeys([*([ids["eos_token"]] if "eos_token" in ids else []), *ends]))
    said: dict[str, Any] = {f"{name}_id": ids[name] for name in ("bos_token", "pad_token") if name in ids}
    return json.dumps({**said, **({"eos_token_id": every} if every else {})}, indent=2)
