"""The LightningModule for causal language models."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from hift_lightning import schedule
from hift_lightning.data import TextDataModule
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models import causal_lm
from hift_lightning.models.language_modeling import LanguageModelingModule
from hift_lightning.strategies import HiFTStrategy

VOCABULARY = 260
# as transformers calls them; each family computes its loss in code of its own
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"num_key_value_heads": 1}, "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 16}, "gpt2": {},
    "gpt_neo": {"attention_types": [[["global"], 2]]}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}  # fmt: skip
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def network(family: str = "llama", **numbers: Any) -> Any:
    torch.manual_seed(0)
    further = {"intermediate_size": 64} if family not in ("gpt2", "opt") else {}
    return causal_lm(None, None, {"model_type": family, **SHAPE, **further, **FAMILIES[family], **numbers})


def module(net: nn.Module, rate: float = 1e-3) -> LanguageModelingModule:
    return LanguageModelingModule(net, partial(torch.optim.AdamW, lr=rate))


def rows(count: int, length: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (count, length), generator=generator)
    # each row counts another number of tokens, the first one none
    counted = torch.arange(length) > length - 1 - torch.arange(count)[:, None]
    return [{"input_ids": row, "labels": row.masked_fill(~kept, -100)} for row, kept in zip(ids, counted, strict=True)]


def quiet_trainer(folder: Path, **arguments: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def sum_of_losses(net: Any, data: list[dict[str, torch.Tensor]]) -> tuple[float, int]:
    """The cross entropy of next tokens as the definition tells it, and how many there are."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in data:
            logits = net(input_ids=row["input_ids"][None]).logits[0].float()
            for place in range(len(logits) - 1):
                wanted = int(row["labels"][place + 1])
                if wanted != -100:
                    total -= float(logits[place].log_softmax(0)[wanted])
                    count += 1
    return total, count


@pytest.fixture
def without_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps be called without a Trainer."""
    monkeypatch.setattr(LanguageModelingModule, "log", lambda self, *args, **kwargs: None)


@pytest.mark.usefixtures("without_log")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_mean_over_counted_tokens_in_every_family(family: str) -> None:
    net = network(family).eval()
    data = rows(3)
    batch = {name: torch.stack([row[name] for row in data]) for name in ("input_ids", "labels")}
    loss = module(net).training_step(batch, 0)
    total, count = sum_of_losses(net, data)
    assert count == 3
    assert loss.item() == pytest.approx(total / count, rel=1e-4)


@pytest.mark.usefixtures("without_log")
def test_a_batch_of_prompts_alone_has_a_loss_and_gradients_of_zero() -> None:
    net = network()
    ids = torch.arange(24).view(2, 12)
    loss = module(net).training_step({"input_ids": ids, "labels": torch.full_like(ids, -100)}, 0)
    assert loss.item() == 0.0
    loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in net.parameters())


def test_loss_and_perplexity_weigh_every_counted_token_alike_whatever_the_batches(tmp_path: Path) -> None:
    net = network().eval()
    data = rows(7)
    total, count = sum_of_losses(net, data)
    for batch_size in (1, 3, 7):
        loader = DataLoader(data, batch_size=batch_size)  # type: ignore[arg-type]
        (tested,) = quiet_trainer(tmp_path).test(module(net), loader, verbose=False)
        (validated,) = quiet_trainer(tmp_path).validate(module(net), loader, verbose=False)
        for part, result in (("test", tested), ("val", validated)):
            assert result[f"{part}/loss"] == pytest.approx(total / count, rel=1e-4)
            assert result[f"{part}/perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_perplexity_is_added_up_in_32_bits_whatever_the_precision(dtype: torch.dtype) -> None:
    learner = module(network()).to(dtype)
    for _ in range(1000):
        learner.test_perplexity.update(torch.tensor(5.7, dtype=torch.float32), weight=torch.tensor(2032))
    assert learner.test_perplexity.compute().item() == pytest.approx(math.exp(5.7), rel=1e-4)
    learner.test_perplexity.update(torch.tensor(math.nan), weight=torch.tensor(8))
    assert learner.test_perplexity.compute().isnan()


def test_it_learns_a_text_under_hift_and_the_whole_run_repeats(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("All hands on deck, all hands below.\n" * 200)

    def run() -> tuple[float, float]:
        data = TextDataModule(None, str(path), batch_size=4, max_length=32, cache_dir=str(tmp_path / "cache"))
        learner = LanguageModelingModule(
            network(), partial(torch.optim.AdamW, lr=1e-2), partial(schedule.linear, warmup_fraction=0.0)
        )
        trainer = quiet_trainer(tmp_path, strategy=HiFTStrategy(), max_steps=32, max_epochs=2)
        before = trainer.test(learner, data, verbose=False)[0]["test/perplexity"]
        trainer.fit(learner, data)
        return before, trainer.test(learner, data, verbose=False)[0]["test/perplexity"]

    before, after = run()
    assert before > 100
    assert after < before / 4
    assert run() == (before, after)


def test_data_with_more_tokens_than_the_network_are_refused_before_a_step(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("All hands on deck.\n" * 50)
    data = TextDataModule(None, str(path), max_length=32, cache_dir=str(tmp_path / "cache"))
    small = module(network(vocab_size=200))
    with pytest.raises(ConfigurationError, match=r"257 different tokens.*`vocab_size=200`"):
        quiet_trainer(tmp_path).test(small, data, verbose=False)
