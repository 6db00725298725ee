"""Models that the configuration can name."""

from hift_lightning.models.causal_lm import causal_lm
from hift_lightning.models.pretrained import load_tokenizer
from hift_lightning.models.sentence_classifier import SentenceClassifier, load_classifier, sentence_classifier

__all__ = ["SentenceClassifier", "causal_lm", "load_classifier", "load_tokenizer", "sentence_classifier"]
