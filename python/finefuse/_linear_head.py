"""What the losses from hidden states share: the head that makes logits, as their ops take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._args import check_index, require
from ._codebook_tensor import NO_FIELDS, CodebookTensor, check_fields, fields
from ._linear_loss import Head, dense_panels
from ._matmul import product_dtype
from ._op import (
    DTYPES,
    autocast_dtype,
    float_tensor,
    index_tensor,
    is_compiling,
    same_device,
    scalar,
)
from .codebook import decoded_rows, dequantize, first_rows

# Of a raw op, after hidden (N, H): a weight (V, H), dense or packed; a softcap of infinity is none.
HEAD = (
    "Tensor? weight, Tensor? bias, Tensor? codes, Tensor? code, Tensor? absmax, Tensor? nested_code, "
    "Tensor? nested_absmax, Tensor? nested_offset, int nested_blocksize, int blocksize, SymInt vocab, "
    "float softcap"
)
HEAD_ARGUMENTS = 12
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def check_softcap(softcap: float) -> None:
    require(softcap > 0.0, "softcap", softcap, "above 0, or None")


def check_head(hidden: Tensor, args: Sequence[Any], name: str = "hidden") -> None:
    """What raw ops rely on, for hidden (N, H) and the arguments of HEAD."""
    weight, bias, *values, vocab, _ = args
    float_tensor(name, hidden)
    if hidden.ndim != 2:
        raise ValueError(f"{name}: shape {tuple(hidden.shape)}; allowed: (N, H)")
    shape = (vocab, hidden.shape[1])
    if weight is None:
        if values[0] is None:
            raise TypeError("weight: a tensor, not None")
        same_device("weight", values[0], name, hidden)
        check_fields(tuple(values), vocab * hidden.shape[1])
    else:
        same_device("weight", weight, name, hidden)
        if weight.shape != shape or weight.dtype is not hidden.dtype:
            raise ValueError(
                f"weight: {tuple(weight.shape)} {weight.dtype}; allowed: {shape} {hidden.dtype}"
            )
    if bias is not None:
        same_device("bias", bias, name, hidden)
        if bias.shape != (vocab,) or bias.dtype is not hidden.dtype:
            raise ValueError(
                f"bias: {tuple(bias.shape)} {bias.dtype}; allowed: ({vocab},) {hidden.dtype}"
            )


def head_of(hidden: Tensor, args: Sequence[Any]) -> Head:
    """The head of a raw op, checked."""
    check_head(hidden, args)
    weight, bias, *values, vocab, softcap = args
    check_softcap(softcap)
    dtype = product_dtype(hidden)
    if weight is not None:
        panels = dense_panels(weight, dtype)
    else:
        decoded = dtype if dtype in NARROW else torch.float32

        def panels() -> Any:
            for first, last, part in decoded_rows(
                hidden, tuple(values), vocab, hidden.shape[1], decoded
            ):
                yield first, last, part.to(dtype)

    return Head(panels, vocab, dtype, None if bias is None else bias.to(dtype), softcap)


class HeadCall(NamedTuple):
    """Hidden states and a head, as users gave them, checked; hidden as rows."""

    hidden: Tensor  # (N, H)
    weight: Tensor | None
    bias: Tensor | None
    values: Any
    vocab: Any
    softcap: Any
    shape: torch.Size  # of hidden without its last dimension
    packed: CodebookTensor | None  # all of it; of its rows the first `vocab` count

    def arguments(self) -> tuple[Any, ...]:
        """Those of HEAD; while compiling all its numbers are tensors, as those of the other arguments."""
        cap = scalar("softcap", self.softcap)
        return (self.weight, self.bias, *self.values, self.vocab, cap)

    def of(self, hidden: Any, name: str) -> HeadCall:
        """The same head behind other hidden states, of the same shape and type."""
        float_tensor(name, hidden)
        same_device(name, hidden, "hidden", self.hidden)
        width = self.hidden.shape[1]
        if hidden.shape != (*self.shape, width):
            raise ValueError(
                f"{name}: shape {tuple(hidden.shape)}; allowed: {(*self.shape, width)}"
            )
        if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(self.hidden.dtype)
        if hidden.dtype is not self.hidden.dtype:
            raise TypeError(f"{name}: dtype {hidden.dtype}; hidden has {self.hidden.dtype}")
        return self._replace(hidden=hidden.reshape(-1, width))

    def indices(self, name: str, value: Any, ignore_index: int) -> Tensor:
        """Targets or actions, one for each of the hidden states, in their shape."""
        value = index_tensor(name, value, "hidden", self.hidden)
        if value.shape != self.shape:
            raise ValueError(
                f"{name}: shape {tuple(value.shape)}; hidden is {(*self.shape, self.hidden.shape[1])}: "
                f"allowed: {tuple(self.shape)}"
            )
        check_index("ignore_index", ignore_index)
        return value

    def logits(self, keep: Tensor | None) -> Tensor:
        """In full: for the backend "eager". What stands in rows that do not count (…) reaches no gradient."""
        hidden = self.hidden
        if keep is not None:
            hidden = torch.where(keep.reshape(-1, 1), hidden, 0)
        weight = self.weight
        if self.packed is not None:
            weight = dequantize(self.packed, self.hidden.dtype)[: self.vocab]
        assert weight is not None
        with torch.autocast(self.hidden.device.type, enabled=False):
            z = torch.nn.functional.linear(hidden, weight, self.bias)
        if isinstance(self.softcap, Tensor) or self.softcap != float("inf"):
            c = self.softcap
            z = c * torch.tanh(z / c)
        return z.reshape(*self.shape, z.shape[-1])


def call_of(
    hidden: Any, weight: Any, bias: Any, softcap: Any,
    names: tuple[str, ...] = ("hidden", "weight", "bias", "softcap"), rows: Any = None,
) -> HeadCall:  # fmt: skip
    """Checked, and cast as torch.nn.functional.linear is under autocast.

    rows: how many rows of the weight count, the first ones; None: all.
    """
    float_tensor(names[0], hidden)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{names[1]}: a tensor, not {type(weight).__name__}")
    packed = weight if isinstance(weight, CodebookTensor) else None
    for name, tensor in zip(names[:3:2], (hidden, bias), strict=True):
        if isinstance(tensor, CodebookTensor):
            raise TypeError(f"{name}: a tensor of numbers, not a CodebookTensor")
    if bias is not None:
        float_tensor(names[2], bias)
    if packed is None and weight.dtype not in DTYPES:
        float_tensor(names[1], weight)
    autocast = autocast_dtype(hidden)
    if autocast is not None:
        hidden = hidden.to(autocast)
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"{names[1]}: shape {tuple(weight.shape)}; allowed: (V, H), not empty")
    if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names[0]}: shape {tuple(hidden.shape)}; a {names[1]} of {tuple(weight.shape)} takes "
            "(…, H) with (V, H)"
        )
    same_device(names[1], weight, names[0], hidden)
    same_device(names[2], bias, names[0], hidden)
    vocab = weight.shape[0]
    if bias is not None:
        bias = bias.to(hidden.dtype)
        if bias.shape != (vocab,):
            raise ValueError(f"{names[2]}: shape {tuple(bias.shape)}; allowed: ({vocab},)")
    values = NO_FIELDS if packed is None else fields(packed)
    if rows is not None and rows != vocab:
        vocab = rows
        bias = None if bias is None else bias[:rows]
        if packed is None:
            weight = weight[:rows]
        else:
            values = first_rows(values, rows, weight.shape[1])
    if packed is None and weight.dtype is not hidden.dtype:
        if autocast is None:
            raise TypeError(f"{names[1]}: dtype {weight.dtype}; {names[0]} has {hidden.dtype}")
        weight = weight.to(hidden.dtype)
    cap: Any = float("inf")
    if softcap is not None:
        cap = scalar(names[3], softcap)
        if not is_compiling():
            require(0.0 < cap < float("inf"), names[3], softcap, "above 0, or None")
    shape = hidden.shape[:-1]
    return HeadCall(
        hidden=hidden if hidden.ndim == 2 else hidden.reshape(-1, hidden.shape[-1]),
        weight=None if packed is not None else weight,
        bias=bias,
        values=values,
        vocab=vocab,
        softcap=cap,
        shape=shape,
        packed=packed,
    )
