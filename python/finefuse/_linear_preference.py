"""Preference losses from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._args import check_temperature
from ._args.preference import INPUT_NAMES, PREFERENCE_NUMBERS, check_halves
from ._linear_gradients import (
    GRADIENTS,
    WANTED,
    gradients_fake,
    made_in_forward,
    rows_of,
    save_gradients,
    scaled_gradients,
)
from ._linear_head import HEAD, HEAD_ARGUMENTS, call_of, check_head, head_of
from ._linear_logprobs import BACKWARD, token_logprobs_of
from ._linear_loss import Gradients, Rows, chunk_rows, part_of, put, walk
from ._op import (
    accumulator,
    check_targets,
    composite,
    float_tensor,
    is_compiling,
    once_differentiable,
    raw_op,
    runs_eagerly,
    same_device,
    scalar,
    wants_gradient,
)
from ._preference_pairs import preference_pairs
from .logprobs import logprobs_rows, logprobs_rows_backward, sequence_logprobs
from .preference import PreferenceOutput, preference_of_rows, times_tail

# ---- raw op ------------------------------------------------------------------------------------

_CODES = "int[] losses, bool[] by_length, int divergence, bool nll_by_length, int reduction"
# A chunk of whole pairs may be a quarter of all rows, up to these bytes of logits.
_MOST_BYTES = 512 << 20


def _split(args: Sequence[Any]) -> tuple[Any, ...]:
    """head, targets, tail, the inputs, (loss_weights, temperature), numbers, codes, the rest."""
    head, (targets, tail, *rest) = args[:HEAD_ARGUMENTS], args[HEAD_ARGUMENTS:]
    return head, targets, tail, rest[:7], rest[7:9], rest[9:19], rest[19:24], rest[24:]


def _vectors(hidden: Tensor, *args: Any) -> list[Tensor]:
    """Checked: loss, rewards of both, margins, accuracy; by lp of each token. All but the gradients."""
    head, targets, tail, inputs, *_ = _split(args)
    check_head(hidden, head)
    if targets.ndim != 2 or targets.shape[0] % 2 or targets.numel() != hidden.shape[0]:
        raise ValueError(
            f"targets: shape {tuple(targets.shape)}; allowed: (2·pairs, T), {hidden.shape[0]} in all"
        )
    if tail is not None and tail.shape != targets.shape:
        raise ValueError(f"tail: shape {tuple(tail.shape)}; allowed: {tuple(targets.shape)}")
    dtype, half = accumulator(hidden.dtype), targets.shape[0] // 2
    wide = torch.float64 if any(_is_wide(x) for x in (hidden, *inputs[:2])) else dtype
    vectors = [hidden.new_empty(shape, dtype=wide) for shape in ((), half, half, half, ())]
    return [*vectors, hidden.new_empty(targets.numel(), dtype=dtype)]


def _fake(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *outputs, by_lp = _vectors(hidden, *args)
    head, *_, (_, *wanted) = _split(args)
    return (*outputs, *gradients_fake(hidden, head[-2], wanted), by_lp)


def _is_wide(x: Tensor | None) -> bool:
    return x is not None and x.dtype is torch.float64


def chunk_sizes(count: int, row: int, dtype: torch.dtype, on_cpu: bool) -> tuple[int, int]:
    """Of chunks of whole pairs, and the most that one pair may take: on a CPU a quarter more than other
    chunks; a quarter of all rows. row: numbers of one."""
    size = chunk_rows(count, row, dtype, on_cpu)
    size += size // 4 if on_cpu else 0
    return size, max(size, min(count // 4, _MOST_BYTES // (row * dtype.itemsize)))


def pair_chunks(keep: Tensor, size: int, most: int) -> list[Rows] | None:
    """The rows that count of (2·pairs, T), whole pairs together, `size` in a chunk; None where a pair has
    more than `most`."""
    half = keep.shape[0] // 2
    counts = (keep[:half].sum(1) + keep[half:].sum(1)).tolist()
    if any(count > most for count in counts):
        return None
    groups: list[list[int]] = []
    filled = size
    for pair, count in enumerate(counts):
        if count == 0:
            continue
        if filled + count > size:
            groups.append([])
            filled = 0
        groups[-1].append(pair)
        filled += count
    number = torch.arange(keep.numel(), device=keep.device).view(keep.shape)
    parts: list[Rows] = []
    for pairs in groups:
        of = torch.tensor(pairs + [half + pair for pair in pairs], device=keep.device)
        parts.append(number[of][keep[of]])
    return parts


def _forward_backward(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The outputs, gradients; those by lp of each token.

    A pair's coefficients are those of the batch's loss from the log-probabilities known so far: they
    depend on that pair's alone.
    """
    head_args, targets, tail, inputs, (loss_weights, temperature), numbers, codes, rest = _split(
        args
    )
    ignore_index, *wanted = rest
    like, *_, by_lp = _vectors(hidden, *args)
    head = head_of(hidden, head_args)
    check_temperature(temperature)
    check_targets(targets, head.vocab, ignore_index)
    shape, flat = targets.shape, targets.reshape(-1)
    counts, half = targets != ignore_index, targets.shape[0] // 2
    lp = torch.zeros_like(by_lp)
    by_lp.zero_()

    def outputs(want_loss: bool) -> tuple[Any, ...]:
        seq = sequence_logprobs(times_tail(lp.view(shape), tail)).to(like.dtype)
        return preference_pairs(
            None,
            (seq[:half], seq[half:], *inputs, None, None, loss_weights, *numbers, *codes, False),
            want_loss,
        )

    def coefficients() -> Tensor:
        by_sequence = outputs(False)[-1][: 2 * half, None].to(lp.dtype)
        return (by_sequence if tail is None else by_sequence * tail).expand(shape).reshape(-1)

    def kernel(z: Tensor, rows: Rows, first: bool, last: bool) -> bool:
        y = part_of(flat, rows)
        found, stats = logprobs_rows(z, y, temperature, ignore_index, False, True)
        if first:
            put(lp, rows, found)
        if not last:
            return False
        if first:
            put(by_lp, rows, part_of(coefficients(), rows))
        g = part_of(by_lp, rows)
        logprobs_rows_backward(z, y, stats, g, None, None, z, temperature, ignore_index)
        return True

    parts: list[Rows] | None = None
    if not (counts.is_cuda and torch.cuda.is_current_stream_capturing()):  # when nobody can look
        row = head.vocab * (2 if head.capped else 1)
        sizes = chunk_sizes(int(counts.sum()), row, head.dtype, hidden.is_cpu)
        parts = pair_chunks(counts, *sizes)
    gradients: Gradients
    if parts is not None:
        gradients = walk(head, hidden, parts, partial(kernel, first=True, last=True), wanted)
    else:
        (rows_hidden,), parts = rows_of(head, counts.reshape(-1), hidden)
        none = (False, False, False)
        walk(head, rows_hidden, parts, partial(kernel, first=True, last=False), none)
        by_lp.copy_(coefficients())
        gradients = walk(head, rows_hidden, parts, partial(kernel, first=False, last=True), wanted)
    return (*outputs(True)[:5], *gradients, by_lp)


_FORWARD_BACKWARD = raw_op(
    f"linear_preference_forward_backward(Tensor hidden, {HEAD}, Tensor targets, Tensor? tail, "
    + ", ".join(f"Tensor? {name}" for name in INPUT_NAMES[2:])
    + ", Tensor? loss_weights, float temperature, "
    + ", ".join(f"float {name}" for name in PREFERENCE_NUMBERS)
    + f", {_CODES}, int ignore_index, {WANTED}) -> "
    f"(Tensor, Tensor, Tensor, Tensor, Tensor, {GRADIENTS}, Tensor)",
    run=_forward_backward,
    fake=_fake,
)


# ---- autograd and the public function ----------------------------------------------------------


class _Preference(torch.autograd.Function):
    """All gradients are made in the forward; a second backward makes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
        *outputs, dx, dw, db, by_lp = _FORWARD_BACKWARD(
            hidden, weight, bias, *rest, *ctx.needs_input_grad[:3]
        )
        save_gradients(ctx, (hidden, weight, bias, *rest[:6], rest[10], by_lp), (dx, dw, db))
        ctx.numbers, ctx.options, ctx.arguments = rest[6:10], (rest[20], rest[-1]), len(rest)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> Any:
        nothing = (None,) * ctx.arguments
        if g is None:
            return (None, None, None, *nothing)

        def rows_with_gradient(*saved: Any) -> tuple[Tensor, int]:
            return saved[9].reshape(-1), ctx.options[1]

        def recompute(*saved: Any) -> Any:
            *head, targets, by_lp = saved
            return BACKWARD(
                (by_lp * g).to(by_lp.dtype), None, None, *head, *ctx.numbers, targets.reshape(-1),
                *ctx.options, *ctx.needs_input_grad[:3],
            )  # fmt: skip

        return (*scaled_gradients(ctx, g, rows_with_gradient, recompute), *nothing)


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    pairs: str = "halves",
    loss: str | Sequence[str] = "sigmoid",
    beta: float | Tensor = 0.1,
    label_smoothing: float | Tensor = 0.0,
    normalize_lengths: bool | None = None,
    loss_weights: Sequence[float | Tensor] | None = None,
    pair_weights: Tensor | None = None,
    gamma: float | Tensor = 0.5,
    sft_weight: float | Tensor = 0.0,
    chosen_nll: Tensor | None = None,
    kl: Tensor | None = None,
    delta: float | Tensor = 0.0,
    tau: float | Tensor = 0.05,
    desirable_weight: float | Tensor = 1.0,
    undesirable_weight: float | Tensor = 1.0,
    f_divergence: str = "reverse_kl",
    alpha: float | Tensor = 0.5,
    ld_alpha: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> PreferenceOutput:
    """A preference loss from hidden states; the logits never exist all at once.

        z = hidden Wᵀ + b,    with a softcap c·tanh(z/c)
        lp_b = Σ_t log softmax(z[b, t]/T)[targets[b, t]]    over the targets that are not ignored

    and then `preference_loss` of the two halves of the batch. Chunks are whole pairs, so that all gradients
    are made in the forward, while a pair's logits are there: 6·N·H·V operations in all for N tokens that
    count (4·N·H·V where the weight is frozen). Where a pair is more than a quarter of the batch (and than
    a chunk), or than 512 MB of logits, the forward makes the logits twice: 8·N·H·V; so does the backward
    for `aot` and `aot_unpaired`, for reduction="none", for `ld_alpha` beside an NLL, with a chosen_nll or
    ref_logprobs that have a gradient, in float16 and under checkpointing. Memory: the gradients and a chunk.

    Args:
        hidden: (2·pairs, T, H). hidden, weight, bias, softcap, temperature: as in `linear_token_logprobs`.
        targets: (2·pairs, T), aligned with hidden (shift by one before the call). `ignore_index` marks the
            prompt and the padding, which are not multiplied; completion lengths are counted from the rest.
        ref_hidden: (2·pairs, T, H') hidden states of the reference, whose head is ref_weight (V', H') (None:
            `weight`) and ref_bias (None with a ref_weight: none); 2·N·H'·V' operations more. Softcap
            and temperature are the policy's. Or
        ref_logprobs: (2·pairs,) sequence log-probabilities under the reference. With neither the loss is
            reference-free.
        the others: as in `preference_loss_from_logits`.

    Returns:
        PreferenceOutput, as `preference_loss`; `loss` is differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError: naming the argument; a target outside [0, V) included.
    """
    call = call_of(hidden, weight, bias, softcap)
    if pairs != "halves":
        check_halves(pairs, (0, 0, 0), None, None)
    if len(call.shape) != 2 or call.shape[0] % 2:
        raise ValueError(f"hidden: shape {tuple(hidden.shape)}; allowed: (2·pairs, T, H)")
    targets = call.indices("targets", targets, ignore_index)
    temperature = scalar("temperature", temperature)
    if not is_compiling():
        check_temperature(temperature)
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        raise ValueError("ref_weight, ref_bias: they need ref_hidden")
    if ref_weight is None and ref_bias is not None:
        raise ValueError("ref_bias: it needs ref_weight (without one the reference has our head)")
    if ref_hidden is not None and ref_logprobs is not None:
        raise ValueError("ref_logprobs and ref_hidden: give one of the two")
    if ref_logprobs is not None:
        float_tensor("ref_logprobs", ref_logprobs)
        same_device("ref_logprobs", ref_logprobs, "hidden", call.hidden)
        if ref_logprobs.shape != call.shape[:1]:
            raise ValueError(
                f"ref_logprobs: shape {tuple(ref_logprobs.shape)}; allowed: ({call.shape[0]},)"
            )

    def token_lp() -> Tensor:
        return token_logprobs_of(call, targets, temperature, ignore_index, False)

    def ref_token_lp() -> Tensor:
        if ref_weight is None:
            ref = call.of(ref_hidden, "ref_hidden")
        else:
            names = ("ref_hidden", "ref_weight", "ref_bias", "softcap")
            ref = call_of(ref_hidden, ref_weight, ref_bias, softcap, names)
        if ref.shape != call.shape:
            raise ValueError(
                f"ref_hidden: shape {(*ref.shape, ref.hidden.shape[-1])}; hidden is {tuple(hidden.shape)}"
            )
        return token_logprobs_of(ref, targets, temperature, ignore_index, False)

    def one_pass(tail: Tensor | None, prepared: Any) -> PreferenceOutput:
        (_, _, *inputs, _, _), weights_of_losses, numbers, codes = prepared
        inputs = [x if x is None else x.detach() for x in inputs]
        return PreferenceOutput._make(
            _Preference.apply(
                call.hidden, *call.arguments(), targets, tail, *inputs, weights_of_losses, temperature,
                *numbers, *codes, ignore_index,
            )
        )  # fmt: skip

    in_one = (
        wants_gradient(call.hidden, call.weight, call.bias)
        and not runs_eagerly("linear", call.hidden)
        and made_in_forward(call.hidden)
    )
    return preference_of_rows(
        targets, accumulator(call.hidden.dtype), token_lp, None if ref_hidden is None else ref_token_lp,
        one_pass if in_one else None, ref_logprobs=ref_logprobs, loss=loss, beta=beta,
        label_smoothing=label_smoothing, normalize_lengths=normalize_lengths,
        loss_weights=loss_weights, pair_weights=pair_weights,
        gamma=gamma, sft_weight=sft_weight, chosen_nll=chosen_nll, kl=kl, delta=delta, tau=tau,
        desirable_weight=desirable_weight, undesirable_weight=undesirable_weight,
        f_divergence=f_divergence, alpha=alpha, ld_alpha=ld_alpha, reduction=reduction,
        ignore_index=ignore_index,
    )  # fmt: skip


composite(
    "linear_preference_loss(Tensor hidden, Tensor weight, Tensor targets, *, Tensor? bias=None, "
    "float? softcap=None, float temperature=1.0, Tensor? ref_hidden=None, Tensor? ref_weight=None, "
    "Tensor? ref_bias=None, Tensor? ref_logprobs=None, str pairs='halves', str loss='sigmoid', "
    "float beta=0.1, float label_smoothing=0.0, bool? normalize_lengths=None, Tensor? pair_weights=None, "
    "float gamma=0.5, float sft_weight=0.0, Tensor? chosen_nll=None, Tensor? kl=None, float delta=0.0, "
    "float tau=0.05, float desirable_weight=1.0, float undesirable_weight=1.0, "
    "str f_divergence='reverse_kl', float alpha=0.5, float? ld_alpha=None, str reduction='mean', "
    "int ignore_index=-100) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    linear_preference_loss,
)
