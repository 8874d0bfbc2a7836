"""Linear layers as modules: on packed weights and with low-rank updates."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import _groups, _passes
from ._args import require
from ._codebook_tensor import from_state, same_format, to_state
from ._mixed import Stack, mixed_linear
from .codebook import CodebookTensor, codebook_linear
from .codebook import quantize as _quantize
from .dora import dora_norm
from .lora import lora_linear, merge_lora, unmerge_lora

__all__ = ["CodebookLinear", "LoRALinear"]


class _Linear(nn.Module):
    """A weight (out, in), which may be a CodebookTensor, and a bias; their keys in a state dict."""

    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
        q = self.weight
        if not isinstance(q, CodebookTensor):
            return text
        kind = q.quant_type or f"{q.code.numel()} entries"
        return f"{text}, code={kind}, blocksize={q.blocksize}, double_quant={q.nested is not None}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        q = self.weight
        if not isinstance(q, CodebookTensor):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        destination[f"{prefix}weight"] = q.codes.view(-1, 1)
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
        for key, value in to_state(q).items():
            destination[f"{prefix}weight.{key}"] = value

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if not isinstance(self.weight, CodebookTensor):
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
            return
        name = f"{prefix}weight"
        rest = {key: v for key, v in state_dict.items() if not key.startswith(f"{name}.")}
        state = {key: v for key, v in state_dict.items() if key not in rest}
        if name in rest and state:
            known = [key for key in state if key[len(name) + 1 :].startswith(_STATE_KEYS)]
            if strict:
                unexpected_keys.extend(key for key in state if key not in known)
            state = {key: state[key] for key in known}
            try:
                q = rest[name] = from_state(rest[name], state)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{name}: {error}")
                rest[name] = self.weight
            else:
                if q.shape == self.weight.shape and not same_format(q, self.weight):
                    old = self.weight
                    self.weight = _parameter(
                        torch.empty_like(q, device=old.device, dtype=old.dtype)
                    )
        elif name in rest:
            error_msgs.append(
                f"{name}: without {name}.absmax; this layer takes packed codes and what decodes them, "
                f"{type(self).__name__}.from_linear quantises"
            )
            rest[name] = self.weight
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class CodebookLinear(_Linear):
    """`torch.nn.Linear` whose weight is a CodebookTensor: y = x Wᵀ + bias, by `finefuse.codebook_linear`.

        layer = ff.nn.CodebookLinear.from_linear(linear, code="nf4")

    The weight is a parameter without gradient; the bias trains. `.to(device)` moves the bytes, `.half()`,
    `.to(dtype)` change the bias and what the weight decodes to. Its state dict holds plain tensors under
    bitsandbytes' keys: "weight" (codes, ((n + 1) / 2, 1) uint8), "bias", "weight.absmax",
    "weight.quant_map", with double quantisation "weight.nested_absmax" and "weight.nested_quant_map",
    and "weight.quant_state.bitsandbytes__nf4", so that safetensors can hold it and either library reads
    what the other wrote. Formats that bitsandbytes lacks ("int4", "dynamic8", learnt codebooks, blocks of
    16) end in "weight.quant_state.finefuse__…" instead. Loading takes the format from the file.

    Args:
        in_features, out_features, bias, device, dtype: as for `torch.nn.Linear`; the weight is zeros
            until a state dict is loaded (or see `from_linear`).
        code, blocksize, double_quant: as for `finefuse.quantize`.

    Shapes: x (…, in_features), y (…, out_features), in the type of x.
    """

    weight: CodebookTensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        code: str | Tensor = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        zeros = torch.zeros(out_features, in_features, device=device, dtype=dtype)
        self.weight = _parameter(_quantize(zeros, code, blocksize, double_quant))
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        code: str | Tensor = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
    ) -> CodebookLinear:
        """The same layer with its weight quantised; the bias is shared, not copied.

        Raises:
            TypeError, ValueError: as `finefuse.quantize`.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: a torch.nn.Linear, not {type(linear).__name__}")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.in_features, module.out_features = linear.in_features, linear.out_features
        module.weight = _parameter(_quantize(linear.weight, code, blocksize, double_quant))
        module.bias = linear.bias
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return codebook_linear(x, self.weight, self.bias)


class Adapter(NamedTuple):
    """What a named low-rank update is made with."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    init_lora_weights: bool | str = True
    dora: bool = False

    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def check(self) -> Adapter:
        if type(self.rank) is not int:
            raise TypeError(f"rank: an int, not {self.rank!r}")
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        for name, value in (("alpha", self.alpha), ("dropout", self.dropout)):
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{name}: a number, not {value!r}")
        if type(self.dora) is not bool:
            raise TypeError(f"dora: True or False, not {self.dora!r}")
        require(math.isfinite(self.alpha), "alpha", self.alpha, "finite")
        require(0 <= self.dropout <= 1, "dropout", self.dropout, "0 to 1")
        ok = isinstance(self.init_lora_weights, bool) or self.init_lora_weights == "gaussian"
        require(ok, "init_lora_weights", self.init_lora_weights, "True, False, 'gaussian'")
        return self


def check_name(name: Any) -> None:
    """Of an adapter: a key of a torch.nn.ParameterDict."""
    ok = isinstance(name, str) and name not in ("", _passes.BASE) and "." not in name
    taken = ok and any(hasattr(kind(), name) for kind in (nn.ParameterDict, nn.ModuleDict))
    require(
        ok and not taken,
        "name",
        name,
        f"a non-empty string without '.', not {_passes.BASE!r}, no attribute of a dict",
    )


class LoRALinear(_Linear, _passes.Holder, _groups.Member):
    """`torch.nn.Linear` with named low-rank updates, one of them active, by `finefuse.lora_linear`:

        y = x Wᵀ + bias + s·D(x) Aᵀ Bᵀ        s = alpha / rank (rslora: alpha / √rank)

    (LoRA, arXiv:2106.09685; rsLoRA, 2312.03732; on a packed weight QLoRA, 2305.14314). D is dropout, in
    training mode only. With dora (DoRA, arXiv:2402.09353) the rows of W + s·B A get norms m that train:

        y = x Wᵀ + bias + (c - 1)·D(x) Wᵀ + c·s·D(x) Aᵀ Bᵀ        c = m / ‖W + s·B A‖, norms of rows

    Weight and bias are parameters without gradient, lora_A[name] (rank, in), lora_B[name] (out, rank) and
    lora_magnitude_vector[name] (out,), which is m, train. They are float32 where the weight is of 16 bits or
    packed, else of its type; `.to(dtype)` changes all. Initialised as PEFT does: A as the weight of a
    torch.nn.Linear, B zero, m the norms that are there. Norms cost a pass over the weight each forward.

    Its state dict has the weight's and the bias's own keys (those of `CodebookLinear` for a packed
    weight) and "lora_A.<name>", "lora_B.<name>", "lora_magnitude_vector.<name>".

    Args:
        in_features, out_features, device, dtype: as for `torch.nn.Linear`.
        rank: r, at least 1. alpha: a number, unit-free.
        dropout: p in [0, 1]. rslora: divide alpha by √rank instead of rank.
        dora: learn the norms of the rows too.
        bias: False, True or the bias (out,) itself. True is torch.nn.Linear's own initial bias, zeros if a
            weight is given.
        weight: (out, in), a float tensor or a CodebookTensor, kept as it is, not copied. None:
            initialised as torch.nn.Linear's.
        init_lora_weights: True; False: B random too; "gaussian": A normal with deviation 1 / rank, B zero.
        name: of the adapter.

    Shapes: x (…, in_features), y (…, out_features), in the type of x.

    Attributes:
        adapters: dict of name to (rank, alpha, dropout, rslora, init_lora_weights, dora). scaling: of name
            to s.
        active: the active adapter's name or None. merged: the merged adapter's name or None.
        enabled: whether the active adapter counts.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        bias: bool | Tensor = True,
        weight: Tensor | None = None,
        init_lora_weights: bool | str = True,
        name: str = "default",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        adapter = Adapter(rank, alpha, dropout, rslora, init_lora_weights, dora).check()
        check_name(name)
        size = (out_features, in_features)
        first: Tensor
        if weight is None:
            plain = nn.Linear(
                in_features, out_features, bias is not False, device=device, dtype=dtype
            )
            weight, first = plain.weight, plain.bias
        else:
            if not isinstance(weight, Tensor):
                raise TypeError(f"weight: a tensor, not {type(weight).__name__}")
            if not weight.is_floating_point():
                raise TypeError(f"weight: dtype {weight.dtype}; allowed: a float type")
            require(weight.shape == size, "weight", tuple(weight.shape), f"{size}")
            if device is not None or dtype is not None:
                weight = weight.detach().to(device=device, dtype=dtype)
            first = torch.zeros(out_features, device=weight.device, dtype=weight.dtype)
        if isinstance(bias, Tensor):
            require(bias.shape == size[:1], "bias", tuple(bias.shape), f"{size[:1]}")
            first = bias
        self.in_features, self.out_features = in_features, out_features
        self.weight = _frozen(weight)
        self.bias = None if bias is False else _frozen(first)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        self.register_buffer("norm", None, persistent=False)  # of before a merge, for the unmerge
        self.adapters: dict[str, Adapter] = {}
        self.scaling: dict[str, float] = {}
        self.active: str | None = None
        self.merged: str | None = None
        self.enabled = True
        self.stack: Stack | None = None
        self.turned = False  # a Conv1D's weight, which files have as (in, out)
        self.add_adapter(name, *adapter)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int,
        alpha: float,
        *,
        quantize: str | Tensor | None = None,
        blocksize: int = 64,
        double_quant: bool = False,
        **options: Any,
    ) -> LoRALinear:
        """The same layer with an adapter; weight and bias share their memory with `linear`.

        Args:
            linear: a torch.nn.Linear, a CodebookLinear, bitsandbytes' Linear4bit, whose bytes stay as they
                are, or transformers' Conv1D, whose weight (in, out) is seen transposed.
            quantize: None or a codebook: the weight becomes a CodebookTensor of it (blocksize,
                double_quant: as for `finefuse.quantize`).
            options: dropout, rslora, dora, init_lora_weights, name: as for the class.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        weight = linear_weight(linear)
        if weight is None or isinstance(linear, LoRALinear):
            raise TypeError(f"linear: a {kind_of(linear)}; allowed: {LAYERS}")
        if quantize is not None:
            if isinstance(weight, CodebookTensor):
                raise ValueError("quantize: the weight is packed already; allowed: None")
            weight = _quantize(weight, quantize, blocksize, double_quant)
        bias = linear.bias
        rows, columns = weight.shape
        module = cls(
            columns, rows, rank, alpha, weight=weight,
            bias=bias if isinstance(bias, Tensor) else False, **options,
        )  # fmt: skip
        module.turned = _is_conv1d(linear) and not isinstance(weight, CodebookTensor)
        return module.train(linear.training)

    # ---- adapters --------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        init_lora_weights: bool | str = True,
        dora: bool = False,
    ) -> None:
        """Another adapter, with arguments as for the class; it becomes the active one."""
        check_name(name)
        require(name not in self.adapters, "name", name, "a name that no adapter has")
        adapter = Adapter(rank, alpha, dropout, rslora, init_lora_weights, dora).check()
        if dora and self.merged is not None:
            self.unmerge()  # the norms are those of the weight itself
        weight = self.weight
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        a = torch.empty(rank, self.in_features, dtype=dtype, device=weight.device)
        b = torch.zeros(self.out_features, rank, dtype=dtype, device=weight.device)
        if init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        self.lora_A[name], self.lora_B[name] = nn.Parameter(a), nn.Parameter(b)
        if dora:
            norm = dora_norm(weight, a, b, adapter.scale())
            self.lora_magnitude_vector[name] = nn.Parameter(norm.to(dtype))
        self.adapters[name], self.scaling[name] = adapter, adapter.scale()
        self.set_adapter(name)

    def set_adapter(self, name: str | None, trains: Collection[str] | None = None) -> None:
        """Make an adapter the active one, None: none. A merged one is unmerged.

        trains: the adapters whose parameters require a gradient; None: the active one.
        """
        allowed = ", ".join(map(repr, self.adapters))
        require(name is None or name in self.adapters, "name", name, f"None, {allowed}")
        if self.merged is not None and name != self.merged:
            self.unmerge()
        if self.group is not None:
            self.group.clear()
        self.active = name
        for key in self.adapters:
            for parameter in self.parameters_of(key):
                parameter.requires_grad_(key == name if trains is None else key in trains)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """An adapter's: A, B and, with dora, m."""
        kinds = (self.lora_A, self.lora_B, self.lora_magnitude_vector)
        return [kind[name] for kind in kinds if name in kind]

    def enable(self) -> None:
        """After `disable`: the active adapter counts again."""
        self.enabled = True

    def disable(self) -> None:
        """y = x Wᵀ + bias until `enable`. A merged adapter is unmerged."""
        if self.merged is not None:
            self.unmerge()
        self.enabled = False

    def merge(self) -> float:
        """Add the active adapter to the weight, in place: W + s·B A or, with dora, c·(W + s·B A).

        Returns:
            The largest absolute difference between the new weight and that: what rounding costs or, for
            a packed weight, quantising again.

        Raises:
            RuntimeError: if an adapter is merged already, or none is active.
        """
        name = self.active
        if self.merged is not None or name is None or not self.enabled:
            raise RuntimeError(
                f"merge: merged={self.merged!r}, active={name!r}, enabled={self.enabled}"
            )
        norm = None
        if self.adapters[name].dora:
            norm = dora_norm(self.weight, self.lora_A[name], self.lora_B[name], self.scaling[name])
        error = self._merge(merge_lora, name)
        self.merged, self.norm = name, norm
        return error

    def unmerge(self) -> float:
        """Subtract the merged adapter, in place. What rounding or quantising took does not come back, nor
        do rows whose magnitude is 0.

        Returns:
            The largest absolute difference between the new weight and W - s·B A (with dora W / c - s·B A).

        Raises:
            RuntimeError: if nothing is merged.
        """
        name = self.merged
        if name is None:
            raise RuntimeError("unmerge: nothing is merged")
        error = self._merge(
            unmerge_lora, name, **({} if self.norm is None else {"norm": self.norm})
        )
        self.merged = self.norm = None
        return error

    def _merge(self, function: Any, name: str, **options: Any) -> float:
        scale, weight, magnitude = self.scaling[name], self.weight, self.magnitude(name)
        _, error = function(
            weight, self.lora_A[name], self.lora_B[name], scale, magnitude, out=weight,
            return_error=True, **options,
        )  # fmt: skip
        return error

    def magnitude(self, name: str) -> Tensor | None:
        """m of an adapter; None without dora."""
        return self.lora_magnitude_vector[name] if self.adapters[name].dora else None

    def to_linear(self) -> nn.Module:
        """The torch.nn.Linear, CodebookLinear or Conv1D on the weight as it is, merged or not; nothing is
        copied."""
        if self.turned:
            from transformers.pytorch_utils import Conv1D

            conv = Conv1D.__new__(Conv1D)
            nn.Module.__init__(conv)
            conv.nf, conv.nx = self.out_features, self.in_features
            conv.weight, conv.bias = _frozen(self.weight.t()), self.bias
            return conv.train(self.training)
        kind: Any = CodebookLinear if isinstance(self.weight, CodebookTensor) else nn.Linear
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        module.in_features, module.out_features = self.in_features, self.out_features
        module.weight, module.bias = self.weight, self.bias
        return module.train(self.training)

    # ---- as a module -----------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if _passes.in_force or self.mixed_trained:
            named, y = self._mixed(x)
            if named:
                return self.base(x) if y is None else y
        name = self.active
        if name is None or self.merged is not None or not self.enabled:
            return self.base(x)
        if self.group is not None and not is_compiling():
            grouped = self.group.output(self, x)
            if grouped is not None:
                return grouped
        return lora_linear(
            x,
            self.weight,
            self.lora_A[name],
            self.lora_B[name],
            scale=self.scaling[name],
            bias=self.bias,
            dropout=self.adapters[name].dropout if self.training else 0.0,
            magnitude=self.magnitude(name),
        )

    def base(self, x: Tensor) -> Tensor:
        """y = x Wᵀ + bias."""
        if isinstance(self.weight, CodebookTensor):
            return codebook_linear(x, self.weight, self.bias)
        return nn.functional.linear(x, self.weight, self.bias)

    @_passes.untraced
    def _mixed(self, x: Tensor) -> tuple[bool, Tensor | None]:
        """Whether the rows have names, and what they give; None: the base."""
        call = _passes.names_for(self)
        return call is not None, None if call is None else mixed_linear(self, x, call)

    def train(self, mode: bool = True) -> LoRALinear:
        self.forget_mixed()
        self._forget()
        return super().train(mode)

    def _forget(self) -> None:
        """What was computed for calls to come."""
        self.stack = None
        if self.group is not None:
            self.group.clear()

    def _apply(self, *args: Any, **options: Any) -> Any:
        self._forget()
        return super()._apply(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "stack": None}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if self.group is not None:
            self.group.join(self, self.place)

    def extra_repr(self) -> str:
        adapters = (
            f"{name}: rank={a.rank}, scale={a.scale():g}, dropout={a.dropout}{', dora' * a.dora}"
            for name, a in self.adapters.items()
        )
        return "; ".join((super().extra_repr(), *adapters, f"active={self.active!r}"))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.merged is not None:  # whoever loads it would add the adapter a second time
            raise RuntimeError(
                f"{prefix}weight: adapter {self.merged!r} is merged into it; unmerge() before, or take the "
                "layer that to_linear() makes"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.turned:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.turned and f"{prefix}weight" in state_dict:
            state_dict = dict(state_dict)
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].t()
        super()._load_from_state_dict(state_dict, prefix, *args)


LAYERS = (
    "torch.nn.Linear, CodebookLinear, transformers' Conv1D, bitsandbytes' Linear4bit (quantised)"
)


def _frozen(tensor: Tensor) -> Any:
    """A parameter without gradient; itself if it is one, so that tied weights stay tied."""
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
        return tensor
    return _parameter(tensor.detach())


def kind_of(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_conv1d(module: Any) -> bool:
    return kind_of(module) == "transformers.pytorch_utils.Conv1D"


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """The hooks of a layer stay on what takes its place; their handles too."""
    for name in _HOOKS:
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


def linear_weight(module: Any) -> Tensor | None:
    """(out, in) of the layers that LoRALinear can stand for; None for others.

    A subclass of torch.nn.Linear has a forward or a weight of its own, which would be lost.
    """
    if type(module) in (nn.Linear, CodebookLinear, LoRALinear):
        return module.weight
    if _is_conv1d(module):
        return module.weight.t()
    if kind_of(module) == "bitsandbytes.nn.modules.Linear4bit":
        state = module.weight.quant_state
        if state is not None:
            return CodebookTensor.from_bitsandbytes(module.weight.data, state.as_dict(packed=True))
    return None


_STATE_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.")


def _parameter(q: Tensor) -> Any:
    return nn.Parameter(q, requires_grad=False)


for _class in (CodebookLinear, LoRALinear):
    _class.__module__ = "finefuse.nn"  # where users find them, and pickles
