"""Wrong arguments of linear_policy_loss, linear_preference_loss and linear_distill_loss."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from linear_problems import (
    of_five,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def wrong(error, message, function, *args, **options):
    with pytest.raises(error, match=message):
        function(*args, **options)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_wrong_arguments_of_policy(backend, grad):
    x, w, y = torch.randn(2, 3, 4), torch.randn(6, 4), torch.tensor([[0, 1, 2], [5, 4, 3]])
    x.requires_grad_(grad)
    a, old = torch.ones(2), torch.zeros(2, 3)

    def call(h=x, weight=w, actions=y, advantages=a, **k):
        return ff.linear_policy_loss(h, weight, actions, advantages=advantages, **k)

    with ff.backend(backend):
        assert call().loss.isfinite()
        for error, message, k in (
            (TypeError, "^hidden: a tensor", {"h": [1.0]}),
            (TypeError, "^weight: a tensor", {"weight": None}),
            (TypeError, "^weight: dtype", {"weight": w.double()}),
            (ValueError, "^hidden: shape", {"h": x[..., :3]}),
            (TypeError, "^bias: a tensor", {"bias": 1.0}),
            (ValueError, "^bias: shape", {"bias": torch.zeros(5)}),
            (ValueError, "^softcap: ", {"softcap": 0.0}),
            (ValueError, "^softcap: ", {"softcap": -2.0}),
            (TypeError, "^actions: a tensor of integers", {"actions": [0]}),
            (TypeError, "^actions: dtype", {"actions": y.float()}),
            (ValueError, r"^actions: shape \(2, 2\); hidden is", {"actions": y[:, :2]}),
            (ValueError, "^actions: element 2 is 6; allowed are 0 to 5",
             {"actions": y.index_put((torch.tensor(0), torch.tensor(2)), torch.tensor(6))}),
            (ValueError, "^actions: element 2 is -1",
             {"actions": y.index_put((torch.tensor(0), torch.tensor(2)), torch.tensor(-1)),
              "loss": "gspo"}),
            (TypeError, "^ignore_index: an int", {"ignore_index": 1.5}),
            (ValueError, "^temperature: ", {"temperature": 0.0}),
            (ValueError, "^entropy_coef: ", {"entropy_coef": math.inf}),
            (TypeError, "^advantages: a tensor", {"advantages": None}),
            (ValueError, "^advantages: shape", {"advantages": torch.ones(5)}),
            (ValueError, "^old_logprobs: shape", {"old_logprobs": old[:1]}),
            (ValueError, "^loss: 'gppo'; allowed", {"loss": "gppo"}),
            (ValueError, "^reduction: 'avg'; allowed", {"reduction": "avg"}),
            (ValueError, "^kl_beta: 0.1; it needs ref_logprobs", {"kl_beta": 0.1}),
            (ValueError, "^clip_low: ", {"clip_low": -0.1}),
            (ValueError, "^mask: shape", {"mask": torch.ones(2, 2, dtype=torch.bool)}),
            (TypeError, "^mask: a tensor", {"mask": [True]}),
            (ValueError, "^cu_seqlens", {"cu_seqlens": torch.tensor([0, 3])}),
        ):  # fmt: skip
            wrong(error, message, call, **k)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_wrong_arguments_of_preference(backend, grad):
    x, w, y = torch.randn(2, 3, 4), torch.randn(6, 4), torch.tensor([[0, 1, 2], [5, 4, 3]])
    x.requires_grad_(grad)

    def call(h=x, weight=w, targets=y, **k):
        return ff.linear_preference_loss(h, weight, targets, **k)

    with ff.backend(backend):
        assert call().loss.isfinite()
        for error, message, k in (
            (TypeError, "^hidden: a tensor", {"h": [1.0]}),
            (TypeError, "^hidden: a tensor of numbers", {"h": ff.quantize(w)}),
            (TypeError, "^weight: dtype", {"weight": w.double()}),
            (ValueError, "^hidden: shape", {"h": x[0]}),
            (ValueError, "^hidden: shape", {"h": torch.randn(3, 3, 4)}),
            (ValueError, "^softcap: ", {"softcap": 0.0}),
            (ValueError, "^temperature: ", {"temperature": -1.0}),
            (TypeError, "^targets: dtype", {"targets": y.float()}),
            (ValueError, "^targets: shape", {"targets": y[:, :2]}),
            (ValueError, "^targets: element 4 is 9; allowed are 0 to 5",
             {"targets": y.index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(9))}),
            (ValueError, "^targets: element 4 is 9",
             {"targets": y.index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(9)),
              "reduction": "none"}),
            (TypeError, "^ignore_index: an int", {"ignore_index": None}),
            (ValueError, "^pairs: ", {"pairs": "interleaved"}),
            (ValueError, "^ref_weight, ref_bias: they need ref_hidden", {"ref_weight": w}),
            (ValueError, "^ref_logprobs and ref_hidden: give one",
             {"ref_hidden": x, "ref_logprobs": torch.zeros(2)}),
            (ValueError, "^ref_logprobs: shape", {"ref_logprobs": torch.zeros(3)}),
            (TypeError, "^ref_logprobs: a tensor", {"ref_logprobs": [0.0, 0.0]}),
            (ValueError, "^ref_hidden: shape", {"ref_hidden": x[:, :2]}),
            (ValueError, "^ref_hidden: shape", {"ref_hidden": x[..., :3]}),
            (TypeError, "^ref_weight: ", {"ref_hidden": x, "ref_weight": 3}),
            (ValueError, "^ref_bias: shape", {"ref_hidden": x, "ref_weight": w, "ref_bias": torch.ones(5)}),
            (ValueError, "^loss: ", {"loss": "dpo2"}),
            (ValueError, "^beta: ", {"beta": -math.inf}),
            (ValueError, "^ld_alpha: ", {"ld_alpha": 1.5}),
            (ValueError, "^reduction: ", {"reduction": "avg"}),
            (ValueError, "^label_smoothing: ", {"loss": "exo_pair"}),
            (ValueError, "^pair_weights: ", {"pair_weights": torch.ones(4)}),
        ):  # fmt: skip
            wrong(error, message, call, **k)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_wrong_arguments_of_distill(backend, grad):
    x, w, t, v = torch.randn(3, 4), torch.randn(6, 4), torch.randn(3, 5), torch.randn(6, 5)
    x.requires_grad_(grad)
    y = torch.tensor([0, 1, 5])

    def call(h=x, weight=w, teacher=t, teacher_weight=v, **k):
        return ff.linear_distill_loss(h, weight, teacher, teacher_weight, **k)

    with ff.backend(backend):
        assert call(targets=y, alpha=0.5).isfinite()
        for error, message, k in (
            (TypeError, "^student_hidden: a tensor", {"h": [1.0]}),
            (TypeError, "^student_weight: a tensor", {"weight": None}),
            (TypeError, "^student_weight: dtype", {"weight": w.double()}),
            (TypeError, "^teacher_weight: dtype", {"teacher_weight": v.double()}),
            (TypeError, "^teacher_hidden: a tensor of numbers", {"teacher": ff.quantize(v)}),
            (ValueError, "^student_hidden: shape", {"h": x[:, :3]}),
            (ValueError, "^teacher_hidden: shape", {"teacher": t[:, :3]}),
            (ValueError, "^teacher_hidden: shape", {"teacher": t[:2]}),
            (ValueError, "^teacher_weight: ", {"teacher_weight": v[:5]}),
            (ValueError, "^student_bias: shape", {"student_bias": torch.ones(5)}),
            (ValueError, "^teacher_bias: shape", {"teacher_bias": torch.ones(5)}),
            (ValueError, "^softcap: ", {"softcap": 0.0}),
            (ValueError, "^teacher_softcap: ", {"teacher_softcap": -1.0}),
            (ValueError, "^temperature: ", {"temperature": 0.0}),
            (ValueError, "^beta: ", {"beta": 1.5, "kind": "jsd"}),
            (ValueError, "^alpha: ", {"alpha": -0.5, "targets": y}),
            (ValueError, "^alpha: |^targets: ", {"alpha": 0.5}),
            (ValueError, "^kind: 'tv'; allowed", {"kind": "tv"}),
            (ValueError, "^reduction: 'avg'; allowed", {"reduction": "avg"}),
            (TypeError, "^mask: a tensor", {"mask": [True]}),
            (ValueError, "^mask: shape", {"mask": torch.ones(2, dtype=torch.bool)}),
            (TypeError, "^targets: dtype", {"targets": y.float()}),
            (ValueError, "^targets: shape", {"targets": y[:2], "alpha": 0.5}),
            (ValueError, "^targets: element 1 is 6; allowed are 0 to 5",
             {"targets": torch.tensor([0, 6, 1]), "alpha": 0.5}),
            (ValueError, "^targets: element 1 is 5", {"targets": torch.tensor([0, 5, 1]), "alpha": 0.5,
             "vocab_size": 5}),
            (ValueError, "^vocab_size: ", {"vocab_size": 7}),
            (ValueError, "^vocab_size: ", {"vocab_size": 0}),
            (TypeError, "^ignore_index: an int", {"ignore_index": 1.5}),
        ):  # fmt: skip
            wrong(error, message, call, **k)


def test_reference_bias_needs_its_weight():
    h, w, t = of_five()
    with pytest.raises(ValueError, match="ref_bias: it needs ref_weight"):
        ff.linear_preference_loss(h, w, t, ref_hidden=h, ref_bias=torch.zeros(30))
