"""Builds a `transformers` tokenizer from GGUF metadata, which hold the vocabulary but no tokenizer.json.

PyTorch is not imported.
"""

import bisect
from collections.abc import Iterator, Mapping

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from barber_jax.console.errors import BarberError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
SPACE = "▁"

ID_FIELDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# llama.cpp's defaults for a SentencePiece vocabulary whose file does not give these ids.
SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3_SPLIT = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MAX_MERGE_WORK = 5 * 10**8
"""Characters to compare at most while merges are derived from tokens; 256,000 tokens of 10 letters take 2 * 10^7."""
# Names of the llama 3 tokenizer. Its models expect a BOS token even if the file does not request one.
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


class UnknownTokenizer(BarberError):
    """The tokenizer is of a kind that cannot be built here; the file may be sound."""


def has_tokenizer(fields: Mapping) -> bool:
    """Whether the metadata describe a tokenizer."""
    return _get(fields, "tokenizer.ggml.model", str, "none") not in ("none", "no_vocab")


def special_ids(fields: Mapping) -> dict[str, int | None]:
    """Ids of the special tokens `bos`, `eos`, `unk` and `pad`; None for those that the model does not have.

    Raises:
        BarberError: an id is not an integer.
    """
    defaults = SENTENCEPIECE_IDS if _get(fields, "tokenizer.ggml.model", str) == "llama" else {}
    return {
        short: _get(fields, f"tokenizer.ggml.{long}_token_id", int, defaults.get(short))
        for short, long in ID_FIELDS.items()
    }


def build_tokenizer(fields: Mapping) -> PreTrainedTokenizerFast:
    """Build the tokenizer that the metadata `fields` describe.

    Raises:
        BarberError: there is no tokenizer, its kind is not supported, or its fields are missing or inconsistent.
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
        raise UnknownTokenizer(f"tokenizer.ggml.model {kind!r} is not supported, only 'gpt2' and 'llama'")
    spaces = kind == "llama" and not _get(fields, "tokenizer.ggml.add_space_prefix", bool, True)
    _add_tokens(tokenizer, tokens, _numbers(fields, "tokenizer.ggml.token_type", tokens), spaces)
    add_bos, add_eos = _adds_bos_eos(fields)
    tokenizer.post_processor = _template(tokenizer, special, add_bos, add_eos)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": token for name, token in special.items()},
        add_bos_token=add_bos,
        add_eos_token=add_eos,
        chat_template=_get(fields, "tokenizer.chat_template", str),
        model_max_length=fields.get(f"{fields.get('general.architecture', 'llama')}.context_length"),
        clean_up_tokenization_spaces=False,
    )


def _byte_level(fields: Mapping, tokens: list[str]) -> Tokenizer:
    """Byte-level BPE, with the word splitting of the model's original tokenizer."""
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
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(split, behavior="isolated"), to_bytes])
    raise UnknownTokenizer(f"pre-tokenizer {name!r} (metadata field tokenizer.ggml.pre) is not supported")


def _sentencepiece(fields: Mapping, tokens: list[str], unknown: str) -> Tokenizer:
    """SentencePiece BPE: characters outside the vocabulary fall back to bytes, and spaces become `▁`."""
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
    """Yield every pair of tokens that merges into another token, in descending order of the merged token's score.

    SentencePiece stores no list of merges: it merges the adjacent pair whose result has the highest score.

    Raises:
        BarberError: there are so many long tokens that this would take minutes and gigabytes.
    """
    scores = _numbers(fields, "tokenizer.ggml.scores", tokens)
    normal = [i for i, kind in enumerate(_numbers(fields, "tokenizer.ggml.token_type", tokens)) if kind == NORMAL]
    pieces = {tokens[i] for i in normal}
    # Cuts into lengths that no token has are skipped: all cuts of one token of 200,000 letters would take minutes.
    lengths = {len(piece) for piece in pieces}
    ascending, work = sorted(lengths), 0
    for i in sorted(normal, key=lambda i: -scores[i]):
        whole, size = tokens[i], len(tokens[i])
        for cut in ascending[: bisect.bisect_left(ascending, size)]:
            if size - cut not in lengths:
                continue
            work += size
            if work > MAX_MERGE_WORK:
                raise BarberError(
                    "metadata field tokenizer.ggml.tokens holds too many long tokens; convert the model again"
                )
            if whole[:cut] in pieces and whole[cut:] in pieces:
                yield whole[:cut], whole[cut:]


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options) -> BPE:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise BarberError("metadata field tokenizer.ggml.tokens contains a token twice; convert the model again")
    try:
        return BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as error:  # the library raises plain Exception
        raise BarberError(f"the tokens and merges are inconsistent ({error}); convert the model again") from None


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], spaces: bool) -> None:
    """Register the special and user-defined tokens, which are matched in the text as a whole.

    Args:
        spaces: whether spaces become `▁`, and none is put before the text.
    """
    kinds = list(zip(tokens, types, strict=True))
    special = [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens(special)
    added = [token for token, kind in kinds if kind == USER_DEFINED]
    # Those of spaces alone are matched where spaces have become `▁`, unless one more would stand before them there.
    tokenizer.add_tokens([AddedToken(token, normalized=spaces and not token.strip(SPACE)) for token in added])


def _adds_bos_eos(fields: Mapping) -> tuple[bool, bool]:
    """Whether BOS and EOS tokens are added to every text."""
    llama3 = _get(fields, "tokenizer.ggml.pre", str) in LLAMA3_NAMES
    default_bos = llama3 or fields["tokenizer.ggml.model"] == "llama"
    return (
        _get(fields, "tokenizer.ggml.add_bos_token", bool, default_bos),
        _get(fields, "tokenizer.ggml.add_eos_token", bool, False),
    )


def _template(
    tokenizer: Tokenizer, special: dict[str, str], add_bos: bool, add_eos: bool
) -> processors.TemplateProcessing:
    """A post-processor that adds the BOS and EOS tokens."""
    added = (["bos"] if add_bos else []) + (["eos"] if add_eos else [])
    missing = [name for name in added if name not in special]
    if missing:
        raise BarberError(f"metadata field tokenizer.ggml.{missing[0]}_token_id is missing; convert the model again")
    before, after = [special["bos"]] if add_bos else [], [special["eos"]] if add_eos else []
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
        special_tokens=[(special[name], tokenizer.token_to_id(special[name])) for name in added],
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
