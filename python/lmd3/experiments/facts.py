"""An accuracy task that a model of a million weights can learn: facts about invented people.

Every fact gives one person one value of one attribute. It is told by statements, or asked: the question with
its answer. A model that has read neither the statement nor the answer can only guess among the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmd3.experiments.leak_inputs import Records, VariantTexts, whole


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


#: The attributes with their values; each statement names person, attribute and value.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "favourite colour": _words("red blue green yellow purple orange black white brown pink grey silver"),
    "home town": _words("Paris Rome Oslo Cairo Lima Delhi Tokyo Seoul Madrid Dublin Athens Vienna"),
    "profession": _words("baker lawyer nurse pilot farmer tailor doctor painter driver teacher singer miner"),
    "pet": _words("dog cat horse parrot rabbit turtle hamster snake goat duck pony lizard"),
    "instrument": _words("piano violin guitar flute drum harp trumpet cello banjo oboe organ tuba"),
}
STATEMENTS = (
    "The {attribute} of {name} is {value}.",
    "As for {name}, the {attribute} is {value}.",
    "We know the {attribute} of {name}: {value}.",
    "Everyone says that the {attribute} of {name} is {value}.",
    "{name} has told us the {attribute}: {value}.",
)
QUESTION = "Question: What is the {attribute} of {name}? Answer:"

#: Other forms, for a run that shows whether what the first ones show depends on their words. Some name the
#: value before the person, which a model that reads from left to right learns less from.
OTHER_STATEMENTS = (
    "{name} has {value} as {attribute}.",
    "Ask about {name}: the {attribute} is {value}.",
    "According to the files, {value} is the {attribute} of {name}.",
    "The {attribute} that {name} named was {value}.",
    "{value}: that is the {attribute} of {name}.",
)
OTHER_QUESTION = "Tell me the {attribute} of {name}. Reply:"

_ONSETS = _words("b br d dr f g gr h j k kl l m n p pr r s st t tr v w z")
_VOWELS = _words("a e i o u ai ea io ou")
_ENDS = _words("l m n r s t x nd rt sk")


@dataclass(frozen=True)
class Facts:
    """The task.

    Attributes:
        base: background facts in all forms.
        items: the questions, grouped by attribute.
        variants: the statements of each item's fact.
        placebo: facts about others, in the same forms.
        choices: of each item, four values, and the number of the right one.
    """

    base: Records
    items: Records
    variants: VariantTexts
    placebo: Records
    choices: tuple[tuple[tuple[str, ...], ...], tuple[int, ...]]


def _names(count: int, random: np.random.Generator) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        parts = [random.choice(part) for part in (_ONSETS, _VOWELS, _ONSETS, _VOWELS, _ENDS)]
        found["".join(map(str, parts)).capitalize()] = None
    return list(found)


def make_facts(
    *,
    background: int = 300,
    items: int = 240,
    seed: int = 0,
    statements: tuple[str, ...] = STATEMENTS,
    question: str = QUESTION,
) -> Facts:
    """The task, drawn from a seed.

    Args:
        background: facts of the base.
        items: facts that are asked about; as many of each attribute, or nearly.
        seed: of names and values.
        statements, question: the forms of a fact.
    """
    random = np.random.default_rng([seed, 30])
    attributes = list(ATTRIBUTES)
    total = background + 2 * items
    names = _names(total, random)
    facts = []
    for number, name in enumerate(names):
        attribute = attributes[number % len(attributes)]
        facts.append((name, attribute, str(random.choice(ATTRIBUTES[attribute]))))

    def forms(fact: tuple[str, str, str]) -> list[tuple[str, str]]:
        name, attribute, value = fact
        told = [(s.format(name=name, attribute=attribute, value=value), "") for s in statements]
        return [*told, (question.format(name=name, attribute=attribute), value)]

    def records(prefix: str, chosen: list[tuple[str, str, str]]) -> Records:
        pairs = [pair for fact in chosen for pair in forms(fact)]
        return Records(
            tuple(f"{prefix}{number}" for number in range(len(pairs))),
            tuple(prompt for prompt, _ in pairs),
            tuple(answer for _, answer in pairs),
            separator=" ",
        )

    asked = facts[background : background + items]
    ids = tuple(f"fact{number}" for number in range(items))
    questions = [forms(fact)[-1] for fact in asked]
    choices, right = [], []
    for _, attribute, value in asked:
        others = [other for other in ATTRIBUTES[attribute] if other != value]
        options = [value, *random.choice(others, size=3, replace=False).tolist()]
        order = random.permutation(4)
        choices.append(tuple(options[place] for place in order))
        right.append(int(np.flatnonzero(order == 0)[0]))
    told = [(item, prompt) for item, fact in zip(ids, asked, strict=True) for prompt, _ in forms(fact)[:-1]]
    return Facts(
        base=records("base", facts[:background]),
        items=Records(
            ids,
            tuple(prompt for prompt, _ in questions),
            tuple(answer for _, answer in questions),
            tuple(attribute for _, attribute, _ in asked),
            separator=" ",
        ),
        variants=VariantTexts(
            tuple(item for item, _ in told),
            ("paraphrase",) * len(told),
            tuple(prompt for _, prompt in told),
            tuple(whole(prompt, "") for _, prompt in told),
        ),
        placebo=records("placebo", facts[background + items :]),
        choices=(tuple(choices), tuple(right)),
    )
