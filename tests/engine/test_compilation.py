"""Compiled layers keep their graphs while blocks take turns; what is compiled as a whole works, and is told of."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from hift_lightning import HiFT, HiFTDDPStrategy, HiFTFSDP2Strategy, HiFTSettings, HiFTStrategy
from hift_lightning.engine.compilation import compile_layers
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.planner import plan
from tests.comparing import assert_same
from tests.processes import run
from tests.small_transformer import LAYERS, WIDTH, SmallTransformer, loader, make_batches, trainer

DEPTHS = (2, 6)
WHOLE = "is compiled with {} blocks in it"


class Layer(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, inputs):
        return inputs + self.linear(self.norm(inputs)).relu()


class Net(nn.Module):
    def __init__(self, depth):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.head = nn.Linear(8, 2)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden.mean(1))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(model, cycles=2, **settings):
    """Train for whole cycles; returns the weights by their names in an uncompiled model."""
    with HiFT(model, torch.optim.AdamW(model.parameters(), lr=1e-2), HiFTSettings(**settings)) as hift:
        for step in range(cycles * hift.rotation.cycle_length):
            tokens = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(step))
            model(tokens).square().mean().backward()
            hift.optimizer.step()
    return {name.replace("_orig_mod.", ""): weights for name, weights in model.state_dict().items()}


def compiled_layers(depth, how, counter):
    model = Net(depth)
    if how == "compile_layers":
        compile_layers(model, backend=counter)
    elif how == "layer.compile":
        for layer in model.layers:
            layer.compile(backend=counter)
    else:
        model.layers = nn.ModuleList(torch.compile(layer, backend=counter) for layer in model.layers)
    return model


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}, {"group_size": 2, "update": "fused"}])
@pytest.mark.parametrize("how", ["compile_layers", "layer.compile", "torch.compile"])
def test_compiled_layers_take_the_same_graphs_however_many_there_are(how, settings):
    graphs = []
    for depth in DEPTHS:
        torch._dynamo.reset()
        counter = CompileCounter()
        model = compiled_layers(depth, how, counter)
        with warnings.catch_warnings(record=True) as told:
            weights = train(model, **settings)
        assert not [warning for warning in told if "is compiled with" in str(warning.message)]
        graphs.append(counter.frame_count)
        assert_same(weights, train(Net(depth), **settings))
    # each layer frozen without and with an input that needs a gradient, and active; in a block of two, active on such
    # an input as well
    assert graphs == [4 if "group_size" in settings else 3] * 2


def test_later_cycles_compile_nothing():
    counter = CompileCounter()
    model = compiled_layers(3, "compile_layers", counter)
    train(model, cycles=1)
    first = counter.frame_count
    train(model, cycles=3, order="random")
    assert counter.frame_count == first == 3


@pytest.mark.parametrize("how", ["torch.compile", "compile", "forward"])
def test_a_model_compiled_as_a_whole_trains_alike_and_is_told_of(how):
    counter = CompileCounter()
    model = Net(8)
    if how == "torch.compile":
        model = torch.compile(model, backend=counter)
    elif how == "compile":
        model.compile(backend=counter)
    else:
        model.forward = torch.compile(model.forward, backend=counter)
    with pytest.warns(UserWarning, match=f"{WHOLE.format(10)}.*`compile_layers") as told:
        weights = train(model)
    assert len(told) == 1
    assert counter.frame_count == 8  # for 10 blocks: the last two run uncompiled
    weights = {name.removeprefix("_orig_mod."): value for name, value in weights.items()}
    assert_same(weights, train(Net(8)))


@pytest.mark.parametrize("depth", [1, 2])
def test_the_graph_of_one_block_is_not_used_for_another(depth):
    model = torch.compile(Net(depth), backend="aot_eager")
    tokens = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(0))
    model(tokens).square().mean().backward()  # compiled before HiFT comes
    with pytest.warns(UserWarning, match=WHOLE.format(depth + 2)):
        weights = train(model)
    assert_same(weights, train(Net(depth)))


def test_of_nested_compiled_modules_the_outermost_is_named_once():
    model = nn.Sequential(Net(2), nn.Linear(2, 2))
    model[0].compile(backend="eager")
    compile_layers(model[0], backend="eager")
    with pytest.warns(UserWarning, match=f"`0` {WHOLE.format(4)}") as told:
        HiFT(model, torch.optim.SGD(model.parameters()))
    assert len(told) == 1


def test_a_compiled_part_that_is_always_active_is_not_told_of():
    model = Net(2)
    model.head.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HiFT(model, torch.optim.SGD(model.parameters()), HiFTSettings(always_active=["head.*"]))


def test_a_forward_that_is_kept_from_compilation_is_not_taken_for_compiled():
    model = Net(2)
    model.forward = torch.compiler.disable(model.forward)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HiFT(model, torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("whole", [False, True])
def test_under_lightning(whole):
    """``trainer.fit(torch.compile(module))`` gives the strategy the module itself, with compiled methods."""

    class Module(SmallTransformer):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    counter = CompileCounter()
    modules = [Module(), Module()]
    if whole:
        fitted = torch.compile(modules[0], backend=counter)
        with pytest.warns(UserWarning, match=f"`Module` {WHOLE.format(4)}"):
            trainer("hift").fit(fitted, loader(make_batches(8)))
    else:
        compile_layers(modules[0], backend=counter)  # of torch's own class, which `compile()` passes over
        trainer("hift").fit(modules[0], loader(make_batches(8)))
        assert counter.frame_count == 3
    trainer("hift").fit(modules[1], loader(make_batches(8)))
    assert_same(*(dict(module.state_dict()) for module in modules))


@pytest.mark.parametrize("kind", [Layer, lambda: nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0)])
def test_a_copy_of_compiled_layers_has_weights_of_its_own(kind):
    model = Net(2)
    model.layers = nn.ModuleList(kind() for _ in range(2))
    compile_layers(model, backend="eager")
    tokens = torch.zeros(1, 4, dtype=torch.long)
    clone = copy.deepcopy(model)
    before = clone(tokens)
    train(model)
    assert torch.equal(clone(tokens), before)
    assert not torch.equal(model(tokens), before)


def test_a_step_of_compiled_layers_is_planned_without_compiling():
    module, batch = SmallTransformer(), make_batches(1)[0]
    expected = plan(module, HiFTStrategy(), batch).peak_bytes
    counter = CompileCounter()
    compile_layers(module, backend=counter)
    assert plan(module, HiFTStrategy(), batch).peak_bytes == expected
    assert counter.frame_count == 0


def tiny_llama(depth, use_cache):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=depth, num_attention_heads=2,
            num_key_value_heads=2, use_cache=use_cache,
        )
    )  # fmt: skip


def graphs_of(model):
    counter = CompileCounter()
    compile_layers(model, backend=counter)
    with HiFT(model, torch.optim.AdamW(model.parameters())) as hift:
        for step in range(hift.rotation.cycle_length):
            tokens = torch.randint(16, (2, 6), generator=torch.Generator().manual_seed(step))
            model(tokens, labels=tokens).loss.backward()
            hift.optimizer.step()
    return counter.frame_count


@pytest.mark.parametrize("depth", [3, 6])
def test_layers_that_write_to_a_cache_share_no_graphs_and_are_told_of(depth):
    with pytest.warns(
        UserWarning, match=r"`config\.use_cache` of `LlamaForCausalLM` is true.*`config\.use_cache = Fal"
    ):
        assert graphs_of(tiny_llama(depth, use_cache=True)) == torch._dynamo.config.recompile_limit == 8


@pytest.mark.parametrize("depth", [3, 6])
def test_without_a_cache_layers_of_transformers_share_their_graphs(depth):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*use_cache")
        assert graphs_of(tiny_llama(depth, use_cache=False)) == 3


def test_an_encoder_which_has_no_cache_is_not_told_of():
    model = BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=16)
    )
    assert model.config.use_cache
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*use_cache")
        compile_layers(model, backend="eager")


def test_a_model_without_layers_that_are_modules_is_refused():
    model = nn.Module()
    model.weights = nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigurationError, match="finds no layer of `Module`"):
        compile_layers(model)


class OwnLayers(SmallTransformer):
    """Layers of a class that is not one of torch's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(Layer(WIDTH) for _ in range(2))


def trained_on_ranks(size, strategy):
    rank, found = torch.distributed.get_rank(), []
    own = slice(rank * size, (rank + 1) * size)
    batches = [(tokens[own], labels[own]) for tokens, labels in make_batches(2 * LAYERS, size=2 * size)]
    for make_module in (SmallTransformer, OwnLayers):
        weights, counter = [], CompileCounter()
        for compiled in (False, True):
            torch._dynamo.reset()
            module = make_module()
            if compiled:
                compile_layers(module, backend=counter)
            trainer(strategy(), devices=2, use_distributed_sampler=False).fit(module, loader(batches))
            state = module.state_dict()
            weights.append({n: w.full_tensor() if isinstance(w, DTensor) else w for n, w in state.items()})
        found.append((*weights, counter.frame_count))
    return found


@pytest.mark.parametrize("strategy", [HiFTDDPStrategy, HiFTFSDP2Strategy])
def test_compiled_layers_train_alike_on_several_ranks(strategy):
    for of_rank in run(trained_on_ranks, 2, 2, strategy):
        for plain, compiled, graphs in of_rank:
            assert_same(plain, compiled)
            assert graphs == 3
