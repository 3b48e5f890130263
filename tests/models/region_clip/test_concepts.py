"""Prompts and concepts: the reference's templates and ids, counting by hand, ensembles by loops, the cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_clip
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN
from torch import Tensor

from counting_zoo.class_lists import COCO_CLASSES
from counting_zoo.errors import InputError
from counting_zoo.models.region_clip import concepts as concepts_module
from counting_zoo.models.region_clip.concepts import (
    STOP_WORDS,
    TEMPLATES,
    cached_concepts,
    concepts_from_captions,
    concepts_from_classes,
    concepts_from_file,
    embed_concepts,
    prompt_templates,
    region_prompts,
)
from counting_zoo.nn.text import TextTower, word_tokenizer

GOLDEN_FILE = GOLDEN / "region_clip.pt"
TWO = ["a photo of {}", "{} beside it"]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN_FILE, weights_only=True)


def tower(seed: int = 0, words: Sequence[str] = tiny_clip.NAMES, **options: Any) -> TextTower:
    """A random text tower in evaluation."""
    clip = tiny_clip.tower()
    torch.manual_seed(seed)
    for p in clip.text_projection.parameters():
        p.data.normal_()
    text = TextTower(clip, **{"n_context": 0, "pool": "eot", "train": False, **options}).eval()
    text.set_tokenizer(word_tokenizer(words, 320))
    return text


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_templates_are_the_references(golden: dict[str, Any]) -> None:
    assert list(TEMPLATES) == golden["templates"]
    assert len(set(TEMPLATES)) == 81
    assert prompt_templates("clip") == TEMPLATES[1:]
    assert "{}." not in prompt_templates("clip")


def test_prompts_are_the_references(golden: dict[str, Any]) -> None:
    names = golden["prompts"]["names"]
    assert [region_prompts(name, "photo", "official")[0] for name in names] == golden["prompts"]["first"]


def test_prompts_have_the_structure_of_the_references_ids(golden: dict[str, Any]) -> None:
    """Without its vocabulary: what stands before and behind the name, and the name, have ids of their own."""
    names, begin, end = golden["prompts"]["names"], 49406, 49407
    rows = [[row[: row.tolist().index(end) + 1].tolist() for row in own] for own in golden["prompts"]["ids"]]
    frames: dict[tuple[str, str], tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for n, name in enumerate(names):
        prompts = region_prompts(name, wording="official")
        written = prompts[0].removesuffix(".")
        bare = rows[n][0][1:-2]  # "{}." without begin, full stop and end
        assert len(bare) == len(re.findall(r"'s|[a-z]+|[^\sa-z]", written)), "each word of these names is one token"
        for template, prompt, row in zip(TEMPLATES, prompts, rows[n], strict=True):
            before, behind = template.split("{}")
            assert prompt == before + written + behind
            start = next(i for i in range(len(row)) if row[i : i + len(bare)] == bare)
            frame = (tuple(row[:start]), tuple(row[start + len(bare) :]))
            assert frames.setdefault((before, behind), frame) == frame
            assert row[0] == begin
    assert len(frames) == len(set(frames.values())) == 81


def test_wording() -> None:
    assert region_prompts("traffic_light", ["a {}!"]) == ["a traffic light!"]
    assert region_prompts("traffic_light", ["a {}!"], "official") == ["a traffic_light!"]
    for wording in ("corrected", "official"):
        assert region_prompts("stop+sign", ["{}"], wording) == ["stop sign"]
        assert region_prompts("dinosaur, toy", ["{}"], wording) == ["dinosaur toy"]
    assert region_prompts("  a__b ", ["{}"]) == ["a b"]
    assert region_prompts("{0} {}", ["a {}."]) == ["a {0} {}."]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hen", "imagenet"), "'imagenet'"),
        (("hen", []), "templates"),
        (("hen", ["a {}", "a hen"]), "'a hen'"),
        (("hen", ["{} and {}"]), "'{} and {}'"),
        (("hen", "photo", "right"), "wording"),
        ((" , ", "photo"), "' , '"),
        (("_", "photo"), "'_'"),
    ],
)
def test_prompts_that_cannot_be(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        region_prompts(*arguments)


# -- where names come from --------------------------------------------------------------------------------------------


def naive_counts(captions: list[list[list[str]]], max_words: int) -> dict[str, int]:
    """Of captions that are already parts of words: every window of words that holds no stop word."""
    found: dict[str, int] = {}
    for parts in captions:
        windows = {
            tuple(part[i : i + n]) for part in parts for n in range(1, max_words + 1) for i in range(len(part) - n + 1)
        }
        for window in windows:
            if not STOP_WORDS & set(window):
                found[" ".join(window)] = found.get(" ".join(window), 0) + 1
    return found


words = st.sampled_from(["fox", "Hen", "red", "the", "of", "two", "bird's", "x-ray", "Öl"])
parts_of_captions = st.lists(st.lists(st.lists(words, max_size=5), max_size=3), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(captions=parts_of_captions, max_words=st.integers(1, 3), min_count=st.integers(1, 3))
def test_captions_against_windows(captions: list[list[list[str]]], max_words: int, min_count: int) -> None:
    texts = [", ".join(" ".join(part) for part in parts) for parts in captions]
    lowered = [[[word.lower() for word in part] for part in parts] for parts in captions]
    counts = naive_counts(lowered, max_words)
    expected = sorted((name for name, n in counts.items() if n >= min_count), key=lambda name: (-counts[name], name))
    if not expected:
        with pytest.raises(InputError, match="min_count"):
            concepts_from_captions(texts, min_count=min_count, max_words=max_words)
        return
    assert concepts_from_captions(texts, min_count=min_count, max_words=max_words) == expected
    assert concepts_from_captions(texts, min_count=min_count, max_words=max_words, limit=1) == expected[:1]


def test_phrases_do_not_cross_punctuation_digits_or_stop_words() -> None:
    found = concepts_from_captions(["Red fox; hen 2 owls/cats (a dog) with bones_of cow"], min_count=1, max_words=3)
    assert {name for name in found if " " in name} == {"red fox"}
    assert {"hen", "owls", "cats", "dog", "bones", "cow"} <= set(found)
    assert concepts_from_captions(["A fox, a fox, a fox", "a hen", "the hen"], min_count=1) == ["hen", "fox"]


def test_captions_without_frequent_concepts_say_what_there_is() -> None:
    with pytest.raises(InputError, match="'hen'"):
        concepts_from_captions(["a hen", "the hen"])
    with pytest.raises(InputError, match="100 captions"):
        concepts_from_captions([])
    for numbers in ({"min_count": 0}, {"max_words": 0}, {"limit": 0}):
        with pytest.raises(InputError, match="min_count"):
            concepts_from_captions(["a hen"], **numbers)


def test_file_of_names(tmp_path: Path) -> None:
    lines, listed = tmp_path / "nouns.txt", tmp_path / "nouns.JSON"
    lines.write_bytes("\ufefftraffic light\r\n\r\n  hen \r\nÖl\r\n".encode())
    listed.write_text('["traffic light", "hen"]')
    assert concepts_from_file(lines) == ["traffic light", "hen", "Öl"]
    assert concepts_from_file(str(listed)) == ["traffic light", "hen"]
    lines.write_text("hen\nfox\nhen\nhen\n")
    with pytest.warns(UserWarning, match=r"nouns\.txt"):
        assert concepts_from_file(lines) == ["hen", "fox"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "a.txt"),
        ("a.txt", b"\n \n", "a.txt"),
        ("a.txt", b"\xff\xfe\x00", "utf-8"),
        ("a.json", b'["hen"', "a.json"),
        ("a.json", b'{"hen": 3}', "a.json"),
        ("a.json", b"[1, 2]", "a.json"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        concepts_from_file(tmp_path / name)


def test_classes_and_distractors() -> None:
    found = concepts_from_classes(["hen", "Traffic_Light", "hen"])
    assert found[:2] == ["hen", "Traffic_Light"]
    assert found[2:] == [name for name in COCO_CLASSES if name != "traffic light"]
    assert concepts_from_classes(["hen"], ()) == ["hen"]
    for bad in ([], ["hen", " "]):
        with pytest.raises(InputError, match="class names"):
            concepts_from_classes(bad)


# -- embeddings -------------------------------------------------------------------------------------------------------


def counting(calls: list[list[str]]) -> Any:
    """An encoder that writes down what it is asked, and gives each prompt a vector of its own length."""

    def encode(prompts: Sequence[str]) -> Tensor:
        calls.append(list(prompts))
        rows = [torch.Generator().manual_seed(sum(map(ord, p))) for p in prompts]
        return torch.stack([(1 + len(p)) * torch.randn(4, generator=g) for p, g in zip(prompts, rows, strict=True)])

    return encode


@pytest.mark.parametrize("ensemble", ["normalised", "official"])
@pytest.mark.parametrize("together", [1, 4, 1000])
def test_ensembles_by_loops(ensemble: Any, together: int) -> None:
    names, calls = ["hen", "red fox", "stop_sign"], list[list[str]]()
    found = embed_concepts(counting(calls), names, TWO, ensemble=ensemble, together=together)
    assert [len(call) for call in calls] == {1: [2, 2, 2], 4: [4, 2], 1000: [6]}[together]
    for name, row in zip(["hen", "red fox", "stop sign"], found, strict=True):
        features = [counting([])([template.replace("{}", name)])[0] for template in TWO]
        if ensemble == "official":
            expected = sum(features) / 2
        else:
            mean = sum(f / f.norm() for f in features) / 2
            expected = mean / mean.norm()  # type: ignore[union-attr]
        torch.testing.assert_close(row, expected)


def test_the_two_ensembles_point_elsewhere_only_where_lengths_differ() -> None:
    mean = embed_concepts(counting([]), ["hen", "fox"], TWO, ensemble="official")
    other = embed_concepts(counting([]), ["hen", "fox"], TWO)
    assert bool((torch.cosine_similarity(mean, other) < 0.999).any())
    torch.testing.assert_close(other.norm(dim=1), torch.ones(2))
    one = embed_concepts(counting([]), ["hen"], "photo", ensemble="official")
    torch.testing.assert_close(one / one.norm(), embed_concepts(counting([]), ["hen"], "photo"))


def test_a_text_tower_encodes_a_pool_in_batches_and_remembers_none_of_it() -> None:
    text, ran = tower(), list[int]()
    text.model.encoder.layers[0].register_forward_pre_hook(lambda _, given: ran.append(len(given[0])))
    with torch.no_grad():
        found = embed_concepts(text, tiny_clip.NAMES, TWO, together=4)
        assert ran == [4, 4, 4]
        assert not text._cache
        rows = torch.stack([torch.nn.functional.normalize(text([t.replace("{}", "pears") for t in TWO]), dim=1)])
    assert not found.requires_grad
    expected = torch.nn.functional.normalize(rows.mean(1), dim=1)[0]
    torch.testing.assert_close(found[tiny_clip.NAMES.index("pears")], expected, rtol=1e-4, atol=1e-5)


def test_pools_that_cannot_be_embedded() -> None:
    encode = counting([])
    with pytest.raises(InputError, match="concept"):
        embed_concepts(encode, [])
    with pytest.raises(InputError, match="stop_sign"):
        embed_concepts(encode, ["stop_sign", "hen", "stop sign"])
    assert len(embed_concepts(encode, ["stop_sign", "stop sign"], "photo", wording="official")) == 2
    with pytest.raises(InputError, match="ensemble"):
        embed_concepts(encode, ["hen"], ensemble="mean")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="''"):
        embed_concepts(encode, ["hen", ""])


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pools were calculated, by their size."""
    made, calculate = list[int](), embed_concepts

    def counted(encode: Any, names: Sequence[str], *given: Any, **options: Any) -> Tensor:
        made.append(len(names))
        return calculate(encode, names, *given, **options)

    monkeypatch.setattr(concepts_module, "embed_concepts", counted)
    return made


def test_the_second_time_is_read(tmp_path: Path, calls: list[int]) -> None:
    folder = tmp_path / "deep" / "cache"
    first = cached_concepts(folder, tower(), ["pears", "forks"], TWO)
    second = cached_concepts(folder, tower(), ["pears", "forks"], TWO)
    assert calls == [2]
    assert torch.equal(first, second)
    assert torch.equal(first, embed_concepts(tower(), ["pears", "forks"], TWO))
    assert [file.suffix for file in folder.iterdir()] == [".safetensors"]


def test_all_that_decides_makes_another_file(tmp_path: Path, calls: list[int]) -> None:
    names = ["pears", "sea_shells"]
    variants: list[tuple[TextTower, list[str], Any, dict[str, Any]]] = [
        (tower(), names, TWO, {}),
        (tower(), names[::-1], TWO, {}),
        (tower(), names, TWO[::-1], {}),
        (tower(), names, TWO, {"wording": "official"}),
        (tower(), names, TWO, {"ensemble": "official"}),
        (tower(1), names, TWO, {}),
        (tower(words=["spoons", "pear", "shell"]), names, TWO, {}),
        (tower(pool="words"), names, TWO, {}),
    ]
    found = [cached_concepts(tmp_path, *given, **options) for *given, options in variants]
    assert len(calls) == len(list(tmp_path.iterdir())) == len(variants)
    again = [cached_concepts(tmp_path, *given, **options) for *given, options in variants]
    assert len(calls) == len(variants)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_file_that_is_not_what_it_should_be_is_written_anew(tmp_path: Path, calls: list[int], damage: str) -> None:
    expected = cached_concepts(tmp_path, tower(), ["pears"], TWO)
    (file,) = tmp_path.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        cached_concepts(tmp_path / "other", tower(1), ["pears"], TWO)
        file.write_bytes(next((tmp_path / "other").iterdir()).read_bytes())
    calls.clear()
    with pytest.warns(UserWarning, match="safetensors"):
        assert torch.equal(cached_concepts(tmp_path, tower(), ["pears"], TWO), expected)
    assert torch.equal(cached_concepts(tmp_path, tower(), ["pears"], TWO), expected)
    assert calls == [1]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="taken"):
        cached_concepts(tmp_path / "taken", tower(), ["pears"], TWO)


def test_fingerprint() -> None:
    text = tower()
    fingerprint = concepts_module._text_fingerprint
    same = fingerprint(text, ["pears"])
    assert fingerprint(tower(), ["pears"]) == same
    with torch.no_grad():
        text.model.final_layer_norm.bias[3] += 1e-7
    assert fingerprint(text, ["pears"]) != same
    text.tokenizer = None
    with pytest.raises(InputError, match="tokenizer"):
        fingerprint(text, ["pears"])
