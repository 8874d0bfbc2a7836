"""Wrong arguments of distill_loss."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from distill_cases import (
    IGNORE,
    RAW,
    make,
    top_k,
)


@pytest.mark.parametrize("eager", [False, True])
def test_wrong_teachers_and_targets(eager):
    student, teacher = make(6, 20)
    values, indices = top_k(teacher, 4)
    out = torch.full((6, 20), 5.0)

    def raises(match, **options):
        given = {"teacher": values, "teacher_indices": indices, **options}
        t = given.pop("teacher")
        with pytest.raises(ValueError, match=match), ff.backend("eager" if eager else "auto"):
            ff.distill_loss(student, t, **given)

    for bad in (-1, 20, 2**31 - 1):
        broken = indices.clone()
        broken[3, 2] = bad
        message = r"teacher_indices: row 3 has an index that is not in \[0, 20\)"
        raises(message, teacher_indices=broken)
        raises(message, teacher_indices=broken.int())
        mask = torch.ones(6, dtype=torch.bool)
        mask[3] = False  # a row that does not count is not looked at
        assert torch.isfinite(ff.distill_loss(student, values, teacher_indices=broken, mask=mask))
        with pytest.raises(ValueError, match=message):
            RAW.distill_forward_backward(
                student, values, out, broken, None, None, 0.5, 1.0, 1.0, 0, False, 20, IGNORE, 2
            )
    assert (out == 5).all()
    raises(
        "not in \\[0, 12\\)",
        vocab_size=12,
        teacher_indices=indices * 0 + torch.tensor([0, 1, 2, 12]),
    )
    broken = indices.clone()
    broken[2, 3] = broken[2, 0]
    raises("teacher_indices: row 2 has an index twice", teacher_indices=broken)
    broken = values.clone()
    broken[5] = torch.tensor([3.0, 2.0, 1.0, 0.0])  # logits
    raises("teacher_logits: the probabilities of row 5 add up to more than 1", teacher=broken)
    wrong = torch.zeros(6, dtype=torch.long)
    wrong[4] = 20
    for alpha in (1.0, 0.5):
        raises(r"targets: element 4 is 20; allowed are 0 to 19", targets=wrong, alpha=alpha)
    raises("targets: element 4 is 20", teacher=teacher, teacher_indices=None, targets=wrong)


def test_wrong_arguments():
    x, t = make(3, 5)
    index = torch.tensor([[0, 1], [2, 3], [4, 0]])
    few = torch.full((3, 2), -2.0)
    for error, match, call in (
        (TypeError, "student_logits: a tensor", lambda: ff.distill_loss([[1.0]], t)),
        (TypeError, "teacher_logits: a tensor", lambda: ff.distill_loss(x, None)),
        (TypeError, "student_logits: dtype torch.int64", lambda: ff.distill_loss(x.long(), t)),
        (TypeError, "teacher_logits: dtype torch.int64", lambda: ff.distill_loss(x, t.long())),
        (ValueError, r"teacher_logits: shape \(2, 5\)", lambda: ff.distill_loss(x, t[:2])),
        (ValueError, r"teacher_logits: 4 columns, student_logits 5; give vocab_size",
         lambda: ff.distill_loss(x, t[:, :4])),
        (ValueError, "vocab_size: 6; allowed: 1 to 5", lambda: ff.distill_loss(x, t, vocab_size=6)),
        (ValueError, "vocab_size: 0; allowed: 1 to 5", lambda: ff.distill_loss(x, t, vocab_size=0)),
        (TypeError, "vocab_size: an int", lambda: ff.distill_loss(x, t, vocab_size=5.0)),
        (ValueError, "student_logits: shape", lambda: ff.distill_loss(x[:, :0], t[:, :0])),
        (ValueError, "student_logits: shape", lambda: ff.distill_loss(x[0, 0], t[0, 0])),
        (ValueError, "kind: 'kl'; allowed: 'forward_kl'", lambda: ff.distill_loss(x, t, kind="kl")),
        (ValueError, "reduction: 'batchmean'", lambda: ff.distill_loss(x, t, reduction="batchmean")),
        (TypeError, "mask: a tensor", lambda: ff.distill_loss(x, t, mask=[True])),
        (ValueError, r"mask: shape \(2,\); allowed: \(3,\)",
         lambda: ff.distill_loss(x, t, mask=torch.ones(2))),
        (ValueError, r"targets: shape \(3, 1\)",
         lambda: ff.distill_loss(x, t, targets=index[:, :1])),
        (TypeError, "targets: dtype torch.float32", lambda: ff.distill_loss(x, t, targets=x[:, 0])),
        (TypeError, "teacher_indices: dtype",
         lambda: ff.distill_loss(x, few, teacher_indices=index.float())),
        (ValueError, r"teacher_indices: shape \(3, 2\); teacher_logits have \(3, 5\)",
         lambda: ff.distill_loss(x, t, teacher_indices=index)),
        (ValueError, "teacher_indices: shape .*at most 1",
         lambda: ff.distill_loss(x, few, teacher_indices=index, vocab_size=1)),
        (TypeError, "ignore_index: an int", lambda: ff.distill_loss(x, t, ignore_index=None)),
        (ValueError, "alpha: 0.5; below 1 it needs targets", lambda: ff.distill_loss(x, t, alpha=0.5)),
        (ValueError, "teacher_logits: on meta", lambda: ff.distill_loss(x, t.to("meta"))),
        (ValueError, "mask: on meta",
         lambda: ff.distill_loss(x, t, mask=torch.ones(3, device="meta") > 0)),
    ):  # fmt: skip
        for name in ("auto", "eager"):
            with pytest.raises(error, match=match), ff.backend(name):
                call()
    for name, values, allowed in (
        ("beta", (-0.1, 1.1, float("nan")), "0 to 1"),
        ("alpha", (-0.1, 1.1, float("nan")), "0 to 1"),
        ("temperature", (0.0, -1.0, float("inf"), float("nan"), 1e38), "positive and finite"),
    ):
        for value in values:
            for passed in (value, torch.tensor(value, dtype=torch.float64)):
                with pytest.raises(ValueError, match=f"{name}: .*{allowed}"):
                    ff.distill_loss(x, t, **{name: passed})
        with pytest.raises(TypeError, match=f"{name}: a number"):
            ff.distill_loss(x, t, **{name: "1"})
