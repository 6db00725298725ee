"""Texts from files: plain text, JSON lines and parquet, checked line by line and split in three parts."""

import json
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hift_lightning.data.encoding import ASSISTANT, Encoder, Message, Piece
from hift_lightning.data.labelled import cannot_be_read
from hift_lightning.data.sentences import Part, part_of
from hift_lightning.engine.errors import ConfigurationError

TEXT_FILES = (".txt", ".md")
LINE_FILES = (".jsonl",)
TABLE_FILES = (".parquet",)
_KNOWN_FILES = (*TEXT_FILES, *LINE_FILES, *TABLE_FILES)
KEYS_OF_FORMS = (("text",), ("prompt", "completion"), ("messages",))
KEYS = tuple(key for form in KEYS_OF_FORMS for key in form)
KEYS_OF_MESSAGE = ("role", "content")
FORMS = '`{"text": ...}`, `{"prompt": ..., "completion": ...}` or `{"messages": [{"role": ..., "content": ...}]}`'
# a tokenizer needs hundreds of bytes of memory for each byte of a text that it is given at once
LARGEST_PIECE = 2**20
ROWS_AT_ONCE = 1000
# bytes; where a line is longer, a text is cut within it
LONGEST_LINE = 2**16


@dataclass(frozen=True)
class Document:
    """A text with a beginning and an end.

    Attributes:
        place: the file and where in it, for messages.
        part: what the document is for.
        pieces: what it consists of, in their order.
        is_example: whether it is one of a prompt and what to say to it, and not a text.
    """

    place: str
    part: Part
    pieces: Sequence[Piece]
    is_example: bool = False


@dataclass(frozen=True)
class Split:
    """How much is kept for validation and test.

    Attributes:
        test_fraction: share of all, from 0 on and below 1.
        validation_fraction: share of the rest, from 0 on and below 1.
    """

    test_fraction: float
    validation_fraction: float

    def bounds(self, size: int) -> dict[Part, tuple[int, int]]:
        """Return where in a stretch of `size` bytes each part begins and ends."""
        test = round(size * (1 - self.test_fraction))
        validation = round(test * (1 - self.validation_fraction))
        return {"train": (0, validation), "validation": (validation, test), "test": (test, size)}


def find_files(paths: Sequence[Path], name: str = "data.path", taken: Collection[Path] = ()) -> list[Path]:
    """Find the sources of documents: files, and those in folders and in theirs, in the order of their names.

    Of a folder all `.jsonl` and `.parquet` files are taken, or where it has none all others of known kinds. Hidden
    files and links to folders are passed over.

    Args:
        paths: files and folders.
        name: of the setting that names them, for messages.
        taken: files of other settings, which are left out of folders.

    Raises:
        ConfigurationError: nothing is given, a file does not exist, is empty, cannot be read, has an ending that is
            not known or is one of another setting, or a folder has none.
    """
    if not paths:
        raise ConfigurationError(f"`{name}=[]` names no file; give the path of one, or several in a list.")
    elsewhere = {path.resolve() for path in taken}
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += [file for file in _files_in(path, name) if file.resolve() not in elsewhere]
        elif path.resolve() in elsewhere:
            raise ConfigurationError(
                f"The data file `{path}` is given for `{name}` and for another part; give it once."
            )
        else:
            files.append(path)
    if not files:
        raise ConfigurationError(f"All files of `{name}` are given for other parts; give it more.")
    for file in files:
        _check_file(file, name)
    return files


def _check_file(path: Path, name: str) -> None:
    try:
        if not path.is_file():
            raise ConfigurationError(f"The data file `{path}` does not exist; give `{name}` the path of a file.")
        if path.suffix.lower() not in _KNOWN_FILES:
            raise ConfigurationError(
                f"`{path}` is of no kind that can be read; give `{name}` a file that ends with one of "
                f"{', '.join(_KNOWN_FILES)}."
            )
        path.open("rb").close()
        empty = not path.stat().st_size
    except OSError as error:
        raise cannot_be_read(path, error) from error
    if empty:
        raise ConfigurationError(f"The data file `{path}` is empty; give `{name}` another one.")


def _files_in(folder: Path, name: str) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise cannot_be_read(Path(error.filename), error) from error

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [each for each in folders if not each.startswith(".")]
        found += [Path(place, each) for each in names if not each.startswith(".")]
    tables = [path for path in found if path.suffix.lower() in (*LINE_FILES, *TABLE_FILES)]
    files = sorted(tables or [path for path in found if path.suffix.lower() in TEXT_FILES])
    if not files:
        raise ConfigurationError(
            f"No file in the folder `{folder}` ends with one of {', '.join(_KNOWN_FILES)}; give `{name}` another, or a "
            "file."
        )
    return files


def read_documents(paths: Sequence[Path], encoder: Encoder, split: Split) -> Iterator[Document]:
    """Read files and tell the part of each document.

    - Plain text (`.txt`, `.md`): the files one after the other are cut in three stretches, for training, validation
      and test, each at the end of a line unless that is far away. What one file has of a stretch is a document. All
      of it is trained.
    - JSON lines (`.jsonl`): a document a line, of one of three forms: `text`, all of it trained; `prompt` and
      `completion`, of which the completion is trained; `messages`, each with `role` and `content`, of which the
      assistant's are trained. Other keys are not read, which a warning tells. A hash of the texts decides the part.
    - Parquet (`.parquet`), where the package `pyarrow` is installed: a document a row, with such columns.

    Args:
        paths: the files, as `find_files` gives them.
        encoder: writes conversations down.
        split: how much is for validation and test.

    Raises:
        ConfigurationError: a file is not UTF-8, or a line cannot be used; or a package is missing.
    """
    texts = [path for path in paths if path.suffix.lower() in TEXT_FILES]
    bounds = split.bounds(sum(path.stat().st_size for path in texts))
    begin = 0
    for path in paths:
        if path.suffix.lower() in TEXT_FILES:
            yield from _documents_of_text(path, begin, bounds)
            begin += path.stat().st_size
            continue
        unread: dict[str, None] = {}
        if path.suffix.lower() in LINE_FILES:
            examples: Iterable[tuple[str, Any]] = ((place, _parsed(line, place)) for place, line in _lines(path))
        else:
            examples = _rows(path, unread)
        for place, example in examples:
            yield from _documents(example, place, encoder, split, unread)
        if unread:
            warnings.warn(
                f"Nothing is made of {', '.join(f'`{key}`' for key in unread)} in `{path}`; what is read is {FORMS}.",
                stacklevel=2,
            )


def _documents_of_text(path: Path, begin: int, bounds: Mapping[Part, tuple[int, int]]) -> Iterator[Document]:
    raw = path.read_bytes()
    if not _decoded(raw, path).strip():
        raise ConfigurationError(f"The data file `{path}` is empty; give another one.")
    for part, (first, last) in bounds.items():
        text = raw[_cut(raw, first - begin) : _cut(raw, last - begin)].decode("utf-8-sig").replace("\r\n", "\n")
        if text.strip():
            yield Document(f"`{path}`", part, [Piece(piece, True) for piece in _in_lines(text)])


def _cut(raw: bytes, position: int) -> int:
    """Return where to cut at `position` or a little after: at the end of a line, or else of a word or a character."""
    if position <= 0:
        return 0
    last = len(raw.rstrip())
    if position >= last:
        return len(raw)
    for end in (b"\n", b" "):
        found = raw.find(end, position - 1, min(position + LONGEST_LINE, last))
        if found >= 0:
            return found + 1
    while position < len(raw) and raw[position] & 0b1100_0000 == 0b1000_0000:  # within a character of UTF-8
        position += 1
    return position


def _in_lines(text: str) -> Iterator[str]:
    """Cut a long text at ends of lines."""
    begin = 0
    while begin < len(text):
        line_break = text.find("\n", begin + LARGEST_PIECE)
        end = len(text) if line_break < 0 else line_break + 1
        yield text[begin:end]
        begin = end


def _decoded(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(
            f"`{path}`, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8."
        ) from error


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    found = False
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = f"`{path}`, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ConfigurationError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8.") from error
            if line.strip():
                found = True
                yield place, line
    if not found:
        raise ConfigurationError(f"The data file `{path}` is empty; give another one.")


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise ConfigurationError(
            f"{place}: `{line.strip()[:60]}` is not JSON ({error.msg}, column {error.colno}); mend or remove the line."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets within brackets
        raise ConfigurationError(
            f"{place}: `{line.strip()[:60]}` cannot be read ({error}); mend or remove the line."
        ) from error


def _rows(path: Path, unread: dict[str, None]) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigurationError(
            f"`{path}` cannot be read without the package `pyarrow`; run `pip install pyarrow`."
        ) from error
    number = 0
    try:
        with ParquetFile(path) as table:
            names = table.schema_arrow.names
            if not any(set(form) <= set(names) for form in KEYS_OF_FORMS):
                raise ConfigurationError(f"`{path}` has the columns {', '.join(names)}; write {FORMS}, a column a key.")
            unread.update(dict.fromkeys(name for name in names if name not in KEYS))
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[name for name in names if name in KEYS]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"`{path}`, row {number}", row
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"`{path}`, after row {number}: not UTF-8 ({error.reason}); write texts as UTF-8."
        ) from error
    except (ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigurationError(f"`{path}` cannot be read as parquet ({reason}); give another file.") from error
    if not number:
        raise ConfigurationError(f"The data file `{path}` is empty; give another one.")


def _documents(example: Any, place: str, encoder: Encoder, split: Split, unread: dict[str, None]) -> Iterator[Document]:
    """Make the documents of an example: one, or of a conversation one for each answer; note keys that are not read."""
    if isinstance(example, dict):
        # what was a row of a table has all its columns, with nothing in those that it does not use
        example = {key: value for key, value in example.items() if value is not None}
    forms = [form for form in KEYS_OF_FORMS if isinstance(example, dict) and not example.keys().isdisjoint(form)]
    if len(forms) != 1 or not set(forms[0]) <= example.keys():
        found = f"`{example!r:.60}`"
        if isinstance(example, dict):
            found = f"the keys {', '.join(example)}" if example else "nothing"
        raise ConfigurationError(f"{place}: found {found}; write {FORMS}.")
    form = forms[0]
    unread.update(dict.fromkeys(key for key in example if key not in form))
    if form == ("messages",):
        messages = _messages(example["messages"], place, unread)
        texts = [message["content"] for message in messages]
        documents = encoder.chat(messages, place)
    elif form == ("prompt", "completion"):
        texts = [_string(example, key, place) for key in form]
        documents = [[Piece(texts[0], False), Piece(texts[1], True)]]
    else:
        texts = [_string(example, "text", place)]
        documents = [[Piece(piece, True) for piece in _in_lines(texts[0])]]
    part = part_of(" ".join(texts), split.test_fraction, split.validation_fraction)
    for pieces in documents:
        if not any(piece.trained and piece.text for piece in pieces):
            raise ConfigurationError(f"{place}: there is nothing to train on; give a text, a completion or an answer.")
        yield Document(place, part, pieces, is_example=form != ("text",))


def _messages(messages: Any, place: str, unread: dict[str, None]) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise ConfigurationError(f"{place}: `messages` is `{messages!r:.60}`; write {FORMS}.")
    checked = []
    for number, message in enumerate(messages, start=1):
        here = f"{place}, message {number}"
        if isinstance(message, dict) and message.get("tool_calls"):
            raise ConfigurationError(
                f"{here}: it has `tool_calls`, which are not written down, so the model would learn to say nothing; "
                "leave the example out, or give it as `prompt` and `completion`."
            )
        checked.append({key: _string(message, key, here) for key in KEYS_OF_MESSAGE})
        others = (key for key, value in message.items() if key not in KEYS_OF_MESSAGE and value is not None)
        unread.update(dict.fromkeys(f"messages.{key}" for key in others))
    if not any(message["role"] == ASSISTANT and message["content"] for message in checked):
        raise ConfigurationError(f"{place}: there is nothing to train on; give a message of the role `{ASSISTANT}`.")
    return checked


def _string(example: Any, key: str, place: str) -> str:
    value = example.get(key) if isinstance(example, dict) else None
    if not isinstance(value, str):
        raise ConfigurationError(f"{place}: `{key}` is `{value!r:.60}` and not a text; write {FORMS}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"{place}: `{key}` has half of a character, {value[error.start]!a}, at position {error.start + 1}; mend it."
        ) from error
    return value
