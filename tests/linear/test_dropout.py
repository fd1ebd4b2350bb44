"""Dropout without a mask: every implementation makes the same bits of keep from one seed, in forward and
backward; the seed comes from torch's generator and is all that is kept; the bits look like independent draws.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from accuracy import Budget, assert_same, check_budget
from conftest import TRITON, implementation_cases
from kernel_plans import grid, implementation_and_plan_cases, pin, pin_by_name
from saved import Saved
from torch.utils.checkpoint import checkpoint

from lorafa_kernels import LoRAFALinear, lorafa_linear
from lorafa_kernels.checks.budget import Operands, draw_operands, lorafa_results, plain_formula
from lorafa_kernels.linear import ops
from lorafa_kernels.operands import draw_seed
from lorafa_kernels.philox import keep_chunks, keep_mask, philox4x32, threshold
from lorafa_kernels.plan.config import KernelConfig, KernelPlan

pytestmark = pytest.mark.numerics

if TRITON:
    import triton
    import triton.language as tl

    from lorafa_kernels.kernels.tile import dropout_arguments, keep_tile

    @triton.jit(do_not_specialize=["threshold"])
    def keep_kernel(
        out_ptr, seed_ptr, threshold, row0, first, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
    ):
        rows = row0 + tl.arange(0, ROWS).to(tl.int64)
        keep = keep_tile(tl.load(seed_ptr), threshold, rows, first, columns, BLOCK)
        index = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(out_ptr + index, keep.to(tl.int8))


P = [0.1, 0.5, 0.999]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


def implementations(test):
    """Run a test with every implementation, and with the Triton kernels that small shapes do not choose."""
    cases = pytest.mark.parametrize(
        ("device", "impl", "plan"), implementation_and_plan_cases(), indirect=["plan"]
    )
    return pytest.mark.usefixtures("plan")(cases(test))


# For what does not depend on the plan, and takes long.
by_implementation = pytest.mark.parametrize(("device", "impl"), implementation_cases())


@pytest.fixture
def plan(request, monkeypatch) -> str | None:
    pin_by_name(monkeypatch, request.param)
    return request.param


def seed_of(value: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64, device=device)


def python_keep(seed: int, p: float, row: int, column: int, K: int) -> bool:
    """keep of one element in Python's integers, from the definition of Philox4x32-10."""
    counter = row * -(-K // 4) + column // 4
    c = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    k = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high_1, low_1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high_1 ^ c[1] ^ k[0], low_1, high_0 ^ c[3] ^ k[1], low_0]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return c[column % 4] >= min(round(p * 2**32), 2**32 - 1)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_philox(device, counter, key, words):
    """The vectors that the authors of Philox publish with it (Random123, kat_vectors)."""

    def tensors(values):
        return tuple(torch.tensor([value], device=device) for value in values)

    assert [word.item() for word in philox4x32(tensors(counter), tensors(key))] == words


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("row0", [0, 3, 2**32 - 2, 2**41])
@pytest.mark.parametrize("K", [1, 6, 8])
def test_mask_is_its_definition(device, seed, row0, K):
    """Also where the counter passes 2³² within the tile, and where its high word is not zero."""
    for p in P:
        got = keep_mask(seed_of(seed, device), p, 5, K, row0)
        want = [[python_keep(seed, p, row0 + row, column, K) for column in range(K)] for row in range(5)]
        assert got.tolist() == want


def test_parts_are_the_mask(device, monkeypatch):
    """In chunks of any size, of no rows and of no columns."""
    seed = seed_of(7, device)
    whole = keep_mask(seed, 0.5, 50, 13)
    assert torch.equal(keep_mask(seed, 0.5, 20, 13, row0=30), whole[30:])
    for size in (1, 9, 40):
        monkeypatch.setattr("lorafa_kernels.philox.CHUNK", size)
        parts = list(keep_chunks(seed, 0.5, 50, 13))
        assert len(parts) > 1 and torch.equal(torch.cat([keep for _, keep in parts]), whole)
        assert torch.equal(keep_mask(seed, 0.5, 50, 13), whole)
    assert keep_mask(seed, 0.5, 0, 13).shape == (0, 13) and keep_mask(seed, 0.5, 3, 0).shape == (3, 0)


def test_threshold_at_both_ends():
    """Nothing is dropped by a p too small for 32 bits, and the largest p keeps one word in 2³²."""
    assert threshold(1e-12) == 0 and threshold(0.5) == 2**31
    assert threshold(1 - 1e-12) == threshold(1 - 2**-33) == 2**32 - 1
    assert keep_mask(seed_of(3), 1e-12, 100, 100).all()


def revealed(impl: str, p: float, M: int, K: int, seed: torch.Tensor, dtype=torch.float32) -> list:
    """keep as it was applied: to x, by z for lora_A the identity; to dz lora_A, by dx; and without dB."""
    device = seed.device

    def full(*shape, value=1.0):
        return torch.full(shape, value, dtype=dtype, device=device)

    eye = torch.eye(K, dtype=dtype, device=device)
    _, z = ops.forward(full(M, K), full(8, K), eye, full(8, K), None, 1.0, impl, p, seed)
    found = [z != 0]
    arguments = full(8, K, value=0.0), full(1, K), full(8, 1), 1.0, impl, p, seed
    found.append(ops.backward(full(M, 8), full(M, 1), *arguments)[0] != 0)
    found.append(ops.backward_input(full(M, 8), *arguments) != 0)
    return found


@pytest.mark.usefixtures("plan")
@grid(
    ("device,impl,plan", implementation_and_plan_cases()),
    ("p", P),
    ("shape", [(37, 43), (70, 72), (1, 1)]),
    indirect=["plan"],
    each_once=True,
)
def test_same_mask_in_every_implementation(device, impl, p, shape):
    """Forward and backward; K is no multiple of 4, or one that TMA can address."""
    for dtype, value in zip((torch.float32, torch.bfloat16), SEEDS[-2:], strict=True):
        seed = seed_of(value, device)
        want = keep_mask(seed, p, *shape)
        for got in revealed(impl, p, *shape, seed, dtype):
            assert torch.equal(got, want)


BLOCKS = {
    "small": KernelPlan(
        shrink=KernelConfig(16, 0, 16, 16, 1, 4, 2), expand=KernelConfig(16, 16, 16, 16, 1, 4, 2)
    ),
    "wide": KernelPlan(
        shrink=KernelConfig(64, 0, 128, 64, 1, 4, 1), expand=KernelConfig(32, 128, 32, 16, 2, 4, 2)
    ),
    "tall-split": KernelPlan(
        shrink=KernelConfig(128, 0, 32, 16, 1, 4, 2, SPLIT_K=3), expand=KernelConfig(128, 32, 16, 32, 8, 4, 2)
    ),
    "two-passes": KernelPlan(
        shrink=KernelConfig(32, 0, 64, 32, 1, 4, 2),
        expand=KernelConfig(64, 64, 32, 16, 8, 4, 2),
        one_pass=False,
    ),
}


@pytest.mark.parametrize("blocks", BLOCKS)
def test_same_mask_for_any_blocks(monkeypatch, triton_device, blocks):
    pin(monkeypatch, BLOCKS[blocks])
    M, K = 136, 43
    seed = seed_of(5, triton_device)
    want = keep_mask(seed, 0.5, M, K)
    for got in revealed("triton", 0.5, M, K, seed, torch.float16):
        assert torch.equal(got, want)


@implementations
def test_same_mask_for_any_strides(device, impl):
    """A mask belongs to rows and columns, not to addresses: transposed, stepped and repeated x."""
    M, K = 40, 22
    seed = seed_of(9, device)
    eye = torch.eye(K, device=device)
    zeros = torch.zeros(4, K, device=device)
    want = keep_mask(seed, 0.5, M, K)
    ones = torch.ones(M, 2 * K, device=device)
    for x in (ones[:, ::2], ones[:, :K].t().contiguous().t(), torch.ones(1, 1, device=device).expand(M, K)):
        _, z = ops.forward(x, zeros, eye, torch.zeros(4, K, device=device), None, 1.0, impl, 0.5, seed)
        assert torch.equal(z != 0, want)


@pytest.mark.parametrize("row0", [0, 2**31 - 3, 2**32 - 3, 2**40 + 5])
def test_device_helper_past_32_bits(triton_device, row0):
    """Rows and counters past 2³¹ and 2³², where no tensor of a test can reach; any first column."""
    for (value, K), column0 in itertools.product(zip(SEEDS[-2:], (4 * 16 + 3, 64), strict=True), (0, 16)):
        out = torch.empty(8, 32, dtype=torch.int8, device=triton_device)
        seed = seed_of(value, triton_device)
        arguments = dropout_arguments(0.5, seed)
        keep_kernel[(1,)](out, *arguments, row0, column0, K, ROWS=8, BLOCK=32)
        want = keep_mask(seed, 0.5, 8, K, row0)[:, column0 : column0 + 32]
        assert torch.equal(out.bool(), want)


class Pairs:
    """Counts pairs of draws, each kept with probability q, and says by how many standard deviations their
    covariance differs from 0.
    """

    def __init__(self, q: float) -> None:
        self.q, self.both, self.one, self.count = q, 0, 0, 0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.both += torch.count_nonzero(a & b).item()
        self.one += torch.count_nonzero(a).item() + torch.count_nonzero(b).item()
        self.count += a.numel()

    @property
    def sigmas(self) -> float:
        q = self.q
        covariance = self.both - q * self.one + q * q * self.count
        return covariance / (q * (1 - q) * self.count**0.5)


@pytest.mark.parametrize(
    ("M", "K"),
    [
        pytest.param(1201, 1193, id="6·10⁶"),
        pytest.param(5003, 4999, id="10⁸", marks=pytest.mark.slow),
    ],
)
def test_draws_look_independent(M, K):
    """So many draws: the keep rate of all, of rows and of columns, and the covariance of neighbours in rows
    and in columns, of neighbouring seeds and of the seeds that two layers draw, within 4 standard deviations.
    """
    p = 0.1
    seeds = [seed_of(41), seed_of(42), draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))]
    least = threshold(p)
    q = 1 - least / 2**32
    pairs = {name: Pairs(q) for name in ("seeds", "layers", "seed and layer")}
    pairs |= {f"rows {lag} apart": Pairs(q) for lag in (1, 2, 3)}
    pairs |= {f"columns {lag} apart": Pairs(q) for lag in (1, 2, 3, 4, 5, 8)}
    per_column, per_row = torch.zeros(4, K, dtype=torch.int64), torch.zeros(4, M, dtype=torch.int64)
    for parts in zip(*(keep_chunks(seed, p, M, K) for seed in seeds), strict=True):
        masks = [keep for _, keep in parts]
        pairs["seeds"].add(masks[0], masks[1])
        pairs["layers"].add(masks[2], masks[3])
        pairs["seed and layer"].add(masks[0], masks[2])
        # The neighbours within a mask: of one mask after the other, so that all draws count.
        for index, (rows, keep) in enumerate(parts):
            per_column[index] += keep.sum(0)
            per_row[index, rows] = keep.sum(1)
        for lag in (1, 2, 3):
            pairs[f"rows {lag} apart"].add(masks[0][lag:], masks[0][:-lag])
        for lag in (1, 2, 3, 4, 5, 8):
            pairs[f"columns {lag} apart"].add(masks[0][:, lag:], masks[0][:, :-lag])
    draws = 4 * M * K
    found = {name: pair.sigmas for name, pair in pairs.items()}
    found["keep rate"] = (per_row.sum().item() - q * draws) / (q * (1 - q) * draws) ** 0.5
    for name, counts, size in (("rates of rows", per_row, K), ("rates of columns", per_column, M)):
        # The sum of squares of n standard normal numbers has mean n and variance 2n.
        squares = ((counts - q * size).square().sum() / (q * (1 - q) * size)).item()
        found[name] = (squares - counts.numel()) / (2 * counts.numel()) ** 0.5
    assert all(abs(sigmas) < 4 for sigmas in found.values()), found


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_gradient_by_finite_differences(impl, p):
    inputs = draw_operands(5, 6, 7, 3, torch.float64, "cpu", dropout_p=p)

    def function(x, lora_B):
        with inputs.seeded():
            return lorafa_linear(
                x, inputs.weight, inputs.lora_A, lora_B, inputs.bias, scaling=0.7, dropout_p=p, impl=impl
            )

    assert 0 < (inputs.mask() == 0).sum() < inputs.x.numel()
    assert torch.autograd.gradcheck(function, (inputs.x.requires_grad_(), inputs.lora_B.requires_grad_()))


# Of 1,000 elements of x one is kept at p = 0.999, and makes nearly all of the result: so many that an error
# means something.
FORMULAS = [
    pytest.param(0.999, (512, 500, 32, 8), id="0.999"),
    pytest.param(0.1, (70, 44, 56, 6), id="0.1"),
    pytest.param(0.5, (70, 44, 56, 6), id="0.5"),
]


@pytest.mark.usefixtures("plan")
@grid(
    ("device,impl,plan", implementation_and_plan_cases()),
    ("p,shape", FORMULAS),
    indirect=["plan"],
    each_once=True,
)
def test_results_are_those_of_the_formula_with_this_mask(device, impl, p, shape):
    inputs = draw_operands(*shape, torch.float32, device, dropout_p=p)
    budget = Budget()
    budget.add(inputs, lorafa_results(inputs, impl))
    budget.check()


def make_layer(device: str, impl: str, p: float = 0.25, dtype=torch.float32) -> LoRAFALinear:
    layer = LoRAFALinear(20, 28, r=4, lora_dropout=p, init_lora_weights=False, device=device, dtype=dtype)
    layer.impl = impl
    return layer


@by_implementation
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradient(device, impl, use_reentrant):
    """The seed is drawn again in the recomputation, from the generator's state of the first time."""
    layers = torch.nn.Sequential(make_layer(device, impl), torch.nn.Linear(28, 20, device=device))
    layers.append(make_layer(device, impl))
    x = torch.randn(12, 20, device=device, requires_grad=True)

    def gradients(run):
        torch.manual_seed(5)
        y = run(x)
        torch.rand(3, device=device)  # what comes after the layers does not matter
        wanted = (x, layers[0].lora_B, layers[2].lora_B)
        for leaf in wanted:
            leaf.grad = None
        y.square().sum().backward()
        return [y.detach(), *(leaf.grad for leaf in wanted)]

    plain = gradients(layers)
    again = gradients(lambda x: checkpoint(layers, x, use_reentrant=use_reentrant))
    for got, want in zip(again, plain, strict=True):
        assert torch.equal(got, want)


@implementations
def test_manual_seed_reproduces_and_calls_differ(device, impl):
    layer = make_layer(device, impl)
    x = torch.randn(12, 20, device=device)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first) and torch.equal(layer(x), second)
    assert not torch.equal(first, second), "each call drops something else"


def generator_state(device: str) -> torch.Tensor:
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()


@implementations
def test_no_dropout_draws_and_keeps_nothing(device, impl):
    """p = 0 and eval(): the generator does not move, no seed is kept, and the bits are the same."""
    x = torch.randn(12, 20, device=device, requires_grad=True)
    dropping = make_layer(device, impl).eval()
    plain = make_layer(device, impl, p=0.0)
    plain.load_state_dict(dropping.state_dict())
    before = generator_state(device)
    results = []
    for layer in (dropping, plain):
        with Saved() as saved:
            y = layer(x)
        assert [tensor.shape for tensor in saved.tensors] == [(12, 4), (28, 20), (4, 20), (28, 4)]
        results.append((y, *torch.autograd.grad(y.sum(), (x, layer.lora_B))))
    assert torch.equal(generator_state(device), before)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    dropping.train()(x)
    assert not torch.equal(generator_state(device), before), "training draws one seed"


@implementations
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_keeps_z_the_seed_and_the_objects(device, impl, autocast):
    layer = make_layer(device, impl)
    x = torch.randn(3, 4, 20, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16, enabled=autocast), Saved() as saved:
        y = layer(x)
    z, *objects, seed = saved.tensors
    assert z.shape == (12, 4) and z.untyped_storage().nbytes() == 48 * z.dtype.itemsize
    assert [id(t) for t in objects] == [id(layer.weight), id(layer.lora_A), id(layer.lora_B)]
    assert seed.dtype == torch.int64 and seed.shape == (1,) and seed.untyped_storage().nbytes() == 8
    assert seed.device == x.device
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and layer.lora_B.grad.dtype == torch.float32


@implementations
def test_first_layer_keeps_no_seed(device, impl):
    """Without dx the mask is needed no more: it is in z."""
    layer = make_layer(device, impl)
    with Saved() as saved:
        y = layer(torch.randn(12, 20, device=device))
    z, lora_B = saved.tensors
    assert z.shape == (12, 4) and lora_B is layer.lora_B
    y.sum().backward()
    assert layer.lora_B.grad is not None


@implementations
def test_frozen_lora_B_keeps_the_seed_and_no_z(device, impl):
    layer = make_layer(device, impl)
    layer.lora_B.requires_grad_(False)
    x = torch.randn(16, 20, device=device, requires_grad=True)
    dy = torch.randn(16, 28, device=device)
    torch.manual_seed(1)
    with Saved() as saved:
        y = layer(x)
    assert [t.numel() for t in saved.tensors] == [560, 80, 112, 1]
    (dx,) = torch.autograd.grad(y, x, dy)
    layer.lora_B.requires_grad_(True)
    torch.manual_seed(1)
    both, _ = torch.autograd.grad(layer(x), (x, layer.lora_B), dy)
    factors = (t.detach() for t in (x, layer.weight, layer.lora_A, layer.lora_B, layer.bias))
    inputs = Operands(*factors, dy, layer.scaling, layer.lora_dropout, torch_seed=1)
    exact, plain = plain_formula(inputs, torch.float64), plain_formula(inputs)
    check_budget({"dx": dx}, {"dx": exact["dx"]}, {"dx": plain["dx"]})
    if impl != "triton":  # whose kernels may make dz together with dB
        assert_same(dx, both)


@implementations
def test_training_forward_without_gradients_drops_out(device, impl):
    layer = make_layer(device, impl)
    x = torch.randn(12, 20, device=device)
    torch.manual_seed(2)
    with torch.no_grad():
        got = layer(x)
    torch.manual_seed(2)
    assert torch.equal(got, layer(x).detach())
    assert not torch.equal(got, layer.eval()(x))


@implementations
def test_autocast_computes_what_casts_by_hand_do(device, impl):
    layer = make_layer(device, impl)
    x = torch.randn(12, 20, device=device)
    torch.manual_seed(2)
    with torch.autocast(device, torch.bfloat16):
        got = layer(x)
    torch.manual_seed(2)
    by_hand = lorafa_linear(
        x.bfloat16(),
        layer.weight.bfloat16(),
        layer.lora_A,
        layer.lora_B.detach(),
        layer.bias.bfloat16(),
        scaling=layer.scaling,
        dropout_p=0.25,
        impl=impl,
    )
    assert torch.equal(got, by_hand)


@implementations
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_propagate(device, impl, bad):
    """A dropped NaN or Inf reaches z, as in the plain formula, where 0 · NaN is NaN; no other row."""
    inputs = draw_operands(20, 16, 24, 3, torch.float32, device, dropout_p=0.5)
    mask = inputs.mask()
    row, column = (mask == 0).nonzero()[0].tolist()
    inputs.x[row, column] = bad
    inputs.dy[9, 5] = bad
    got, want = lorafa_results(inputs, impl), lorafa_results(inputs, "reference")
    for name in ("y", "dx", "dB"):
        assert torch.equal(torch.isfinite(got[name]), torch.isfinite(want[name])), name
    assert not torch.isfinite(got["dB"]).any() and torch.isfinite(got["y"]).any()


@implementations
def test_retain_graph_twice(device, impl):
    layer = make_layer(device, impl)
    x = torch.randn(12, 20, device=device, requires_grad=True)
    y = layer(x)
    first = torch.autograd.grad(y.sum(), (x, layer.lora_B), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, layer.lora_B))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@implementations
@pytest.mark.parametrize("shape", [(0, 20), (20,), (2, 3, 20)], ids=str)
def test_shapes_of_x(device, impl, shape):
    layer = make_layer(device, impl)
    x = torch.randn(shape, device=device, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 28)
    y.sum().backward()
    assert x.grad.shape == shape and torch.isfinite(layer.lora_B.grad).all()


@by_implementation
@pytest.mark.parametrize("name", ["forward", "backward", "backward_input"])
def test_opcheck(device, impl, name):
    i = draw_operands(10, 14, 16, 3, torch.bfloat16, device, factor_dtype=torch.float32)
    z = torch.randn(10, 3, device=device, dtype=torch.bfloat16)
    how = 0.5, impl, 0.25, seed_of(11, device)
    arguments = {
        "forward": (i.x, i.weight, i.lora_A, i.lora_B, i.bias, *how),
        "backward": (i.dy, z, i.weight, i.lora_A, i.lora_B, *how),
        "backward_input": (i.dy, i.weight, i.lora_A, i.lora_B, *how),
    }[name]
    torch.library.opcheck(getattr(torch.ops.lorafa_kernels, name).default, arguments)


@by_implementation
def test_compile_fullgraph(device, impl):
    """Compiled without a break, the layer draws the seed that eager mode draws, for any number of rows."""
    torch._dynamo.reset()
    layer = make_layer(device, impl)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        x = torch.randn(rows, 20, device=device)
        results = []
        for module in (layer, compiled):
            torch.manual_seed(rows)
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            results.append((y, *torch.autograd.grad(y.square().sum(), (leaf, layer.lora_B))))
        assert_same(results[1], results[0])


def test_compile_with_inductor():
    """Inductor has a generator of its own: values are another draw's, of the same distribution, and backward
    drops what forward dropped.
    """
    torch._dynamo.reset()
    p, K = 0.25, 48
    layer = LoRAFALinear(K, K, False, r=K, lora_dropout=p, lora_alpha=K, init_lora_weights=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(K))
        layer.lora_B.copy_(torch.eye(K))
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.ones(64, K, requires_grad=True)
    y = compiled(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    count = y.numel()
    assert abs((y != 0).sum().item() - (1 - p) * count) < 4 * (p * (1 - p) * count) ** 0.5
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, y), "the mask of backward is that of forward"
    assert not torch.equal(compiled(x), y)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_cuda_graph_draws_anew_in_each_replay(impl):
    layer = make_layer("cuda", impl)
    x = torch.randn(64, 20, device="cuda")
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        found = []
        for _ in range(3):
            graph.replay()
            found.append(y.clone())
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
