"""Inspect (inspect-ai) tasks on a TransformerLens model *under interventions*, and question sets as Inspect tasks.

    inspect eval TASK --model tl_em/toy/insecure -M intervention=refusal.safetensors -M coefficient=-1
    inspect eval tl_em/question_set -T file=questions.yaml -T judge=endpoint:gpt-4o --model tl_em/DIRECTORY

Inspect finds this module by its entry point. Requests that come together are answered together; each has a seed of its
own, so that an answer does not depend on what else is asked. **Control**: the same task without the intervention, and
with a random direction of the same length; what was hooked stands in the log beside every answer.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from typing import Any

import anyio
import pandas as pd
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate
from inspect_ai.tool import ToolChoice, ToolInfo

from tl_em.errors import UsageError
from tl_em.evals.evaluation import Evaluation, judged
from tl_em.evals.named import KINDS, named_judge
from tl_em.evals.questions import load_questions, units_in
from tl_em.interventions.edits import of_directions
from tl_em.interventions.intervene import intervene
from tl_em.models.generate import MAX_ROWS, Answered, Sampling, answered
from tl_em.models.loading import load_model
from tl_em.models.prompts import EncodedPrompt, encode

LONGEST = 512
"""Tokens of an answer where neither the task nor the command line says how many."""
TOGETHER = 0.05
"""Seconds that a request waits for others to be answered with."""


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "top_p": (1.0,), "top_k": (), "logprobs": (False,), "top_logprobs": (), "num_choices": (1,), "best_of": (1,),
    "frequency_penalty": (0.0,), "presence_penalty": (0.0,), "logit_bias": ({},), "response_schema": (),
}  # fmt: skip
"""What would make other answers, or more of them, and the values at which it would not."""


@dataclass
class _Request:
    prompt: EncodedPrompt
    settings: tuple[int, float]
    seed: int
    answer: Future[Answered]


@modelapi(name="tl_em")
class InspectModel(ModelAPI):
    """A TransformerLens model as an Inspect provider, inside interventions.

    Args:
        model_name: an organism (``toy/insecure``), a local directory or a hub id.
        intervention: directions' files, interventions, or several of either; a file is ablated, or added where there is
            a ``coefficient``.
        coefficient: how much of each file's direction is added.
        where: the tokens that are treated, as in ``em.intervene``.
        loading: what else ``em.load_model`` takes: ``surface``, ``dtype``, ``device``.

    Raises:
        UsageError: tools, a sampler that is not there (top_p, top_k, penalties), or several choices; at once, before
            anything is answered.
    """

    def __init__(
        self, model_name: str, base_url: str | None = None, api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  # Inspect's own signature
        intervention: Any = (), coefficient: float | int | None = None, where: Any = "all", **loading: Any,
    ) -> None:  # fmt: skip
        super().__init__(model_name, base_url, api_key, [], config)
        self.interventions, self.where = of_directions(intervention, coefficient), where
        self.model = load_model(model_name, **loading)
        self._asked: Counter[str] = Counter()
        self._requests: queue.Queue[_Request] = queue.Queue()
        with self._hooked():
            pass  # what does not fit the model is said now
        threading.Thread(target=self._serve, daemon=True).start()

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """The model's answer to a conversation."""
        odd = [name for name, neutral in _NEUTRAL.items() if getattr(config, name, None) not in (None, *neutral)]
        if tools or odd:
            raise UsageError(
                f"the task asks for {odd[0] if odd else 'tools'}, which no model under interventions has here, so "
                "it would run as another task; take a task without, or set it aside on the command line"
            )
        encoded = encode(self.model, [_prompt(input)])[0]
        room = int(self.model.cfg.n_ctx) - len(encoded)
        settings = (max(1, min(config.max_tokens or LONGEST, room)), float(config.temperature or 0.0))
        found: Future[Answered] = Future()
        self._requests.put(_Request(encoded, settings, self._seed(encoded, config.seed or 0), found))
        text, cut = await anyio.to_thread.run_sync(found.result)
        for stop in config.stop_seqs or ():
            text = text.split(stop)[0]
        output = ModelOutput.from_content(self.model_name, text, "max_tokens" if cut else "stop")
        tokenizer: Any = self.model.tokenizer  # type: ignore[attr-defined]
        written = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        output.usage = ModelUsage(input_tokens=len(encoded), output_tokens=written, total_tokens=len(encoded) + written)
        output.metadata = {"interventions": [repr(each) for each in self.interventions], "where": str(self.where)}
        return output

    def _hooked(self) -> AbstractContextManager[Any]:
        return intervene(self.model, *self.interventions, where=self.where) if self.interventions else nullcontext()

    def _seed(self, encoded: EncodedPrompt, seed: int) -> int:
        """Of the n-th answer to this prompt: another one each epoch, the same in each run."""
        key = json.dumps([seed, list(encoded.ids)])
        self._asked[key] += 1
        return int.from_bytes(hashlib.sha256(f"{key}{self._asked[key]}".encode()).digest()[:7], "big")

    def _serve(self) -> None:
        """Answer what comes together in one batch, in a thread of its own."""
        while True:
            waiting = [self._requests.get()]
            while len(waiting) < MAX_ROWS:
                try:
                    waiting.append(self._requests.get(timeout=TOGETHER))
                except queue.Empty:
                    break
            for settings in {each.settings for each in waiting}:
                self._answer([each for each in waiting if each.settings == settings], *settings)

    def _answer(self, requests: Sequence[_Request], max_new_tokens: int, temperature: float) -> None:
        try:
            with self._hooked():
                said = answered(self.model, [each.prompt for each in requests], [each.seed for each in requests],
                                max_new_tokens=max_new_tokens, sampling=Sampling(temperature))  # fmt: skip
            for each, answer in zip(requests, said, strict=True):
                each.answer.set_result(answer)
        except BaseException as error:  # belongs to those who asked
            for each in requests:
                each.answer.set_exception(error)

    def max_connections(self) -> int:
        """As many as are answered together."""
        return MAX_ROWS

    def connection_key(self) -> str:
        """One model, one queue."""
        return f"{self.model_name}-{id(self)}"


def _prompt(messages: Sequence[ChatMessage]) -> Any:
    """Inspect's conversation as ours; a single question is a text, which models without a chat template read too."""
    turns = [{"role": each.role, "content": each.text} for each in messages]
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" else turns


def _message(turn: Any) -> ChatMessage:
    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    return kinds[turn["role"]](content=turn["content"])


@task
def question_set(
    file: str, judge: str = "", samples: int | None = None, base_url: str | None = None, limit_tokens: int = 256
) -> Task:
    """The questions of a file, answered by any model and scored by a judge of this package.

    Args:
        file: as of ``em.evals.load_questions``.
        judge: ``phrases:sorry;cannot``, ``endpoint:MODEL``, ``local:DIRECTORY``, or ``MODULE:NAME``, a judge of yours.
        samples: answers to each wording; by default as the file says.
        base_url: of the endpoint.
        limit_tokens: longest answer.
    """
    questions = load_questions(file)
    wordings = [(each, i, prompt) for each in questions for i, prompt in enumerate(each.prompts)]
    units = units_in([each.id for each, _, _ in wordings], [prompt for _, _, prompt in wordings])
    dataset = [
        Sample(
            id=f"{each.id}/{i}", input=prompt if isinstance(prompt, str) else [_message(turn) for turn in prompt],
            metadata={"question": each.id, "group": str(unit)} | dict(each.about),
        )
        for (each, i, prompt), unit in zip(wordings, units, strict=True)
    ]  # fmt: skip
    first = questions.questions[0]
    return Task(
        dataset=MemoryDataset(dataset, name=questions.name), solver=generate(),
        scorer=judgement(_judge(judge, base_url), file), epochs=samples or first.samples,
        config=GenerateConfig(temperature=first.temperature, max_tokens=limit_tokens),
    )  # fmt: skip


@scorer(metrics=[mean(), stderr(cluster="group")])
def judgement(judge: Any, file: str) -> Scorer:
    """A judge of this package as an Inspect scorer; an answer without a score is unscored, its word the reason.

    Args:
        judge: ``(prompts, answers) -> scores``.
        file: of the questions, whose templates a judge without one is shown.
    """
    questions = load_questions(file)

    async def score(state: TaskState, target: Target) -> Score:
        prompt, answer = _prompt([m for m in state.messages if m.role != "assistant"]), state.output.completion
        bare = Evaluation("answers", pd.DataFrame({"answer": [answer]}), prompts=[prompt], questions=questions)
        found = await anyio.to_thread.run_sync(lambda: judged(bare, judge, None))
        row = found.table.iloc[0]
        about = {name: None if row[name] != row[name] else float(row[name]) for name in found.judges}
        if row.score != row.score:
            return Score.unscored(answer=answer, explanation=row.word, metadata=about)
        return Score(value=float(row.score), answer=answer, explanation=row.word or None, metadata=about)

    return score


def _judge(spec: str, base_url: str | None) -> Any:
    kind, _, rest = spec.partition(":")
    if kind in KINDS or not rest:
        return named_judge(spec, base_url=base_url)
    found = getattr(import_module(kind), rest)
    return found() if isinstance(found, type) and is_dataclass(found) else found
