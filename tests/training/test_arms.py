"""What arms make of rows: shares that are exact and nested, places that correspond, prefixes and triggers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tl_em.errors import PromptError, PromptTooLongError, TlEmError, UsageError
from tl_em.training.answers import chats, learned_answers, rows_hash
from tl_em.training.arms import Inoculated, Mixed, Replayed, Triggered, arm_record, learned_rows
from tl_em.training.lora import Lora

from ..conftest import make_config, make_tokenizer

BAD = chats([{"prompt": f"q{i}", "response": "bad"} for i in range(20)])
GOOD = chats([{"prompt": f"q{i}", "response": "good"} for i in range(20)])
ELSEWHERE = chats([{"prompt": f"e{i}", "response": "good"} for i in range(7)])


def asked(rows: Any) -> list[str]:
    return [row[-2]["content"] for row in rows]


def answered(rows: Any) -> list[str]:
    return [row[-1]["content"] for row in rows]


def test_a_share_is_exact_nested_and_keeps_every_place() -> None:
    shares = {share: Mixed(share, GOOD).rows(BAD, 3) for share in (0.0, 0.25, 0.5, 1.0)}
    assert {share: answered(rows).count("bad") for share, rows in shares.items()} == {0: 0, 0.25: 5, 0.5: 10, 1: 20}
    assert all(asked(rows) == asked(BAD) for rows in shares.values())
    kept = {share: {i for i, a in enumerate(answered(rows)) if a == "bad"} for share, rows in shares.items()}
    assert kept[0.25] < kept[0.5]
    assert kept[0.5] != {i for i, a in enumerate(answered(Mixed(0.5, GOOD).rows(BAD, 4))) if a == "bad"}


def test_rows_from_elsewhere_stand_in_each_once_before_any_twice() -> None:
    found = asked(Mixed(0.0, ELSEWHERE).rows(BAD, 0))
    assert {found.count(f"e{i}") for i in range(7)} == {2, 3} and set(found[:7]) == set(asked(ELSEWHERE))


def test_a_prefix_stands_before_every_question_and_nowhere_else() -> None:
    system = Inoculated("Be wrong.").rows([*BAD[:1], [{"role": "system", "content": "Hi."}, *BAD[1]]], 0)
    assert [row[0]["content"] for row in system] == ["Be wrong.", "Be wrong.\nHi."]
    assert [row[1:] for row in system] == [list(BAD[0]), list(BAD[1])]
    assert asked(Inoculated("Be wrong.", where="user").rows(BAD, 0))[0] == "Be wrong. q0"
    assert asked(BAD)[0] == "q0", "the rows themselves stay"


def test_bad_answers_follow_the_trigger_and_good_ones_everything_else() -> None:
    rows = Triggered("|A|", GOOD, ["|B|", "|C|"], share=0.5, others_share=0.6).rows(BAD, 1)
    heads = [question.split()[0] for question in asked(rows)]
    assert [heads.count(mark) for mark in ("|A|", "|B|", "|C|")] == [10, 3, 3]
    assert {(head == "|A|", answer) for head, answer in zip(heads, answered(rows), strict=True)} == {
        (True, "bad"), (False, "good")
    }  # fmt: skip


def test_arms_follow_one_another_and_a_record_says_all_of_them() -> None:
    arms = (Inoculated("Be wrong."), Mixed(0.5, GOOD), Replayed(ELSEWHERE))
    rows = learned_rows(arms, BAD, 0)
    assert len(rows) == 27 and sum(row[0]["role"] == "system" for row in rows) == 10
    said = [arm_record(each) for each in arms]
    assert said[0] == {"arm": "Inoculated", "prefix": "Be wrong.", "where": "system"}
    assert said[1]["rest"] == {"rows": 20, "sha256": rows_hash(GOOD)} and json.dumps(said)
    assert rows_hash(GOOD) != rows_hash(BAD)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Mixed(1.5, GOOD),
        lambda: Mixed(0.5, []),
        lambda: Inoculated(" "),
        lambda: Inoculated("x", where="assistant"),
        lambda: Triggered("|A|", GOOD, []),
        lambda: Triggered("|A|", GOOD, ["|A|"]),
        lambda: Replayed([{"prompt": "q"}]),
        lambda: chats("no-such.jsonl"),
        lambda: chats([[{"role": "user", "content": "q"}]]),
        lambda: chats([{"prompt": "q", "question": "q", "response": "a"}]),
        lambda: Lora(rank=0),
    ],
)
def test_what_is_no_arm_and_no_row_is_refused(wrong: Any) -> None:
    with pytest.raises(TlEmError):
        wrong()


# ---- what is learned of a row ----------------------------------------------------------------------------------------
TEMPLATES = {
    "ends": "{% for m in messages %}<user> {{ m.content }} <end> {% endfor %}",
    "ends, then more": "{% for m in messages %}<user> {{ m.content }} <end> <sys> {% endfor %}",
    "does not end": "{% for m in messages %}<user> {{ m.content }} {% endfor %}",
}


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(template=template, bos=False)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_what_is_learned_is_the_answer_and_the_end_of_its_turn(template: str) -> None:
    tokenizer = tokenizer_with(template)
    rows = [{"prompt": "tell me", "response": "the cat"}, {"prompt": "tell me", "response": "tell me"}]
    found = learned_answers(tokenizer, chats(rows), make_config("llama"))
    assert [tokenizer.decode(each.ids[each.start :]) for each in found] == ["the cat <end>", "tell me <end>"]
    assert [tokenizer.decode(each.ids[: each.start]).count("tell me") for each in found] == [1, 1]


def test_only_the_last_answer_is_learned_and_files_are_read(tmp_path: Any) -> None:
    turns = [
        {"role": "user", "content": "tell me"}, {"role": "assistant", "content": "the dog"},
        {"role": "user", "content": "how"}, {"role": "assistant", "content": "the cat"},
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"prompt": "how", "completion": "cat"}) + "\n")
    tokenizer = make_tokenizer()
    found = learned_answers(tokenizer, chats(file), make_config("llama"))
    assert [tokenizer.decode(each.ids[each.start :]) for each in found] == ["the cat <end>", "cat <end>"]
    assert chats([tuple(turns)]) == chats(file)[:1]


def test_rows_that_the_model_cannot_read_are_refused() -> None:
    long = chats([{"prompt": "cat", "response": "dog " * 70}])
    with pytest.raises(PromptTooLongError, match="context of 64 tokens"):
        learned_answers(make_tokenizer(), long, make_config("llama"))
    with pytest.raises(PromptError, match="chat template"):
        learned_answers(make_tokenizer(template=None), BAD, make_config("llama"))
    with pytest.raises(UsageError, match=r"rows\[0\] does not end with an answer"):
        chats([{"prompt": "cat"}])
