"""Batches whose rows have different adapters: equal to PEFT's, and to each adapter on its own rows."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from adapted_models import copies, fill, llama, numbers, output, tiny
from concurrency import at_once
from finefuse import _passes
from tolerances import check
from torch import nn
from torch.utils.checkpoint import checkpoint

NAMES = ("a", "b", "c")
ROWS = 12
SPLITS = {
    "all distinct": ["a", "b", "c", "__base__"] * 3,
    "uniform": [NAMES[i % 3] for i in (0, 2, 1, 1, 0, 2, 2, 0, 1, 0, 2, 1)],
    "zipf": ["b"] * 6 + ["a"] * 3 + ["c"] * 2 + ["__base__"],
    "one and the base": ["__base__", "c"] * 6,
    "all the same": ["a"] * 12,
    "only the base": ["__base__"] * 12,
}


pytestmark = pytest.mark.usefixtures("one_thread")  # of torch: the models are tiny


def three(
    quantize=None, model=None, save=(("head",), (), ()), targets=("up", "mix.0", "down"), **options
):
    """Different layers, ranks and scales, and for each the layers to save."""
    model = tiny() if model is None else model
    first, *rest = targets
    plan = [(4, 8, targets, False), (2, 3, [first], True), (7, 5, rest, False)]
    for name, (rank, alpha, layers, rslora), saved in zip("abc", plan, save, strict=True):
        ff.nn.add_lora(
            model, rank, alpha, targets=list(layers), rslora=rslora, modules_to_save=saved, name=name,
            quantize=quantize if name == "a" else None, **options,
        )  # fmt: skip
        fill(model, 20 * ord(name))
    return model.eval()


def row_by_row(model, x, names, **options):
    """Each row in a batch of its own, with its adapter the active one."""
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with ff.nn.disable_adapter(model):
                rows.append(output(model, x[i : i + 1], **options))
        else:
            ff.nn.set_adapter(model, name)
            rows.append(output(model, x[i : i + 1], **options))
    return torch.cat(rows)


@pytest.mark.parametrize("names", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize(("shape", "saves"), [((ROWS, 12), ["head"]), ((ROWS, 3, 12), [])])
def test_equals_peft(peft, tmp_path, names, shape, saves):
    ours = three(save=[saves] * 3)
    theirs = None
    for name in NAMES:
        ff.nn.save_adapter(ours, tmp_path / name, name)
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path / name, name)
        else:
            theirs.load_adapter(tmp_path / name, name)
    theirs.eval()
    x = numbers(*shape)
    if (
        shape == (ROWS, 12) and "a" not in names
    ):  # their copies of modules_to_save go by the active one
        theirs.set_adapter("a")
    truth = copy.deepcopy(theirs).double()
    wanted = output(truth, x.double(), adapter_names=names)
    got = output(ours, x, adapter_names=names)
    check("y", got, output(theirs, x, adapter_names=names), wanted)
    torch.testing.assert_close(got, row_by_row(ours, x, names))


@pytest.mark.parametrize("names", SPLITS.values(), ids=SPLITS)
def test_a_layer_that_one_adapter_saves(names):
    """The rows of the others have the layer as it was; PEFT raises a KeyError."""
    model, x = three(), numbers(ROWS, 12)
    torch.testing.assert_close(output(model, x, adapter_names=names), row_by_row(model, x, names))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_language_model(peft, quantize):
    model = three(quantize, llama(), [[]] * 3, ("q_proj", "v_proj", "down_proj"))
    tokens = torch.arange(48).view(4, 12) % 64
    names = ["c", "__base__", "a", "b"]
    got = output(model, tokens, adapter_names=names)
    torch.testing.assert_close(got, row_by_row(model, tokens, names))
    with ff.nn.mixed_batch(model, names):
        torch.testing.assert_close(output(model, tokens), got)
        hidden = model.model(tokens)[0]
        torch.testing.assert_close(output(model.lm_head, hidden), got)
        generated = model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    for i, name in enumerate(names):
        if name != "__base__":
            ff.nn.set_adapter(model, name)
            alone = model.generate(
                tokens[i : i + 1], max_new_tokens=3, do_sample=False, pad_token_id=0
            )
            assert torch.equal(alone[0], generated[i])


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_gradients(quantize):
    """Each adapter gets what its rows give it alone; with its own parameters only if they ask."""
    model = three(quantize).train()
    ff.nn.set_adapter(model, "a", trains=["a", "b"])
    names, x = SPLITS["zipf"], numbers(ROWS, 12).requires_grad_()
    model(x, adapter_names=names).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {n.rpartition(".")[2] for n in grads if "lora" in n} == {"a", "b"}
    dx = x.grad
    for name in ("a", "b"):
        model.zero_grad()
        rows = [i for i, n in enumerate(names) if n == name]
        ff.nn.set_adapter(model, name)
        part = x.detach()[rows].requires_grad_()
        model(part).square().sum().backward()
        torch.testing.assert_close(dx[rows], part.grad)
        for n, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(grads.pop(n), p.grad)
    assert not grads
    with pytest.raises(ValueError, match="trains: 'd'; allowed: 'a', 'b', 'c'"):
        ff.nn.set_adapter(model, "a", trains=["d"])
    with pytest.raises(TypeError, match="trains: names, not 'a'"):
        ff.nn.set_adapter(model, "a", trains="a")


def test_dropout():
    model = three(dropout=1.0).train()
    names, x = SPLITS["zipf"], numbers(ROWS, 12)
    base = SPLITS["only the base"]
    got = model(x, adapter_names=names)
    rows = [i for i, n in enumerate(names) if n != "a"]  # a saves the head
    torch.testing.assert_close(got[rows], model(x, adapter_names=base)[rows])
    assert not torch.allclose(model.eval()(x, adapter_names=names)[rows], got[rows])
    ff.nn.add_lora(model.train(), 2, 4, targets=["up"], dropout=0.5, name="d")
    with pytest.raises(ValueError, match=r"dropout \[0.5, 1.0\] in one batch"):
        model(x, adapter_names=["a", "d"] * 6)
    model.eval()(x, adapter_names=["a", "d"] * 6)


# ---- the copy --------------------------------------------------------------------------------------


def test_the_copy_is_made_once_and_never_stale():
    model = three()
    names, x = SPLITS["uniform"], numbers(ROWS, 12)
    first = output(model, x, adapter_names=names)
    kept = model.up.stack
    assert set(kept.places) == {"a", "b"}
    assert torch.equal(output(model, x, adapter_names=names), first)
    assert model.up.stack is kept
    changes = [
        lambda p: p.mul_(1.5),  # in place, as optimizers do
        lambda p: p.copy_(p * 1.5),
        lambda p: setattr(p, "data", p.data * 1.5),  # other memory
    ]
    for change in changes:
        for factor in (model.up.lora_A["a"], model.up.lora_B["b"]):
            before = output(model, x, adapter_names=names)
            with torch.no_grad():
                change(factor)
            got = output(model, x, adapter_names=names)
            assert not torch.allclose(got, before)
            torch.testing.assert_close(got, row_by_row(model, x, names))
    with torch.inference_mode():
        model.up.lora_B["a"].mul_(2)
    torch.testing.assert_close(output(model, x, adapter_names=names), row_by_row(model, x, names))
    state = {k: v * 1.25 if "lora" in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    torch.testing.assert_close(output(model, x, adapter_names=names), row_by_row(model, x, names))
    model.load_state_dict({k: v * 0.8 for k, v in state.items()}, assign=True)
    torch.testing.assert_close(output(model, x, adapter_names=names), row_by_row(model, x, names))
    model.double()
    assert model.up.stack is None
    torch.testing.assert_close(output(model, x, adapter_names=names), row_by_row(model, x, names))
    assert model.up.stack is not None
    assert copy.deepcopy(model).up.stack is None
    assert pickle.loads(pickle.dumps(model)).up.stack is None
    assert model.up.stack is not None
    model.train()
    assert model.up.stack is None


def test_the_copy_grows_with_the_names():
    model = three()
    ff.nn.add_lora(model, 3, 4, targets=["up"], name="d")
    fill(model, 60).eval()
    x = numbers(4, 12)
    with torch.no_grad():
        for names in ("aabb", "bbdd", "dbad"):
            got = model(x, adapter_names=list(names))
            torch.testing.assert_close(got, row_by_row(model, x, names))
        kept = model.up.stack
        assert set(kept.places) == {"a", "b", "d"}
        model(x, adapter_names=list("ddaa"))
        assert model.up.stack is kept
        model(x, adapter_names=list("dddd"))  # one alone needs none
        assert model.up.stack is kept


def test_no_copy_while_a_gradient_is_wanted():
    model = three()
    names, x = SPLITS["uniform"], numbers(ROWS, 12)
    ff.nn.set_adapter(model, "a", trains=NAMES)
    model(x, adapter_names=names)
    assert model.up.stack is None
    with torch.no_grad():
        model(x, adapter_names=names)
    assert model.up.stack is not None
    model(x, adapter_names=names).sum().backward()
    assert model.up.stack is None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():  # a copy of that would not serve a backward
        model(x, adapter_names=names)
    kept = model.up.stack
    x.requires_grad_()
    model(x, adapter_names=names).sum().backward()
    assert x.grad.any()
    assert model.up.stack is kept
    with torch.inference_mode():
        inside = copy.deepcopy(model)  # parameters without torch's count of changes
        got = inside(x, adapter_names=names)
        assert inside.up.stack is None
    torch.testing.assert_close(got.clone(), model(x, adapter_names=names).detach())


# ---- where names are in force ----------------------------------------------------------------------


def test_names_are_over_after_the_call():
    model = three()
    x, names = numbers(ROWS, 12), SPLITS["uniform"]
    plain = output(model, x)
    mixed = output(model, x, adapter_names=names)
    assert not torch.allclose(plain, mixed)
    assert torch.equal(output(model, x), plain)
    assert torch.equal(output(model, x, adapter_names=None), plain)

    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    for hooked in (model.mix[0], model):
        handle = hooked.register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            model(x, adapter_names=names)
        handle.remove()
        assert not _passes._stacks
        assert not _passes.in_force
        assert torch.equal(output(model, x), plain)
    handle = model.mix[0].register_forward_pre_hook(stop)
    with ff.nn.mixed_batch(model, names):
        with pytest.raises(Stop):
            model(x)
        handle.remove()
        assert torch.equal(output(model, x), mixed)
        same = SPLITS["all the same"]
        inner = output(model, x, adapter_names=same)
        assert torch.equal(output(model, x), mixed)
    torch.testing.assert_close(inner, row_by_row(model, x, same))
    ff.nn.set_adapter(model, "c")
    assert torch.equal(output(model, x), plain)
    assert not _passes._stacks


def test_a_call_that_was_interrupted():
    """KeyboardInterrupt runs no hooks: its names reach no later call."""
    model = three()
    x, names = numbers(ROWS, 12), SPLITS["uniform"]
    plain = output(model, x)

    def stop(*args):
        raise KeyboardInterrupt

    handle = model.mix[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(x, adapter_names=names)
    handle.remove()
    try:
        assert torch.equal(output(model, x), plain)
        torch.testing.assert_close(output(model, x[:3]), plain[:3])
    finally:
        _passes._stacks.clear()
        _passes.in_force = False


def test_models_in_models():
    """Names are for the model they were given to, and for what is inside of it."""
    inner, other = three(), three()
    x, names = numbers(ROWS, 12), SPLITS["uniform"]

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = inner, nn.Linear(4, 4)

        def forward(self, x):
            return self.out(self.inner(x)), other(x)

    outer = Outer()
    wanted = output(inner, x, adapter_names=names)
    plain = output(other, x)
    ff.nn.add_lora(outer, 2, 4, targets=["out"], name="d")
    ff.nn.set_adapter(inner, "b")
    with torch.no_grad():
        y, alone = outer(x, adapter_names=names)
        assert torch.equal(alone, plain)
        torch.testing.assert_close(
            y, nn.functional.linear(wanted, outer.out.weight, outer.out.bias)
        )
        with ff.nn.mixed_batch(inner, names):
            y, alone = outer(x)
        assert torch.equal(alone, plain)


def test_threads():
    model = three()
    x = numbers(ROWS, 12)
    splits = list(SPLITS.values()) * 4
    wanted = [output(model, x, adapter_names=names) for names in splits]
    got = [None] * len(splits)

    def work(t):
        for i in range(t, 24, 4):
            got[i] = output(model, x, adapter_names=splits[i])

    at_once(work, 4)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert not _passes._stacks


def test_copies_and_pickles():
    model = three()
    x, names = numbers(ROWS, 12), SPLITS["uniform"]
    wanted = output(model, x, adapter_names=names)
    for other in copies(model):
        assert torch.equal(output(other, x, adapter_names=names), wanted)
        assert len(other._forward_pre_hooks) == len(other._forward_hooks) == 1
        other.register_forward_pre_hook(lambda *args: None)  # takes no number that is taken
        assert torch.equal(output(other, x, adapter_names=names), wanted)
    ff.nn.add_lora(model, 2, 4, targets=["up"], name="d")
    assert len(model._forward_pre_hooks) == 1
    plain = ff.nn.merge_and_unload(model)
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks
    with pytest.raises(TypeError, match="adapter_names"):
        plain(x, adapter_names=names)


def test_compile(counter):
    """A plain call is one graph; with names the layers run as they are."""
    model = three()
    x, names = numbers(ROWS, 12), SPLITS["uniform"]
    mixed, plain = output(model, x, adapter_names=names), output(model, x)
    whole = torch.compile(model, fullgraph=True, backend=counter)
    assert torch.equal(output(whole, x), plain)
    assert counter.graphs == 1
    compiled = torch.compile(model, backend=counter)
    for _ in range(2):
        assert torch.equal(output(compiled, x), plain)
        with ff.nn.mixed_batch(model, names):
            torch.testing.assert_close(output(compiled, x), mixed)
        torch.testing.assert_close(output(compiled, x, adapter_names=names), mixed)
    wrapped = three(model=torch.compile(tiny(), backend=counter))  # through the wrapper
    for net in (wrapped, wrapped._orig_mod):
        torch.testing.assert_close(output(net, x, adapter_names=names), mixed)
    assert not _passes._stacks


# ---- recomputation ---------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    """A backward that recomputes has the names if it is enclosed too; else it raises."""
    names, x = SPLITS["zipf"], numbers(ROWS, 12)
    plain = three(save=[[]] * 3).train()
    ff.nn.set_adapter(plain, "a", trains=NAMES)
    plain(x, adapter_names=names).square().sum().backward()
    model = three(save=[[]] * 3).train()
    ff.nn.set_adapter(model, "a", trains=NAMES)
    again = Checkpointed(model, reentrant)
    with ff.nn.mixed_batch(again, names):
        again(x.clone().requires_grad_()).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
    again(x.clone().requires_grad_()).square().sum().backward()  # a step that is not mixed
    with ff.nn.mixed_batch(again, names):
        loss = again(x.clone().requires_grad_()).square().sum()
    with pytest.raises(RuntimeError, match="run the backward within finefuse.nn.mixed_batch too"):
        loss.backward()
    again.train()
    again(x.clone().requires_grad_()).square().sum().backward()


# ---- wrong input -----------------------------------------------------------------------------------


def test_wrong_names():
    model = three()
    x = numbers(3, 12)
    before = output(model, x)
    for error, match, names in [
        (ValueError, "adapter_names: 'd'; allowed: 'a', 'b', 'c', '__base__'", ["a", "d", "b"]),
        (ValueError, "adapter_names: None; allowed", ["a", None, "b"]),
        (TypeError, "adapter_names: a list of names, not 'abc'", "abc"),
        (TypeError, "adapter_names: a list of names, not 3", 3),
        (ValueError, "adapter_names: 2 of them; the batch has 3 rows", ["a", "b"]),
        (ValueError, "adapter_names: 0 of them; the batch has 3 rows", []),
    ]:
        with pytest.raises(error, match=match):
            model(x, adapter_names=names)
        assert not _passes._stacks
        assert torch.equal(output(model, x), before)
        if "of them" not in match:
            with pytest.raises(error, match=match), ff.nn.mixed_batch(model, names):
                pass
    one = ff.nn.mixed_batch(model, ["a"])
    with pytest.raises(ValueError, match="adapter_names: 1 of them; the batch has 12 rows"), one:
        model.up(numbers(12))
    assert output(model, x[:0], adapter_names=[]).shape == (0, 4)
    with pytest.raises(ValueError, match="name: '__base__'"):
        ff.nn.add_lora(model, 2, 4, targets=["up"], name="__base__")


def test_merged_disabled_dora():
    model = three()
    x, names = numbers(ROWS, 12), SPLITS["uniform"]
    base = output(model, x, adapter_names=SPLITS["only the base"])
    with ff.nn.disable_adapter(model):
        assert torch.equal(output(model, x, adapter_names=names), base)
    ff.nn.set_adapter(model, "a")
    model.up.merge()
    with pytest.raises(ValueError, match="adapter 'a' is merged; unmerge"):
        model(x, adapter_names=names)
    model.up.unmerge()
    ff.nn.add_lora(model, 2, 4, targets=["up"], name="d", dora=True)
    with pytest.raises(ValueError, match="'d' has dora; allowed: adapters without"):
        model(x, adapter_names=["a", "d"] * 6)
    model(x, adapter_names=["a", "b"] * 6)


def test_modules_to_save_of_several_rows():
    """What need not treat rows alone cannot have several copies in a batch; one copy is what it is."""
    model = nn.Sequential(nn.Linear(12, 12), nn.Sequential(nn.BatchNorm1d(12)))
    ff.nn.add_lora(model, 2, 4, targets=["0"], modules_to_save=["1"], name="a")
    ff.nn.add_lora(model, 2, 4, targets=["0"], name="b")
    x = numbers(4, 12)
    with pytest.raises(TypeError, match="a Sequential of modules_to_save; .*: Linear, Embedding"):
        model(x, adapter_names=["a", "b", "a", "b"])
    model(x, adapter_names=["a"] * 4)
    embedding = nn.Sequential(nn.Embedding(8, 12), nn.Linear(12, 12))
    ff.nn.add_lora(embedding, 2, 4, targets=["1"], modules_to_save=["0"], name="a")
    ff.nn.add_lora(embedding, 2, 4, targets=["1"], modules_to_save=["0"], name="b")
    fill(embedding)
    tokens = torch.arange(20).view(4, 5) % 8
    ff.nn.set_adapter(embedding, "a", trains=["a", "b"])
    y = embedding(tokens, adapter_names=["b", "a", "__base__", "b"])
    torch.testing.assert_close(
        y.detach(), row_by_row(embedding, tokens, ["b", "a", "__base__", "b"])
    )
    ff.nn.set_adapter(embedding, "a", trains=["a", "b"])
    embedding(tokens, adapter_names=["b", "a", "__base__", "b"]).sum().backward()
    assert all(embedding[0].modules_to_save[n].weight.grad.any() for n in "ab")
    assert embedding[0].original_module.weight.grad is None
