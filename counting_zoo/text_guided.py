"""What models that read texts share: a tokenizer that goes into the checkpoint, and the names of training."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from counting_zoo.module import CountingModule
from counting_zoo.nn.text import TextTower
from counting_zoo.nn.tokenizer import TokenizerLike, word_tokenizer
from counting_zoo.training import TrainingModule


class TextModule(TrainingModule):
    """Trains with a text tower, whose tokenizer is given, or made of the texts of its training data."""

    #: Whether the tokenizer was made here, of texts that this run has seen.
    _tokenizer_is_made = False

    @property
    @abstractmethod
    def text_tower(self) -> TextTower:
        """What embeds texts."""

    def set_tokenizer(self, source: TokenizerLike) -> None:
        """Use a HuggingFace tokenizer, a folder, a hub name, or a callable ``list[str] -> (B, L)`` ids."""
        self.text_tower.set_tokenizer(source)

    def make_tokenizer(self, texts: Sequence[str]) -> None:
        """Use a tokenizer made of the words of some texts, until a checkpoint brings its own."""
        vocab_size = self.text_tower.model.embeddings.token_embedding.num_embeddings
        self.set_tokenizer(word_tokenizer(texts, vocab_size))
        self._tokenizer_is_made = True

    def recipe(self) -> dict[str, Any]:
        tokenizer = self.text_tower.tokenizer
        return super().recipe() | {"tokenizer": None if tokenizer is None else tokenizer.to_json()}

    def restore_recipe(self, recipe: dict[str, Any]) -> None:
        super().restore_recipe(recipe)
        # A tokenizer given by the caller wins over the one that was saved, but not one made of this run's texts.
        missing = self.text_tower.tokenizer is None or self._tokenizer_is_made
        if missing and recipe["tokenizer"] is not None:
            self.set_tokenizer(recipe["tokenizer"])
            self._tokenizer_is_made = False


class TextGuidedModule(CountingModule, TextModule):
    """Counts what a name says; subclasses set ``train_classes`` to an empty list where they begin."""

    text_guided: ClassVar[bool] = True
    #: Names of the training data, which its checkpoint keeps.
    train_classes: list[str]

    @abstractmethod
    def prompts_of(self, name: str) -> list[str]:
        """The texts that are embedded for a name."""

    def make_tokenizer_of_names(self, names: Sequence[str]) -> None:
        """Use a tokenizer made of the words in the texts for some names."""
        self.make_tokenizer([prompt for name in names for prompt in self.prompts_of(name)])

    def read_facts(self, datamodule: Any) -> None:
        self.train_classes = list(datamodule.class_names("train")) if hasattr(datamodule, "class_names") else []
        if self.text_tower.tokenizer is None:
            self.make_tokenizer_of_names(self.train_classes)

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._warn_untrained()

    def on_test_start(self) -> None:
        super().on_test_start()
        self._warn_untrained()

    def on_predict_start(self) -> None:
        super().on_predict_start()
        self._warn_untrained()

    def _warn_untrained(self) -> None:
        """Not in ``setup``, which runs before the trainer restores a checkpoint with its tokenizer."""
        if self.text_tower.tokenizer is None:
            warnings.warn(
                f"this {type(self).__name__} has random weights and was never trained: its counts mean nothing. Give "
                "it a checkpoint (--ckpt_path) or CLIP weights (--model.clip, a hub name or folder)",
                stacklevel=2,
            )
            self.make_tokenizer_of_names([])

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"train_classes": self.train_classes}

    def restore_recipe(self, recipe: dict[str, Any]) -> None:
        super().restore_recipe(recipe)
        self.train_classes = list(recipe["train_classes"])


__all__ = ["TextGuidedModule", "TextModule"]
