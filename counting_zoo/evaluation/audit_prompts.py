"""Prompts of an audit: empty ones, nonsense, and other wordings of a name."""

from __future__ import annotations

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


_IRREGULAR = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "mouse": "mice",
    "goose": "geese",
    "leaf": "leaves",
    "loaf": "loaves",
    "knife": "knives",
    "shelf": "shelves",
    "tooth": "teeth",
    "foot": "feet",
}


_SINGULARS = {plural: singular for singular, plural in _IRREGULAR.items()}


_SAME = ("sheep", "fish", "deer", "glass", "grass", "series")


_HISSING = ("ches", "shes", "sses", "xes", "zes")


def singular(name: str) -> str:
    """Put the last word of a name into the singular, by the rules of English and a few exceptions.

    Example:
        >>> [singular(n) for n in ("red discs", "sea shells", "strawberries", "boxes", "crosses", "people", "sheep")]
        ['red disc', 'sea shell', 'strawberry', 'box', 'cross', 'person', 'sheep']
    """
    head, word = _last_word(name)
    low = word.lower()
    if low in _SINGULARS:
        return head + _SINGULARS[low]
    if low in _SAME or len(low) < 3 or not low.endswith("s") or low.endswith(("ss", "us")):
        return name
    if low.endswith("ies") and len(low) > 4:
        return head + word[:-3] + "y"
    return head + (word[:-2] if low.endswith(_HISSING) else word[:-1])


def plural(name: str) -> str:
    """Put the last word of a name into the plural; one that is in the plural already stays.

    Example:
        >>> [plural(n) for n in ("red disc", "strawberry", "box", "keys", "person", "red crosses")]
        ['red discs', 'strawberries', 'boxes', 'keys', 'people', 'red crosses']
    """
    if singular(name) != name:
        return name
    head, word = _last_word(name)
    low = word.lower()
    if low in _IRREGULAR:
        return head + _IRREGULAR[low]
    if low in _SAME[:3]:
        return name
    if low.endswith("y") and low[-2:-1] not in tuple("aeiou") and len(word) > 1:
        return head + word[:-1] + "ies"
    return f"{name}es" if low.endswith(("s", "x", "z", "ch", "sh")) else f"{name}s"


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


def _last_word(name: str) -> tuple[str, str]:
    head, space, word = name.rpartition(" ")
    return head + space, word
