"""The layers that are found in the architectures people fine-tune, and in hand-written models.

Of each model the layers are named from the bottom to the top. A layer found in the tree holds what lies below its
path; whatever else a layer holds ("embeddings", "stem", "head", and what joined a neighbour) is listed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
import pytest
import torch
import transformers
from lightning.pytorch.demos import BoringModel, LightningTransformer, SimpleLSTM
from lightning.pytorch.demos.boring_classes import Net
from peft import LoraConfig, get_peft_model
from torch import nn

from hift_lightning.engine.partition import Plan, partition

if TYPE_CHECKING:
    from collections.abc import Callable

Expected = dict[str, list[str]]

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}


def plan_of(build: Callable[[], nn.Module]) -> Plan:
    """The plan of a model, after the checks that hold for every one."""
    model = build()
    plan = partition(model)
    placed = [name for layer in plan.layers for name in layer.parameters]
    assert sorted(placed) == sorted(name for name, weight in model.named_parameters() if weight.requires_grad)
    assert len({layer.name for layer in plan.layers}) == len(plan.layers)
    assert partition(build()) == plan
    return plan


def assert_layers(build: Callable[[], nn.Module], expected: Expected) -> None:
    """Compares names, their order, and the modules of what each layer holds beside its own path."""
    found: Expected = {}
    for layer in plan_of(build).layers:
        collected = layer.name in ("embeddings", "stem", "head")
        others = [name for name in layer.parameters if collected or not name.startswith(f"{layer.name}.")]
        found[layer.name] = list(dict.fromkeys(name.rpartition(".")[0] for name in others))
    assert list(found.items()) == list(expected.items())


def stack(path: str, depth: int = 3) -> Expected:
    return {f"{path}.{index}": [] for index in range(depth)}


def hub(name: str, config: str, **sizes: object) -> Callable[[], nn.Module]:
    """A transformers model with random weights; no hub is asked."""
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**sizes))


BERT_EMBEDDINGS = ["word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"]
OPT = {**TEXT, "ffn_dim": 24, "max_position_embeddings": 16}
GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}
GPT_NEO = {
    "hidden_size": 16,
    "num_layers": 3,
    "attention_types": [[["global", "local", "global"], 1]],
    "num_heads": 2,
    "vocab_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 24, "vocab_size": 32}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 32,
    "max_position_embeddings": 16,
    "forced_eos_token_id": None,
}
BART_EMBEDDINGS = [
    "model.shared",
    "model.encoder.embed_positions",
    "model.encoder.layernorm_embedding",
    "model.decoder.embed_positions",
    "model.decoder.layernorm_embedding",
]
BART_LAYERS = {**stack("model.encoder.layers", 2), **stack("model.decoder.layers", 2)}


def under(path: str, names: list[str]) -> list[str]:
    return [f"{path}.{name}" for name in names]


ENCODERS: dict[str, tuple[Callable[[], nn.Module], Expected]] = {
    "bert": (
        hub("BertForSequenceClassification", "BertConfig", **TEXT),
        {
            "embeddings": under("bert.embeddings", BERT_EMBEDDINGS),
            **stack("bert.encoder.layer"),
            "head": ["bert.pooler.dense", "classifier"],
        },
    ),
    "bert, masked language model, tied": (
        hub("BertForMaskedLM", "BertConfig", **TEXT),
        {
            "embeddings": under("bert.embeddings", BERT_EMBEDDINGS),
            **stack("bert.encoder.layer"),
            "head": ["cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"],
        },
    ),
    "bert, one layer": (
        hub("BertModel", "BertConfig", **{**TEXT, "num_hidden_layers": 1}),
        {
            "embeddings": under("embeddings", BERT_EMBEDDINGS),
            **stack("encoder.layer", 1),
            "head": ["pooler.dense"],
        },
    ),
    "roberta": (
        hub("RobertaForSequenceClassification", "RobertaConfig", **TEXT),
        {
            "embeddings": under(
                "roberta.embeddings",
                ["word_embeddings", "token_type_embeddings", "LayerNorm", "position_embeddings"],
            ),
            **stack("roberta.encoder.layer"),
            "head": ["classifier.dense", "classifier.out_proj"],
        },
    ),
    "distilbert": (
        hub(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            dim=16,
            n_layers=3,
            n_heads=2,
            hidden_dim=24,
            vocab_size=32,
        ),
        {
            "embeddings": under("distilbert.embeddings", ["word_embeddings", "position_embeddings", "LayerNorm"]),
            **stack("distilbert.transformer.layer"),
            "head": ["pre_classifier", "classifier"],
        },
    ),
    "albert, one layer shared by all": (
        hub("AlbertForSequenceClassification", "AlbertConfig", **TEXT, embedding_size=8),
        {
            "embeddings": [
                *under("albert.embeddings", BERT_EMBEDDINGS),
                "albert.encoder.embedding_hidden_mapping_in",
            ],
            **stack("albert.encoder.albert_layer_groups", 1),
            "head": ["albert.pooler", "classifier"],
        },
    ),
    "vit": (
        hub("ViTForImageClassification", "ViTConfig", **IMAGE),
        {
            "embeddings": ["vit.embeddings", "vit.embeddings.patch_embeddings.projection"],
            **stack("vit.layers"),
            "head": ["vit.layernorm", "classifier"],
        },
    ),
}

DECODERS: dict[str, tuple[Callable[[], nn.Module], Expected]] = {
    "gpt2, tied": (
        hub("GPT2LMHeadModel", "GPT2Config", **GPT2),
        {
            "embeddings": ["transformer.wte", "transformer.wpe"],
            **stack("transformer.h"),
            "head": ["transformer.ln_f"],
        },
    ),
    "gpt-neo": (
        hub("GPTNeoForCausalLM", "GPTNeoConfig", **GPT_NEO),
        {
            "embeddings": ["transformer.wte", "transformer.wpe"],
            **stack("transformer.h"),
            "head": ["transformer.ln_f"],
        },
    ),
    "gpt-neox": (
        hub("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT),
        {
            "embeddings": ["gpt_neox.embed_in"],
            **stack("gpt_neox.layers"),
            "head": ["gpt_neox.final_layer_norm", "lm_head"],
        },
    ),
    "opt, whose final norm is registered before its layers": (
        hub("OPTForCausalLM", "OPTConfig", **OPT),
        {
            "embeddings": under("model.decoder", ["embed_tokens", "embed_positions"]),
            **stack("model.decoder.layers"),
            "head": ["model.decoder.final_layer_norm"],
        },
    ),
    "opt with projections": (
        hub("OPTForCausalLM", "OPTConfig", **OPT, word_embed_proj_dim=8),
        {
            "embeddings": under("model.decoder", ["embed_tokens", "embed_positions", "project_in"]),
            **stack("model.decoder.layers"),
            "head": under("model.decoder", ["project_out", "final_layer_norm"]),
        },
    ),
    **{
        f"{name}, {'tied' if tied else 'untied'}": (
            hub(f"{name}ForCausalLM", f"{name}Config", **GROUPED, tie_word_embeddings=tied),
            {
                "embeddings": ["model.embed_tokens"],
                **stack("model.layers"),
                "head": ["model.norm"] if tied else ["model.norm", "lm_head"],
            },
        )
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Mixtral")
        for tied in (True, False)
    },
}

TWO_STACKS: dict[str, tuple[Callable[[], nn.Module], Expected]] = {
    "t5": (
        hub("T5ForConditionalGeneration", "T5Config", **T5),
        {
            "embeddings": ["shared"],
            "encoder.block.0": [],
            "encoder.block.1": ["encoder.final_layer_norm"],
            **stack("decoder.block", 2),
            "head": ["decoder.final_layer_norm"],
        },
    ),
    "t5, one layer in each stack": (
        hub("T5ForConditionalGeneration", "T5Config", **{**T5, "num_layers": 1}),
        {
            "embeddings": ["shared"],
            "encoder.block.0": ["encoder.final_layer_norm"],
            "decoder.block.0": [],
            "head": ["decoder.final_layer_norm"],
        },
    ),
    "bart, all tied, so without a head": (
        hub("BartForConditionalGeneration", "BartConfig", **BART),
        {"embeddings": BART_EMBEDDINGS, **BART_LAYERS},
    ),
    "bart, classifier": (
        hub("BartForSequenceClassification", "BartConfig", **BART),
        {
            "embeddings": BART_EMBEDDINGS,
            **BART_LAYERS,
            "head": ["classification_head.dense", "classification_head.out_proj"],
        },
    ),
    "clip": (
        hub(
            "CLIPModel",
            "CLIPConfig",
            text_config={**TEXT, "max_position_embeddings": 16},
            vision_config=IMAGE,
            projection_dim=8,
        ),
        {
            "embeddings": [
                "text_model.embeddings.token_embedding",
                "text_model.embeddings.position_embedding",
                "vision_model.embeddings",
                "vision_model.embeddings.patch_embedding",
                "vision_model.embeddings.position_embedding",
            ],
            "text_model.encoder.layers.0": [],
            "text_model.encoder.layers.1": [],
            "text_model.encoder.layers.2": ["text_model.final_layer_norm"],
            "vision_model.encoder.layers.0": ["vision_model.pre_layrnorm"],
            "vision_model.encoder.layers.1": [],
            "vision_model.encoder.layers.2": [],
            # the first is `logit_scale`, a bare parameter of the model
            "head": ["", "vision_model.post_layernorm", "visual_projection", "text_projection"],
        },
    ),
    "nn.Transformer in Lightning's demo": (
        lambda: LightningTransformer(vocab_size=32),
        {
            "embeddings": ["model.embedding"],
            "model.transformer.encoder.layers.0": [],
            "model.transformer.encoder.layers.1": ["model.transformer.encoder.norm"],
            **stack("model.transformer.decoder.layers", 2),
            "head": ["model.transformer.decoder.norm", "model.decoder"],
        },
    ),
}


@pytest.mark.parametrize(
    ("build", "expected"),
    [pytest.param(*case, id=name) for name, case in (ENCODERS | DECODERS | TWO_STACKS).items()],
)
def test_layers_of_known_architectures(build: Callable[[], nn.Module], expected: Expected) -> None:
    assert_layers(build, expected)


ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LLAMA_13B = {
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "intermediate_size": 13824,
}
GPT_NEO_27B = {
    "hidden_size": 2560,
    "num_layers": 32,
    "attention_types": [[["global", "local"], 16]],
    "num_heads": 20,
}


@pytest.mark.parametrize(
    ("build", "millions", "largest", "blocks"),
    [
        (hub("RobertaForSequenceClassification", "RobertaConfig", **ROBERTA), 124.65, 39.00, 14),
        (hub("RobertaForSequenceClassification", "RobertaConfig", **ROBERTA, **LARGE), 355.36, 52.00, 26),
        (hub("GPT2LMHeadModel", "GPT2Config", n_embd=1024, n_layer=24, n_head=16), 354.82, 52.51, 26),
        (hub("GPT2LMHeadModel", "GPT2Config", n_embd=1280, n_layer=36, n_head=20), 774.03, 65.64, 38),
        (hub("GPTNeoForCausalLM", "GPTNeoConfig", **GPT_NEO_27B), 2651.31, 133.90, 34),
        (hub("LlamaForCausalLM", "LlamaConfig"), 6738.42, 202.38, 34),
        (hub("LlamaForCausalLM", "LlamaConfig", **LLAMA_13B), 13015.86, 317.20, 42),
    ],
    ids=["roberta-base", "roberta-large", "gpt2-medium", "gpt2-large", "gpt-neo-2.7b", "llama-7b", "llama-13b"],
)
def test_sizes_are_those_of_the_paper(
    build: Callable[[], nn.Module], millions: float, largest: float, blocks: int
) -> None:
    """Parameters of the model and of its largest block, in millions, as the paper's memory tables have them."""
    with torch.device("meta"):
        plan = partition(build())

    assert round(plan.numel / 1e6, 2) == millions
    assert round(plan.largest.numel / 1e6, 2) == largest
    assert len(plan.blocks) == blocks


def test_peft_places_only_what_trains_in_the_layers_of_the_host() -> None:
    def build() -> nn.Module:
        host = hub("LlamaForCausalLM", "LlamaConfig", **GROUPED)()
        return get_peft_model(host, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))

    plan = plan_of(build)

    assert [layer.name for layer in plan.layers] == [f"base_model.model.model.layers.{index}" for index in range(3)]
    assert all("lora_" in name for layer in plan.layers for name in layer.parameters)
    assert [len(layer.parameters) for layer in plan.layers] == [4, 4, 4]


def test_peft_modules_to_save_are_the_head() -> None:
    def build() -> nn.Module:
        host = hub("BertForSequenceClassification", "BertConfig", **TEXT)()
        return get_peft_model(host, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))

    plan = plan_of(build)

    assert [layer.name for layer in plan.layers][-1] == "head"
    assert all("classifier.modules_to_save" in name for name in plan.layers[-1].parameters)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.value = nn.Linear(4, 4)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)


class MixtureLayer(nn.Module):
    """The experts are a list of composite modules, as a stack is."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.router = nn.Linear(4, 4)
        self.experts = nn.ModuleList(FeedForward() for _ in range(4))


class Mixture(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(MixtureLayer() for _ in range(depth))
        self.head = nn.Linear(4, 8)


@pytest.mark.parametrize("depth", [1, 3])
def test_experts_are_not_layers(depth: int) -> None:
    assert_layers(lambda: Mixture(depth), {"embeddings": ["embed"], **stack("layers", depth), "head": ["head"]})


def conv_norm(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())


class ConvNormActivation(nn.Sequential):
    """As torchvision writes it: a subclass of a container."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU())


class BasicBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 2, 3)
        self.bn1 = nn.BatchNorm2d(2)
        self.conv2 = nn.Conv2d(2, 2, 3)
        self.bn2 = nn.BatchNorm2d(2)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2, 3)
        self.bn1 = nn.BatchNorm2d(2)
        self.layer1 = nn.Sequential(BasicBlock(), BasicBlock())
        self.layer2 = nn.Sequential(BasicBlock(), BasicBlock(), BasicBlock())
        self.fc = nn.Linear(2, 5)


def test_stages_as_attributes() -> None:
    assert_layers(
        ResNet,
        {
            "stem": ["conv1", "bn1"],
            **stack("layer1", 2),
            **stack("layer2", 3),
            "head": ["fc"],
        },
    )


def test_stages_in_a_sequential_are_opened() -> None:
    def build() -> nn.Module:
        stages = [nn.Sequential(BasicBlock(), BasicBlock()), nn.Sequential(BasicBlock(), BasicBlock())]
        return nn.Sequential(nn.Conv2d(3, 2, 3), *stages, nn.Flatten(), nn.Linear(2, 5))

    assert_layers(build, {"stem": ["0"], **stack("1", 2), **stack("2", 2), "head": ["4"]})


def test_what_stands_around_the_layers_of_a_sequential_is_stem_and_head() -> None:
    def build() -> nn.Module:
        head = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 5))
        return nn.Sequential(ConvNormActivation(), BasicBlock(), nn.Conv2d(2, 2, 1), BasicBlock(), head)

    # the single convolution between the two blocks goes with the one before it
    assert_layers(build, {"stem": ["0.0", "0.1"], "1": ["2"], "3": [], "head": ["4.0", "4.2"]})


@pytest.mark.parametrize("element", [lambda: conv_norm(2), ConvNormActivation])
def test_convolution_norm_and_activation_are_one_layer(element: Callable[[], nn.Module]) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Sequential(element(), element(), element()), nn.Linear(2, 5))

    assert_layers(build, {**stack("0", 3), "head": ["1"]})


def test_a_layer_written_as_a_list_of_sublayers_stays_whole() -> None:
    def build() -> nn.Module:
        return nn.ModuleList(nn.ModuleList([Attention(), FeedForward()]) for _ in range(3))

    assert_layers(build, {"0": [], "1": [], "2": []})


def test_a_backbone_and_a_head_in_a_sequential() -> None:
    def build() -> nn.Module:
        return nn.Sequential(Mixture(2), nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)))

    assert_layers(
        build,
        {
            "embeddings": ["0.embed"],
            **stack("0.layers", 2),
            "head": ["0.head", "1.0", "1.2"],
        },
    )


def test_the_same_layer_object_repeated_is_one_layer() -> None:
    class Universal(nn.Module):
        def __init__(self, container: type[nn.Module]) -> None:
            super().__init__()
            layer = FeedForward()
            self.layers = nn.Sequential(*[layer] * 4) if container is nn.Sequential else nn.ModuleList([layer] * 4)
            self.fc = nn.Linear(4, 2)

    for container in (nn.Sequential, nn.ModuleList):
        assert_layers(lambda container=container: Universal(container), {"layers.0": [], "head": ["fc"]})


def test_a_plain_sequential_of_linear_layers() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))

    # the final norm is the head's
    assert_layers(build, {"0": [], "2": [], "4": ["3"]})


def test_vgg() -> None:
    class Vgg(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            convolutions = [part for _ in range(3) for part in (nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU())]
            self.features = nn.Sequential(*convolutions)
            self.classifier = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2))

    assert_layers(
        Vgg,
        {
            "features.0": ["features.1"],
            "features.3": ["features.4"],
            "features.6": ["features.7"],
            "classifier.0": [],
            "classifier.3": [],
        },
    )


def test_the_norm_of_a_convolution_stays_with_it_when_the_last_layer_stands_elsewhere() -> None:
    class Cnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
            self.fc = nn.Linear(2, 5)

    assert_layers(Cnn, {"features.0": [], "features.2": ["features.3"], "fc": []})


def test_a_cnn_with_attributes() -> None:
    assert_layers(Net, {"conv1": [], "conv2": [], "fc1": [], "fc2": []})


def test_torch_modules_of_several_parts_stay_whole() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4, num_layers=2)
            self.attention = nn.MultiheadAttention(4, 2)
            self.norm = nn.LayerNorm(4)
            self.project = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.words = nn.Embedding(8, 4)
            self.fc = nn.Linear(4, 2)

    assert_layers(
        Tagger,
        {
            "embeddings": ["words"],
            "lstm": [],
            "attention": ["norm"],
            "project": [],
            "fc": [],
        },
    )


def test_an_lstm_language_model() -> None:
    assert_layers(
        lambda: SimpleLSTM(vocab_size=8),
        {
            "embeddings": ["encoder"],
            "rnn": [],
            "decoder": [],
        },
    )


def test_one_layer() -> None:
    assert_layers(BoringModel, {"layer": []})
    assert [layer.name for layer in plan_of(lambda: nn.Linear(2, 2)).layers] == ["Linear"]
    assert [layer.name for layer in plan_of(lambda: nn.LayerNorm(2)).layers] == ["LayerNorm"]


class Loose(nn.Module):
    """Bare parameters on the model itself and between its layers, before and behind which nothing else stands."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(4))
        self.first = nn.ModuleList(FeedForward() for _ in range(2)) if stacked else nn.Linear(4, 4)
        self.gate = nn.ParameterDict({"a": nn.Parameter(torch.zeros(4))}) if stacked else nn.LayerNorm(4)
        self.last = nn.ModuleList(FeedForward() for _ in range(2)) if stacked else nn.Linear(4, 4)


def test_bare_parameters_join_the_nearest_layer() -> None:
    assert_layers(
        lambda: Loose(stacked=True),
        {
            "first.0": [""],
            "first.1": ["gate"],
            "last.0": [],
            "last.1": [],
        },
    )
    assert_layers(lambda: Loose(stacked=False), {"first": [""], "last": ["gate"]})


def test_a_bare_parameter_that_is_named_like_the_top_joins_the_last_layer() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = nn.Parameter(torch.zeros(()))
            self.first = nn.ModuleList(FeedForward() for _ in range(2))
            self.last = nn.ModuleList(FeedForward() for _ in range(2))

    assert_layers(Towers, {"first.0": [], "first.1": [], "last.0": [], "last.1": [""]})


def test_class_tokens_and_position_tables_on_the_model_are_embeddings() -> None:
    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
            self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
            self.patch_embed = nn.Conv2d(3, 4, 2)
            self.blocks = nn.Sequential(*[FeedForward() for _ in range(2)])
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 2)

    plan = plan_of(Vit)

    assert plan.layers[0].parameters == ("cls_token", "pos_embed", "patch_embed.weight", "patch_embed.bias")
    assert [layer.name for layer in plan.layers] == ["embeddings", "blocks.0", "blocks.1", "head"]


def test_an_output_embedding_is_the_head() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_in = nn.Embedding(8, 4)
            self.embed_out = nn.Linear(4, 8)
            self.layers = nn.ModuleList(FeedForward() for _ in range(2))

    assert_layers(Model, {"embeddings": ["embed_in"], **stack("layers", 2), "head": ["embed_out"]})


class SentenceEmbedder(L.LightningModule):
    """A LightningModule around another; what the outer ones are called says nothing of the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = Wrapped()
        self.loss = nn.Linear(4, 2)


class Wrapped(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedder = hub("BertModel", "BertConfig", **TEXT)()


def test_nested_lightning_modules() -> None:
    path = "classifier.embedder"

    assert_layers(
        SentenceEmbedder,
        {
            "embeddings": under(f"{path}.embeddings", BERT_EMBEDDINGS),
            **stack(f"{path}.encoder.layer"),
            "head": [f"{path}.pooler.dense", "loss"],
        },
    )


def test_an_alias_registered_first_gives_the_layers_its_names() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [FeedForward() for _ in range(3)]
            self.first = layers[0]
            self.layers = nn.ModuleList(layers)

    assert_layers(Aliased, {"first": [], "layers.1": [], "layers.2": []})


def test_stacks_whose_weights_are_tied_to_each_other() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleList(FeedForward() for _ in range(2))
            self.decoder = nn.ModuleList(FeedForward() for _ in range(2))
            for one, other in zip(self.encoder, self.decoder, strict=True):
                other.up.weight = one.up.weight
                other.up.bias = one.up.bias

    plan = plan_of(Tied)

    assert [layer.name for layer in plan.layers] == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    assert plan.layers[2].parameters == ("decoder.0.down.weight", "decoder.0.down.bias")
