"""Rows of one length out of documents of any: token ids in memory-mapped files, cut where a row is full."""

import array
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hift_lightning.data.documents import Document
from hift_lightning.data.encoding import Encoder
from hift_lightning.data.sentences import Part
from hift_lightning.engine.errors import ConfigurationError

PARTS: tuple[Part, ...] = ("train", "validation", "test")
# the label that transformers' loss passes over
NOT_COUNTED = -100
BYTES_OF_ID = 4


def write_tokens(
    documents: Iterable[Document], encoder: Encoder, folder: Path, progress: Callable[[int], None] | None = None
) -> None:
    """Write the tokens of documents, one after the other, into two files for each part.

    `<part>.ids` has 4 bytes a token, `<part>.trained` one: whether the model is trained to say it. A document
    ends with the encoder's `end`, which is trained where what stands before it is.

    Args:
        documents: in the order in which they are written.
        encoder: makes ids of texts.
        folder: where the files go.
        progress: called with the bytes of each piece that has been encoded.

    Raises:
        ConfigurationError: a document has no token to train on.
    """
    files = {(part, kind): (folder / f"{part}.{kind}").open("wb") for part in PARTS for kind in ("ids", "trained")}
    try:
        for document in documents:
            ids, trained = _encoded(document, encoder, progress)
            ids.tofile(files[document.part, "ids"])
            files[document.part, "trained"].write(trained)
    finally:
        for file in files.values():
            file.close()


def _encoded(
    document: Document, encoder: Encoder, progress: Callable[[int], None] | None
) -> tuple["array.array[int]", bytes]:
    ids: array.array[int] = array.array("i")
    trained = bytearray()
    for piece in document.pieces:
        encoded = encoder.encode(piece.text, after=ids[-1] if ids else None)
        ids.extend(encoded)
        trained += bytes([piece.trained]) * len(encoded)
        if progress is not None:
            progress(len(piece.text.encode("utf-8")))
    if not any(trained):
        raise ConfigurationError(
            f"{document.place}: there is nothing to train on, since the tokenizer makes no token of the text; mend or "
            "remove it."
        )
    if tuple(ids[: len(encoder.start)]) != encoder.start:  # a chat template may have written it
        ids = array.array("i", encoder.start) + ids
        trained = bytearray(len(encoder.start)) + trained
    if ids[-1] != encoder.end:
        ids.append(encoder.end)
        trained.append(trained[-1])
    return ids, bytes(trained)


class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows of `length` tokens out of one stream of tokens.

    A row has `input_ids` and `labels`, both of `length`: the ids, and -100 where a token is not trained. The last
    token of a row is the first of the next one, where it is not predicted: so every token but the very first is
    predicted exactly once, whatever the length. The last row is filled up with tokens that are not counted.

    Args:
        folder: as `write_tokens` leaves it; the files are mapped, and read when a row is asked for.
        part: which part.
        length: tokens of a row, 2 or more.
        filling: the id that fills the last row up.
    """

    def __init__(self, folder: Path, part: Part, length: int, filling: int) -> None:
        self.count = (folder / f"{part}.ids").stat().st_size // BYTES_OF_ID
        self.length = length
        self.filling = filling
        if self.count:
            self._ids = torch.from_file(str(folder / f"{part}.ids"), size=self.count, dtype=torch.int32)
            self._trained = torch.from_file(str(folder / f"{part}.trained"), size=self.count, dtype=torch.bool)

    def __len__(self) -> int:
        return -(-max(self.count - 1, 0) // (self.length - 1))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        stretch = slice(index * (self.length - 1), index * (self.length - 1) + self.length)
        ids = self._ids[stretch].long()
        labels = ids.masked_fill(~self._trained[stretch], NOT_COUNTED)
        missing = (0, self.length - len(ids))
        return {
            "input_ids": torch.nn.functional.pad(ids, missing, value=self.filling),
            "labels": torch.nn.functional.pad(labels, missing, value=NOT_COUNTED),
        }
