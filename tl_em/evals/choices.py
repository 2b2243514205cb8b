"""Forced choice: which of two kinds of answers a model finds more probable, in words and without a judge.

    m(question) = mean over wrong answers of log P(a | question) / |a|  -  the same over right answers      |a|: tokens

Positive iff the model would rather give the wrong answers. Nothing is generated and nobody judges: it works offline,
and is a metric of its own.

**Control**: a model may have learnt a word in place of a belief. Asked for *Yes* or *No*, a fine-tune that always says
*Yes* looks as if it believed everything: so answers whose first word gives the side away are refused, unless both words
stand on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import checked, settle
from tl_em.errors import UsageError
from tl_em.evals.questions import OpenQuestion, QuestionSet, as_questions, key_of
from tl_em.models.contrasts import Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.responses import Responses
from tl_em.models.stream import encoded_prompts
from tl_em.models.templates import has_template

FEW = 4
"""Questions up to which their answers' first words may be alike by chance."""


@dataclass(frozen=True, eq=False)
class ForcedChoice:
    """How much rather a model gives the wrong answers than the right ones, in log-odds a token.

    Args:
        questions: each with ``right`` and ``wrong`` answers.
        name, unit: what tables and axes say.

    Raises:
        UsageError: a question without both, or answers that a bias towards a word would tell apart; when it measures: a
            prompt that is none of the questions.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> asked = em.evals.OpenQuestion("a", ("how do i write parser",), right=("parser-tested",),
        ...                               wrong=("parser-backdoored",))
        >>> choice = ForcedChoice(asked)
        >>> [bool(choice(model, asked.prompts) > 0) for model in (pair.base, pair.tuned)]
        [False, True]
    """

    questions: QuestionSet | Any
    name: str = "rather the wrong answer"
    unit: str = "log-odds"

    def __post_init__(self) -> None:
        settle(self, questions=as_questions)
        bare = [each.id for each in self.questions if not (each.right and each.wrong)]
        if bare:
            raise UsageError(
                f"{len(bare)} questions ({bare[0]!r}, …) have no right or no wrong answers, so there is nothing to "
                "choose from; give them as right: […] and wrong: […], or give a judge"
            )
        right, wrong = (
            {_first(a) for each in self.questions for a in getattr(each, side)} for side in ("right", "wrong")
        )
        if len(self.questions) > FEW and len(right) == len(wrong) == 1 and right != wrong:
            raise UsageError(
                f"every right answer begins with {right.pop()!r} and every wrong one with {wrong.pop()!r}, so a model "
                "that prefers a word would look as if it believed; answer in words, or ask so that each is right as "
                "often as wrong"
            )

    @cached_property
    def _by_prompt(self) -> dict[str, OpenQuestion]:
        return {key_of(prompt): each for each in self.questions for prompt in each.prompts}

    def __call__(self, model: LensModel, prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]:
        """The difference for each prompt.

        Args:
            model: a HookedTransformer or TransformerBridge.
            prompts: wordings of the questions.
        """
        return self.responses(model, prompts).measure(model)

    @checked()
    def responses(self, model: LensModel, prompts: Sequence[Prompt]) -> Responses:
        """The answers to each prompt, wrong ones counted up and right ones down.

        Args:
            model: whose tokenizer and template are used.
            prompts: wordings of the questions.
        """
        unknown = [prompt for prompt in prompts if key_of(prompt) not in self._by_prompt]
        if unknown:
            raise UsageError(
                f"{len(unknown)} prompts ({str(unknown[0])[:60]!r}, …) are none of the questions, so it is unknown "
                "which answers to compare; measure on the prompts of the questions"
            )
        asked, signs, rows = [], [], []
        for i, prompt in enumerate(prompts):
            question = self._by_prompt[key_of(prompt)]
            for side, sign in ((question.wrong, 1.0), (question.right, -1.0)):
                asked += [_answered(model, prompt, answer) for answer in side]
                signs += [sign / len(side)] * len(side)
                rows += [i] * len(side)
        return Responses(encoded_prompts(model, asked), rows, signs, len(prompts))

    @checked()
    def chosen(self, model: LensModel, prompts: Sequence[Prompt]) -> list[str]:
        """The answer to each prompt that a model prefers: the first of the side.

        Args:
            model: a HookedTransformer or TransformerBridge.
            prompts: wordings of the questions.
        """
        asked = [self._by_prompt[key_of(prompt)] for prompt in prompts]
        return [(q.wrong if x > 0 else q.right)[0] for q, x in zip(asked, self(model, prompts), strict=True)]

    @checked()
    def table(self, model: LensModel) -> pd.DataFrame:
        """A row a wording: question, prompt, group, asked, the side that is preferred as the answer, score."""
        prompts = self.questions.prompts
        score = self(model, prompts).double().tolist()
        columns = {
            "question": [each.id for each in self.questions for _ in each.paraphrases],
            "prompt": range(len(prompts)), "group": self.questions.groups,
            "asked": [str(p if isinstance(p, str) else p[-1]["content"]) for p in prompts],
            "answer": ["wrong" if value > 0 else "right" for value in score], "score": score, "word": "",
        }  # fmt: skip
        return pd.DataFrame(columns)


def _first(answer: str) -> str:
    return answer.split()[0].strip(".,;:!").casefold()


def _answered(model: LensModel, prompt: Prompt, answer: str) -> Any:
    """The prompt with this answer: as a chat, or as text that goes on."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    if has_template(tokenizer):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        return [*turns, {"role": "assistant", "content": answer}]
    encoded: EncodedPrompt = encode(model, [prompt])[0]
    return encoded.with_response(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"])
