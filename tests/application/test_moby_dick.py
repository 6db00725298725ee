"""The packaged text, and the script that made it."""

import io
import tarfile
from pathlib import Path

import pytest

from hift_lightning.data.language_modeling import MOBY_DICK
from hift_lightning.data.make_moby_dick import CHAPTERS, make
from hift_lightning.engine.errors import ConfigurationError


def archive(folder: Path, chapters: dict[int, str]) -> Path:
    path = folder / "package.tgz"
    with tarfile.open(path, "w:gz") as package:
        for number, text in chapters.items():
            member = tarfile.TarInfo(f"package/data/chapter_{number}.txt")
            content = text.encode("utf-8")
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return path


def test_the_packaged_text_is_what_the_documentation_says() -> None:
    text = MOBY_DICK.read_text(encoding="utf-8")
    assert text.startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.")
    assert sum(line.startswith("CHAPTER ") for line in text.split("\n")) == CHAPTERS == 54
    assert 200_000 < MOBY_DICK.stat().st_size < 700_000
    assert "public domain" in (MOBY_DICK.parent / "SOURCE").read_text(encoding="utf-8")


def test_chapters_and_paragraphs_are_kept_in_order_and_twice_the_same_bytes_come_out(tmp_path: Path) -> None:
    source = archive(
        tmp_path, {2: "CHAPTER 2.\n\nSo it went—on.\n", 1: "CHAPTER 1.\r\n\r\n  A  first.\r\n\r\nA second."}
    )
    assert make(source, tmp_path / "once", chapters=2) == make(source, tmp_path / "twice", chapters=2)
    made = (tmp_path / "once" / "moby_dick.txt").read_bytes()
    assert made.decode("utf-8") == "CHAPTER 1.\n\nA first.\n\nA second.\n\n\nCHAPTER 2.\n\nSo it went—on.\n"
    assert made == (tmp_path / "twice" / "moby_dick.txt").read_bytes()
    assert "1851" in (tmp_path / "once" / "SOURCE").read_text()


def test_another_archive_is_refused_by_the_name_of_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no `package/data/chapter_2\.txt`"):
        make(archive(tmp_path, {1: "CHAPTER 1."}), tmp_path, chapters=2)
    with pytest.raises(ConfigurationError, match="does not exist"):
        make(tmp_path / "missing.tgz", tmp_path)
