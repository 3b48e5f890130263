"""The pool of concepts that regions are told apart by, their sentences and embeddings."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from counting_zoo.class_lists import COCO_CLASSES
from counting_zoo.errors import InputError, SupervisionError
from counting_zoo.io import read_json, read_lines, replacing, sha256, tensors_sha256
from counting_zoo.nn.text import TextTower

Wording = Literal["corrected", "official"]


TemplateSet = Literal["region_clip", "clip", "photo"]


TEMPLATES = (
    "{}.",
    "a photo of a {}.",
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)
"""The bare name, and the 80 templates that CLIP's authors published for ImageNet; "itap" is "I took a picture"."""


_SETS = {"region_clip": TEMPLATES, "clip": TEMPLATES[1:], "photo": ("a photo of a {}.",)}


def prompt_templates(templates: TemplateSet | Sequence[str] = "region_clip") -> tuple[str, ...]:
    """Return templates by the name of a set, or one's own.

    Args:
        templates: ``region_clip`` for all 81, ``clip`` for the 80 without the bare name, ``photo`` for "a photo of a
            {}." alone, or sentences with one ``{}`` each.

    Raises:
        InputError: an unknown set, no template, or one without a place for the name.

    Example:
        >>> len(prompt_templates()), len(prompt_templates("clip")), prompt_templates(["many {}"])
        (81, 80, ('many {}',))
    """
    if isinstance(templates, str):
        if templates not in _SETS:
            raise InputError(f"templates is {templates!r}; expected one of {', '.join(_SETS)}, or a list of sentences")
        return _SETS[templates]
    bad = [t for t in templates if not isinstance(t, str) or t.count("{}") != 1]
    if bad or not templates:
        found = repr(bad[0]) if bad else "no template"
        raise InputError(f"{found} among templates; expected sentences with one {{}} each, where the name goes")
    return tuple(templates)


def region_prompts(
    name: str, templates: TemplateSet | Sequence[str] = "region_clip", wording: Wording = "corrected"
) -> list[str]:
    """Put a name into each template.

    Args:
        name: such as ``traffic_light`` or ``stop+sign``.
        templates: see :func:`prompt_templates`.
        wording: ``official`` drops commas and makes a space of each plus sign. ``corrected`` also makes spaces of
            underscores, which the reference's prompts for concepts keep, and single spaces of several.

    Raises:
        InputError: an empty name, or an unknown wording.

    Example:
        >>> region_prompts("traffic_light", "photo"), region_prompts("traffic_light", "photo", "official")
        (['a photo of a traffic light.'], ['a photo of a traffic_light.'])
    """
    if wording not in ("corrected", "official"):
        raise InputError(f"wording is {wording!r}; expected 'corrected' or 'official'")
    written = name.replace(",", "").replace("+", " ")
    if wording == "corrected":
        written = " ".join(written.replace("_", " ").split())
    if not written.strip():
        raise InputError(f"an empty name ({name!r}) for a prompt; name a thing")
    return [template.replace("{}", written) for template in prompt_templates(templates)]


Ensemble = Literal["normalised", "official"]


STOP_WORDS = frozenset(
    """
    a about above across after against all along also am among an and another any are around as at away back be
    because been before behind being below beside between both but by can could did do does doing down during each
    either for from get gets getting go goes going had has have having he her hers him his how i if in inside into is
    it its itself just like made make makes making may me might more most my near next no nor not of off on one only
    onto or other others our out outside over own past s she should so some someone something such t than that the
    their them themselves then there these they this those through to together too toward towards under until up
    upon us very was we were what when where which while who whose why will with within without would you your
    many several few lot lots couple pair various different two three four five six seven eight nine ten dozen
    front side top bottom left right middle center centre end edge
    photo photos photograph picture pictures image images view shot scene close closeup close-up background
    sitting standing lying laying hanging holding wearing looking using showing walking riding playing eating
    sits stands lies holds wears looks shows filled covered shown seen taken placed parked
""".split()  # noqa: SIM905  (200 quotation marks would not help)
)
"""Stop words: never part of a concept."""


_WORD = re.compile(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*")


_PHRASE_END = re.compile(r"[^\w\s'’\-]|_|\d")


def concepts_from_captions(
    captions: Iterable[str], *, min_count: int = 100, max_words: int = 2, limit: int | None = None
) -> list[str]:
    """Collect frequent words and short phrases of captions.

    The rule: captions in lower case are cut at everything that is no letter, space, hyphen or apostrophe; in what is
    left, every run of 1 to ``max_words`` neighbouring words is a candidate if none of them is in :data:`STOP_WORDS`.
    A candidate counts once for each caption it is in. Nothing is parsed, so adjectives and verbs that are not on the
    list come along, and singular and plural are two concepts; the paper's pools are parsed nouns.

    Args:
        captions: sentences.
        min_count: captions that a concept is in at least; 100 is the paper's, for a million captions.
        max_words: words of the longest phrase.
        limit: keep this many, the most frequent ones.

    Returns:
        Names, most frequent first, then in alphabetical order.

    Raises:
        InputError: numbers below 1, or no concept is that frequent.

    Example:
        >>> concepts_from_captions(["A red fox, and a hen.", "The red fox!", "Hens."], min_count=2)
        ['fox', 'red', 'red fox']
    """
    if min_count < 1 or max_words < 1 or (limit is not None and limit < 1):
        raise InputError(f"min_count is {min_count}, max_words {max_words}, limit {limit}; expected at least 1")
    found: Counter[str] = Counter()
    for caption in captions:
        found.update(set(_candidates(caption, max_words)))
    frequent = [name for name, n in found.items() if n >= min_count]
    if not frequent:
        most = ", ".join(f"{name!r} ({n})" for name, n in found.most_common(3)) or "none"
        raise InputError(f"no concept is in {min_count} captions or more; the most frequent: {most}; lower min_count")
    return sorted(frequent, key=lambda name: (-found[name], name))[:limit]


def _candidates(caption: str, max_words: int) -> Iterator[str]:
    for part in _PHRASE_END.split(caption.lower()):
        words = _WORD.findall(part)
        for start in range(len(words)):
            for end in range(start + 1, min(start + max_words, len(words)) + 1):
                if words[end - 1] in STOP_WORDS:
                    break
                yield " ".join(words[start:end])


def concepts_from_file(path: str | Path) -> list[str]:
    """Read names out of a text file, one in each line, or a JSON list.

    Empty lines are left out, and so is a name that stood there before, with a warning that says how many.

    Raises:
        InputError: the file cannot be read, or holds no name.
    """
    file = Path(path).expanduser()
    lines = read_json(file) if file.suffix.lower() == ".json" else read_lines(file, "expected a name in each line")
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise InputError(f"{str(file)!r} holds no list of strings; expected names, one in each line or as a JSON list")
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise InputError(f"{str(file)!r} holds no name; expected one in each line")
    distinct = list(dict.fromkeys(names))
    if len(distinct) < len(names):
        warnings.warn(f"{len(names) - len(distinct)} names of {str(file)!r} stood there before", stacklevel=2)
    return distinct


def concepts_from_classes(names: Iterable[str], distractors: Iterable[str] = COCO_CLASSES) -> list[str]:
    """Collect class names of a data set, and other names that a region may be instead.

    Args:
        names: of the classes, in any order; each comes once.
        distractors: without which a region of anything else would be given a class. Those that differ from a class in
            case, underscores or spaces only are left out.

    Returns:
        The classes, then the distractors.

    Raises:
        InputError: no class, or an empty name.

    Example:
        >>> concepts_from_classes(["traffic_light", "hen"], ["Traffic light", "fox"])
        ['traffic_light', 'hen', 'fox']
    """
    classes = list(names)
    if not classes or not all(name.strip() for name in classes):
        raise InputError(f"class names are {classes[:5]}; expected at least one, and none of them empty")
    pool: dict[str, str] = {}
    for name in (*classes, *distractors):
        pool.setdefault(spelling(name), name)
    return list(pool.values())


def concept_pool(
    source: str | Sequence[str],
    captions: Sequence[str],
    classes: Sequence[str],
    *,
    distractors: Iterable[str] = COCO_CLASSES,
    min_count: int = 100,
    max_words: int = 2,
    limit: int | None = None,
) -> list[str]:
    """Build the pool of a training run, by the setting that names where it comes from.

    Args:
        source: ``captions``, ``classes``, a file as in :func:`concepts_from_file`, or the names themselves.
        captions: of the training data.
        classes: of the training data.
        distractors: as in :func:`concepts_from_classes`.
        min_count, max_words, limit: as in :func:`concepts_from_captions`.

    Raises:
        SupervisionError: concepts are to come from captions, and there are none.
        InputError: what the functions above refuse.
    """
    if not isinstance(source, str):
        return concepts_from_classes(source, ())
    if source == "captions":
        if not captions:
            raise SupervisionError(
                "concepts are to come from captions, and the training data have none; set concepts "
                "to 'classes', a file, or a list"
            )
        return concepts_from_captions(captions, min_count=min_count, max_words=max_words, limit=limit)
    return concepts_from_classes(classes, distractors) if source == "classes" else concepts_from_file(source)


def spelling(name: str) -> str:
    """Normalise the case, underscores and spaces of a name.

    Example:
        >>> spelling("Traffic_light ")
        'traffic light'
    """
    return " ".join(name.replace("_", " ").lower().split())


def embed_concepts(
    encode: Callable[[Sequence[str]], Tensor],
    names: Sequence[str],
    templates: TemplateSet | Sequence[str] = "region_clip",
    *,
    wording: Wording = "corrected",
    ensemble: Ensemble = "normalised",
    together: int = 256,
) -> Tensor:
    """Embed each name, from its sentences.

    Args:
        encode: ``list[str] -> (n, D)``, such as a :class:`~counting_zoo.nn.text.TextTower` in evaluation.
        names: the pool.
        templates, wording: see :func:`~counting_zoo.models.region_clip.concepts.region_prompts`.
        ensemble: ``normalised`` is the mean direction, as CLIP's authors have it: normalise, mean, normalise.
            ``official`` is the mean of the features as they are (tools/extract_concept_features.py:116), in which a
            longer feature weighs more; it is not normalised, as its cosines do not need it.
        together: prompts that are encoded together, at least.

    Returns:
        ``(len(names), D)`` float32 without gradient.

    Raises:
        InputError: no name, an empty one, two with the same prompts, or a setting out of range.
    """
    if ensemble not in ("normalised", "official"):
        raise InputError(f"ensemble is {ensemble!r}; expected 'normalised' or 'official'")
    sentences = prompt_templates(templates)
    _check_distinct(names, sentences, wording)
    step, rows = max(1, together // len(sentences)), []
    for first in range(0, len(names), step):
        group = names[first : first + step]
        prompts = [prompt for name in group for prompt in region_prompts(name, sentences, wording)]
        # Without gradients a TextTower runs prompts one by one and remembers each: too slow and too much for a pool.
        with torch.enable_grad():
            features = encode(prompts).detach().float()
        features = features.unflatten(0, (len(group), len(sentences)))  # (names, templates, D)
        if ensemble == "official":
            rows.append(features.mean(1))
        else:
            rows.append(normalize(normalize(features, dim=2).mean(1), dim=1))
    return torch.cat(rows)


def trained_concepts(
    encode: Callable[[Sequence[str]], Tensor],
    names: Sequence[str],
    templates: TemplateSet | Sequence[str],
    *,
    wording: Wording,
    ensemble: Ensemble,
) -> Tensor:
    """Embed names as :func:`embed_concepts` does, ``(len(names), D)``, with gradient and not normalised."""
    prompts = [prompt for name in names for prompt in region_prompts(name, templates, wording)]
    features = encode(prompts).unflatten(0, (len(names), -1))  # (names, templates, D)
    return (normalize(features.float(), dim=2) if ensemble == "normalised" else features).mean(1)


def _check_distinct(names: Sequence[str], templates: Sequence[str], wording: Wording) -> None:
    if not names:
        raise InputError("the pool has no concept; give it at least one")
    seen: dict[str, str] = {}
    for name in names:
        prompt = region_prompts(name, templates[:1], wording)[0]
        if prompt in seen:
            raise InputError(f"the concepts {seen[prompt]!r} and {name!r} have the same prompts ({prompt!r}); drop one")
        seen[prompt] = name


def _text_fingerprint(tower: TextTower, prompts: Sequence[str]) -> str:
    """Hash all that decides about embeddings but the prompts: weights, tokenizer, where the feature is read.

    Args:
        tower: with its tokenizer.
        prompts: some that will be asked; the tokenizer is known by their ids.

    Raises:
        InputError: the tower has no tokenizer.
    """
    if tower.tokenizer is None:
        raise InputError("this text tower has no tokenizer yet: give it one (set_tokenizer)")
    return tensors_sha256(tower.pool, [*tower.state_dict().items(), ("ids", tower.tokenizer(prompts)[0])])


def cached_concepts(
    folder: str | Path,
    tower: TextTower,
    names: Sequence[str],
    templates: TemplateSet | Sequence[str] = "region_clip",
    *,
    wording: Wording = "corrected",
    ensemble: Ensemble = "normalised",
) -> Tensor:
    """Apply :func:`embed_concepts` once for names, templates and weights, and read the result from a file then.

    The file is ``concepts-<hash>.safetensors``, and appears whole or not at all, so that several processes may share
    the folder. One that cannot be read, or is of something else, is written anew with a warning.

    Args:
        folder: is made if it is not there.
        tower: in evaluation, with its tokenizer.
        names, templates, wording, ensemble: as in :func:`embed_concepts`.

    Returns:
        ``(len(names), D)`` float32 on the device of the tower.

    Raises:
        InputError: what :func:`embed_concepts` refuses, a tower without tokenizer, or a folder that cannot be made.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    sentences = prompt_templates(templates)
    _check_distinct(names, sentences, wording)
    first = [region_prompts(name, sentences[:1], wording)[0] for name in names]
    fingerprint = _text_fingerprint(tower, [*first, *region_prompts(names[0], sentences, wording)])
    content = json.dumps([list(names), sentences, wording, ensemble, fingerprint])
    key = sha256(content)
    path = Path(folder).expanduser() / f"concepts-{key[:16]}.safetensors"
    device = tower.projection.weight.device
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") == key:
                    return file.get_tensor("embeddings").to(device)
            reason = "it was made from something else"
        except (SafetensorError, OSError) as error:
            reason = str(error)
        warnings.warn(f"{str(path)!r} is written anew: {reason}", stacklevel=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"embeddings of concepts cannot be kept in {str(path.parent)!r}: {error}") from error
    found = embed_concepts(tower, names, sentences, wording=wording, ensemble=ensemble)
    with replacing(path) as temporary:
        save_file({"embeddings": found.cpu().contiguous()}, temporary, {"key": key})
    return found
