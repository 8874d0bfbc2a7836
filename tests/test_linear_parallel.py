"""Token log-probabilities of a sharded vocabulary: the processes of a gloo group against one that has it all.

Each number of ranks is started once and runs every case; what a rank found wrong comes back as a traceback.
"""

from __future__ import annotations

import datetime
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import finefuse as ff
import torch.distributed as dist
from tolerances import check
from torch.utils.checkpoint import checkpoint

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)

N, H, V = 23, 16, 37  # odd, and V is not divisible by the numbers of ranks
TIMEOUT = datetime.timedelta(seconds=20)
IGNORE = 3  # a class of its own, and an index of some shard: only the whole's targets are compared


class Problem(NamedTuple):
    """The whole, the same on every rank."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    bias: torch.Tensor | None
    upstream: list[torch.Tensor]


def problem(dtype: torch.dtype = torch.float64, bias: bool = True, ignored: bool = True) -> Problem:
    rng = np.random.default_rng(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    targets = torch.from_numpy(rng.integers(0, V, N))
    targets[:4] = torch.tensor([0, V - 1, V // 2, V // 4])  # on every rank that has rows
    if ignored:
        targets[5::6] = IGNORE
    else:
        targets[targets == IGNORE] = 4
    sums = torch.float64 if dtype is torch.float64 else torch.float32
    upstream = [normal(N).to(sums) for _ in range(3)]
    return Problem(normal(N, H), normal(V, H), targets, normal(V) if bias else None, upstream)


def leaf(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach().clone().requires_grad_()


class Results(NamedTuple):
    lp: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def run(p: Problem, wanted: str = "ghl", **options: Any) -> Results:
    hidden, weight, bias = leaf(p.hidden), leaf(p.weight), leaf(p.bias)
    outputs = ff.linear_token_logprobs(
        hidden, weight, p.targets, bias=bias, ignore_index=IGNORE, stats=True, **options
    )
    chosen = [
        (x, g) for x, g, name in zip(outputs, p.upstream, "ghl", strict=True) if name in wanted
    ]
    torch.autograd.backward([x for x, _ in chosen], [g for _, g in chosen])
    return Results(
        *(x.detach() for x in outputs),
        hidden.grad,
        weight.grad,
        None if bias is None else bias.grad,
    )


def eager(p: Problem, temperature: float = 1.0, softcap: float | None = None) -> Results:
    """The formula in plain torch, in the type of the problem."""
    with ff.backend("eager"):
        return run(p, temperature=temperature, softcap=softcap)


class Rank(NamedTuple):
    group: Any
    ranks: int
    rank: int

    def rows(self, x: Any, rows: int, fill: float = float("nan")) -> Any:
        """This rank's rows of x (V, …), of so many a rank; padding is filled with what must not be read."""
        if x is None:
            return None
        whole = x.new_full((self.ranks * rows, *x.shape[1:]), fill)
        whole[: len(x)] = x
        return whole[self.rank * rows : (self.rank + 1) * rows].clone()

    def run(self, p: Problem, rows: int, **options: Any) -> Results:
        """Sharded; the gradients of the weight and the bias are this rank's."""
        mine = p._replace(weight=self.rows(p.weight, rows), bias=self.rows(p.bias, rows))
        return run(mine, group=self.group, vocab_size=V, **options)

    def compare(self, ours: Results, whole: Results, rows: int, tol: float = 1e-12) -> None:
        for name in Results._fields:
            a, b = getattr(ours, name), getattr(whole, name)
            if b is None:
                continue
            if name in ("weight", "bias"):
                b = self.rows(b, rows, 0.0)  # padding has a gradient of exactly 0
                real = min(max(V - self.rank * rows, 0), rows)
                assert not a[real:].any(), f"{name}: a gradient of padding"
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            scale = max(1.0, getattr(whole, name).nan_to_num(0.0, 0.0, 0.0).abs().max().item())
            torch.testing.assert_close(
                a, b, rtol=0.0, atol=tol * scale, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )

    def rule(self, ours: Results, whole: Results, truth: Results, rows: int) -> None:
        for name in Results._fields:
            a, e, t = (getattr(x, name) for x in (ours, whole, truth))
            if name in ("weight", "bias"):
                e, t = (self.rows(x, rows, 0.0) for x in (e, t))
            check(name, a, e, t, None)

    def layouts(self) -> list[int]:
        """Rows a rank: the padding is less than one rank's, and all of the last one's and more."""
        return [-(-V // self.ranks), -(-V // (self.ranks - 1)) + 1]

    def same_everywhere(self, *tensors: torch.Tensor) -> None:
        for x in tensors:
            every = [torch.empty_like(x) for _ in range(self.ranks)]
            dist.all_gather(every, x.contiguous(), group=self.group)
            for other in every:
                assert torch.equal(other, every[0])


CASES: dict[str, Callable[[Rank], None]] = {}


def case(function: Callable[[Rank], None]) -> Callable[[Rank], None]:
    CASES[function.__name__] = function
    return function


@case
def equals_the_unsharded(on: Rank) -> None:
    for options in ({}, {"temperature": 0.7}, {"softcap": 3.0, "temperature": 1.3}):
        p = problem(bias="softcap" in options, ignored=bool(options))
        whole = run(p, **options)
        for rows in on.layouts():
            ours = on.run(p, rows, **options)
            on.compare(ours, whole, rows)
            for x in ours[:4]:
                assert not x[p.targets == IGNORE].any()


@case
def equals_the_unsharded_for_each_output(on: Rank) -> None:
    p, rows = problem(), on.layouts()[1]
    for wanted in ("g", "h", "l", "gl"):
        on.compare(on.run(p, rows, wanted=wanted), run(p, wanted), rows)


@case
def without_padding(on: Rank) -> None:
    p = problem()
    p = p._replace(weight=p.weight[:36], bias=p.bias[:36], targets=p.targets.clamp(max=35))
    rows = 36 // on.ranks
    first, last = on.rank * rows, (on.rank + 1) * rows
    mine = p._replace(weight=p.weight[first:last], bias=p.bias[first:last])
    ours, whole = run(mine, group=on.group), run(p)
    for name in Results._fields:
        b = getattr(whole, name)
        b = b[first:last] if name in ("weight", "bias") else b
        torch.testing.assert_close(getattr(ours, name), b, rtol=0, atol=1e-12)


@case
def accuracy(on: Rank) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        p = problem(dtype)
        truth = run(Problem(*(x.double() if i < 2 or i == 3 else x for i, x in enumerate(p[:4])),
                            [x.double() for x in p.upstream]), temperature=0.9)  # fmt: skip
        for rows in on.layouts():
            on.rule(on.run(p, rows, temperature=0.9), eager(p, 0.9), truth, rows)


@case
def same_bits_on_every_rank(on: Rank) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        p, rows = problem(dtype), on.layouts()[0]
        first = on.run(p, rows)
        on.same_everywhere(*first[:4])
        for a, b in zip(first, on.run(p, rows), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@case
def certain_rows_keep_their_digits(on: Rank) -> None:
    """log p of -1e-20 or so: relative digits, of lp, of H and of the gradient."""
    p = problem(torch.float32, bias=False, ignored=False)
    hidden = 8.0 * p.weight[p.targets]
    p = p._replace(hidden=hidden, upstream=[torch.ones(N), torch.zeros(N), torch.zeros(N)])
    truth = run(p._replace(hidden=hidden.double(), weight=p.weight.double(),
                           upstream=[x.double() for x in p.upstream]))  # fmt: skip
    ours = on.run(p, on.layouts()[0])
    tiny = truth.lp > -1e-8
    assert tiny.sum() > 5
    for a, b in ((ours.lp, truth.lp), (ours.entropy, truth.entropy)):
        torch.testing.assert_close(a[tiny].double(), b[tiny], rtol=1e-3, atol=1e-37)
    scale = truth.hidden[tiny].abs().amax(1, keepdim=True)
    error = (ours.hidden.double() - truth.hidden)[tiny].abs()
    assert ((error <= 1e-3 * scale + 1e-37).all(1)).all()


@case
def rows_that_are_not_finite(on: Rank) -> None:
    rows = on.layouts()[0]
    whole_shard = torch.zeros(V, dtype=torch.float64)
    whole_shard[:rows] = -torch.inf  # of rank 0; a row whose target is there has lp -inf
    some = torch.zeros(V, dtype=torch.float64)
    some[::3] = -torch.inf
    nan = torch.zeros(V, dtype=torch.float64)
    nan[V // 2] = torch.nan
    every = torch.full((V,), -torch.inf, dtype=torch.float64)
    p = problem()
    for bias in (whole_shard, some, nan, every):
        for wanted in ("ghl", "g"):
            q = p._replace(bias=p.bias + bias)
            whole = run(q, wanted)
            if bias is whole_shard:
                assert (whole.lp == -torch.inf).any()
                assert whole.hidden.isfinite().all()
            on.compare(on.run(q, rows, wanted=wanted), whole, rows)
    hidden = p.hidden.clone()
    hidden[2, 0] = -torch.inf  # all of this row's logits: -inf
    q = p._replace(hidden=hidden, weight=p.weight.abs() + 1)
    for wanted in ("ghl", "l"):
        whole = run(q, wanted)
        assert whole.lp[2].isnan()
        assert whole.lse[2] == -torch.inf
        on.compare(on.run(q, rows, wanted=wanted), whole, rows)
    hidden[5] = torch.nan  # ignored: not read
    whole = run(p._replace(hidden=hidden), "g")
    assert whole.hidden[5].eq(0).all()
    on.compare(on.run(p._replace(hidden=hidden), rows, wanted="g"), whole, rows)


@case
def packed_shards(on: Rank) -> None:
    """Each rank's weight is quantised on its own; the padding may begin within a block."""
    for rows in on.layouts():
        for blocksize, nested in ((16, False), (32, True)):
            p = problem(torch.float32)
            whole = torch.randn(on.ranks * rows, H, generator=torch.Generator().manual_seed(2))
            shards = [
                ff.quantize(x, blocksize=blocksize, double_quant=nested, nested_blocksize=16)
                for x in whole.split(rows)
            ]
            dense = torch.cat([ff.dequantize(x) for x in shards])[:V]
            hidden, bias = leaf(p.hidden), leaf(on.rows(p.bias, rows))
            lp, entropy, lse = ff.linear_token_logprobs(
                hidden, shards[on.rank], p.targets, bias=bias, ignore_index=IGNORE, stats=True,
                group=on.group, vocab_size=V,
            )  # fmt: skip
            torch.autograd.backward([lp, entropy, lse], p.upstream)
            p = p._replace(weight=dense)
            ours = Results(lp.detach(), entropy.detach(), lse.detach(), hidden.grad,
                           on.rows(run(p).weight, rows, 0.0), bias.grad)  # fmt: skip
            on.compare(ours, run(p), rows, 2e-6)


@case
def errors_on_every_rank(on: Rank) -> None:
    p, rows = problem(ignored=False), on.layouts()[0]
    weight = on.rows(p.weight, rows)

    def call(targets: Any = p.targets, weight: Any = weight, vocab_size: Any = V) -> None:
        ff.linear_token_logprobs(p.hidden, weight, targets, group=on.group, vocab_size=vocab_size)

    for bad in (-1, V, on.ranks * rows, 10**12):
        targets = p.targets.clone()
        targets[7] = bad
        with pytest.raises(ValueError, match=rf"targets: element 7 is {bad}; allowed are 0 to 36"):
            call(targets)
    with pytest.raises(ValueError, match=r"weight: \[\d+, \d+\] rows on the ranks"):
        call(weight=p.weight[: rows - (on.rank == 1)])
    with pytest.raises(ValueError, match=r"vocab_size: \[36, 37\] on the ranks"):
        call(vocab_size=V - (on.rank == 0), targets=p.targets.clamp(max=1))
    for value in (0, -1, on.ranks * rows + 1):
        with pytest.raises(ValueError, match=f"vocab_size: {value}; allowed: 1 "):
            call(vocab_size=value)
    call()


@case
def second_backward(on: Rank) -> None:
    p, rows = problem(torch.float32), on.layouts()[0]
    hidden, weight = leaf(p.hidden), leaf(on.rows(p.weight, rows))
    lp = ff.linear_token_logprobs(
        hidden, weight, p.targets, ignore_index=IGNORE, group=on.group, vocab_size=V
    )
    first = torch.autograd.grad(lp, (hidden, weight), p.upstream[0], retain_graph=True)
    again = torch.autograd.grad(lp, (hidden, weight), p.upstream[0], retain_graph=True)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    (tied,) = torch.autograd.grad(lp, hidden, p.upstream[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        tied.sum().backward()


@case
def under_checkpointing(on: Rank) -> None:
    """The forward is made again, and with it the exchange."""
    p, rows = problem(), on.layouts()[0]
    whole, shard = run(p, "g"), on.rows(p.weight, rows)
    bias = on.rows(p.bias, rows)

    def lp(hidden: torch.Tensor) -> torch.Tensor:
        return ff.linear_token_logprobs(
            hidden, shard, p.targets, bias=bias, ignore_index=IGNORE, group=on.group, vocab_size=V
        )

    for reentrant in (False, True):
        hidden = leaf(p.hidden)
        out = checkpoint(lp, hidden, use_reentrant=reentrant)
        out.backward(p.upstream[0])
        torch.testing.assert_close(hidden.grad, whole.hidden, rtol=0, atol=1e-11)


@case
def what_wants_no_gradient(on: Rank) -> None:
    p, rows = problem(), on.layouts()[0]
    whole, shard = run(p, "g"), on.rows(p.weight, rows)
    options = {"ignore_index": IGNORE, "group": on.group, "vocab_size": V}
    options["bias"] = on.rows(p.bias, rows)
    with torch.no_grad():
        lp = ff.linear_token_logprobs(leaf(p.hidden), leaf(shard), p.targets, **options)
    assert not lp.requires_grad
    torch.testing.assert_close(lp, whole.lp, rtol=0, atol=1e-12)
    hidden, weight = leaf(p.hidden), leaf(shard)
    ff.linear_token_logprobs(hidden, shard, p.targets, **options).backward(p.upstream[0])
    torch.testing.assert_close(hidden.grad, whole.hidden, rtol=0, atol=1e-11)
    ff.linear_token_logprobs(p.hidden, weight, p.targets, **options).backward(p.upstream[0])
    torch.testing.assert_close(weight.grad, on.rows(whole.weight, rows, 0.0), rtol=0, atol=1e-11)


@case
def shapes_and_types_of_targets(on: Rank) -> None:
    p, rows = problem(), on.layouts()[0]
    shard = on.rows(p.weight, rows)
    options = {"ignore_index": IGNORE, "vocab_size": V, "group": on.group}
    flat = ff.linear_token_logprobs(p.hidden, shard, p.targets, **options)
    for targets in (p.targets.int(), p.targets.to(torch.uint8)):
        assert torch.equal(ff.linear_token_logprobs(p.hidden, shard, targets, **options), flat)
    square = ff.linear_token_logprobs(
        p.hidden[:20].view(4, 5, H), shard, p.targets[:20].view(4, 5), **options
    )
    assert torch.equal(square, flat[:20].view(4, 5))
    none = ff.linear_token_logprobs(p.hidden[:0], shard, p.targets[:0], **options)
    assert none.shape == (0,)
    ignored = ff.linear_token_logprobs(
        p.hidden, shard, torch.full_like(p.targets, IGNORE), **options
    )
    assert not ignored.any()


@case
def under_autocast(on: Rank) -> None:
    p, rows = problem(torch.float32), on.layouts()[0]
    truth = run(Problem(p.hidden.double(), p.weight.double(), p.targets, p.bias.double(),
                        [x.double() for x in p.upstream]))  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = on.run(p, rows), eager(p)
    for name in Results._fields:
        a, e, t = (getattr(x, name) for x in (ours, plain, truth))
        if name in ("weight", "bias"):
            e, t = (on.rows(x, rows, 0.0) for x in (e, t))
        check(name, a, e, t, torch.bfloat16)


@case
def losses_of_log_probabilities(on: Rank) -> None:
    p, rows = problem(), on.layouts()[0]
    old = p.upstream[1][:20] - 3

    def losses(lp: torch.Tensor) -> list[torch.Tensor]:
        lp = lp[:20].view(4, 5)
        sums = ff.sequence_logprobs(lp)
        return [
            -lp.sum() / (p.targets[:20] != IGNORE).sum(),
            ff.policy_loss(lp, old_logprobs=old.view(4, 5), advantages=p.upstream[2][:4]).loss,
            ff.preference_loss(sums[:2], sums[2:], sums[:2].detach(), sums[2:].detach()).loss,
        ]

    def gradients(weight: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        found = []
        for i in range(3):
            hidden = leaf(p.hidden)
            lp = ff.linear_token_logprobs(hidden, weight, p.targets, ignore_index=IGNORE, **options)
            loss = losses(lp)[i]
            found += [loss.detach(), *torch.autograd.grad(loss, hidden)]
        return found

    whole = gradients(p.weight)
    ours = gradients(on.rows(p.weight, rows), group=on.group, vocab_size=V)
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    cross_entropy = ff.linear_cross_entropy(
        p.hidden[:20], p.weight, p.targets[:20], ignore_index=IGNORE
    )
    torch.testing.assert_close(ours[0], cross_entropy, rtol=0, atol=1e-12)


@case
def other_groups(on: Rank) -> None:
    """The rank that counts is that in the group."""
    members = [0, 1] if on.ranks == 2 else [0, 2] if on.rank % 2 == 0 else [1, 3]
    groups = [dist.new_group(ranks) for ranks in ([[0, 1]] if on.ranks == 2 else [[0, 2], [1, 3]])]
    mine = groups[0 if members[0] == 0 else 1]
    inner = Rank(mine, 2, members.index(on.rank))
    p, rows = problem(), 20
    inner.compare(inner.run(p, rows), run(p), rows)
    if on.ranks == 4:
        theirs = dist.new_group([0, 1])
        if on.rank > 1:
            with pytest.raises(TypeError, match="group: a torch.distributed.ProcessGroup"):
                Rank(theirs, 2, 0).run(p, rows)


# ---- the processes ------------------------------------------------------------------------------


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks,
        timeout=TIMEOUT,
    )  # fmt: skip
    failures: dict[str, str] = {}
    for name, function in CASES.items():
        group = dist.new_group(
            timeout=TIMEOUT
        )  # what a rank that failed left behind is not the next case's
        try:
            function(Rank(group, ranks, rank))
        except BaseException:
            failures[name] = traceback.format_exc()
    torch.save(failures, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def failures(request: pytest.FixtureRequest, tmp_path_factory: Any) -> dict[str, str]:
    """By case, what went wrong on which rank."""
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    # once for all, what a process would import on its first backward included
    preload = ["finefuse.linear", "torch.testing", "torch.fx.experimental.symbolic_shapes"]
    multiprocessing.set_forkserver_preload(preload)
    torch.multiprocessing.start_processes(
        _rank, (ranks, str(folder)), nprocs=ranks, start_method="forkserver"
    )
    found: dict[str, str] = {}
    for rank in range(ranks):
        for name, text in torch.load(folder / f"{rank}.pt").items():
            found[name] = found.get(name, "") + f"\nrank {rank} of {ranks}:\n{text}"
    return found


@pytest.mark.parametrize("name", CASES)
def test_ranks(failures, name):
    assert name not in failures, failures[name]


# ---- one process --------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_on_every_backend(alone, place):
    """Those that have rows of logits as the CPU's have them: the rest is plain torch."""
    if place.backend == "eager":
        pytest.skip("a group is refused there: see test_not_eagerly")
    p, on = problem(torch.float32), Rank(alone, 1, 0)
    with ff.backend("auto"):
        truth = run(p)
    p = Problem(*place.put(*p[:4]), place.put(*p.upstream))
    on.compare(Results(*(x.cpu() for x in on.run(p, 40))), truth, 40, 2e-6)


def test_a_group_of_one(alone):
    p = problem()
    for a, b in zip(run(p, group=alone), run(p), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    on = Rank(alone, 1, 0)
    on.compare(on.run(p, 40), run(p), 40)


def test_graph_breaks_under_compile(alone):
    p = problem(torch.float32)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        lp = ff.linear_token_logprobs(
            2 * hidden, weight, p.targets, ignore_index=IGNORE, group=alone, vocab_size=V
        )
        return lp.sin().sum()

    weight = Rank(alone, 1, 0).rows(p.weight, 40)
    results = []
    for function in (loss, torch.compile(loss, backend="eager")):
        hidden, leaf_weight = leaf(p.hidden), leaf(weight)
        out = function(hidden, leaf_weight)
        out.backward()
        results.append((out.detach(), hidden.grad, leaf_weight.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend="eager", fullgraph=True)(p.hidden, weight)


def test_not_eagerly(alone):
    p = problem()
    with (
        ff.backend("eager"),
        pytest.raises(ValueError, match="group: not with the backend 'eager'"),
    ):
        ff.linear_token_logprobs(p.hidden, p.weight, p.targets, group=alone)


def test_wrong_groups(alone):
    p = problem()
    for group in ("gloo", 0, dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(TypeError, match="group: a torch.distributed.ProcessGroup"):
            ff.linear_token_logprobs(p.hidden, p.weight, p.targets, group=group)
    for vocab_size in (V + 1, 0):
        with pytest.raises(ValueError, match=rf"vocab_size: {vocab_size}; allowed: 1 "):
            ff.linear_token_logprobs(
                p.hidden, p.weight, p.targets, group=alone, vocab_size=vocab_size
            )
    with pytest.raises(TypeError, match="weight"):
        ff.linear_token_logprobs(p.hidden, None, p.targets, group=alone)


def test_not_initialised(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    group = dist.group.WORLD
    dist.destroy_process_group()
    p = problem()
    with pytest.raises(ValueError, match="group: torch.distributed is not initialised"):
        ff.linear_token_logprobs(p.hidden, p.weight, p.targets, group=group)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_vocab_size_without_a_group(backend):
    p = problem()
    on = Rank(None, 1, 0)
    with ff.backend(backend):
        on.compare(on.run(p, 40), run(p), 40)
        q = ff.quantize(torch.randn(40, H), blocksize=64)  # 37·16 elements: within a block
        dense = ff.dequantize(q)[:V]
        hidden = p.hidden.float()
        options = {"bias": on.rows(p.bias, 40).float(), "ignore_index": IGNORE, "vocab_size": V}
        ours = ff.linear_token_logprobs(hidden, q, p.targets, **options)
        options |= {"bias": p.bias.float(), "vocab_size": None}
        whole = ff.linear_token_logprobs(hidden, dense, p.targets, **options)
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-5)
        targets = p.targets.clone()
        targets[3] = V
        with pytest.raises(ValueError, match=f"targets: element 3 is {V}; allowed are 0 to 36"):
            ff.linear_token_logprobs(p.hidden, on.rows(p.weight, 40), targets, vocab_size=V)
    for value in (0, 41):
        with pytest.raises(ValueError, match=f"vocab_size: {value}; allowed: 1 to 40"):
            ff.linear_token_logprobs(hidden, q, p.targets, vocab_size=value)
    for value in (37.0, True, "37"):
        with pytest.raises(TypeError, match="vocab_size: an int"):
            ff.linear_token_logprobs(hidden, q, p.targets, vocab_size=value)


def test_the_composite_takes_vocab_size():
    p = problem()
    weight = Rank(None, 1, 0).rows(p.weight, 40)
    ours = torch.ops.finefuse.linear_token_logprobs(
        p.hidden, weight, p.targets, ignore_index=IGNORE, vocab_size=V
    )
    whole = ff.linear_token_logprobs(p.hidden, p.weight, p.targets, ignore_index=IGNORE)
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-12)
