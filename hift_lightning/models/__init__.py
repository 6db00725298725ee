"""Models that the configuration can name."""

from hift_lightning.models.pretrained import load_tokenizer
from hift_lightning.models.sentence_classifier import SentenceClassifier, sentence_classifier

__all__ = ["SentenceClassifier", "load_tokenizer", "sentence_classifier"]
