"""CodebookTensor: a tensor kept as packed codes. What it is, how it moves and how it is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _args, _codebooks
from ._codebooks import (
    About,
    Fields,
    Nested,
    check_bitsandbytes_form,
    check_state_fields,
    pack_about,
    read_state,
)

DTYPES = tuple(getattr(torch, name) for name in _args.DTYPES)


class CodebookTensor(Tensor):
    """A tensor of any shape kept as codes of a codebook: element i is code[c_i] · absmax[i / blocksize].

    Made by `finefuse.quantize` and `CodebookTensor.from_bitsandbytes`; read by `finefuse.dequantize` and
    `finefuse.codebook_linear`. `shape`, `dtype` and `device` are those of the tensor it stands for: `dtype`
    is what it decodes to by default. Moving, saving, copying keep the bytes; `.to(dtype)` changes nothing
    but `dtype`. It has no gradient. Any other torch operation raises NotImplementedError: decode first.

    Attributes:
        codes: uint8 (bytes,), packed over the flattened tensor, most significant bits first
            (bitsandbytes' order: element 2i is the high nibble of byte i).
        absmax: (blocks,) float32, the largest absolute value of each block; with double quantisation its
            uint8 codes.
        code: float32 (entries,), the codebook: 4, 8, 16 or 256 entries.
        blocksize: consecutive elements, rows ignored, that share an absmax.
        nested: None or, with double quantisation, the (code, absmax, offset, blocksize) that decode absmax.
        quant_type: the codebook's name ("nf4", "fp4", "dynamic8", "int4") or None.
    """

    codes: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int
    quant_type: str | None
    # Flat, not a Nested: torch.compile follows tensors that are attributes.
    nested_code: Tensor | None
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    nested_blocksize: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[CodebookTensor],
        codes: Tensor,
        absmax: Tensor,
        code: Tensor,
        *,
        shape: Sequence[int],
        dtype: torch.dtype,
        blocksize: int,
        quant_type: str | None = None,
        nested: Nested | None = None,
    ) -> CodebookTensor:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        self.codes, self.absmax, self.code = codes, absmax, code
        self.blocksize, self.quant_type = blocksize, quant_type
        self.nested_code, self.nested_absmax, self.nested_offset, self.nested_blocksize = (
            nested or (None, None, None, 0)
        )
        return self

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    @property
    def nested(self) -> Nested | None:
        if self.nested_code is None or self.nested_absmax is None or self.nested_offset is None:
            return None
        return Nested(
            self.nested_code, self.nested_absmax, self.nested_offset, self.nested_blocksize
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = self.quant_type or f"{self.code.numel()} entries"
        double = ", double_quant=True" if self.nested else ""
        return (
            f"CodebookTensor({kind}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"blocksize={self.blocksize}{double}, device='{self.device}')"
        )

    # ---- its parts -----------------------------------------------------------------------------

    def _parts(self) -> dict[str, Tensor]:
        parts = {"codes": self.codes, "absmax": self.absmax, "code": self.code}
        return parts if self.nested is None else parts | {
            "nested_code": self.nested.code,
            "nested_absmax": self.nested.absmax,
            "nested_offset": self.nested.offset,
        }  # fmt: skip

    def _map(
        self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> CodebookTensor:
        """The same with a function of each part."""
        parts = {name: function(part) for name, part in self._parts().items()}
        context = (dtype or self.dtype, *self.__tensor_flatten__()[1][1:])
        return self.__tensor_unflatten__(parts, context, self.shape, None)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        context = (self.dtype, self.blocksize, self.quant_type, self.nested_blocksize)
        return list(self._parts()), context

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], context: Any, shape: Any, stride: Any
    ) -> CodebookTensor:
        dtype, blocksize, quant_type, nested_blocksize = context
        nested = None
        if nested_blocksize:
            nested = Nested(
                parts["nested_code"],
                parts["nested_absmax"],
                parts["nested_offset"],
                nested_blocksize,
            )
        return CodebookTensor(
            parts["codes"],
            parts["absmax"],
            parts["code"],
            shape=shape,
            dtype=dtype,
            blocksize=blocksize,
            quant_type=quant_type,
            nested=nested,
        )

    def _stable_hash_for_caching(self) -> str:
        """What graphs that torch.compile keeps on disk depend on."""
        parts = [(n, p.dtype, tuple(p.shape), p.device) for n, p in self._parts().items()]
        return str(("CodebookTensor", tuple(self.shape), self.__tensor_flatten__()[1], parts))

    # ---- what torch asks of it -----------------------------------------------------------------

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        handler = _HANDLERS.get(str(function))
        if handler is None:
            raise NotImplementedError(
                f"{function}: a CodebookTensor holds codes, not numbers; finefuse.dequantize(q) makes "
                "the tensor, finefuse.codebook_linear(x, q) multiplies by it"
            )
        return handler(function, *args, **(kwargs or {}))

    def requires_grad_(self, requires_grad: bool = True) -> CodebookTensor:
        if requires_grad:
            raise RuntimeError("a CodebookTensor has no gradient: requires_grad=False")
        return self

    def apply_(self, *args: Any) -> Any:  # torch's own would write to the address 0
        raise NotImplementedError("apply_: a CodebookTensor holds codes, not numbers")

    map_ = map2_ = apply_  # type: ignore[assignment]

    def share_memory_(self) -> CodebookTensor:
        for part in self._parts().values():
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        return all(part.is_shared() for part in self._parts().values())

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, context = self.__tensor_flatten__()
        is_parameter = isinstance(self, torch.nn.Parameter)
        return rebuild, (self._parts(), context, tuple(self.shape), is_parameter)

    # ---- bitsandbytes' form --------------------------------------------------------------------

    @staticmethod
    def from_bitsandbytes(codes: Tensor, quant_state: Mapping[str, Any]) -> CodebookTensor:
        """The 4-bit tensor that bitsandbytes keeps as `codes` and a quant state. No bytes change.

        Args:
            codes: its packed weight, ((n + 1) / 2, 1) uint8, or the same bytes in another type
                (bitsandbytes' quant_storage).
            quant_state: `QuantState.as_dict(packed=True)` or `packed=False`, or those keys of a state
                dict with their prefix ("model.layer.weight.absmax").

        Raises:
            TypeError, ValueError: naming the field that is missing, of another type or size, or out of
                range.
        """
        return from_state(codes, quant_state, ("bitsandbytes",))

    def to_bitsandbytes(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(codes of shape ((n + 1) / 2, 1), bitsandbytes' quant state as a dict of plain tensors).

        The dict is what `QuantState.as_dict(packed=True)` gives, in its order: "absmax", "quant_map", with
        double quantisation "nested_absmax" and "nested_quant_map", and "quant_state.bitsandbytes__nf4"
        (or "__fp4"): JSON as uint8. `QuantState.from_dict` reads it.

        Raises:
            ValueError: for what has no bitsandbytes form: codebooks other than "nf4" and "fp4", and a
                blocksize of 16.
        """
        check_bitsandbytes_form(self.quant_type, self.blocksize, self)
        return self.codes.reshape(-1, 1), to_state(self)


def rebuild(
    parts: dict[str, Tensor], context: Any, shape: tuple[int, ...], is_parameter: bool
) -> CodebookTensor:
    """What pickle calls."""
    q = CodebookTensor.__tensor_unflatten__(parts, context, shape, None)
    check_fields(fields(q), q.numel())
    return torch.nn.Parameter(q, requires_grad=False) if is_parameter else q  # type: ignore[return-value]


torch.serialization.add_safe_globals([rebuild])


# ---- the operations it has ----------------------------------------------------------------------


def _each(function: Any, q: CodebookTensor, *args: Any, **options: Any) -> CodebookTensor:
    return q._map(lambda part: function(part, *args, **options))


def _to_copy(
    function: Any,
    q: CodebookTensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **options: Any,
) -> CodebookTensor:
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(
            f"dtype: {dtype}; a CodebookTensor decodes to float32, bfloat16, float16, float64"
        )
    offset = q.nested_offset
    return q._map(
        lambda part: part.to(
            part.device if part is offset else device or part.device,
            non_blocking=non_blocking,
            copy=True,
        ),
        dtype,
    )


def _empty_like(
    function: Any,
    q: CodebookTensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **options: Any,
) -> CodebookTensor:
    """For Module.to_empty."""
    offset = q.nested_offset
    return q._map(
        lambda part: torch.empty_like(part, device=None if part is offset else device), dtype
    )


def _view(function: Any, q: CodebookTensor, shape: Sequence[int]) -> Tensor:
    if list(shape) == [-1] and q.ndim != 1:
        return _Bucket([q])
    unknown = [i for i, size in enumerate(shape) if size == -1]
    known = math.prod(size for size in shape if size != -1)
    wanted = list(shape)
    if len(unknown) == 1 and known:
        wanted[unknown[0]] = q.numel() // known
    if wanted != list(q.shape):
        raise NotImplementedError(
            f"{function}: a CodebookTensor keeps its shape {tuple(q.shape)}, not {tuple(shape)}; "
            "finefuse.dequantize(q) makes a tensor that has views"
        )
    return q._map(lambda part: part.detach())


def same_format(q: CodebookTensor, other: CodebookTensor) -> bool:
    """Whether one's bytes can stand in the other's memory."""
    shapes = [{name: p.shape for name, p in t._parts().items()} for t in (q, other)]
    contexts = [t.__tensor_flatten__()[1][1:] for t in (q, other)]
    return q.shape == other.shape and shapes[0] == shapes[1] and contexts[0] == contexts[1]


def _copy_(function: Any, q: Any, source: Any, non_blocking: bool = False) -> CodebookTensor:
    alike = isinstance(q, CodebookTensor) and isinstance(source, CodebookTensor)
    if not alike or not same_format(q, source):
        raise NotImplementedError(
            f"{function}: from a {type(source).__name__} of {tuple(source.shape)} into a "
            f"{type(q).__name__} of {tuple(q.shape)}; allowed between CodebookTensors of one shape, codebook "
            "and blocksize. finefuse.quantize and finefuse.dequantize convert"
        )
    for name, part in q._parts().items():
        part.copy_(getattr(source, name), non_blocking)
        torch.autograd.graph.increment_version(part)  # a graph that saved it must see it
    return q


def _broadcast_(function: Any, tensors: Sequence[Tensor], *args: Any) -> Any:
    """torch.distributed.broadcast: of the parts, one after another."""
    work: Any = None
    for part in (part for tensor in tensors for part in _plain_parts(tensor)):
        if work is not None:
            work.wait()
        moved = part.to(tensors[0].device)  # an offset is on the CPU
        _, work = function([moved], *args)
        if moved is not part:
            work.wait()
            part.copy_(moved)
        torch.autograd.graph.increment_version(part)
    return tensors, work


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    if isinstance(tensor, CodebookTensor):
        return list(tensor._parts().values())
    if isinstance(tensor, _Bucket):
        return [plain for part in tensor.parts for plain in _plain_parts(part)]
    return [tensor]


class _Bucket(Tensor):
    """What DistributedDataParallel makes of parameters to broadcast them: flattened, then concatenated.

    Nothing is copied: a broadcast goes to the parts, and what is cut out again are the parts.
    """

    parts: list[Tensor]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[_Bucket], parts: list[Tensor]) -> _Bucket:
        first, count = parts[0], sum(part.numel() for part in parts)
        self = Tensor._make_wrapper_subclass(cls, (count,), dtype=first.dtype, device=first.device)
        self.parts = parts
        return self

    def __init__(self, parts: list[Tensor]) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"_Bucket({self.parts!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        handler = _BUCKET_HANDLERS.get(str(function))
        if handler is None:
            raise NotImplementedError(
                f"{function}: of flattened CodebookTensors, which can be broadcast and cut up again; "
                "finefuse.dequantize(q) makes a tensor that has views"
            )
        return handler(function, *args, **(kwargs or {}))


def _concatenate(function: Any, tensors: Sequence[Tensor], dim: int = 0) -> _Bucket:
    return _Bucket([p for t in tensors for p in (t.parts if isinstance(t, _Bucket) else [t])])


def _cut(function: Any, bucket: _Bucket, dim: int, start: int, end: int, step: int = 1) -> Tensor:
    begin = 0
    for part in bucket.parts:
        if (begin, begin + part.numel()) == (start, end):
            return _Bucket([part]) if isinstance(part, CodebookTensor) else part.view(-1)
        begin += part.numel()
    raise NotImplementedError(f"{function}: from the middle of a CodebookTensor")


def _unflatten(function: Any, bucket: _Bucket, shape: Sequence[int]) -> Tensor:
    return bucket.parts[0].view(shape) if len(bucket.parts) == 1 else bucket.view(-1)


_BUCKET_HANDLERS: dict[str, Callable[..., Any]] = {
    "aten.cat.default": _concatenate,
    "aten.slice.Tensor": _cut,
    "aten.view.default": _unflatten,
    "c10d.broadcast_.default": _broadcast_,
}

_HANDLERS: dict[str, Callable[..., Any]] = {
    "aten.alias.default": _each,
    "aten.clone.default": lambda f, q, memory_format=None: q._map(torch.clone),
    "aten.empty_like.default": _empty_like,
    "aten.detach.default": _each,
    "aten._to_copy.default": _to_copy,
    "aten.view.default": _view,
    "aten._unsafe_view.default": _view,
    "aten.copy_.default": _copy_,
    "c10d.broadcast_.default": _broadcast_,
}


# ---- what ops take ------------------------------------------------------------------------------


# In the place of a dense weight's `fields`.
NO_FIELDS = (None, None, None, None, None, None, 0, 0)


def fields(q: CodebookTensor) -> Fields:
    return (
        q.codes, q.code, q.absmax, q.nested_code, q.nested_absmax, q.nested_offset, q.nested_blocksize,
        q.blocksize,
    )  # fmt: skip


def _check_array(name: str, value: Any, dtype: str, count: Any, of: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: a tensor, not {type(value).__name__}")
    if value.dtype is not getattr(torch, dtype):
        raise TypeError(f"{name}: dtype {value.dtype}; allowed: torch.{dtype}")
    if value.numel() != count:
        raise ValueError(f"{name}: {value.numel()} elements; {of} {count}")


def check_fields(values: Fields, count: Any) -> None:
    """Raise, naming the field, where kernels would read past an end."""
    _codebooks.check_fields(values, count, _check_array)
    codes, code, absmax, nested_code, nested_absmax, nested_offset, *_ = values
    for name, value in (("code", code), ("absmax", absmax), ("nested_code", nested_code),
                        ("nested_absmax", nested_absmax)):  # fmt: skip
        if value is not None and value.device != codes.device:
            raise ValueError(f"{name}: on {value.device}; codes is on {codes.device}")
    if nested_offset is not None and not (nested_offset.is_cpu or codes.is_meta):
        raise ValueError(f"nested_offset: on {nested_offset.device}; allowed: the CPU")


# ---- as plain tensors with bitsandbytes' keys ----------------------------------------------------


def to_state(q: CodebookTensor) -> dict[str, Tensor]:
    """Everything but the codes, with the keys of a quant state."""
    about = About(q.quant_type, q.blocksize, str(q.dtype).removeprefix("torch."), tuple(q.shape))
    # Tables are copied: files that refuse shared memory would refuse a table in two of them.
    state = {"absmax": q.absmax, "quant_map": q.code.clone()}
    if q.nested is not None:
        state |= {"nested_absmax": q.nested.absmax, "nested_quant_map": q.nested.code.clone()}
        about = about._replace(
            nested_blocksize=q.nested.blocksize, nested_offset=q.nested.offset.item()
        )
    key, packed = pack_about(about)
    return state | {key: torch.frombuffer(packed, dtype=torch.uint8).to(q.device)}


def from_state(
    codes: Tensor, state: Mapping[str, Any], families: Sequence[str] = ("bitsandbytes", "finefuse")
) -> CodebookTensor:
    """The inverse of `to_state`; checks every field."""

    def data(name: str, value: Any) -> bytes:
        if not isinstance(value, Tensor) or value.dtype is not torch.uint8:
            raise TypeError(f"{name}: a uint8 tensor, not {value!r}")
        return bytes(value.flatten().tolist())

    def table(name: str, value: Any, dtype: str, finite: bool) -> Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: a tensor, not {type(value).__name__}")
        if value.dtype is not getattr(torch, dtype):
            raise TypeError(f"{name}: dtype {value.dtype}; allowed: torch.{dtype}")
        value = value.detach().flatten().to(codes.device)
        if finite and not value.is_meta and not value.isfinite().all():
            raise ValueError(f"{name}: an entry is not finite")
        return value

    if not isinstance(codes, Tensor):
        raise TypeError(f"codes: a tensor, not {type(codes).__name__}")
    if codes.ndim == 0:
        raise ValueError("codes: a scalar; allowed: packed bytes")
    about, absmax, code, nested_absmax, nested_code = read_state(state, families, data, table)
    nested = None
    if about.nested_blocksize:
        offset = torch.tensor(about.nested_offset, dtype=torch.float32, device="cpu")
        nested = Nested(nested_code, nested_absmax, offset, about.nested_blocksize)
    q = CodebookTensor(
        codes.detach().contiguous().view(torch.uint8).flatten(),
        absmax,
        code,
        shape=torch.Size(about.shape),
        dtype=getattr(torch, about.dtype),
        blocksize=about.blocksize,
        quant_type=about.quant_type,
        nested=nested,
    )
    check_state_fields(fields(q), q.numel(), _check_array)
    return q
