"""The models of `conf/model/` have the number of parameters that their papers tell, without memory for them."""

import pytest
import torch
from hydra.utils import instantiate

from hift_lightning.engine.partition import partition
from tests.application.running import CONFIGURATION
from tests.application.test_configuration import composed

# Millions of parameters. The first seven are those of the HiFT paper's table of memory, which counts
# tied weights once and language models with their head; for RoBERTa it counts the encoder with the dense layer of its
# first token, which is the first layer of our `mlp` head, so ours has the last layer's 2 x width + 2 more.
PARAMETERS = {
    "llama7b": 6738.42,
    "llama13b": 13015.86,
    "roberta_base": 124.65,
    "roberta_large": 355.36,
    "gpt2_medium": 354.82,
    "gpt2_large": 774.03,
    "gptneo_2b7": 2651.31,
    "llama3_8b": 8030.26,
    "llama3_70b": 70553.71,
    "mistral7b": 7241.73,
    "qwen3_8b": 8190.74,
    "gemma2_9b": 9241.71,
    "opt13b": 12853.47,
    "minilm": 22.57,
    "smollm2": 134.52,
}
# largest layer of the paper's table, in millions
LARGEST_LAYER = {
    "llama7b": 202.38,
    "llama13b": 317.20,
    "roberta_base": 39.00,
    "roberta_large": 52.00,
    "gpt2_medium": 52.51,
    "gpt2_large": 65.64,
    "gptneo_2b7": 133.90,
}


def test_every_model_is_counted() -> None:
    assert {path.stem for path in (CONFIGURATION / "model").glob("*.yaml")} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_model_has_its_papers_number_of_parameters_without_hub_folder_tokenizer_or_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hift_lightning.models.pretrained.locate", None)
    cfg = composed(f"model={name}", "model.pretrained=null")
    with torch.device("meta"):
        network = instantiate(cfg.model.network, tokenizer=None)
    assert all(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(
        PARAMETERS[name], abs=0.005
    )


@pytest.mark.parametrize("name", LARGEST_LAYER)
def test_the_largest_layer_is_the_papers(name: str) -> None:
    cfg = composed(f"model={name}", "model.pretrained=null")
    with torch.device("meta"):
        blocks = partition(instantiate(cfg.model.network, tokenizer=None)).blocks
    assert max(block.numel for block in blocks) / 1e6 == pytest.approx(LARGEST_LAYER[name], abs=0.005)


@pytest.mark.parametrize(
    ("experiment", "patterns"),
    [("smollm2", ["model.layers.2[2-9].*", "model.norm.*"]), ("long_turns", ["head.*"])],
)
def test_the_layers_that_an_experiment_always_trains_are_what_its_comment_says(
    experiment: str, patterns: list[str]
) -> None:
    cfg = composed(f"experiment={experiment}", "model.pretrained=null")
    with torch.device("meta"):
        network = instantiate(cfg.model.network, tokenizer=None)
    assert partition(network, always_active=cfg.strategy.always_active) == partition(network, always_active=patterns)
