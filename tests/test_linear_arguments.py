"""Wrong arguments of linear_token_logprobs and linear_cross_entropy."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse import _linear_loss
from linear_cases import (
    IGNORE,
    make,
)

RAW = torch.ops.finefuse
pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = [ff.linear_token_logprobs, ff.linear_cross_entropy]


@pytest.mark.parametrize("bad", [-1, 7, 2**31, -(2**31) - 5])
@pytest.mark.parametrize("where", [0, 3, 5])
def test_target_out_of_range(monkeypatch, bad, where):
    """Before a product is taken or anything is written."""
    hidden, weight = torch.randn(6, 3), torch.randn(7, 3)
    targets = torch.zeros(6, dtype=torch.long)
    targets[where] = bad
    taken = []
    linear = _linear_loss.linear
    monkeypatch.setattr(_linear_loss, "linear", lambda *a: (taken.append(1), linear(*a))[1])
    message = rf"targets: element {where} is {bad}; allowed are 0 to 6 and ignore_index \(-100\)"
    none = (None, None, None, None, None, None, None, 0, 0, 7, math.inf)
    for call in (
        *(lambda f=f: f(hidden, weight, targets) for f in BOTH),
        *(lambda f=f: f(hidden.clone().requires_grad_(), weight, targets) for f in BOTH),
        *(lambda f=f: f(hidden.view(2, 3, 3), weight, targets.view(2, 3)) for f in BOTH),
        lambda: RAW.linear_token_logprobs_forward(
            hidden, weight, *none, targets, 1.0, IGNORE, False
        ),
        lambda: RAW.linear_token_logprobs_backward(
            torch.ones(6), None, None, hidden, weight, *none, targets, 1.0, IGNORE, True, True, True
        ),
        lambda: RAW.linear_cross_entropy_forward(
            hidden, weight, *none, targets, 1.0, 0.0, IGNORE, 2
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    assert not taken
    ff.linear_token_logprobs(hidden, weight, targets.clamp(0, 6))
    assert taken  # the count would have seen one
    if -(2**31) <= bad < 2**31:
        with pytest.raises(ValueError, match=message):
            ff.linear_token_logprobs(hidden, weight, targets.int())
    with ff.backend("eager"), pytest.raises(ValueError, match=message):
        ff.linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_wrong_arguments(function, backend):
    x, w, y, b = torch.randn(3, 4), torch.randn(6, 4), torch.tensor([0, 1, 2]), torch.randn(6)
    packed = ff.quantize(w, blocksize=16)

    def wrong(error, message, hidden=x, weight=w, targets=y, **options):
        with ff.backend(backend), pytest.raises(error, match=message):
            function(hidden, weight, targets, **options)

    wrong(TypeError, "^hidden: a tensor, not list", hidden=[[1.0]])
    wrong(
        TypeError, r"^hidden: dtype torch.int64; allowed: float32", hidden=torch.ones(3, 4).long()
    )
    wrong(TypeError, "^hidden: a tensor of numbers, not a CodebookTensor", hidden=packed)
    wrong(TypeError, "^weight: a tensor, not None", weight=None)
    wrong(TypeError, r"^weight: dtype torch.int64; allowed: float32", weight=w.long())
    wrong(TypeError, r"^weight: dtype torch.float64; hidden has torch.float32", weight=w.double())
    wrong(
        TypeError, r"^weight: dtype torch.float32; hidden has torch.bfloat16", hidden=x.bfloat16()
    )
    wrong(ValueError, r"^weight: shape \(6,\)", weight=w[:, 0])
    wrong(ValueError, r"^weight: shape \(1, 6, 4\)", weight=w[None])
    wrong(ValueError, r"^weight: shape \(0, 4\)", weight=w[:0])
    wrong(ValueError, r"^weight: shape \(6, 0\)", weight=w[:, :0], hidden=x[:, :0])
    wrong(ValueError, r"^weight: on meta; hidden is on cpu", weight=w.to("meta"))
    wrong(ValueError, r"^hidden: shape \(3, 3\); a weight of \(6, 4\) takes", hidden=x[:, :3])
    wrong(ValueError, r"^hidden: shape \(\)", hidden=x[0, 0])
    wrong(TypeError, "^targets: a tensor of integers, not list", targets=[0, 1, 2])
    wrong(TypeError, r"^targets: dtype torch.float32", targets=y.float())
    wrong(TypeError, r"^targets: dtype torch.bool", targets=y.bool())
    wrong(ValueError, r"^targets: shape \(2,\); hidden is \(3, 4\): allowed: \(3,\)", targets=y[:2])
    wrong(ValueError, r"^targets: shape \(3, 1\)", targets=y[:, None])
    wrong(ValueError, "^targets: on meta", targets=y.to("meta"))
    wrong(TypeError, "^bias: a tensor, not list", bias=[1.0])
    wrong(TypeError, r"^bias: dtype torch.int64", bias=b.long())
    wrong(TypeError, "^bias: a tensor of numbers, not a CodebookTensor", bias=ff.quantize(b))
    wrong(ValueError, r"^bias: shape \(5,\); allowed: \(6,\)", bias=b[:5])
    wrong(ValueError, r"^bias: shape \(6, 1\)", bias=b[:, None])
    wrong(ValueError, "^bias: on meta; hidden is on cpu", bias=b.to("meta"))
    for t in (0.0, -1.0, math.nan, math.inf, 1e38):
        wrong(ValueError, "^temperature: ", temperature=t)
        wrong(ValueError, "^temperature: ", temperature=torch.tensor(t))
    for c in (0.0, -1.0, math.nan, math.inf):
        wrong(ValueError, "^softcap: ", softcap=c)
        wrong(ValueError, "^softcap: ", softcap=torch.tensor(c))
    for name in ("temperature", "softcap"):
        wrong(TypeError, f"^{name}: a number", **{name: "hot"})
        wrong(ValueError, rf"^{name}: a number or a 0-d tensor, not of shape \(2,\)",
              **{name: torch.ones(2)})  # fmt: skip
        wrong(ValueError, f"^{name}: has no gradient",
              **{name: torch.tensor(1.0, requires_grad=True)})  # fmt: skip
    for index in (None, 1.5, 2**70):
        wrong(TypeError, "^ignore_index: an int", ignore_index=index)
    if function is ff.linear_cross_entropy:
        for eps in (-0.1, 1.5, math.nan):
            wrong(ValueError, "^label_smoothing: ", label_smoothing=eps)
            wrong(ValueError, "^label_smoothing: ", label_smoothing=torch.tensor(eps))
        wrong(TypeError, "^label_smoothing: a number", label_smoothing="some")
        wrong(ValueError, "^reduction: 'avg'; allowed: 'none', 'sum', 'mean'", reduction="avg")
    with ff.backend(backend):
        assert function(x, packed, y, bias=b).isfinite().all()


def test_wrong_arguments_of_raw_ops():
    """What the public function makes sure of, a raw op checks itself."""
    x, w, b = torch.randn(3, 4), torch.randn(6, 4), torch.randn(6)
    y, none = torch.tensor([0, 1, 2]), (None, None, None, None, None, None, 0, 0)
    forward = RAW.linear_token_logprobs_forward

    def call(x=x, w=w, b=b, vocab=6, cap=math.inf, y=y, t=1.0):
        return forward(x, w, b, *none, vocab, cap, y, t, IGNORE, False)

    assert call()[0].shape == (3,)
    for message, args in (
        ("hidden: shape", {"x": x[None]}),
        ("weight: a tensor", {"w": None}),
        ("weight: ", {"vocab": 7, "b": None}),
        ("weight: ", {"w": w[:, :3]}),
        ("weight: ", {"w": w.double()}),
        ("bias: ", {"b": b[:5]}),
        ("bias: ", {"b": b.double()}),
        ("softcap: ", {"cap": 0.0}),
        ("softcap: ", {"cap": -1.0}),
        ("softcap: ", {"cap": math.nan}),
        ("temperature: ", {"t": 0.0}),
        ("targets: shape", {"y": y[:2]}),
        ("targets: dtype", {"y": y.short()}),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call(**args)
    head = (x, w, b, *none, 6, math.inf, y)
    for args, message in (
        ((1.0, 2.0, IGNORE, 2), "label_smoothing: "),
        ((1.0, 0.0, IGNORE, 3), "reduction: "),
        ((0.0, 0.0, IGNORE, 2), "temperature: "),
    ):
        with pytest.raises(ValueError, match=message):
            RAW.linear_cross_entropy_forward(*head, *args)


def test_wrong_numbers_while_compiling():
    """They are tensors there; the op still says what is wrong."""
    torch._dynamo.reset()
    case = make(3, 4, 6)

    def step(x, t, c):
        return ff.linear_cross_entropy(x, case.weight, case.targets, temperature=t, softcap=c)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    compiled(case.hidden, 1.5, 2.5)
    for t, c, name in ((0.0, 2.5, "temperature"), (1.5, -2.0, "softcap")):
        with pytest.raises(ValueError, match=name):
            compiled(case.hidden, t, c)
