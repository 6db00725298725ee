"""Rows of token ids out of documents, in memory-mapped files: texts in one stream, and examples each by itself."""

import array
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from hift_lightning.data.documents import Document
from hift_lightning.data.encoding import Encoder
from hift_lightning.data.sentences import Part
from hift_lightning.engine.errors import ConfigurationError

Row = dict[str, Tensor]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
# the label that transformers' loss passes over
NOT_COUNTED = -100
BYTES_OF_ID = 4
BYTES_OF_BOUND = 8


def write_tokens(
    documents: Iterable[Document], encoder: Encoder, folder: Path, progress: Callable[[int], None] | None = None
) -> None:
    """Write the tokens of documents, one after the other, into five files for each part.

    `<part>.ids` has 4 bytes a token, `<part>.trained` one: whether the model is trained to say it. They are of texts;
    `<part>.examples.ids` and `<part>.examples.trained` are of examples, and `<part>.examples.bounds` has two numbers
    of 8 bytes for each: where it ends in these files, and which of its tokens is the first that is trained and stands
    behind another. A document ends with the encoder's `end`, which is trained where what stands before it is.

    Args:
        documents: in the order in which they are written.
        encoder: makes ids of texts.
        folder: where the files go.
        progress: called with the bytes of each piece that has been encoded.

    Raises:
        ConfigurationError: a document has no token to train on.
    """
    kinds = ("ids", "trained", "examples.ids", "examples.trained", "examples.bounds")
    files = {(part, kind): (folder / f"{part}.{kind}").open("wb") for part in PARTS for kind in kinds}
    ends = dict.fromkeys(PARTS, 0)
    try:
        for document in documents:
            ids, trained = _encoded(document, encoder, progress)
            kind = "examples." if document.is_example else ""
            ids.tofile(files[document.part, f"{kind}ids"])
            files[document.part, f"{kind}trained"].write(trained)
            if document.is_example:
                ends[document.part] += len(ids)
                first = trained.find(True, 1)
                bounds = array.array("q", [ends[document.part], first if first > 0 else sys.maxsize])
                bounds.tofile(files[document.part, "examples.bounds"])
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


class _Tokens:
    """What `write_tokens` wrote of texts or of examples; the files are mapped, and read when a row is asked for."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = str(folder / name)
        self.count = (folder / f"{name}.ids").stat().st_size // BYTES_OF_ID

    @cached_property
    def _ids(self) -> Tensor:
        return torch.from_file(f"{self._path}.ids", size=self.count, dtype=torch.int32)

    @cached_property
    def _trained(self) -> Tensor:
        return torch.from_file(f"{self._path}.trained", size=self.count, dtype=torch.bool)

    def __getstate__(self) -> dict[str, object]:
        return {"_path": self._path, "count": self.count}  # a process that gets it maps the files itself

    def row(self, stretch: slice) -> Row:
        """`input_ids` and `labels` of a stretch: the ids, and the ids with -100 where a token is not trained."""
        ids = self._ids[stretch].long()
        return {"input_ids": ids, "labels": ids.masked_fill(~self._trained[stretch], NOT_COUNTED)}

    @property
    def trained(self) -> int:
        """How many of all tokens are."""
        return int(self._trained.sum()) if self.count else 0


class PackedRows(Dataset[Row]):
    """Rows of `length` tokens out of the texts of a part, which follow each other in one stream.

    A row has `input_ids` and `labels`, both of `length`: the ids, and -100 where a token is not trained. The last
    token of a row is the first of the next one, where it is not predicted: so every token but the very first is
    predicted exactly once, whatever the length. The last row is shorter.

    Args:
        folder: as `write_tokens` leaves it.
        part: which part.
        length: tokens of a row, 2 or more.
    """

    def __init__(self, folder: Path, part: Part, length: int) -> None:
        self.tokens = _Tokens(folder, part)
        self.length = length

    def __len__(self) -> int:
        return -(-max(self.tokens.count - 1, 0) // (self.length - 1))

    def __getitem__(self, index: int) -> Row:
        """Return a row."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin = index * (self.length - 1)
        return self.tokens.row(slice(begin, begin + self.length))


class ExampleRows(Dataset[Row]):
    """A row for each example of a part, with `input_ids` and `labels` of as many tokens as it has, and not more.

    An example sees no other one. It is cut at the length of a row, and left out if nothing to train on is left of it.

    Args:
        folder: as `write_tokens` leaves it.
        part: which part.
        length: most tokens of a row, 2 or more.
    """

    def __init__(self, folder: Path, part: Part, length: int) -> None:
        self.tokens = _Tokens(folder, f"{part}.examples")
        self.length = length
        path = folder / f"{part}.examples.bounds"
        count = path.stat().st_size // (2 * BYTES_OF_BOUND)
        bounds = torch.from_file(str(path), size=2 * count, dtype=torch.int64) if count else torch.empty(0).long()
        ends, first_trained = bounds.view(-1, 2).unbind(1)
        self._ends = ends.clone()
        self._begins = self._ends.roll(1)
        self._begins[:1] = 0
        self._kept = (first_trained < length).nonzero().squeeze(1)
        self.examples = count
        """All of the part."""
        self.cut = int((self._ends - self._begins > length).sum())
        """Those that are longer than a row."""

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Row:
        """Return a row."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        example = self._kept[index]
        begin, end = int(self._begins[example]), int(self._ends[example])
        return self.tokens.row(slice(begin, min(end, begin + self.length)))


def batch_of(rows: Sequence[Row], filling: int) -> Row:
    """Put rows together, filled up to the longest with tokens that are not counted.

    Args:
        rows: of `PackedRows` and `ExampleRows`.
        filling: the id that fills shorter ones up.
    """
    longest = max(len(row["labels"]) for row in rows)
    return {
        name: torch.stack([pad(row[name], (0, longest - len(row[name])), value=value) for row in rows])
        for name, value in (("input_ids", filling), ("labels", NOT_COUNTED))
    }
