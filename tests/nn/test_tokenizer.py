"""Ids and ends of prompts from every kind of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.nn.text import Tokenizer, word_tokenizer

WORDS = ["red apples", "green pears", "sea shells"]


def lookup(prompts: list[str]) -> Tensor:
    """Begin 98, the length of each word, end 99, zeros behind."""
    ids = torch.zeros(len(prompts), 77, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        found = [98, *[len(word) for word in prompt.split()][:75], 99]
        row[: len(found)] = torch.tensor(found)
    return ids


def test_words_of_the_data_are_one_token_each_and_anything_else_still_encodes() -> None:
    hf = word_tokenizer(WORDS, 320)
    ids, ends = Tokenizer(hf, 24)(["red apples", "green pears"])
    assert ids.shape == (2, 4)
    assert ends.tolist() == [3, 3]
    assert ids[:, 0].tolist() == [hf.bos_token_id] * 2
    assert ids[:, 3].tolist() == [hf.eos_token_id] * 2
    assert len(set(ids[:, 1:3].flatten().tolist())) == 4
    for text in ("🍎🍏", "苹果", "Äpfel", "яблоки", "a-b_c/d", "apple"):
        (row,), (end,) = Tokenizer(hf, 24)([text])
        assert hf.decode(row[1:end]).strip() == text.lower()


@pytest.mark.parametrize(("one", "other", "same"), [("Red Apples", "red apples", True), ("pear", "pears", False)])
def test_case_does_not_matter_and_plural_does(one: str, other: str, same: bool) -> None:
    ids, _ = Tokenizer(word_tokenizer([*WORDS, "pear"], 320), 24)([one, other])
    assert torch.equal(ids[0], ids[1]) == same


def test_vocabulary_too_small_for_every_byte() -> None:
    with pytest.raises(InputError, match="vocab_size"):
        word_tokenizer(WORDS, 100)


def test_padding_is_on_the_right_and_callables_are_cut_at_their_end() -> None:
    ids, ends = Tokenizer(lookup, 77)(["a bb", "a bb ccc dddd"])
    assert ids.tolist() == [[98, 1, 2, 99, 0, 0], [98, 1, 2, 3, 4, 99]]
    assert ends.tolist() == [3, 5]


@pytest.mark.parametrize("kind", ["huggingface", "callable"])
def test_long_prompts_keep_their_end_of_text_and_warn(kind: str) -> None:
    source = word_tokenizer(WORDS, 320) if kind == "huggingface" else lookup
    tokenizer = Tokenizer(source, 10)
    prompt = " ".join(["red apples"] * 250)
    with pytest.warns(UserWarning, match="red apples"):
        ids, ends = tokenizer([prompt])
    assert ids.shape == (1, 10)
    assert ends.tolist() == [9]
    assert int(ids[0, 9]) == (99 if kind == "callable" else source.eos_token_id)


def test_warning_names_what_is_kept() -> None:
    with pytest.warns(UserWarning, match="'red apples red'"):
        Tokenizer(word_tokenizer(WORDS, 320), 5)(["red apples red apples red apples"])


@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
def test_empty_prompts(prompt: str) -> None:
    with pytest.raises(InputError, match="pears"):
        Tokenizer(lookup, 77)(["pears", prompt])


@pytest.mark.parametrize("source", [word_tokenizer(WORDS, 320), lookup], ids=["huggingface", "callable"])
def test_json_gives_the_same_ids(source: object) -> None:
    tokenizer, prompts = Tokenizer(source, 24), ["red apples", "sea pears"]
    ids, ends = tokenizer(prompts)
    again, again_ends = Tokenizer(tokenizer.to_json(), 24)(prompts)
    assert torch.equal(ids, again)
    assert torch.equal(ends, again_ends)


def test_checkpoint_of_a_callable_knows_only_what_was_asked() -> None:
    tokenizer = Tokenizer(lookup, 77)
    tokenizer(["pears"])
    stored = Tokenizer(tokenizer.to_json(), 77)
    with pytest.raises(InputError, match="forks"):
        stored(["forks"])


def test_folders(tmp_path: Path) -> None:
    hf = word_tokenizer(WORDS, 320)
    hf.save_pretrained(tmp_path / "own")
    ids, _ = Tokenizer(str(tmp_path / "own"), 24)(["red apples"])
    assert torch.equal(ids, Tokenizer(hf, 24)(["red apples"])[0])
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", "nobody/nothing"):  # no hub is asked for the second: tests are offline
        with pytest.raises(WeightsError, match=r"tokenizer\.json"):
            Tokenizer(name, 24)


def test_tokenizers_that_cannot_be_meant() -> None:
    with pytest.raises(InputError, match="tokenizer"):
        Tokenizer(3, 24)
    bare = word_tokenizer(WORDS, 320)
    stored = json.loads(bare.backend_tokenizer.to_str())
    stored["post_processor"] = None
    text = json.dumps({"tokenizer": stored, "special": {"eos_token": bare.eos_token, "bos_token": bare.bos_token}})
    with pytest.raises(InputError, match="pears"):
        Tokenizer(text, 24)(["pears"])
