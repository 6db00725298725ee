"""Texts and examples for causal language models, tokenised once."""

import dataclasses
import hashlib
import importlib.resources
import json
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, RandomSampler

from hift_lightning.cache import cache_root, digest_of_file, made_once
from hift_lightning.data.documents import Document, Split, find_files, read_documents
from hift_lightning.data.encoding import encoder_of
from hift_lightning.data.loading import TrainingLoader, evaluation_loader
from hift_lightning.data.packing import PARTS, ExampleRows, PackedRows, Row, batch_of, write_tokens
from hift_lightning.data.sentences import Part
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.progress import PreparationBar

MOBY_DICK = Path(str(importlib.resources.files(__package__))) / "moby_dick" / "moby_dick.txt"
# raised whenever the same files and settings give other tokens
VERSION = 4
TOLD_FILE = "told.json"
"""In the cache: what was warned of when the files were read, which later runs are told too."""


class TextDataModule(L.LightningDataModule):
    """Batches of texts and examples for training, validation and test.

    Files are read, checked and tokenised at once, so that a bad line ends a run before a model is loaded; the tokens
    are kept in a cache folder and mapped into memory. A batch has `input_ids` and `labels` (batch x tokens of its
    longest row, at most `max_length`). Texts follow each other in rows of one length
    (`hift_lightning.data.packing.PackedRows`), where attention goes across their ends; an example of a prompt and what
    to say to it has a row of its own (`ExampleRows`).

    Args:
        tokenizer: the model's own, of transformers; `None` to take the bytes of UTF-8 as tokens.
        path: a file as `hift_lightning.data.documents.read_documents` takes it, a folder of such, or a list of these;
            `None` for the packaged chapters of Moby-Dick.
        validation_path: files or folders that are all for validation, so that nothing of `path` is; `None` for
            `validation_fraction` of it.
        test_path: likewise for the test.
        batch_size: rows in a training batch.
        eval_batch_size: rows in a batch of validation and test.
        max_length: most tokens of a row, 2 or more; longer examples are cut, and a warning tells how many.
        test_fraction: share of all texts for the test.
        validation_fraction: share of the others for validation.
        cache_dir: the folder that keeps tokens; `None` for `~/.cache/hift_lightning`.
        num_workers: processes that build batches; the tokens are mapped, so 0 is the fastest.
        seed: decides the order of the training rows, whatever else draws random numbers.

    Raises:
        ConfigurationError: a file cannot be used (see `find_files` and `read_documents`), a number is out of range,
            a part of the split is empty, the tokenizer has no end-of-text token, or the cache cannot be written.
    """

    def __init__(
        self,
        tokenizer: Any,
        path: str | Sequence[str] | None = None,
        validation_path: str | Sequence[str] | None = None,
        test_path: str | Sequence[str] | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        max_length: int = 128,
        test_fraction: float = 0.1,
        validation_fraction: float = 0.1,
        cache_dir: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_numbers(batch_size, eval_batch_size, max_length, test_fraction, validation_fraction)
        if not isinstance(seed, int):
            raise ConfigurationError(f"`data.seed={seed}` is not possible; give a whole number.")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        validation = find_files(_paths(validation_path), "data.validation_path") if validation_path else []
        test = find_files(_paths(test_path), "data.test_path", validation) if test_path else []
        shared = [MOBY_DICK] if path is None else find_files(_paths(path), "data.path", [*validation, *test])
        own: dict[Part, list[Path]] = {"validation": validation, "test": test}
        everything = [*shared, *own["validation"], *own["test"]]
        encoder = encoder_of(tokenizer)
        self.vocab_size = encoder.vocab_size
        split = Split(0 if own["test"] else test_fraction, 0 if own["validation"] else validation_fraction)

        def documents() -> Iterator[Document]:
            yield from read_documents(shared, encoder, split)
            for part, files in own.items():
                for document in read_documents(files, encoder, Split(0, 0)):
                    yield dataclasses.replace(document, part=part)

        def tokenise(folder: Path) -> None:
            more = f" and {len(everything) - 3} more files" if len(everything) > 3 else ""
            rank_zero_info(f"Reading and tokenising {', '.join(f'`{one}`' for one in everything[:3])}{more}.")
            with PreparationBar("tokenising") as bar:
                # of what is no text in the files (keys, quotes) the bar never hears, so it goes before it is full
                bar.is_at(0, of=sum(one.stat().st_size for one in everything))
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    write_tokens(documents(), encoder, folder, bar.moves_by)
            (folder / TOLD_FILE).write_text(json.dumps([str(one.message) for one in told]))

        made_from = [VERSION, encoder.fingerprint, split.test_fraction, split.validation_fraction]
        for use, files in [("all parts", shared), *own.items()]:
            made_from += [(use, one.suffix.lower(), digest_of_file(one)) for one in files]
        name = hashlib.sha256(json.dumps(made_from).encode("utf-8")).hexdigest()[:32]
        self.folder = made_once(cache_root(cache_dir) / "tokens" / name, tokenise, "data.cache_dir")
        for message in json.loads((self.folder / TOLD_FILE).read_text()):
            rank_zero_warn(message)
        texts = {part: PackedRows(self.folder, part, max_length) for part in PARTS}
        examples = {part: ExampleRows(self.folder, part, max_length) for part in PARTS}
        self.rows: dict[Part, ConcatDataset[Row]] = {
            part: ConcatDataset([texts[part], examples[part]]) for part in PARTS
        }
        self._batch_of = partial(batch_of, filling=encoder.end)
        for part in PARTS:
            if not len(self.rows[part]) and not examples[part].examples:
                raise ConfigurationError(
                    f"Nothing of `data.path={path}` falls to the {part} part; give more data, another "
                    "`data.test_fraction` and `data.validation_fraction`, or files of their own with "
                    "`data.validation_path` and `data.test_path`."
                )
            if not len(self.rows[part]):
                raise ConfigurationError(
                    f"Of the {part} part every example has more than `data.max_length={max_length}` tokens before the "
                    "first that is trained; give more."
                )
        _tell_of_examples(list(examples.values()), max_length)
        told = []
        for part in PARTS:
            tokens = [texts[part].tokens, examples[part].tokens]
            count, trained = (sum(of) for of in zip(*((each.count, each.trained) for each in tokens), strict=True))
            told.append(f"{part} {len(self.rows[part]):,} ({count:,} tokens, {trained:,} of them trained)")
        rank_zero_info(f"Rows: {', '.join(told)}.")

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        """Training batches: rows shuffled anew in each epoch.

        The loader has a state, so that a run goes on in the middle of an epoch.
        """
        generator = torch.Generator()
        rows = self.rows["train"]
        return TrainingLoader(
            rows,
            BatchSampler(RandomSampler(rows, generator=generator), self.batch_size, drop_last=False),
            generator,
            self.seed,
            generator=generator,
            num_workers=self.num_workers,
            collate_fn=self._batch_of,
        )

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Validation batches, in the order of the text."""
        return self._eval_dataloader("validation")

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Test batches, in the order of the text."""
        return self._eval_dataloader("test")

    def _eval_dataloader(self, part: Part) -> DataLoader[Row]:
        return evaluation_loader(
            self.rows[part],
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            collate_fn=self._batch_of,
        )


def _tell_of_examples(parts: Sequence[ExampleRows], max_length: int) -> None:
    """Warn of examples that are longer than a row."""
    count, rows, cut = (sum(of) for of in zip(*((part.examples, len(part), part.cut) for part in parts), strict=True))
    if not cut:
        return
    left_out = f"; {count - rows:,} of them are left out, since nothing to train on is left" if rows < count else ""
    rank_zero_warn(
        f"{cut:,} of {count:,} examples have more than `data.max_length={max_length}` tokens and are cut{left_out}; "
        "give more, where the memory allows it."
    )


def _paths(given: str | Sequence[str] | None) -> list[Path]:
    return [Path(one) for one in ([given] if isinstance(given, str) else given or [])]


def _check_numbers(
    batch_size: int, eval_batch_size: int, max_length: int, test_fraction: float, validation_fraction: float
) -> None:
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("eval_batch_size", eval_batch_size, 1),
        ("max_length", max_length, 2),
    ):
        if not isinstance(value, int) or value < least:
            raise ConfigurationError(f"`data.{name}={value}` is not possible; give a whole number from {least} on.")
    for name, share in (("test_fraction", test_fraction), ("validation_fraction", validation_fraction)):
        if not isinstance(share, (int, float)) or not 0 < share < 1:
            raise ConfigurationError(f"`data.{name}={share}` is not possible; give a number between 0 and 1.")
