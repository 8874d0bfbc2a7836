"""CodebookTensor: copies, types, devices, what it can do and what it says it cannot."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from codebook_cases import (
    code_of,
    numbers,
    same,
)


def through_torch_save(q, **options):
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    return torch.load(file, **options)


@pytest.fixture(params=["nf4", "fp4 double", "dynamic8", "3 bits double"])
def q(request):
    name, double = request.param.removesuffix(" double"), request.param.endswith("double")
    return ff.quantize(numbers(9, 75), code_of(name), 32, double)


def test_copies_keep_the_bytes(q):
    copies = {
        "clone": q.clone(),
        "deepcopy": copy.deepcopy(q),
        "pickle": pickle.loads(pickle.dumps(q)),
        "torch.save": through_torch_save(q, weights_only=True),
        "map_location": through_torch_save(q, weights_only=True, map_location="cpu"),
        "to copy": q.to("cpu", copy=True),
        "empty and copy": torch.empty_like(q).copy_(q),
    }
    for name, other in copies.items():
        assert same(other, q), name
        assert other.codes.data_ptr() != q.codes.data_ptr(), name
    for name, other in {
        "detach": q.detach(),
        "view": q.view(9, 75),
        "view -1": q.view(-1, 75),
        "reshape": q.reshape(9, -1),
        "view_as": q.view_as(ff.dequantize(q)),
        "contiguous": q.contiguous(),
        "to": q.to("cpu"),
        "requires_grad_": q.requires_grad_(False),
    }.items():
        assert same(other, q), name
        assert other.codes.data_ptr() == q.codes.data_ptr(), name
    flat = ff.quantize(numbers(75))
    assert same(flat.view(-1), flat)


def test_type_and_device(q):
    for other, dtype in (
        (q.half(), torch.float16),
        (q.to(torch.bfloat16), torch.bfloat16),
        (q.double(), torch.float64),
        (q.half().float(), torch.float32),
    ):
        assert same(other, q, dtype)
        assert ff.dequantize(other).dtype is dtype
        assert torch.equal(ff.dequantize(other, torch.float32), ff.dequantize(q))
    meta = q.to("meta")
    assert meta.device.type == meta.codes.device.type == "meta"
    assert meta.shape == q.shape
    assert q.nested is None or meta.nested.offset.device.type == "cpu"
    with pytest.raises(TypeError, match=r"dtype: torch.int8; a CodebookTensor decodes to"):
        q.to(torch.int8)


def test_parameter(q):
    p = torch.nn.Parameter(q, requires_grad=False)
    assert isinstance(p, torch.nn.Parameter)
    for other in (copy.deepcopy(p), pickle.loads(pickle.dumps(p)), through_torch_save(p)):
        assert isinstance(other, torch.nn.Parameter)
        assert not other.requires_grad
        assert same(other, q)
    for function in (lambda: torch.nn.Parameter(q), q.requires_grad_):
        with pytest.raises(RuntimeError, match="has no gradient: requires_grad=False"):
            function()


def test_share_memory(q):
    assert not q.is_shared()
    before = ff.dequantize(q)
    assert q.share_memory_() is q
    assert q.is_shared()
    assert torch.equal(ff.dequantize(q), before)


def test_copy_into(q):
    other = ff.quantize(
        numbers(9, 75, seed=5),
        q.code if q.quant_type is None else q.quant_type,
        32,
        q.nested is not None,
    )
    pointer = q.codes.data_ptr()
    assert q.copy_(other) is q
    assert same(q, other)
    assert q.codes.data_ptr() == pointer
    for a, b in (
        (q, torch.zeros(9, 75)),
        (torch.zeros(9, 75), q),
        (q, ff.quantize(numbers(9, 75), "int4", 32)),
        (q, ff.quantize(numbers(9, 75), blocksize=16)),
    ):
        with pytest.raises(
            NotImplementedError, match="allowed between CodebookTensors of one shape"
        ):
            a.copy_(b)


def test_other_operations_say_what_to_call(q):
    x = numbers(2, 75)
    for function in (
        lambda: q + 1,
        lambda: q.t(),
        lambda: q[0],
        lambda: q.sum(),
        lambda: torch.nn.functional.linear(x, q),
        lambda: x @ q.t(),
        lambda: torch.cat([q, q]),
        lambda: q.mul_(2),
        lambda: q.view(3, 225),
        lambda: q.view(-1) + 1,
        lambda: q.view(-1)[:10],
        lambda: q.view(-1).view(3, 225),
    ):
        with pytest.raises(NotImplementedError, match="finefuse.dequantize|from the middle"):
            function()
    with pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
        q.numpy()


def test_repr(q):
    text = repr(q)
    assert text.startswith("CodebookTensor(")
    assert "shape=(9, 75)" in text
    assert "blocksize=32" in text
    assert ("double_quant=True" in text) == (q.nested is not None)
    assert "_Bucket" in repr(q.view(-1))


def distributed(rank, file):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(rank)

    def agree(*tensors):
        both = [None, None]
        dist.all_gather_object(both, tensors)
        for a, b in zip(*both, strict=True):
            assert torch.equal(a, b)

    q = ff.quantize(torch.randn(8, 64), double_quant=True)
    dist.broadcast(q, 1)
    agree(ff.dequantize(q))
    dist.broadcast(q, 0, async_op=True).wait()
    agree(ff.dequantize(q))
    # Several in one bucket, with parameters of their type among them.
    layers = [
        ff.nn.CodebookLinear.from_linear(torch.nn.Linear(16, 16), code, 16, double)
        for code, double in (("nf4", True), ("dynamic8", False))
    ]
    model = torch.nn.Sequential(layers[0], torch.nn.Linear(16, 16), layers[1])
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    agree(*model.state_dict().values(), ddp(torch.ones(2, 16)))
    ddp(torch.randn(2, 16)).sum().backward()
    agree(model[0].bias.grad, model[1].weight.grad)
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed(tmp_path):
    torch.multiprocessing.spawn(distributed, (str(tmp_path / "store"),), nprocs=2)
