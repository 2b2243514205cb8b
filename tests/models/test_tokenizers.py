"""Tokenizers of every kind: the ids are the tokenizer's own, one BOS at most, and people read whole characters."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tl_em.models.pieces import text_of_tokens, token_text, token_texts

from ..conftest import make_tokenizer

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
