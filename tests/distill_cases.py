"""Distillation for the tests: inputs, the formula in plain torch and float64, how to compare them."""

from __future__ import annotations

import numpy as np
import torch
from finefuse._args.distill import DISTILL_KINDS
from finefuse.eager import distill as eager_distill
from finefuse.reference import distill as reference

RAW = torch.ops.finefuse
F = torch.nn.functional
IGNORE = -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = list(DISTILL_KINDS)


def make(rows, vocab, dtype=torch.float32, *, teacher_dtype=None, spread=3.0, apart=1.0, seed=0):
    """A student and a teacher that agree in part."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocab, generator=g) * spread
    teacher = student + torch.randn(rows, vocab, generator=g) * apart
    return student.to(dtype), teacher.to(teacher_dtype or dtype)


def top_k(teacher, k, temperature=1.0, dtype=None):
    """(log-probabilities, indices) of the k most likely columns, as an inference server returns them."""
    logp = (teacher.double() / temperature).log_softmax(-1)
    values, indices = logp.topk(k, -1)
    return values.to(dtype or teacher.dtype), indices


def truth(student, teacher, **options):
    arrays = {
        k: v.reshape(-1, *v.shape[student.ndim - 1 :]).numpy() if isinstance(v, torch.Tensor) else v
        for k, v in options.items()
    }
    loss, gradient = reference.distill_loss(
        student.detach().double().reshape(-1, student.shape[-1]).numpy(),
        teacher.detach().double().reshape(-1, teacher.shape[-1]).numpy(),
        **arrays,
    )
    if options.get("reduction") == "none":
        loss = loss.reshape(student.shape[:-1])
    return loss, gradient.reshape(student.shape)


def plain(student, teacher, *, kind="forward_kl", beta=0.5, temperature=1.0, mask=None, alpha=1.0,
          targets=None, temperature_squared=False, vocab_size=None, teacher_indices=None,
          reduction="mean", ignore_index=IGNORE):  # fmt: skip
    """Plain torch in the student's type, as a user writes it; rows that do not count are left out."""
    keep = torch.ones(student.shape[:-1], dtype=torch.bool) if mask is None else mask.bool()
    if targets is not None:
        keep = keep & (targets != ignore_index)
    vocab = vocab_size or student.shape[-1]
    z, t = student[..., :vocab][keep], teacher.to(student.dtype)[keep]
    log_p = (z / temperature).log_softmax(-1)
    if teacher_indices is None:
        log_q = (t[..., :vocab] / temperature).log_softmax(-1)
    else:
        log_p, log_q = eager_distill._buckets(log_p, t, teacher_indices[keep].long())
    if kind == "jsd" and 0 < beta < 1:
        log_m = torch.logaddexp(log_q + np.log(beta), log_p + np.log1p(-beta))
        rows = beta * F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
        rows = rows + (1 - beta) * F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    elif kind == "forward_kl" or (kind == "jsd" and beta == 0):
        rows = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    else:
        rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    rows = alpha * (temperature**2 if temperature_squared else 1) * rows
    if alpha < 1:
        rows = rows + (1 - alpha) * F.cross_entropy(z, targets[keep].long(), reduction="none")
    if reduction == "none":
        return rows.new_zeros(keep.shape).masked_scatter(keep, rows)
    return rows.sum() / (max(int(keep.sum()), 1) if reduction == "mean" else 1)


def run(function, student, teacher, upstream=None, **options):
    x = student.detach().clone().requires_grad_()
    loss = function(x, teacher, **options)
    (loss.sum() if upstream is None else (loss * upstream.to(loss.dtype)).sum()).backward()
    return loss.detach(), x.grad
