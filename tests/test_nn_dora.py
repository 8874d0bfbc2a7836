"""DoRA in modules: equal to PEFT's layers in numbers, gradients and merges; files: test_nn_lora."""

from __future__ import annotations

import copy
import io

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from adapted_models import adapted, fill, numbers, output, tiny, train
from tolerances import check
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")  # of torch: the models are tiny


def values(layer, name="default"):
    """A, B and m of our layer or PEFT's."""
    kinds = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    return [getattr(kind[name], "weight", kind[name]) for kind in kinds]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 64])  # 64: above both sizes of the layer
@pytest.mark.parametrize("bias", [True, False])
def test_equals_peft(peft, rank, rslora, bias):
    torch.manual_seed(rank)
    base = nn.Linear(37, 29, bias=bias)
    config = peft.LoraConfig(
        r=rank, lora_alpha=5, use_rslora=rslora, use_dora=True, target_modules=["0"],
        init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]
    ours = ff.nn.LoRALinear.from_linear(
        base, rank, 5, rslora=rslora, dora=True, init_lora_weights=False
    )
    with torch.no_grad():
        for mine, other in zip(values(ours), values(theirs), strict=True):
            other.mul_(1 + 0.1 * numbers(*other.shape))  # m is no longer the norm
            mine.copy_(other)
    truth = copy.deepcopy(theirs).double()
    results = []
    for layer in (ours, theirs, truth):
        dtype = torch.float64 if layer is truth else torch.float32
        x, dy = numbers(2, 5, 37).to(dtype).requires_grad_(), numbers(2, 5, 29, seed=1).to(dtype)
        y = layer(x)
        y.backward(dy)
        results.append((y, x.grad, *(p.grad for p in values(layer))))
    for name, *triple in zip(("y", "dx", "dA", "dB", "dm"), *results, strict=True):
        check(name, *triple)
    assert ours.weight.grad is None
    merged = []
    for layer in (ours, theirs, truth):
        layer.merge()
        weight = layer.weight if layer is ours else layer.get_base_layer().weight
        merged.append((weight.clone(), layer(numbers(3, 37).to(weight.dtype))))
        layer.unmerge()
    for name, *triple in zip(("W", "y merged"), *merged, strict=True):
        check(name, *triple)
    check("W unmerged", ours.weight, theirs.get_base_layer().weight, base.weight)
    assert ours.norm is None


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_initial_values(init, quantize):
    """A new adapter leaves the layer as it is where B is zero, and always its rows' norms."""
    base = nn.Linear(64, 24)
    layer = ff.nn.LoRALinear.from_linear(
        base, 4, 8, dora=True, init_lora_weights=init, quantize=quantize
    )
    a, b, m = (p.double() for p in values(layer))
    weight = ff.dequantize(layer.weight) if quantize else layer.weight
    truth = torch.linalg.vector_norm(weight.double() + 2 * b @ a, dim=1)
    check("m", layer.lora_magnitude_vector["default"], m, truth)
    assert layer.lora_magnitude_vector["default"].dtype is torch.float32
    x = numbers(5, 64)
    plain = nn.functional.linear(x, weight, base.bias)
    if init is not False:
        torch.testing.assert_close(layer(x), plain)
    else:
        assert not torch.allclose(layer(x), plain)


@pytest.mark.parametrize("double_quant", [False, True])
def test_packed_base(double_quant):
    """QDoRA is DoRA on what the codes decode to."""
    base = nn.Linear(64, 24)
    layer = ff.nn.LoRALinear.from_linear(
        base, 4, 8, quantize="nf4", double_quant=double_quant, dora=True, init_lora_weights=False
    )
    fill(layer)
    plain = ff.dequantize(layer.weight)
    dense = ff.nn.LoRALinear(64, 24, 4, 8, weight=plain, bias=base.bias, dora=True)
    dense.load_state_dict(
        {k: v for k, v in layer.state_dict().items() if "lora" in k}, strict=False
    )
    x = numbers(7, 64)
    check("y", layer(x), dense(x), copy.deepcopy(dense).double()(x.double()))
    a, b, m = (p.double() for p in values(layer))
    total = plain.double() + 2 * b @ a
    factor = m[:, None] / torch.linalg.vector_norm(total, dim=1, keepdim=True)
    error = layer.merge()
    distance = (ff.dequantize(layer.weight) - factor * total).abs().max().item()
    assert error == pytest.approx(distance, rel=1e-4)
    assert error > 0
    wanted = ff.dequantize(layer.weight).double() / factor - 2 * b @ a
    error = layer.unmerge()
    distance = (ff.dequantize(layer.weight) - wanted).abs().max().item()
    assert error == pytest.approx(distance, rel=1e-4)
    assert isinstance(layer.weight, ff.CodebookTensor)


def test_adapters_of_a_layer():
    """Some with norms, some without; the norms of a new one are those of the weight without a merged one."""
    layer = ff.nn.LoRALinear(16, 8, 2, 4, init_lora_weights=False)
    x = numbers(3, 16)
    base, first = nn.functional.linear(x, layer.weight, layer.bias), layer(x)
    layer.merge()
    layer.add_adapter("second", 3, 6, dora=True)
    assert layer.merged is None
    torch.testing.assert_close(layer(x), base)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "lora_A.second", "lora_B.second", "lora_magnitude_vector.second",
    ]  # fmt: skip
    fill(layer)
    second = layer(x)
    assert not torch.allclose(second, base)
    layer.set_adapter("default")
    torch.testing.assert_close(layer(x), first)
    assert not layer.lora_magnitude_vector["second"].requires_grad
    layer.set_adapter("second")
    before = layer.weight.clone()
    assert layer.merge() < 1e-6
    torch.testing.assert_close(layer(x), second)
    layer.set_adapter("default")  # takes it out
    torch.testing.assert_close(layer.weight, before)
    torch.testing.assert_close(layer(x), first)
    layer.set_adapter("second")
    layer.disable()
    torch.testing.assert_close(layer(x), base)
    layer.enable()
    torch.testing.assert_close(layer(x), second)
    assert "second: rank=3, scale=2, dropout=0.0, dora; active=" in repr(layer)
    assert "default: rank=2, scale=2, dropout=0.0;" in repr(layer)
    assert layer.adapters["second"].dora
    assert not layer.adapters["default"].dora


def test_dropout_reaches_the_base_product():
    layer = ff.nn.LoRALinear(64, 8, 4, 4, dropout=1.0, dora=True)
    fill(layer)
    x = numbers(5, 64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.eval()
    y = ff.lora_linear(
        x, layer.weight, *values(layer)[:2], bias=layer.bias, magnitude=values(layer)[2]
    )
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_model(quantize):
    """Trains with everything else frozen; survives copies and state dicts; comes out as plain layers."""
    model = ff.nn.add_lora(
        tiny(), 4, 8, targets=["up", "down"], dora=True, dropout=0.1, quantize=quantize
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert before["up.lora_magnitude_vector.default"].shape == (24,)
    parameters = ff.nn.trainable_parameters(model)
    assert len(parameters) == 9
    losses = train(model, 40)
    assert losses[-1] < 0.9 * losses[0]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    model.eval()
    wanted = output(model)
    assert torch.equal(output(copy.deepcopy(model)), wanted)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = ff.nn.add_lora(
        tiny(1).eval(), 4, 8, targets=["up", "down"], dora=True, quantize=quantize
    )
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(output(other), wanted)
    with ff.nn.disable_adapter(model):
        assert not torch.allclose(output(model), wanted)
    merged = ff.nn.merge_and_unload(copy.deepcopy(model))
    assert not adapted(merged)
    if quantize is None:
        torch.testing.assert_close(output(merged), wanted)


def test_no_norm_is_kept_between_calls():
    """The norms are those of the weight and the factors as they are now."""
    layer = ff.nn.LoRALinear(16, 8, 2, 4, dora=True, init_lora_weights=False).eval()
    x = numbers(3, 16)
    with torch.no_grad():
        layer(x)
        for tensor in (layer.lora_A["default"], layer.lora_B["default"], layer.weight):
            tensor.data.mul_(1.5)  # behind the back of torch's version counter
            a, b, m = values(layer)
            total = layer.weight + 2 * b @ a
            total *= (m / torch.linalg.vector_norm(total, dim=1))[:, None]
            torch.testing.assert_close(layer(x), nn.functional.linear(x, total, layer.bias))


def test_compile(counter):
    model = ff.nn.add_lora(tiny(), 4, 8, targets=["up", "down"], dora=True)
    fill(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = numbers(5, 12)
    results = []
    for f in (model, compiled):
        model.zero_grad()
        y = f(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in ff.nn.trainable_parameters(model))])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype):
    layer = ff.nn.LoRALinear(16, 8, 2, 4, dtype=dtype, dora=True)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert layer.lora_magnitude_vector["default"].dtype is wide
    y = layer(numbers(3, 16, dtype=dtype))
    assert y.dtype is dtype
    y.sum().backward()
    assert layer.lora_magnitude_vector["default"].grad.dtype is wide
    layer.to(torch.bfloat16)
    assert layer(numbers(3, 16, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_files_into_an_adapter_that_is_there(peft, tmp_path):
    source = fill(ff.nn.add_lora(tiny(), 4, 8, targets=["up"], dora=True))
    ff.nn.save_adapter(source, tmp_path)
    model = ff.nn.add_lora(tiny(), 4, 8, targets=["up"], dora=True)
    ff.nn.load_adapter(model, tmp_path)
    assert torch.equal(output(model), output(source))
    for dora in (False, True):
        model = fill(ff.nn.add_lora(tiny(), 4, 8, targets=["up"], dora=dora))
        ff.nn.save_adapter(model, tmp_path / str(dora))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        if not dora:
            with pytest.raises(ValueError, match="use_dora: True; 'default' .* dora=False in "):
                ff.nn.load_adapter(model, tmp_path)
        else:
            with pytest.raises(ValueError, match="use_dora: False; 'default' .* dora=True in "):
                ff.nn.load_adapter(model, tmp_path / "False")
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    both = ff.nn.load_adapter(tiny(), tmp_path, "with")
    ff.nn.load_adapter(both, tmp_path / "False", "without")
    assert both.up.adapters["with"].dora
    assert not both.up.adapters["without"].dora
    ff.nn.set_adapter(both, "with")
    assert torch.equal(output(both), output(source))


def test_wrong_arguments():
    with pytest.raises(TypeError, match="dora: True or False, not 1"):
        ff.nn.LoRALinear(4, 8, 1, 1, dora=1)
    model = tiny()
    with pytest.raises(TypeError, match="dora: True or False, not 'yes'"):
        ff.nn.add_lora(model, 2, 4, targets=["up"], dora="yes")
    assert not adapted(model)
