"""The text tower: where it is read, what it remembers, and that cutting and caching change nothing."""

from __future__ import annotations

import pytest
import tiny_clip
import torch
from tiny_clip import NAMES
from torch import Tensor, nn

from counting_zoo.errors import InputError
from counting_zoo.nn.text import TextPool, TextTower, word_tokenizer


def tower(pool: TextPool = "eot", n_context: int = 2, *, train: bool = False) -> TextTower:
    torch.manual_seed(1)
    text = TextTower(tiny_clip.tower(), n_context=n_context, pool=pool, train=train).eval()
    text.set_tokenizer(word_tokenizer(NAMES, 320))
    return text


def naive(text: TextTower, prompt: str) -> Tensor:
    """``(context_length, D)`` features of all positions, of one prompt padded to the full context."""
    assert text.tokenizer is not None
    ids = torch.zeros(1, text.context_length, dtype=torch.int64)
    row = text.tokenizer([prompt])[0][0]
    ids[0, : len(row)] = row
    x = text.model.embeddings.token_embedding(ids)
    if text.context is not None:
        x = torch.cat([x[:, :1], text.context[None], x[:, 1:]], 1)[:, : text.context_length]
    x = x + text.model.embeddings.position_embedding.weight
    mask = torch.full((text.context_length,) * 2, -torch.inf).triu(1)[None, None]
    for layer in text.model.encoder.layers:
        x = layer(x, mask)
    return text.projection(text.model.final_layer_norm(x))[0]


@pytest.mark.parametrize("pool", ["eot", "official", "words"])
@pytest.mark.parametrize("n_context", [0, 2])
@torch.no_grad()
def test_cut_at_the_end_equals_the_full_context(pool: TextPool, n_context: int) -> None:
    text = tower(pool, n_context)
    pooled, tokens = text.encode(["pears", "red apples"])
    for i, (prompt, n_words) in enumerate([("pears", 1), ("red apples", 2)]):
        full = naive(text, prompt)
        end = 1 + n_words + n_context
        expected = {
            "eot": full[end],
            "official": full[1 + n_words],
            "words": full[1 + n_context : end].mean(0),
        }[pool]
        torch.testing.assert_close(pooled[i], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(tokens[i, : end + 1], full[: end + 1], rtol=0, atol=1e-6)
        assert not tokens[i, end + 1 :].any()


@torch.no_grad()
def test_one_token_prompts_differ_by_default_and_not_in_the_reference() -> None:
    right, wrong = tower("eot")(["pears", "forks"]), tower("official")(["pears", "forks"])
    assert (right[0] - right[1]).abs().max() > 0.01
    assert torch.equal(wrong[0], wrong[1])
    without_context = tower("official", 0)(["pears", "forks"])
    assert (without_context[0] - without_context[1]).abs().max() > 0.01


@torch.no_grad()
def test_last_word_counts() -> None:
    right, wrong = tower("eot")(["red apples", "red pears"]), tower("official")(["red apples", "red pears"])
    assert (right[0] - right[1]).abs().max() > 0.01
    assert torch.equal(wrong[0], wrong[1])


def count_runs(text: TextTower, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every list of prompts that goes through the transformer from now on."""
    runs: list[list[str]] = []
    own = text._run
    monkeypatch.setattr(text, "_run", lambda prompts: runs.append(prompts) or own(prompts))
    return runs


def test_each_distinct_prompt_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = tower()
    runs = count_runs(text, monkeypatch)
    with torch.no_grad():
        first = text(["pears", "forks", "pears"])
        again = text(["forks", "pears", "spoons"])
    assert [p for run in runs for p in run] == ["pears", "forks", "spoons"]
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[:2].flip(0), again[:2])
    text.train()
    runs.clear()
    text(["pears", "forks", "pears"])
    assert runs == [["pears", "forks"]]


def test_cached_equals_uncached_equals_training() -> None:
    text = tower()
    with torch.no_grad():
        cached = [text(NAMES), text(NAMES)][1]
        alone = torch.cat([tower()([name]) for name in NAMES])
    assert torch.equal(cached, alone)
    torch.testing.assert_close(text(NAMES), alone, rtol=0, atol=1e-6)  # all together, with gradients


def change_by_load(text: TextTower) -> None:
    text.load_state_dict({k: v + 0.1 for k, v in text.state_dict().items()})


def change_by_training(text: TextTower) -> None:
    text.train()
    with torch.no_grad():
        text(["pears"])  # nothing of this may be remembered
        assert text.context is not None
        text.context += torch.randn_like(text.context)
    text.eval()


def change_in_evaluation_mode(text: TextTower) -> None:
    """A loaded model that trains without its mode being set."""
    with torch.enable_grad():
        text(["pears"]).sum().backward()
    assert text.context is not None
    text.context += torch.randn_like(text.context)


def change_by_moving(text: TextTower) -> None:
    text.double()


@pytest.mark.parametrize("change", [change_by_load, change_by_training, change_by_moving, change_in_evaluation_mode])
@torch.no_grad()
def test_cache_never_outlives_the_weights(change: object) -> None:
    text = tower()
    before = text(["pears"])
    change(text)  # type: ignore[operator]
    after = text(["pears"])
    text._cache.clear()
    assert torch.equal(after, text(["pears"]))
    assert before.dtype != after.dtype or not torch.allclose(before, after, atol=1e-3)


@torch.no_grad()
def test_cache_keeps_precisions_apart() -> None:
    text = tower()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = text(["pears"])
    exact = text(["pears"])
    assert torch.equal(exact, tower()(["pears"]))
    assert not torch.equal(lowered.float(), exact)


@pytest.mark.parametrize("train", [False, True])
def test_gradients_reach_the_context_and_the_tower_only_where_it_trains(train: bool) -> None:
    text = tower(train=train)
    text(["pears", "red apples"]).square().sum().backward()
    assert text.context is not None
    assert text.context.grad is not None
    assert (text.context.grad.abs().sum(1) > 0).all()
    for name, p in text.model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == train or "k_proj.bias" in name, name


def test_a_long_prompt_is_read_at_its_end() -> None:
    text = tower()
    with pytest.warns(UserWarning, match="22"), torch.no_grad():
        found = text(["pears " * 500])
    assert text.tokenizer is not None
    ids, ends = text.tokenizer(["pears " * 20])
    assert ids.shape[1] == 22
    assert ends.tolist() == [21]
    assert torch.isfinite(found).all()


def test_what_cannot_be_encoded() -> None:
    text = TextTower(tiny_clip.tower(), n_context=0, pool="eot", train=False)
    with pytest.raises(InputError, match="tokenizer"):
        text(["pears"])
    text.set_tokenizer(lambda prompts: torch.tensor([[998, 5, 999]] * len(prompts)))
    with pytest.raises(InputError, match="999"):
        text(["pears"])
    with pytest.raises(InputError, match="text_pool"):
        TextTower(tiny_clip.tower(), n_context=0, pool="last", train=False)  # type: ignore[arg-type]
    assert isinstance(text.model.encoder.layers, nn.ModuleList)
