"""The script that made the film-review file."""

import io
import tarfile
from pathlib import Path

import pytest

from hift_lightning.data.make_film_reviews import make
from hift_lightning.engine.errors import ConfigurationError

RATED = (
    "1\t2.26666666667\tA 'fine'  film.\r\n"
    "2\t-0.4999\tNeither here nor there\r\n"
    "3\t-0.5\tDull clichés\r\n"
    "4\t0.5\tFair enough"
)


def packed(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def source_archive(folder: Path, notice: str = "LICENSE.txt") -> Path:
    inner = packed({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": RATED.encode()})
    path = folder / "source.tar.gz"
    path.write_bytes(
        packed(
            {
                f"vaderSentiment-0/{notice}": b"a notice\r\n",
                "vaderSentiment-0/additional_resources/hutto_ICWSM_2014.tar.gz": inner,
            }
        )
    )
    return path


def test_clear_ratings_are_kept_in_order_and_twice_the_same_bytes_come_out(tmp_path: Path) -> None:
    archive = source_archive(tmp_path)
    assert make(archive, tmp_path / "once") == make(archive, tmp_path / "twice") == 3
    made = (tmp_path / "once" / "film_reviews.tsv").read_bytes()
    assert made.decode() == ("rating\tsentence\n2.27\tA 'fine' film.\n-0.50\tDull clichés\n0.50\tFair enough\n")
    assert made == (tmp_path / "twice" / "film_reviews.tsv").read_bytes()
    assert (tmp_path / "once" / "LICENSE").read_bytes() == b"a notice\n"


def test_another_archive_is_refused_by_the_name_of_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"source\.tar\.gz` holds no `LICENSE\.txt`"):
        make(source_archive(tmp_path, notice="NOTICE"), tmp_path)
    with pytest.raises(ConfigurationError, match="does not exist"):
        make(tmp_path / "missing.tar.gz", tmp_path)
