"""The planning application: what a training step of a configuration needs, and what would make it need less."""

import dataclasses
import sys
from collections.abc import Collection
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from hift_lightning.checks import check_configuration
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.settings import HiFTSettings, parse_bytes
from hift_lightning.models.architecture import check_positions
from hift_lightning.models.pretrained import pretrained_shape
from hift_lightning.output import check_writable
from hift_lightning.planner.batches import BatchSizes
from hift_lightning.planner.choice import choose
from hift_lightning.planner.findings import Findings, write_json
from hift_lightning.planner.gpus import GPUS
from hift_lightning.planner.picture import draw
from hift_lightning.planner.planning import StepPlanner, name_of_precision
from hift_lightning.planner.ranks import PlannedRanks
from hift_lightning.planner.result import Plan
from hift_lightning.planner.tables import print_tables
from hift_lightning.progress import PreparationBar
from hift_lightning.report import one_sentence_errors, write_metrics
from hift_lightning.strategies import HiFTDDPStrategy, HiFTFSDP2Strategy
from hift_lightning.strategies.blockwise import BlockwiseTraining
from hift_lightning.targets import check_command, check_targets, trusted_by_the_user

CONFIG_PATH, CONFIG_NAME = "pkg://hift_lightning.conf", "plan"


def plan_run(cfg: DictConfig, trusted_targets: Collection[str] = ()) -> Findings:
    """Plan a step of the run that `cfg` describes, and write `plan.json`, `plan.png` and `metrics.json`.

    No hub, weights, data or tokenizer are asked for anything: the model has the numbers of its file in `conf/model`,
    or those of the config.json of a `model.pretrained` that is not of that file; a batch is `data.batch_size` rows of
    `data.max_length` tokens.

    Args:
        cfg: the composed configuration of `conf/plan.yaml`.
        trusted_targets: import paths that a `_target_` may name besides what belongs in its place.

    Raises:
        ConfigurationError: a value of the configuration cannot work, there is no config.json of the model on this
            disk, or nothing fits the memory budget.
    """
    pretrained = _pretrained_of_ones_own(cfg)
    _leave_out_what_is_not_read(cfg)
    check_configuration(cfg)
    check_targets(cfg, trusted_targets)
    if pretrained is not None:
        cfg.model.network.config = pretrained_shape(pretrained)
    for key in ("compare", "batch_sizes"):
        if not isinstance(cfg[key], bool):
            raise ConfigurationError(f"`{key}={cfg[key]}` is not possible; give `true` or `false`.")
    check_writable("output_dir", cfg.output_dir)
    bandwidth = parse_bytes("bandwidth", cfg.bandwidth)
    interconnect = parse_bytes("interconnect", cfg.interconnect)
    network = parse_bytes("network", cfg.network)
    strategy = instantiate(cfg.strategy) if OmegaConf.is_dict(cfg.strategy) else cfg.strategy
    if not isinstance(strategy, BlockwiseTraining) and strategy != "auto":
        raise ConfigurationError(
            f"`strategy={cfg.strategy}` cannot be planned; give `strategy=hift`, `strategy=hift_ddp`, "
            "`strategy=hift_fsdp2` or `strategy=full`."
        )
    settings = strategy.settings if isinstance(strategy, BlockwiseTraining) else None
    ranks = _ranks(strategy, cfg.trainer)

    with PreparationBar() as progress:
        run = _Run(cfg, _build_module(cfg), progress, ranks)
        reason = None
        if settings is not None and settings.group_size == "auto":
            progress.says("looking for the largest group of layers that fits")
            choice = choose(settings, _memory_budget(settings), run.step(cfg.data.batch_size))
            settings, planned, reason = choice.settings, choice.plan, choice.reason
        else:
            progress.says("planning the step")
            planned = run.plan(settings)
        full = planned if settings is None else run.plan(None)
        ways: dict[str, Plan] = {}
        if cfg.compare and settings is not None:
            for name, way in _ways(settings, may_fuse=run.why_not_fused is None).items():
                progress.says(f"planning {name}")
                ways[name] = planned if way == settings else run.plan(way)
        batches = None
        if cfg.batch_sizes:
            progress.says("looking for the largest batches")
            batches = BatchSizes(
                lambda batch: run.plan(settings, batch), {cfg.data.batch_size: planned}, GPUS[-1].nbytes
            )

    findings = Findings(
        title=_title(pretrained or _model(cfg), cfg, settings, ranks),
        plan=planned,
        settings=settings,
        full=full,
        ways=ways,
        why_not_fused=run.why_not_fused,
        largest_batches=None if batches is None else {gpu.name: batches.largest(gpu.nbytes) for gpu in GPUS},
        batch=(cfg.data.batch_size, cfg.data.max_length),
        bandwidth=bandwidth,
        sending=interconnect if planned.ranks == planned.ranks_of_machine else min(interconnect, network),
        reason=reason,
    )
    folder = Path(cfg.output_dir)
    written = {"all numbers": write_json(findings, folder)}
    write_metrics(findings.numbers(), folder)
    try:
        written["picture"] = draw(planned, findings.title, folder)
    except ImportError:
        print("No picture, because matplotlib is not installed; run `pip install matplotlib` to have one.")
    print_tables(findings, written)
    return findings


def main() -> None:
    """Run the application on the command line's arguments."""
    with one_sentence_errors():
        check_command(sys.argv[1:], run, CONFIG_PATH, CONFIG_NAME)
    run()


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name=CONFIG_NAME)
def run(cfg: DictConfig) -> float:
    """Run `plan_run` on the command line's configuration; return the peak in bytes."""
    with one_sentence_errors():
        return float(plan_run(cfg, trusted_by_the_user(cfg)).plan.peak_bytes)


@dataclass(frozen=True)
class _Run:
    cfg: DictConfig
    module: Any
    progress: PreparationBar
    ranks: PlannedRanks | None

    def step(self, batch: int) -> StepPlanner:
        trainer = self.cfg.trainer
        return StepPlanner(
            self.module,
            self.module.blank_batch(batch, self.cfg.data.max_length),
            name_of_precision(trainer.precision),
            trainer.accumulate_grad_batches,
            trainer.gradient_clip_val,
            trainer.get("gradient_clip_algorithm"),
            self.progress.is_at,
            self.ranks,
        )

    def plan(self, settings: HiFTSettings | None, batch: int | None = None) -> Plan:
        return self.step(self.cfg.data.batch_size if batch is None else batch).plan(settings)

    @property
    def why_not_fused(self) -> str | None:
        return self.step(1).why_not_fused


def _pretrained_of_ones_own(cfg: DictConfig) -> str | None:
    """`model.pretrained`, unless it is that of the model's file in `conf/model`, which tells its shape itself."""
    pretrained = OmegaConf.select(cfg, "model.pretrained")
    if pretrained is None or "config" not in cfg.model.network:
        return None
    folder = files("hift_lightning.conf") / "model"
    if HydraConfig.initialized():
        shipped = [folder / f"{HydraConfig.get().runtime.choices['model']}.yaml"]
    else:
        shipped = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    known = {OmegaConf.select(OmegaConf.load(str(file)), "pretrained") for file in shipped if file.is_file()}
    return None if pretrained in known else str(pretrained)


def _leave_out_what_is_not_read(cfg: DictConfig) -> None:
    for node, key in ((cfg.model, "pretrained"), (cfg.data, "path")):
        if node is not None and key in node.keys():  # noqa: SIM118 (a value that must be given counts too)
            node[key] = None


def _build_module(cfg: DictConfig) -> L.LightningModule:
    with torch.device("meta"):
        network = instantiate(cfg.model.network, tokenizer=None)
    check_positions(network, cfg.data.max_length)
    module: L.LightningModule = instantiate(cfg.model.module)(network, instantiate(cfg.optimizer), None)
    return module


def _ranks(strategy: Any, trainer: DictConfig) -> PlannedRanks | None:
    devices, num_nodes = trainer.devices, trainer.num_nodes
    if isinstance(strategy, (HiFTDDPStrategy, HiFTFSDP2Strategy)):
        return PlannedRanks(strategy, devices, num_nodes)
    if (devices, num_nodes) not in ((1, 1), ("auto", 1)):
        raise ConfigurationError(
            f"`trainer.devices={devices}` and `trainer.num_nodes={num_nodes}` want a strategy of several devices; give "
            "`strategy=hift_ddp` or `strategy=hift_fsdp2`."
        )
    return None


def _memory_budget(settings: HiFTSettings) -> int:
    if settings.memory_budget is None:
        raise ConfigurationError(
            "`strategy.group_size=auto` is chosen for a memory that is not told; give `strategy.memory_budget`, such "
            "as `strategy.memory_budget=24GiB`."
        )
    return parse_bytes("memory_budget", settings.memory_budget)


def _ways(settings: HiFTSettings, may_fuse: bool) -> dict[str, HiFTSettings]:
    return {
        f"update={update}" + (", checkpointing" if checkpointing else ""): dataclasses.replace(
            settings, update=update, activation_checkpointing=checkpointing
        )
        for update in (("block", "streamed", "fused") if may_fuse else ("block", "streamed"))
        for checkpointing in (False, True)
    }


def _model(cfg: DictConfig) -> str:
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return str(chosen.get("model", cfg.model.network.config.get("model_type")))


def _title(model: str, cfg: DictConfig, settings: HiFTSettings | None, ranks: PlannedRanks | None) -> str:
    how = "full fine-tuning"
    if settings is not None:
        how = f"HiFT, group_size={settings.group_size}, update={settings.update}"
        how += ", checkpointing" if settings.activation_checkpointing else ""
        how += ", fp32 masters" if settings.master_weights else ""
    if ranks is not None:
        how += f", {ranks.strategy.strategy_name} on {ranks.num_nodes} x {ranks.devices} devices"
    optimizer = str(cfg.optimizer.get("optimizer", cfg.optimizer.get("_target_"))).rpartition(".")[2]
    return f"{model}, {optimizer}, {cfg.trainer.precision}, {cfg.data.batch_size} x {cfg.data.max_length} tokens, {how}"
