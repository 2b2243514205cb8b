"""Tokenizers of every kind: the ids are the tokenizer's own, one BOS at most, and people read whole characters."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tl_em.dictionaries import Dictionary
from tl_em.directions.direction import Direction
from tl_em.directions.lens import logit_lens
from tl_em.errors import PromptError, UnknownTokenError
from tl_em.features.cards import feature_cards
from tl_em.graph.build import attribute
from tl_em.models.generate import generate
from tl_em.models.loading import load_model
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.sites import Site
from tl_em.models.token_text import text_of_tokens, token_text, token_texts
from tl_em.models.tokenizing import plain_tokens
from tl_em.report.feature_pages import render

from ..conftest import benchmark, make_hf_model, make_tokenizer

SWEEP = benchmark("tokenization")
KINDS = SWEEP.KINDS

TEXT = "佛 says 😀é"


def byte_level() -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=257, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator(["佛 佛 佛"], trainer)  # some bytes of a character merge, not all
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_fallback() -> Any:
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁says", -1.0), *((f"<0x{i:02X}>", -9.0) for i in range(256))]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_pieces_of_a_character_are_joined_in_a_text_and_bytes_alone(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer(TEXT)["input_ids"]
    alone = [tokenizer.decode([i]) for i in ids]
    assert sum("\ufffd" in each for each in alone) >= 4, "nothing was split, so nothing is shown"
    texts, singles = token_texts(tokenizer, ids), [token_text(tokenizer, i) for i in ids]
    assert len(texts) == len(ids) and "".join(texts).strip() == TEXT and "😀" in texts
    assert "\ufffd" not in "".join(singles)
    shown = "".join(single for single, each in zip(singles, alone, strict=True) if "\ufffd" in each)
    assert bytes.fromhex("".join(c for c in shown if c not in "⟨⟩ ")) == "佛😀é".encode()
    assert text_of_tokens(tokenizer, ids).strip() == TEXT


def test_a_character_that_is_cut_off_shows_its_bytes() -> None:
    tokenizer = byte_level()
    ids = tokenizer("😀a")["input_ids"]
    assert [token_text(tokenizer, i) for i in ids] == ["⟨F0⟩", "⟨9F⟩", "⟨98⟩", "⟨80⟩", "a"]
    assert token_texts(tokenizer, ids[1:]) == ("⟨9F⟩", "⟨98⟩", "⟨80⟩", "a")
    assert text_of_tokens(tokenizer, ids[:2]) == "⟨F0⟩⟨9F⟩"
    merged = tokenizer("佛")["input_ids"]
    assert sorted(len(token_text(tokenizer, i)) for i in merged) == [4, 7], "a token of one byte, one of two"


def test_the_sign_of_replacement_itself_is_a_character() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a\ufffdb")["input_ids"]
    assert "".join(token_texts(tokenizer, ids)) == "a\ufffdb" == text_of_tokens(tokenizer, ids)
    assert [token_text(tokenizer, i) for i in ids] == ["a", "⟨EF⟩", "⟨BF⟩", "⟨BD⟩", "b"]


def test_words_are_shown_as_ever() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("the cat sat")["input_ids"]
    assert token_texts(tokenizer, ids) == ("the", "cat", "sat")
    assert text_of_tokens(tokenizer, ids) == "the cat sat" and text_of_tokens(None, [3, 4]) == "3 4"


# ---- special tokens --------------------------------------------------------------------------------------------------
def bytes_model(surface: str, *, bos: str | None = "<s>", eos: str | None = "</s>", beyond: int = 0) -> Any:
    """A small Llama with a tokenizer of bytes that puts its BOS token, where it has one, before a text."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({k: v for k, v in {"bos_token": bos, "eos_token": eos}.items() if v})
    backend = tokenizer.backend_tokenizer
    if bos:
        own = (bos, backend.token_to_id(bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[own])
    named = {k: v for k, v in {"bos_token": bos, "eos_token": eos}.items() if v}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    hf_model = make_hf_model("llama", vocab_size=len(tokenizer) - beyond, max_position_embeddings=512)
    return load_model(hf_model, surface=surface, tokenizer=tokenizer, in_place=True), tokenizer


@pytest.mark.surface
def test_a_text_that_begins_with_the_bos_text_gets_one(surface: str) -> None:
    model, own = bytes_model(surface)
    (bare,) = encode(model, ["Tell me"])
    for text in ("<s>Tell me", "Tell me"):
        (found,) = encode(model, [text])
        assert found.ids == bare.ids == (own.bos_token_id, *own("Tell me", add_special_tokens=False)["input_ids"])
        assert found.instruction == (1, len(found))
    assert own("<s>Tell me")["input_ids"].count(own.bos_token_id) == 2, "the tokenizer itself would double it"
    assert encode(model, [found])[0] is found  # encoded already: as it is
    graph = attribute(model, "<s>Tell", target=[int(found.ids[1])], rule="plain", against="zero", validate=False)
    assert graph.tokens.count("<s>") == 1 and graph.tokens[0] == "<s>"


@pytest.mark.surface
@pytest.mark.parametrize("eos", [None, "</s>"])
def test_no_bos_is_made_up(surface: str, eos: str | None) -> None:
    """TransformerLens gives the tokenizer one, as an id beyond the embedding or as its EOS token."""
    model, own = bytes_model(surface, bos=None, eos=eos)
    assert model.tokenizer.bos_token is not None and own.bos_token is None, "nothing was made up"
    (found,) = encode(model, ["Tell me"])
    assert list(found.ids) == own("Tell me")["input_ids"] and found.instruction == (0, len(found))
    assert isinstance(generate(model, ["Tell me"], max_new_tokens=2)[0], str)


@pytest.mark.surface
def test_a_token_without_an_embedding_is_named(surface: str) -> None:
    model, own = bytes_model(surface, bos=None, beyond=1)
    assert list(encode(model, ["Tell"])[0].ids) == own("Tell")["input_ids"]
    with pytest.raises(UnknownTokenError, match=r"'</s>'.*embeddings for 0 to"):
        encode(model, ["Tell</s>"])
    with pytest.raises(UnknownTokenError, match="embeddings for"):
        encode(model, [EncodedPrompt.from_ids([1, len(own) - 1])])


def test_a_bos_in_the_text_is_found_where_the_tokenizer_strips_white_space() -> None:
    found = {kind.split(";")[1]: KINDS[kind] for kind in ("bytes; white space stripped, BOS added", "bytes; BOS")}
    stripping, plain = (found[name].make() for name in (" white space stripped, BOS added", " BOS"))
    bos = stripping.bos_token_id
    read = [plain_tokens(each, ["\n <s>Tell"], prepend=True, d_vocab=999)[0].ids for each in (stripping, plain)]
    assert read[0].count(bos) == 1 and read[1].count(plain.bos_token_id) == 2  # there, white space comes first


def test_what_a_tokenizer_appends_is_left_out_and_what_it_puts_before_kept() -> None:
    tokenizer = KINDS["bytes; BOS and EOS added"].make()
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    (read,) = plain_tokens(tokenizer, ["a"], prepend=True, d_vocab=999)
    assert list(read.ids) == tokenizer("a")["input_ids"][:-1] and read.start == 1
    (written,) = plain_tokens(tokenizer, ["a</s>"], prepend=True, d_vocab=999)
    assert written.ids[-1] == tokenizer.eos_token_id, "one that the text itself holds stays"
    two = KINDS["bytes; two tokens before"].make()
    for text in ("a", "<sop>a", "[gMASK]<sop>a"):
        assert list(plain_tokens(two, [text], prepend=True, d_vocab=999)[0].ids) == two("a")["input_ids"]


@pytest.mark.surface
def test_the_tokenizers_own_prefix_outlives_transformer_lens(surface: str) -> None:
    """TransformerLens reloads the tokenizer, and the reload forgets all but its BOS token."""
    kind = KINDS["bytes; two tokens before"]
    model, own = SWEEP.make_model(kind, surface), kind.make()
    assert model.tokenizer("a")["input_ids"] != own("a")["input_ids"]
    assert list(encode(model, ["a"])[0].ids) == own("a")["input_ids"]


# ---- what a vocabulary cannot spell ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "known", "unknown", "said"),
    [
        ("words; UNK = EOS", "how </s> bake", "how zebra bake", "'zebra'"),
        ("words; no UNK", "how do", "how zebra", "zebra"),
        ("unigram; UNK not named", "how do", "how 佛 do", "'佛'"),
        ("unigram; UNK, BOS named", "how <unk> do", "how 佛 do", "'佛'"),
        ("pairs; no UNK, no bytes", "how do", "how 佛 do", "'佛'"),
        ("pairs; no UNK, no bytes", "how\x07 do", "how 😀 do", "'😀'"),
    ],
)
def test_words_that_a_tokenizer_loses_are_named(kind: str, known: str, unknown: str, said: str) -> None:
    tokenizer = KINDS[kind].make()
    assert plain_tokens(tokenizer, [known], prepend=True, d_vocab=9999)
    with pytest.raises(UnknownTokenError, match="vocabulary") as caught:
        plain_tokens(tokenizer, ["how do", unknown], prepend=True, d_vocab=9999)
    assert said in str(caught.value) or kind == "words; no UNK"


def test_half_a_character_is_a_typed_error() -> None:
    for kind in ("bytes; no special token", "slow; no special token"):
        with pytest.raises(PromptError, match=r"half a character \(U\+D83D"):
            plain_tokens(KINDS[kind].make(), ["a", "b \ud83d"], prepend=True, d_vocab=9999)


@pytest.mark.surface
def test_a_python_tokenizer_that_cannot_be_found_again(surface: str) -> None:
    kind = KINDS["slow; BOS named, EOS"]
    model = SWEEP.make_model(kind, surface)
    assert list(encode(model, ["a"])[0].ids) == [0, *kind.make()("a")["input_ids"]]


# ---- the sweep -------------------------------------------------------------------------------------------------------
SOME = ("bytes; BOS and EOS added", "unigram; byte fallback, BOS added")
TEMPLATES = ("none", "headers, BOS in front", "thinking on lines of its own", "answers shortened")


@pytest.mark.surface
def test_a_part_of_the_sweep(surface: str) -> None:
    cells = list(SWEEP.sweep(SOME, [surface], TEMPLATES))
    found = Counter(cell.outcome for cell in cells)
    assert not [cell for cell in cells if cell.outcome == "wrong"]
    assert found["equal"] > 200 and found["refused"] > 60


def test_the_sweep_sees_what_is_wrong() -> None:
    kind, own = KINDS["bytes; BOS added, EOS"], KINDS["bytes; BOS added, EOS"].make()
    own.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    right = EncodedPrompt.from_ids(own("how")["input_ids"])
    assert SWEEP.wrong_text(own, kind, "how", right) == ""
    assert SWEEP.wrong_text(own, kind, "how", EncodedPrompt.from_ids([0, *right.ids]))
    chat = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "yes"}]
    ids = own.apply_chat_template(chat, return_dict=False)
    answer = len(own("how|", add_special_tokens=False)["input_ids"])
    whole = EncodedPrompt(tuple(ids[:-1]), (0, 1), answer - 1, (answer, len(ids) - 1), "")
    assert SWEEP.wrong_chat(own, chat, {}, whole) == ""
    short = EncodedPrompt(tuple(ids[:-1]), (0, 1), answer, (answer + 1, len(ids) - 1), "")
    assert "the answer's tokens" in SWEEP.wrong_chat(own, chat, {}, short)
    own.chat_template = "{{ messages[0].content }}"
    unseen = EncodedPrompt.from_ids(own("how", add_special_tokens=False)["input_ids"])
    assert "does not see" in SWEEP.wrong_chat(own, chat, {}, unseen)


# ---- for people ------------------------------------------------------------------------------------------------------
def test_graphs_cards_and_lenses_show_no_replacement_character() -> None:
    model, own = bytes_model("bridge")
    ids = own("佛😀")["input_ids"]
    assert any("\ufffd" in own.decode([i]) for i in ids)
    graph = attribute(model, "佛😀", target=[ids[1]], rule="plain", against="zero", validate=False)
    labels = [node.label or "" for node in graph.nodes] + list(graph.tokens)
    assert "\ufffd" not in "".join(labels) and any(label.startswith("⟨E4") for label in labels)
    eye = torch.eye(32)
    sae = Dictionary(eye, torch.zeros(32), eye, torch.zeros(32), activation="relu", site_in=Site(1))
    cards = feature_cards(model, sae, [3, 4], ["佛😀 a"], k=1)
    (text,) = cards.texts.values()
    assert "".join(text.tokens).endswith("佛😀 a") and len(text.tokens) == len(text.activations)
    assert "\ufffd" not in render(cards) and "佛" in render(cards)
    frame = logit_lens(model, Direction(torch.ones(32), Site(1)), k=40, controls=3)
    assert "\ufffd" not in "".join(frame.token) and any("⟨" in token for token in frame.token)
