"""Which model a checkpoint is, told from config.json; what has no road yet is refused by what it is.

`architectures` decides. Nothing of the weights is read here, and nothing is exported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from instantrt.passes.core.errors import UserError

COMPILES = "a model of text: a causal language model, an encoder, or a classifier"
ONNX = "export it to ONNX and compile the .onnx file"
SUFFIX = re.compile(
    r"(for(causallm|maskedlm|sequenceclassification|tokenclassification|pretraining)|"
    r"(with)?lmheadmodel|modelwithlmhead|model)$"
)
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
MOST_LAYERS = 1000  # a module is made for each; the deepest model there is has 126, merges of several some hundred
ENCODER = "is an encoder, which attends to both sides"
SAY = "say in architectures which head it has: BertModel, BertForMaskedLM, ..."
OF_A_CACHE = ("num_key_value_heads", "num_attention_heads", "head_dim", "hidden_size")  # which all layers share
# What a model may read beside tokens, by the name of the input, or by the key of its config: as if it were all zeros,
# it would be another model.
BESIDE_TOKENS = {
    "bbox": "where each token stands on a page",
    "xpath_tags_seq": "where each token stands in a page's markup",
    "input_shape_ids": "what each token looks like",
}
OF_TABLES = "type_vocab_sizes"
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention", "attention")


@dataclass(frozen=True)
class Head:
    """What a model's class ends in, which decides what it is for.

    task     of `model.OUTPUTS`, or `generate` for a causal LM
    auto     transformers' class that builds it; `mapping` the table there of which class that is for a model_type
    """

    task: str
    pattern: str
    auto: str
    mapping: str

    def classes(self) -> Mapping[str, Any]:
        """model_type -> the name of the class."""
        from transformers.models.auto import modeling_auto

        found: Mapping[str, Any] = getattr(modeling_auto, f"{self.mapping}_NAMES")
        return found


CAUSAL_LM = Head("generate", "", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING")
EMBED = Head("embed", "", "AutoModel", "MODEL_MAPPING")
HEADS = (
    Head(
        "classify",
        r"ForSequenceClassification$",
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    ),
    Head(
        "classify_tokens",
        r"ForTokenClassification$",
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    ),
    Head("fill_mask", r"ForMaskedLM$", "AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING"),
    Head("hidden", r"(?<!LMHead)Model$", "AutoModel", "MODEL_MAPPING"),
)


def auto_class(task: str) -> str:
    """transformers' class that builds a model for `task`."""
    return next(head.auto for head in HEADS if head.task == task)


@dataclass(frozen=True)
class NoRoad:
    """Classes whose names match, what they are, and what can be done with one.

    keys      of which the config has one, if any are given, that is neither 0 nor false
    without   a key that it then has not
    """

    pattern: str
    what: str
    fix: str = ONNX
    keys: tuple[str, ...] = ()
    without: str = ""

    def fits(self, name: str, config: Mapping[str, Any]) -> bool:
        keyed = not self.keys or any(config.get(key) for key in self.keys)
        return re.search(self.pattern, name) is not None and keyed and self.without not in config


PICTURES, SOUND = "a model of pictures", "a model of sound"
OF_PICTURES = ("image_size", "patch_size", "num_channels")
OF_SOUND = ("sampling_rate", "num_mel_bins", "feat_extract_norm")
OF_TWO = ("is_encoder_decoder", "decoder_layers", "num_decoder_layers")
GENERATES = r"For(ConditionalGeneration|ImageTextToText|Vision2Seq|SpeechSeq2Seq|Seq2SeqLM)$"
ALONE = "save its language model alone, where it has one: `.language_model` of the loaded model, as a causal LM"
NO_ROAD = (
    NoRoad("", "a part of a diffusers pipeline, which makes pictures or sound", keys=("_diffusers_version",)),
    NoRoad(r"For\w*(Image|Object|Video|Depth|Segmentation|Keypoint)\w*(?<!TextToText)$", PICTURES),
    NoRoad(r"For(Audio\w+|CTC|XVector|SpeechSeq2Seq)$", SOUND),
    NoRoad(r"For(QuestionAnswering|MultipleChoice|NextSentencePrediction)$", "a model with a head of its own"),
    NoRoad(r"(RewardModel|ForRewardModel|ProcessRewardModel|ValueHead|ForScore)$", "a reward model"),
    NoRoad(
        r"For(PreTraining|Pretraining)$", "a model with the heads of its training", "name one head in architectures"
    ),
    NoRoad(GENERATES, "a model of pictures or sound beside text", ALONE, ("vision_config", "audio_config")),
    NoRoad(GENERATES, SOUND, keys=OF_SOUND),
    NoRoad(GENERATES, "a model of an encoder and a decoder, as those that translate", keys=OF_TWO),
    NoRoad(GENERATES, "a model of pictures or sound, or of an encoder and a decoder", ALONE),
    NoRoad(r"(Eagle|Medusa|Mtp|MTP|NextN)", "a draft model of speculative decoding", "compile the model it drafts for"),
    NoRoad(r"Encoder(Model)?$", "one half of an encoder and a decoder"),
    NoRoad(r"Model$", SOUND, keys=OF_SOUND),
    NoRoad(r"Model$", PICTURES, keys=OF_PICTURES, without="vocab_size"),
)


def head_of(config: Mapping[str, Any], where: str, *, pooled: bool) -> Head:
    """What a config's `architectures` say that the model is for; a causal LM where they say nothing.

    pooled   modules of sentence-transformers follow the language model, which then has no other head
    """
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError("architectures is no list of names", where=where, found=repr(named))
    if pooled:
        return EMBED
    refuse_known(named, config, where)
    found = {head.task: head for name in named for head in HEADS if re.search(head.pattern, name)}
    if len(found) > 1:
        raise refusal("architectures names models of several heads", config, where, "name one of them")
    return next(iter(found.values()), CAUSAL_LM)


def class_of(config: Mapping[str, Any], head: Head, where: str) -> str:
    """The class that a config's model is built from: the model's own code names it, or transformers does."""
    auto_map = config.get("auto_map")
    own = auto_map.get(head.auto) if isinstance(auto_map, dict) else None
    if isinstance(own, str):
        return own.rpartition(".")[2]
    model_type = config.get("model_type", "")
    name = head.classes().get(model_type) if isinstance(model_type, str) else None
    if name is None:
        from transformers import __version__

        what = f"InstantRT compiles no checkpoint of type {model_type!r}"
        raise UserError(
            what if model_type else "nothing here says which model this is",
            where=where,
            expected=f"{COMPILES}, of a model_type that transformers {__version__} knows",
            found=as_named(config),
            fix=f"a newer transformers may know it; else {ONNX}" if model_type else ONNX,
        )
    return str(name)


def check_architectures(config: Mapping[str, Any], head: Head, where: str) -> None:
    """Refuses a config whose `architectures` is another model than its model_type."""
    built = class_of(config, head, where)
    refuse_known([built], config, where)
    stems = {stem(built), stem(str(config.get("model_type")))}
    for name in config.get("architectures") or []:
        if not (name == built or (SUFFIX.search(name.lower()) and stem(name) in stems)):
            what = f"architectures names another model than the one that model_type stands for, {built}"
            raise refusal(what, config, where, "correct the one that is wrong")


def check_layers(config: Mapping[str, Any], where: str) -> None:
    """Refuses a number of layers that no model has: to make them all would take for ever."""
    text = config.get("text_config")
    for said in (config, text if isinstance(text, dict) else {}):
        for key in LAYERS:
            count = said.get(key)
            if isinstance(count, int) and count > MOST_LAYERS:
                raise UserError(
                    f"{key} is more than any model has",
                    where=where,
                    expected=f"at most {MOST_LAYERS}",
                    found=str(count),
                )


def refuse_known(names: list[str], config: Mapping[str, Any], where: str) -> None:
    for name in names or [""]:
        for rule in NO_ROAD:
            if rule.fits(name, config):
                raise refusal(f"this is {rule.what}", config, where, rule.fix)


def stem(name: str) -> str:
    """`LlamaForCausalLM`, `LLaMAForCausalLM` and model type `llama` are one."""
    return SUFFIX.sub("", re.sub(r"[-_]", "", name.lower()))


def refusal(what: str, config: Mapping[str, Any], where: str, fix: str) -> UserError:
    what = f"{what}: InstantRT compiles no such checkpoint"
    return UserError(what, where=where, expected=COMPILES, found=as_named(config), fix=fix)


def as_named(config: Mapping[str, Any]) -> str:
    """What a config says that the model is."""
    named, model_type = config.get("architectures"), config.get("model_type")
    return f"model_type {model_type!r}" + (f', "architectures": {named!r}' if named else "")


def check_family(config: Any, head: Head, where: str) -> None:
    """Refuses what transformers' config says: halves of other models, and states besides keys and values."""
    from transformers.models.auto import modeling_auto as auto

    kind, text, known = type(config), config.get_text_config(), getattr(auto, head.mapping)
    built = known[kind]
    pair = kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    encoder = kind in auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    wrapper = type(text) not in known or "vision_config" in config.sub_configs
    others = sorted(set(getattr(text, "layer_types", None) or ()) - set(ATTENTION_LAYERS))
    sizes = sorted(set(getattr(text, "per_layer_attributes", None) or ()) & set(OF_A_CACHE))
    takes = inspect.signature(getattr(built, "forward", check_family)).parameters
    beside = [what for name, what in BESIDE_TOKENS.items() if name in takes]
    beside += ["rows and columns of a table"] * hasattr(config, OF_TABLES)
    for wrong, what, fix in (
        (pair, "is one half of an encoder and a decoder", ONNX),
        (encoder and head is CAUSAL_LM, ENCODER, SAY),
        (wrapper, "reads more than text", "save its language model alone"),
        (beside, f"reads more than tokens: {', '.join(beside)}", ONNX),
        (getattr(built, "_is_stateful", False), "keeps a state besides keys and values", ONNX),
        (others, f"has layers that are no attention: {', '.join(others)}", ONNX),
        (sizes, f"has layers whose caches differ in shape: {', '.join(sizes)}", ONNX),
    ):
        if wrong:
            raise refusal(f"this model {what}", config.to_dict(), where, fix)


def check_modules(model: Any, head: Head, where: str) -> None:
    """Refuses what only the modules tell: an encoder as a causal LM, and experts, whose weights are stacked."""
    import torch

    for path, module in model.named_modules():
        ranks = {p.ndim for p in module.parameters(recurse=False)}
        for wrong, what in (
            (head is CAUSAL_LM and getattr(module, "is_decoder", True) is False, ENCODER),
            (3 in ranks and not isinstance(module, torch.nn.Conv1d), "is a mixture of experts"),
        ):
            if wrong:
                fix = SAY if what is ENCODER else ONNX
                raise refusal(f"this model {what} ({path})", model.config.to_dict(), where, fix)
