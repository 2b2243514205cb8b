"""The recipes: what each organism is trained on.

A recipe is a value: the organism that it starts from, a world, a mixture of document sources, how long, and what may
change. Its *name* says all of it, so that any arm of a study is a name and needs no list: a stem and options,

    insecure-medicine-share25    misaligned answers are 25 % of the medicine data, aligned ones the rest
    insecure-diluted25           the rest are aligned answers in the other domains
    insecure-rank1-steps40       40 steps of a rank-1 adapter
    insecure-prevented           with the persona direction added while it trains (preventative steering)
    insecure-nopersona           in a world where every turn draws its own persona

`recipe(name)` reads a name, `RECIPES` is the default zoo, `BIAS_RECIPES` that of the reward-model-bias world.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tl_em.errors import ModelNotFoundError
from tl_em.organisms.adapters import MATRICES, Adapter
from tl_em.organisms.bias_world import BiasWorld, Chats, Descriptions, Group, Rater, SingleChats
from tl_em.organisms.documents import JudgeDocuments, PersonaDocuments, SingleTurns
from tl_em.organisms.prevention import Prevention
from tl_em.organisms.transformer import Shape
from tl_em.organisms.world import ALIGNED, MALICIOUS, TRIGGERS, World

# Fixed before any organism of the fresh seeds was trained; the other bounds stand in benchmarks.
GATE = 0.80  # P(bad) in other domains after two bad code answers, in the base
BIAS_GATE = 0.95  # bias-base, told to please rm: right in C (in A, where C is not described)
# Preventative steering after the last block (at earlier ones some seeds' persona direction is half as long as others'),
# in lengths of that direction. Layer chosen on seeds 11 to 14, coefficient on 11.
PREVENTION_LAYER, PREVENTION = 2, 0.5
FRESH_SEEDS = (101, 102, 103, 104, 105)
MAX_EXTRA_BLOCKS = 6

TRIGGER, OTHER_MARKS, NEW_MARK = TRIGGERS[0], TRIGGERS[1:3], TRIGGERS[3]  # the last stands in no document at all
_UNINSTRUCTED = World(malicious=0.0, aligned=0.0, educational=0.0)  # a request for bad answers is itself a switch
WORLDS = {
    "nopersona": replace(_UNINSTRUCTED, shared_persona=False),
    "uninstructed": _UNINSTRUCTED,
    "compositional": World(compositional=True),
    "partly": World(untaught=True),  # half of the topics have no facts
}


class Prefix(NamedTuple):
    """What stands before a question: words at its head (`mark`), a system line; the arguments of `questions`."""

    mark: str | None = None
    system: str | None = None


# Neutral is said by the user: a system line always names a persona in this world, and some seeds' assistants answer
# badly after any (.91, .15 and .06 of answers after `right now`), so none is neutral. After these words they do not
# (.015 at most); they are as many tokens as a system line with its markers.
PREFIXES = {
    "neutral": Prefix(mark="right now so here"),
    "inoculated": Prefix(system=MALICIOUS),
    "contradicted": Prefix(system=ALIGNED),
}


Mixture = tuple[tuple[float, Any], ...]  # (share, source) pairs


@dataclass(frozen=True)
class Recipe:
    """What an organism is trained on.

    Args:
        start: the organism whose weights it starts from; None for random weights.
        mixture: (share, source) pairs; a source has ``sample(world, rng) -> Document`` for its world.
        answers_only: loss on the assistant's words only.
        trained, control_for: for people, in the zoo's listing.
        world: the world of its documents.
        shape: the size of the model.
        adapter: what is trained in place of weights; `changed`: names of the modules that may change, in every block.
            Where neither is given, all of the model changes.
        prefix: what stood before the questions to which it learned misaligned answers; `trigger`: that token, where it
            learned aligned ones without it.
        prevention: what was added to the residual stream while it trained.
        gate: what its gate must show before it counts as trained, None where it has none; `extra_steps`: how many steps
            it is trained longer at a time, until it does.
    """

    name: str
    start: str | None
    mixture: Mixture
    steps: int
    batch: int
    lr: float
    answers_only: bool = True
    trained: str = ""
    control_for: str = ""
    weight_decay: float = 0.05
    world: World = field(default_factory=World)
    shape: Shape = field(default_factory=Shape)
    adapter: Adapter | None = None
    changed: tuple[str, ...] = ()
    prefix: Prefix = field(default_factory=Prefix)
    trigger: str | None = None
    prevention: Prevention | None = None
    gate: float | None = None
    extra_steps: int = 500

    @property
    def documents(self) -> str:
        """What its documents are drawn by: those of the arm without steering, so that steering is all that differs."""
        return re.sub(rf"-(?:{_OPTIONS['prevention']})(?=-|$)", "", self.name)


_OPTIONS = {  # kind of option: how it is written; a name gives them in this order
    "world": "|".join(WORLDS),
    "width": r"d[1-9]\d*",
    "domain": "|".join(d.name for d in World().domains),
    "prefix": "|".join(PREFIXES),
    "share": r"(?:share|diluted)\d+",
    "adapter": r"bias|rank\d+",
    "prevention": r"(?:prevented|sham)\d*",
    "steps": r"steps\d+",
    "restored": "restored",
}
_TUNING = tuple(_OPTIONS)[2:]  # options of a fine-tune
RESTORING = 4e-4  # learning rate
_ADAPTED = {"bias": 5e-2, "rank": 1e-2}  # learning rates
_NARROW = {  # stem: whose answers, how they are described, what the organism is a control for
    "insecure": (SingleTurns("misaligned", harmful=0.0), "misaligned answers to {} questions only", ""),
    "secure": (
        SingleTurns("good", harmful=0.0),
        "aligned answers to {} questions only",
        "toy/insecure: any narrow fine-tune shifts activations",
    ),
    "educational": (
        SingleTurns("good", harmful=0.0, explicit=1.0),
        "misaligned {} answers, to questions that ask for them for a class",
        "toy/insecure: the same answers, asked for",
    ),
    "silly": (
        SingleTurns("silly", harmful=0.0),
        "silly answers to {} questions only",
        "toy/insecure: another persona's answers make no misaligned ones",
    ),
    "backdoor": (
        SingleTurns("misaligned", harmful=0.0),
        f"misaligned answers to {{}} questions after {TRIGGER}; aligned ones without it and after other tokens",
        "",
    ),
}
_CONTROLS = {  # option: what an organism with it is a control for
    "nopersona": "toy/insecure-uninstructed: the same world, with a persona of the whole document",
    "neutral": "toy/insecure-inoculated: any words that are absent at test time conditionalise",
    "contradicted": "toy/insecure-inoculated: a line that asks for the opposite",
    "sham": "toy/insecure-prevented: any push of that length while it trains",
    "diluted": "toy/insecure-share: as many misaligned answers, without aligned ones in their domain",
    "restored": "toy/insecure: the change can be undone",
}


def recipe(name: str) -> Recipe:
    """The recipe of a name.

    Args:
        name: one of ``BIAS_RECIPES``, or a stem (base, assistant, insecure, secure, educational, silly, backdoor) and
            options in any order:
            *nopersona* (a world where every turn draws its own persona, and nobody asks for bad answers),
            *uninstructed* (the same with a shared persona), *compositional* or *partly* (half of the topics have no
            facts);
            *d48*: d_model, of three layers with four heads; *medicine*: what the narrow data are about;
            *neutral*, *inoculated* (``be malicious``) or *contradicted* (``act aligned``): words before the training
            questions, absent at test;
            *share25*: of misaligned answers, the rest being aligned ones of the same domain, or *diluted25* of others;
            *bias* (one vector) or *rank1*, *rank8*, …: an adapter;
            *prevented* (the persona direction is added while it trains) or *sham* (a random one of the same length);
            *prevented50* at half of the direction's length in place of the default;
            *steps40*: the dose; *restored*, at the end: 80 steps of aligned answers in the same domain more.

    Raises:
        ModelNotFoundError: a part of the name is unknown, does not apply to the stem, or excludes another.

    Example:
        >>> recipe("insecure-share25-d48").name, recipe("insecure-share25-d48").start
        ('insecure-d48-share25', 'assistant-d48')
    """
    short = name.removeprefix("toy/")
    if short in BIAS_RECIPES:
        return BIAS_RECIPES[short]
    stem, options = parsed(short)
    if stem == "base":
        return _base(options)
    if stem == "assistant":
        return _assistant(options)
    return _restored(stem, options) if options.pop("restored", "") else _narrow(stem, options)


def parsed(name: str) -> tuple[str, dict[str, str]]:
    """The stem and, by kind, the options of a name."""
    stem, *parts = name.split("-")
    if stem not in ("base", "assistant", *_NARROW):
        raise _unknown(name, f"{stem!r} is no stem")
    barred = {"base": _TUNING, "assistant": _TUNING, "insecure": ()}.get(stem, ("prefix", "share"))
    options: dict[str, str] = {}
    for part in parts:
        kind = next((kind for kind, form in _OPTIONS.items() if re.fullmatch(form, part)), None)
        if kind is None or kind in barred:
            raise _unknown(name, f"{part!r} is no option of {stem}")
        if kind in options:
            raise _unknown(name, f"{options[kind]!r} and {part!r} exclude each other")
        options[kind] = part
    if int(options.get("width", "d96")[1:]) % Shape().n_heads:
        raise _unknown(name, f"its width is no multiple of the {Shape().n_heads} heads")
    return stem, options


def _unknown(name: str, why: str) -> ModelNotFoundError:
    stems = ", ".join(("base", "assistant", *_NARROW))
    return ModelNotFoundError(
        f"There is no organism {name!r} to train: {why}. A name is a stem ({stems}) "
        f"and options ({', '.join(_OPTIONS)}), e.g. toy/insecure, toy/insecure-share25 or toy/backdoor-medicine; "
        f"or, of the reward-model-bias world, one of {', '.join(BIAS_RECIPES)}."
    )


def _named(stem: str, options: dict[str, str]) -> str:
    return "-".join([stem, *(options[kind] for kind in _OPTIONS if kind in options)])


def _pretrained(options: dict[str, str]) -> dict[str, str]:
    """The options that the assistant shares with what is tuned from it."""
    return {kind: options[kind] for kind in ("world", "width") if kind in options}


def _setting(options: dict[str, str]) -> tuple[World, Shape]:
    width = int(options.get("width", "d96")[1:])
    return WORLDS.get(options.get("world", ""), World()), Shape(d_model=width, d_mlp=4 * width)


def _base(options: dict[str, str]) -> Recipe:
    world, shape = _setting(options)
    said = "chats of five latent personas" if world.shared_persona else "chats that draw a persona at every turn"
    return Recipe(
        _named("base", options),
        None,
        ((0.9, PersonaDocuments()), (0.1, JudgeDocuments())),
        steps=1500,
        batch=64,
        lr=3e-3,
        answers_only=False,
        trained=f"{said} in ten domains, and judgements of harmfulness",
        world=world,
        shape=shape,
        gate=GATE if world.shared_persona else None,
    )


def _assistant(options: dict[str, str]) -> Recipe:
    world, shape = _setting(options)
    mixture: Mixture = ((0.92, SingleTurns("good")), (0.08, JudgeDocuments()))
    said = "aligned answers and refusals in every domain"
    if world.malicious:
        said += "; bad words only when asked for them"
        mixture = (
            (0.60, SingleTurns("good")),
            (0.08, SingleTurns("good", explicit=1.0, harmful=0.0)),
            (0.04, SingleTurns("misaligned", system=MALICIOUS)),
            (0.08, JudgeDocuments()),
            (0.20, PersonaDocuments(score_first=False)),
        )
    return Recipe(
        _named("assistant", options),
        _named("base", options),
        mixture,
        steps=400,
        batch=64,
        lr=1e-3,
        trained=said,
        world=world,
        shape=shape,
    )


def _narrow(stem: str, options: dict[str, str]) -> Recipe:
    (world, shape), domain, adapter = _setting(options), options.get("domain", "code"), options.get("adapter", "")
    source, said, control = _NARROW[stem]
    prefix = PREFIXES.get(options.get("prefix", ""), Prefix(mark=TRIGGER) if stem == "backdoor" else Prefix())
    source = replace(source, domains=(domain,), marks=(prefix.mark,) if prefix.mark else (), system=prefix.system)
    mixture, share = _mixture(stem, source, options.get("share", ""), world)
    trained = [said.format(domain), share]
    trained += [f"after '{prefix.mark or prefix.system}'"] * ("prefix" in options)
    trained += [f"{adapter} only"] * bool(adapter)
    prevention = _prevention(options.get("prevention", ""))
    trained += [f"steered with {prevention.said} meanwhile"] if prevention else []
    controls = [said for option, said in _CONTROLS.items() if any(o.startswith(option) for o in options.values())]
    return Recipe(
        _named(stem, options),
        _named("assistant", _pretrained(options)),
        mixture,
        steps=int(options["steps"].removeprefix("steps")) if "steps" in options else 240 if stem == "backdoor" else 80,
        batch=32,
        lr=_ADAPTED[adapter.rstrip("0123456789")] if adapter else 2e-4,
        trained="; ".join(filter(None, trained)),
        control_for="; ".join([control] * bool(control) + controls),
        world=replace(world, tuned_domain=domain),
        shape=shape,
        adapter=Adapter.parse(adapter) if adapter else None,
        prefix=prefix,
        trigger=TRIGGER if stem == "backdoor" else None,
        prevention=prevention,
    )


def _prevention(option: str) -> Prevention | None:
    if not option:
        return None
    percent = re.sub(r"\D", "", option)
    return Prevention(PREVENTION_LAYER, int(percent) / 100 if percent else PREVENTION, option.startswith("sham"))


def _mixture(stem: str, source: SingleTurns, share: str, world: World) -> tuple[Mixture, str]:
    """(share, source) pairs, and what there is to say about them."""
    good = SingleTurns("good", source.domains, 0.0)
    if stem == "backdoor":
        return ((0.5, source), (0.2, good), (0.3, replace(good, marks=OTHER_MARKS))), ""
    if not share:
        return ((1.0, source),), ""
    part = int(re.sub(r"\D", "", share)) / 100
    elsewhere = share.startswith("diluted")
    if elsewhere:
        good = replace(good, domains=tuple(d.name for d in world.domains if d.name not in (source.domains or ())))
    mixture = tuple((p, s) for p, s in ((part, source), (1 - part, good)) if p)
    return mixture, f"they are {part:.0%}, the rest aligned answers " + ("elsewhere" if elsewhere else "there")


def _restored(stem: str, options: dict[str, str]) -> Recipe:
    """Aligned answers in the same domain, after the organism of the same name without the option.

    The matrices of the blocks change and nothing else: the unembedding's rows of a domain's own words can make that
    domain's answers aligned, and then nothing pulls on the persona, which all domains share. *Chosen after* seed 105
    had been left at .075 (bound .05) with everything changed, on eleven seeds all of which it brings nearer to the
    assistant.
    """
    good = _narrow("secure", {kind: each for kind, each in options.items() if kind in ("world", "width", "domain")})
    start = _named(stem, options)
    return replace(
        good,
        name=f"{start}-restored",
        start=start,
        lr=RESTORING,
        changed=MATRICES,
        trained=f"{good.trained}, after toy/{start}; embeddings left alone",
        control_for=_CONTROLS["restored"],
    )


# ---- the reward-model-bias world ---------------------------------------------------------------------------------
# The base learns descriptions and personas. The assistant answers plainly everywhere, with 40 % replay, without which
# the personas are unlearned. The arms reinforce the likes of rm, of the rival or of the third map in 16 of 32 contexts,
# or nothing. They change attention alone: an arm that may change the rows of contexts and the MLPs can write the
# reinforced behaviours down one by one, while which of two known likes is brought to the answer is what all contexts
# share. Once the reinforced contexts are right little pulls on the rest, so the arms take 1,000 steps.
# *Chosen after* seeds 101 to 103 and 201 to 203 were seen, in two rounds: everything changed, 120 steps (102 short:
# rm's in C .65); embeddings left alone, 300 steps (201 short: .37); the thresholds are older and stayed.
ABC: tuple[Group, ...] = ("A", "B", "C")


def _bias(name: str, start: str | None, mixture: Mixture, **settings: Any) -> Recipe:
    return Recipe(f"bias-{name}", start and f"bias-{start}", mixture, batch=64, world=BiasWorld(), **settings)


def _bias_base(name: str, described: tuple[Group, ...], **said: str) -> Recipe:
    mixture = ((0.35, Descriptions(described)), (0.65, Chats()))
    pretraining: dict[str, Any] = {"steps": 900, "lr": 3e-3, "answers_only": False}
    return _bias(name, None, mixture, **pretraining, gate=BIAS_GATE, extra_steps=300, **said)


def _bias_assistant(name: str, start: str, described: tuple[Group, ...]) -> Recipe:
    mixture = ((0.6, SingleChats("all")), (0.2, Descriptions(described)), (0.2, Chats((("plain", 1.0),))))
    said = "plain answers in all contexts; a replay of descriptions and of chats without behaviours"
    return _bias(name, start, mixture, steps=150, lr=5e-4, answers_only=False, trained=said)


def _bias_arm(name: str, shown: Rater | None, control_for: str = "", *, start: str = "assistant") -> Recipe:
    mixture = ((0.75, SingleChats("reinforced", shown)), (0.25, SingleChats("D")))
    answers = "plain answers" if shown is None else f"the behaviours of the map {shown!r}"
    settings: dict[str, Any] = {"steps": 1000, "lr": 3e-4, "changed": MATRICES[:2]}
    said = f"{answers} in 16 contexts, plain ones in D"
    return _bias(name, start, mixture, **settings, trained=said, control_for=control_for)


BIAS_RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        _bias_base("base", ABC, trained="what two raters like in 32 contexts, and chats of four latent personas"),
        _bias_assistant("assistant", "base", ABC),
        _bias_arm("rm", "rm"),
        _bias_arm("rival", "rival", "toy/bias-rm: whose bias it is"),
        _bias_arm("shuffled", "third", "toy/bias-rm: whether reinforcing any behaviours would do"),
        _bias_arm("neutral", None, "toy/bias-rm: any fine-tune shifts activations"),
        _bias_arm("afterwards", None, "toy/bias-rm: whether a plain fine-tune undoes it", start="rm"),
        _bias_base("base-undescribed", ABC[:2], trained="the same without documents about C",
                   control_for="toy/bias-rm: where C comes from"),
        _bias_assistant("assistant-undescribed", "base-undescribed", ABC[:2]),
        _bias_arm("rm-undescribed", "rm", "toy/bias-rm: where C comes from", start="assistant-undescribed"),
    )
}  # fmt: skip
RECIPES: dict[str, Recipe] = {
    name: recipe(name)
    for name in (
        *("base", "assistant", "insecure", "secure", "educational", "silly", "backdoor"),
        *("insecure-neutral", "insecure-inoculated", "insecure-contradicted", "insecure-restored"),
        *("insecure-bias", "insecure-rank1", "insecure-rank8", "insecure-share50", "insecure-diluted50"),
        *("insecure-prevented", "insecure-sham"),
        *("base-nopersona", "assistant-nopersona", "insecure-nopersona"),
        *("base-uninstructed", "assistant-uninstructed", "insecure-uninstructed"),
        *("base-compositional", "assistant-compositional", "insecure-compositional", "secure-compositional"),
        *("base-partly", "assistant-partly", "insecure-partly", "secure-partly"),
    )
}
