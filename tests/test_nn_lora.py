"""nn.LoRALinear, add_lora and PEFT's files: equal to PEFT's layers and models, in both directions."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import sys
import weakref

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from adapted_models import (
    adapted,
    copies,
    fill,
    llama,
    numbers,
    output,
    peft_config,
    same_function,
    tensors,
    tiny,
    train,
)
from finefuse import _layers
from tolerances import check
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# ---- the layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 8, 64])  # 64: above both sizes of the layer
@pytest.mark.parametrize("bias", [True, False])
def test_equals_peft(peft, rank, rslora, bias):
    torch.manual_seed(rank)
    base = nn.Linear(37, 29, bias=bias)
    config = peft.LoraConfig(
        r=rank, lora_alpha=5, use_rslora=rslora, target_modules=["0"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]
    ours = ff.nn.LoRALinear.from_linear(base, rank, 5, rslora=rslora)
    with torch.no_grad():
        ours.lora_A["default"].copy_(theirs.lora_A["default"].weight)
        ours.lora_B["default"].copy_(theirs.lora_B["default"].weight)
    truth = copy.deepcopy(theirs).double()
    results = []
    for layer in (ours, theirs, truth):
        dtype = torch.float64 if layer is truth else torch.float32
        x, dy = numbers(2, 5, 37).to(dtype).requires_grad_(), numbers(2, 5, 29, seed=1).to(dtype)
        y = layer(x)
        y.backward(dy)
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        a, b = (a, b) if layer is ours else (a.weight, b.weight)
        results.append((y, x.grad, a.grad, b.grad))
    for name, *values in zip(("y", "dx", "dA", "dB"), *results, strict=True):
        check(name, *values)
    assert ours.weight.grad is None
    merged = []
    for layer in (ours, theirs, truth):
        layer.merge()
        weight = layer.weight if layer is ours else layer.get_base_layer().weight
        merged.append((weight, layer(numbers(3, 37).to(weight.dtype))))
        layer.unmerge()
    for name, *values in zip(("W", "y merged"), *merged, strict=True):
        check(name, *values)
    check("W unmerged", ours.weight, theirs.get_base_layer().weight, base.weight)


@pytest.mark.parametrize("double_quant", [False, True])
def test_packed_base(double_quant):
    """QLoRA is LoRA on what the codes decode to; merging says what quantising again cost."""
    base = nn.Linear(64, 24)
    layer = ff.nn.LoRALinear.from_linear(
        base, 4, 8, quantize="nf4", double_quant=double_quant, init_lora_weights=False
    )
    assert isinstance(layer.weight, ff.CodebookTensor)
    assert layer.lora_A["default"].dtype is torch.float32
    plain = ff.dequantize(layer.weight)
    dense = ff.nn.LoRALinear(64, 24, 4, 8, weight=plain, bias=base.bias)
    dense.load_state_dict(
        {k: v for k, v in layer.state_dict().items() if "lora" in k}, strict=False
    )
    x = numbers(7, 64)
    check("y", layer(x), dense(x), copy.deepcopy(dense).double()(x.double()))
    a, b = layer.lora_A["default"].double(), layer.lora_B["default"].double()
    wanted = plain.double() + 2 * b @ a
    error = layer.merge()
    distance = (ff.dequantize(layer.weight) - wanted).abs().max().item()
    assert error == pytest.approx(distance, rel=1e-4)
    assert error > 0
    assert isinstance(layer.weight, ff.CodebookTensor)
    assert (layer.weight.nested is not None) == double_quant
    assert torch.equal(layer(x), ff.codebook_linear(x, layer.weight, base.bias))
    wanted = ff.dequantize(layer.weight).double() - 2 * b @ a
    error = layer.unmerge()
    distance = (ff.dequantize(layer.weight) - wanted).abs().max().item()
    assert error == pytest.approx(distance, rel=1e-4)
    assert layer.merged is None


def test_from_codebook_linear():
    packed = ff.nn.CodebookLinear.from_linear(nn.Linear(64, 24).eval(), "int4")
    layer = ff.nn.LoRALinear.from_linear(packed, 4, 8)
    assert layer.weight is packed.weight
    assert not layer.training
    x = numbers(3, 64)
    assert torch.equal(layer(x), packed(x))  # B is zero
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "lora_A.default",
        "lora_B.default",
    ]
    assert isinstance(layer.to_linear(), ff.nn.CodebookLinear)
    assert layer.to_linear().weight is layer.weight
    assert packed.bias.requires_grad  # the layer that it was made from is as it was
    assert "code=int4" in repr(layer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype):
    """Adapters are float32 over 16-bit weights, as PEFT's are; `.to(dtype)` changes all."""
    layer = ff.nn.LoRALinear(16, 8, 2, 4, dtype=dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert layer.weight.dtype is layer.bias.dtype is dtype
    assert layer.lora_A["default"].dtype is layer.lora_B["default"].dtype is wide
    x = numbers(3, 16, dtype=dtype).requires_grad_()
    y = layer(x)
    assert y.dtype is dtype
    y.sum().backward()
    assert layer.lora_B["default"].grad.dtype is wide
    layer.to(torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(numbers(3, 16, dtype=torch.bfloat16)).dtype is torch.bfloat16
    packed = ff.nn.LoRALinear.from_linear(nn.Linear(16, 8), 2, 4, quantize="nf4").to(dtype)
    assert packed.weight.dtype is packed.lora_A["default"].dtype is dtype


def test_initial_values():
    torch.manual_seed(0)
    layer = ff.nn.LoRALinear(256, 128, 64, 8)
    bound = 256**-0.5
    a = layer.lora_A["default"]
    assert a.abs().max() <= bound
    assert a.abs().max() > 0.99 * bound
    assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not layer.lora_B["default"].any()
    layer = ff.nn.LoRALinear(256, 128, 64, 8, init_lora_weights=False)
    b = layer.lora_B["default"]
    assert b.std().item() == pytest.approx(64**-0.5 / 3**0.5, rel=0.02)
    layer = ff.nn.LoRALinear(256, 128, 64, 8, init_lora_weights="gaussian")
    assert layer.lora_A["default"].std().item() == pytest.approx(1 / 64, rel=0.02)
    assert not layer.lora_B["default"].any()
    given = numbers(8, 4)
    layer = ff.nn.LoRALinear(4, 8, 1, 1, weight=given)
    assert layer.weight.data_ptr() == given.data_ptr()
    assert not layer.bias.any()
    assert ff.nn.LoRALinear(4, 8, 1, 1, bias=False).bias is None


def test_adapters_of_a_layer():
    layer = ff.nn.LoRALinear(16, 8, 2, 4, init_lora_weights=False)
    x = numbers(3, 16)
    base, first = nn.functional.linear(x, layer.weight, layer.bias), layer(x)
    layer.add_adapter("second", 3, 1.5, rslora=True, init_lora_weights=False)
    assert layer.active == "second"
    second = layer(x)
    a, b = layer.lora_A["second"], layer.lora_B["second"]
    torch.testing.assert_close(second, base + (x @ a.T @ b.T) * 1.5 / 3**0.5)
    assert [k for k, p in layer.lora_A.items() if p.requires_grad] == ["second"]
    layer.set_adapter("default")
    assert torch.equal(layer(x), first)
    assert [k for k, p in layer.lora_B.items() if p.requires_grad] == ["default"]
    layer.disable()
    assert torch.equal(layer(x), base)
    layer.enable()
    assert torch.equal(layer(x), first)
    layer.set_adapter(None)
    assert torch.equal(layer(x), base)
    layer.set_adapter("default")
    # What leaves a merged adapter takes it out of the weight.
    before = layer.weight.clone()
    assert layer.merge() < 1e-6
    torch.testing.assert_close(layer(x), first)
    layer.set_adapter("second")
    torch.testing.assert_close(layer(x), second)
    layer.merge()
    layer.disable()
    torch.testing.assert_close(layer(x), base)
    layer.enable()
    torch.testing.assert_close(layer.weight, before)
    with pytest.raises(RuntimeError, match="nothing is merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="merged='second'"):
        layer.merge()
    with pytest.raises(RuntimeError, match="weight: adapter 'second' is merged into it"):
        layer.state_dict()
    assert torch.equal(layer.to_linear()(x), layer(x))


def test_dropout():
    layer = ff.nn.LoRALinear(64, 8, 4, 4, dropout=0.5, init_lora_weights=False)
    x = numbers(5, 64)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), y)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    gone = ff.nn.LoRALinear(64, 8, 4, 4, dropout=1.0, init_lora_weights=False)
    base = nn.functional.linear(x, gone.weight, gone.bias)
    torch.testing.assert_close(gone(x), base)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_draws_the_same_mask(reentrant):
    torch.manual_seed(0)
    layers = nn.Sequential(
        *(ff.nn.LoRALinear(16, 16, 4, 4, dropout=0.3, init_lora_weights=False) for _ in range(3))
    )
    grads = []
    for recompute in (False, True):
        layers.zero_grad()
        x = numbers(6, 16).requires_grad_()
        torch.manual_seed(1)
        y = checkpoint(layers, x, use_reentrant=reentrant) if recompute else layers(x)
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in ff.nn.trainable_parameters(layers))])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_compile(counter, quantize):
    model = ff.nn.add_lora(
        tiny(), 4, 8, targets="all-linear", quantize=quantize, dropout=0.1, init_lora_weights=False,
        modules_to_save=["head"],
    )  # fmt: skip
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = numbers(5, 12)
    results = []
    for f in (model, compiled):
        model.zero_grad()
        torch.manual_seed(2)
        y = f(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in ff.nn.trainable_parameters(model))])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)
    model.eval()
    assert torch.equal(compiled(x), model(x))


def test_layers_share_a_graph(counter):
    """What compiles one block and runs all of a model's with it does not compile again."""
    layers = [ff.nn.LoRALinear(16, 16, 2, 4, init_lora_weights=False) for i in range(12)]

    def f(layer, x):
        return layer(x)

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    x = numbers(3, 16)
    for layer in layers:
        torch.testing.assert_close(compiled(layer, x), layer(x))


def test_autocast():
    layer = ff.nn.LoRALinear(16, 8, 2, 4, init_lora_weights=False)
    x = numbers(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        layer.disable()
        assert layer(x).dtype is torch.bfloat16
    layer.enable()
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)
    y.sum().backward()
    assert layer.lora_A["default"].grad.dtype is torch.float32


@pytest.mark.parametrize("quantize", [None, "nf4", "int4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict(quantize, double_quant, tmp_path):
    options = {"quantize": quantize, "double_quant": double_quant} if quantize else {}

    def make(seed):
        model = ff.nn.add_lora(tiny(seed), 2, 4, targets=["up", "down"], **options)
        ff.nn.add_lora(model, 3, 4, targets=["down"], modules_to_save=["head"], name="second")
        return fill(model, seed)

    model = make(0)
    state = model.state_dict()
    assert all(type(v) is torch.Tensor for v in state.values())
    assert set(tiny().state_dict()) - set(state) == {"head.weight", "head.bias"}
    if quantize == "nf4":
        packed = ff.nn.CodebookLinear.from_linear(tiny().up, double_quant=double_quant)
        for key, value in packed.state_dict().items():
            assert torch.equal(state[f"up.{key}"], value), key
    x = numbers(5, 12)
    other = make(1)
    assert not torch.equal(other(x), model(x))
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(other(x), model(x))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = make(1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), model(x))
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(state, tmp_path / "model.safetensors")
    other = make(1)
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_copies(quantize):
    model = ff.nn.add_lora(
        tiny(), 2, 4, targets=["up"], quantize=quantize, modules_to_save=["head"]
    )
    fill(model)
    x = numbers(5, 12)
    for other in copies(model):
        assert torch.equal(other(x), model(x))
        assert len(ff.nn.trainable_parameters(other)) == 6
        assert other.up.weight.data_ptr() != model.up.weight.data_ptr() or quantize
    assert b"finefuse.nn" in pickle.dumps(model)


# ---- wrapping --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "exclude", "names"),
    [
        (["up"], (), ["up", "block.up"]),
        (["block.up"], (), ["block.up"]),
        (["p"], (), None),  # ends at a dot
        (["0", "down"], (), ["block.down", "mix.0"]),
        (r".*\.(up|down)", (), ["block.up", "block.down"]),
        ("up", (), ["up"]),  # the whole name
        ("all-linear", (), ["up", "block.up", "block.down", "mix.0", "mix.2", "head"]),
        ("all-linear", ["up", "head"], ["block.down", "mix.0", "mix.2"]),
        (["up"], r"block\..*", ["up"]),
    ],
)
def test_targets(peft, targets, exclude, names):
    model = tiny()
    if names is None:
        with pytest.raises(ValueError, match="matches no module"):
            ff.nn.add_lora(model, 2, 4, targets=targets)
        return
    assert ff.nn.add_lora(model, 2, 4, targets=targets, exclude=exclude) is model
    assert adapted(model) == names
    config = peft.LoraConfig(target_modules=targets, exclude_modules=exclude or None)
    theirs = peft.get_peft_model(tiny(), config)
    layers = [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert layers == names


def test_all_linear_of_a_language_model(peft):
    model = ff.nn.add_lora(llama(), 2, 4, targets="all-linear")
    assert len(adapted(model)) == 14
    assert type(model.lm_head) is nn.Linear
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear"))
    assert adapted(model) == [
        n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")
    ]


def test_patterns():
    model = ff.nn.add_lora(
        tiny(), 4, 8, targets=["up", "down"],
        rank_pattern={"block.up": 2, r".*down": 3}, alpha_pattern={"up": 1.5},
    )  # fmt: skip
    got = {n: model.get_submodule(n).adapters["default"][:2] for n in adapted(model)}
    assert got == {"up": (4, 1.5), "block.up": (2, 1.5), "block.down": (3, 8)}


def test_conv1d(peft, tmp_path):
    """GPT-2's layer keeps its weight (in, out)."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    base = copy.deepcopy(model)
    fill(ff.nn.add_lora(model, 2, 4, targets=["c_attn", "c_fc"]))
    assert model.transformer.h[0].attn.c_attn.weight.shape == (48, 16)
    ff.nn.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    same_function(model, theirs)
    loss = model(torch.arange(8).view(1, 8), labels=torch.arange(8).view(1, 8)).loss
    loss.backward()
    assert model.transformer.h[0].attn.c_attn.lora_A["default"].grad.any()
    merged = ff.nn.merge_and_unload(copy.deepcopy(model))
    same_function(merged, theirs)
    packed = ff.nn.add_lora(copy.deepcopy(base), 2, 4, targets=["c_attn"], quantize="nf4")
    assert output(packed).isfinite().all()
    # c_proj is square: a weight that is turned by mistake would fit
    square = fill(ff.nn.add_lora(base, 2, 4, targets=["attn.c_proj"]))
    key = "transformer.h.0.attn.c_proj.weight"
    assert torch.equal(square.state_dict()[key], square.get_submodule(key[:-7]).weight.t())
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save({key: square.state_dict()[key]})
    again = copy.deepcopy(square)
    again.load_state_dict(square.state_dict())
    same_function(again, square)
    plain = ff.nn.merge_and_unload(copy.deepcopy(square))
    assert type(plain.get_submodule(key[:-7])).__name__ == "Conv1D"
    plain.save_pretrained(tmp_path / "plain")
    same_function(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "plain").eval(), square)


def test_hooks_stay():
    model, calls = tiny(), []
    handle = model.up.register_forward_hook(lambda *args: calls.append("up"))
    ff.nn.add_lora(model, 2, 4, targets=["up"])
    output(model)
    ff.nn.merge_and_unload(model)
    output(model)
    assert calls == ["up", "up"]
    handle.remove()
    output(model)
    assert calls == ["up", "up"]
    model.up.forward = lambda x: x
    with pytest.raises(ValueError, match="targets: up has a forward of its own"):
        ff.nn.add_lora(model, 2, 4, targets=["up"])


def test_layers_that_nobody_calls():
    """torch's encoder layer reads the weights of its children itself in evaluation mode."""
    layer = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32), nn.Linear(16, 4))
    for targets in (["linear1"], ["out_proj"]):
        with pytest.raises((ValueError, TypeError), match="targets: 0"):
            ff.nn.add_lora(layer, 2, 4, targets=targets)
    assert list(adapted(ff.nn.add_lora(layer, 2, 4, targets="all-linear"))) == ["1"]


def test_a_layer_by_itself_and_compiled_parts(tmp_path):
    layer = ff.nn.LoRALinear(16, 4, 2, 4)
    assert type(ff.nn.merge_and_unload(layer)) is nn.Linear
    model = ff.nn.add_lora(tiny(), 2, 4, targets=["up"])
    plain = copy.deepcopy(model)
    model.up = torch.compile(model.up)
    ff.nn.save_adapter(model, tmp_path / "compiled")
    ff.nn.save_adapter(plain, tmp_path / "plain")
    files = [
        (tmp_path / d / "adapter_model.safetensors").read_bytes() for d in ("compiled", "plain")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_layers(peft, tmp_path, double_quant):
    """A model quantised by bitsandbytes keeps its bytes, and its adapter is PEFT's."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def model():
        layers = nn.Sequential(
            bnb.nn.Linear4bit(
                64,
                32,
                compress_statistics=double_quant,
                quant_type="nf4",
                compute_dtype=torch.float32,
            ),
            nn.Linear(32, 4),
        )
        torch.manual_seed(0)
        for parameter in layers.parameters():
            nn.init.normal_(parameter.data)
        return layers.to("cpu")

    theirs = peft.get_peft_model(
        model(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path)
    ours = model()
    assert ours[0].weight.quant_state is not None
    codes = ours[0].weight.data.clone()
    ff.nn.load_adapter(ours, tmp_path)
    assert torch.equal(ours[0].weight.codes, codes.flatten())
    assert (ours[0].weight.nested is not None) == double_quant
    x = numbers(3, 64)
    dense = x.double() @ ff.dequantize(ours[0].weight).double().T + ours[0].bias.double()
    a, b = (getattr(ours[0], f"lora_{k}")["default"].double() for k in "AB")
    check("y", ours[0](x), theirs.base_model.model[0](x), dense + 2 * x.double() @ a.T @ b.T)


def test_layers_are_freed_one_by_one(monkeypatch):
    """Quantising needs the memory of one layer beside the model's."""
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []

    def counting(*args):
        gc.collect()
        alive.append(sum(ref() is not None for ref in weights))
        return quantize(*args)

    quantize = _layers._quantize
    monkeypatch.setattr(_layers, "_quantize", counting)
    ff.nn.add_lora(model, 2, 4, targets="all-linear", quantize="nf4")
    assert len(alive) == 6
    assert alive[-1] <= 2


def test_shared_modules_and_weights():
    """A module in two places stays one; tied weights stay tied."""
    model = tiny()
    model.again = model.up
    ff.nn.add_lora(model, 2, 4, targets=["up"])
    assert model.again is model.up
    assert adapted(model) == ["up", "block.up"]
    tied = nn.Module()
    tied.embedding, tied.out = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
    tied.out.weight = tied.embedding.weight
    ff.nn.add_lora(tied, 2, 4, targets=["out"])
    assert tied.out.weight is tied.embedding.weight


def test_second_adapter():
    model = ff.nn.add_lora(tiny(), 2, 4, targets=["up"], modules_to_save=["head"])
    base = output(tiny())
    fill(model)
    first = output(model)
    ff.nn.add_lora(model, 3, 6, targets=["up", "mix.0"], name="second")
    assert torch.equal(output(model), base)  # the second: B is zero, the head its own again
    fill(model, 9)
    second = output(model)
    assert not torch.equal(second, base)
    assert len(ff.nn.trainable_parameters(model)) == 6
    ff.nn.set_adapter(model, "default")
    assert torch.equal(output(model), first)
    assert model.mix[0].active is None
    assert model.head.weight is model.head.modules_to_save["default"].weight
    assert len(ff.nn.trainable_parameters(model)) == 6
    with ff.nn.disable_adapter(model) as same:
        assert same is model
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), first)
    ff.nn.set_adapter(model, "second")
    assert torch.equal(output(model), second)
    with pytest.raises(ValueError, match="name: 'third'; allowed: 'default', 'second'"):
        ff.nn.set_adapter(model, "third")
    with pytest.raises(ValueError, match="no adapter is there"):
        ff.nn.set_adapter(tiny(), "default")
    merged = ff.nn.merge_and_unload(model)
    assert not adapted(merged)
    assert type(merged.head) is nn.Linear
    torch.testing.assert_close(output(merged), second)
    assert not ff.nn.trainable_parameters(merged)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_training(quantize):
    """A few steps lower the loss and change the adapters and nothing else."""
    model = ff.nn.add_lora(
        tiny(), 4, 8, targets=["up", "down"], dropout=0.1, modules_to_save=["head"],
        quantize=quantize,
    )  # fmt: skip
    parameters = ff.nn.trainable_parameters(model)
    assert sum(p.numel() for p in parameters) == 4 * (12 + 24 + 24 + 24 + 24 + 16) + 36
    before = {k: v.clone() for k, v in model.state_dict().items()}
    losses = train(model, 20)
    assert losses[-1] < 0.9 * losses[0]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}


def test_wrong_arguments():
    model = tiny()
    before = str(model)

    def add(rank=2, alpha=4, **options):
        ff.nn.add_lora(model, rank, alpha, **{"targets": ["up"], **options})

    for error, match, options in [
        (ValueError, "rank: 0; allowed: at least 1", {"rank": 0}),
        (TypeError, "rank: an int, not 2.0", {"rank": 2.0}),
        (TypeError, "alpha: a number, not '4'", {"alpha": "4"}),
        (ValueError, "alpha: nan", {"alpha": float("nan")}),
        (ValueError, "dropout: 1.5; allowed: 0 to 1", {"dropout": 1.5}),
        (ValueError, "init_lora_weights: 'pissa'", {"init_lora_weights": "pissa"}),
        (ValueError, r"targets: \['nothing'\] matches no module", {"targets": ["nothing"]}),
        (ValueError, r"targets: '\('", {"targets": "("}),
        (TypeError, "targets: names", {"targets": [1]}),
        (TypeError, "targets: block is a torch.nn.*ModuleDict", {"targets": ["block"]}),
        (ValueError, "modules_to_save: 'tail'", {"modules_to_save": ["tail"]}),
        (TypeError, "modules_to_save: names, not 'head'", {"modules_to_save": "head"}),
        (ValueError, "matches no module", {"targets": ["head"], "modules_to_save": ["head"]}),
        (ValueError, "rank_pattern: 'down'", {"rank_pattern": {"down": 2}}),
        (ValueError, "rank: -1", {"rank_pattern": {"up": -1}}),
        (ValueError, r"alpha_pattern: '\('", {"alpha_pattern": {"(": 1}}),
        (ValueError, "name: 'a.b'", {"name": "a.b"}),
        (ValueError, "name: 'keys'", {"name": "keys"}),
        (ValueError, "name: ''", {"name": ""}),
        (ValueError, "code: 'nf5'", {"quantize": "nf5"}),
        (ValueError, "blocksize: 63", {"quantize": "nf4", "blocksize": 63}),
    ]:
        with pytest.raises(error, match=match):
            add(**options)
        assert str(model) == before
        assert all(p.requires_grad for p in model.parameters()), options
    with pytest.raises(TypeError, match="model: a torch.nn.Module, not dict"):
        ff.nn.add_lora({}, 2, 4, targets=["up"])
    add()
    with pytest.raises(ValueError, match="name: 'default'; allowed: a name that no adapter"):
        add(targets=["down"])
    with pytest.raises(ValueError, match="modules_to_save: 'block'; allowed: modules without"):
        add(targets=["down"], modules_to_save=["block"], name="second")
    with pytest.raises(ValueError, match="quantize: a target has an adapter already"):
        add(name="second", quantize="nf4")

    class Scaled(nn.Linear):
        pass

    with pytest.raises(TypeError, match="targets: 0 is a .*Scaled; allowed: torch.nn.Linear"):
        ff.nn.add_lora(nn.Sequential(Scaled(2, 2)), 1, 1, targets="all-linear")


def test_wrong_arguments_of_the_layer():
    make = ff.nn.LoRALinear
    for error, match, args, options in [
        (ValueError, "rank: 0", (4, 8, 0, 1), {}),
        (TypeError, "alpha: a number", (4, 8, 1, None), {}),
        (
            ValueError,
            r"weight: \(4, 8\); allowed: \(8, 4\)",
            (4, 8, 1, 1),
            {"weight": numbers(4, 8)},
        ),
        (TypeError, "weight: a tensor, not list", (4, 8, 1, 1), {"weight": [1]}),
        (TypeError, "weight: dtype torch.int64", (4, 8, 1, 1), {"weight": torch.ones(8, 4).long()}),
        (ValueError, r"bias: \(4,\); allowed: \(8,\)", (4, 8, 1, 1), {"bias": numbers(4)}),
        (ValueError, "name: 'a.b'", (4, 8, 1, 1), {"name": "a.b"}),
    ]:
        with pytest.raises(error, match=match):
            make(*args, **options)
    layer = make(4, 8, 1, 1)
    with pytest.raises(ValueError, match="name: 'default'; allowed: a name that no adapter has"):
        layer.add_adapter("default", 1, 1)
    with pytest.raises(ValueError, match="name: 'x'; allowed: None, 'default'"):
        layer.set_adapter("x")
    for wrong in (nn.Conv1d(1, 1, 1), layer):
        with pytest.raises(TypeError, match="linear: a "):
            make.from_linear(wrong, 1, 1)
    packed = ff.nn.CodebookLinear(16, 4)
    with pytest.raises(ValueError, match="quantize: the weight is packed already"):
        make.from_linear(packed, 1, 1, quantize="nf4")
    with pytest.raises(ValueError, match="x: shape"):
        layer(numbers(3, 5))


# ---- two processes ---------------------------------------------------------------------------------


def distributed(rank, file):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    x = numbers(8, 12)
    for quantize in (None, "nf4"):
        options = {"targets": ["up", "down"], "quantize": quantize, "modules_to_save": ["head"]}
        alone = fill(ff.nn.add_lora(tiny(), 4, 8, **options))
        alone(x).square().mean().backward()
        torch.manual_seed(rank)
        model = ff.nn.add_lora(tiny(rank), 4, 8, **options)  # DDP gives both those of rank 0
        if rank == 0:
            fill(model)
        ddp = nn.parallel.DistributedDataParallel(model)
        ddp(x[rank::2]).square().mean().backward()
        state, wanted = model.state_dict(), alone.state_dict()
        assert all(torch.equal(state[k], v) for k, v in wanted.items() if "lora_A" not in k)
        ddp.zero_grad()
        model.load_state_dict(wanted)
        ddp(x[rank::2]).square().mean().backward()
        pairs = zip(
            ff.nn.trainable_parameters(model), ff.nn.trainable_parameters(alone), strict=True
        )
        for ours, truth in pairs:
            torch.testing.assert_close(ours.grad, truth.grad)
        both = [None, None]
        dist.all_gather_object(both, [p.grad for p in ff.nn.trainable_parameters(model)])
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed(tmp_path):
    torch.multiprocessing.spawn(distributed, (str(tmp_path / "store"),), nprocs=2)


# ---- PEFT's files ----------------------------------------------------------------------------------

CASES = {
    "plain": {"targets": ["up"]},
    "one of two names": {"targets": ["block.up"]},
    "only the outer one": {"targets": "up"},
    "rslora": {"targets": "all-linear", "rslora": True},
    "patterns": {
        "targets": ["up", "down", "mix.0"],
        "rank_pattern": {"^up": 2, "down": 5},
        "alpha_pattern": {"block.up": 3, "mix.0": 1},
    },
    "modules_to_save": {"targets": ["up"], "modules_to_save": ["head", "mix"]},
    "dropout": {"targets": ["up"], "dropout": 0.5},
    "gaussian": {"targets": ["up"], "init_lora_weights": "gaussian"},
    "dora": {"targets": ["up", "mix.0"], "dora": True, "modules_to_save": ["head"]},
    "dora patterns": {
        "targets": ["up", "down"],
        "dora": True,
        "rslora": True,
        "rank_pattern": {"^up": 2, "down": 5},
        "alpha_pattern": {"block.up": 3},
    },
}
LLAMA = {
    "attention": {"targets": ["q_proj", "v_proj"]},
    "all-linear": {"targets": "all-linear", "rslora": True},
    "dora": {"targets": ["q_proj", "v_proj", "down_proj"], "dora": True},
    "patterns": {
        "targets": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"down_proj": 2},
        "modules_to_save": ["lm_head", "embed_tokens"],
    },
}
MODELS = [(tiny, o) for o in CASES.values()] + [(llama, o) for o in LLAMA.values()]
IDS = [f"tiny {name}" for name in CASES] + [f"llama {name}" for name in LLAMA]


@pytest.mark.parametrize(("make", "options"), MODELS, ids=IDS)
def test_files_of_peft(peft, tmp_path, make, options):
    theirs = fill(peft.get_peft_model(make(), peft_config(peft, options))).eval()
    theirs.save_pretrained(tmp_path)
    ours = make().eval()
    assert ff.nn.load_adapter(ours, tmp_path) is ours
    same_function(ours, theirs)
    base = output(make().eval())
    assert not torch.equal(output(ours), base)
    with ff.nn.disable_adapter(ours):
        assert torch.equal(output(ours), base)
    # And back: the same numbers under the same keys.
    ff.nn.save_adapter(ours, tmp_path / "again")
    before, after = tensors(tmp_path), tensors(tmp_path / "again")
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("make", "options"), MODELS, ids=IDS)
def test_files_for_peft(peft, tmp_path, make, options, recwarn):
    ours = fill(ff.nn.add_lora(make(), 4, 8, **options)).eval()
    ff.nn.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert not [w for w in recwarn if "keys" in str(w.message)]  # "missing adapter keys"
    same_function(ours, theirs)
    layers = [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert layers == adapted(ours)
    again = ff.nn.load_adapter(make().eval(), tmp_path, name="other")
    assert torch.equal(output(again), output(ours))
    assert len(ff.nn.trainable_parameters(again)) == len(ff.nn.trainable_parameters(ours))
    ff.nn.save_adapter(again, tmp_path / "again", "other")
    config, same = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path, tmp_path / "again")
    )
    assert config == same


def test_files_of_a_packed_base(peft, tmp_path):
    """QLoRA's adapter on PEFT's model over the decoded weights."""
    ours = fill(ff.nn.add_lora(tiny(), 4, 8, targets=["up", "down"], quantize="nf4"))
    ff.nn.save_adapter(ours, tmp_path)
    base = tiny()
    for name in adapted(ours):
        weight = ff.dequantize(ours.get_submodule(name).weight)
        base.get_submodule(name).weight = nn.Parameter(weight)
    same_function(ours, peft.PeftModel.from_pretrained(base, tmp_path))
    packed = ff.nn.add_lora(tiny(), 4, 8, targets=["up", "down"], quantize="nf4")
    ff.nn.load_adapter(packed, tmp_path)  # into the adapter that is there
    assert torch.equal(output(packed), output(ours))


def test_sixteen_bits(peft, tmp_path):
    """float32 adapters over bfloat16 weights, as PEFT saves and loads them."""
    theirs = fill(
        peft.get_peft_model(tiny().bfloat16(), peft.LoraConfig(r=4, target_modules=["up"]))
    )
    theirs.save_pretrained(tmp_path)
    ours = ff.nn.load_adapter(tiny().bfloat16(), tmp_path)
    assert ours.up.lora_A["default"].dtype is torch.float32
    same_function(ours, theirs)
    ff.nn.save_adapter(ours, tmp_path / "again")
    assert {t.dtype for t in tensors(tmp_path / "again").values()} == {torch.float32}


def test_second_adapter_from_a_file(peft, tmp_path):
    first = fill(ff.nn.add_lora(tiny(), 4, 8, targets=["up"]))
    second = fill(ff.nn.add_lora(tiny(), 2, 8, targets=["down"], modules_to_save=["head"]), 9)
    ff.nn.save_adapter(first, tmp_path / "first")
    ff.nn.save_adapter(second, tmp_path / "second")
    both = ff.nn.load_adapter(tiny(), tmp_path / "first", "first")
    ff.nn.load_adapter(both, tmp_path / "second", "second")
    assert torch.equal(output(both), output(second))
    ff.nn.set_adapter(both, "first")
    assert torch.equal(output(both), output(first))
    ff.nn.save_adapter(both, tmp_path / "again", "second")
    before, after = tensors(tmp_path / "second"), tensors(tmp_path / "again")
    assert all(torch.equal(before[key], after[key]) for key in before | after)
    theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path / "first", "first")
    theirs.load_adapter(tmp_path / "again", "second")
    theirs.set_adapter("second")
    same_function(second, theirs)


def test_saved_under_wrappers(peft, tmp_path):
    """torch.compile and DistributedDataParallel put a name before all others."""
    model = fill(ff.nn.add_lora(tiny(), 4, 8, targets=["up"]))
    ff.nn.save_adapter(torch.compile(model), tmp_path)
    assert "base_model.model.up.lora_A.weight" in tensors(tmp_path)
    blank = tiny()
    ff.nn.load_adapter(torch.compile(blank), tmp_path)
    assert torch.equal(output(blank), output(model))


def test_what_files_cannot_say(peft, tmp_path):
    model = ff.nn.add_lora(tiny(), 4, 8, targets=["up"])
    with pytest.raises(ValueError, match="name: 'other'; allowed: 'default'"):
        ff.nn.save_adapter(model, tmp_path, "other")
    with pytest.raises(ValueError, match="no adapter is there"):
        ff.nn.save_adapter(tiny(), tmp_path)
    model.mix[0] = ff.nn.LoRALinear.from_linear(model.mix[0], 4, 8, dropout=0.1)
    with pytest.raises(ValueError, match="dropout: .* in different layers"):
        ff.nn.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_fit(peft, tmp_path):
    from safetensors.torch import save_file

    key = "base_model.model.up.lora_A.weight"
    source = ff.nn.add_lora(tiny(), 4, 8, targets=["up"], modules_to_save=["head"])
    ff.nn.save_adapter(source, tmp_path)
    whole, config = tensors(tmp_path), json.loads((tmp_path / "adapter_config.json").read_text())
    good = (tmp_path / "adapter_model.safetensors").read_bytes()

    def load(error, match, tensors=whole, model=None, **changes):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        model = model or tiny()
        before = str(model), {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(error, match=match):
            ff.nn.load_adapter(model, tmp_path)
        assert str(model) == before[0]
        assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())
        assert any(p.requires_grad for p in model.parameters())

    def without(name):
        return {k: v for k, v in whole.items() if k != name}

    load(ValueError, f"{key}: missing", without(key))
    load(ValueError, "up.lora_B.weight: missing", without(key.replace("_A", "_B")))
    block = "base_model.model.block.up.lora_"
    load(
        ValueError,
        f"{block}A.weight: missing",
        {k: v for k, v in whole.items() if "block" not in k},
    )
    load(ValueError, r"lora_A.weight: .*\(3, 12\); allowed: floats \(4, 12\)",
         whole | {key: torch.ones(3, 12)})  # fmt: skip
    load(ValueError, "lora_A.weight: torch.int64", whole | {key: torch.ones(4, 12).long()})
    load(ValueError, "base_model.model.down.lora_A.weight: the model has no module down",
         whole | {"base_model.model.down.lora_A.weight": torch.ones(4, 4)})  # fmt: skip
    load(ValueError, "mix.lora_A.weight: mix is a .*Sequential",
         whole | {"base_model.model.mix.lora_A.weight": torch.ones(4, 4)})  # fmt: skip
    load(ValueError, "up.extra: not a key of PEFT", whole | {"up.extra": torch.ones(1)})
    load(ValueError, "base_model.model.mix.0.bias: no tensor",
         whole | {"base_model.model.mix.0.bias": torch.ones(16)})  # fmt: skip
    load(ValueError, "head.weight: missing", without("base_model.model.head.weight"))
    load(ValueError, r"head.bias: shape \(5,\); the model has \(4,\)",
         whole | {"base_model.model.head.bias": torch.ones(5)})  # fmt: skip
    for extra in ("lora_embedding_A", "lora_B.bias"):
        name = f"base_model.model.up.{extra}"
        load(NotImplementedError, f"{name}: not there yet", whole | {name: torch.ones(4)})
    magnitude = "base_model.model.up.lora_magnitude_vector"
    load(ValueError, f"{magnitude}: there, and use_dora is false",
         whole | {magnitude: torch.ones(24)})  # fmt: skip
    load(ValueError, "up.lora_magnitude_vector: missing", use_dora=True)
    load(ValueError, r"up.lora_magnitude_vector: .*\(12,\); allowed: floats \(24,\)",
         whole | {magnitude: torch.ones(12), magnitude.replace("up", "block.up"): torch.ones(24)},
         use_dora=True)  # fmt: skip
    load(ValueError, r"lora_A.weight: .*\(4, 24\); allowed: floats \(8, 24\)", r=8)
    load(ValueError, "r: missing", r=None)
    load(ValueError, "peft_type: not 'LORA'", peft_type="IA3")
    load(ValueError, r"alpha_pattern: '\(': ", alpha_pattern={"(": 4})
    load(TypeError, "rank: an int", tensors=whole, rank_pattern={"up": "4"})
    for option, value in (
        ("lora_bias", True), ("bias", "all"), ("use_qalora", True),
        ("trainable_token_indices", [1]), ("target_parameters", ["x"]), ("from_2031", {"a": 1}),
    ):  # fmt: skip
        load(NotImplementedError, f"{option}: .* is not there yet", **{option: value})
    load(NotImplementedError, "init_lora_weights: 'pissa'", init_lora_weights="pissa")
    load(
        ValueError,
        "'default' has .* only in the",
        model=fill(ff.nn.add_lora(tiny(), 4, 8, targets=["up", "down"], modules_to_save=["head"])),
    )
    load(ValueError, "up: rank 4, scale 2; 'default' in the model has 4, 1",
         model=ff.nn.add_lora(tiny(), 4, 4, targets=["up"], modules_to_save=["head"]))  # fmt: skip
    for saves in ([], ["head", "mix"]):
        load(ValueError, "only the file or only 'default' in the model saves {'(head|mix)'}",
             model=ff.nn.add_lora(tiny(), 4, 8, targets=["up"], modules_to_save=saves),
             modules_to_save=["head"])  # fmt: skip
    save_file(whole, tmp_path / "adapter_model.safetensors")
    for damaged in (good[: len(good) // 2], good[:4], b"", b"\xff" * 64):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        (tmp_path / "adapter_model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"adapter_model.safetensors: "):
            ff.nn.load_adapter(tiny(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors"):
        ff.nn.load_adapter(tiny(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json: not JSON"):
        ff.nn.load_adapter(tiny(), tmp_path)
    with pytest.raises(FileNotFoundError):
        ff.nn.load_adapter(tiny(), tmp_path / "nowhere")


def test_without_safetensors(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    model = ff.nn.add_lora(tiny(), 4, 8, targets=["up"])
    with pytest.raises(ImportError, match="pip install safetensors"):
        ff.nn.save_adapter(model, tmp_path)


@pytest.mark.parametrize("targets", [None, 3, [None], [""]])
def test_targets_that_are_no_names(targets):
    with pytest.raises(TypeError, match="targets: names"):
        ff.nn.add_lora(torch.nn.Sequential(torch.nn.Linear(4, 4)), 2, 4.0, targets=targets)
