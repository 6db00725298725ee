"""Labelled sentences from a tab- or comma-separated file."""

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_utilities.core.rank_zero import rank_zero_warn

from hift_lightning.engine.errors import ConfigurationError

LABEL_COLUMNS = ("label", "rating")
TEXT_COLUMNS = ("sentence", "text")
FEW_CLASSES = 10
"""Of more than so many, a message tells the extremes alone."""

# a field as the csv module quotes it: each quotation mark in it is doubled
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')

LabelledSentence = tuple[str, int]


class LabelledSentences(NamedTuple):
    """What a file holds.

    Args:
        sentences: each with its class.
        words: where the labels of the file are words, those of class 0, 1, ...; else nothing.
    """

    sentences: list[LabelledSentence]
    words: Sequence[str] = ()


class Columns(NamedTuple):
    """The columns of a file that are read.

    Args:
        label: the name of that of the labels; `None` for `label` or `rating`.
        text: the name of that of the sentences; `None` for `sentence` or `text`.
    """

    label: str | None = None
    text: str | None = None


USUAL_COLUMNS = Columns()


class _Row(NamedTuple):
    place: str
    label: str
    sentence: str


# the place and the fields of each row below the header
_Fields = list[tuple[str, list[str]]]


def read_sentences(
    path: str | Path,
    num_classes: int,
    name: str = "data.path",
    words: Sequence[str] | None = None,
    columns: Columns = USUAL_COLUMNS,
) -> LabelledSentences:
    """Read a file with a label and a sentence in each row: separated by commas if its name ends with `.csv`, else tabs.

    The header says how the column of labels is read. `label` holds classes 0, 1, ... as whole numbers, or words, of
    which the classes are numbered in the order of their characters' code points, which for words in small letters is
    the alphabetical one. `rating` holds numbers of which the negative ones are class 0 and the positive ones class 1.
    The columns may stand in any order; others are not read, which a warning tells. A column that is named in `columns`
    holds classes, whatever it is called.

    A `.csv` file is read by the csv module. In a tab-separated one a field that is quoted as the csv module and pandas
    do it, `"The ""best"" film"`, is read as they read it, and the last column may have tabs or line breaks in such a
    field, but not a tab behind a line break, where the next row might begin. In any other, such as `"Great", he said`,
    quotation marks are characters.

    Args:
        path: the file, UTF-8, with or without a byte order mark.
        num_classes: number of classes; a class outside 0 ... num_classes - 1 is an error, and so is another number of
            words.
        name: of the setting that names the file, for messages.
        words: what another file of the data set has for labels; `None` where this is the first one.
        columns: what the columns are called.

    Raises:
        ConfigurationError: the file does not exist, has no rows, or has a row that cannot be used.
    """
    path = Path(path)
    text = _text(path, name)
    separated = _comma_separated if _has_commas(path) else _tab_separated
    rated, rows = _labelled(*separated(text, path), path, columns)
    if not rows:
        raise ConfigurationError(f"The data set `{path}` is empty; give a file with at least one row below the header.")
    if words is None:
        words = () if rated else _words(rows, path, num_classes)
    if words:
        class_of = {word: index for index, word in enumerate(words)}
        return LabelledSentences([(row.sentence, _class_of_word(row, class_of)) for row in rows], words)
    return LabelledSentences([(row.sentence, _class_of_number(row, rated, num_classes)) for row in rows])


def cannot_be_read(path: Path, error: OSError) -> ConfigurationError:
    """What to raise of a data file that the system does not let us read."""
    return ConfigurationError(
        f"The data file `{path}` cannot be read ({error.strerror}); make it readable, or give another one."
    )


def told_of(words: Sequence[str]) -> str:
    """Name labels in words: all, or of many the first and the last."""
    shown = [f"`{word}`" for word in words]
    return ", ".join(shown) if len(words) <= FEW_CLASSES else f"{shown[0]}, …, {shown[-1]}"


def _text(path: Path, name: str) -> str:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigurationError(
            f"The data file `{path}` {what}; give `{name}` the path of a tab-separated file or a `.csv` file."
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"The data file `{path}` is not UTF-8 ({error}); save it as UTF-8.") from error
    except OSError as error:
        raise cannot_be_read(path, error) from error


def _has_commas(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def _comma_separated(text: str, path: Path) -> tuple[list[str], _Fields]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: _Fields = []
    line = 1
    try:
        header = [column.strip() for column in next(reader, [])]
        line = reader.line_num + 1
        for fields in reader:
            if any(field.strip() for field in fields) or len(fields) > 1:
                rows.append((f"`{path}`, line {line}", fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigurationError(
            f"`{path}`, line {line}: the row cannot be read ({error}); mend it, shorten it, or give a tab-separated "
            "file."
        ) from error
    return header, rows


def _tab_separated(text: str, path: Path) -> tuple[list[str], _Fields]:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    header = [_unquoted(column).strip() for column in lines[0].split("\t")]
    rows: _Fields = []
    for number, row in _rows(lines, len(header), path):
        *first, last = row.split("\t", len(header) - 1)
        fields = [*first, *([last] if _QUOTED.fullmatch(last) else last.split("\t"))]
        rows.append((f"`{path}`, line {number}", [_unquoted(field) for field in fields]))
    return header, rows


def _labelled(header: Sequence[str], rows: _Fields, path: Path, columns: Columns) -> tuple[bool, list[_Row]]:
    """Whether labels are ratings, and the rows."""
    label = _column("label", header, path, columns.label, LABEL_COLUMNS)
    text = _column("text", header, path, columns.text, TEXT_COLUMNS)
    if label == text:
        raise ConfigurationError(
            f"`{path}`, line 1: `{header[text]}` would be the column of labels and of sentences; name two, with "
            "`data.label_column` and `data.text_column`."
        )
    remedy = "" if _has_commas(path) else "; line breaks and tabs in a field take the last column, or a `.csv` file"
    labelled = []
    for place, fields in rows:
        if len(fields) != len(header):
            raise ConfigurationError(
                f"{place}: the number of columns is {len(fields)}, and that of the header {len(header)}: "
                f"`{' '.join(fields)[:60]}`; mend or remove the row{remedy}."
            )
        labelled.append(_row(place, fields[label], fields[text]))
    unread = [column for index, column in enumerate(header) if column and index not in (label, text)]
    if unread:
        rank_zero_warn(f"Nothing is made of {', '.join(f'`{column}`' for column in unread)} in `{path}`.")
    return columns.label is None and header[label] == "rating", labelled


def _column(kind: str, header: Sequence[str], path: Path, name: str | None, usual: Sequence[str]) -> int:
    """The place of the column of labels or texts."""
    found = [index for index, column in enumerate(header) if column in (usual if name is None else (name,))]
    if len(found) == 1:
        return found[0]
    setting = f"data.{kind}_column"
    told = f"{len(found)} columns" if found else "no column"
    wanted = " or ".join(f"`{column}`" for column in usual) if name is None else f"`{name}` (`{setting}`)"
    between = "commas" if _has_commas(path) else "tabs (the name of a file with commas ends with `.csv`)"
    shown = ("," if _has_commas(path) else "\t").join(header)[:60]
    raise ConfigurationError(
        f"`{path}`, line 1: the header is {shown!r}, with {told} named {wanted}; name one so, or give "
        f"its name as `{setting}`. Between columns stand {between}."
    )


def _rows(lines: Sequence[str], columns: int, path: Path) -> Iterator[tuple[int, str]]:
    """The rows below the header that are not blank, each with the number of its first line."""
    start = 1
    while start < len(lines):
        end = _end_of_row(lines, start, columns, path)
        row = "\n".join(lines[start:end])
        if row.strip():
            yield start + 1, row
        start = end


def _end_of_row(lines: Sequence[str], start: int, columns: int, path: Path) -> int:
    """The line behind a row: of a quoted field, the last one, the lines go on without a tab, until one closes it."""
    *first, field = lines[start].split("\t", columns - 1)
    if len(first) + 1 < columns or not field.startswith('"') or field.count('"') % 2 == 0:
        return start + 1
    for end in range(start + 1, len(lines)):
        if lines[end].count('"') % 2 == 1:
            further = lines[start + 1 : end + 1]
            if not _QUOTED.fullmatch("\n".join([field, *further])):
                break
            if any("\t" in line for line in further):
                raise ConfigurationError(
                    f"`{path}`, line {start + 1}: the last column begins with a quotation mark, and whether it ends in "
                    f"line {end + 1} cannot be told, since there are tabs on the way; write it without line breaks."
                )
            return end + 1
    return start + 1


def _unquoted(field: str) -> str:
    quoted = _QUOTED.fullmatch(field)
    return field if quoted is None else quoted[1].replace('""', '"')


def _row(place: str, label: str, sentence: str) -> _Row:
    if not label.strip() or not sentence.strip():
        empty = "sentence" if label.strip() else "label"
        raise ConfigurationError(f"{place}: the {empty} is empty; mend or remove the row.")
    return _Row(place, label.strip(), sentence.strip())


def _words(rows: Sequence[_Row], path: Path, num_classes: int) -> Sequence[str]:
    """The labels in their order where they are words, and nothing where they are numbers."""
    numbers = [row for row in rows if _is_number(row.label)]
    if len(numbers) == len(rows):
        return ()
    words = sorted({row.label for row in rows})
    if numbers:
        word = next(row for row in rows if not _is_number(row.label))
        raise ConfigurationError(
            f"{numbers[0].place}: the label `{numbers[0].label}` is a number, and `{word.label}` ({word.place}) is a "
            "word; write numbers alone or words alone."
        )
    if len(words) == 1:
        raise ConfigurationError(f"All labels of `{path}` are `{words[0]}`; give a file with two labels or more.")
    if len(words) != num_classes:
        raise ConfigurationError(
            f"The labels of `{path}` are {len(words)} words, {told_of(words)}, and `data.num_classes={num_classes}`; "
            f"give `data.num_classes={len(words)}` if they are meant, or mend them."
        )
    return words


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def _class_of_word(row: _Row, class_of: Mapping[str, int]) -> int:
    if row.label not in class_of:
        raise ConfigurationError(
            f"{row.place}: the label `{row.label}` is none of {told_of(list(class_of))}; mend or remove the row."
        )
    return class_of[row.label]


def _class_of_number(row: _Row, rated: bool, num_classes: int) -> int:
    place, label, _ = row
    try:
        number = float(label) if rated else int(label)
    except ValueError as error:
        kind = "number" if rated else "whole number"
        raise ConfigurationError(f"{place}: `{label}` is not a {kind}; mend or remove the row.") from error
    if rated and not (number < 0 or number > 0):
        raise ConfigurationError(f"{place}: the rating `{label}` is neither below nor above 0; remove the row.")
    found = int(number > 0) if rated else int(number)
    if found < 0:
        raise ConfigurationError(
            f"{place}: class `{found}` is below 0, and classes are counted from 0; mend the row, or write `rating` in "
            "the header where numbers below and above 0 are two classes."
        )
    if found >= num_classes:
        raise ConfigurationError(
            f"{place}: class `{found}` is out of range for `data.num_classes={num_classes}` "
            f"(0 to {num_classes - 1}); raise `data.num_classes` or mend the row."
        )
    return found
