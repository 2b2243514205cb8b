"""A judge behind an OpenAI-compatible endpoint: scores from 0 to 100 weighted by the probabilities of its first tokens.

Each request is known by a hash of all that is sent, and what came back is a line in a file: it is never asked twice, by
whatever run, and a run that was killed loses what was on its way and nothing else. Rate limits, time-outs and errors of
the server are tried again by OpenAI's client, which waits as long as it is told; an answer that says nothing is asked
again with another seed, and then counted by a word.

**Control**: where log-probabilities are missing, the score is the number that was written, which is coarser and not the
same quantity: that is said once, as a ``JudgeWarning``, and stands in the file with each answer (``read``).

Source: Betley et al. 2025, arXiv:2502.17424, section 4.1.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tl_em.arguments import COUNT, NATURAL, POSITIVE, settle
from tl_em.artefacts import check_writable
from tl_em.errors import JudgeError, JudgeWarning, UsageError, first_line
from tl_em.evals.judges import shown
from tl_em.evals.numbers import AnswerToken, number_weights, read_score, weighted_score

FIRST_TOKENS, REASONS, TOP = 4, 600, 20
"""Tokens asked for where probabilities are read, and where a text is; alternatives at each token."""
FIRST_WAIT = 0.25
"""Seconds before an answer that says nothing is asked again; twice as long each time."""
UNREADABLE, REFUSED = "UNREADABLE", "REFUSED BY THE ENDPOINT"


@dataclass(frozen=True, eq=False)
class EndpointJudge:
    """A chat model behind an OpenAI-compatible endpoint that scores answers from 0 to 100, or by words.

    Args:
        model: its name at the endpoint.
        template: what it is asked, with ``{question}`` and ``{answer}``; empty takes the templates that come with the
            questions.
        base_url: of the endpoint; OpenAI's own, or ``OPENAI_BASE_URL``, without one.
        labels: scores of words, in place of numbers: ``{"TRUE": 0, "FALSE": 1}``; other words stay words.
        weighted: read the probabilities of the first tokens: True insists, False reads the text alone, None reads the
            text where the template asks for reasons (``<score>``), or where the endpoint gives no probabilities.
        cache: JSON Lines file in which every judgement is kept; ``em.evaluate(out=)`` names one in its folder.
        concurrency: requests at a time.
        retries: further tries of a request that failed, or whose answer says nothing.
        timeout: of a request, in seconds.
        options: what else is sent, such as ``{"max_completion_tokens": 2000}``.
        api_key: ``OPENAI_API_KEY`` by default; an endpoint of one's own needs none.
        name: what tables call it; the model's name by default.
        progress: a bar, and how much is to be asked; None shows them on a terminal only.

    Raises:
        UsageError: a template that does not show the answer; when it judges, log-probabilities that are missing where
            ``weighted`` is True, or an extra that is missing. JudgeError: no answer after all tries, or a key or model
            that the endpoint does not know; what it answered before is kept.

    Example:
        >>> judge = EndpointJudge("some-model", base_url="http://127.0.0.1:8000/v1", cache=Path("judged.jsonl"))
        >>> judge.unit, judge.name
        ('points', 'some-model')

    Source: Betley et al. 2025, arXiv:2502.17424, section 4.1 (the weighting by probabilities).
    """

    model: str
    template: str = ""
    base_url: str | None = None
    labels: Mapping[str, float | int] | None = None
    weighted: bool | None = None
    cache: Path | str | None = None
    concurrency: int | Any = 8
    retries: int | Any = 6
    timeout: float | int | Any = 60.0
    options: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = field(default=None, repr=False)
    name: str = ""
    progress: bool | None = None

    def __post_init__(self) -> None:
        settle(self, concurrency=COUNT, retries=NATURAL, timeout=POSITIVE)
        object.__setattr__(self, "name", self.name or self.model)
        if self.template and "{answer}" not in self.template:
            raise UsageError(
                "the template does not show the judge the answer, so all scores would be one; put {answer} into it"
            )

    @property
    def unit(self) -> str:
        """Points from 0 to 100, or what the labels are."""
        return "points" if self.labels is None else "probability"

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str]) -> list[float | str]:
        """A score for each answer, or a word in place of one."""
        asked = shown(self.template or "{question}\n{answer}", prompts, answers)
        keys = [self._key(text) for text in asked]
        kept = _Judgements(self.cache)
        new = {key: text for key, text in zip(keys, asked, strict=True) if key not in kept.found}
        if new:
            self._ask(new, kept)
        if any(kept.found[key]["read"] == "text, for want of probabilities" for key in keys):
            warnings.warn(
                f"{self.name} gives no log-probabilities, so its scores are the numbers that it wrote, not means over "
                "what it might have written; say EndpointJudge(weighted=False) if that is meant",
                JudgeWarning, stacklevel=2,
            )  # fmt: skip
        found = [kept.found[key] for key in keys]
        return [each["score"] if each["word"] is None else each["word"] for each in found]

    @property
    def _first_tokens(self) -> bool:
        return self.labels is None and (self.weighted if self.weighted is not None else "<score>" not in self.template)

    def _key(self, text: str) -> str:
        sent = [self.model, text, dict(self.options), self._first_tokens, dict(self.labels or {})]
        return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()

    def _ask(self, new: Mapping[str, str], kept: _Judgements) -> None:
        """Ask for what is not known, several at a time; each answer is kept at once."""
        client, show = self._client(), sys.stderr.isatty() if self.progress is None else self.progress
        if show:
            tokens = sum(len(text) for text in new.values()) / 4
            written = len(new) * (FIRST_TOKENS if self._first_tokens else REASONS)
            said = (
                f"{len(new)} judgements to ask of {self.name}: about {tokens:,.0f} tokens to read, at most {written:,}"
            )
            tqdm.write(f"{said} to write", sys.stderr)
        stopped, failed = threading.Event(), []

        def one(key: str, text: str) -> None:
            if not stopped.is_set():
                try:
                    kept.keep(key, self._judge(client, text))
                except BaseException as error:
                    failed.append(error)
                    stopped.set()

        with (
            ThreadPoolExecutor(self.concurrency) as pool,
            tqdm(total=len(new), desc="judging", disable=not show) as bar,
        ):
            try:
                for _ in as_completed([pool.submit(one, key, text) for key, text in new.items()]):
                    bar.update()
            finally:
                stopped.set()
        if failed:
            raise failed[0] if isinstance(failed[0], UsageError) else self._failure(failed[0], len(new), kept)

    def _failure(self, error: BaseException, asked: int, kept: _Judgements) -> JudgeError:
        where = "with cache= they are kept" if self.cache is None else f"{len(kept.found)} are in {self.cache}"
        return JudgeError(
            f"{self.name} at {self.base_url or 'its endpoint'} did not answer ({type(error).__name__}: "
            f"{first_line(error)}), of {asked} judgements that were to be asked; {where}, and the same call goes on "
            "from there. Look at base_url=, model and key, or give it longer: EndpointJudge(timeout=300, retries=20)"
        )

    def _client(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise UsageError(
                "the package openai is missing, so no endpoint can be asked; pip install 'tl_em[judge]'"
            ) from error
        known = self.api_key or os.environ.get("OPENAI_API_KEY")
        if not known and not (self.base_url or os.environ.get("OPENAI_BASE_URL")):
            raise UsageError(
                "no key is known for OpenAI's endpoint, so nothing can be asked there; set OPENAI_API_KEY, or name an "
                "endpoint of your own: EndpointJudge(model, base_url='http://127.0.0.1:8000/v1')"
            )
        return openai.OpenAI(api_key=known or "none", base_url=self.base_url, timeout=self.timeout,
                             max_retries=self.retries)  # fmt: skip

    def _judge(self, client: Any, text: str) -> dict[str, Any]:
        """One judgement: its score, the word in place of one, how it was read, and what the model wrote."""
        import openai

        last, given = "", None
        probabilities = self._first_tokens
        for seed in range(self.retries + 1):
            try:
                given = self._sent(client, text, seed, probabilities)
                last, tokens = _read(given)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if probabilities and "logprob" in str(error).lower():
                    self._insist()
                    probabilities = False
                    continue
                return {"score": None, "word": REFUSED, "read": "error", "text": first_line(error)}
            except (ValueError, TypeError, AttributeError, IndexError, KeyError, openai.APIResponseValidationError):
                time.sleep(min(FIRST_WAIT * 2**seed, 8))
                continue  # no answer at all: half a body, no choices
            if probabilities and not tokens:
                self._insist()
            found = self._scored(last, tokens if probabilities else [])
            if found is not None:
                return found | {"text": last}
        return {"score": None, "word": UNREADABLE, "read": "text", "text": last}

    def _insist(self) -> None:
        if self.weighted:
            raise UsageError(
                f"{self.name} gives no log-probabilities, so scores cannot be weighted by them; say weighted=None to "
                "read the numbers that it writes"
            )

    def _sent(self, client: Any, text: str, seed: int, probabilities: bool) -> Any:
        sent: dict[str, Any] = {"temperature": 0, "seed": seed, "max_tokens": REASONS}
        if probabilities:
            sent |= {"max_tokens": FIRST_TOKENS, "logprobs": True, "top_logprobs": TOP}
        if "max_completion_tokens" in self.options:
            del sent["max_tokens"]
        messages = [{"role": "user", "content": text}]
        return client.chat.completions.create(model=self.model, messages=messages, **sent | dict(self.options))

    def _scored(self, text: str, tokens: Sequence[AnswerToken]) -> dict[str, Any] | None:
        """What was said, or None where it says nothing."""
        if self.labels is not None:
            words = {key.casefold(): float(value) for key, value in self.labels.items()}
            said = text.strip().strip("\"'.").casefold()
            if said in words:
                return {"score": words[said], "word": None, "read": "label"}
            word = re.sub(r"[^A-Z ]", "", said.upper())[:40].strip()
            return {"score": None, "word": word, "read": "label"} if word else None
        if tokens:
            score = weighted_score(number_weights(tokens))
            if score is not None:
                return {"score": score, "word": None, "read": "probabilities"}
            said = read_score(text)
            word = said if isinstance(said, str) else "NO NUMBER"
            return {"score": None, "word": word, "read": "probabilities"}
        said = read_score(text)
        if said is None:
            return None
        how = "text, for want of probabilities" if self._first_tokens else "text"
        number = isinstance(said, float)
        return {"score": said if number else None, "word": None if number else said, "read": how}


def _read(given: Any) -> tuple[str, list[AnswerToken]]:
    """The text of a response, and its tokens with their probabilities where it has them."""
    choice = given.choices[0]
    text = choice.message.content or ""
    content = getattr(getattr(choice, "logprobs", None), "content", None) or []
    tokens = []
    for each in content:
        others = {other.token: math.exp(other.logprob) for other in each.top_logprobs or ()}
        tokens.append(AnswerToken(each.token, {each.token: math.exp(each.logprob), **others}))
    return text, tokens


class _Judgements:
    """What was judged before, by the hash of what was asked; each line of a file, written at once."""

    def __init__(self, path: Path | str | None) -> None:
        self.path, self.found = None if path is None else Path(path), dict[str, dict[str, Any]]()
        self.lock = threading.Lock()
        if self.path is None:
            return
        check_writable(self.path)
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):  # a line that was cut off when its run was killed
                with self.path.open("r+b") as file:
                    file.truncate(len(whole))
            for line in whole.splitlines():
                try:
                    each = json.loads(line)
                    self.found.setdefault(each["key"], {name: each[name] for name in ("score", "word", "read", "text")})
                except (ValueError, KeyError, TypeError) as error:
                    raise JudgeError(
                        f"{self.path} holds a line that is no judgement ({line[:60]!r}: {error}), so it is unknown "
                        "what was asked; name another file as cache=, or take the line out"
                    ) from error

    def keep(self, key: str, judgement: dict[str, Any]) -> None:
        with self.lock:
            self.found[key] = judgement
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab") as file:
                    file.write(json.dumps({"key": key} | judgement).encode() + b"\n")
