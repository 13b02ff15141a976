"""What training scripts do around a model: optimizers, mixed precision, clipping, checkpoints,
loaders, saving, generation. torch on the CPU does the same and is the judge."""

from __future__ import annotations

import copy
import io

import model_families
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import pagoda
from pagoda.pytorch import device

P = "pagoda"
TOKENS = torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, scope="module")
def chip():
    before = (device.state.executor, device.state.allocator)
    yield pagoda.use_chip("edge")
    device.state.executor, device.state.allocator = before


@pytest.fixture(autouse=True)
def all_on_the_chip():
    torch._dynamo.reset()
    torch.pagoda.reset_fallbacks()
    yield
    assert torch.pagoda.fallbacks() == {}


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(32, 16), nn.Linear(16, 24)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 32)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(F.gelu(self.norm(self.up(self.embed(tokens))))))


def net(place: str, **options: float) -> Net:
    torch.manual_seed(0)
    return Net(**options).to(place)


def loss(model: nn.Module, tokens: torch.Tensor = TOKENS, how=None) -> torch.Tensor:
    tokens = tokens.to(next(model.parameters()).device)
    logits = (model if how is None else how)(tokens)
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def assert_same(found: nn.Module, expected: nn.Module, tolerance: float = 1e-5) -> None:
    for mine, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.detach().cpu(), other.detach(), rtol=1e-4, atol=tolerance)


def train_both(train, tolerance: float = 1e-5, **options: float) -> None:
    """`train(model)` here and on the CPU: the parameters must agree afterwards."""
    here, there = net("cpu", **options), net(P, **options)
    train(here)
    train(there)
    assert_same(there, here, tolerance)


# Optimizers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {}),
        ("SGD", dict(momentum=0.9, nesterov=True, weight_decay=0.1)),
        ("SGD", dict(momentum=0.9, fused=True)),
        ("Adam", {}),
        ("Adam", dict(amsgrad=True, foreach=False)),
        ("Adam", dict(fused=True)),
        ("AdamW", dict(foreach=False)),
        ("AdamW", dict(foreach=True)),
        ("AdamW", dict(fused=True)),
        ("AdamW", dict(capturable=True)),
        ("RMSprop", {}),
        pytest.param("RMSprop", dict(momentum=0.9, centered=True), marks=pytest.mark.slow),
        ("Adagrad", {}),
        ("Adagrad", dict(fused=True)),
        pytest.param("Adadelta", {}, marks=pytest.mark.slow),
        pytest.param("Adafactor", {}, marks=pytest.mark.slow),
        pytest.param("NAdam", {}, marks=pytest.mark.slow),
        pytest.param("RAdam", {}, marks=pytest.mark.slow),
        pytest.param("Adamax", {}, marks=pytest.mark.slow),
        pytest.param("ASGD", {}, marks=pytest.mark.slow),
        pytest.param("Rprop", {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_optimizers(name, options):
    def train(model):
        on_device = next(model.parameters()).device.type == P
        given = options if on_device else {n: v for n, v in options.items() if n != "capturable"}
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-2, **given)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

    train_both(train, 2e-5)


@pytest.mark.slow
def test_lbfgs():
    def train(model):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

        def closure():
            optimizer.zero_grad()
            found = loss(model)
            found.backward()
            return found

        optimizer.step(closure)

    train_both(train, 1e-4)


def test_muon():
    def train(model):
        weights = [model.up.weight, model.head.weight]
        optimizer = torch.optim.Muon(weights, lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

    train_both(train, 1e-3)  # its orthogonalisation runs in bfloat16


@pytest.mark.parametrize("foreach", [False, True])
def test_compiled_optimizer_step(foreach):
    def train(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=foreach)
        step = optimizer.step
        if next(model.parameters()).device.type == P:
            step = torch.compile(step, backend=P)
        for _ in range(3):
            loss(model).backward()
            step()
            optimizer.zero_grad()

    train_both(train)


def test_compiled_optimizer_step_on_a_schedule():
    """One graph more serves every further learning rate."""
    graphs = []

    def train(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        step = optimizer.step
        if next(model.parameters()).device.type == P:
            step = torch.compile(step, backend=P)
        for _ in range(5):
            loss(model).backward()
            step()
            schedule.step()
            optimizer.zero_grad()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    train_both(train)
    assert graphs[-1] == graphs[-3] > graphs[-5]


def test_learning_rate_schedule_and_averaged_model():
    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=4)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
        with torch.no_grad():
            for mine, mean in zip(model.parameters(), averaged.parameters(), strict=True):
                mine.copy_(mean)

    train_both(train)


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipping(clip):
    def train(model):
        loss(model).backward()
        getattr(nn.utils, f"clip_grad_{clip}_")(model.parameters(), 0.01)
        torch.optim.SGD(model.parameters(), lr=1.0).step()

    train_both(train)


def test_accumulated_gradients():
    def train(model):
        for part in TOKENS.chunk(2):
            (loss(model, part) / 2).backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()

    train_both(train)


# Mixed precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled):
    here, there = net("cpu"), net(P)
    how = torch.compile(there, backend=P) if compiled else there
    with torch.autocast("cpu", torch.bfloat16):
        assert here(TOKENS).dtype == torch.bfloat16
        expected = loss(here)
    with torch.autocast(P, torch.bfloat16):
        assert how(TOKENS.to(P)).dtype == torch.bfloat16
        found = loss(there, how=how)
    expected.backward()
    found.backward()
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-3)
    for mine, other in zip(there.parameters(), here.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        largest = float(other.grad.abs().max())
        torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=0, atol=0.05 * largest)


@pytest.mark.parametrize("name", ["softmax", "layer_norm", "mse_loss", "linear", "conv2d", "bmm"])
def test_autocast_types(name):
    """The result types of operations are those of CUDA."""
    x, w = torch.randn(2, 4, 4), torch.randn(4, 4)
    calls = {
        "softmax": (lambda x, w: F.softmax(x.bfloat16(), -1), torch.float32),
        "layer_norm": (lambda x, w: F.layer_norm(x.bfloat16(), (4,)), torch.float32),
        "mse_loss": (lambda x, w: F.mse_loss(x.bfloat16(), x.bfloat16()), torch.float32),
        "linear": (lambda x, w: F.linear(x, w), torch.bfloat16),
        "conv2d": (lambda x, w: F.conv2d(x[None], w[:, None, :, None].expand(4, 2, 4, 1)),
                   torch.bfloat16),
        "bmm": (lambda x, w: torch.bmm(x, x), torch.bfloat16),
    }  # fmt: skip
    call, kind = calls[name]
    with torch.autocast(P, torch.bfloat16):
        assert call(x.to(P), w.to(P)).dtype == kind


# Checkpointing, dropout --------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(compiled, reentrant):
    def train(model):
        def forward(tokens):
            def middle(x):
                return F.gelu(model.norm(model.up(x)))

            x = checkpoint(middle, model.embed(tokens), use_reentrant=reentrant)
            return model.head(x)

        on_device = next(model.parameters()).device.type == P
        how = torch.compile(forward, backend=P) if compiled and on_device else forward
        loss(model, how=how).backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()

    train_both(train)


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_is_the_same_when_recomputed(compiled):
    """y = sum over kept x_i^2 / (1 - p): its gradient tells which were kept in backward."""
    x = torch.rand(300).add(1).to(P).requires_grad_()
    kept = []

    def middle(x):
        return F.dropout(x, 0.5).square()

    def forward(x):
        return checkpoint(middle, x, use_reentrant=False)

    y = (torch.compile(forward, backend=P) if compiled else forward)(x)
    kept = y.detach().cpu() != 0
    y.sum().backward()
    assert 100 < kept.sum() < 200
    assert torch.equal(x.grad.cpu() != 0, kept)
    torch.testing.assert_close(x.grad.cpu(), 8 * x.detach().cpu() * kept)


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_in_training(compiled):
    model = net(P, dropout=0.3)
    how = torch.compile(model, backend=P) if compiled else model
    torch.manual_seed(2)
    first = loss(model, how=how)
    first.backward()
    torch.manual_seed(2)
    assert loss(model, how=how).item() == first.item()
    assert loss(model, how=how).item() != first.item()
    model.eval()
    torch.testing.assert_close(loss(model).cpu(), loss(net("cpu").eval()))


class Dropped(nn.Module):
    """What draws or adds up in an order that might depend on the chip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.dropout2d(F.relu(self.norm(self.stem(image))), 0.2, self.training)
        return self.head(self.layer(x.flatten(2).transpose(1, 2)).mean(1))


def trained_bits(chip: str, make, data: torch.Tensor, compiled: bool) -> list[torch.Tensor]:
    """Losses of two steps and the parameters after them."""
    pagoda.use_chip(chip)
    torch._dynamo.reset()
    torch.manual_seed(5)
    model, data = make().to(P), data.to(P)
    how = torch.compile(model, backend=P) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        found = how(data).square().mean()
        found.backward()
        optimizer.step()
        losses.append(found.detach().cpu())
    return [*losses, *(p.detach().cpu() for p in (*model.parameters(), *model.buffers()))]


def small() -> Net:
    return Net(dropout=0.3)


@pytest.mark.parametrize(
    ("make", "data", "compiled"),
    [
        (small, TOKENS, True),
        pytest.param(Dropped, torch.rand(4, 3, 8, 8), True, marks=pytest.mark.slow),
        pytest.param(Dropped, torch.rand(4, 3, 8, 8), False, marks=pytest.mark.slow),
    ],
    ids=["small", "convolution and attention", "eager"],
)
def test_training_has_the_same_bits_always_and_on_every_chip(make, data, compiled):
    before = (device.state.executor, device.state.allocator)
    first = trained_bits("edge", make, data, compiled)
    for chip in ("edge", "car", "tiny"):
        for mine, other in zip(trained_bits(chip, make, data, compiled), first, strict=True):
            assert torch.equal(mine, other), chip
    device.state.executor, device.state.allocator = before


# Data, sizes, saving -----------------------------------------------------------------------------


def test_data_loader_loop():
    data = TensorDataset(torch.randn(20, 8), torch.randint(0, 3, (20,)))

    def train(place):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).to(place)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        correct = 0
        for x, y in DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator()):
            x, y = x.to(place, non_blocking=True), y.to(place)
            logits = model(x)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits, y, label_smoothing=0.1).backward()
            optimizer.step()
            correct += int((logits.argmax(-1) == y).sum())
        return model, correct

    (there, ours), (here, theirs) = train(P), train("cpu")
    assert ours == theirs
    assert_same(there, here)


def test_batches_of_all_sizes_compile_twice():
    here, there = net("cpu"), net(P)
    how = torch.compile(there, backend=P)
    compiled = torch._dynamo.utils.counters["stats"]
    for number, rows in enumerate((4, 5, 7, 9)):
        tokens = torch.randint(0, 32, (rows, 6))
        expected, found = loss(here, tokens), loss(there, tokens, how)
        expected.backward()
        found.backward()
        torch.testing.assert_close(found.cpu(), expected)
        if number == 1:
            before = compiled["unique_graphs"]
    assert compiled["unique_graphs"] == before
    for mine, other in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-4, atol=1e-5)


def test_convolutions_with_batches_of_all_sizes():
    torch.manual_seed(0)
    here = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
    )
    there = copy.deepcopy(here).to(P)
    how = torch.compile(there, backend=P)
    for count in (2, 3, 5):
        x = torch.randn(count, 3, 8, 8)
        found, expected = how(x.to(P)), here(x)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
        found.square().sum().backward()
        expected.square().sum().backward()
    for mine, other in zip(there.buffers(), here.buffers(), strict=True):
        torch.testing.assert_close(mine.cpu(), other)
    for mine, other in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-4, atol=1e-3)


def test_training_goes_on_from_a_saved_state():
    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

    straight = net(P, dropout=0.2)
    optimizer = torch.optim.AdamW(straight.parameters(), lr=1e-2)
    steps(straight, optimizer, 1)
    file = io.BytesIO()
    state = [straight.state_dict(), optimizer.state_dict(), torch.pagoda.get_rng_state()]
    torch.save(state, file)
    steps(straight, optimizer, 2)

    file.seek(0)
    weights, moments, draws = torch.load(file, weights_only=True)
    assert all(t.device.type == P for t in weights.values())
    resumed = net(P, dropout=0.2)
    resumed.load_state_dict(weights)
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    optimizer.load_state_dict(moments)
    torch.pagoda.set_rng_state(draws)
    steps(resumed, optimizer, 2)
    for mine, other in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine.cpu(), other.cpu())

    file.seek(0)
    weights, *_ = torch.load(file, weights_only=True, map_location="cpu")
    here = net("cpu").eval()
    here.load_state_dict(weights)
    copied = copy.deepcopy(resumed).eval()
    copied.load_state_dict(weights)
    torch.testing.assert_close(loss(copied).cpu(), loss(here))


# Parts of torch that are not one operation -------------------------------------------------------


def differences(make, *inputs, call=None):
    """A module's result and gradients, here and there."""
    torch.manual_seed(0)
    here = make()
    there = copy.deepcopy(here).to(P)
    call = call or (lambda module, *inputs: module(*inputs))
    expected = call(here, *inputs)
    found = call(there, *(x.to(P) for x in inputs))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    for mine, other in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(6, 5, 2, bidirectional=True),
        lambda: nn.LSTM(6, 5, proj_size=3),
        lambda: nn.GRU(6, 5, 2),
        lambda: nn.RNN(6, 5),
    ],
    ids=["lstm, two layers, both ways", "lstm with projection", "gru, two layers", "rnn"],
)
def test_recurrent_networks(make):
    differences(make, torch.randn(4, 3, 6), call=lambda module, x: module(x)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_sequences(kind):
    def call(module, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 3, 1]), enforce_sorted=True)
        padded, lengths = nn.utils.rnn.pad_packed_sequence(module(packed)[0])
        assert lengths.tolist() == [4, 3, 1]
        return padded

    differences(lambda: kind(6, 5), torch.randn(4, 3, 6), call=call)


def test_multihead_attention():
    def call(module, x):
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]).to(x.device)
        out, weights = module(x, x, x, key_padding_mask=mask)
        return torch.cat([out.flatten(), weights.flatten()])

    differences(lambda: nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8),
                call=call)  # fmt: skip


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_parametrized_weights(norm):
    wrap = getattr(nn.utils.parametrizations, norm)
    differences(lambda: wrap(nn.Linear(4, 5)), torch.randn(2, 4))


def test_transforms_of_functions():
    def per_sample(x):
        return torch.func.vmap(torch.func.grad(lambda x: (x.sin() * x).sum()))(x)

    def jacobian(x):
        return torch.func.jacrev(lambda x: x.softmax(-1))(x)

    x = torch.randn(3, 4)
    for function in (per_sample, jacobian):
        torch.testing.assert_close(function(x.to(P)).cpu(), function(x), rtol=1e-4, atol=1e-5)


def test_double_backward():
    def penalty(model):
        x = torch.linspace(-1, 1, 12).view(3, 4).to(model[0].weight.device).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().sum()

    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    there = copy.deepcopy(here).to(P)
    penalty(here).backward()
    penalty(there).backward()
    for mine, other in zip(there.parameters(), here.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "mamba", "whisper"))],
)
def test_generate(name):
    model, inputs = model_families.make(name)
    model = model.model.eval()
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = model.generate(inputs[0], **options)
    found = model.to(P).generate(inputs[0].to(P), **options)
    assert torch.equal(found.cpu(), expected)


def test_hooks_and_frozen_parameters():
    seen = []

    def train(model):
        model.embed.requires_grad_(False)
        model.norm.register_forward_hook(lambda module, inputs, out: seen.append(out.mean().item()))
        model.head.weight.register_hook(lambda grad: grad * 2)
        loss(model).backward()
        assert model.embed.weight.grad is None
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        optimizer.step()

    train_both(train)
    assert seen[0] == pytest.approx(seen[1], abs=1e-6)
