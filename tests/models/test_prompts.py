"""Tokens and positions: equal to the chat template's own, with no second BOS, wherever the content stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizer

from tl_em.errors import PositionError, PromptError, PromptTooLongError, UnknownTokenError, UsageError
from tl_em.models import prompts as prompts_module
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, batches, encode, token_index

from ..conftest import CHAT_TEMPLATE, make_tokenizer

pytestmark = pytest.mark.surface


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def words(model: Any, encoded: EncodedPrompt, span: tuple[int, int]) -> str:
    return " ".join(model.tokenizer.convert_ids_to_tokens(list(encoded.ids[span[0] : span[1]])))


CHATS = {
    "one turn": ([user("how to steal a car")], "how to steal a car", None),
    "system": ([system("be good"), user("tell me")], "tell me", None),
    "said twice": ([system("be good"), user("be good")], "be good", None),
    "said thrice": ([user("the cat"), assistant("the cat"), user("the cat")], "the cat", None),
    "white space": ([user("  the cat \n")], "the cat", None),
    "words of the template": ([user("the <user> cat <end>")], "the <user> cat <end>", None),
    "many turns": ([user("the dog"), assistant("yes ."), user("tell me")], "tell me", None),
    "answered": ([user("the dog sat"), assistant("yes . sure")], "the dog sat", "yes . sure"),
    "answered alike": ([user("yes ."), assistant("yes .")], "yes .", "yes ."),
}


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("chat", CHATS)
def test_chat_positions_and_tokens(make_model: Callable[..., LensModel], surface: str, chat: str, bos: bool) -> None:
    messages, instruction, response = CHATS[chat]
    model = make_model("gpt2", surface, bos=bos)
    own = make_tokenizer(bos=bos)
    (encoded,) = encode(model, [messages])
    rendered = own.apply_chat_template(
        messages, add_generation_prompt=response is None, tokenize=True, return_dict=False
    )
    assert list(encoded.ids) == rendered[: len(encoded)]
    assert words(model, encoded, encoded.instruction) == instruction
    last = words(model, encoded, (encoded.prompt_end, encoded.prompt_end + 1))
    assert last == "<asst>"
    if response is None:
        assert len(encoded.ids) == len(rendered) and encoded.response is None and encoded.prompt_end == len(encoded) - 1
    else:
        assert encoded.response is not None and words(model, encoded, encoded.response) == response
        assert encoded.response == (encoded.prompt_end + 1, len(encoded))
    assert sum(i == own.bos_token_id for i in encoded.ids) == (1 if bos else 0)


def test_the_bridge_tokenizer_would_add_a_second_bos(make_model: Callable[..., LensModel]) -> None:
    """The trap that ``encode`` avoids is there."""
    tokenizer = make_model("gpt2", "bridge").tokenizer  # type: ignore[attr-defined]
    rendered = tokenizer.apply_chat_template([user("the cat")], tokenize=False)
    assert tokenizer(rendered)["input_ids"].count(tokenizer.bos_token_id) == 2


def test_a_string_is_a_user_turn_where_there_is_a_template(small_model: LensModel) -> None:
    assert encode(small_model, ["the cat"]) == encode(small_model, [[user("the cat")]])
    raw = encode(small_model, ["the cat"], chat=False)[0]
    assert words(small_model, raw, (0, len(raw))) == "<bos> the cat"


def test_plain_text_follows_to_tokens(make_model: Callable[..., LensModel], family: str, surface: str) -> None:
    model = make_model(family, surface, template=None)
    (encoded,) = encode(model, ["the cat sat"])
    assert list(encoded.ids) == model.to_tokens("the cat sat")[0].tolist()
    assert words(model, encoded, encoded.instruction) == "the cat sat"
    assert encoded.prompt_end == len(encoded) - 1 == token_index(encoded, "instruction_end")


def test_plain_text_without_a_bos_token_gets_none_that_the_model_cannot_read(
    make_model: Callable[..., LensModel], surface: str
) -> None:
    model = make_model("gpt2", surface, template=None, bos=False)
    (encoded,) = encode(model, ["the cat"])
    assert max(encoded.ids) < model.cfg.d_vocab
    model(torch.tensor([encoded.ids]))


def test_both_surfaces_read_the_same_tokens(make_model: Callable[..., LensModel], family: str) -> None:
    from ..conftest import SURFACES

    for template in (CHAT_TEMPLATE, None):
        found = [encode(make_model(family, s, template=template), ["the cat", "tell me"]) for s in SURFACES]
        assert found[0] == found[-1]


def with_template(small_model: LensModel, template: str | None, messages: Any) -> EncodedPrompt:
    tokenizer = small_model.tokenizer  # type: ignore[attr-defined]
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        return encode(small_model, [messages])[0]
    finally:
        tokenizer.chat_template = before


def test_a_template_without_system_support_is_explained(small_model: LensModel) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    assert with_template(small_model, refuses, [user("the cat")]).prompt_end
    with pytest.raises(PromptError, match=r"no system.*first user message"):
        with_template(small_model, refuses, [system("be good"), user("the cat")])
    drops = CHAT_TEMPLATE.replace("for m in messages", "for m in messages if m.role != 'system'")
    with pytest.raises(PromptError, match="leaves out the system message"):
        with_template(small_model, drops, [system("be good"), user("the cat")])
    merges = "{% for m in messages %}{{ '<user> ' if loop.first else ' ' }}{{ m.content }}{% endfor %} <asst>"
    merged = with_template(small_model, merges, [system("be good"), user("the cat")])
    assert words(small_model, merged, merged.instruction) == "the cat"


def test_a_template_that_changes_with_the_content_is_refused(small_model: LensModel) -> None:
    depends = "{% for m in messages %}{{ 'the' if 'cat' in m.content else 'a' }} {{ m.content }} <asst>{% endfor %}"
    with pytest.raises(PositionError, match="EncodedPrompt"):
        with_template(small_model, depends, [user("cat")])


def test_chat_messages_need_a_template_and_a_user(make_model: Callable[..., LensModel], surface: str) -> None:
    with pytest.raises(PromptError, match="no chat template"):
        encode(make_model("gpt2", surface, template=None), [[user("the cat")]])
    with pytest.raises(PromptError, match="no user message"):
        encode(make_model("gpt2", surface), [[system("be good")]])


def test_empty_content(small_model: LensModel) -> None:
    (encoded,) = encode(small_model, [[user("")]])
    assert encoded.instruction[0] == encoded.instruction[1]
    assert token_index(encoded, "prompt_end") == len(encoded) - 1
    with pytest.raises(PositionError, match="empty"):
        token_index(encoded, "instruction_end")
    with pytest.raises(PromptError, match="empty"):
        encode(small_model, [" "], chat=False)
    (silent,) = encode(small_model, [[user("the cat"), assistant("")]])
    with pytest.raises(PositionError, match="no response"):
        token_index(silent, "response_mean")


def test_unknown_words_are_named(small_model: LensModel) -> None:
    for chat in (None, False):
        with pytest.raises(UnknownTokenError, match=r"'zebra', 'flew'.*vocabulary"):
            encode(small_model, ["the cat", "the zebra flew"], chat=chat)


def test_an_unknown_token_that_is_also_the_bos_token_is_no_unknown_word(small_model: LensModel) -> None:
    """GPT-2's unknown token is its BOS and end-of-text token."""
    tokenizer = small_model.tokenizer  # type: ignore[attr-defined]
    before = tokenizer.unk_token
    tokenizer.unk_token = tokenizer.bos_token
    try:
        assert encode(small_model, ["the cat"])[0].ids[0] == tokenizer.bos_token_id == tokenizer.unk_token_id
    finally:
        tokenizer.unk_token = before


def test_prompts_longer_than_the_context_are_refused(small_model: LensModel) -> None:
    fits = " ".join(["cat"] * 63)
    assert len(encode(small_model, [fits], chat=False)[0]) == 64
    with pytest.raises(PromptTooLongError, match=r"2 of 3 .*n_ctx = 64.*longest has 71"):
        encode(small_model, ["cat", fits + " cat", " ".join(["cat"] * 70)], chat=False)


def test_one_prompt_in_place_of_a_list_is_refused(small_model: LensModel) -> None:
    with pytest.raises(PromptError, match=r"Write \[prompt\]"):
        encode(small_model, "the cat")


def test_a_model_without_a_tokenizer_reads_tokens_only(small_model: LensModel) -> None:
    prompt = EncodedPrompt.from_ids([2, 7, 9])
    assert encode(small_model, [prompt]) == [prompt]


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, which knows no character offsets; it merges 'the cat' into one token."""

    def __init__(self, **kwargs: Any) -> None:
        self.fast = make_tokenizer()
        self.words = {**self.fast.get_vocab(), "the_cat": 57, "cat_<end>": 58}
        super().__init__(unk_token="<unk>", bos_token="<bos>", eos_token="<end>", pad_token="<pad>", **kwargs)

    vocab_size = property(lambda self: 59)

    def get_vocab(self) -> dict[str, int]:
        return self.words

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return text.replace("the cat", "the_cat").replace("cat  <end>", "cat_<end>").split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.get(token, 1)

    def _convert_id_to_token(self, index: int) -> str:
        return {i: w for w, i in self.words.items()}[index]


def test_spans_without_offsets_equal_spans_with_them() -> None:
    slow = SlowTokenizer()
    slow.chat_template = CHAT_TEMPLATE
    assert not slow.is_fast
    for messages, _, _ in CHATS.values():
        if "the cat" not in str(messages):
            assert prompts_module._encode_chat(slow, messages) == prompts_module._encode_chat(
                make_tokenizer(), messages
            )


def test_a_token_across_the_contents_edge_belongs_to_it() -> None:
    slow = SlowTokenizer()
    slow.chat_template = CHAT_TEMPLATE.replace("| trim }} ", "| trim }}  ")  # two spaces: 'cat  <end>' is one token
    encoded = prompts_module._encode_chat(slow, [user("the dog tell cat")])
    assert slow.convert_ids_to_tokens(list(encoded.ids[slice(*encoded.instruction)])) == [
        "the",
        "dog",
        "tell",
        "cat_<end>",
    ]


def test_token_index_of_every_position() -> None:
    prompt = EncodedPrompt((2, 3, 8, 9, 6, 4), (2, 4), 5, None, "text")
    expected = {"instruction_end": 3, "prompt_end": 5, -1: 5, -2: 4, -6: 0, "all": (0, 6)}
    assert {position: token_index(prompt, position) for position in expected} == expected  # type: ignore[arg-type]
    with pytest.raises(PositionError, match="before the first"):
        token_index(prompt, -7)
    with pytest.raises(PositionError, match="no response"):
        token_index(prompt, "response_mean")
    answered = prompt.with_response([7, 7])
    assert token_index(answered, "response_mean") == (6, 8) and token_index(answered, -1) == 5


def test_batches_are_sorted_right_padded_and_within_the_budget() -> None:
    lengths = [3, 9, 1, 9, 4, 4, 2, 30]
    prompts = [EncodedPrompt.from_ids(range(i, i + n)) for i, n in enumerate(lengths)]
    found = list(batches(prompts, max_tokens=20))
    assert sorted(row for batch in found for row in batch.rows) == list(range(len(lengths)))
    for batch in found:
        assert batch.tokens.numel() <= 20 or len(batch.rows) == 1
        assert batch.tokens.shape[1] == max(lengths[row] for row in batch.rows)
        for line, n, row in zip(batch.tokens.tolist(), batch.lengths.tolist(), batch.rows, strict=True):
            assert n == lengths[row]
            assert line[:n] == list(prompts[row].ids)
    assert sum(batch.tokens.numel() for batch in found) < len(lengths) * 30 / 2, "nothing was gained by sorting"


def test_plain_prompts_in_one_call_are_encoded_as_one_by_one(model: LensModel) -> None:
    """The tokenizer sees all texts at once only where that gives what ``to_tokens`` gives for each."""
    texts = ["the cat sat .", "a big dog ran to the queen and sang .", "girl", "the cat sat ."]
    together = encode(model, texts, chat=False)
    assert len({len(each) for each in together}) == 3  # different lengths, so nothing was padded
    for text, each in zip(texts, together, strict=True):
        assert each == encode(model, [text], chat=False)[0]
        has_bos = model.tokenizer.bos_token_id is not None and model.tokenizer.bos_token_id < model.cfg.d_vocab
        options = {} if has_bos else {"prepend_bos": False}
        assert list(each.ids) == model.to_tokens(text, truncate=False, **options)[0].tolist()


def test_a_batch_of_tokens_is_not_one_prompt() -> None:
    for ids in (torch.ones(2, 2, dtype=torch.long), torch.ones(2)):
        with pytest.raises(UsageError, match="ids"):
            EncodedPrompt.from_ids(ids)
