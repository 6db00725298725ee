"""Configurations of somebody else's: whatever they name, nothing of it is run."""

import copy
import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models import causal_lm, load_tokenizer, sentence_classifier
from hift_lightning.targets import check_command, check_hydra_nodes, check_targets, trusted_by_the_user
from hift_lightning.train import CONFIG_NAME, CONFIG_PATH, run
from tests.application.running import ENVIRONMENT, TINY, run_application, run_script
from tests.application.test_configuration import FURTHER, OPTIONS, composed

SHELL = "torch.utils.collect_env.run"
WRITES = """
from pathlib import Path
Path("proof").write_text("this ran")
def function(*args, **kwargs): ...
class Class: ...
"""


@pytest.mark.parametrize("option", [*OPTIONS, "strategy.offload=somewhere"])
def test_every_configuration_in_the_package_passes(option: str) -> None:
    check_targets(composed(option, *FURTHER.get(option, [])))


@functools.cache
def default() -> DictConfig:
    return composed()


@pytest.mark.parametrize(
    "key",
    [
        "optimizer",
        "optimizer.betas",
        "scheduler",
        "scheduler.warmup_fraction",
        "strategy",
        "strategy.precision_plugin",
        "trainer",
        "trainer.plugins",
        "trainer.plugins.0",
        "callbacks.monitor",
        "callbacks.progress_bar.theme",
        "callbacks.mine",
        "logger",
        "logger.save_dir",
        "data",
        "data.path",
        "model.module",
        "model.network",
        "model.network.config.hidden_size",
        "model.network.pretrained",
        "model.tokenizer",
        "model.tokenizer.pretrained",
        "model.converted",
        "model.pretrained",
        "anything",
        "objective",
    ],
)
@pytest.mark.parametrize("target", [SHELL, "os.system", "builtins.eval", "torch.hub.load", "hydra.utils.get_method"])
def test_a_function_is_refused_wherever_it_stands(key: str, target: str) -> None:
    cfg = copy.deepcopy(default())
    OmegaConf.set_struct(cfg, False)
    node = {"_target_": target, "command": "touch proof"}
    if key.endswith(".0"):
        cfg.trainer.plugins = [node]
    else:
        OmegaConf.update(cfg, key, node, merge=False, force_add=True)
    with pytest.raises(ConfigurationError) as refusal:
        check_targets(cfg)
    assert str(refusal.value).startswith(f"`{key}._target_={target}` ")
    assert f"`trusted_targets=[{target}]`" in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("optimizer", "torch.nn.Linear"),
        ("optimizer", "torch.optim.lr_scheduler.LambdaLR"),
        ("optimizer", "torch.optim"),
        ("scheduler", "torch.optim.AdamW"),
        ("callbacks.monitor", "lightning.pytorch.loggers.CSVLogger"),
        ("callbacks.progress_bar.theme", "lightning.pytorch.callbacks.LambdaCallback"),
        ("logger", "lightning.pytorch.callbacks.ModelCheckpoint"),
        ("strategy", "lightning.Trainer"),
        ("trainer", "hift_lightning.strategies.hift.HiFTStrategy"),
        ("data", "hift_lightning.models.classification.ClassificationModule"),
        ("model.module", "hift_lightning.data.SentenceDataModule"),
        ("model.module", "hift_lightning.models.classification.ClassificationModule.load_from_checkpoint"),
        ("model.network", "hift_lightning.models.load_tokenizer"),
        ("model.tokenizer", "hift_lightning.models.causal_lm"),
        ("optimizer", "torch.optim.AdamW.__init__"),
        ("optimizer", "torch.__main__.X"),
        ("optimizer", ""),
        ("optimizer", "torch.optim.NoSuchThing"),
    ],
)
def test_a_class_of_another_kind_is_refused(key: str, target: str) -> None:
    with pytest.raises(ConfigurationError, match=f"`{key}._target_="):
        check_targets(composed(f"{key}._target_='{target}'"))


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("optimizer", "torch.optim.NAdam"),
        ("scheduler", "torch.optim.lr_scheduler.StepLR"),
        ("callbacks.monitor", "lightning.pytorch.callbacks.DeviceStatsMonitor"),
        ("strategy", "lightning.pytorch.strategies.SingleDeviceStrategy"),
        ("model.network", "torch.nn.Sequential"),
        ("model.tokenizer", "transformers.PreTrainedTokenizerFast"),
    ],
)
def test_a_class_of_the_right_kind_is_taken(key: str, target: str) -> None:
    check_targets(composed(f"{key}._target_={target}"))


def test_classes_stand_below_those_that_take_them() -> None:
    check_targets(composed("+trainer.profiler._target_=lightning.pytorch.profilers.SimpleProfiler"))
    check_targets(composed("+callbacks.checkpoint.train_time_interval._target_=datetime.timedelta"))


def test_an_interpolated_target_is_looked_at_where_it_is_used() -> None:
    cfg = composed(f"+hidden={SHELL}", "optimizer._target_=${hidden}")
    with pytest.raises(ConfigurationError, match=f"`optimizer._target_={SHELL}`"):
        check_targets(cfg)
    with pytest.raises(ConfigurationError, match="`optimizer.eps._target_=hift_lightning.schedule.linear`"):
        check_targets(composed("optimizer.eps=${scheduler}"))


def test_a_module_of_a_stranger_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_a_stranger.py").write_text(WRITES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="importing it would run it"):
        check_targets(composed("optimizer._target_=of_a_stranger.Class"))
    assert not (tmp_path / "proof").exists()


def test_what_is_trusted_passes_everywhere() -> None:
    cfg = composed("optimizer._target_=mine.Optimizer", "data._target_=mine.data")
    check_targets(cfg, ["mine.Optimizer", "mine.data"])
    with pytest.raises(ConfigurationError, match="`data._target_=mine.data`"):
        check_targets(cfg, ["mine.Optimizer"])


EVIL = f"{{_target_: {SHELL}, command: 'touch proof'}}"
PRESETS = {
    "optimizer": f"optimizer: {EVIL}",
    "nested": f"optimizer: {{betas: [{EVIL}, 0.9]}}",
    "callback": f"callbacks: {{mine: {EVIL}}}",
    "module": "data: {_target_: of_a_stranger.Class}",
    "asks for itself": f"trusted_targets: [{SHELL}]\noptimizer: {EVIL}",
    "hydra callback": f"hydra: {{callbacks: {{mine: {EVIL}}}}}",
    "instead of ours": f"hydra: {{callbacks: {{sweep_table: {EVIL}}}}}",
    "sweeper": f"hydra: {{sweeper: {{params: {{x: {EVIL}}}}}}}",
    "logging factory": "hydra: {job_logging: {handlers: {file: {'()': os.system, command: touch proof}}}}",
    "logging class": "hydra: {job_logging: {handlers: {file: {class: of_a_stranger.Class}}}}",
    "logging object": "hydra: {hydra_logging: {handlers: {console: {stream: 'ext://of_a_stranger.Class'}}}}",
}
NAMED = {
    "optimizer": "`optimizer._target_=",
    "nested": "`optimizer.betas.0._target_=",
    "callback": "`callbacks.mine._target_=",
    "module": "`data._target_=of_a_stranger.Class`",
    "asks for itself": "`trusted_targets=['torch.utils.collect_env.run']` comes from a file other than conf/train.yaml",
    "hydra callback": "`hydra.callbacks.mine._target_=",
    "instead of ours": "`hydra.callbacks.sweep_table._target_=",
    "sweeper": "`hydra.sweeper.params.x._target_=",
    "logging factory": "`hydra.job_logging.handlers.file.()=os.system`",
    "logging class": "`hydra.job_logging.handlers.file.class=of_a_stranger.Class`",
    "logging object": "`hydra.hydra_logging.handlers.console.stream=ext://of_a_stranger.Class`",
}


def write_preset(folder: Path, preset: str) -> None:
    (folder / "presets" / "experiment").mkdir(parents=True, exist_ok=True)
    (folder / "presets" / "experiment" / "strangers.yaml").write_text(f"# @package _global_\n{preset}\n")
    (folder / "of_a_stranger.py").write_text(WRITES)


def run_preset(folder: Path, preset: str) -> subprocess.CompletedProcess[str]:
    write_preset(folder, preset)
    words = ["--config-dir", "presets", *TINY, "experiment=strangers", "hydra.run.dir=here"]
    return run_script(folder, "train.py", *words, environment={**ENVIRONMENT, "PYTHONPATH": str(folder)})


@pytest.mark.parametrize("kind", ["nested", "asks for itself", "hydra callback"])
def test_a_preset_of_a_stranger_runs_nothing_and_the_application_ends_with_a_sentence(
    kind: str, tmp_path: Path
) -> None:
    ended = run_preset(tmp_path, PRESETS[kind])
    assert not (tmp_path / "proof").exists()
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith(NAMED[kind]), ended.stderr


@pytest.mark.parametrize("script", ["train.py", "plan.py"])
def test_a_preset_that_is_no_yaml_is_named_with_its_line(script: str, tmp_path: Path) -> None:
    write_preset(tmp_path, "strategy:\n  always_active: [network.model.layers.2[2-9].*]")
    ended = run_script(tmp_path, script, "--config-dir", "presets", "experiment=strangers")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    told = ended.stderr.strip().splitlines()[-1]
    assert told.startswith("A file of the configuration is no YAML (while parsing a flow sequence in ")
    assert f'"{tmp_path}/presets/experiment/strangers.yaml", line 3, column ' in told
    assert told.endswith("; mend it there.")


@pytest.mark.parametrize("swept", ["experiment=group2,strangers", "experiment=choice(strangers)", "optimizer=sweeps"])
@pytest.mark.parametrize("kind", [kind for kind in PRESETS if kind.startswith(("hydra", "instead", "logging"))])
def test_a_sweep_over_presets_runs_nothing_of_a_stranger_s(
    kind: str, swept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_preset(tmp_path, PRESETS[kind])
    (tmp_path / "presets" / "optimizer").mkdir()
    sweeps = "# @package _global_\nhydra: {sweeper: {params: {experiment: 'group2,strangers'}}}\n"
    (tmp_path / "presets" / "optimizer" / "sweeps.yaml").write_text(sweeps)
    with pytest.raises(ConfigurationError) as refusal:
        check_command(["-m", "--config-dir", "presets", swept, "seed=1,2"], run, CONFIG_PATH, CONFIG_NAME)
    assert str(refusal.value).startswith(NAMED[kind])
    assert not (tmp_path / "proof").exists()


def test_a_sweep_over_presets_with_one_that_is_no_yaml_ends_before_its_first_job(tmp_path: Path) -> None:
    write_preset(tmp_path, "strategy:\n  always_active: [network.model.layers.2[2-9].*]")
    ended = run_script(tmp_path, "train.py", "-m", "--config-dir", "presets", *TINY, "experiment=group2,strangers")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith("A file of the configuration is no YAML (")
    assert not (tmp_path / "outputs").exists()


def test_planning_runs_nothing_of_a_stranger_either(tmp_path: Path) -> None:
    for kind in ("nested", "hydra callback"):
        write_preset(tmp_path, PRESETS[kind])
        ended = run_script(tmp_path, "plan.py", "--config-dir", "presets", "experiment=strangers")
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        assert ended.stderr.strip().splitlines()[-1].startswith(NAMED[kind]), ended.stderr
    assert not (tmp_path / "proof").exists()


def check_preset(folder: Path, preset: str, *overrides: str) -> None:
    """What the application does before it builds anything, in this process."""
    write_preset(folder, preset)
    command_line = ["--config-dir", str(folder / "presets"), "experiment=strangers", "output_dir=here", *overrides]
    check_command(command_line, run, CONFIG_PATH, CONFIG_NAME)
    with initialize_config_module("hift_lightning.conf", version_base="1.3"):
        searched = f"hydra.searchpath=[file://{folder / 'presets'}]"
        cfg = compose("train", overrides=[searched, *command_line[2:]], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    try:
        check_targets(cfg_of_the_job(cfg), trusted_by_the_user(cfg))
    finally:
        HydraConfig.instance().cfg = None


def cfg_of_the_job(cfg: DictConfig) -> DictConfig:
    job = copy.deepcopy(cfg)
    OmegaConf.set_readonly(job, False)
    OmegaConf.set_struct(job, False)
    del job["hydra"]
    return job


@pytest.mark.parametrize("kind", PRESETS)
def test_a_preset_of_a_stranger_runs_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError) as refusal:
        check_preset(tmp_path, PRESETS[kind])
    assert str(refusal.value).startswith(NAMED[kind])
    assert not (tmp_path / "proof").exists()


def test_the_user_can_trust_what_a_preset_names_on_the_command_line(tmp_path: Path) -> None:
    callback = "{mine: {_target_: of_a_stranger.Class}}"
    preset = f"callbacks: {callback}\nhydra: {{callbacks: {callback}}}"
    with pytest.raises(ConfigurationError, match="hydra.callbacks.mine._target_=of_a_stranger.Class"):
        check_preset(tmp_path, preset, "trusted_targets=[of_a_stranger.Other]")
    check_preset(tmp_path, preset, "trusted_targets=[of_a_stranger.Other,of_a_stranger.Class]")


def test_a_pickle_is_not_read_to_run_a_job_again(tmp_path: Path) -> None:
    ended = run_application(tmp_path, "--experimental-rerun", "config.pickle")
    assert ended.returncode == 1
    assert ended.stderr.startswith("`--experimental-rerun=config.pickle` reads a pickle")


def test_hydra_s_own_nodes_pass() -> None:
    check_hydra_nodes(
        OmegaConf.create(
            {
                "callbacks": {"sweep_table": {"_target_": "hift_lightning.sweep.SweepTable"}},
                "sweeper": {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"},
                "launcher": {"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"},
                "job_logging": {
                    "handlers": {"console": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}}
                },
            }
        )
    )


SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


class TestModelFolders:
    """A folder with weights can bring Python files; they are not run."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
        folder = tmp_path / "model"
        causal_lm(None, None, {"model_type": "llama", **SHAPE}).save_pretrained(folder)
        (folder / "code.py").write_text(WRITES)
        return folder

    def bring_code(self, folder: Path, **changes: Any) -> None:
        config = json.loads((folder / "config.json").read_text())
        names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
        config["auto_map"] = dict.fromkeys(names, "code.Class") | {"AutoTokenizer": ["code.Class", None]}
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Class", None]}}))

    @pytest.mark.parametrize("build", ["causal_lm", "sentence_classifier", "load_tokenizer"])
    def test_an_architecture_that_only_its_code_knows_is_refused_with_a_sentence(
        self, folder: Path, build: str
    ) -> None:
        self.bring_code(folder, model_type="of_a_stranger")
        with pytest.raises(ConfigurationError, match=str(folder)) as refusal:
            {
                "causal_lm": lambda: causal_lm(None, str(folder), {}),
                "sentence_classifier": lambda: sentence_classifier(None, str(folder), 2, "last", {}),
                "load_tokenizer": lambda: load_tokenizer(str(folder)),
            }[build]()
        assert "\n" not in str(refusal.value)
        assert not Path("proof").exists()

    def test_a_known_architecture_is_built_from_its_own_code(self, folder: Path) -> None:
        self.bring_code(folder)
        assert type(causal_lm(None, str(folder), {})).__module__.startswith("transformers.")
        assert not Path("proof").exists()

    def test_weights_in_a_pickle_are_not_read(self, folder: Path) -> None:
        class RunsWhenRead:
            def __reduce__(self) -> tuple[Any, ...]:
                return exec, ("open('proof', 'w').write('this ran')",)

        (folder / "model.safetensors").unlink()
        torch.save({"weights": RunsWhenRead()}, folder / "pytorch_model.bin")
        with pytest.raises(ConfigurationError, match=str(folder)):
            causal_lm(None, str(folder), {})
        assert not Path("proof").exists()
