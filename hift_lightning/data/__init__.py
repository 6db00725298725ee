"""Data modules that the configuration can name."""

from hift_lightning.data.language_modeling import TextDataModule
from hift_lightning.data.sentences import SentenceDataModule

__all__ = ["SentenceDataModule", "TextDataModule"]
