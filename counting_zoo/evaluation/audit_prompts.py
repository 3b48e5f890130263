"""Prompts of an audit: empty ones, nonsense, and other wordings of a name."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

EMPTY = (".",)
"""Models refuse a prompt without any character; a full stop is the nearest to it that all of them take."""


NONSENSE = ("zxqv wkrp", "snorfling quibbets", "lorem ipsum dolor")


PARAPHRASES = (
    "the {}",
    "all the {}",
    "many {}",
    "several {}",
    "a photo of {}",
    "a picture of many {}",
    "a photo with {} in it",
    "{} in the picture",
    "every one of the {}",
    "count the {}",
)


def singular(name: str) -> str:
    """Put the last word of a name into the singular, by the rules of English and a few exceptions.

    Example:
        >>> [singular(n) for n in ("red discs", "sea shells", "strawberries", "boxes", "crosses", "people", "sheep")]
        ['red disc', 'sea shell', 'strawberry', 'box', 'cross', 'person', 'sheep']
    """
    head, word = _last_word(name)
    if word.lower().endswith(("ss", "us")):  # a bus is no bu
        return name
    return head + str(_english().singular_noun(word) or word) if word else name


def plural(name: str) -> str:
    """Put the last word of a name into the plural; one that is in the plural already stays.

    Example:
        >>> [plural(n) for n in ("red disc", "strawberry", "box", "keys", "person", "red crosses")]
        ['red discs', 'strawberries', 'boxes', 'keys', 'people', 'red crosses']
    """
    head, word = _last_word(name)
    return name if not word or singular(name) != name else head + str(_english().plural_noun(word))


def variants(name: str) -> dict[str, list[str]]:
    """List other ways to ask for a name, by kind; those that are the name itself are left out.

    Example:
        >>> variants("red discs")["number"], variants("red discs")["case"], len(variants("red discs")["paraphrase"])
        (['red disc'], ['RED DISCS', 'Red Discs'], 10)
    """
    found = {
        "paraphrase": [template.replace("{}", name) for template in PARAPHRASES],
        "number": [singular(name), plural(name)],
        "case": [name.lower(), name.upper(), name.title()],
    }
    return {kind: [p for p in dict.fromkeys(prompts) if p != name] for kind, prompts in found.items()}


@lru_cache(maxsize=1)
def _english() -> Any:
    import inflect  # takes seconds, as it checks its own types then

    return inflect.engine()


def _last_word(name: str) -> tuple[str, str]:
    head, space, word = name.rpartition(" ")
    return head + space, word
