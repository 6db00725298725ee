"""What forward keeps for backward, with and without activation checkpointing."""

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from hift_lightning import HiFT, HiFTSettings, HiFTStrategy
from tests.comparing import assert_same
from tests.small_transformer import SmallTransformer, loader, make_batches, trainer


class CountsSaved(SmallTransformer):
    """Notes, for each step, which of the layers' outputs need a gradient and the bytes saved for backward."""

    def __init__(self, depth=2):
        super().__init__(depth=depth)
        self.saved, self.graphs, self.recomputed = [], [], []
        for index, layer in enumerate(self.layers):
            layer.register_forward_hook(
                lambda m, a, out, index=index: self.graphs[-1].append((index, out.requires_grad))
            )

    def training_step(self, batch, batch_idx):
        self.graphs.append([])
        total = [0]

        def pack(tensor):
            total[0] += 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = super().training_step(batch, batch_idx)
        self.saved.append(total[0])
        return loss


def fit(device, module, **arguments):
    trainer_ = trainer(HiFTStrategy(order="bottom2up", **arguments), accelerator=device.type, devices=1)
    trainer_.fit(module, loader(make_batches(2 * (len(module.layers) + 2))))
    return module


def test_layers_below_the_active_block_run_without_a_graph(any_device):
    module = fit(any_device, CountsSaved(depth=4))
    for step, graphs in enumerate(module.graphs):
        active = step % 6  # embeddings, four layers, head
        assert graphs == [(index, index + 1 >= active) for index in range(4)]
    assert module.saved[:6] == sorted(module.saved[:6], reverse=True)
    assert module.saved[5] < module.saved[0] / 4


def test_checkpointing_changes_nothing_but_what_is_kept(any_device):
    plain = fit(any_device, CountsSaved())
    checkpointed = fit(any_device, CountsSaved(), activation_checkpointing=True)
    assert checkpointed.losses == plain.losses
    for p, q in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert checkpointed.saved[0] < plain.saved[0] / 2


def test_a_checkpointed_layer_is_given_its_own_keyword_arguments():
    class Layer(nn.Linear):
        def forward(self, inputs, debug=False, early_stop=None):
            return super().forward(inputs) * (2 if debug else 1) + (early_stop or 0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Layer(4, 4) for _ in range(3))

        def forward(self, inputs):
            for layer in self.layers:
                inputs = layer(inputs, debug=True, early_stop=3.0)
            return inputs

    def gradient(activation_checkpointing):
        model = Model()
        settings = HiFTSettings(order="bottom2up", activation_checkpointing=activation_checkpointing)
        with HiFT(model, torch.optim.SGD(model.parameters(), lr=0.1), settings):
            model(torch.ones(2, 4)).tanh().sum().backward()
            return model.layers[0].weight.grad

    assert torch.equal(gradient(True), gradient(False))


def wrapped(model, **arguments):
    """Modules whose forward is another while they are trained."""
    with HiFT(model, torch.optim.SGD(model.parameters(), lr=0.1), HiFTSettings(**arguments)):
        return [name for name, module in model.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"always_active": 3},
        {"frozen": ["layers.1.*"]},
        {"group_size": 2},
        {"layers": ["layers.[01].*", "layers.[23].*"]},
    ],
)
def test_each_layer_is_checkpointed_whether_it_has_turns_or_not(arguments):
    names = wrapped(SmallTransformer(depth=4), activation_checkpointing=True, **arguments)
    assert names == [f"layers.{index}" for index in range(4)]  # neither `embedding` nor `head`, which keep little


def test_a_model_without_layers_to_checkpoint_is_warned_of():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    with pytest.warns(match="`activation_checkpointing=True` .* `Alone` has no stack of modules; leave it out"):
        assert wrapped(Alone(), activation_checkpointing=True) == []


def test_of_two_engines_each_checkpoints_its_own_layers():
    model = SmallTransformer()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model.layers]
    settings = HiFTSettings(activation_checkpointing=True)
    first, second = (HiFT(model, own, settings, others=[o for o in optimizers if o is not own]) for own in optimizers)
    with first:
        assert ["forward" in layer.__dict__ for layer in model.layers] == [True, False]
    with second:
        assert ["forward" in layer.__dict__ for layer in model.layers] == [False, True]


class Convolutions(nn.Module):
    """Layers with running averages, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(3)
        )
        self.layers[1][1].eval()  # a layer's averages may be fixed
        self.head = nn.Linear(4, 2)

    def forward(self, signal):
        for layer in self.layers:
            signal = layer(signal)
        return self.head(signal.mean(-1))


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SEQ2SEQ = {"d_model": 16, "vocab_size": 32, "decoder_start_token_id": 0, "pad_token_id": 0}
WITH_CACHES = {
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=24, attn_implementation="eager"),
    "gemma2": transformers.Gemma2Config(**SMALL, intermediate_size=24, num_key_value_heads=1, head_dim=8),
    "gpt2": transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32),
    "bloom": transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2),
    "t5": transformers.T5Config(**SEQ2SEQ, num_layers=2, num_heads=2, d_kv=8, d_ff=24),
}


@pytest.mark.parametrize("name", WITH_CACHES)
def test_caches_of_keys_and_values_are_not_filled_twice(name):
    def trained(checkpoint):
        torch.manual_seed(0)
        kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
        model = kind.from_config(WITH_CACHES[name]).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
        with HiFT(model, optimizer, HiFTSettings(activation_checkpointing=checkpoint)):
            for _ in range(5):
                ids = torch.randint(3, 32, (2, 5))
                model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
                optimizer.step()
        return dict(model.state_dict())

    assert_same(trained(True), trained(False))


@pytest.mark.parametrize("compiled", [False, True])
def test_running_averages_are_updated_once_a_step(compiled):
    models = []
    for checkpointing in (False, True):
        model = Convolutions()
        for layer in model.layers if compiled else ():
            layer.compile(backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        with HiFT(model, optimizer, HiFTSettings(activation_checkpointing=checkpointing)):
            for _ in range(5):
                model(torch.randn(8, 4, 6)).square().mean().backward()
                optimizer.step()
        models.append(model)
    plain, checkpointed = models
    assert plain.layers[0][1].num_batches_tracked == 5
    assert_same(checkpointed.state_dict(), plain.state_dict())


def test_checkpointing_never_reaches_below_the_active_block(any_device):
    class CountsCalls(SmallTransformer):
        def __init__(self):
            super().__init__()
            self.calls = []
            for index, layer in enumerate(self.layers):
                layer.norm1.register_forward_hook(lambda *_, index=index: self.calls[-1].append(index))

        def training_step(self, batch, batch_idx):
            self.calls.append([])
            return super().training_step(batch, batch_idx)

    module = fit(any_device, CountsCalls(), activation_checkpointing=True)
    again = [sorted(calls[2:]) for calls in module.calls]  # what ran a second time, in backward
    assert again == [[0, 1], [0, 1], [1], []] * 2


@pytest.mark.parametrize("raises", [False, True])
def test_the_layers_have_their_own_forward_afterwards(raises):
    class Stops(SmallTransformer):
        def on_after_backward(self):
            if raises:
                raise RuntimeError("stop")

    module = Stops()
    strategy = HiFTStrategy(activation_checkpointing=True)
    try:
        trainer(strategy).fit(module, loader(make_batches(1)))
    except RuntimeError:
        assert raises
    assert all("forward" not in layer.__dict__ for layer in module.layers)


def test_reentrant_checkpoints_of_a_models_own_are_named_where_they_keep_a_block_from_being_trained():
    class Checkpointed(SmallTransformer):
        def forward(self, tokens):
            hidden = self.embedding(tokens)
            for layer in self.layers:
                hidden = checkpoint(layer, hidden, use_reentrant=True)
            return self.head(self.norm(hidden).mean(1))

    with pytest.warns(UserWarning, match=r"`use_reentrant=True`, give `use_reentrant=False`, or `activation_check"):
        trainer().fit(Checkpointed(), loader(make_batches(4)))


class ByKeyword(nn.Module):
    """Two layers that are called with keyword arguments alone."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, hidden, *, sums=None):
            sums["own"][0].add_(hidden.detach().sum(0))
            return torch.dropout(self.norm(self.linear(hidden)), 0.5, True)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))
        self.register_buffer("sums", torch.zeros(4))

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden=hidden, sums={"own": (self.sums,)})
        return hidden


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_that_are_called_by_keyword_have_the_gradients_that_they_have_without_it(compiled):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = ByKeyword()
        called = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with HiFT(model, optimizer, HiFTSettings(activation_checkpointing=checkpointing, group_size=2)):
            torch.manual_seed(1)
            called(torch.ones(2, 4)).square().sum().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_random_numbers_of_a_device_come_again_where_its_tensors_are_in_keyword_arguments(sim_device, monkeypatch):
    found = []

    def device_states(*args):
        found.append(states(*args)[0])
        return states(*args)

    states = torch.utils.checkpoint.get_device_states
    monkeypatch.setattr("torch.utils.checkpoint.get_device_states", device_states)
    monkeypatch.setattr(
        torch.sim, "_initialized", True, raising=False
    )  # which `checkpoint` asks of the device's module
    model = ByKeyword().to("sim")
    with HiFT(model, torch.optim.SGD(model.parameters()), HiFTSettings(activation_checkpointing=True, group_size=2)):
        model(torch.ones(2, 4, device="sim")).sum().backward()
    assert found == [[0, 0], [0, 0]]
