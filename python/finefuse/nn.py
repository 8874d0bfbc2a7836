"""Modules on finefuse's functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._codebook_tensor import from_state, same_format, to_state
from .codebook import CodebookTensor, codebook_linear, quantize

__all__ = ["CodebookLinear"]


class CodebookLinear(nn.Module):
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
        self.weight = _parameter(quantize(zeros, code, blocksize, double_quant))
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
        module.weight = _parameter(quantize(linear.weight, code, blocksize, double_quant))
        module.bias = linear.bias
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return codebook_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        q = self.weight
        kind = q.quant_type or f"{q.code.numel()} entries"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, code={kind}, blocksize={q.blocksize}, "
            f"double_quant={q.nested is not None}"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        q = self.weight
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
                "CodebookLinear.from_linear quantises"
            )
            rest[name] = self.weight
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


_STATE_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.")


def _parameter(q: Tensor) -> Any:
    return nn.Parameter(q, requires_grad=False)
