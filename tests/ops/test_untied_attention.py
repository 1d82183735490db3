"""Fast paths of untied attention against the table written out."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import InputError
from memlm.ops.untied_attention import Sight, fold, position_scores, untied_attention
from memlm.positions.ids import position_ids_of
from memlm.positions.scheme import SCHEMES, PositionScheme
from memlm.positions.untied import UntiedPositions

HEADS, DIM = 2, 8
MADE_HERE = [name for name, scheme in SCHEMES.items() if scheme.absolute == "untied"]
MADE_HERE.append("bert-r")


def positions_of(name, *, bidirectional=True, length=32, dtype=torch.float32):
    torch.manual_seed(3)
    made = UntiedPositions(
        HEADS * DIM, HEADS, PositionScheme.named(name), max_positions=length, num_buckets=8,
        max_distance=20, bidirectional=bidirectional,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made.to(dtype).eval()


def content(batch, queries, time, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, HEADS, size, DIM) for size in (queries, time, time)]
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def sights(batch, time):
    lengths = torch.tensor([time, max(1, time // 2), max(1, time - 1)])[:batch]
    right = torch.arange(time) < lengths[:, None]
    yield "everything", Sight(), None
    yield "right padding", Sight(valid=right), None
    yield "left padding", Sight(valid=right.flip(-1)), position_ids_of(right.flip(-1))
    documents = (torch.arange(time) >= lengths[:, None] // 2).long()
    packed = position_ids_of(torch.ones_like(documents), documents)
    yield "packing", Sight(documents=documents), packed
    yield "packing and padding", Sight(valid=right, documents=documents), packed
    yield "causal", Sight(causal=True), None
    prefix = torch.arange(time) < lengths[:, None, None, None] // 2
    past = torch.ones(time, time, dtype=torch.bool).tril()
    yield "prefix", Sight(visible=prefix | past), None


def both(name, impl, time, sight, ids, device="cpu", dtype=torch.float32):
    """What an implementation gives on a device, and the reference in float32; rows that count."""
    query, key, value = content(3, time, time)
    arguments = {"sight": sight, "scale": (2 * DIM) ** -0.5 if name != "bert-r" else DIM**-0.5}
    exact = positions_of(name, bidirectional=not sight.causal)
    assert exact.scale == pytest.approx(arguments["scale"])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex says that it is not fused on a CPU
        terms = exact(time, position_ids=ids)
        wanted = untied_attention(query, key, value, terms, **arguments, impl="reference")
        made = positions_of(name, bidirectional=not sight.causal, dtype=dtype).to(device)
        there = [None if part is None else part.to(device) for part in (ids, sight.valid,
                 sight.documents, sight.visible)]  # fmt: skip
        arguments["sight"] = Sight(there[1], there[2], sight.causal, there[3])
        found = untied_attention(
            *(part.to(device, dtype) for part in (query, key, value)),
            made(time, position_ids=there[0]),
            **arguments,
            impl=impl,
        )
    real = torch.ones(3, time, dtype=torch.bool) if sight.valid is None else sight.valid
    real = real[:, None].expand(-1, HEADS, -1)
    return found.float().cpu()[real], wanted[real]


@pytest.mark.parametrize("name", MADE_HERE)
@pytest.mark.parametrize("impl", ["folded", "flex"])
def test_fast_is_reference(name, impl):
    for time in (1, 2, 9, 24) if impl == "folded" else (9,):
        for label, sight, ids in sights(3, time):
            found, wanted = both(name, impl, time, sight, ids)
            torch.testing.assert_close(
                found, wanted, atol=1e-5, rtol=1e-5, msg=lambda m, x=label: x + m
            )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MADE_HERE)
@pytest.mark.parametrize("impl", ["folded", "flex"])
def test_on_a_gpu_it_is_reference(name, impl, dtype):
    for label, sight, ids in sights(3, 24):
        found, wanted = both(name, impl, 24, sight, ids, "cuda", dtype)
        difference = (found - wanted).abs()
        if dtype == torch.bfloat16:
            assert difference.mean() < 2e-2, label
        else:
            assert difference.max() < 2e-3, label


def test_bfloat16_is_near():
    for label, sight, ids in sights(3, 24):
        found, wanted = both("tupe-r", "folded", 24, sight, ids, dtype=torch.bfloat16)
        assert (found - wanted).abs().mean() < 2e-2, label


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tupe-a", "tupe-r"])
@pytest.mark.parametrize("impl", ["folded", "flex"])
def test_gradients_on_a_gpu(name, impl):
    found = {}
    for one in ("reference", impl):
        made = positions_of(name).cuda()
        query, key, value = (part.cuda() for part in content(2, 9, 9))
        query.requires_grad_()
        output = untied_attention(query, key, value, made(9), scale=made.scale, impl=one)
        output.square().sum().backward()
        found[one] = [query.grad, *(parameter.grad for parameter in made.parameters())]
    for fast, slow in zip(found[impl], found["reference"], strict=True):
        fast = torch.zeros_like(slow) if fast is None else fast
        torch.testing.assert_close(fast, slow, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("name", ["tupe-a", "tupe-r"])
def test_gradients_agree(name):
    found = {}
    for impl in ("reference", "folded"):
        made = positions_of(name, dtype=torch.float64)
        query, key, value = content(2, 9, 9, torch.float64)
        query.requires_grad_()
        valid = torch.arange(9) < torch.tensor([[9], [5]])
        output = untied_attention(
            query, key, value, made(9), scale=made.scale, sight=Sight(valid=valid), impl=impl
        )
        output[valid[:, None].expand(-1, HEADS, -1)].square().sum().backward()
        found[impl] = [query.grad, *(parameter.grad for parameter in made.parameters())]
    for name_, fast, slow in zip(
        ["query", *dict(made.named_parameters())], found["folded"], found["reference"], strict=True
    ):
        fast = torch.zeros_like(slow) if fast is None else fast
        if name_.startswith("query") and fast.ndim == 4:
            valid4 = valid[:, None, :, None]
            fast, slow = fast * valid4, slow * valid4
        torch.testing.assert_close(fast, slow, atol=1e-10, rtol=1e-8, msg=lambda m, n=name_: n + m)
    rows = made.positions.weight.grad
    assert rows[0].abs().max() < 1e-12 * rows[1].abs().max() + 1e-14  # theta_1 changes nothing
    assert (rows[10:] == 0).all()


def test_decoding_reads_the_last_rows():
    made = positions_of("tupe-r", bidirectional=False)
    query, key, value = content(2, 7, 7)
    with torch.no_grad():
        arguments = {"scale": made.scale, "sight": Sight(causal=True)}
        whole = untied_attention(query, key, value, made(7), **arguments)
        for number in (1, 3):
            part = untied_attention(query[:, :, -number:], key, value, made(7), **arguments)
            torch.testing.assert_close(part, whole[:, :, -number:])


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the shapes of all tensors that an operation makes."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(made):
            # views own nothing: only what is really held counts
            if (
                isinstance(one, torch.Tensor)
                and one.numel() <= one.untyped_storage().nbytes() // one.element_size()
            ):
                self.shapes.add(tuple(one.shape))
        return made


@pytest.mark.parametrize("name", ["tupe-a", "tupe-r"])
def test_no_table_per_batch_row(name):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, time = 3, 37
    made = positions_of(name, length=64)
    query, key, value = content(batch, time, time)
    valid = torch.arange(time) < torch.tensor([[37], [20], [5]])
    with torch.no_grad(), _Largest() as seen, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        untied_attention(
            query, key, value, made(time), scale=made.scale, sight=Sight(valid=valid), impl="folded"
        )
    squares = {shape for shape in seen.shapes if shape[-2:] == (time, time)}
    assert (batch, HEADS, time, time) not in squares
    if name == "tupe-a":
        assert not squares


@given(time=st.integers(1, 12), extra=st.integers(0, 6), name=st.sampled_from(MADE_HERE))
@settings(max_examples=25, deadline=None)
def test_longer_tables_begin_with_shorter_ones(time, extra, name):
    made = positions_of(name)
    with torch.no_grad():
        short = position_scores(made(time), time, made.scale)
        long = position_scores(made(time + extra), time + extra, made.scale)
    torch.testing.assert_close(long[..., :time, :time], short)


@given(st.integers(2, 12))
@settings(max_examples=15, deadline=None)
def test_the_reset(time):
    made = positions_of("tupe-r")
    with torch.no_grad():
        table = position_scores(made(time), time, made.scale)[0]
    assert (table[:, 0] == table[:, 0, :1]).all()
    assert (table[:, 1:, 0] == table[:, 1:2, 0]).all()
    tied = positions_of("tupe-a-tie-cls")
    with torch.no_grad():
        table = position_scores(tied(time), time, tied.scale)[0]
    assert (table[:, 0] != table[:, 0, :1]).any()


@given(st.permutations(list(range(6))))
@settings(max_examples=15, deadline=None)
def test_order_of_tokens_is_only_their_ids(order):
    made = positions_of("tupe-r")
    query, key, value = content(1, 6, 6)
    order = torch.tensor(order)
    with torch.no_grad():
        plain = untied_attention(query, key, value, made(6), scale=made.scale)
        moved = untied_attention(
            query[:, :, order], key[:, :, order], value[:, :, order],
            made(6, position_ids=order[None]), scale=made.scale,
        )  # fmt: skip
    torch.testing.assert_close(moved, plain[:, :, order], atol=1e-5, rtol=1e-5)


def test_bad_inputs():
    made = positions_of("tupe-a")
    query, key, value = content(1, 4, 4)
    with pytest.raises(InputError, match="impl must be"):
        untied_attention(query, key, value, made(4), scale=1.0, impl="fast")
    with pytest.raises(InputError, match="as many tokens as there are keys"):
        untied_attention(query, key, value, made(5), scale=1.0)
    with pytest.raises(InputError, match="queries must be the last"):
        untied_attention(key, query[:, :, :2], value[:, :, :2], None, scale=1.0)
    with pytest.raises(InputError, match="no attention dropout"):
        untied_attention(query, key, value, made(4), scale=1.0, dropout=0.1, impl="flex")
    assert fold(query, key, None, 1.0, Sight()) == (query, key)
