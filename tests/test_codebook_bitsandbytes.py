"""Files and bytes of bitsandbytes: what it wrote is read, what is written it would have written."""

from __future__ import annotations

import json
import warnings

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from codebook_cases import (
    TABLES,
    numbers,
    same,
)


def about(state):
    (key,) = (k for k in state if k.startswith("quant_state."))
    return key, json.loads(bytes(state[key].tolist()))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_of_bitsandbytes(kind, double_quant):
    q = ff.quantize(numbers(5, 13, dtype=torch.bfloat16), kind, 32, double_quant)
    codes, state = q.to_bitsandbytes()
    assert codes.shape == (33, 1)
    assert codes.data_ptr() == q.codes.data_ptr()
    nested = ["nested_absmax", "nested_quant_map"] if double_quant else []
    assert list(state) == ["absmax", "quant_map", *nested, f"quant_state.bitsandbytes__{kind}"]
    values = about(state)[1]
    tail = ["nested_blocksize", "nested_dtype", "nested_offset"] if double_quant else []
    assert list(values) == ["quant_type", "blocksize", "dtype", "shape", *tail]
    assert values["dtype"] == "bfloat16"
    assert values["shape"] == [5, 13]
    assert state["quant_map"].data_ptr() != q.code.data_ptr()
    unpacked = {k: v for k, v in state.items() if "quant_state" not in k} | values
    for form in (
        state,
        {f"model.0.weight.{k}": v for k, v in state.items()},
        unpacked,
        unpacked | {"dtype": torch.bfloat16, "shape": torch.Size([5, 13])},
    ):
        assert same(ff.CodebookTensor.from_bitsandbytes(codes, form), q)
    other_storage = torch.cat([codes.flatten(), codes.new_zeros(0)])[:32].view(torch.bfloat16)
    with pytest.raises(ValueError, match="codes: 32 elements; 65 codes of 4 bits take 33"):
        ff.CodebookTensor.from_bitsandbytes(other_storage, state)
    even = ff.quantize(numbers(4, 16), kind)
    codes, state = even.to_bitsandbytes()
    for dtype in (torch.bfloat16, torch.float32):
        assert same(ff.CodebookTensor.from_bitsandbytes(codes.flatten().view(dtype), state), even)


def test_no_bitsandbytes_form():
    for q in (
        ff.quantize(numbers(4, 16), "int4"),
        ff.quantize(numbers(4, 16), "dynamic8"),
        ff.quantize(numbers(4, 16), blocksize=16),
        ff.quantize(numbers(4, 16), TABLES["2 bits"]),
    ):
        with pytest.raises(
            ValueError, match="to_bitsandbytes: CodebookTensor.*has no bitsandbytes form"
        ):
            q.to_bitsandbytes()


def test_corrupted_state():
    q = ff.quantize(numbers(20, 64), "nf4", 64, True)
    codes, state = q.to_bitsandbytes()
    key, values = about(state)

    def packed(**changes):
        new = {k: v for k, v in (values | changes).items() if v is not ...}
        return {key: torch.tensor(list(json.dumps(new).encode()), dtype=torch.uint8)}

    cases = [
        (TypeError, "codes: a tensor, not list", [1], {}),
        (ValueError, "codes: 639 elements; 1280 codes of 4 bits take 640", codes[1:], {}),
        (TypeError, "quant_state: a dict, not list", codes, []),
        (ValueError, "absmax: missing in quant_state", codes, {"absmax": None}),
        (ValueError, "absmax: 19 elements; 1280 elements in blocks of 64 have 20", codes,
         {"absmax": state["absmax"][:19]}),
        (TypeError, "absmax: dtype torch.float32; allowed: torch.uint8", codes,
         {"absmax": state["absmax"].float()}),
        (TypeError, "absmax: a tensor, not float", codes, {"absmax": 1.0}),
        (ValueError, "quant_map: missing", codes, {"quant_map": None}),
        (ValueError, "quant_map: 8 entries; nf4 has 16", codes, {"quant_map": state["quant_map"][:8]}),
        (TypeError, "quant_map: dtype torch.float16", codes, {"quant_map": state["quant_map"].half()}),
        (ValueError, "quant_map: an entry is not finite", codes,
         {"quant_map": state["quant_map"] * float("nan")}),
        (ValueError, "nested_absmax: 2 elements; 20 elements in blocks of 256 have 1", codes,
         {"nested_absmax": state["nested_absmax"].repeat(2)}),
        (ValueError, "nested_absmax: an entry is not finite", codes,
         {"nested_absmax": state["nested_absmax"] * float("inf")}),
        (ValueError, "nested_quant_map: 16 elements; 8 bits index 256", codes,
         {"nested_quant_map": state["quant_map"]}),
        (ValueError, "nested_quant_map: missing", codes, {"nested_quant_map": None}),
        (ValueError, f"{key}: not JSON", codes, {key: state[key][:30]}),
        (ValueError, f"{key}: not JSON", codes, {key: state[key] | 128}),
        (ValueError, f"{key}: a JSON object", codes, {key: torch.tensor([49], dtype=torch.uint8)}),
        (TypeError, f"{key}: a uint8 tensor, not 'x'", codes, {key: "x"}),
        (ValueError, f"{key}: its quant_type is 'fp4'", codes, packed(quant_type="fp4")),
        (ValueError, "blocksize: 65; allowed: powers of two", codes, packed(blocksize=65)),
        (TypeError, "blocksize: an int, not '64'", codes, packed(blocksize="64")),
        (ValueError, "absmax: 20 elements; 1280 elements in blocks of 32 have 40", codes,
         packed(blocksize=32)),
        (ValueError, "dtype: 'int8'; allowed: float32", codes, packed(dtype="int8")),
        (ValueError, "dtype: missing", codes, packed(dtype=...)),
        (ValueError, "codes: 640 elements; 1300 codes", codes, packed(shape=[20, 65])),
        (ValueError, "shape: 1280; allowed: sizes", codes, packed(shape=1280)),
        (ValueError, r"shape: \[-20, -64\]; allowed", codes, packed(shape=[-20, -64])),
        (ValueError, "shape: missing", codes, packed(shape=None)),
        (ValueError, "shape: ''; allowed: sizes", codes, packed(shape="")),
        (ValueError, "shape: .* more than any memory", codes, packed(shape=[2**40, 2**40])),
        (ValueError, "shape: .* more than any memory", codes, packed(shape=[10**30, 1, 0])),
        (ValueError, "nested_offset: 1e.39; allowed", codes, packed(nested_offset=1e39)),
        (ValueError, "nested_offset: 10+; allowed", codes, packed(nested_offset=10**400)),
        (ValueError, "nested_absmax: missing", codes, {"nested_absmax": None}),
        (ValueError, f"{key}: not JSON", codes,
         {key: torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)}),
        (ValueError, "codes: a scalar", torch.tensor(1.0), {}),
        (ValueError, "absmax: of more than one tensor", codes, {"other.absmax": state["absmax"]}),
        (ValueError, "quant_state: .* and .*; allowed: one", codes,
         {"quant_state.bitsandbytes__fp4": state[key]}),
        (ValueError, "nested_offset: nan; allowed: a number", codes,
         packed(nested_offset=float("nan"))),
        (ValueError, "nested_offset: missing", codes, packed(nested_offset=...)),
        (ValueError, "nested_blocksize: 100; allowed", codes, packed(nested_blocksize=100)),
        (ValueError, "nested_dtype: 'float16'; allowed", codes, packed(nested_dtype="float16")),
    ]  # fmt: skip
    for error, message, first, changes in cases:
        changed = changes if isinstance(changes, list) else state | changes
        with pytest.raises(error, match=message):
            ff.CodebookTensor.from_bitsandbytes(first, changed)
    without = {k: v for k, v in state.items() if k != key}
    with pytest.raises(ValueError, match="shape: missing in quant_state"):
        ff.CodebookTensor.from_bitsandbytes(codes, without)
    with pytest.raises(ValueError, match="quant_type: 'int8'; allowed: 'nf4', 'fp4'"):
        ff.CodebookTensor.from_bitsandbytes(codes, without | values | {"quant_type": "int8"})


@pytest.fixture(scope="module")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "bitsandbytes", reason="bitsandbytes is not installed"
        ).functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bytes_of_bitsandbytes(bnb, kind, double_quant, blocksize, dtype):
    """Full blocks: its CPU path rounds a short one otherwise."""
    x = numbers(32, 512, dtype=dtype)
    codes, theirs = bnb.quantize_4bit(
        x, blocksize=blocksize, quant_type=kind, compress_statistics=double_quant
    )
    q = ff.quantize(x, kind, blocksize, double_quant)
    ours, state = q.to_bitsandbytes()
    want = theirs.as_dict(packed=True)
    assert list(state) == list(want)
    assert torch.equal(state["quant_map"], want["quant_map"])
    if kind == "nf4":
        assert torch.equal(ours, codes)
    if not double_quant:
        assert all(torch.equal(state[k], want[k]) for k in state)
    else:  # its mean, and with it the last bit of its offset, depends on its threads
        _, values = about(state)
        _, their_values = about(want)
        assert values.pop("nested_offset") == pytest.approx(
            their_values.pop("nested_offset"), rel=1e-6
        )
        assert list(values.items()) == list(their_values.items())
        assert torch.equal(state["nested_quant_map"], want["nested_quant_map"])
    # what they wrote, read here; what we write, read there
    theirs_here = ff.CodebookTensor.from_bitsandbytes(codes, want)
    torch.testing.assert_close(
        ff.dequantize(theirs_here), bnb.dequantize_4bit(codes, theirs), rtol=0, atol=0
    )
    assert same(ff.CodebookTensor.from_bitsandbytes(*theirs_here.to_bitsandbytes()), theirs_here)
    ours_there = bnb.QuantState.from_dict(dict(state), torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(ours, ours_there), ff.dequantize(q))
