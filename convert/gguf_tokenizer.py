"""A `transformers` tokenizer from the metadata of a GGUF file, which has the vocabulary but no tokenizer.json.

torch is not imported.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from barber_jax.console.errors import BarberError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
SPACE = "▁"

ID_FIELDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# What llama.cpp takes for a SentencePiece vocabulary that does not say.
SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3_SPLIT = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Names under which the llama 3 tokenizer goes; its models expect a start token even where the file does not ask.
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def has_tokenizer(fields: Mapping) -> bool:
    """Whether the metadata describe a tokenizer at all."""
    return _get(fields, "tokenizer.ggml.model", str, "none") not in ("none", "no_vocab")


def special_ids(fields: Mapping) -> dict[str, int | None]:
    """Ids of the special tokens, by `bos`, `eos`, `unk` and `pad`; None for those the model does not have.

    Raises:
        BarberError: an id is not a number.
    """
    defaults = SENTENCEPIECE_IDS if _get(fields, "tokenizer.ggml.model", str) == "llama" else {}
    return {
        short: _get(fields, f"tokenizer.ggml.{long}_token_id", int, defaults.get(short))
        for short, long in ID_FIELDS.items()
    }


def build_tokenizer(fields: Mapping) -> PreTrainedTokenizerFast:
    """The tokenizer that the metadata `fields` describe.

    Raises:
        BarberError: there is none, it is of a kind not supported, or its fields are missing or do not fit together.
    """
    if not has_tokenizer(fields):
        raise BarberError("the file has no tokenizer (metadata field tokenizer.ggml.model)")
    tokens = _strings(fields, "tokenizer.ggml.tokens")
    special = {name: _token(tokens, name, index) for name, index in special_ids(fields).items() if index is not None}
    kind = fields["tokenizer.ggml.model"]
    if kind == "gpt2":
        tokenizer = _byte_level(fields, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(fields, tokens, special["unk"])
    else:
        raise BarberError(f"tokenizer.ggml.model {kind!r} is not supported, only 'gpt2' and 'llama'")
    _add_tokens(tokenizer, tokens, _numbers(fields, "tokenizer.ggml.token_type", tokens))
    ends = _added_ends(fields)
    tokenizer.post_processor = _template(tokenizer, special, *ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": token for name, token in special.items()},
        add_bos_token=ends[0],
        add_eos_token=ends[1],
        chat_template=_get(fields, "tokenizer.chat_template", str),
        model_max_length=fields.get("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )


def _byte_level(fields: Mapping, tokens: list[str]) -> Tokenizer:
    """Byte-level BPE, split into words first as the model's own tokenizer did."""
    merges = [_pair(merge) for merge in _strings(fields, "tokenizer.ggml.merges")]
    name = _get(fields, "tokenizer.ggml.pre", str, "default")
    tokenizer = Tokenizer(_bpe(tokens, merges, ignore_merges=name in LLAMA3_NAMES))
    tokenizer.pre_tokenizer = _pre_tokenizer(name)
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("gpt-2", "gpt2"):
        return words
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    if name == "qwen2" or name in LLAMA3_NAMES:
        split = Regex(QWEN2_SPLIT if name == "qwen2" else LLAMA3_SPLIT)
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(split, behavior="isolated"), letters])
    raise BarberError(f"pre-tokenizer {name!r} (metadata field tokenizer.ggml.pre) is not supported")


def _sentencepiece(fields: Mapping, tokens: list[str], unknown: str) -> Tokenizer:
    """SentencePiece's BPE: characters outside the vocabulary fall to bytes, a space is a letter of its own."""
    merges = list(_merges_from_scores(fields, tokens))
    tokenizer = Tokenizer(_bpe(tokens, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    spaces = [normalizers.Replace(" ", SPACE)]
    pieces = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _get(fields, "tokenizer.ggml.add_space_prefix", bool, True):
        spaces.insert(0, normalizers.Prepend(SPACE))
        pieces.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(pieces)
    return tokenizer


def _merges_from_scores(fields: Mapping, tokens: list[str]) -> Iterator[tuple[str, str]]:
    """Every pair of tokens that joins into a token, those whose whole scores best first.

    SentencePiece keeps no list of merges: it joins the neighbours whose whole scores best.
    """
    scores = _numbers(fields, "tokenizer.ggml.scores", tokens)
    normal = [i for i, kind in enumerate(_numbers(fields, "tokenizer.ggml.token_type", tokens)) if kind == NORMAL]
    pieces = {tokens[i] for i in normal}
    for i in sorted(normal, key=lambda i: -scores[i]):
        whole = tokens[i]
        for cut in range(1, len(whole)):
            if whole[:cut] in pieces and whole[cut:] in pieces:
                yield whole[:cut], whole[cut:]


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options) -> BPE:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise BarberError("metadata field tokenizer.ggml.tokens holds a token twice; convert the model again")
    try:
        return BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as error:  # the library raises nothing narrower
        raise BarberError(f"the tokens and merges do not fit together ({error}); convert the model again") from None


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Make the tokens that are never split be found whole in the text."""
    kinds = list(zip(tokens, types, strict=True))
    special = [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == USER_DEFINED])


def _added_ends(fields: Mapping) -> tuple[bool, bool]:
    """Whether a start and an end token go around every text."""
    llama3 = _get(fields, "tokenizer.ggml.pre", str) in LLAMA3_NAMES
    start = llama3 or fields["tokenizer.ggml.model"] == "llama"
    return (
        _get(fields, "tokenizer.ggml.add_bos_token", bool, start),
        _get(fields, "tokenizer.ggml.add_eos_token", bool, False),
    )


def _template(tokenizer: Tokenizer, special: dict[str, str], start: bool, end: bool) -> processors.TemplateProcessing:
    wanted = (["bos"] if start else []) + (["eos"] if end else [])
    missing = [name for name in wanted if name not in special]
    if missing:
        raise BarberError(f"metadata field tokenizer.ggml.{missing[0]}_token_id is missing; convert the model again")
    before, after = [special["bos"]] if start else [], [special["eos"]] if end else []
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
        special_tokens=[(special[name], tokenizer.token_to_id(special[name])) for name in wanted],
    )


def _get(fields: Mapping, key: str, kind: type, default=None):
    value = fields.get(key, default)
    if value is not None and not isinstance(value, kind):
        raise BarberError(f"metadata field {key} is not of type {kind.__name__}; convert the model again")
    return value


def _strings(fields: Mapping, key: str) -> list[str]:
    value = _get(fields, key, list)
    if value is None:
        raise BarberError(f"metadata field {key} is missing; convert the model again")
    return value


def _numbers(fields: Mapping, key: str, tokens: list[str]) -> list[int | float]:
    value = _get(fields, key, np.ndarray)
    if value is None or len(value) != len(tokens):
        raise BarberError(f"metadata field {key} must have one number for each token; convert the model again")
    return value.tolist()


def _token(tokens: list[str], name: str, index: int) -> str:
    if not 0 <= index < len(tokens):
        raise BarberError(f"the {name} token's id {index} is outside the vocabulary of {len(tokens)} tokens")
    return tokens[index]


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space or not left or not right:
        raise BarberError(f"{merge!r} in metadata field tokenizer.ggml.merges is not a pair; convert the model again")
    return left, right
