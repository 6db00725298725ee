"""Any optimizer of torch's kind, with the user's param groups, untouched."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from hift_lightning import HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError
from tests.blocks_seen import TOP_DOWN, BlocksSeen
from tests.comparing import assert_same
from tests.reference_loop import reference_loop, turns_of
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer


class Lion(torch.optim.Optimizer):
    """Sign of interpolated momentum, as a third party would write it (arXiv 2302.06675)."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                beta1, beta2 = group["betas"]
                p.sub_(state["momentum"].lerp(p.grad, 1 - beta1).sign_(), alpha=group["lr"])
                state["momentum"].lerp_(p.grad, 1 - beta2)
        return loss


class MatrixWhitening(torch.optim.Optimizer):
    """Like Muon: whole matrices are orthogonalized, and the state is nested and partly not a tensor."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["buffers"] = {"momentum": [torch.zeros_like(p)]}
                    state["count"] = 0
                state["count"] += 1
                momentum = state["buffers"]["momentum"][0].mul_(0.9).add_(p.grad)
                if p.dim() == 2:
                    u, _, v = torch.linalg.svd(momentum, full_matrices=False)
                    momentum = u @ v
                p.sub_(momentum, alpha=group["lr"])
        return loss


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "AdamW amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-1),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9),
    # on an accelerator torch would take its foreach form, which rounds differently from the one for the CPU
    "NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-2, foreach=False),
    "Lion-like": Lion,
    "Muon-like": MatrixWhitening,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_reference_loop(name):
    batches = make_batches(3 * LAYERS)
    strategy = HiFTStrategy()
    module = SmallTransformer(OPTIMIZERS[name])
    trainer(strategy).fit(module, loader(batches))
    reference = SmallTransformer()
    reference_loop(
        reference,
        OPTIMIZERS[name](reference.parameters()),
        [block.parameters for block in strategy.hift.plan.blocks],
        turns_of("top2down", LAYERS),
        batches,
    )
    for left, right in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(left, right)


class Sparse(SmallTransformer):
    """The gradient of its embeddings is sparse, and so is their momentum, whose size changes from step to step."""

    def __init__(self):
        super().__init__(OPTIMIZERS["SGD with momentum"])
        self.embedding.sparse = True


@pytest.mark.parametrize("offload", ["cpu", "none", "files"])
@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
def test_a_sparse_momentum_is_parked_saved_and_loaded(update, offload, tmp_path):
    def strategy():
        return HiFTStrategy(update=update, offload=str(tmp_path) if offload == "files" else offload)

    batches, stopped = make_batches(4 * LAYERS), trainer(strategy(), max_steps=2 * LAYERS)
    stopped.fit(Sparse(), loader(batches))
    momentum = stopped.optimizers[0].state[stopped.lightning_module.embedding.weight]["momentum_buffer"]
    assert momentum.layout == torch.sparse_coo
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    module, resumed = Sparse(), trainer(strategy())
    still_to_come = batches[2 * LAYERS :] + batches[: 2 * LAYERS]  # since a plain loader begins anew
    resumed.fit(module, loader(still_to_come), ckpt_path=tmp_path / "last.ckpt")
    reference = Sparse()
    plan = resumed.strategy.hift.plan
    reference_loop(
        reference,
        reference.configure_optimizers(),
        [block.parameters for block in plan.blocks],
        turns_of("top2down", LAYERS),
        batches,
    )
    for left, right in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(left, right)
    embeddings = resumed.strategy.report().blocks[0]
    assert (embeddings.parked_bytes == 0) == (offload == "none")
    files = [path for path in tmp_path.rglob("*.bin") if path.stat().st_size]
    tensors = len(list(reference.parameters())) + 1  # indices and values of the sparse one
    assert not files or len(files) <= 2 * tensors  # none is left of what was outgrown; two trainers are alive


def two_groups(module):
    matrices = [p for p in module.parameters() if p.dim() > 1]
    vectors = [p for p in module.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "lr": 1e-2, "weight_decay": 0.5}, {"params": vectors, "lr": 0.0}]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def test_rate_and_weight_decay_of_each_param_group_stay_true():
    class TwoGroups(SmallTransformer):
        def configure_optimizers(self):
            return two_groups(self)

    batches = make_batches(2 * LAYERS)
    strategy = HiFTStrategy()
    module, before = TwoGroups(), TwoGroups()
    trainer(strategy).fit(module, loader(batches))
    reference = SmallTransformer()
    reference_loop(
        reference,
        two_groups(reference),
        [block.parameters for block in strategy.hift.plan.blocks],
        turns_of("top2down", LAYERS),
        batches,
    )
    for (name, p), expected, old in zip(
        module.named_parameters(), reference.parameters(), before.parameters(), strict=True
    ):
        assert torch.equal(p, expected), name
        assert torch.equal(p, old) == (p.dim() == 1), name  # a rate of 0 moves nothing


def test_adam_counts_a_parameters_own_updates():
    module = SmallTransformer()
    trainer_ = trainer()
    trainer_.fit(module, loader(make_batches(2 * LAYERS + 1)))
    state = trainer_.optimizers[0].state
    assert state[module.head.weight]["step"].item() == 3
    assert state[module.embedding.weight]["step"].item() == 2


def test_lbfgs_is_refused_with_the_reason():
    with pytest.raises(ConfigurationError, match="`LBFGS` keeps one history"):
        trainer().fit(SmallTransformer(torch.optim.LBFGS), loader(make_batches(1)))


class Shrinks(torch.optim.AdamW):
    """Goes on with the gradients when the step of its base class has ended."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad.sign())
                    self.state[parameter]["shrunk"] = self.state[parameter].get("shrunk", 0) + 1
        return loss


@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
@pytest.mark.parametrize("group_size", [1, LAYERS])
def test_a_step_that_calls_that_of_its_base_class_is_one_step(update, group_size):
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # from now on a step of AdamW has hooks of its own
    module = SmallTransformer(Shrinks)
    trainer_ = trainer(HiFTStrategy(group_size=group_size, update=update))
    trainer_.fit(module, loader(make_batches(2 * LAYERS)))
    expected = SmallTransformer()
    blocks = [block.parameters for block in trainer_.strategy.hift.plan.blocks]
    turns = turns_of("top2down", len(blocks))
    reference_loop(expected, Shrinks(expected.parameters()), blocks, turns, make_batches(2 * LAYERS))
    assert_same(module.state_dict(), expected.state_dict())
    assert trainer_.strategy.hift.updates == 2 * LAYERS
    counts = {state["shrunk"] for state in trainer_.optimizers[0].state.values()}
    assert counts == {2 * LAYERS // (LAYERS if group_size == 1 else 1)}


class Wraps(torch.optim.Optimizer):
    """As SAM and Lookahead do: another optimizer does the steps."""

    def __init__(self, params):
        self.inner = torch.optim.SGD(params, 0.1, momentum=0.9)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("update", ["block", "streamed"])
def test_an_optimizer_that_steps_another_one_is_refused(update):
    with pytest.raises(ConfigurationError, match="`Wraps` steps another one, the `SGD` in its `inner`"):
        trainer(HiFTStrategy(update=update)).fit(SmallTransformer(Wraps), loader(make_batches(1)))


def test_two_optimizers_under_automatic_optimization_are_refused_and_point_to_manual():
    class Two(SmallTransformer):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.head.parameters(), 0.1), torch.optim.SGD(self.layers.parameters(), 0.1)]

    with pytest.raises((RuntimeError, MisconfigurationException), match="manual optimization"):
        trainer().fit(Two(), loader(make_batches(1)))


def test_no_optimizer_is_refused():
    class Without(SmallTransformer):
        def configure_optimizers(self):
            return None

    with pytest.raises(MisconfigurationException, match="returned no optimizer"):
        trainer().fit(Without(), loader(make_batches(1)))


def test_an_optimizer_over_foreign_parameters_is_refused():
    def foreign(parameters):
        return torch.optim.SGD([*parameters, torch.nn.Parameter(torch.zeros(5))], lr=0.1)

    with pytest.raises(ConfigurationError, match=r"1 parameters that are not in the model \(shapes \(5,\)\)"):
        trainer().fit(SmallTransformer(foreign), loader(make_batches(1)))


def test_users_step_hooks_and_overridden_optimizer_step_are_called():
    calls = []

    class Hooked(SmallTransformer):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(lambda *_: calls.append("post"))
            return optimizer

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            calls.append("step")
            optimizer.step(closure=optimizer_closure)

    seen = BlocksSeen()
    trainer(callbacks=[seen]).fit(Hooked(), loader(make_batches(LAYERS)))
    assert calls == ["step", "post"] * LAYERS
    assert seen.steps == TOP_DOWN
