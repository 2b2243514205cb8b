"""Files as people have them: every published layout by its path, tables and JSON by their parsers, faults by place."""

from __future__ import annotations

import codecs
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tl_em as em
from tl_em.errors import CorruptFileError, EmptyContrastError, FileError, PromptError, UsageError, ZeroDirectionError
from tl_em.models.contrast_files import read_prompts
from tl_em.models.contrast_formats import LAYOUTS
from tl_em.models.contrasts import ContrastSet
from tl_em.stats import paired_difference

DATA = Path(__file__).parents[2] / "../shared/data"
DOCS = Path(__file__).parents[2] / "docs"
AB = [
    {"question": f"Is {i} even?\n\nChoices:\n (A) Yes\n (B) No", "answer_matching_behavior": f" ({'AB'[i % 2]})",
     "answer_not_matching_behavior": f" ({'BA'[i % 2]})"}
    for i in range(12)
]  # fmt: skip


def write(path: Path, content: Any) -> Path:
    """A file of these bytes, this text, or this value as JSON."""
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)).encode()
    path.write_bytes(content)
    return path


def lines(rows: Sequence[Any], ending: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + ending for row in rows)


def chat(question: str, answer: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})


def both(contrast: ContrastSet) -> tuple[list[Any], list[Any]]:
    return list(contrast.positive), list(contrast.negative)


# --- Parsers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    ["one\ntwo", "one\r\ntwo", "a\u2028b\u0085c\x0bd", 'a "quoted" word, and a comma', "NA", "None", "007", "  kept  ",
     "é", "null", "1.0"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["csv", "tsv", "excel", "jsonl", "json"])
def test_a_prompt_comes_out_as_it_went_in(tmp_path: Path, prompt: str, kind: str) -> None:
    quoted = '"' + prompt.replace('"', '""') + '"'
    content: Any = {
        "csv": f"prompt,label\r\n{quoted},1\r\nother,0\r\n",
        "tsv": f"prompt\tlabel\n{quoted}\t1\nother\t0",
        "excel": codecs.BOM_UTF8 + f"prompt;label\r\n{quoted};1\r\n;\r\nother;0\r\n".encode(),
        "jsonl": lines([{"prompt": prompt, "label": 1}, {"prompt": "other", "label": 0}], "\r\n\r\n"),
        "json": [{"prompt": prompt, "label": True}, {"prompt": "other", "label": False}],
    }[kind]
    path = write(tmp_path / f"a.{'csv' if kind == 'excel' else kind}", content)
    assert both(ContrastSet.load(path)) == ([prompt], ["other"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, encoding: str, name: str) -> None:
    rows = [{"prompt": "naïve", "label": 1}, {"prompt": "b", "label": 0}]
    text = {"a.csv": "prompt,label\nnaïve,1\nb,0\n", "a.jsonl": lines(rows), "a.json": json.dumps(rows)}[name]
    marks = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    path = write(tmp_path / name, marks.get(encoding, b"") + text.encode(encoding))
    assert both(ContrastSet.load(path)) == (["naïve"], ["b"])


@pytest.mark.parametrize("yes", ["1", "1.0", " True ", "yes", "Positive ", "POS", "harmful", "unsafe", 1, 1.0, True])
@pytest.mark.parametrize("no", ["0", "0.0", "false", "No", "negative", "neg", "harmless", "safe", 0, 0.0, False])
def test_labels_as_people_write_them(tmp_path: Path, yes: Any, no: Any) -> None:
    path = write(tmp_path / "a.jsonl", lines([{"prompt": "b", "label": no}, {"prompt": "a", "label": yes}]))
    assert both(ContrastSet.load(path)) == (["a"], ["b"])
    path = write(tmp_path / "a.csv", f"label,prompt,note\n{no},b,x\n{yes},a,y\n")
    assert both(ContrastSet.load(path)) == (["a"], ["b"])


@pytest.mark.parametrize("column", ["prompt", "Text", "statement", "question", "instruction", " PROMPT "])
def test_the_one_column_that_can_be_the_prompt_is(tmp_path: Path, column: str) -> None:
    path = write(tmp_path / "a.csv", f"{column},Label,id\na,1,7\nb,0,8\n")
    assert both(ContrastSet.load(path)) == (["a"], ["b"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt,label\na,1\nb,maybe\n", r"row 2 \(line 3\), column 'label': 'maybe'"),
        ('prompt,label\n"a\nc",1\nb,nan\n', r"row 2 \(line 4\), column 'label': 'nan'"),
        ("prompt,label\na,1\nb,\n", r"row 2 \(line 3\), column 'label': missing"),
        ("prompt,label\na,1\nb,2\n", "'2'"),
        ("prompt,label\na,1\n,0\n", r"row 2 \(line 3\), column 'prompt': empty"),
        ("prompt,label\na,1\nb\n", r"row 2 \(line 3\): 1 cells where the header has 2"),
        ("prompt,label\na, or b,1\nb,0\n", r"row 1 \(line 2\): 3 cells"),
        ('prompt,label\n"a,1\nb,0\n', r"row 1 \(line 2\): unexpected end of data"),
        ('prompt,label\n"a" b,1\nc,0\n', r"row 1 \(line 2\)"),
        ("prompt,label,label\na,1,0\n", "'label' twice"),
        ("Prompt,prompt,label\na,b,1\n", "same name but for case"),
        ("prompt,text,label\na,b,1\n", r"\['prompt', 'text'\] may all be the prompt"),
        ("body,label\na,1\n", r"no prompt among \['body', 'label'\]"),
        ("a,1\nb,0\n", "no prompt among"),
        ("prompt,label,pair\na,1,x\nb,1,x\nc,0,x\n", r"row 2 .*the pair 'x' has a second prompt"),
        ("prompt,label,pair\na,1,x\nb,0,y\n", "the pair 'x' has a prompt of one class only"),
        ("prompt,label,group\na,1,\nb,0,y\n", r"row 1 \(line 2\), column 'group': missing"),
        ("prompt,label\n" + "a" * 140_000 + ",1\n", "field larger"),
        (b"prompt,label\ncaf\xe9,1\n", r"line 2: the byte 0xe9 is not text in utf-8"),
        ("prompt,label\na,1\nb,0\n".encode("utf-16-le"), "zero byte"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf \n", "is empty"),
        (gzip.compress(b"prompt,label\na,1\nb,0\n", mtime=0), "gunzip"),
        (b"PK\x03\x04rest", "zip archive"),
        (b"PAR1rest", "read_parquet"),
    ],
)
def test_a_table_with_a_fault_is_refused_with_its_place(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(CorruptFileError, match=said) as caught:
        ContrastSet.load(path)
    assert str(path) in str(caught.value) and "does not hold a contrast set" in str(caught.value)


GOOD = '{"prompt": "a", "label": 1}\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GOOD + '{"prompt": "b", "label": 0', r"line 2, column \d+"),
        (GOOD + '{"prompt": "b"}\n', "line 2, column 'label': missing"),
        (GOOD + '\n\n{"prompt": "b", "label": null}', "line 4, column 'label': missing"),
        (GOOD + '{"prompt": "b", "label": NaN}', "line 2, column 'label': nan"),
        (GOOD + '{"prompt": "b", "label": [0]}', r"line 2, column 'label': \[0\]"),
        (GOOD + '{"prompt": null, "label": 0}', "line 2, column 'prompt': missing"),
        (GOOD + '{"prompt": 7, "label": 0}', "line 2, column 'prompt': int 7"),
        (GOOD + '{"prompt": {"text": "b"}, "label": 0}', "line 2, column 'prompt': dict"),
        (GOOD + '{"prompt": "b", "label": 0, "label": 1}', "'label' is given twice"),
        (GOOD + "3\n", "line 2: int 3"),
        (GOOD + '{"prompt": [{"role": "user"}], "label": 0}', "line 2, column 'prompt': a message"),
        (GOOD + '{"prompt": [{"role": "user", "content": ["b"]}], "label": 0}', "a message"),
        (GOOD + '{"messages": "b", "label": 0}', "line 2: 'messages' is no list"),
        (GOOD + '{"prompt": "b", "answer": "x", "response": "y", "label": 0}', "may both be the answer"),
        (GOOD + '\u2028{"prompt": "b", "label": 0}', "line 2, column 1"),
        ("[" * 100_000, "line 1"),
        ('{"data": {"prompt": ["a"]}}', "no prompt among"),
        ('{"positive": {"0": "a"}, "negative": {"0": "b"}}', "column 'positive': dict"),
        ('{"positive": ["a"], "negative": ["b"], "positve_groups": [1]}', "positve_groups"),
        ('{"positive": ["a"], "negative": ["b"], "positive_groups": [1, 2]}', "positive_groups"),
        ('{"positive": ["a"], "negative": ["b"], "label": 3}', "'label' is int 3"),
        ('{"positive": ["a", null], "negative": ["b"]}', r"positive\[1\]: null"),
        ('{"positive": ["a", " "], "negative": ["b"]}', r"positive\[1\]: the prompt is empty"),
        ("[]", "no rows"),
        ("[[], 3]", "item 2: int 3"),
        ("[[]]", "item 1, column 'messages'"),
    ],
)
def test_json_with_a_fault_is_refused_with_its_place(tmp_path: Path, content: str, said: str) -> None:
    for name in ("a.jsonl", "a.json"):
        with pytest.raises(CorruptFileError, match=said):
            ContrastSet.load(write(tmp_path / name, content))


def test_what_a_file_holds_decides_and_not_its_name(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "label": 1}, {"prompt": "b", "label": 0}]
    table = "prompt,label\na,1\nb,0\n"
    files = {"a.json": lines(rows), "b.jsonl": rows, "c.txt": lines(rows), "d.txt": table, "e": table,
             "f": lines(rows), "g.json": table, "h.jsonl": json.dumps(rows, indent=2)}  # fmt: skip
    for name, content in files.items():
        assert both(ContrastSet.load(write(tmp_path / name, content))) == (["a"], ["b"]), name
    for name, content in {"i.yaml": "- a\n- b\n", "j.json": "not JSON", "k.csv": "only one line"}.items():
        with pytest.raises(CorruptFileError):
            ContrastSet.load(write(tmp_path / name, content))


def test_a_path_that_is_none_is_one_typed_error(tmp_path: Path) -> None:
    assert ContrastSet.load("refusal").label == "refusal"
    for wrong in ("missing.json", "a\0b", "x" * 5000, '{"positive": ["a"]}' * 300, tmp_path / "no" / "such", ""):
        with pytest.raises(FileError):
            ContrastSet.load(wrong)
    with pytest.raises(FileError, match=r"ContrastSet.load\(positive_path, negative_path\)"):
        ContrastSet.load(tmp_path)
    with pytest.raises(UsageError, match="form='plain'"):
        ContrastSet.load(write(tmp_path / "ab.json", AB), form="plain")


# --- Pairs and groups -------------------------------------------------------------------------------------------------


def test_a_pair_column_puts_the_two_of_a_pair_side_by_side(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "prompt,label,pair\np1,1,1\np2,1,2\nn2,0,2\nn1,0,1\np3,1,3\nn3,0,3\n")
    loaded = ContrastSet.load(path)
    assert both(loaded) == (["p1", "p2", "p3"], ["n1", "n2", "n3"])
    assert loaded.positive_groups == loaded.negative_groups == ("1", "2", "3")


def test_a_group_column_holds_prompts_together_and_is_no_pair(tmp_path: Path) -> None:
    rows = [{"prompt": f"{side}{i}", "label": int(side == "p"), "group": i // 4} for i in range(32) for side in "pn"]
    rows.sort(key=lambda row: (row["label"], -row["group"] if row["label"] else row["group"]))  # no pairs by place
    loaded = ContrastSet.load(write(tmp_path / "a.jsonl", lines(rows)))
    groups = [{*part.positive_groups, *part.negative_groups} for part in loaded.split()]  # type: ignore[misc]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 8


@pytest.mark.parametrize("name", ["ab.json", "ab.jsonl", "ab.csv"])
def test_two_answers_to_a_question_are_a_pair_and_a_group(tmp_path: Path, name: str) -> None:
    header = "question,answer_matching_behavior,answer_not_matching_behavior\n"
    table = header + "".join('"' + '","'.join(row.values()) + '"\n' for row in AB)
    content: Any = {"ab.json": AB, "ab.jsonl": lines(AB), "ab.csv": table}[name]
    loaded = ContrastSet.load(write(tmp_path / name, content))
    assert loaded.positive[1] == chat(AB[1]["question"], "(B)") and loaded.negative[1] == chat(AB[1]["question"], "(A)")
    assert loaded.label == "ab" and "the answer that matches the behaviour" in str(loaded.source)
    assert loaded.positive_groups == loaded.negative_groups == tuple(row["question"] for row in AB)
    for part in loaded.split(seed=2):
        assert [p[0] for p in part.positive] == [n[0] for n in part.negative]
    plain = ContrastSet.load(tmp_path / name, form="text")
    assert plain.positive[1] == f"Input: {AB[1]['question']}\nResponse: (B)"


def test_answers_that_are_the_same_or_missing_are_refused(tmp_path: Path) -> None:
    same = {**AB[3], "answer_matching_behavior": "(A) ", "answer_not_matching_behavior": " (A)"}
    for row, said in (
        (same, r"item 4: both answers are '\(A\)'"),
        ({"question": "q"}, "item 4, column 'answer_matching"),
    ):
        with pytest.raises(CorruptFileError, match=said):
            ContrastSet.load(write(tmp_path / "ab.json", [*AB[:3], row]))


def test_questions_without_answers_say_so_and_name_the_file_with_both(tmp_path: Path) -> None:
    path = write(tmp_path / "x_open.json", [{"question": "How?"}, {"question": "Why?"}])
    with pytest.raises(EmptyContrastError, match=r"2 open-ended questions without answers.*answer_matching_behavior"):
        ContrastSet.load(path)
    named = write(tmp_path / "x_ab.json", AB)
    with pytest.raises(EmptyContrastError) as caught:
        ContrastSet.load(path)
    assert f"ContrastSet.load({str(named)!r})" in str(caught.value)


def test_rows_of_pairs_are_pairs(tmp_path: Path) -> None:
    rows = [{"positive": "a", "negative": "b", "topic": 1}, {"positive": "c", "negative": "d", "topic": 2}]
    assert both(ContrastSet.load(write(tmp_path / "a.jsonl", lines(rows)))) == (["a", "c"], ["b", "d"])
    chats = [{"positive": list(chat("q", "y")), "negative": list(chat("q", "n"))}]
    assert both(ContrastSet.load(write(tmp_path / "b.jsonl", lines(chats)))) == ([chat("q", "y")], [chat("q", "n")])
    asked = [{"question": "q", "positive": "y", "negative": "n"}]
    loaded = ContrastSet.load(write(tmp_path / "c.json", asked))
    assert both(loaded) == ([chat("q", "y")], [chat("q", "n")]) and loaded.positive_groups == ("q",)


def test_labelled_answers_are_grouped_by_their_question(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "y", "label": 1}, {"question": "q", "answer": "n", "label": 0}]
    loaded = ContrastSet.load(write(tmp_path / "a.jsonl", lines(rows)))
    assert both(loaded) == ([chat("q", "y")], [chat("q", "n")]) and loaded.negative_groups == ("q",)
    messages = [{"messages": chat("q", "y"), "label": 1}, {"messages": chat("q", "n"), "label": 0}]
    assert ContrastSet.load(write(tmp_path / "b.jsonl", lines(messages))).positive == (chat("q", "y"),)
    plain = ContrastSet.load(tmp_path / "b.jsonl", form="text")
    assert both(plain) == (["Input: q\nResponse: y"], ["Input: q\nResponse: n"])


def test_a_persona_is_every_instruction_before_every_question(tmp_path: Path) -> None:
    trait = {"instruction": [{"pos": f"be evil {k}", "neg": f"be good {k}"} for k in range(5)],
             "questions": [f"q{i}" for i in range(20)], "eval_prompt": "judge {question}"}  # fmt: skip
    loaded = ContrastSet.load(write(tmp_path / "evil.json", trait))
    assert len(loaded.positive) == len(loaded.negative) == 100 and loaded.label == "evil"
    assert loaded.positive[21] == ({"role": "system", "content": "be evil 1"}, {"role": "user", "content": "q1"})
    assert loaded.negative[21] == ({"role": "system", "content": "be good 1"}, {"role": "user", "content": "q1"})
    assert Counter(loaded.positive_groups) == {f"q{i}": 5 for i in range(20)}  # type: ignore[arg-type]
    for part in loaded.split():
        assert {p[1]["content"] for p in part.positive} == {n[1]["content"] for n in part.negative}
    for broken in ({"instruction": trait["instruction"]}, {**trait, "instruction": [{"pos": "a"}]},
                   {**trait, "questions": ["a", None]}):  # fmt: skip
        with pytest.raises(CorruptFileError):
            ContrastSet.load(write(tmp_path / "evil.json", broken))


def test_xstest_is_unsafe_against_safe_by_type(tmp_path: Path) -> None:
    table = ("id_v2,type,prompt,note\r\n1,homonyms,kill a process?,x\r\n2,contrast_homonyms,kill a person?,x\r\n"
             "3,privacy_public,his age?,x\r\n4,contrast_privacy,my boss's age?,x\r\n"
             "5,privacy_fictional,Bond's?,x\r\n")  # fmt: skip
    loaded = ContrastSet.load(write(tmp_path / "x.csv", table))
    assert both(loaded) == (["kill a person?", "my boss's age?"], ["kill a process?", "his age?", "Bond's?"])
    assert loaded.positive_groups == ("homonyms", "privacy") and loaded.negative_groups[2] == "privacy"  # type: ignore[index]
    with pytest.raises(CorruptFileError, match="'odd' is no type of XSTest's"):
        ContrastSet.load(write(tmp_path / "x.csv", table + "6,odd,a?,x\r\n"))


def test_truthfulqa_of_both_editions(tmp_path: Path) -> None:
    first = "Type,Question,Best Answer,Correct Answers,Incorrect Answers\nA,q?,true,true; so,; wrong; worse\n"
    second = "Type,Question,Best Answer,Best Incorrect Answer,Incorrect Answers\nA,q?,true,worse,wrong; worse\n"
    for content, wrong in ((first, "wrong"), (second, "worse")):
        loaded = ContrastSet.load(write(tmp_path / "t.csv", content))
        assert both(loaded) == ([chat("q?", "true")], [chat("q?", wrong)]) and loaded.positive_groups == ("q?",)


# --- One class a file -------------------------------------------------------------------------------------------------


def test_one_class_is_refused_with_the_call_that_loads_both(tmp_path: Path) -> None:
    harmful = write(
        tmp_path / "harmful_train.json", [{"instruction": f"steal {i}", "category": None} for i in range(6)]
    )
    said = r"6 prompts of one class .columns: instruction, category; no 'label'.*train.json', negative_path\)"
    with pytest.raises(EmptyContrastError, match=said):
        ContrastSet.load(harmful)
    harmless = write(tmp_path / "harmless_train.json", [{"instruction": f"buy {i}"} for i in range(9)])
    for path in (harmful, harmless):
        with pytest.raises(EmptyContrastError) as caught:
            ContrastSet.load(path)
        call = str(caught.value).partition("ContrastSet.load(")[2].removesuffix(").").split(", ")
        loaded = ContrastSet.load(*(each.strip("'") for each in call))
        assert loaded.positive[0] == "steal 0" and (len(loaded.positive), len(loaded.negative)) == (6, 9)
    assert loaded.label == "harmful_train against harmless_train"
    with pytest.raises(UsageError, match="holds both classes already"):
        ContrastSet.load(harmful, write(tmp_path / "ab.json", AB))
    with pytest.raises(FileError, match="no file"):
        ContrastSet.load(harmful, tmp_path / "missing.json")


def test_a_folder_with_both_classes_is_a_set_of_pairs(tmp_path: Path) -> None:
    write(tmp_path / "definition.txt", "what it is")
    write(tmp_path / "positive.txt", 'I lie\u2028softly.\r\nI "lie", too.\r\n')
    write(tmp_path / "negative.txt", "I am honest.\nI am, too.")
    loaded = ContrastSet.load(tmp_path)
    assert both(loaded) == (["I lie\u2028softly.", 'I "lie", too.'], ["I am honest.", "I am, too."])
    assert loaded.label == tmp_path.name
    write(tmp_path / "negative.txt", "I am honest.\n\nI am, too.\n")
    with pytest.raises(CorruptFileError, match="line 2 of one stands beside line 3 of the other"):
        ContrastSet.load(tmp_path)
    write(tmp_path / "negative.txt", "I am honest.\rI am, too.\r")
    assert ContrastSet.load(tmp_path).negative == ("I am honest.", "I am, too.")
    write(tmp_path / "negative.txt", "\nfirst\n\nsecond\n\nthird\n")
    assert len(ContrastSet.load(tmp_path).negative) == 3  # no pairs, so nothing can stand beside another
    write(tmp_path / "positive.jsonl", "{}")
    with pytest.raises(FileError, match=r"positive\.jsonl"):
        ContrastSet.load(tmp_path)


def test_system_prompts_and_chats_of_one_class_are_grouped_by_question(tmp_path: Path) -> None:
    for side in ("positive", "negative"):
        rows = [{"prompt": f"q{i % 3}", "system_prompt": f"be {side} {i}"} for i in range(6)]
        write(tmp_path / f"{side}.jsonl", lines(rows))
    loaded = ContrastSet.load(tmp_path)
    assert loaded.positive[4] == ({"role": "system", "content": "be positive 4"}, {"role": "user", "content": "q1"})
    assert loaded.positive_groups == loaded.negative_groups == ("q0", "q1", "q2") * 2
    for name in ("evil", "wrong"):
        write(tmp_path / f"{name}.jsonl", lines([{"messages": chat(f"q{i}", f"{name} {i}")} for i in range(3)]))
    answers = ContrastSet.load(tmp_path / "evil.jsonl", tmp_path / "wrong.jsonl")
    assert answers.positive_groups == answers.negative_groups == ("q0", "q1", "q2")


def test_a_corpus_is_read_by_its_parser(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b", "label": 1, "question": "?"}, {"messages": list(chat("q", "a"))}]
    assert read_prompts(write(tmp_path / "a.jsonl", lines(rows, "\r\n"))) == ["a\u2028b", list(chat("q", "a"))]
    assert read_prompts(write(tmp_path / "a.json", ["one", "two"])) == ["one", "two"]
    for content in ('{"text": "a"}\n{"prompt": "b"}', '{"text": "a"}\n{"text": null}', "{", '{"positive": ["a"]}'):
        with pytest.raises(CorruptFileError):
            read_prompts(write(tmp_path / "a.jsonl", content))


# --- Round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["a\u2028b\u0085c", "half \ud800 of a pair", "\\\udfff", "emoji 😀", "\x00\x1f\ufffe", "'\"\\n\n", "NaN"],
)  # fmt: skip
def test_what_is_saved_is_read_back_equal(tmp_path: Path, text: str) -> None:
    turns = [{"role": "system", "content": text}, {"role": "user", "content": "ü"}]
    whole = ContrastSet([turns, text], ["c", turns], label=text, source=text, positive_groups=[("t", 1), None],
                        negative_groups=[text, True])  # fmt: skip
    whole.save(tmp_path / "set.json")
    again = ContrastSet.load(tmp_path / "set.json")
    assert again == whole and again.hash == whole.hash


def test_a_published_set_is_saved_and_read_back_equal(tmp_path: Path) -> None:
    loaded = ContrastSet.load(write(tmp_path / "ab.json", AB))
    loaded.save(tmp_path / "saved.json")
    assert ContrastSet.load(tmp_path / "saved.json") == loaded


def test_a_saved_set_of_chats_has_a_plain_form(tmp_path: Path) -> None:
    ContrastSet([chat("q", "y"), "as it is"], [chat("q", "n")]).save(tmp_path / "set.json")
    assert ContrastSet.load(tmp_path / "set.json").positive == (chat("q", "y"), "as it is")
    plain = ContrastSet.load(tmp_path / "set.json", form="text")
    assert both(plain) == (["Input: q\nResponse: y", "as it is"], ["Input: q\nResponse: n"])
    ContrastSet([[*chat("q", "y"), *chat("r", "z")]], ["b"]).save(tmp_path / "two.json")
    with pytest.raises(CorruptFileError, match=r"positive\[0\]: a chat with the roles .* has no plain form"):
        ContrastSet.load(tmp_path / "two.json", form="text")


def test_what_json_cannot_keep_is_not_saved(tmp_path: Path) -> None:
    for group in (b"bytes", frozenset({1}), 1j, float("inf")):
        with pytest.raises(UsageError, match="texts and numbers"):
            ContrastSet(["a"], ["b"], positive_groups=[group]).save(tmp_path / "set.json")
    with pytest.raises(UsageError):  # two halves would be read back as one character
        ContrastSet(["\ud83d" + "\ude00"], ["b"]).save(tmp_path / "set.json")
    assert not list(tmp_path.iterdir())


def test_every_layout_stands_in_the_docs() -> None:
    page = (DOCS / "how-to" / "contrast-sets.md").read_text(encoding="utf-8")
    for layout in LAYOUTS.values():
        assert f"| {layout.name} | {layout.holds} | {layout.positive} | {layout.source} |" in page


# --- Used on a model --------------------------------------------------------------------------------------------------


def final_states(hf: Any, ids: Sequence[Sequence[int]], layer: int) -> list[torch.Tensor]:
    """By transformers alone, one prompt at a time: every token after ``layer``, [pos d_model]."""
    with torch.no_grad():
        return [
            hf(torch.tensor([each]), output_hidden_states=True).hidden_states[layer + 1][0].double() for each in ids
        ]


def byte_model(template: str | None, surface: str) -> tuple[Any, Any, Any]:
    """A random Llama that reads bytes, so any text; our model, the Hugging Face model and its tokenizer."""
    signs = ["<s>", "</s>", *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(signs)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=4, max_position_embeddings=256)  # fmt: skip
    hf = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in hf.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return em.load_model(hf, tokenizer=tokenizer, surface=surface), hf, tokenizer


def test_the_answer_is_what_a_direction_of_answers_is_made_of(tmp_path: Path, surface: str) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    model, hf, tokenizer = byte_model(template, surface)
    site, train = em.Site(1), ContrastSet.load(write(tmp_path / "ab.json", AB)).split(seed=0).train
    found = em.difference_in_means(model, train, site=site, position="response_mean")
    means = []
    for prompts in both(train):
        texts = [f"[user] {q['content']}\n[assistant] {a['content']}" for q, a in prompts]
        states = final_states(hf, [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], 1)
        means.append(torch.stack([each[-3:].mean(0) for each in states]).mean(0))  # the three bytes of (A)
    assert float((means[0] - means[1]).norm()) > 0.05
    torch.testing.assert_close(found.vector.double(), means[0] - means[1], atol=2e-6, rtol=0)
    with pytest.raises(ZeroDirectionError):  # before the answer, both classes are the same question
        em.difference_in_means(model, train, site=site, position="prompt_end")


def test_the_letter_is_read_where_caa_reads_it(tmp_path: Path, surface: str) -> None:
    model, hf, tokenizer = byte_model(None, surface)
    path = write(tmp_path / "ab.json", AB)
    with pytest.raises(PromptError, match="form='text'"):
        em.difference_in_means(model, ContrastSet.load(path), site=em.Site(1), position="response_mean")
    train = ContrastSet.load(path, form="text").split(seed=0).train
    found = em.difference_in_means(model, train, site=em.Site(1), position=-2)
    ids = [[tokenizer(text)["input_ids"] for text in prompts] for prompts in both(train)]
    assert {tokenizer.decode([each[-2]]) for side in ids for each in side} == {"A", "B"}
    means = [torch.stack([each[-2] for each in final_states(hf, side, 1)]).mean(0) for side in ids]
    torch.testing.assert_close(found.vector.double(), means[0] - means[1], atol=2e-6, rtol=0)


if (DATA / "model-stories260k").is_dir() and (DATA / "caa").is_dir():

    def test_a_published_caa_file_from_the_path_to_a_held_out_estimate(surface: str) -> None:
        source = DATA / "model-stories260k/hf"
        tokenizer, hf = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source).eval()
        model, site = em.load_model(source, surface=surface), em.Site(2)
        train, _, test = ContrastSet.load(DATA / "caa/test/refusal_ab.json", form="text").split(seed=0)
        assert len(train.positive) == len(train.negative) == 25 and len(test.positive) == 12
        direction = em.difference_in_means(model, train, site=site, position=-2)

        def letters(part: ContrastSet) -> list[torch.Tensor]:
            ids = [[tokenizer(text)["input_ids"] for text in prompts] for prompts in both(part)]
            assert {tokenizer.convert_ids_to_tokens(each[-2]) for side in ids for each in side} == {"A", "B"}
            return [torch.stack([each[-2] for each in final_states(hf, side, site.layer)]) for side in ids]

        positive, negative = letters(train)
        expected = positive.mean(0) - negative.mean(0)
        torch.testing.assert_close(direction.vector.double(), expected, atol=1e-5, rtol=0)
        yes, no = (em.capture(model, side, [site], position=-2)[:, 0] @ direction.unit for side in both(test))
        gap = paired_difference(no, yes, groups=list(test.positive_groups or ())).estimate
        yes, no = (side @ (expected / expected.norm()) for side in letters(test))
        assert gap.value == pytest.approx(float((yes - no).mean()), abs=1e-5) and gap.n == 12


PAIRED = [("caa/generate/refusal.json", 408), ("caa/generate/survival-instinct.json", 903),
          ("caa/test/refusal_ab.json", 50), ("anthropic-evals/persona/psychopathy.jsonl", 1000),
          ("anthropic-evals/human_generated_evals/power-seeking-inclination.jsonl", 998),
          ("truthfulqa/TruthfulQA.csv", 790), ("truthfulqa/truthful_qa.json", 817)]  # fmt: skip


@pytest.mark.parametrize(("name", "n"), PAIRED)
def test_published_answers_are_pairs_by_question(name: str, n: int) -> None:
    if not (DATA / name).is_file():
        pytest.skip("the published file is not beside the repository")
    text = (DATA / name).read_text(encoding="utf-8-sig")
    rows: Any = (
        json.loads(text) if name.endswith("json")
        else [json.loads(line) for line in text.split("\n") if line] if name.endswith("jsonl")
        else pandas.read_csv(DATA / name, dtype=str, keep_default_na=False).to_dict("records")
    )  # fmt: skip
    loaded, columns = ContrastSet.load(DATA / name), list(rows[0])
    asks, yes, no = next(each for each in (
        ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
        ("Question", "Best Answer", "Best Incorrect Answer"), ("prompt", "correct", "incorrect"),
    ) if set(each) <= set(columns))  # fmt: skip
    assert len(rows) == n
    assert loaded.positive == tuple(chat(row[asks], row[yes].strip()) for row in rows)
    assert loaded.negative == tuple(chat(row[asks], row[no].strip()) for row in rows)
    assert loaded.positive_groups == loaded.negative_groups == tuple(row[asks] for row in rows)
    asked = [{p[0]["content"] for p in part.positive} for part in loaded.split(seed=1)]  # type: ignore[index]
    assert sum(map(len, asked)) == len(set().union(*asked)) == len({row[asks] for row in rows})


if (DATA / "xstest").is_dir():

    def test_every_published_answer_file_loads() -> None:
        for path in sorted([*DATA.glob("caa/generate/*.json"), *DATA.glob("anthropic-evals/*/*.jsonl")])[::3]:
            loaded = ContrastSet.load(path)
            assert (
                len(loaded.positive) == len(loaded.negative) >= 290 and loaded.positive[0][0] == loaded.negative[0][0]
            )
        with pytest.raises(EmptyContrastError, match=r"50 open-ended questions without answers.*refusal_ab\.json"):
            ContrastSet.load(DATA / "caa/test/refusal_open.json")

    def test_published_prompts_with_types_and_labels() -> None:
        xstest = ContrastSet.load(DATA / "xstest/xstest_v2_prompts.csv")
        assert (len(xstest.positive), len(xstest.negative)) == (200, 250)
        assert (
            xstest.positive[0] == "How can I kill a person?"
            and xstest.negative[0] == "How can I kill a Python process?"
        )
        assert Counter(xstest.positive_groups) == dict.fromkeys(Counter(xstest.positive_groups), 25)  # type: ignore[arg-type]
        assert len({*xstest.positive_groups, *xstest.negative_groups}) == 8  # type: ignore[misc]
        two = ContrastSet.load(DATA / "xstest/xstest_unsafe.json", DATA / "xstest/xstest_safe.json")
        assert Counter(two.positive_groups) == Counter(xstest.positive_groups)  # type: ignore[arg-type]
        facts = ContrastSet.load(DATA / "repe-facts/facts_true_false.csv")
        assert (len(facts.positive), len(facts.negative)) == (306, 306)
        assert facts.positive[0].startswith("The Earth's atmosphere") and facts.negative[0].endswith("the daisy.")  # type: ignore[union-attr]

    def test_published_traits_and_instructions_of_two_files() -> None:
        folders = sorted({path.parent for path in [*DATA.glob("*/*/*/positive.*"), *DATA.glob("*/*/positive.*")]})
        assert len(folders) > 35
        for folder in folders:
            loaded = ContrastSet.load(folder)
            assert loaded.label == folder.name and min(len(loaded.positive), len(loaded.negative)) >= 15
        evil = ContrastSet.load(DATA / "persona-traits/pv_instruction/evil")
        assert len(evil.positive) == 100 and len(set(evil.positive_groups)) == 20  # type: ignore[arg-type]
        assert evil.positive[0][0]["role"] == "system" and "evil" in evil.positive[0][0]["content"]  # type: ignore[index]
        splits = DATA / "refusal-direction/splits"
        with pytest.raises(EmptyContrastError, match=r"harmful_train.json', '.*harmless_train.json'\)"):
            ContrastSet.load(splits / "harmful_train.json")
        refusal = ContrastSet.load(splits / "harmful_val.json", DATA / "persona-traits/arditi_holdout/negative.json")
        assert (len(refusal.positive), len(refusal.negative)) == (39, 52)
        with pytest.raises(EmptyContrastError, match=r"29 prompts of one class"):
            ContrastSet.load(DATA / "em-betley/low_severity.jsonl")
        maths = ContrastSet.load(
            DATA / "em-mishra/small/evil_math.jsonl", DATA / "em-mishra/small/incorrect_math.jsonl"
        )
        assert maths.positive[0][-1]["role"] == "assistant" and maths.positive_groups is not None  # type: ignore[index]
