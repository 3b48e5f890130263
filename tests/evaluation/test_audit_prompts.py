"""Other ways to ask for a name."""

from __future__ import annotations

import pytest

from counting_zoo.evaluation.audit_prompts import EMPTY, NONSENSE, plural, singular, variants


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("red disc", "red discs"),
        ("cross", "crosses"),
        ("striped white ring", "striped white rings"),
        ("strawberry", "strawberries"),
        ("key", "keys"),
        ("beach umbrella", "beach umbrellas"),
        ("peach", "peaches"),
        ("leaf", "leaves"),
        ("person", "people"),
        ("sheep", "sheep"),
        ("glass", "glasses"),
        ("grape", "grapes"),
        ("bus", "buses"),
        ("potato", "potatoes"),
        ("pair of scissors", "pair of scissors"),
        ("series", "series"),
    ],
)
def test_one_and_many(one: str, many: str) -> None:
    assert singular(many) == one
    assert plural(one) == many
    assert singular(one) == one
    assert plural(many) == many


@pytest.mark.parametrize("name", ["red discs", "a", "APPLES", "Äpfel", "ty", "s"])
def test_every_variant_is_another_text_that_models_take(name: str) -> None:
    found = variants(name)
    assert len(found["paraphrase"]) == 10
    for kind, prompts in found.items():
        assert len(set(prompts)) == len(prompts), kind
        assert name not in prompts
        assert all(prompt.strip() for prompt in prompts)
    assert all(prompt.strip() for prompt in (*EMPTY, *NONSENSE))
