"""Labelled sentences from a file, split by a hash of their text and tokenised once."""

import hashlib
import importlib.resources
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from hift_lightning.data.labelled import FEW_CLASSES, Columns, LabelledSentence, read_sentences, told_of
from hift_lightning.data.loading import TrainingLoader, evaluation_loader
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.progress import PreparationBar

SENTENCES_AT_ONCE = 1000  # between two moves of the progress bar
FEW_CUT = 0.05
"""Share of sentences that may be cut at `max_length` without a word."""
FILM_REVIEWS = Path(str(importlib.resources.files(__package__))) / "film_reviews" / "film_reviews.tsv"

Part = Literal["train", "validation", "test"]
TokenisedSentence = tuple[Tensor, int]


def _check_classes(path: str, num_classes: int, trained: Collection[int], words: Sequence[str]) -> None:
    def named(numbers: Collection[int]) -> str:
        return ", ".join(f"`{words[number]}`" if words else str(number) for number in sorted(numbers)[:5])

    if len(trained) == 1:
        raise ConfigurationError(
            f"All sentences of `{path}` for training are of class {named(trained)}, so there is nothing to learn; "
            "give a file with two classes or more."
        )
    missing = set(range(num_classes)).difference(trained)
    if missing:
        counted = "" if words else "; classes are counted from 0 to `data.num_classes` - 1"
        rank_zero_warn(
            f"No sentence of `{path}` for training is of class {named(missing)}{', …' if len(missing) > 5 else ''}"
            f"{counted}."
        )


def _of_each_class(sentences: Sequence[LabelledSentence], num_classes: int) -> str:
    counted = Counter(label for _, label in sentences)
    counts = [counted[label] for label in range(num_classes)]
    if num_classes <= FEW_CLASSES:
        return ", ".join(map(str, counts))
    return f"{len(sentences)}, from {min(counts)} to {max(counts)} of a class"


def normalised(sentence: str) -> str:
    """Return letters and digits of `sentence` in lower case: what two copies of a sentence have in common."""
    folded = unicodedata.normalize("NFKC", sentence).casefold()
    return "".join(character for character in folded if character.isalnum())


def part_of(sentence: str, test_fraction: float, validation_fraction: float) -> Part:
    """Tell the part that `sentence` belongs to, from a hash of its normalised text alone.

    Copies of a sentence are thus on one side only, and more data never move a sentence to another part.

    Args:
        sentence: the text.
        test_fraction: share of all sentences that is kept for the test, 0 to 1.
        validation_fraction: share of the others that is kept for validation, 0 to 1.
    """
    digest = hashlib.sha256(normalised(sentence).encode("utf-8")).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < test_fraction:
        return "test"
    if position < test_fraction + (1 - test_fraction) * validation_fraction:
        return "validation"
    return "train"


class LengthGroupedBatches(Sampler[list[int]]):
    """Shuffled batches of sentences of about one length, so that little of a batch is padding.

    Sentences are shuffled, each run of `BATCHES_SORTED` batches is sorted by length and cut into batches, and
    these are shuffled again.

    Args:
        lengths: tokens of each sentence.
        batch_size: sentences in a batch; the last one may be smaller.
        generator: draws the order; each pass over the data draws a new one.
    """

    BATCHES_SORTED = 32

    def __init__(self, lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.generator = generator

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        shuffled = torch.randperm(len(self.lengths), generator=self.generator).tolist()
        run = self.batch_size * self.BATCHES_SORTED
        batches = []
        for start in range(0, len(shuffled), run):
            by_length = sorted(shuffled[start : start + run], key=lambda index: self.lengths[index])
            batches += [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        for index in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[index]


class SentenceDataModule(L.LightningDataModule):
    """Batches of tokenised sentences for training, validation and test.

    The file is read and checked at once, so that a bad row ends a run before a model is loaded. A batch is a
    dictionary of `input_ids` and `attention_mask` (batch x longest sentence of the batch) and `labels` (batch).

    Args:
        tokenizer: the model's own: called with a list of texts, `truncation` and `max_length`, it returns
            `input_ids`; `pad_token_id` fills short rows.
        path: a file as `read_sentences` takes it; `None` for the packaged film reviews.
        validation_path: a file that is all for validation, so that nothing of `path` is; `None` for
            `validation_fraction` of it.
        test_path: likewise for the test.
        label_column: name of the column of labels; `None` for `label` or `rating`.
        text_column: name of the column of sentences; `None` for `sentence` or `text`.
        num_classes: number of classes.
        batch_size: sentences in a training batch.
        eval_batch_size: sentences in a batch of validation and test.
        max_length: tokens after which a sentence is cut.
        test_fraction: share of all sentences for the test.
        validation_fraction: share of the others for validation.
        num_workers: processes that build batches; the data lie in memory, so 0 is the fastest.
        seed: decides the order of the training sentences, whatever else draws random numbers.

    Raises:
        ConfigurationError: the file cannot be used (see `read_sentences`), a number is out of range, or a
            part of the split is empty.
    """

    def __init__(
        self,
        tokenizer: Callable[..., Any],
        path: str | None = None,
        validation_path: str | None = None,
        test_path: str | None = None,
        label_column: str | None = None,
        text_column: str | None = None,
        num_classes: int = 2,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        max_length: int = 48,
        test_fraction: float = 0.2,
        validation_fraction: float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("max_length", max_length),
        ):
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"`data.{name}={value}` is not possible; give a whole number from 1 on.")
        for name, share in (("test_fraction", test_fraction), ("validation_fraction", validation_fraction)):
            if not isinstance(share, (int, float)) or not 0 < share < 1:
                raise ConfigurationError(f"`data.{name}={share}` is not possible; give a number between 0 and 1.")
        if not isinstance(seed, int):
            raise ConfigurationError(f"`data.seed={seed}` is not possible; give a whole number.")
        around = getattr(tokenizer, "num_special_tokens_to_add", lambda: 0)()  # such as [CLS] and [SEP]
        if max_length <= around:
            raise ConfigurationError(
                f"`data.max_length={max_length}` leaves no token of a sentence beside the {around} that the tokenizer "
                f"sets around it; give a whole number from {around + 1} on."
            )
        self.tokenizer = tokenizer
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_length = max_length
        self.num_workers = num_workers
        self.seed = seed
        self.sentences: dict[Part, list[LabelledSentence]] = {"train": [], "validation": [], "test": []}
        self.path = path = str(FILM_REVIEWS) if path is None else path
        own_paths: dict[Part, str | None] = {"validation": validation_path, "test": test_path}
        shares = 0 if test_path else test_fraction, 0 if validation_path else validation_fraction
        columns = Columns(label_column, text_column)
        sentences, self.words = read_sentences(path, num_classes, columns=columns)
        for sentence, label in sentences:
            self.sentences[part_of(sentence, *shares)].append((sentence, label))
        for part, own in own_paths.items():
            if own:
                name = f"data.{part}_path"
                self.sentences[part] = read_sentences(own, num_classes, name, self.words, columns).sentences
        for part, sentences in self.sentences.items():
            if not sentences:
                raise ConfigurationError(
                    f"No sentence of `{path}` falls to the {part} part; give more data, another `data.test_fraction` "
                    "and `data.validation_fraction`, or files of their own with `data.validation_path` and "
                    "`data.test_path`."
                )
        _check_classes(path, num_classes, {label for _, label in self.sentences["train"]}, self.words)
        parts = [f"{part} {_of_each_class(sentences, num_classes)}" for part, sentences in self.sentences.items()]
        classes = f" ({told_of(self.words)})" if self.words else ""
        rank_zero_info(f"Sentences of class 0 to {num_classes - 1}{classes}: {'; '.join(parts)}.")
        self._tokenised: dict[Part, list[TokenisedSentence]] = {}

    def setup(self, stage: str) -> None:
        """Tokenise all parts, the first time only."""
        if not self._tokenised:
            with PreparationBar("tokenising") as bar:
                bar.is_at(0, of=sum(map(len, self.sentences.values())))
                self._tokenised = {part: self._tokenise(sentences, bar) for part, sentences in self.sentences.items()}
            self._tell_what_is_cut()

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        """Training batches: shuffled anew in each epoch, sentences of about one length together.

        The loader has a state, so that a run goes on in the middle of an epoch.
        """
        generator = torch.Generator()
        lengths = [len(ids) for ids, _ in self._tokenised["train"]]
        return TrainingLoader(
            self._tokenised["train"],  # type: ignore[arg-type]  # a list is a map-style data set
            LengthGroupedBatches(lengths, self.batch_size, generator),
            generator,
            self.seed,
            collate_fn=self.collate,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Validation batches."""
        return self._eval_dataloader("validation")

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Test batches."""
        return self._eval_dataloader("test")

    def state_dict(self) -> dict[str, Any]:
        """What the classes are called where labels are words, for checkpoints and exports; empty for numbers."""
        return {"words": list(self.words)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the labels of a checkpoint with those of the data; nothing is changed.

        Raises:
            ConfigurationError: they are others, so that classes would be mistaken for each other.
        """
        theirs, own = state_dict["words"], list(self.words)
        if theirs == own:
            return
        if not theirs or not own:
            of_run, of_data = ("words" if words else "numbers" for words in (theirs, own))
        else:
            of_run, of_data = (
                f"{len(words)} words with {told_of(sorted({*words}.difference(other))) or 'no other'}"
                for words, other in ((theirs, own), (own, theirs))
            )
        raise ConfigurationError(
            f"The labels in the run of the checkpoint are {of_run}, and those of `data.path={self.path}` are "
            f"{of_data}; give data with the same labels, or begin a new run with `ckpt_path=null`."
        )

    def collate(self, rows: Sequence[TokenisedSentence]) -> dict[str, Tensor]:
        """Pad sentences to the longest of them."""
        ids = [row[0] for row in rows]
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": torch.tensor([row[1] for row in rows]),
        }

    def _tokenise(self, sentences: list[LabelledSentence], bar: PreparationBar) -> list[TokenisedSentence]:
        tokenised: list[TokenisedSentence] = []
        for start in range(0, len(sentences), SENTENCES_AT_ONCE):
            some = sentences[start : start + SENTENCES_AT_ONCE]
            texts = [sentence for sentence, _ in some]
            rows = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
            tokenised += [(torch.tensor(row), label) for row, (_, label) in zip(rows, some, strict=True)]
            bar.moves_by(len(some))
        return tokenised

    def _tell_what_is_cut(self) -> None:
        texts = [
            sentence
            for part, sentences in self.sentences.items()
            for (sentence, _), (row, _) in zip(sentences, self._tokenised[part], strict=True)
            if len(row) == self.max_length
        ]
        of, at_least = sum(map(len, self.sentences.values())), self.max_length + 1
        if len(texts) <= FEW_CUT * of:
            return
        pieces = (texts[start : start + SENTENCES_AT_ONCE] for start in range(0, len(texts), SENTENCES_AT_ONCE))
        cut = sum(
            len(row) == at_least
            for piece in pieces
            for row in self.tokenizer(piece, truncation=True, max_length=at_least)["input_ids"]
        )
        if cut > FEW_CUT * of:
            rank_zero_warn(
                f"{cut} of {of} sentences have more than `data.max_length={self.max_length}` tokens and are cut; give "
                "more, which costs nothing for the others, since a batch is padded to its own longest sentence."
            )

    def _eval_dataloader(self, part: Part) -> EVAL_DATALOADERS:
        # sentences of one length together, so that little is padded; the order does not change a metric
        by_length = sorted(self._tokenised[part], key=lambda row: len(row[0]))
        return evaluation_loader(
            by_length,  # type: ignore[arg-type]  # a list is a map-style data set
            batch_size=self.eval_batch_size,
            collate_fn=self.collate,
            num_workers=self.num_workers,
        )
