"""Long preparation shows a bar on the terminal of rank 0, and nothing elsewhere."""

from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from hift_lightning import HiFTStrategy
from hift_lightning.data import SentenceDataModule, TextDataModule
from hift_lightning.data.documents import Split, read_documents
from hift_lightning.data.encoding import ByteEncoder
from hift_lightning.data.packing import write_tokens
from hift_lightning.progress import PreparationBar
from tests.small_transformer import SmallTransformer, make_batches, trainer

SPLIT = Split(0.1, 0.1)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def test_the_bar_tells_what_is_done_and_how_far(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    with PreparationBar("weighing") as bar:
        bar.is_at(1, of=4)
        bar.moves_by(2)
    shown = capsys.readouterr().err
    assert "weighing" in shown
    assert " 75%" in shown


def test_no_bar_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with PreparationBar("weighing") as bar:
        bar.is_at(1, of=4)
    assert not capsys.readouterr().err.strip()  # older versions of rich end with a new line


def test_no_bar_on_other_ranks(
    terminal: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with PreparationBar("weighing") as bar:
        bar.is_at(1, of=4)
    assert capsys.readouterr().err == ""


def test_tokenising_texts_shows_a_bar(terminal: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TextDataModule(None, cache_dir=str(tmp_path))
    assert "tokenising" in capsys.readouterr().err


def test_tokenising_sentences_shows_a_bar_that_is_full_at_the_end(
    terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def tokenizer(texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(text)] for text in texts]}

    data = SentenceDataModule(tokenizer)
    data.setup("fit")
    assert "tokenising" in (shown := capsys.readouterr().err)
    assert "100%" in shown
    for part, sentences in data.sentences.items():
        assert [ids.tolist() for ids, _ in data._tokenised[part]] == [[len(text)] for text, _ in sentences]


def test_the_bar_of_a_text_hears_of_all_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Grüße an alle\n" * 100, encoding="utf-8")
    heard: list[int] = []
    write_tokens(read_documents([path], ByteEncoder(), SPLIT), ByteEncoder(), tmp_path, heard.append)
    assert sum(heard) == path.stat().st_size


def test_choosing_the_group_size_shows_a_bar(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = HiFTStrategy(group_size="auto", memory_budget="8GiB")
    strategy.choose_group_size(trainer(strategy, devices=1), SmallTransformer(), make_batches(1)[0])
    assert "planning" in capsys.readouterr().err
