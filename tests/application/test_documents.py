"""Documents from files: their parts, what of them is trained, and what is refused."""

import errno
import importlib.util
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hift_lightning.data import documents
from hift_lightning.data.documents import Document, Split, find_files, read_documents
from hift_lightning.data.encoding import ByteEncoder, Piece
from hift_lightning.data.labelled import read_sentences
from hift_lightning.engine.errors import ConfigurationError

HALVES = Split(test_fraction=0.25, validation_fraction=1 / 3)


def read(*paths: Path, split: Split = HALVES) -> list[Document]:
    find_files(paths)
    return list(read_documents(paths, ByteEncoder(), split))


def text_of(read: list[Document], part: str) -> str:
    return "".join(piece.text for document in read for piece in document.pieces if document.part == part)


def written(path: Path, *examples: Any) -> Path:
    path.write_text("".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples), encoding="utf-8")
    return path


def test_a_text_is_cut_in_stretches_at_ends_of_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    lines = [f"line {number} — and more\n" for number in range(100)]
    (tmp_path / "book.txt").write_text("".join(lines), encoding="utf-8")
    parts = read(tmp_path / "book.txt")
    assert [document.part for document in parts] == ["train", "validation", "test"]
    assert all(piece.trained for document in parts for piece in document.pieces)
    train, validation, test = (text_of(parts, part) for part in ("train", "validation", "test"))
    assert train + validation + test == "".join(lines)
    assert (train.count("\n"), validation.count("\n"), test.count("\n")) == (51, 25, 24)
    assert train.endswith("\n")


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="a —\n𝄞é", min_size=1), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_any_text_is_cut_between_characters_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, text: str, test: float, validation: float
) -> None:
    path = tmp_path_factory.mktemp("text") / "book.md"
    path.write_bytes(text.encode("utf-8"))
    if not text.strip():
        return
    parts = read(path, split=Split(test, validation))
    assert "".join("".join(piece.text for piece in part.pieces) for part in parts).split() == text.split()


def test_a_text_of_one_long_line_is_cut_at_words_and_one_without_words_anywhere(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("word " * 100_000)
    assert text_of(read(tmp_path / "words.txt"), "test") == "word " * 25_000
    (tmp_path / "signs.txt").write_text("字" * 100_000, encoding="utf-8")
    assert text_of(read(tmp_path / "signs.txt"), "test") == "字" * 25_000


def test_several_texts_are_cut_as_one_and_a_long_one_comes_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.txt").write_text("1\n" * 50)
    (tmp_path / "two.md").write_bytes(b"\xef\xbb\xbf" + b"2\r\n" * 33)
    monkeypatch.setattr(documents, "LARGEST_PIECE", 10)
    parts = read(tmp_path / "one.txt", tmp_path / "two.md")
    assert [(Path(document.place.strip("`")).name, document.part) for document in parts] == [
        ("one.txt", "train"),
        ("two.md", "train"),
        ("two.md", "validation"),
        ("two.md", "test"),
    ]
    assert [len(piece.text) for piece in parts[0].pieces] == [12] * 8 + [4]
    assert text_of(parts[:1], "train") == "1\n" * 50
    assert "".join(piece.text for document in parts[1:] for piece in document.pieces) == "2\n" * 33


def test_completions_and_the_assistants_turns_are_trained_and_prompts_are_not(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "Bye.")]
    path = written(
        tmp_path / "examples.jsonl",
        {"prompt": "2 + 2 = ", "completion": "4", "source": "a book"},
        {"text": "All of it.", "prompt": None},
        {"messages": [{"role": role, "content": content} for role, content in turns]},
    )
    path.write_text(path.read_text() + "\n  \n")
    with pytest.warns(UserWarning, match=r"Nothing is made of `source` in .*examples\.jsonl`"):
        completion, text, chat = read(path)
    assert [document.is_example for document in (completion, text, chat)] == [True, False, True]
    assert completion.pieces == [Piece("2 + 2 = ", False), Piece("4", True)]
    assert text.pieces == [Piece("All of it.", True)]
    assert "".join(piece.text for piece in chat.pieces) == (
        "system: Be brief.\nuser: Hi\nassistant: Hello.\nuser: Bye\nassistant: Bye.\n"
    )
    assert [piece.text for piece in chat.pieces if piece.trained] == [" Hello.\n", " Bye.\n"]


def test_examples_split_as_asked_and_copies_are_on_one_side(tmp_path: Path) -> None:
    examples = [{"prompt": f"Number {number}?", "completion": f"It is {number}."} for number in range(2000)]
    copies = [{"text": f"{one['prompt']} {one['completion']}".upper()} for one in examples]
    sides = [document.part for document in read(written(tmp_path / "examples.jsonl", *examples, *copies))]
    assert sides[:2000] == sides[2000:]
    shares = Counter(sides[:2000])
    assert shares["test"] / 2000 == pytest.approx(0.25, abs=0.03)
    assert shares["validation"] / 2000 == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"text": "cut', ['`{"text": "cut`', "not JSON", "column 10"]),
        ("[1, 2]", ["`[1, 2]`", "completion", "messages"]),
        ('{"question": "?", "answer": "!"}', ["question, answer", "completion"]),
        ('{"text": "one", "completion": "two"}', ["text, completion"]),
        ('{"completion": "4"}', ["found the keys completion"]),
        ('{"prompt": "2 + 2 = ", "text": "4"}', ["found the keys prompt, text"]),
        ('{"prompt": null, "completion": "4"}', ["found the keys completion"]),
        ('{"text": null}', ["found nothing; write"]),
        ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}', ["message 1", "`tool_calls`"]),
        ('{"prompt": "2 + 2", "completion": 4}', ["`completion`", "`4`", "not a text"]),
        ('{"prompt": "2 + 2", "completion": ""}', ["nothing to train on"]),
        ('{"text": ""}', ["nothing to train on"]),
        ('{"text": "\\ud834"}', ["half of a character", "position 1"]),
        ("[" * 100_000, ["cannot be read", "recursion"]),
        ('{"text": ' + "9" * 5000 + "}", ["cannot be read", "digits"]),
        ('{"messages": []}', ["`messages`", "`[]`", "role"]),
        ('{"messages": "Hi"}', ["`messages`", "Hi"]),
        ('{"messages": [{"role": "user", "content": "Hi"}, "Ho"]}', ["message 2", "`role`"]),
        ('{"messages": [{"role": "user", "text": "Hi"}]}', ["message 1", "`content`", "`None`"]),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', ["nothing to train on", "`assistant`"]),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_with_file_number_and_fault(
    tmp_path: Path, line: str, named: list[str]
) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ConfigurationError) as caught:
        read(path)
    message = str(caught.value)
    assert [part for part in [f"`{path}`, line 3", *named] if part not in message] == [], message


def test_keys_that_are_not_read_are_told_once_a_file(tmp_path: Path) -> None:
    turn = {"role": "assistant", "content": "Bonjour.", "weight": 0, "name": None}
    path = written(
        tmp_path / "examples.jsonl",
        *({"system": "Speak French.", "prompt": "Hello.", "completion": f"Bonjour {number}."} for number in range(3)),
        {"messages": [turn], "tools": []},
    )
    with pytest.warns(UserWarning, match=r"Nothing is made of `system`, `tools`, `messages\.weight` in ") as told:
        read(path)
    assert len(told) == 1


def test_a_file_that_the_system_does_not_give_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "book.txt"
    path.write_text("a\tb\n")

    def refuse(*arguments: Any, **more: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    for reading in (read, lambda path: read_sentences(path, 2)):
        with pytest.raises(ConfigurationError, match=r"book.txt` cannot be read \(Permission denied\); make"):
            reading(path)


@pytest.mark.parametrize("name", ["book.txt", "examples.jsonl"])
def test_another_encoding_is_refused_with_the_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes('{"text": "fine"}\n{"text": "caf\xe9"}\n'.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=rf"{name}`, line 2: not UTF-8.*save the file as UTF-8"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [("book.txt", ""), ("book.txt", "\n \n"), ("lines.jsonl", ""), ("lines.jsonl", "\n \n"), ("table.parquet", "")],
)
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigurationError, match=rf"{name}` is empty"):
        read(tmp_path / name)


def test_a_missing_file_another_kind_and_none_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nothing\.txt` does not exist"):
        find_files([tmp_path / "nothing.txt"])
    (tmp_path / "book.pdf").write_text("text")
    with pytest.raises(ConfigurationError, match=r"No file in the folder `.*` ends with one of \.txt, "):
        find_files([tmp_path])
    with pytest.raises(ConfigurationError, match=r"book\.pdf` is of no kind.*\.jsonl"):
        find_files([tmp_path / "book.pdf"])
    with pytest.raises(ConfigurationError, match="names no file"):
        find_files([])


def folder_with(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text("text")
    return tmp_path / "texts"


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ([], ["a/2.MD", "b.txt", "z.txt"]),
        (["a/10.jsonl", "c.parquet"], ["a/10.jsonl", "c.parquet"]),  # beside which other files tell of them
    ],
)
def test_of_a_folder_files_of_one_kind_are_taken_by_name(tmp_path: Path, more: list[str], found: list[str]) -> None:
    names = ("b.txt", "a/2.MD", "cover.pdf", ".hidden.txt", ".git/c.txt", "z.txt")
    folder = folder_with(tmp_path, *names, *more)
    (tmp_path / "one.md").write_text("text")
    assert find_files([tmp_path / "one.md", folder]) == [tmp_path / "one.md", *(folder / name for name in found)]


def test_a_file_of_another_part_is_left_out_of_a_folder_and_refused_by_itself(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "a.txt", "b.txt")
    held_out = folder / ".." / "texts" / "b.txt"
    assert find_files([folder], "data.path", [held_out]) == [folder / "a.txt"]
    with pytest.raises(
        ConfigurationError, match=r"b\.txt` is given for `data\.path` and for another part; give it once"
    ):
        find_files([folder / "b.txt"], "data.path", [held_out])
    with pytest.raises(ConfigurationError, match=r"All files of `data\.path` are given for other parts"):
        find_files([folder], "data.path", [held_out, folder / "a.txt"])


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path, "a.txt", "below/b.txt")
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if str(path).endswith("below"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ConfigurationError, match=r"below` cannot be read \(Permission denied\)"):
        find_files([folder])


def test_parquet_without_its_package_is_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "table.parquet").write_text("PAR1")
    (tmp_path / "book.txt").write_text("a text\n" * 10)
    with pytest.raises(ConfigurationError, match=r"table\.parquet`.*`pyarrow`.*pip install pyarrow"):
        read(tmp_path / "table.parquet")
    assert read(tmp_path / "book.txt")


with_parquet = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="the package pyarrow is not installed"
)


@with_parquet
def test_a_table_that_takes_the_place_of_another_is_read_whatever_its_name_and_date(tmp_path: Path) -> None:
    from pyarrow import Table, array
    from pyarrow.parquet import write_table

    names = ["data[1].parquet", "data1.parquet", "data*.parquet", "d?ta.parquet"]
    for word in ("old", "new"):
        for name in names:
            write_table(Table.from_pylist([{"text": f"{word} {name}"}] * 3), tmp_path / name)
            os.utime(tmp_path / name, (1e9, 1e9))
        for name in names:
            assert [document.pieces[0].text for document in read(tmp_path / name)] == [f"{word} {name}"] * 3
    broken = array([b"\xff"]).cast("binary").view("string")
    write_table(Table.from_pydict({"text": ["fine"], "title": broken}), tmp_path / "title.parquet")
    with pytest.warns(UserWarning, match="Nothing is made of `title`"):
        assert [document.pieces[0].text for document in read(tmp_path / "title.parquet")] == ["fine"]
    write_table(Table.from_pydict({"text": broken}), tmp_path / "broken.parquet")
    with pytest.raises(ConfigurationError, match=r"broken\.parquet`, after row 0: not UTF-8"):
        read(tmp_path / "broken.parquet")
    write_table(Table.from_pydict({"text": []}), tmp_path / "empty.parquet")
    with pytest.raises(ConfigurationError, match=r"empty\.parquet` is empty"):
        read(tmp_path / "empty.parquet")


@with_parquet
def test_rows_of_parquet_are_read_like_lines(tmp_path: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    rows = [
        {"text": "All of it.", "prompt": None, "completion": None},
        {"text": None, "prompt": "2 + 2 = ", "completion": "4"},
        {"text": None, "prompt": "2 + 2 = ", "completion": None},
    ]
    path = tmp_path / "table.parquet"
    write_table(Table.from_pylist(rows[:2]), path)
    assert [document.pieces for document in read(path)] == [
        [Piece("All of it.", True)],
        [Piece("2 + 2 = ", False), Piece("4", True)],
    ]
    write_table(Table.from_pylist(rows), path)
    with pytest.raises(ConfigurationError, match=r"table\.parquet`, row 3"):
        read(path)
    write_table(Table.from_pylist([{"prompt": "2 + 2 = ", "response": "4"}]), path)
    with pytest.raises(ConfigurationError, match=r"table\.parquet` has the columns prompt, response; write"):
        read(path)
    path.write_text("no table")
    with pytest.raises(ConfigurationError, match=r"table\.parquet` cannot be read as parquet"):
        read(path)
