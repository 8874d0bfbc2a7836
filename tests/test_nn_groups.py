"""Layers of one input as groups: the same numbers with one read, and alone wherever that would not hold."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from adapted_models import copies, fill, llama, numbers
from concurrency import at_once
from finefuse import _groups, _passes
from finefuse.nn import LoRALinear
from torch import nn
from torch.utils.checkpoint import checkpoint

QKV, GATE = ["q", "k", "v"], ["gate", "up"]
needs_hooks = pytest.mark.skipif(
    _groups._top_hooks is None,
    reason="this torch does not say whether saved-tensor hooks are there",
)


pytestmark = pytest.mark.usefixtures("one_thread")  # of torch: the models are tiny


class Block(nn.Module):
    """Attention-like and gated products; `call` is what the layers are called with."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 16), nn.Linear(12, 8, bias=False), nn.Linear(12, 8)
        self.o = nn.Linear(8, 12)
        self.gate, self.up, self.down = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 12)
        self.skips = self.raises = False
        self.other = None

    def forward(self, x):
        q, k = self.q(x), self.k(x if self.other is None else self.other)
        if self.raises:
            raise ArithmeticError
        v = k if self.skips else self.v(x if self.other is None else self.other)
        x = x + self.o(torch.sigmoid(q[..., :8] * k) * v)
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


class Blocks(nn.Sequential):
    def forward(self, x):
        for block in self:
            x = block(x)
        return x


def model(groups=(QKV, GATE), count=2, **options):
    torch.manual_seed(0)
    options = {"targets": [*QKV, "o", *GATE, "down"], **options}
    return fill(
        ff.nn.add_lora(Blocks(*(Block() for _ in range(count))), 4, 8, groups=groups, **options)
    )


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of lora_linear_group had."""
    seen = []

    def counting(x, weights, *args, **options):
        seen.append(len(weights))
        return group(x, weights, *args, **options)

    group = _groups.lora_linear_group
    monkeypatch.setattr(_groups, "lora_linear_group", counting)
    yield seen
    waiting = len(_groups._thread.kept)
    _groups._thread.kept.clear()
    assert waiting == 0


@contextmanager
def within(net):
    """A pass of a model whose layers the test calls itself."""
    _passes.begin(net, (), {})
    try:
        yield
    finally:
        _passes.end(net, (), True)


def step(net, x, seed=1, run=None):
    """y, dx and the gradients of what trains."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = (run or net)(x)
    y.square().sum().backward()
    return y.detach(), x.grad, [p.grad for p in ff.nn.trainable_parameters(net)]


def equal(ours, theirs):
    """To the bit, but for what went through a sum of several dx."""
    assert torch.equal(ours[0], theirs[0])
    for a, b in zip([ours[1], *ours[2]], [theirs[1], *theirs[2]], strict=True):
        torch.testing.assert_close(a, b)


# ---- the numbers -----------------------------------------------------------------------------------


@needs_hooks
@pytest.mark.parametrize("groups", [(QKV, GATE), "auto"])
@pytest.mark.parametrize("options", [
    {}, {"dropout": 0.3}, {"quantize": "nf4"}, {"rank_pattern": {"k": 2, "up": 7}, "rslora": True},
])  # fmt: skip
def test_the_same_numbers(calls, groups, options):
    ours, alone = model(groups, **options), model(None, **options)
    x = numbers(5, 12)
    if groups == "auto":
        first = step(ours, x)
        assert torch.equal(first[1], step(alone, x)[1])  # not yet a group
        assert not calls
    equal(step(ours, x), step(alone, x))
    assert calls == [3, 2, 3, 2]
    layer, single = ours[1], alone[1]  # what no sum of dx comes before is the same to the bit
    assert torch.equal(layer.down.lora_A["default"].grad, single.down.lora_A["default"].grad)
    assert torch.equal(layer.up.lora_B["default"].grad, single.up.lora_B["default"].grad)
    calls.clear()
    ours.eval(), alone.eval()
    with torch.no_grad():
        assert torch.equal(ours(x), alone(x))
    assert calls == [3, 2, 3, 2]


def test_two_passes_then_one_backward(calls):
    """As preference losses have them; "auto" becomes groups between the two."""
    for groups in ((QKV, GATE), "auto"):
        ours, alone = model(groups), model(None)
        x, other = numbers(5, 12), numbers(5, 12, seed=1)
        run = lambda net: lambda x: torch.cat([net(x), net(other)])  # noqa: E731
        equal(step(ours, x, run=run(ours)), step(alone, x, run=run(alone)))


def test_a_language_model(calls):
    groups = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    tokens = torch.arange(24).view(2, 12) % 64
    results = []
    for choice in (None, groups, "auto"):
        net = fill(ff.nn.add_lora(llama(), 4, 8, targets="all-linear", groups=choice))
        with torch.no_grad():
            net(tokens)
            calls.clear()
            results.append(net(tokens).logits)
            assert calls == ([] if choice is None else [3, 2] * 2)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_hooks_of_each_layer_run(calls):
    net, seen = model(count=1), []
    for name in QKV:
        net[0].get_submodule(name).register_forward_hook(lambda m, args, y, n=name: seen.append(n))
    net[0].k.register_forward_hook(lambda m, args, y: y * 2)
    with torch.no_grad():
        y = net(numbers(5, 12))
        assert seen == QKV
        assert calls == [3, 2]
        alone = model(None, count=1)
        alone[0].k.register_forward_hook(lambda m, args, y: y * 2)
        assert torch.equal(y, alone(numbers(5, 12)))


# ---- who is a group --------------------------------------------------------------------------------


def grouped(net):
    """Names of layers by group."""
    found = {}
    for name, m in net.named_modules():
        if (
            isinstance(m, LoRALinear)
            and isinstance(m.group, _groups.Group)
            and not m.group.dissolved
        ):
            found.setdefault(m.group, []).append(name)
    return sorted(found.values())


def test_found_by_watching(calls):
    net = model("auto", count=1)
    x = numbers(5, 12)
    assert grouped(net) == []
    with torch.no_grad():
        net[0](x)  # no call of the model
        assert grouped(net) == []
        net(x)
        net[0](x)
        assert grouped(net) == []
        net(x)
    assert grouped(net) == [["0.gate", "0.up"], ["0.q", "0.k", "0.v"]]
    for change in ("other", "changes"):  # another tensor; the same, changed
        net = model("auto", count=1)
        if change == "other":
            net[0].other = x.clone()
        else:
            net[0].q.register_forward_hook(lambda m, args, y: y + 0 * args[0].add_(0).sum())
        with torch.no_grad():
            net(x), net(x)
        assert ["0.k", "0.v"] in grouped(net)
        assert ["0.q", "0.k", "0.v"] not in grouped(net)


def test_some_are_there():
    """A group of those that have adapters; parents with one alone have none."""
    net = model([QKV], targets=["q", "v", "gate", "up"])
    assert grouped(net) == [["0.q", "0.v"], ["1.q", "1.v"]]
    net = model([QKV], targets=["0.q", "0.v", "1.q"])
    assert grouped(net) == [["0.q", "0.v"]]
    ff.nn.add_lora(net, 4, 8, targets=["1.v", "1.k"], groups=[QKV], name="second")
    assert grouped(net) == [["0.q", "0.v"], ["1.q", "1.k", "1.v"]]


@needs_hooks
@pytest.mark.parametrize("groups", [(QKV, GATE), "auto"])
def test_another_tensor_dissolves(calls, groups):
    """Cross attention: k and v are called with another tensor than q."""
    ours, alone = model(groups, count=1), model(None, count=1)
    x = numbers(5, 12)
    if groups == "auto":
        step(ours, x)
    for other in (None, numbers(5, 12, seed=1), None):
        ours[0].other = alone[0].other = other
        equal(step(ours, x), step(alone, x))
    assert ["0.q", "0.k", "0.v"] not in grouped(ours)
    assert ["0.gate", "0.up"] in grouped(ours)


def test_a_skipped_branch_dissolves(calls):
    ours, alone = model(count=1), model(None, count=1)
    x = numbers(5, 12)
    ours[0].skips = alone[0].skips = True
    with torch.no_grad():
        assert torch.equal(ours(x), alone(x))
        assert not _groups._thread.kept  # the end of the call
        assert grouped(ours) == [["0.gate", "0.up"]]
        calls.clear()
        assert torch.equal(ours(x), alone(x))
        assert calls == [2]


def test_an_exception_does_not(calls):
    net = model(count=1)
    net[0].raises = True
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            net(numbers(5, 12))
        assert not _groups._thread.kept
    net[0].raises = False
    calls.clear()
    with torch.no_grad():
        net(numbers(5, 12))
    assert calls == [3, 2]


# ---- what waits ------------------------------------------------------------------------------------


def test_each_output_is_handed_out_once(calls):
    net = model(count=1)
    block, x = net[0], numbers(5, 12)
    with torch.no_grad(), within(net):
        q = block.q(x)
        k = block.k(x)
        assert torch.equal(block.k(x), k)  # computed again
        assert torch.equal(block.q(x), q)
        block.v(x)
        assert calls == [3]
        assert not _groups._thread.kept
        block.v(x), block.q(x), block.k(x)  # in any order
        assert calls == [3, 3]


def changes():
    def weight(block, x):
        block.k.weight.mul_(2)

    def factor(block, x):
        block.k.lora_B["default"].mul_(2)

    def swapped(block, x):
        block.k.lora_B["default"] = nn.Parameter(block.k.lora_B["default"] * 2)

    def scale(block, x):
        block.k.scaling["default"] *= 2

    def tensor(block, x):
        x.mul_(2)

    def autocast(block, x):
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def gradient(block, x):
        return torch.enable_grad()

    def backend(block, x):
        return ff.backend("eager")

    def merged(block, x):
        block.k.merge()

    def disabled(block, x):
        block.k.disable()

    def training(block, x):
        block.k.train()

    def mixed(block, x):
        return ff.nn.mixed_batch(block, ["__base__"] * 5)

    return [
        weight, factor, swapped, scale, tensor, autocast, gradient, backend, merged, disabled, training, mixed
    ]  # fmt: skip


@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
def test_nothing_stale_is_handed_out(calls, change):
    """Between the first call and the others something changes."""
    results = []
    for groups in ([QKV], None):
        net = model(groups, count=1, dropout=0.999).eval()
        block, x = net[0], numbers(5, 12)
        with torch.no_grad(), within(net):
            block.q(x)
            before = block.v(x) if groups is None else None
            context = change(block, x)
            torch.manual_seed(0)
            if context is None:
                results.append(block.k(x))
            else:
                with context:
                    results.append(block.k(x))
        assert results[-1].requires_grad == (change.__name__ == "gradient")
    assert results[0].dtype is results[1].dtype
    assert torch.equal(*results) or change.__name__ == "training"
    assert calls == [3]
    del before


@needs_hooks
def test_nothing_is_held(calls):
    """Neither tensors of a pass that is over nor models."""
    net = model()
    x = numbers(5, 12).requires_grad_()
    refs = []
    net[0].k.register_forward_hook(lambda m, args, y: refs.append(weakref.ref(y)))
    net(x).sum().backward()
    gc.collect()
    assert refs[0]() is None
    for clear in (nn.Module.eval, lambda net: ff.nn.set_adapter(net, "default")):
        with within(net):
            net[0].q(x)
            assert len(_groups._thread.kept) == 1
            clear(net)
            assert not _groups._thread.kept
    net[0].q(x)  # a probe, not a pass: alone
    assert not _groups._thread.kept
    net(x)
    assert calls[-2:] == [3, 2]
    inner = weakref.ref(net[0])
    del net
    gc.collect()
    assert inner() is None


def test_copies(calls):
    net = model()
    x = numbers(5, 12)
    with torch.no_grad():
        wanted = net(x)
        net[0].q(x)  # others wait, in no copy
        for other in copies(net):
            calls.clear()
            assert torch.equal(other(x), wanted)
            assert calls == [3, 2, 3, 2]
            members = other[0].q.group.layers()
            assert members == [other[0].q, other[0].k, other[0].v]
        layer = copy.deepcopy(net[0].k)  # alone: no group, and no copy of the others
        assert layer.group.layers() == [None, layer, None]
        assert torch.equal(layer(x), net[0].k(x))
        net[0].v(x)
        watching = copy.deepcopy(model("auto"))
        watching(x), watching(x)
        assert len(grouped(watching)) == 4
        assert torch.equal(watching(x), wanted)
    plain = ff.nn.merge_and_unload(net)
    torch.testing.assert_close(plain(x), wanted)


def test_replicas(calls):
    """What DataParallel makes shares the attributes of a layer; it runs alone."""
    net = model(count=1)
    block, x = net[0], numbers(5, 12)
    with torch.no_grad(), within(net):
        wanted = [block.get_submodule(n)(x) for n in QKV]
        assert calls == [3]
        for name, y in zip(QKV, wanted, strict=True):
            layer = block.get_submodule(name)
            replica = layer._replicate_for_data_parallel()
            for key, value in (*layer._parameters.items(), *layer._modules.items()):
                setattr(replica, key, value)
            assert torch.equal(replica(x), y)
    assert calls == [3]
    assert not block.q.group.dissolved


@pytest.mark.parametrize("groups", [(QKV, GATE), "auto"])
def test_threads(calls, groups):
    net, alone = model(groups), model(None)
    xs = [numbers(5, 12, seed=i) for i in range(32)]
    with torch.no_grad():
        wanted = [alone(x) for x in xs]
        net(xs[0]), net(xs[0])
    got = [None] * len(xs)

    def work(t):
        with torch.no_grad():
            for i in range(t, 32, 4):
                got[i] = net(xs[i])

    at_once(work, 4)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert len(grouped(net)) == 4
    kept = []  # the same tensor in another thread finds nothing
    x = xs[0]
    with torch.no_grad():
        net[0].q(x)
    thread = threading.Thread(target=lambda: kept.append(dict(_groups._thread.kept)))
    thread.start()
    thread.join()
    assert kept == [{}]
    net[0].q.group.clear()


# ---- recomputation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("groups", [(QKV, GATE), "auto"])
def test_checkpoint(calls, groups, reentrant, dropout):
    """Each block recomputed, with noise between the calls of a group's layers."""
    nets = model(groups, dropout=dropout), model(None, dropout=dropout)
    x = numbers(5, 12)
    for net in nets:
        for block in net:
            block.q.register_forward_hook(lambda m, args, y: y + 0.01 * torch.rand_like(y))

    def run(x):
        y = x
        for block in nets[0]:
            y = checkpoint(block, y, use_reentrant=reentrant)
        return y

    # The masks of a group are drawn at once, so only without that noise they are those of layers alone.
    for _ in range(3):
        ours, plain = step(nets[0], x, run=run), step(nets[1], x)
        equal(ours, plain)
    assert not calls or not dropout
    # Two passes before their backward, between which a watched model becomes a group.
    fresh = model(groups, dropout=dropout)
    nets = fresh, nets[1]

    def twice(net, run):
        return lambda x: torch.cat([run(x), run(x + 1)])

    for block in fresh:
        block.q.register_forward_hook(lambda m, args, y: y + 0.01 * torch.rand_like(y))
    fresh.forward = run
    equal(step(fresh, x, run=twice(fresh, fresh)), step(nets[1], x, run=twice(nets[1], nets[1])))


def test_a_group_in_one_checkpoint_each(calls):
    """The layers of a group in checkpoints of their own."""
    for reentrant in (True, False):
        ours, alone = model([QKV], count=1), model(None, count=1)
        results = []
        for net in (ours, alone):
            block = net[0]

            def run(x, block=block):
                ys = [checkpoint(block.get_submodule(n), x, use_reentrant=reentrant) for n in QKV]
                return torch.cat(ys, -1)

            results.append(step(net, numbers(5, 12), run=run))
        assert torch.equal(results[0][0], results[1][0])
        for a, b in zip(results[0][2], results[1][2], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


def test_saved_tensor_hooks(calls):
    net, alone = model(), model(None)
    x = numbers(5, 12)
    with torch.autograd.graph.save_on_cpu():
        ours = step(net, x)
    assert not calls
    equal(ours, step(alone, x))


# ---- alone -----------------------------------------------------------------------------------------


def test_what_runs_alone(calls):
    x = numbers(5, 12)
    with torch.no_grad():
        net = model(count=1)
        with ff.nn.mixed_batch(net, ["default"] * 5):
            net(x)
        net(x, adapter_names=["default"] * 5)
        with ff.nn.disable_adapter(net):
            net(x)
        assert not calls
        net[0].k.merge()
        net[0].gate.disable()
        net(x)
        assert not calls
        net[0].k.unmerge()
        net[0].gate.enable()
        ff.nn.add_lora(net, 2, 4, targets=["v"], name="norms", dora=True)
        net(x)  # v has norms, the others no adapter
        assert not calls
        ff.nn.set_adapter(net, "default")
        net(x)
        assert calls == [3, 2]
        calls.clear()
        model(dora=True)(x)
        net.train()
        net[0].q.adapters["default"] = net[0].q.adapters["default"]._replace(dropout=0.5)
        net(x)  # masks without a gradient: it may be a checkpoint's first pass
        assert calls == [2]
    with torch.inference_mode():
        net.eval()
        net(numbers(5, 12))  # a tensor without torch's count of changes
    assert calls == [2]


def test_compile(counter, calls):
    for groups in ((QKV, GATE), "auto"):
        net = model(groups)
        x = numbers(5, 12)
        compiled = torch.compile(net, fullgraph=True, backend=counter)
        with torch.no_grad():
            y = compiled(x)
            assert torch.equal(compiled(x), y)
            assert not calls
            net(x)
            assert torch.equal(net(x), y)
            assert calls
            calls.clear()
            assert torch.equal(compiled(x), y)
            assert not calls


# ---- wrong input -----------------------------------------------------------------------------------


def test_wrong_groups():
    net = Blocks(Block())
    for error, match, groups in [
        (TypeError, "groups: None, 'auto' or lists of names, not 'all'", "all"),
        (TypeError, "groups: None, 'auto' or lists of names, not 3", 3),
        (TypeError, "groups: None, 'auto' or lists of names", ["q", "k"]),
        (TypeError, "groups: None, 'auto' or lists of names", [["q", 1]]),
        (ValueError, r"groups: \['q'\]; allowed: at least two names, each once", [["q"]]),
        (ValueError, "at least two names, each once", [["q", "q"]]),
        (ValueError, "groups: 'q' in two of them", [["q", "k"], ["q", "v"]]),
        (ValueError, "no module has two layers with adapters of these", [["o", "v"]]),
        (ValueError, r"in '0' have in_features \[12, 24\]; allowed: the same", [["q", "down"]]),
    ]:
        before = str(net)
        with pytest.raises(error, match=match):
            ff.nn.add_lora(net, 2, 4, targets=["q", "k", "down"], groups=groups)
        assert str(net) == before
        assert all(p.requires_grad for p in net.parameters())
