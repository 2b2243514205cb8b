"""Streams of documents as windows: nothing lost, nothing made up, nothing held, and found again from any place."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch

from tl_em.dictionaries.documents import Documents
from tl_em.errors import CorruptFileError, FileError, PositionError, PromptError, UnknownTokenError, UsageError
from tl_em.models.prompts import EncodedPrompt, document_tokens, encode

TEXTS = ["the cat sat", "a dog ran in the bank and"[:9], "big red fish", "yes"] + ["the king saw a small bird"] * 3
BOS = 2


@pytest.fixture(params=[True, False], ids=["bos", "no bos"])
def model(request, make_model):
    return make_model("llama", "bridge", template=None, bos=request.param)


def windows(documents: Documents, n: int) -> list[tuple[tuple[int, ...], list[bool]]]:
    found = []
    for part in islice(documents.parts(), n):
        kept = part.kept.view(len(part.encoded), -1).tolist()
        found += [(each.ids, inside) for each, inside in zip(part.encoded, kept, strict=True)]
    return found


def test_windows_hold_every_token_of_every_document_in_order_and_bos_before_each(model):
    context, bos = 8, (model.tokenizer.bos_token_id,) if model.tokenizer.bos_token_id is not None else ()
    before, ids = document_tokens(model, TEXTS)
    assert before == (bos if BOS in bos else ())
    content = [token for each in ids for token in each]
    found = windows(Documents(model, (text for text in [*TEXTS] * 3), context, 1), 5)
    assert {len(ids) for ids, _ in found} == {context}
    flat = [token for ids, _ in found for token in ids if token not in before]
    assert flat == (content * 3)[: len(flat)] and len(flat) > context
    for ids, kept in found:
        assert not kept[0] and ids[: len(before)] == before
        assert all(not inside for token, inside in zip(ids, kept, strict=True) if token in before)
        assert sum(kept) == sum(token not in before for token in ids[1:])
    if before:  # as the tokenizer itself begins each text
        assert found[0][0][:4] == encode(model, [TEXTS[0]])[0].ids
        assert sum(ids.count(BOS) for ids, _ in found) > len(found)


@pytest.mark.parametrize("most", [1, 20])
def test_parts_begin_again_at_any_place(model, most):
    def documents() -> Documents:
        return Documents(model, lambda: iter(TEXTS), 7, most)

    parts = list(islice(documents().parts(), 8))
    assert parts[-1].place["place"][0] >= 1  # a second pass
    for i, part in enumerate(parts):
        for expected, found in zip(parts[i:], documents().parts(part.place), strict=False):
            assert found.place == expected.place and found.encoded == expected.encoded
            assert torch.equal(found.kept, expected.kept)


def test_what_fits_into_a_part_is_all_of_every_part(model):
    one, two = islice(Documents(model, iter(TEXTS), 7, 1000).parts(), 2)
    assert one.whole and two.whole and one.encoded == two.encoded
    assert (one.place["part"], two.place["part"]) == (0, 1)


def test_no_more_is_read_than_is_needed(model):
    read = 0

    def texts():
        nonlocal read
        while True:
            read += 1
            yield "the cat sat in the bank" if read % 2 else {"text": "a dog"}

    parts = Documents(model, texts(), 8, 50).parts()
    for i in range(1, 40):
        part = next(parts)
        assert int(part.kept.sum()) < 50 + 8
        assert read <= 64 * (2 + i * 58 // (64 * 3))


def test_a_document_longer_than_the_context_goes_on_in_the_next_window(model):
    long = "the cat sat in a bank and " * 20
    _, (ids,) = document_tokens(model, [long])
    assert len(ids) > model.cfg.n_ctx
    found = windows(Documents(model, iter([long, long]), 16, 1), 6)
    assert [token for window, _ in found for token in window if token != BOS] == list(ids[: 6 * 16])[
        : sum(token != BOS for window, _ in found for token in window)
    ]


def test_chats_and_tokens_are_documents_too(make_model):
    model = make_model("llama", "bridge")
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    text = encode(model, [chat])[0].ids
    rows = [{"messages": chat}, chat, EncodedPrompt.from_ids(text)]
    before, ids = document_tokens(model, [chat])
    assert before == (BOS,) and ids == [text[1:]]
    found = windows(Documents(model, iter(rows * 4), len(text), 1), 5)
    assert {ids for ids, _ in found} == {text}


def test_files_are_read_line_by_line(model, tmp_path):
    txt, jsonl = tmp_path / "a.txt", tmp_path / "a.jsonl"
    txt.write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    jsonl.write_text("\n".join(json.dumps({"text": each}) for each in TEXTS), encoding="utf-8")
    expected = windows(Documents(model, lambda: TEXTS, 7, 1), 6)
    assert windows(Documents(model, str(txt), 7, 1), 6) == windows(Documents(model, jsonl, 7, 1), 6) == expected


def test_what_gives_no_documents_is_refused(model, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "the cat"}\n{"text": \n', encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(b"\x1f\x8b1234")
    (tmp_path / "b.txt").write_bytes(b"\x1f\x8b1234")
    for corpus, error, said in (
        ("a text in place of a list.", UsageError, "a string, and so a path"),
        (tmp_path / "none.txt", FileError, "cannot be read"),
        (bad, CorruptFileError, "line 2"),
        (tmp_path / "a.txt.gz", UsageError, "jsonl"),
        (tmp_path / "b.txt", CorruptFileError, "gzip"),
        (3, UsageError, "gives no documents"),
        ({"text": "the cat"}, UsageError, "gives no documents"),
        (iter([]), UsageError, "no document"),
        (iter(["", " "]), UsageError, "no document"),
        (iter([5]), PromptError, "document 0"),
        (iter([{"prompt": "the"}]), PromptError, "neither 'text' nor 'messages'"),
        (iter(["the cat"]), UsageError, "fewer than context=7"),
        (lambda: iter(["the"]), UsageError, "fewer than context=7"),
        (iter(["the cat zebra"] * 9), UnknownTokenError, "zebra"),
    ):
        with pytest.raises(error, match=said):
            list(islice(Documents(model, corpus, 7, 1).parts(), 3))
    with pytest.raises(PositionError, match="as a list"):
        Documents(model, iter(TEXTS), 7, 1, "prompt_end")
    with pytest.raises(UsageError, match="n_ctx = 64"):
        Documents(model, iter(TEXTS), 65, 1)


def test_an_iterator_that_ends_says_what_begins_anew(model):
    with pytest.raises(UsageError, match=r"a path, a list, a function .* or fewer steps="):
        list(Documents(model, iter(TEXTS), 7, 8).parts())


def test_another_corpus_than_before_is_refused_at_the_place(model):
    *_, last = islice(Documents(model, lambda: TEXTS, 7, 1).parts(), 4)
    assert last.place["place"][1] > 1
    changed = [TEXTS[0], "yes", *TEXTS[2:]]
    for texts in (changed, TEXTS[:1]):
        with pytest.raises(UsageError, match="documents of the corpus are not those"):
            next(Documents(model, lambda texts=texts: texts, 7, 1).parts(last.place))
