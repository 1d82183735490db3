"""Fast paths of untied attention against the table written out."""

import math
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
SOME = ("left padding", "packing and padding", "causal")  # for what is slow on a CPU


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


@pytest.mark.parametrize(
    ("name", "impl"), [*((name, "folded") for name in MADE_HERE), ("tupe-r", "flex")]
)
def test_bfloat16_is_near(name, impl):
    """Against the reference in float32 on the same rounded numbers."""
    for label, sight, ids in sights(3, 24):
        if impl == "flex" and label not in SOME:
            continue
        made = positions_of(name, bidirectional=not sight.causal, dtype=torch.bfloat16)
        parts = content(3, 24, 24, torch.bfloat16)
        arguments = {"scale": made.scale, "sight": sight}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # flex says that it is not fused on a CPU
            terms = made(24, position_ids=ids)
            found = untied_attention(*parts, terms, **arguments, impl=impl)
            assert found.dtype == torch.bfloat16
            exact = terms._replace(
                **{
                    part: value.float()
                    for part, value in terms._asdict().items()
                    if value is not None and value.is_floating_point()
                }
            )
            parts = [part.float() for part in parts]
            wanted = untied_attention(*parts, exact, **arguments, impl="reference")
        real = torch.ones(3, 24, dtype=torch.bool) if sight.valid is None else sight.valid
        real = real[:, None].expand(-1, HEADS, -1)
        assert (found.float() - wanted)[real].abs().max() < 2e-2, label


def gradients(name, impl, sight, ids, dtype=torch.float64, device="cpu"):
    """Of everything that learns, by name, from the outputs of real tokens."""
    time = 9
    made = positions_of(name, dtype=dtype, bidirectional=not sight.causal).to(device)
    parts = [part.to(device).requires_grad_() for part in content(3, time, time, dtype)]
    ids, valid, documents, visible = (
        None if part is None else part.to(device)
        for part in (ids, sight.valid, sight.documents, sight.visible)
    )
    sight = Sight(valid, documents, sight.causal, visible)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex says that it is not fused on a CPU
        output = untied_attention(
            *parts, made(time, position_ids=ids), scale=made.scale, sight=sight, impl=impl
        )
    real = torch.ones(3, time, dtype=torch.bool, device=device) if valid is None else valid
    output[real[:, None].expand(-1, HEADS, -1)].square().sum().backward()
    found = dict(zip(("q", "k", "v"), (part.grad for part in parts), strict=True))
    for weight, parameter in made.named_parameters():
        grad = parameter.grad
        found[weight] = torch.zeros_like(parameter) if grad is None else grad
    return {weight: grad.cpu() for weight, grad in found.items()}


def check_gradients(name, impl, dtype, atol, rtol, device="cpu", labels=None):
    """Of an implementation against the reference, for everything that may be seen."""
    for label, sight, ids in sights(3, 9):
        if labels and label not in labels:
            continue
        wanted = gradients(name, "reference", sight, ids, dtype, device)
        for weight, grad in gradients(name, impl, sight, ids, dtype, device).items():
            torch.testing.assert_close(
                grad, wanted[weight], atol=atol, rtol=rtol,
                msg=lambda m, x=f"{label}, {weight}: ": x + m,
            )  # fmt: skip


@pytest.mark.parametrize("name", MADE_HERE)
@pytest.mark.parametrize("block", [300, 2**22])
def test_gradients_agree(name, block, monkeypatch):
    monkeypatch.setattr("memlm.ops.untied_attention._BLOCK", block)
    check_gradients(name, "folded", torch.float64, 1e-10, 1e-8)


def test_gradients_of_flex_agree(monkeypatch):
    # torch refuses to learn with it on a CPU, where it can: unfused, as a forward pass is there
    monkeypatch.setattr("memlm.ops.untied_attention._check_flex", lambda *_: None)
    inside = "torch.nn.attention.flex_attention._validate_device"
    monkeypatch.setattr(inside, lambda *_: None, raising=False)
    check_gradients("tupe-r", "flex", torch.float32, 1e-4, 1e-4, labels=SOME)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MADE_HERE)
@pytest.mark.parametrize("impl", ["folded", "flex"])
def test_gradients_on_a_gpu(name, impl):
    check_gradients(name, impl, torch.float32, 2e-3, 1e-2, "cuda")


@pytest.mark.parametrize("name", ["tupe-a", "tupe-r"])
def test_what_learns_nothing(name):
    rows = gradients(name, "reference", Sight(), None)["positions.weight"]
    assert rows[1].abs().max() > 0
    assert rows[0].abs().max() < 1e-12 * rows[1].abs().max() + 1e-14  # theta_1
    assert (rows[10:] == 0).all()  # positions that no token has


@pytest.mark.parametrize("block", [100, 2**22])
def test_what_dropout_leaves_out_is_left_out_on_the_way_back(block, monkeypatch):
    monkeypatch.setattr("memlm.ops.untied_attention._BLOCK", block)
    made = positions_of("tupe-r", dtype=torch.float64)

    def attend(query, table):
        torch.manual_seed(5)
        terms = made(6)._replace(shared_bias=None, by_offset=table)
        parts = content(2, 6, 6, torch.float64)[1:]
        return untied_attention(query, *parts, terms, scale=made.scale, dropout=0.4)

    query = content(2, 6, 6, torch.float64)[0].requires_grad_()
    table = made(6).by_offset.detach().requires_grad_()
    assert torch.autograd.gradcheck(attend, (query, table))
    with torch.no_grad():
        dropped = torch.stack([attend(query, table) for _ in range(2)])
        assert torch.equal(*dropped)
        whole = untied_attention(
            query, *content(2, 6, 6, torch.float64)[1:], made(6), scale=made.scale
        )
        assert (dropped[0] - whole).abs().mean() > 0.05


@pytest.mark.parametrize("training", [False, True])
def test_terms_and_attention_are_one_compiled_graph(training, monkeypatch):
    """``fullgraph`` raises at any break; aot_eager traces the backward pass too."""
    monkeypatch.setattr("memlm.ops.untied_attention._BLOCK", 100)
    made = positions_of("tupe-r", bidirectional=False).train(training)

    def attend(*parts):
        return untied_attention(*parts, made(9), scale=made.scale, sight=Sight(causal=True))

    torch.compiler.reset()
    results = []
    for function in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        parts = [part.requires_grad_() for part in content(3, 9, 9)]
        output = function(*parts)
        output.square().sum().backward()
        results.append([output.detach(), *(part.grad for part in parts)])
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain)


def test_no_rows_no_output():
    made = positions_of("tupe-r")
    output = untied_attention(*content(0, 4, 4), made(4), scale=made.scale)
    assert output.shape == (0, HEADS, 4, DIM)


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
@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_table_per_batch_row(name, learning, packed, dropout, monkeypatch):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    monkeypatch.setattr("memlm.ops.untied_attention._BLOCK", 10_000)
    batch, time = 3, 101
    made = positions_of(name, length=128)
    parts = [part.requires_grad_() for part in content(batch, time, time)]
    sight, ids = Sight(valid=torch.arange(time) < torch.tensor([[time], [20], [5]])), None
    if packed:
        documents = (torch.arange(time) >= torch.tensor([[5], [20], [30]])).long()
        ids = position_ids_of(torch.ones_like(documents), documents)
        sight = Sight(documents=documents)
    with (
        torch.set_grad_enabled(learning),
        _Largest() as seen,
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    ):
        terms = made(time, position_ids=ids)
        output = untied_attention(
            *parts, terms, scale=made.scale, sight=sight, dropout=dropout, impl="folded"
        )
        if learning:
            output.sum().backward()
    largest = max(math.prod(shape) for shape in seen.shapes if len(shape) > 1 and shape[-1] == time)
    assert largest <= HEADS * time * time  # of all rows together
    if not dropout and name == "tupe-a":
        assert not {shape for shape in seen.shapes if shape[-2:] == (time, time)}


def test_a_table_would_be_seen():
    made = positions_of("tupe-a")
    with torch.no_grad(), _Largest() as seen:
        untied_attention(*content(3, 9, 9), made(9), scale=made.scale, impl="reference")
    assert (3, HEADS, 9, 9) in seen.shapes


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
    with pytest.raises(InputError, match="'flex' must not learn on a CPU"):
        untied_attention(query, key, value, made(4), scale=1.0, impl="flex")
    assert fold(query, key, None, 1.0, Sight()) == (query, key)
