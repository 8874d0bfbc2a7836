"""nn.CodebookLinear."""

from __future__ import annotations

import copy
import gc
import io

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from codebook_cases import (
    TABLES,
    numbers,
    same,
)


def linear(rows=24, columns=64, bias=True, **options):
    torch.manual_seed(0)
    return ff.nn.CodebookLinear.from_linear(torch.nn.Linear(columns, rows, bias=bias), **options)


FORMATS = [
    {},
    {"code": "fp4", "blocksize": 32},
    {"double_quant": True},
    {"code": "dynamic8", "blocksize": 256},
    {"code": "int4", "double_quant": True},
    {"blocksize": 16},
    {"code": TABLES["3 bits"]},
]


@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_module(options, bias):
    plain = torch.nn.Linear(64, 24, bias=bias).eval()
    layer = ff.nn.CodebookLinear.from_linear(plain, **options)
    assert not layer.training
    assert layer.bias is plain.bias
    x = numbers(3, 64).requires_grad_()
    y = layer(x)
    assert torch.equal(y, ff.codebook_linear(x, ff.quantize(plain.weight, **options), plain.bias))
    y.sum().backward()
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"] * bias
    assert dict(layer.named_parameters())["weight"] is layer.weight
    text = repr(layer)
    for part in ("in_features=64, out_features=24", f"bias={bias}", "blocksize=", "double_quant="):
        assert part in text


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_state_dict(options, tmp_path):
    layer = linear(**options)
    state = layer.state_dict()
    nested = ["weight.nested_absmax", "weight.nested_quant_map"]
    last = list(state)[-1]
    assert list(state) == [
        "weight", "bias", "weight.absmax", "weight.quant_map",
        *(nested if options.get("double_quant") else []), last,
    ]  # fmt: skip
    theirs = layer.weight.quant_type in ("nf4", "fp4")
    kind = layer.weight.quant_type or "custom"
    assert last == f"weight.quant_state.{'bitsandbytes' if theirs else 'finefuse'}__{kind}"
    assert all(type(v) is torch.Tensor and not v.requires_grad for v in state.values())
    assert list(layer.state_dict(prefix="a.b.")) == [f"a.b.{k}" for k in state]
    x = numbers(2, 64)
    for target in (ff.nn.CodebookLinear(64, 24), linear(**options)):
        assert str(target.load_state_dict(state)) == "<All keys matched successfully>"
        assert torch.equal(target(x), layer(x))
        assert same(target.weight, layer.weight)
        assert target.weight.codes.data_ptr() != layer.weight.codes.data_ptr()
    two = torch.nn.Sequential(layer, linear(8, 24, **options))
    meta = torch.nn.Sequential(
        ff.nn.CodebookLinear(64, 24, device="meta"), ff.nn.CodebookLinear(24, 8, device="meta")
    )
    meta.load_state_dict(two.state_dict(), assign=True)
    assert torch.equal(meta(x), two(x))
    assert torch.equal(copy.deepcopy(two)(x), two(x))
    file = io.BytesIO()
    torch.save(two.state_dict(), file)
    file.seek(0)
    blank = torch.nn.Sequential(ff.nn.CodebookLinear(64, 24), ff.nn.CodebookLinear(24, 8))
    blank.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(blank(x), two(x))
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(two.state_dict(), tmp_path / "two.safetensors")
    blank = torch.nn.Sequential(ff.nn.CodebookLinear(64, 24), ff.nn.CodebookLinear(24, 8))
    blank.load_state_dict(safetensors.load_file(tmp_path / "two.safetensors"))
    assert torch.equal(blank(x), two(x))


def test_module_type_and_device():
    layer = linear(double_quant=True)
    before = layer.weight.codes.clone()
    absmax = layer.weight.absmax.clone()
    for change, dtype in (
        (lambda: layer.half(), torch.float16),
        (lambda: layer.to(torch.bfloat16), torch.bfloat16),
        (lambda: layer.float(), torch.float32),
        (lambda: layer.to("cpu", torch.float64), torch.float64),
    ):
        module = change()
        assert module.weight.dtype is module.bias.dtype is dtype
        assert isinstance(module.weight, torch.nn.Parameter)
        assert torch.equal(module.weight.codes, before)
        assert torch.equal(module.weight.absmax, absmax)
        assert module(numbers(2, 64, dtype=dtype)).dtype is dtype
    meta = copy.deepcopy(layer).to("meta")
    assert meta.weight.codes.is_meta
    state = layer.state_dict()
    meta.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(meta(torch.ones(64).double()), layer(torch.ones(64).double()))
    layer.half().load_state_dict(state)
    assert layer.weight.dtype is torch.float16  # a module keeps its type
    layer.share_memory()
    assert layer.weight.is_shared()


def test_state_dict_that_does_not_fit():
    state = linear(double_quant=True).state_dict()

    def load(state, module=None):
        (module or ff.nn.CodebookLinear(64, 24)).load_state_dict(state)

    for key in ("weight", "bias"):
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            load({k: v for k, v in state.items() if k != key})
    for key in ("weight.absmax", "weight.quant_map", "weight.nested_absmax"):
        with pytest.raises(RuntimeError, match=rf"weight: {key.split('.')[1]}: "):
            load({k: v[:-1] if k == key else v for k, v in state.items()})
    with pytest.raises(RuntimeError, match="weight: quant_map: missing"):
        load({k: v for k, v in state.items() if k != "weight.quant_map"})
    with pytest.raises(
        RuntimeError, match=r"weight: without weight.absmax; this layer takes packed"
    ):
        load(torch.nn.Linear(64, 24).state_dict())
    with pytest.raises(RuntimeError, match='Unexpected key.*"gain"'):
        load(state | {"gain": torch.ones(1)})
    with pytest.raises(RuntimeError, match='Unexpected key.*"bias"'):
        load(state, ff.nn.CodebookLinear(64, 24, bias=False))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        load(state, ff.nn.CodebookLinear(64, 25))
    with pytest.raises(TypeError, match=r"linear: a torch.nn.Linear, not Conv1d"):
        ff.nn.CodebookLinear.from_linear(torch.nn.Conv1d(3, 3, 1))
    layer = ff.nn.CodebookLinear(64, 24)
    layer.load_state_dict({"bias": torch.ones(24)}, strict=False)
    assert torch.equal(layer(torch.ones(64)), torch.ones(24))


def test_unexpected_keys():
    layer = ff.nn.CodebookLinear(64, 8)
    state = layer.state_dict() | {"weight.SCB": torch.ones(1)}
    with pytest.raises(RuntimeError, match='Unexpected key.*"weight.SCB"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).unexpected_keys == ["weight.SCB"]
    stale = layer.state_dict() | {"weight.nested_quant_map": torch.ones(256)}
    with pytest.raises(
        RuntimeError, match="weight: absmax: dtype torch.float32; allowed: torch.uint8"
    ):
        layer.load_state_dict(stale)


def test_module_is_freed():
    layer = linear()
    layer(numbers(2, 64).requires_grad_()).sum().backward()
    codes = layer.weight.codes
    references = len(gc.get_referrers(codes))
    del layer
    gc.collect()
    assert len(gc.get_referrers(codes)) < references
