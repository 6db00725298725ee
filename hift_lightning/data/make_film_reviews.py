"""Make `film_reviews.tsv` and its licence notice from the source archive of vaderSentiment 3.3.2.

The archive comes from PyPI (the wheel does not hold the data):

    pip download --no-binary :all: --no-deps vaderSentiment==3.3.2
    python -m hift_lightning.data.make_film_reviews vaderSentiment-3.3.2.tar.gz

Source: C.J. Hutto and E. Gilbert, VADER (ICWSM 2014), MIT: 10,605 sentences of film reviews, each with the
mean of the ratings, from -4 to 4, that people gave it. Kept are those that people call clearly good or bad:
rating and sentence, |rating| >= 0.5, in the order of the source. The same archive gives the same bytes.
"""

import io
import tarfile
from pathlib import Path

from hift_lightning.data.archives import make_from_archive
from hift_lightning.engine.errors import ConfigurationError

INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATED_SENTENCES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
NOTICE = "LICENSE.txt"
SMALLEST_RATING = 0.5


def make(archive: Path, folder: Path) -> int:
    """Write `film_reviews.tsv` and `LICENSE` into `folder`.

    Args:
        archive: the source archive of vaderSentiment, a `.tar.gz`.
        folder: where the two files go; made when it does not exist.

    Returns:
        The number of sentences written.

    Raises:
        ConfigurationError: the archive does not exist or lacks one of the files needed.
    """
    if not archive.is_file():
        raise ConfigurationError(
            f"The archive `{archive}` does not exist; get it with "
            "`pip download --no-binary :all: --no-deps vaderSentiment==3.3.2`."
        )
    with tarfile.open(archive) as outer:
        notice = _member(outer, archive, NOTICE)
        with tarfile.open(fileobj=io.BytesIO(_member(outer, archive, INNER_ARCHIVE))) as inner:
            source = _member(inner, INNER_ARCHIVE, RATED_SENTENCES).decode("utf-8")

    rows = ["rating\tsentence"]
    for line in source.split("\n"):
        _, rating, sentence = line.split("\t")
        if abs(float(rating)) >= SMALLEST_RATING:
            rows.append(f"{float(rating):.2f}\t{' '.join(sentence.split())}")

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "film_reviews.tsv").write_bytes(("\n".join(rows) + "\n").encode("utf-8"))
    (folder / "LICENSE").write_bytes(notice.replace(b"\r\n", b"\n"))
    return len(rows) - 1


def _member(archive: tarfile.TarFile, source: str | Path, ending: str) -> bytes:
    for member in archive.getmembers():
        if member.name == ending or member.name.endswith("/" + ending):
            file = archive.extractfile(member)
            if file is not None:
                return file.read()
    raise ConfigurationError(f"`{source}` holds no `{ending}`; give the source archive of vaderSentiment 3.3.2.")


if __name__ == "__main__":
    packaged = Path(__file__).parent / "film_reviews" / "film_reviews.tsv"
    make_from_archive(make, "vaderSentiment-3.3.2.tar.gz", packaged, "sentences")
