"""Tokenizers built from GGUF metadata, against the libraries that made the vocabularies."""

import io
import json
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from barber_jax.console.errors import BarberError
from barber_jax.convert import gguf_tokenizer
from barber_jax.convert.gguf_tokenizer import build_tokenizer
from barber_jax.convert.tokenizer_files import save_tokenizer

CORPUS = [
    "The barber cut 1234 hairs in 2019, and the hairs weren't his; they're everyone's.\n",
    "Numbers such as 3.14159 or 10,000 meet words:  two  spaces,\ttabs\r\n\n\nand new lines.\n",
    "Café déjà vu, naïve façade, 北京 and Ωmega stand beside plain letters and the other words.\n",
] * 4
TEXTS = [
    *CORPUS[:3],
    " leading and trailing ",
    "DON'T don't We'LL x2y3 007 ½ ² 42km",
    "cafe\u0301 de\u0301ja\u0300",
    "  \n\n  a\n b\t\t c  ",
    "emoji 🙂 and ünknown Ж",
    "",
]


def trained(pre_tokenizer):
    """Vocabulary in the order of its ids and merges of a byte-level BPE trained on CORPUS."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>", "<|start|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(pair) for pair in model["merges"]]


def fields_of(tokens, merges, pre, **more):
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.token_type": np.array([3, 3] + [1] * (len(tokens) - 2)),
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def smollm_words():
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def smollm_oracle(tokens, merges):
    tokenizer = Tokenizer(BPE(vocab=ids_of(tokens), merges=merges))
    tokenizer.pre_tokenizer = smollm_words()
    return lambda text: tokenizer.encode(text).ids


def gpt2_oracle(tokens, merges):
    tokenizer = GPT2Tokenizer(vocab=ids_of(tokens), merges=merges, unk_token="<|end|>")
    return lambda text: tokenizer(text)["input_ids"]


def qwen2_oracle(tokens, merges):
    tokenizer = Qwen2Tokenizer(vocab=ids_of(tokens), merges=merges, unk_token="<|end|>", pad_token="<|end|>")
    return lambda text: tokenizer(text)["input_ids"]


def llama3_oracle(tokens, merges):
    """Llama 3's converter takes its pattern from TikTokenConverter, and its start token is always there."""
    tokenizer = Tokenizer(BPE(vocab=ids_of(tokens), merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(TikTokenConverter().pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return lambda text: [1, *tokenizer.encode(text).ids]


def ids_of(tokens):
    return {token: index for index, token in enumerate(tokens)}


@pytest.mark.parametrize(
    ("pre", "oracle"),
    [("smollm", smollm_oracle), ("gpt-2", gpt2_oracle), ("qwen2", qwen2_oracle), ("llama-bpe", llama3_oracle)],
)
def test_byte_level_ids(pre, oracle):
    tokens, merges = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    built, expected = build_tokenizer(fields_of(tokens, merges, pre)), oracle(tokens, merges)
    for text in TEXTS:
        assert built(text)["input_ids"] == expected(text), text


def test_llama3_takes_a_whole_token_before_its_merges():
    """The llama 3 vocabulary has tokens that no order of merges reaches."""
    tokens, merges = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    fields = fields_of([*tokens, "zqx"], merges, "llama-bpe")
    assert build_tokenizer(fields)("zqx")["input_ids"] == [1, len(tokens)]
    assert len(build_tokenizer(fields | {"tokenizer.ggml.pre": "gpt-2"})("zqx")["input_ids"]) == 3


def test_smollm_text_comes_back():
    built = build_tokenizer(fields_of(*trained(smollm_words()), "smollm"))
    for text in TEXTS:
        assert built.decode(built(text)["input_ids"]) == text


def test_control_and_user_defined_tokens_stay_whole():
    tokens, merges = trained(smollm_words())
    fields = fields_of([*tokens, "<think more>"], merges, "smollm")
    fields["tokenizer.ggml.token_type"][-1] = 4
    built = build_tokenizer(fields)
    ids = built("a<|start|>b<think more>c<|end|>")["input_ids"]
    assert [ids[1], ids[3], ids[5]] == [1, len(tokens), 0]
    assert built.decode(ids, skip_special_tokens=True) == "ab<think more>c"


@pytest.mark.parametrize(("start", "end"), [(False, False), (True, False), (False, True), (True, True)])
def test_start_and_end_tokens(start, end):
    fields = fields_of(*trained(smollm_words()), "smollm", add_bos_token=start, add_eos_token=end)
    built = build_tokenizer(fields)
    inner = built("two hairs", add_special_tokens=False)["input_ids"]
    assert built("two hairs")["input_ids"] == [1] * start + inner + [0] * end
    assert built("two hairs", "two hairs")["input_ids"] == ([1] * start + inner + [0] * end) * 2


def test_special_tokens_and_chat_template():
    fields = fields_of(*trained(smollm_words()), "smollm", padding_token_id=0, unknown_token_id=0)
    fields["tokenizer.chat_template"] = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
    built = build_tokenizer(fields)
    assert (built.bos_token, built.eos_token, built.pad_token, built.unk_token) == ("<|start|>", *["<|end|>"] * 3)
    chat = built.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|start|>hi<|end|>"


# --- SentencePiece


def sentencepiece_model(**settings):
    """A small SentencePiece BPE model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def pieces():
    """A SentencePiece BPE model with llama's settings."""
    return sentencepiece_model()


def sentencepiece_fields(pieces):
    size = range(pieces.get_piece_size())

    def kind(i):
        return 2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in size],
        "tokenizer.ggml.scores": np.array([pieces.get_score(i) for i in size], np.float32),
        "tokenizer.ggml.token_type": np.array([kind(i) for i in size], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_sentencepiece_ids_and_text(pieces):
    built = build_tokenizer(sentencepiece_fields(pieces))
    for text in TEXTS:
        ids = built(text)["input_ids"]
        assert ids == [1, *pieces.encode(text)], text
        assert built.decode(ids[1:]) == text


def test_sentencepiece_without_a_space_in_front(pieces):
    built = build_tokenizer(sentencepiece_fields(pieces) | {"tokenizer.ggml.add_space_prefix": False})
    ids = built("and the", add_special_tokens=False)["input_ids"]
    assert built.decode(ids) == "and the"
    assert not built.convert_ids_to_tokens(ids)[0].startswith("▁")


RUNS = ["▁▁", "▁▁▁", "\n", "\n\n", "\t\t", "<table>"]


@pytest.mark.parametrize("stored", ["▁▁", "  "], ids=["as_sentencepiece_has_them", "as_converted_from_tokenizer_json"])
def test_gemma_ids_and_text(stored, tmp_path):
    """Gemma's settings: nothing before the text, and runs of blanks that are pieces of the user's."""
    given = {
        "add_dummy_prefix": False,
        "user_defined_symbols": RUNS,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
    }
    pieces = sentencepiece_model(**given)
    fields = sentencepiece_fields(pieces)
    tokens = fields["tokenizer.ggml.tokens"]
    for run in RUNS:
        fields["tokenizer.ggml.token_type"][tokens.index(run)] = 4
    if stored == "  ":
        fields["tokenizer.ggml.tokens"] = [token.replace("▁", " ") if token in RUNS else token for token in tokens]
    ids = {"bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3, "padding_token_id": 0}
    more = {**ids, "add_space_prefix": False, "add_bos_token": True}
    built = build_tokenizer(fields | {f"tokenizer.ggml.{key}": value for key, value in more.items()})
    save_tokenizer(built, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "a   b\n\n\n<table>  x\t\t\t", "   "]:
        for tokenizer in (built, loaded):
            given = tokenizer(text)["input_ids"]
            assert given == [2, *pieces.encode(text)], text
            assert tokenizer.decode(given[1:]) == text
    assert built("</s>x<s>", add_special_tokens=False)["input_ids"][::2] == [1, 2]


# --- tokens and texts of any length


def scored_fields(tokens):
    """A vocabulary of llama's kind: an unknown token, then `tokens` in the order of their scores."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", *tokens],
        "tokenizer.ggml.scores": -np.arange(len(tokens) + 1.0),
        "tokenizer.ggml.token_type": np.array([2] + [1] * len(tokens)),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


def merges_of(tokens):
    return json.loads(build_tokenizer(scored_fields(tokens)).backend_tokenizer.to_str())["model"]["merges"]


def test_every_pair_of_tokens_that_makes_a_token_merges_in_the_order_of_scores():
    rng = np.random.default_rng(0)
    words = {"".join(rng.choice(list("ab"), rng.integers(2, 9))) for _ in range(80)}
    tokens = ["a", "b", *rng.permutation(sorted(words)).tolist()]
    pairs = [[w[:i], w[i:]] for w in tokens for i in range(1, len(w)) if w[:i] in tokens and w[i:] in tokens]
    assert merges_of(tokens) == pairs and len(pairs) > 50


@pytest.mark.parametrize("kind", ["sentencepiece", "smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_a_token_and_a_text_of_200_000_letters_take_no_time(kind):
    long = "z" * 200_000
    if kind == "sentencepiece":
        tokens = ["a", "b", "z", "ab", "abab", "zz"]
        assert merges_of([*tokens, long]) == merges_of(tokens)
        built = build_tokenizer(scored_fields([*tokens, long]))
    else:
        tokens, merges = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
        built = build_tokenizer(fields_of([*tokens, long], merges, kind))
    start = time.monotonic()
    for text in ("ab" * 100_000, "b" * 200_000):
        ids = built(text, add_special_tokens=False)["input_ids"]
        assert built.decode(ids) == text and 0 < len(ids) <= len(text)
    # About 0.2 s; work that grows with the square of the length takes minutes.
    assert time.monotonic() - start < 30


def test_too_many_long_tokens_are_refused(monkeypatch):
    tokens = ["a" * length for length in range(1, 60)]
    assert len(merges_of(tokens)) == sum(range(59))
    monkeypatch.setattr(gguf_tokenizer, "MAX_MERGE_WORK", 10_000)
    with pytest.raises(BarberError, match=r"tokenizer\.ggml\.tokens holds too many long tokens"):
        build_tokenizer(scored_fields(tokens))


# --- saving, torch, refusals


def test_saved_tokenizer_gives_the_same_ids(tmp_path, pieces):
    byte_level = fields_of(*trained(smollm_words()), "smollm", add_eos_token=True)
    for name, fields in {"byte": byte_level, "sentencepiece": sentencepiece_fields(pieces)}.items():
        built = build_tokenizer(fields)
        save_tokenizer(built, tmp_path / name)
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        assert [loaded(text)["input_ids"] for text in TEXTS] == [built(text)["input_ids"] for text in TEXTS]
        assert (loaded.bos_token_id, loaded.eos_token_id) == (built.bos_token_id, built.eos_token_id)
        # The class's name in transformers 5, TokenizersBackend, is unknown to transformers 4 and to other loaders.
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_torch_is_not_needed(tmp_path):
    script = """
        import sys
        sys.modules["torch"] = None
        import numpy as np
        import barber_jax.convert.gguf_file
        from barber_jax.convert.gguf_tokenizer import build_tokenizer
        from transformers import AutoTokenizer
        fields = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": ["a", "b", "ab"],
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.token_type": np.array([1, 1, 1]),
        }
        build_tokenizer(fields).save_pretrained(sys.argv[1])
        print(AutoTokenizer.from_pretrained(sys.argv[1])("aab")["input_ids"])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[0, 2]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "no tokenizer"),
        ({"model": "none"}, "no tokenizer"),
        ({"model": "bert"}, "'bert'"),
        ({"pre": "tekken"}, "'tekken'"),
        ({"pre": None}, "'default'"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["ab"]}, "not a pair"),
        ({"merges": ["zz yy"]}, "are inconsistent"),
        ({"tokens": ["a", "b", "a"]}, "twice"),
        ({"token_type": None}, "token_type must have one number"),
        ({"token_type": np.array([1])}, "token_type must have one number"),
        ({"bos_token_id": 9}, "bos token's id 9 is outside"),
        ({"add_bos_token": True}, "bos_token_id is missing"),
        ({"add_bos_token": 1.0}, "add_bos_token is not of type bool"),
        ({"model": "llama", "unknown_token_id": 0}, "outside|scores must have one number"),
    ],
)
def test_refusals(changes, message):
    fields = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": ["a", "b", "ab"],
        "merges": ["a b"],
        "token_type": np.array([1, 1, 1]),
    }
    given = {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items() if value is not None}
    with pytest.raises(BarberError, match=message):
        build_tokenizer(given)
