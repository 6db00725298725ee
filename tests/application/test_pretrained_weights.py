"""Loading pretrained weights: in the right dtype, never twice in memory, and with a sentence for what is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models import causal_lm, sentence_classifier
from hift_lightning.models.pretrained import pretrained_shape

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def saved(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(0)
    model = causal_lm(None, None, {**LLAMA, **config}).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    return model


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("tied", [False, True])
def test_all_weights_come_from_the_shards(tmp_path: Path, tied: bool, capfd: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path, tie_word_embeddings=tied)
    assert len(shards(tmp_path)) > 2
    loaded = causal_lm(None, str(tmp_path), {})
    assert re.search(r"Loading weights: 100%", capfd.readouterr().err)
    assert loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("stored", "asked", "lossless", "got"),
    [
        (torch.float32, torch.bfloat16, False, torch.bfloat16),
        (torch.bfloat16, torch.float32, False, torch.float32),
        (torch.float32, None, False, torch.float32),
        (torch.float16, None, False, torch.float16),
        (torch.bfloat16, torch.bfloat16, True, torch.bfloat16),
        (torch.float32, torch.bfloat16, True, torch.float32),
        (torch.float16, torch.bfloat16, True, torch.float32),
    ],
)
def test_weights_have_the_dtype_asked_for_or_one_that_loses_nothing(
    tmp_path: Path, stored: torch.dtype, asked: torch.dtype | None, lossless: bool, got: torch.dtype
) -> None:
    saved(tmp_path, stored)
    for network in (
        causal_lm(None, str(tmp_path), {}, asked, lossless),
        sentence_classifier(None, str(tmp_path), 2, "last", {}, dtype=asked, lossless=lossless),
    ):
        assert {parameter.dtype for parameter in network.parameters()} == {got}


def test_files_of_several_dtypes_are_loaded_in_one_that_holds_all_whatever_the_configuration_says(
    tmp_path: Path,
) -> None:
    saved(tmp_path, torch.bfloat16)
    weights = load_file(shards(tmp_path)[0])
    save_file({name: weight.half() for name, weight in weights.items()}, shards(tmp_path)[0], {"format": "pt"})
    assert causal_lm(None, str(tmp_path), {}).dtype == torch.float32


def test_old_files_that_hold_rotary_frequencies_too_can_be_read(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    causal_lm(None, str(tmp_path), {})


def rewrite(folder: Path, change: Any) -> None:
    """Put all weights in one file, changed."""
    weights = {name: weight for shard in shards(folder) for name, weight in load_file(shard).items()}
    change(weights)
    for path in [*shards(folder), folder / "model.safetensors.index.json"]:
        path.unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_tensors_that_a_language_model_lacks_or_has_no_place_for_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ConfigurationError, match=r"lacks 1 tensors.*`lm_head\.weight`"):
        causal_lm(None, str(tmp_path), {})
    # a classifier needs no such head, and nothing but its own is new
    sentence_classifier(None, str(tmp_path), 2, "last", {})


def test_tensors_that_a_language_model_has_no_place_for_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({"model.layers.2.extra": torch.ones(8)}))
    with pytest.raises(ConfigurationError, match=r"has 1 tensors.*no place.*`model\.layers\.2\.extra`"):
        causal_lm(None, str(tmp_path), {})


def test_a_classifiers_missing_tensor_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConfigurationError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj\.weight"):
        sentence_classifier(None, str(tmp_path), 2, "last", {})


def broken(folder: Path, how: str) -> None:
    index = folder / "model.safetensors.index.json"
    if how == "empty":
        for path in folder.iterdir():
            path.unlink()
    elif how == "no weights":
        for path in (index, *shards(folder)):
            path.unlink()
    elif how == "no configuration":
        (folder / "config.json").unlink()
    elif how == "a shard missing":
        shards(folder)[1].unlink()
    elif how == "a shard cut short":
        shards(folder)[1].write_bytes(shards(folder)[1].read_bytes()[:-100])
    elif how == "a shard of nonsense":
        shards(folder)[1].write_bytes(b"nonsense" * 100)
    elif how == "an index of nonsense":
        index.write_text("nonsense")
    elif how == "another shape":
        numbers = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**numbers, "vocab_size": 400}))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("empty", r"no weights that can be read.*model\.safetensors.*model\.pretrained=null"),
        ("no weights", r"no weights that can be read.*model\.safetensors.*model\.pretrained=null"),
        ("no configuration", r"cannot be loaded.*config\.json"),
        ("a shard missing", r"lacks `model-00002-of-\d+\.safetensors`"),
        ("a shard cut short", r"model-00002-of-\d+\.safetensors` is broken or cut short"),
        ("a shard of nonsense", r"model-00002-of-\d+\.safetensors` is broken or cut short"),
        ("an index of nonsense", r"model\.safetensors\.index\.json` is no index"),
        ("another shape", r"`lm_head\.weight` with the shape \(300, 32\).*\(400, 32\)"),
    ],
)
def test_a_broken_folder_is_refused_with_a_sentence(tmp_path: Path, how: str, named: str) -> None:
    saved(tmp_path)
    broken(tmp_path, how)
    with pytest.raises(ConfigurationError, match=named) as caught:
        causal_lm(None, str(tmp_path), {})
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def configure(folder: Path, **values: Any) -> None:
    numbers = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**numbers, **values}))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_quantized_weights_are_refused_and_not_left_untrained(tmp_path: Path, method: str) -> None:
    saved(tmp_path)
    configure(tmp_path, quantization_config={"quant_method": method, "load_in_4bit": True, "bits": 4})
    for build in (
        lambda: causal_lm(None, str(tmp_path), {}),
        lambda: causal_lm(None, str(tmp_path), {}, weights=False),
        lambda: sentence_classifier(None, str(tmp_path), 2, "last", {}),
    ):
        with pytest.raises(ConfigurationError, match=rf"quantized weights.*{method}.*give a folder"):
            build()
    configure(tmp_path, quantization_config={"load_in_8bit": True})  # as old files have it
    with pytest.raises(ConfigurationError, match="quantized weights"):
        causal_lm(None, str(tmp_path), {})
    assert LLAMA.items() <= pretrained_shape(str(tmp_path)).items()  # may be planned nevertheless
    assert "quantization_config" not in pretrained_shape(str(tmp_path))


def test_codes_in_the_place_of_a_weight_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    rewrite(tmp_path, lambda weights: weights.update({name: weights[name].to(torch.int8)}))
    for build in (
        lambda: causal_lm(None, str(tmp_path), {}),
        lambda: sentence_classifier(None, str(tmp_path), 2, "last", {}),  # whose names begin with `layers`
    ):
        with pytest.raises(ConfigurationError, match=r"has `model\.layers\.1\.self_attn\.q_proj\.weight` as I8"):
            build()


def test_weights_that_are_quantized_in_the_files_alone_are_trained(tmp_path: Path) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = saved(tmp_path, model_type="qwen3", head_dim=128, num_hidden_layers=1, **shape)
    name = "model.layers.0.self_attn.q_proj.weight"
    scale = model.get_parameter(name).detach().abs().max() / 448
    codes = (model.get_parameter(name).detach() / scale).to(torch.float8_e4m3fn)
    rewrite(tmp_path, lambda weights: weights.update({name: codes, f"{name}_scale_inv": scale.view(1, 1)}))
    configure(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    loaded = causal_lm(None, str(tmp_path), {}).get_parameter(name)
    assert loaded.dtype == torch.float32
    assert loaded.requires_grad
    alone = causal_lm(None, str(tmp_path), {}, weights=False)  # whose configuration an export writes
    assert "quantization_config" not in alone.config.to_dict()
    torch.testing.assert_close(loaded, model.get_parameter(name), atol=0.01, rtol=0.1)


def test_a_number_without_a_default_in_its_configuration_is_planned_with_too(tmp_path: Path) -> None:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    model = saved(tmp_path, model_type="qwen3_moe", num_key_value_heads=1, head_dim=24, **experts)
    configure(tmp_path, of_another_program=1)
    planned = causal_lm(None, None, pretrained_shape(str(tmp_path)))
    assert {name: p.shape for name, p in planned.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    for name in ("of_another_program", "a("):
        with pytest.raises(ConfigurationError, match=rf"{re.escape(name)}` is no number of the architecture"):
            causal_lm(None, None, {**LLAMA, "model_type": "qwen3_moe", name: 1})


def test_the_shape_of_a_hub_model_is_read_where_it_has_been_downloaded_and_the_hub_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi, constants

    repository = tmp_path / "models--somebody--small"
    saved(repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    shape = pretrained_shape("somebody/small")
    assert LLAMA.items() <= shape.items()
    with pytest.raises(ConfigurationError, match=r"somebody/large` is neither a folder nor downloaded.*give"):
        pretrained_shape("somebody/large")


def test_a_gated_model_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def gated(*args: Any, **kwargs: Any) -> None:
        raise GatedRepoError("no access", response=Mock())

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", gated)
    with pytest.raises(ConfigurationError, match=r"somebody/gated.*license.*hf auth login.*/path/to/folder"):
        causal_lm(None, "somebody/gated", {})


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_more_than_the_weights_themselves_is_in_anonymous_memory_while_they_are_loaded(
    tmp_path: Path, dtype: str
) -> None:
    wide = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    model = causal_lm(None, None, {**LLAMA, **wide, "num_attention_heads": 8})
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    assert len(shards(tmp_path)) > 4
    weights = sum(parameter.numel() for parameter in model.parameters()) * getattr(torch, dtype).itemsize
    del model
    script = f"""
import torch
from hift_lightning.models import causal_lm
from hift_lightning.process_memory import PeakAnonymousMemory, anonymous_bytes
causal_lm(None, None, {LLAMA})  # imports what it needs
before = anonymous_bytes()
with PeakAnonymousMemory() as memory:
    model = causal_lm(None, {str(tmp_path)!r}, {{}}, torch.{dtype})
    for parameter in model.parameters():
        parameter.data.add_(1)
print(memory.peak_bytes - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert weights < int(run.stdout) < 1.1 * weights
