"""Sentences about names: CLIP's templates, and how a name is written into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from counting_zoo.errors import InputError

Wording = Literal["corrected", "official"]
TemplateSet = Literal["region_clip", "clip", "photo"]

TEMPLATES = (
    "{}.", "a photo of a {}.", "a bad photo of a {}.", "a photo of many {}.", "a sculpture of a {}.",
    "a photo of the hard to see {}.", "a low resolution photo of the {}.", "a rendering of a {}.",
    "graffiti of a {}.", "a bad photo of the {}.", "a cropped photo of the {}.", "a tattoo of a {}.",
    "the embroidered {}.", "a photo of a hard to see {}.", "a bright photo of a {}.", "a photo of a clean {}.",
    "a photo of a dirty {}.", "a dark photo of the {}.", "a drawing of a {}.", "a photo of my {}.", "the plastic {}.",
    "a photo of the cool {}.", "a close-up photo of a {}.", "a black and white photo of the {}.",
    "a painting of the {}.", "a painting of a {}.", "a pixelated photo of the {}.", "a sculpture of the {}.",
    "a bright photo of the {}.", "a cropped photo of a {}.", "a plastic {}.", "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.", "a blurry photo of the {}.", "a photo of the {}.", "a good photo of the {}.",
    "a rendering of the {}.", "a {} in a video game.", "a photo of one {}.", "a doodle of a {}.",
    "a close-up photo of the {}.", "the origami {}.", "the {} in a video game.", "a sketch of a {}.",
    "a doodle of the {}.", "a origami {}.", "a low resolution photo of a {}.", "the toy {}.",
    "a rendition of the {}.", "a photo of the clean {}.", "a photo of a large {}.", "a rendition of a {}.",
    "a photo of a nice {}.", "a photo of a weird {}.", "a blurry photo of a {}.", "a cartoon {}.", "art of a {}.",
    "a sketch of the {}.", "a embroidered {}.", "a pixelated photo of a {}.", "itap of the {}.",
    "a jpeg corrupted photo of the {}.", "a good photo of a {}.", "a plushie {}.", "a photo of the nice {}.",
    "a photo of the small {}.", "a photo of the weird {}.", "the cartoon {}.", "art of the {}.",
    "a drawing of the {}.", "a photo of the large {}.", "a black and white photo of a {}.", "the plushie {}.",
    "a dark photo of a {}.", "itap of a {}.", "graffiti of the {}.", "a toy {}.", "itap of my {}.",
    "a photo of a cool {}.", "a photo of a small {}.", "a tattoo of the {}.",
)  # fmt: skip
"""The bare name, and the 80 templates that CLIP's authors published for ImageNet; "itap" is "I took a picture"."""

_SETS = {"region_clip": TEMPLATES, "clip": TEMPLATES[1:], "photo": ("a photo of a {}.",)}


def prompt_templates(templates: TemplateSet | Sequence[str] = "region_clip") -> tuple[str, ...]:
    """Templates by the name of a set, or one's own.

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
    """A name in each template.

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


__all__ = ["TEMPLATES", "TemplateSet", "Wording", "prompt_templates", "region_prompts"]
