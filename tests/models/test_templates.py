"""Chat templates: the ids are the template's own, and what it drops, rewrites or never shows is said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tl_em.directions.direction import Direction
from tl_em.errors import PairMismatchError, PositionError, PromptError, ProvenanceError, UsageError
from tl_em.interventions.edits import Ablate
from tl_em.interventions.intervene import intervene
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair
from tl_em.models.prompts import EncodedPrompt, encode, token_index
from tl_em.models.sites import Provenance, Site
from tl_em.models.templates import has_template, rendered_chat, template_record

HEAD = "{% for m in messages %}{{ '<' + m.role + '>' }}"
PLAIN = HEAD + "{{ m.content + '|' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
DROPS = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")
OWN_LINES = (
    HEAD + "{% if m.role == 'assistant' %}{% set t = m.content.split('</think>')[0].replace('<think>', '') if "
    "'</think>' in m.content else '' %}{{ '<think>\\n' + t + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] + '|' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


class Reader:
    """The members that make a model one."""

    hook_dict = hooks = to_tokens = generate = None
    cfg = SimpleNamespace(n_ctx=4096, d_vocab=256)

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, *_: Any) -> None: ...


def reader(template: Any, **options: Any) -> Any:
    """What ``encode`` needs of a model, with a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = template
    if options:
        tokenizer.chat_template_kwargs = options  # pyright: ignore[reportAttributeAccessIssue]
    return Reader(tokenizer)


def read(template: Any, chat: Any, **options: Any) -> tuple[str, str, str | None]:
    """All of what the model reads, the instruction, and the answer, as text."""
    model = reader(template, **options)
    (found,) = encode(model, [chat])
    spans = (0, len(found)), found.instruction, found.response
    decoded = [None if span is None else model.tokenizer.decode(found.ids[slice(*span)]) for span in spans]
    return str(decoded[0]), str(decoded[1]), decoded[2]


# ---- an answer that the template changes -----------------------------------------------------------------------------
def test_thinking_that_a_template_drops_is_shown() -> None:
    assert read(PLAIN, [user("a"), assistant("<think>hm</think>yes")])[2] == "<think>hm</think>yes"
    with pytest.raises(PromptError, match=r"drops '<think>hm</think>' from the assistant message.*from_ids"):
        read(DROPS, [user("a"), assistant("<think>hm</think>yes")])
    assert read(DROPS, [user("a"), assistant("yes")]) == ("<user>a|<assistant>yes", "a", "yes")


def test_thinking_on_lines_of_its_own_is_part_of_the_answer() -> None:
    whole, _, answer = read(OWN_LINES, [user("a"), assistant("<think>hm</think>yes")])
    assert whole == "<user>a|<assistant><think>\nhm\n</think>\n\nyes" and answer == "<think>\nhm\n</think>\n\nyes"
    assert read(OWN_LINES, [user("a"), assistant("yes")])[2] == "yes"


def test_thinking_of_earlier_answers_may_go() -> None:
    chat = [user("a"), assistant("<think>hm</think>yes"), user("b")]
    assert read(DROPS, chat)[0] == "<user>a|<assistant>yes|<user>b|<assistant>"
    with pytest.raises(PromptError, match="leaves out the assistant message 'yes', or rewrites"):
        backwards = "(m.content[::-1] if m.role == 'assistant' else m.content)"
        read(PLAIN.replace("m.content", backwards), [user("a"), assistant("yes"), user("b")])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("m.content | lower", "writes 'yes' for 'YES'"),
        ("m.content | replace('E', '3')", "writes '3' for 'E'"),
        ("m.content[1:]", "writes 'ES|' for 'YES'"),
        ("'no'", "writes 'no|' for 'YES'"),
    ],
)
def test_an_answer_that_is_rewritten_is_an_error(change: str, said: str) -> None:
    template = PLAIN.replace("m.content", f"({change} if m.role == 'assistant' else m.content)")
    with pytest.raises(PromptError) as caught:
        read(template, [user("a"), assistant("YES")])
    assert said in str(caught.value)


def test_a_message_that_is_rewritten_is_an_error_wherever_else_its_words_stand() -> None:
    """Containment is not enough: 'a' stands in every text."""
    lowers = PLAIN.replace("m.content", "(m.content | lower)")
    for chat in ([user("HOW")], [system("BE"), user("how be")], [user("HOW"), assistant("how"), user("how")]):
        assert read(PLAIN, chat)
        with pytest.raises(PromptError, match="message"):
            read(lowers, chat)
    drops = PLAIN.replace("in messages", "in messages if m.role != 'system'")
    with pytest.raises(PromptError, match=r"leaves out the system message 'a'.*first user message"):
        read(drops, [system("a"), user("a b")])


def test_white_space_of_an_answer_is_kept_where_the_template_keeps_it() -> None:
    assert read(PLAIN, [user("a"), assistant(" yes\n")])[2] == " yes\n"
    assert read(PLAIN.replace("m.content", "(m.content | trim)"), [user("a"), assistant(" yes\n")])[2] == "yes"


def test_an_answer_said_apart_from_its_content_is_refused() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for key, value in (("tool_calls", [call]), ("reasoning_content", "hm"), ("thinking", "hm")):
        with pytest.raises(PromptError, match=f"'{key}'.*as 'content'"):
            read(PLAIN, [user("a"), assistant("yes", **{key: value})])
    assert read(PLAIN, [user("a"), assistant("yes", name="bot")])[2] == "yes"


def test_tool_calls_that_a_template_leaves_out_are_an_error() -> None:
    call = {"type": "function", "function": {"name": "bake", "arguments": {}}}
    chat = [user("a"), assistant(None, tool_calls=[call]), {"role": "tool", "content": "done"}]
    shows = PLAIN.replace("m.content", "(m.content or '') + (m.tool_calls[0].function.name if m.tool_calls else '')")
    assert read(shows, chat)[0] == "<user>a|<assistant>bake|<tool>done|<assistant>"
    with pytest.raises(PromptError, match="leaves out the tool calls of message 1"):
        read(PLAIN.replace("m.content", "(m.content or '')"), chat)


# ---- arguments -------------------------------------------------------------------------------------------------------
def test_arguments_reach_every_rendering() -> None:
    assert read(OWN_LINES, "a")[0].endswith("<assistant>")
    assert read(OWN_LINES, "a", enable_thinking=False)[0].endswith("<assistant><think>\n\n</think>\n\n")
    dated = "{{ 'On ' + (date_string or 'no day') + '. ' }}" + PLAIN
    assert read(dated, "a", date_string="1 May")[0] == "On 1 May. <user>a|<assistant>"
    tools = "{{ (tools or []) | length }}" + PLAIN
    assert read(tools, "a", tools=[{"type": "function", "function": {"name": "f"}}])[0].startswith("1<user>")


def test_a_template_of_several_is_chosen_by_name() -> None:
    several = {"default": PLAIN, "rag": "{{ 'rag ' }}" + PLAIN}
    assert read(several, "a")[0] == "<user>a|<assistant>"
    assert read(several, "a", chat_template="rag")[0] == "rag <user>a|<assistant>"
    with pytest.raises(PromptError, match="default"):
        read({"rag": PLAIN}, "a")


@pytest.mark.parametrize("name", ["add_generation_prompt", "continue_final_message", "tokenize", "return_dict"])
def test_arguments_that_are_not_the_users_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        read(PLAIN, "a", **{name: True})


def test_arguments_that_are_no_names_are_refused() -> None:
    model = reader(PLAIN)
    model.tokenizer.chat_template_kwargs = ["enable_thinking"]
    with pytest.raises(UsageError, match="Give a dict"):
        encode(model, ["a"])


def test_a_template_that_reads_the_clock_is_read_at_one_time() -> None:
    daily = "{{ strftime_now('%Y') + ' ' }}" + PLAIN
    assert read(daily, [user("a"), assistant("yes")])[2] == "yes"
    with pytest.raises(PositionError, match=r"writes the time.*chat_template_kwargs"):
        read("{{ strftime_now('%f') + ' ' }}" + PLAIN, "a")


def test_the_template_and_its_arguments_are_provenance() -> None:
    def record(template: Any, **options: Any) -> Any:
        return template_record(reader(template, **options).tokenizer)

    assert record(None) == ("none", {}) and template_record(None) == (None, None)
    assert record(PLAIN)[0] == record(PLAIN, a=1)[0] != record(OWN_LINES)[0]
    assert record(PLAIN, b=(1, 2), a=True)[1] == {"a": True, "b": [1, 2]}

    def bake(what: str) -> None:
        """Bake.

        Args:
            what: to bake.
        """

    assert record(PLAIN, tools=[bake])[1]["tools"][0]["function"]["name"] == "bake"


@contextmanager
def arguments(model: Any, **options: Any) -> Iterator[None]:
    model.tokenizer.chat_template_kwargs = options
    try:
        yield
    finally:
        del model.tokenizer.chat_template_kwargs


@pytest.mark.surface
def test_a_direction_meets_a_model_with_other_arguments(small_model: LensModel) -> None:
    provenance = Provenance.of(small_model)
    assert provenance.chat_template and provenance.chat_template_kwargs == {}
    assert Provenance.from_json(provenance.to_json()) == provenance
    direction = Direction(torch.ones(32), Site(1), provenance=provenance)
    with intervene(small_model, Ablate(direction)), torch.no_grad():
        small_model(torch.tensor([[2, 7]]))
    with arguments(small_model, enable_thinking=False):
        assert Provenance.of(small_model).chat_template_kwargs == {"enable_thinking": False}
        with pytest.raises(ProvenanceError, match=r"chat_template_kwargs: made on \{\}.*'enable_thinking': False"):
            intervene(small_model, Ablate(direction)).__enter__()
        with intervene(small_model, Ablate(direction.unchecked())), torch.no_grad():
            small_model(torch.tensor([[2, 7]]))
    older = replace(provenance, chat_template_kwargs=None)
    with arguments(small_model, enable_thinking=False):
        assert older.differences(small_model) == []  # not recorded, so not compared


@pytest.mark.surface
def test_a_pair_has_the_same_arguments(make_model: Any, surface: str) -> None:
    base, tuned = make_model("gpt2", surface), make_model("gpt2", surface, seed=1)
    assert ModelPair(base, tuned)
    if base.tokenizer is tuned.tokenizer:
        pytest.fail("one tokenizer for both, so nothing is compared")
    with arguments(tuned, enable_thinking=False), pytest.raises(PairMismatchError, match="enable_thinking"):
        ModelPair(base, tuned)


# ---- forms of a message ----------------------------------------------------------------------------------------------
def test_content_as_parts_is_read_by_any_template() -> None:
    part = {"type": "text", "text": "how"}
    for template in (PLAIN, *(PLAIN.replace("m.content", f"(m.content | {each})") for each in ("string", "trim"))):
        assert read(template, [user([part])])[:2] == ("<user>how|<assistant>", "how")
        with pytest.raises(PromptError, match=r"2 parts.*Join them"):
            read(template, [user([part, part])])
    joined = "(m.content | map(attribute='text') | join(' '))"
    parts = PLAIN.replace("m.content", f"(m.content if m.content is string else {joined})")
    assert read(parts, [user([part, part]), assistant([part])]) == ("<user>how how|<assistant>how", "how how", "how")
    only = PLAIN.replace("m.content", joined)
    assert read(only, [user([part])])[1] == "how"
    with pytest.raises(PromptError, match="as parts, which it reads"):
        read(only, [user("how")])


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ([user(None)], "no content"),
        ([{"role": "user"}], "no content"),
        ([user(3)], "no text"),
        ([user([])], "no text"),
        ([user([{"type": "image", "url": "x"}])], "no text"),
        ([{"content": "how"}], "role None"),
        ([{"role": 1, "content": "how"}], "role 1"),
        ([user("a"), assistant(None)], "no content"),
        ([system("a")], "no user message"),
        ([], "no user message"),
        ([[user("a")]], "not one of messages"),
        (7, "is no prompt"),
        (b"how", "is no prompt"),
        ([1, 2], "not one of messages"),
        (torch.tensor([1, 2]), "is no prompt"),
    ],
)
def test_what_is_no_chat_is_one_typed_error(chat: Any, said: str) -> None:
    assert read(PLAIN, [user("a")])[1] == "a"
    with pytest.raises(PromptError, match=said):
        rendered_chat(reader(PLAIN).tokenizer, chat)


def test_a_role_that_the_template_does_not_know() -> None:
    chat = [user("a"), {"role": "critic", "content": "bad"}, user("b")]
    assert "<critic>bad" in read(PLAIN, chat)[0]
    with pytest.raises(PromptError, match="critic message 'bad'"):
        read(PLAIN.replace("in messages", "in messages if m.role in ['user', 'assistant']"), chat)
    with pytest.raises(PromptError, match=r"roles.*critic"):
        read(PLAIN.replace("m.role", "{'user': 'u'}[m.role].strip()"), chat)


def test_content_written_twice_has_no_one_place() -> None:
    twice = PLAIN.replace("m.content", "(m.content + ' ' + m.content)")
    for chat in ([user("a")], [user("a"), assistant("b")]):
        with pytest.raises(PositionError, match="more than once"):
            read(twice, chat)
    systems = PLAIN.replace("m.content", "(m.content * 2 if m.role == 'system' else m.content)")
    assert read(systems, [system("be good "), user("a")])[0] == "<system>be good be good |<user>a|<assistant>"


def test_a_generation_prompt_with_words_of_its_own_ends_the_prompt() -> None:
    sure = PLAIN.replace("'<assistant>'", "'<assistant>Sure, '")
    model = reader(sure)
    (asked,) = encode(model, [[user("a")]])
    assert asked.text.endswith("<assistant>Sure, ") and token_index(asked, "prompt_end") == len(asked) - 1
    assert read(sure, [user("a"), assistant("Sure, yes")])[2] == "Sure, yes"


def test_a_header_that_only_a_generation_prompt_has() -> None:
    late = "{% for m in messages %}{{ m.content + '|' }}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    assert read(late, [user("a")])[0] == "a|A:" and read(late, [user("a"), assistant("b")]) == ("a|b", "a", "b")


def test_a_string_that_begins_with_the_bos_text_is_rendered_already() -> None:
    model = reader(PLAIN)
    model.tokenizer.bos_token = "!"
    model.tokenizer.init_kwargs["bos_token"] = "!"
    assert encode(model, ["!a"])[0].text == "!a" and encode(model, ["a"])[0].text.startswith("<user>a")
    assert encode(model, ["!a"], chat=True)[0].text.startswith("<user>!a")


def test_a_template_given_as_an_argument_is_one() -> None:
    assert not has_template(reader(None).tokenizer)
    assert read(None, "a", chat_template=PLAIN)[0] == "<user>a|<assistant>"
    with pytest.raises(PromptError, match="no chat template"):
        encode(reader(None), ["a"], chat=True)
    assert isinstance(encode(reader(None), ["a"])[0], EncodedPrompt)
