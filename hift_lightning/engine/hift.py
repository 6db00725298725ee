"""Hierarchical full-parameter fine-tuning of any model with any optimizer, in plain torch.

One optimizer step flows like this, driven by the optimizer's own step hooks, so every loop that calls
``optimizer.step()`` (plain PyTorch, Fabric, Lightning, a GradScaler) is a HiFT loop::

    forward, backward      only the active block requires a gradient; autograd stops below its lowest layer
    optimizer.step()       pre-hook: page in the block's optimizer state (after the closure, if there is one)
                           the user's optimizer, untouched: it passes over parameters without a gradient
                           post-hook: free the gradients, park the state, give the next block its turn

A step that a GradScaler skips never reaches the optimizer, so the block keeps its turn. The pre-hook, or
:meth:`HiFT.after_backward` before it, looks for NaN and inf.

Source: Liu et al., "HiFT: A Hierarchical Full Parameter Fine-Tuning Strategy", https://arxiv.org/abs/2401.15207
"""

import itertools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from hift_lightning.engine.checkpointing import ActivationCheckpointing, layers_to_checkpoint
from hift_lightning.engine.compatibility import (
    check_optimizer,
    check_record,
    is_same_plan,
    number_of_plan,
    record_of_plan,
    refuse_other_plan,
)
from hift_lightning.engine.compilation import warn_of_compiled_blocks
from hift_lightning.engine.errors import ConfigurationError, NonfiniteError, add_note
from hift_lightning.engine.freezing import Freezing, GradientHook, refuse_what_is_frozen_by_another
from hift_lightning.engine.lr import DelayedSchedulers, warn_of_cycle_at_0
from hift_lightning.engine.masters import (
    check_masters,
    load_masters,
    make_masters,
    state_dict_with_masters,
    warn_of_rounded_state,
)
from hift_lightning.engine.nonfinite import LOSS, NonfiniteSearch, broken_weight, kind_of_loss
from hift_lightning.engine.optimizers import (
    names_in_optimizer,
    parameters_in,
    refuse_optimizer,
    warn_of_unoptimized,
)
from hift_lightning.engine.partition import Block, partition
from hift_lightning.engine.reach import Reach
from hift_lightning.engine.reduction import GradientReduction, Ranks
from hift_lightning.engine.report import Report, report_of
from hift_lightning.engine.residency import Residency
from hift_lightning.engine.rotation import Rotation, length_of_turn
from hift_lightning.engine.settings import HiFTSettings, parse_bytes
from hift_lightning.engine.shards import local, mesh_of
from hift_lightning.engine.shares import Shares
from hift_lightning.engine.step import Step
from hift_lightning.engine.step_calls import StepCalls
from hift_lightning.engine.update import PieceUpdate, WholeUpdate


class HiFT:
    """Trains all weights of a model while only one block of layers is active in any step.

    Between :meth:`start` and :meth:`finish` (or within ``with HiFT(...):``) only the active block's parameters
    require a gradient, and every ``optimizer.step()`` ends with the next block's turn::

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        with HiFT(model, optimizer) as hift:
            for batch in loader:
                model(batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()  # gradients are freed here; no `zero_grad` is needed

    Gradient accumulation is calling ``backward`` several times before ``optimizer.step()``. A GradScaler does not call
    the optimizer in a step with inf, so under one call ``optimizer.zero_grad()`` after each step. Three things differ
    from full fine-tuning: the gradient norm is that of the active block; Adam's ``step`` counts a parameter's own
    updates; and a delayed scheduler (:meth:`delay`) changes the rate between cycles only.

    Of a model that torch's ``fully_shard`` was called on, each rank steps its rows, and state and masters are those of
    its rows. Run a forward pass before :meth:`start` where a mixed precision policy is used: FSDP2 takes the dtypes of
    gradients from the parameters that require one in its first forward pass.

    Args:
        model: the model, on the device that it is trained on.
        optimizer: any torch optimizer over the model's parameters with the user's param groups, or a function
            that makes one from a list of parameters. Parameters that require a gradient but are in no param
            group are frozen while training.
        settings: see :class:`HiFTSettings`.
        total_steps: optimizer steps of the run; only ``steps_per_block="once"`` has to know it.
        others: further optimizers on the same model, whose parameters are left alone.
        ranks: the processes that train this model together, each on its own batches; every one builds its engine.
            Gradients are averaged over them in the backward pass, so call :meth:`after_backward` after it.
        bucket_bytes: most bytes of gradients that are sent together.
        share_with: those of the ranks among whom parked state is split (see
            :class:`~hift_lightning.engine.shares.Shares`); ``None``: every rank keeps all of it.

    Raises:
        ConfigurationError: if the optimizer cannot be used (LBFGS; one that steps another; one without parameters of
            the model), or a pattern in ``settings`` matches nothing.
    """

    updates = 0
    """Updates performed; the rotation is a function of this number."""
    skipped_steps = 0
    """Steps left out because of NaN or inf (``nonfinite="skip"``); those that a GradScaler skips do not count."""
    last_step_skipped = False
    """Whether the last ``optimizer.step()`` was one of them."""
    half_updated: str | None = None
    """A sentence on what a failed step has changed in part, until a step is completed or state is loaded."""
    page_in_ms = 0.0
    """Milliseconds that the host spent on paging in the state of the last update; its copies may take longer."""
    clip_value: float | None = None
    """Largest absolute value of a gradient that ``update="fused"`` uses; ``None`` does not clip."""
    reduction: GradientReduction | None = None
    """What averages gradients over :class:`ranks <hift_lightning.engine.reduction.Ranks>`, if there are several."""
    averages_gradients = True
    """Whether the next backward pass ends with averages over the ranks; false but for the last of a window."""

    _calls: StepCalls | None = None
    _give_back: "weakref.finalize[[Freezing, ActivationCheckpointing], Any] | None" = None
    _load_hook: RemovableHandle | None = None
    _warned_of_skipping = False
    steps_without_gradient = 0
    """Calls of the optimizer's step in a row that had nothing to update."""
    _handled_at_start = id(None)
    _counts_changes = False  # not known before the first update

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer],
        settings: HiFTSettings | None = None,
        *,
        total_steps: int | None = None,
        others: Sequence[Optimizer] = (),
        ranks: Ranks | None = None,
        bucket_bytes: int = 25 * 2**20,
        share_with: Ranks | None = None,
    ) -> None:
        self.model = model
        self.settings = settings = HiFTSettings() if settings is None else settings
        if not isinstance(settings, HiFTSettings):
            raise ConfigurationError(f"`settings={settings!r}` must be `HiFTSettings(...)`, from `hift_lightning`.")
        if not isinstance(optimizer, Optimizer):
            optimizer = optimizer(_parameters_to_train(model, settings, others))
        refuse_optimizer(optimizer)
        _refuse_what_does_not_go_together(model, settings, others)
        self._parameters = dict(model.named_parameters())
        optimized = parameters_in(optimizer)
        refuse_what_is_frozen_by_another({n: p for n, p in self._parameters.items() if p in optimized})
        self.optimizer = optimizer
        self._name_of = {parameter: name for name, parameter in self._parameters.items()}
        self.plan = partition(
            model,
            settings.layers_per_block,
            layers=settings.layers,
            frozen=settings.frozen,
            always_active=settings.always_active,
            trainable=names_in_optimizer(self._parameters, optimizer),
        )
        self._set_rotation(total_steps)
        self.trained = {name: self._parameters[name] for part in self.plan.parts for name in part.own_parameters}
        """What the optimizer trains, by name."""
        self.shares = Shares(share_with, map(self.parameters_of, self.plan.parts))
        """Which of the ranks that split parked state keeps that of which parameter."""
        for parameter in itertools.filterfalse(self.shares.keeps, self.trained.values()):
            optimizer.state.pop(parameter, None)  # Adagrad builds it in its constructor
        self.residency = Residency(optimizer, settings.offload, settings.parked_dtype)
        if settings.master_weights:
            make_masters(self.residency, filter(self.shares.keeps, self.trained.values()))
        self._mesh = mesh_of(self.trained.values())
        self._update = self._make_update()
        self._checkpointing = ActivationCheckpointing(model, self._layers_to_checkpoint(others))
        self._freezing = Freezing(self._parameters, optimizer, others)
        forgotten = self._freezing.governed.keys() - self.trained.keys()
        warn_of_unoptimized(model, forgotten, settings.frozen)
        warn_of_compiled_blocks(model, self.plan)
        if ranks is not None and ranks.size > 1:
            deliver = self._update_in_backward if settings.update == "fused" else None
            self.reduction = GradientReduction(ranks, bucket_bytes, deliver)
        self._schedulers = DelayedSchedulers(
            settings.lr_update, lambda: self.cycle, lambda: self.last_step_skipped, lambda: self.active
        )
        self._reach = Reach(len(self.plan.blocks))
        self._step = Step(NonfiniteSearch(self._mesh))

    def _set_rotation(self, total_steps: int | None) -> None:
        blocks, settings = len(self.plan.blocks), self.settings
        turn = length_of_turn(settings.steps_per_block, blocks, total_steps)
        self.rotation = Rotation(blocks, settings.order, turn, settings.seed)
        self._plan_record = record_of_plan(self.plan, self.rotation)
        self._plan_number = number_of_plan(self._plan_record)

    def _layers_to_checkpoint(self, others: Sequence[Optimizer]) -> list[str]:
        if not self.settings.activation_checkpointing:
            return []
        names = layers_to_checkpoint(self.model)
        if not others:
            return names
        own = set(self.trained.values())  # each engine sees to the layers of its optimizer
        return [name for name in names if not own.isdisjoint(self.model.get_submodule(name).parameters())]

    def _make_update(self) -> WholeUpdate | PieceUpdate:
        if self.settings.update == "block" and not self.settings.master_weights and self._mesh is None:
            return WholeUpdate(self.residency)
        window = None if self.settings.update == "block" else parse_bytes("window", self.settings.window)
        pieces = PieceUpdate(self.optimizer, self.residency, window)
        pieces.check_shards()
        return pieces

    # --- what is trained ----------------------------------------------------------------------------------------------

    @property
    def block(self) -> Block:
        """The active block."""
        return self.plan.blocks[self.rotation.block_at(self.updates)]

    @property
    def active_parts(self) -> tuple[Block, ...]:
        """What the next update changes: the active block, and what is always active."""
        always = self.plan.always_active
        return (self.block,) if always is None else (self.block, always)

    def parameters_of(self, part: Block) -> list[nn.Parameter]:
        """A part's own parameters, also those that have been given another name since (``torch.nn.utils.prune``)."""
        return [self._parameters[name] for name in part.own_parameters]

    @property
    def cycle(self) -> int:
        """Whole cycles performed."""
        return self.rotation.cycle_at(self.updates)

    def _block_parameters(self) -> list[nn.Parameter]:
        return [self._parameters[name] for name in self.block.parameters]

    # --- start and end ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish()

    @property
    def active(self) -> bool:
        """Whether training has been started and not finished."""
        return self._freezing.started

    def start(self) -> None:
        """Freeze everything but the active block, free all gradients, and attach to the optimizer."""
        if self.active:
            return
        self._reach = Reach(len(self.plan.blocks))
        self.steps_without_gradient = 0
        self._handled_at_start = id(sys.exc_info()[1])  # a run may begin in an `except` block
        check_masters(self.trained, self.settings.master_weights)
        self.shares.check_optimizer(self.optimizer)
        self._freezing.start(self.trained)
        # an engine that nobody holds any more must not leave the model frozen
        self._give_back = weakref.finalize(self, _give_back, self._freezing, self._checkpointing)
        self._give_back.atexit = False
        self._calls = StepCalls(
            self.optimizer,
            before=self.pass_on_held_rates,
            begin=self._begin_update,
            end=self._end_update,
            goes_last=self._update.uses_gradients_up,
            around_closure=self._update.in_last_backward,
        )
        self._load_hook = self.optimizer.register_load_state_dict_post_hook(lambda _: self._adopt_state())
        self._adopt_state()
        self._checkpointing.start()
        self._activate()

    def finish(self) -> None:
        """Detach from the optimizer, park everything, and let every parameter require what it did before.

        For training that goes on without HiFT, ``residency.page_in(trained.values())`` brings the state to the weights.
        """
        if not self.active:
            return
        assert self._give_back is not None
        by_itself = id(sys.exc_info()[1]) == self._handled_at_start
        try:
            self.settle()
        finally:
            self._give_back()
            if self._calls is not None:  # unless `start` has failed
                self._calls.stop()
            if self._load_hook is not None:
                self._load_hook.remove()
            self._calls = self._load_hook = None
        self.residency.synchronize()
        if by_itself:  # last, since warnings may be errors
            self._reach.warn_of_untrained(self.plan.blocks)

    def _adopt_state(self) -> None:
        warn_of_rounded_state([self._name_of[parameter] for parameter in self.residency.adopt_state()])

    def freeze_again(self) -> None:
        """Freeze what is not active, after something else has set ``requires_grad``, as PEFT's ``disable_adapter``."""
        self._freezing.freeze_again()

    def _activate(self) -> None:
        if self.reduction is not None:
            self.reduction.expect(self.block.index, self._block_parameters(), self.updates, self._plan_number)
        self._freezing.activate(self._block_parameters(), self._weak_hooks_of)

    def _weak_hooks_of(self, parameter: nn.Parameter) -> Iterator[GradientHook]:
        """As :meth:`_hooks_of`, but a parameter does not keep the engine, which may be dropped in training."""
        return map(_weak, self._hooks_of(parameter))

    def _hooks_of(self, parameter: nn.Parameter) -> Iterator[GradientHook]:
        yield from self._update.hooks_of(parameter)
        if self.reduction is not None:
            yield self._average_in_backward
        elif self.settings.update == "fused":
            yield self._update_in_backward

    # --- backward -----------------------------------------------------------------------------------------------------

    def after_backward(self, loss: Tensor | None = None, *, scaled: bool = False) -> None:
        """Tell that a backward pass has run, also one that the block took no part in.

        Optional in a plain loop on one rank: call it after every backward pass, or never. With it, a block that no
        gradient reaches is named in a warning, and it does not keep its turn for ever; and NaN and inf are found before
        clipping by norm spreads them over all gradients. Of a loss that may not reach the block at all call
        ``if loss.requires_grad: loss.backward()``, since torch refuses it otherwise, and this after it.

        Args:
            loss: of which backward was called, as it was before a GradScaler scaled it.
            scaled: whether a GradScaler did; then inf and NaN in gradients are its business, and only a loss of NaN
                counts. If :attr:`will_skip` is true then, call :meth:`pass_turn` in the place of the scaler's ``step``,
                which would look for gradients that have been freed.

        Raises:
            NonfiniteError: if there are NaN or inf, and ``nonfinite`` is ``raise``.
            RuntimeError: if no block has been reached in 16 steps, and as many as four for each block.
            ConfigurationError: if a loss was scaled under ``update="fused"``, which has used its gradients as they are.
        """
        if scaled and self.settings.update == "fused":
            raise ConfigurationError(
                "`update='fused'` uses gradients inside backward, before a GradScaler takes its scale out of them; use "
                "`update='streamed'`, or bf16, which needs no scale."
            )
        self.note_backward()
        if self.reduction is None:
            self._look_for_nonfinite(loss, scaled)
        else:
            if loss is not None:
                self._step.nonfinite_loss = self._step.nonfinite_loss or kind_of_loss(loss, scaled)
            if self.averages_gradients:
                self._average_gradients(scaled)

    def note_backward(self) -> None:
        """Tell that a backward pass has run of a loss that may be another optimizer's, which its step will show."""
        self._step.backward_ran = True
        self._step.averaged = False  # what it adds to gradients that were averaged early is of this rank alone

    def average_gradients(self, *, scaled: bool = False) -> None:
        """Average over the ranks what backward passes have left, for callers that need gradients before the step.

        Args:
            scaled: as of :meth:`after_backward`.

        Raises:
            NonfiniteError: as :meth:`after_backward`.
        """
        if self.active and self.reduction is not None and not self._step.averaged:
            self._average_gradients(scaled)

    def _average_gradients(self, scaled: bool) -> None:
        """Average what backward passes have left, and agree with the other ranks on whether the step is left out."""
        assert self.reduction is not None
        self._step.averaged = True
        closing = self.reduction.finish(self._step.backward_ran, self._step.nonfinite_loss)
        self._step.backward_ran = closing.backward_ran
        if closing.nonfinite_loss is not None:
            rank, kind = closing.nonfinite_loss
            self._meet_nonfinite(LOSS, kind, f" of rank {rank}")
        self._look_for_nonfinite(None, scaled)

    def _average_in_backward(self, parameter: Tensor) -> None:
        assert self.reduction is not None
        assert isinstance(parameter, nn.Parameter)
        if self.averages_gradients:
            self.reduction.ready(parameter)

    def _update_in_backward(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if parameter.grad is None:  # frozen since the forward pass, as by `toggle_optimizer`
            return
        name = self._name_of[parameter]
        if name in self._step.updated_in_backward:
            raise ConfigurationError(
                f"`{name}` has a gradient for the second time in one step, and `update='fused'` has used the first one "
                "inside backward; run one backward pass a step (after one that has failed call `settle()`), and keep "
                "losses of other optimizers from reaching it (`toggle_optimizer`, `hift_step`), or use "
                "`update='streamed'`."
            )
        self._step.updated_in_backward.add(name)
        if not self._step.updated:
            self.pass_on_held_rates()
            self._note_weights()
        self._step.search.look_at(name, local(parameter.grad))
        if self.clip_value is not None:
            local(parameter.grad).clamp_(-self.clip_value, self.clip_value)
        self._step.updated = True
        self._step.reached_in_backward |= name not in self.block.always_active
        if self.shares.keeps(parameter):
            self._update.step([parameter])
        else:
            parameter.grad = None

    @property
    def has_gradient(self) -> bool:
        """Whether any parameter of the active block has a gradient."""
        return any(p.grad is not None for p in self._block_parameters())

    @property
    def may_have_gradients(self) -> bool:
        """Whether there may be something to update: here, updated already in backward, or still to come from ranks."""
        to_come = self.reduction is not None and not self._step.averaged
        return self.has_gradient or self._step.updated or to_come

    @property
    def within_step(self) -> bool:
        """Whether backward passes have begun a step that is not made yet; one that is to be left out is one too."""
        return self.has_gradient or self.will_skip

    @property
    def held_in_pieces(self) -> int:
        """Most bytes of state and masters that the update in progress has had on the device at one time, in pieces."""
        return self._update.held_bytes

    def _note_reach(self) -> None:
        if self._step.reach_noted:  # before, where a closure is called more than once
            return
        self._step.reach_noted = True
        gradients = (self._parameters[name].grad for name in self.block.own_parameters)
        self._reach.note(self.block, self._step.reached_in_backward or any(one is not None for one in gradients))

    # --- the optimizer's step -----------------------------------------------------------------------------------------

    def pass_on_held_rates(self) -> None:
        """Let delayed schedulers change the rate if a cycle has ended; at the latest an update does so itself."""
        self._schedulers.pass_on()

    def update_after_hooks(self) -> None:
        """Let step pre-hooks that were registered since :meth:`start` see the gradients before the update uses them."""
        assert self._calls is not None
        self._calls.go_after_other_hooks()

    def _begin_update(self) -> None:
        # fused optimizers are called with what a GradScaler has found, and skip the step themselves
        scaled = getattr(self.optimizer, "found_inf", None) is not None
        self._freezing.refuse_changes_by_others(self.block.name)
        if self._schedulers and self.updates == 0 and self.rotation.cycle_length > 1:
            warn_of_cycle_at_0(self.optimizer, self.settings.lr_update, self.rotation.cycle_length)
        self.average_gradients(scaled=scaled)
        if self.reduction is None and not self._step.searched and not scaled:
            self._look_for_nonfinite(None, scaled=False)
        self._step.searched = False  # a closure may be called again, and leave others
        if (self._step.backward_ran or self._step.updated or self.has_gradient) and not self.will_skip:
            self._note_reach()
        if not self.has_gradient:
            return
        for parameter in self._block_parameters():
            if not self.shares.keeps(parameter):
                parameter.grad = None
        self._note_weights()
        before = [{**group} for group in self.optimizer.param_groups]
        self._update.step(self._block_parameters())
        self._step.updated = True
        self._step.changed_settings = [
            {key: value for key, value in group.items() if value is not old.get(key)}
            for group, old in zip(self.optimizer.param_groups, before, strict=True)
        ]

    def _note_weights(self) -> None:
        weights = {name: self._parameters[name] for name in self.block.parameters}
        self._step.note_weights(weights, counted=self._counts_changes)

    def _end_update(self) -> None:
        for group, changed in zip(self.optimizer.param_groups, self._step.changed_settings, strict=False):
            group.update(changed)  # the optimizer may count its calls there, and this one was the second
        # fused optimizers take the GradScaler's verdict themselves and leave it on the optimizer
        found_inf = getattr(self.optimizer, "found_inf", None)
        skipped = isinstance(found_inf, Tensor) and bool(found_inf.item())
        if self.will_skip:
            self._skip()
        elif not skipped and (self._step.backward_ran or self._step.updated or self.has_gradient):
            self._complete()
        else:
            if not skipped:
                self.count_step_without_gradient()
            self._give_up()

    def count_step_without_gradient(self) -> None:
        """Take in a call of the optimizer's step that had nothing to update, and warn where they go on."""
        self.steps_without_gradient += 1
        if self.steps_without_gradient == max(3, len(self.plan.blocks)):
            warnings.warn(
                f"`optimizer.step()` was called {self.steps_without_gradient} times in a row while no parameter of "
                f"the active block `{self.block.name}` had a gradient, so nothing was trained, and the block keeps its "
                "turn; call `after_backward(loss)` after each backward pass (in a LightningModule go back with "
                "`manual_backward(loss)`), with which a block that no gradient reaches is passed over, or leave it out "
                "with `frozen=[...]` patterns.",
                stacklevel=4,
            )

    def _complete(self) -> None:
        """Free the gradients, park the state, and give the next block its turn."""
        if not self._step.updated:  # gradients that state has come for may have been dropped since
            self._update.give_up()
        self.steps_without_gradient = 0
        self._counts_changes = self._counts_changes or self._step.counts_changes(self._parameters)
        for parameter in self._block_parameters():
            parameter.grad = None
        self.residency.park(self.trained.values())  # some optimizers build all state in their first step
        self.shares.spread(self._block_parameters())
        self.page_in_ms = self._update.take_loading_ms()
        self._forget_step()
        self.last_step_skipped = False
        self.half_updated = None
        self._schedulers.update_ends()
        self.updates += 1
        self._activate()

    def pass_turn(self) -> bool:
        """End the turn of a block that no gradient reached, or a step left out, where the optimizer was not called.

        Returns:
            Whether there was one to end.
        """
        if self.will_skip:
            self._skip()
            return True
        if self._step.backward_ran and not self.has_gradient:
            self._note_reach()
            self._complete()
            return True
        return False

    # --- a step that is not completed ---------------------------------------------------------------------------------

    @property
    def will_skip(self) -> bool:
        """Whether the step in progress is to be left out because of NaN or inf."""
        return self._step.left_out_because is not None

    def _look_for_nonfinite(self, loss: Tensor | None, scaled: bool) -> None:
        self.last_step_skipped = False
        if not self.will_skip:
            if loss is not None:
                self._step.search.look_at_loss(loss, scaled)
            if not scaled and self.settings.update != "fused":  # which has seen each gradient inside backward
                for name in self.block.parameters:
                    if (gradient := self._parameters[name].grad) is not None:
                        self._step.search.look_at(name, local(gradient))
            self._step.searched = True
            if (found := self._step.search.first()) is not None:
                self._meet_nonfinite(*found)
        if self.will_skip:
            for parameter in self._block_parameters():
                parameter.grad = None

    def _meet_nonfinite(self, name: str, kind: str, where: str = "") -> None:
        what = f"the loss{where}" if name == LOSS else f"the gradient of `{name}`"
        told = f"{what} has {kind} in update {self.updates + 1} (block {self.block.index}, `{self.block.name}`)"
        if self.updates > 0 and not self.touched():
            self._refuse_broken_weights(told)
        if self.settings.nonfinite == "skip":
            self._step.left_out_because = told
            return
        state = "" if self.touched() else "; weights and optimizer state are as they were before it"
        instead = " and `update='streamed'`" if self.settings.update == "fused" else ""
        try:
            raise NonfiniteError(
                f"{told[0].upper()}{told[1:]}{state}; look at its batch, use a smaller learning rate, gradient "
                f"clipping or a wider precision, or leave such steps out with `nonfinite='skip'`{instead}."
            )
        finally:
            self.settle()

    def _refuse_broken_weights(self, told: str) -> None:
        """Raise if an earlier update has made NaN, or inf in fp16, which no step that is left out would mend.

        Args:
            told: what has been found in this step, for the message.

        Raises:
            NonfiniteError: if there is such a weight.
        """
        if (broken := broken_weight(self.trained, self._mesh)) is None:
            return
        name, kind = broken
        self.settle()
        self.half_updated = f"The weights of `{name}` have {kind}; load a checkpoint from before."
        raise NonfiniteError(
            f"{told[0].upper()}{told[1:]}, because the weights of `{name}` have {kind} from an earlier update, and the "
            "last checkpoint may have it too; go on from one from before, or start anew, with a smaller learning rate, "
            "a wider precision, `master_weights=True`, or a larger `eps` of the optimizer (Adam's 1e-8 is 0 in fp16)."
        )

    def _skip(self) -> None:
        """End a step that is left out; the block keeps its turn."""
        told = self._step.left_out_because
        self.skipped_steps += 1
        self.last_step_skipped = True
        self._give_up()
        if not self._warned_of_skipping:
            self._warned_of_skipping = True
            warnings.warn(
                f"A step is left out, because {told}; further ones are counted in `skipped_steps`, without a warning.",
                stacklevel=3,
            )

    def settle(self) -> None:
        """Give up a step that has not been completed: free the gradients, and take the last parked state again.

        The block keeps its turn. Call it in a plain loop when a step has failed (out of memory) and training goes on.
        :meth:`finish`, and leaving ``with HiFT(...)``, do so too. If weights have been touched, the error that is being
        handled tells their names from then on.
        """
        begun = f"Block `{self.block.name}` was being updated: "
        if touched := self.touched():
            self.half_updated = (
                f"{begun}the weights of {', '.join(touched)} have changed and their optimizer state is not that of "
                "these weights; load the last checkpoint."
            )
            if (error := sys.exc_info()[1]) is not None:
                memory = isinstance(error, torch.OutOfMemoryError)
                remedy = " Use a smaller batch, `update='streamed'` or a smaller `window`." if memory else ""
                add_note(error, self.half_updated + remedy)
        elif self._step.versions and any(map(self.residency.steps_in_place, self._block_parameters())):
            # state that the optimizer computes on where it is parked may have changed, and there is no other
            self.half_updated = f"{begun}its optimizer state may have changed in part; load the last checkpoint."
        self._give_up()

    def touched(self) -> list[str]:
        """Names of the parameters whose weights have changed since the step in progress began to update."""
        return self._step.touched(self._parameters)

    def _give_up(self) -> None:
        """Free the gradients and take the last parked state again; the block keeps its turn."""
        if self._calls is not None:
            self._calls.forget()
        self._forget_step()
        self._update.give_up()
        if self.reduction is not None:
            self.reduction.give_up()
        for parameter in self._block_parameters():
            parameter.grad = None
        self.residency.discard(self._block_parameters())

    def _forget_step(self) -> None:
        self._step = Step(NonfiniteSearch(self._mesh))
        self._update.held_bytes = 0

    # --- learning rate, saving, resuming ------------------------------------------------------------------------------

    def delay(self, scheduler: Any) -> Any:
        """Give the scheduler to step once per optimizer step, as ``settings.lr_update`` says.

        Args:
            scheduler: a learning-rate scheduler of :attr:`optimizer`.

        Returns:
            A :class:`~hift_lightning.engine.lr.DelayedLRScheduler`, or the scheduler itself for ``step``.
        """
        return self._schedulers.delay(scheduler)

    def state_dict(self) -> dict[str, Any]:
        """The position in the rotation, the plan and the masters: primitives and tensors only.

        The optimizer's state is in ``optimizer.state_dict()``, as ever; call ``residency.synchronize()`` before
        that is read or saved. Where parked state is split, all ranks call this together, and it is whole on the first.
        """

        self.residency.synchronize()  # masters may still be on their way

        def kept_of(parameter: nn.Parameter) -> tuple[Tensor | None, list[str]]:
            return self.residency.master(parameter), self.residency.dtypes(parameter)

        kept = {
            self._name_of[parameter]: value for parameter, value in self.shares.gather(self.trained.values(), kept_of)
        }
        return {
            "updates": self.updates,
            "skipped_steps": self.skipped_steps,
            **self._schedulers.state_dict(),
            **self._plan_record,
            "parameters": self._names_in_groups(),
            "dtypes": {name: dtypes for name, (_, dtypes) in kept.items()},
            "masters": {name: master for name, (master, _) in kept.items() if master is not None},
            # buckets decide in which order sums over more than two ranks are rounded
            **({} if self.reduction is None else {"gradient_orders": dict(self.reduction.orders)}),
        }

    def has_plan_of(self, state_dict: dict[str, Any]) -> bool:
        """Whether a saved position was one in this plan, with this order and as many steps to a block."""
        return is_same_plan(state_dict, self._plan_record)

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise if a saved position cannot be loaded here; nothing is changed.

        Args:
            state_dict: what :meth:`state_dict` gave.

        Raises:
            ConfigurationError: if it belongs to another plan and ``settings.resume_plan`` is ``"same"``.
        """
        check_record(state_dict)
        if self.settings.resume_plan == "same":
            refuse_other_plan(state_dict, self._plan_record)

    def check_optimizer_state_dict(self, state_dict: dict[str, Any], position: dict[str, Any] | None = None) -> None:
        """Raise if saved optimizer state cannot be loaded here; nothing is changed.

        Args:
            state_dict: what ``optimizer.state_dict()`` gave, under HiFT or not.
            position: what :meth:`state_dict` gave with it, which has the names of its parameters.

        Raises:
            ConfigurationError: if it belongs to another optimizer or other parameters.
        """
        if position is not None:
            check_record(position)
        saved_names = None if position is None else position["parameters"]
        check_optimizer(self.optimizer, self._names_in_groups(), state_dict, saved_names)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position, see :meth:`settle`; masters are copied, a tensor at a time.

        Where the plan is another one and ``settings.resume_plan`` is ``"rebuild"``, :attr:`updates` starts from 0, and
        with it the rotation at the beginning of a cycle; the masters carry over.

        Args:
            state_dict: what :meth:`state_dict` gave.

        Raises:
            ConfigurationError: see :meth:`check_state_dict`.
        """
        self.check_state_dict(state_dict)
        if self.active:
            self.settle()
        same_plan = self.has_plan_of(state_dict)
        self.skipped_steps = state_dict["skipped_steps"]
        if self.reduction is not None and same_plan:
            self.reduction.orders = dict(state_dict.get("gradient_orders", {}))
        self.half_updated = None
        self._reach = Reach(len(self.plan.blocks))  # a run may go back
        load_masters(self.residency, self.trained, state_dict["masters"])
        self.move_to(state_dict["updates"] if same_plan else 0)
        self._schedulers.load_state_dict(state_dict, same_cycles=same_plan)

    def load_optimizer_state_dict(self, state_dict: dict[str, Any], position: dict[str, Any] | None = None) -> None:
        """Load the optimizer's state without putting it on the device; it is copied, a tensor at a time.

        Args:
            state_dict: what ``optimizer.state_dict()`` gave, under HiFT or not.
            position: what :meth:`state_dict` gave with it, which tells of which parameters it is, and the dtypes that
                parked state has on the device; without it, parameters are taken in their order, as torch takes them,
                and state is cast as torch casts what it loads.

        Raises:
            ConfigurationError: if it belongs to another optimizer or other parameters.
        """
        self.check_optimizer_state_dict(state_dict, position)
        state_dict = self.shares.own_part(self.optimizer, state_dict)
        dtypes = {} if position is None else position["dtypes"]
        self.residency.load_state_dict(
            state_dict, {self._parameters[name]: saved for name, saved in dtypes.items() if name in self._parameters}
        )

    def move_to(self, updates: int) -> None:
        """Give the turn to the block that has it after so many updates; nothing else changes."""
        self.updates = updates
        if self.active:
            self._activate()

    def divide(self, total_steps: int) -> None:
        """Where each block has one turn (``steps_per_block="once"``), make the turns of another number of steps.

        Args:
            total_steps: optimizer steps from the first of the rotation's to the end of the run.
        """
        self._set_rotation(total_steps)
        self.move_to(self.updates)

    def masters(self) -> dict[nn.Parameter, Tensor]:
        """The parked masters: host tensors, fp32.

        Where parked state is split, all ranks call this together; it has all of them on the first, and on each of the
        others its share.
        """
        self.residency.synchronize()
        gathered = self.shares.gather(self.trained.values(), self.residency.master)
        return {parameter: master for parameter, master in gathered if master is not None}

    def master_state_dict(self) -> dict[str, Any]:
        """The model's state dict, with the fp32 master in place of every weight that has one, see :meth:`masters`.

        What training would go on from, and so what to export. Masters are host tensors, and all are the tensors
        themselves and no copies, but where weights have been set by something else than a step: then these count. A
        weight without a master (not 16-bit, not trained, or not updated yet) is as it is. A tied weight has the same
        master under each of its names.
        """
        return state_dict_with_masters(self.model, self.masters())

    def report(self) -> Report:
        """What each block is, how often it has had its turn, and where its state is now."""
        return report_of(self.plan, self.rotation, self.updates, self._reach.missed, self._parameters, self.residency)

    def _names_in_groups(self) -> list[list[str]]:
        return [[self._name_of[p] for p in group["params"]] for group in self.optimizer.param_groups]


def _weak(hook: GradientHook) -> GradientHook:
    method = weakref.WeakMethod(hook)

    def call(parameter: Tensor) -> None:
        if (alive := method()) is not None:
            alive(parameter)

    return call


def _give_back(freezing: Freezing, checkpointing: ActivationCheckpointing) -> None:
    """Let the model be as it was before training."""
    freezing.stop()
    checkpointing.stop()


def _parameters_to_train(model: nn.Module, settings: HiFTSettings, others: Sequence[Optimizer]) -> list[nn.Parameter]:
    """Those of all layers, from the bottom up, that no other optimizer has."""
    taken = parameters_in(*others)
    free = {name: p for name, p in model.named_parameters() if p not in taken}
    refuse_what_is_frozen_by_another(free)
    trainable = [name for name, p in free.items() if p.requires_grad]
    layers = partition(model, frozen=settings.frozen, trainable=trainable).layers
    return [model.get_parameter(name) for layer in layers for name in layer.parameters]


def _refuse_what_does_not_go_together(model: nn.Module, settings: HiFTSettings, others: Sequence[Optimizer]) -> None:
    if settings.update == "fused" and any(isinstance(part, DistributedDataParallel) for part in model.modules()):
        raise ConfigurationError(
            "`update='fused'` uses gradients inside backward, before `DistributedDataParallel` averages them; give the "
            "module that it wraps, with `ranks=Ranks()`, or use `update='streamed'`."
        )
    if others and isinstance(settings.always_active, int):
        raise ConfigurationError(
            f"`always_active={settings.always_active}` counts layers from the top of the model, and here several "
            "optimizers share them; give patterns on parameter names."
        )
