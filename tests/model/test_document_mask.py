"""Rows of several documents: each document is computed as if it were alone, whatever the method, dtype and kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.test_blockwise import CHANGES, dense, inputs
from tests.model.test_method_pairs import SMALL, WORDS
from tests.ranks import Ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from poise.core.errors import UserError
from poise.hardware import sharding
from poise.hardware.distributed import World
from poise.model import attention
from poise.model.blockwise import blockwise_attention
from poise.model.build import build
from poise.model.decoder import Decoder
from poise.model.documents import Documents, first_positions
from poise.model.flex import documents_mask, flex_core
from poise.model.methods import METHODS, apply_methods, logit_tap
from poise.model.paths import attention_path
from poise.model.presets import preset

T = 12
ROWS = ((5, 1, 4, 2), (12,), (3, 9))
"""Lengths of the documents in each row."""
SPEC = replace(SMALL, seq_len=T, n_heads=4, n_kv_heads=2, d_model=16)
SCORES = (None, "soft_cap:cap=1", "soft_clip", "attention_sink")


def numbers(rows: tuple[tuple[int, ...], ...] = ROWS) -> Tensor:
    """``documents_BT`` of rows with these lengths."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def ids(rows: int = len(ROWS), length: int = T, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SPEC.vocab_size, (rows, length), generator=generator)


def spans(rows: tuple[tuple[int, ...], ...] = ROWS) -> list[tuple[int, slice]]:
    """(row, positions) of every document."""
    ends = [[0, *itertools.accumulate(row)] for row in rows]
    return [(b, slice(start, stop)) for b, row in enumerate(ends) for start, stop in itertools.pairwise(row)]


def model_of(words: str | None, dtype: torch.dtype = torch.float64) -> Decoder:
    """A model away from its start: some methods begin with branches of nothing."""
    model = build(apply_methods(SPEC, [words] if words else []), seed=0, compute_dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def alone(model: Decoder, tokens_BT: Tensor, rows: tuple[tuple[int, ...], ...] = ROWS) -> Tensor:
    """The logits of each document by itself, put where the document is."""
    out_BTV = torch.zeros(*tokens_BT.shape, SPEC.vocab_size, dtype=model.logits(tokens_BT[:1, :1]).dtype)
    for b, where in spans(rows):
        out_BTV[b, where] = model.logits(tokens_BT[b : b + 1, where])[0]
    return out_BTV


def compute(model: Decoder, documents_BT: Tensor | None, seed: int = 0) -> dict[str, Tensor]:
    """Loss and gradients of one step."""
    model.zero_grad()
    out = model(ids(seed=seed), ids(seed=seed + 1), documents_BT=documents_BT)
    out.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": out.loss.detach()}


# -- by definition ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *METHODS, *(f"gated_attention:position=g{n}" for n in (2, 3, 4, 5))])
def test_a_packed_row_is_its_documents_alone_and_nothing_flows_between_them(name: str | None) -> None:
    model = model_of(WORDS.get(name, name) if name else None).eval()
    seen: list[Tensor] = []
    handle = model.taps()["embed"].register_forward_hook(lambda module, args, out: seen.append(out))
    packed_BTV = model.logits(ids(), documents_BT=numbers())
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(packed_BTV, alone(model, ids()), rtol=1e-9, atol=1e-9)
        assert (model.logits(ids()) - packed_BTV)[0, 5:].abs().max() > 1e-4, "the mask does nothing"
    for b, where in ((0, slice(5, 6)), (0, slice(6, 10)), (2, slice(3, 12))):
        weight_TV = torch.linspace(-1, 1, 13)[None] * torch.linspace(1, 2, where.stop - where.start)[:, None]
        (grad_BTD,) = torch.autograd.grad((packed_BTV[b, where] * weight_TV).sum(), seen[0], retain_graph=True)
        assert (grad_BTD[b, where].abs().amax(-1) > 0).all()
        grad_BTD[b, where] = 0
        assert (grad_BTD == 0).all()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)], ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_in_training_dtypes(name: str | None, dtype: torch.dtype, close: float) -> None:
    model = model_of(name, dtype)
    with torch.no_grad():
        packed_BTV, wanted_BTV = model.logits(ids(), documents_BT=numbers()), alone(model, ids())
        assert (packed_BTV - wanted_BTV).abs().max() < close * wanted_BTV.abs().max()
        assert (model.logits(ids()) - wanted_BTV).abs().max() > 2 * close * wanted_BTV.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_a_row_of_one_document_has_the_bits_of_a_row_without_documents(name: str | None, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    one, none = compute(model, torch.full((3, T), 7, dtype=torch.int32)), compute(model, None)
    assert one.keys() == none.keys() and all(torch.equal(one[key], none[key]) for key in none)


def test_positions_begin_again_with_each_document() -> None:
    # The logits would not show it: a product of a query and a key depends on their distance only.
    model, seen = model_of(None), {}
    for name in ("block.0.q", "block.0.k"):
        model.taps()[name].register_forward_hook(lambda module, args, out, at=name: seen.__setitem__(at, out.detach()))
    model.logits(ids(), documents_BT=numbers())
    packed = dict(seen)
    for b, where in spans():
        model.logits(ids()[b : b + 1, where])
        for name, tensor in seen.items():
            torch.testing.assert_close(packed[name][b, :, where], tensor[0], rtol=1e-12, atol=1e-12)
    model.logits(ids())
    assert not torch.allclose(packed["block.0.q"][2, :, 3:], seen["block.0.q"][2, :, 3:], rtol=1e-2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=3))
def test_a_document_is_a_run_of_equal_numbers(rows: list[list[int]]) -> None:
    documents_BT = torch.tensor(rows, dtype=torch.int32)
    first_BT = first_positions(documents_BT)
    for row, first_T in zip(rows, first_BT.tolist(), strict=True):
        for t, first in enumerate(first_T):
            assert len(set(row[first : t + 1])) == 1 and (first == 0 or row[first - 1] != row[t])
    documents = Documents(first_BT, (torch.empty(0), torch.empty(0)))
    for row, lengths in zip(rows, documents.lengths(), strict=True):
        assert lengths == [len(list(run)) for _, run in itertools.groupby(row)]
    at = torch.arange(6)
    seen_BTT = (first_BT[:, :, None] <= at) & (at <= at[:, None])
    assert torch.equal(documents.mask(torch.float32)[:, 0] == 0, seen_BTT)
    assert documents.mask(torch.float32) is documents.mask(torch.float32), "blocks share one"


def test_documents_of_another_shape_or_kind_are_refused() -> None:
    model = model_of(None)
    with pytest.raises(UserError, match=r"shape \(3, 11\) and inputs_BT \(3, 12\)"):
        model.hidden(ids(), documents_BT=numbers()[:, 1:])
    with pytest.raises(UserError, match=r"torch\.float32; give int32 or int64"):
        model(ids(), ids(), documents_BT=numbers().float())


# -- every path ------------------------------------------------------------------------------------------------


def masked(core: Callable[..., Tensor], tensors: list[Tensor], dout: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = core(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def by_hand(name: str, rows: tuple[tuple[int, ...], ...]) -> Callable[..., Tensor]:
    """The formula, document by document."""
    maps, _ = CHANGES[name]

    def core(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(q)
        for b, where in spans(rows):
            cut = (x[b : b + 1, :, where] for x in (q, k, v))
            out[b : b + 1, :, where] = dense(*cut, maps, sink)
        return out

    return core


def torch_kernels(rows: tuple[tuple[int, ...], ...]) -> tuple[Callable[..., Tensor], Documents]:
    documents = Documents(first_positions(numbers(rows)), (torch.empty(0), torch.empty(0)))
    return lambda q, k, v: attention.several_documents(q, k, v, 0.5, documents), documents


@pytest.mark.parametrize(
    ("rows", "dtype", "kernel", "bound"),
    [
        (((70, 50, 10), (130,)), torch.float64, "pieces", 1e-12),
        (((70, 50, 10), (1, 129)), torch.float32, "pieces", 2e-6),
        (((1,) * 30, (7, 23)), torch.float32, "mask", 2e-6),
        (((1,) * 30, (30,)), torch.float64, "mask", 1e-12),
        (((40, 24), (64,)), torch.bfloat16, "mask", 2e-2),
        (((500, 20), (3, 517)), torch.bfloat16, "pieces", 2e-2),
    ],
)
def test_torch_kernels_equal_the_formula(
    rows: tuple[tuple[int, ...], ...], dtype: torch.dtype, kernel: str, bound: float
) -> None:
    tensors, dout = inputs(2, 2, 1, sum(rows[0]), 8, False)
    low = [x.to(dtype) for x in tensors]
    core, documents = torch_kernels(rows)
    got = masked(core, low, dout.to(dtype))
    assert bool(documents._masks) == (kernel == "mask")
    wanted = masked(by_hand("plain", rows), [x.double() for x in low], dout.to(dtype).double())
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype and (a.double() - b).abs().max() <= bound * b.abs().max()


def test_pieces_compute_less_and_hold_no_mask() -> None:
    core, documents = torch_kernels(((64,) * 8,))
    sizes: list[int] = []
    real = attention.one_document
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "one_document", lambda q, k, v, s: sizes.append(q.shape[2]) or real(q, k, v, s))
        core(*inputs(1, 2, 2, 512, 8, False)[0])
    assert sizes == [64] * 8 and not documents._masks


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(sorted(CHANGES)),
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([None, 3000, 10_000]),
)
def test_blocks_equal_the_formula(name: str, lengths: list[list[int]], G: int, R: int, budget: int | None) -> None:
    most = max(map(sum, lengths))
    rows = tuple((*row, most - sum(row)) if sum(row) < most else tuple(row) for row in lengths)
    maps, sink = CHANGES[name]
    tensors, dout = inputs(len(rows), G * R, G, most, 4, sink, seed=most)
    first_BT = first_positions(numbers(rows))

    def core(q: Tensor, k: Tensor, v: Tensor, sink_H: Tensor | None = None) -> Tensor:
        return blockwise_attention(q, k, v, maps, sink_H, budget, first_BT)

    for a, b in zip(masked(core, tensors, dout), masked(by_hand(name, rows), tensors, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_blocks_without_numbers_on_the_host_equal_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a GPU does: nothing is left out, everything is masked, and a block holds several rows of the batch.
    from poise.model import blockwise

    rows = ((70, 50, 10), (1, 129), (128, 2))
    maps, _ = CHANGES["all"]
    tensors, dout = inputs(3, 4, 2, 130, 8, True)
    first_BT = first_positions(numbers(rows))
    real = blockwise._Work.__init__

    def as_on_a_gpu(self: object, *args: object) -> None:
        real(self, *args)  # type: ignore[arg-type]
        self.begins = None  # type: ignore[attr-defined]

    monkeypatch.setattr(blockwise._Work, "__init__", as_on_a_gpu)
    for budget in (None, 30_000):
        got = masked(
            lambda q, k, v, s, size=budget: blockwise_attention(q, k, v, maps, s, size, first_BT), tensors, dout
        )
        for a, b in zip(got, masked(by_hand("all", rows), tensors, dout), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "rows",
    [((128, 172), (300,)), ((1, 255, 44), (127, 2, 171)), ((200, 184), (384,)), ((256,), (100, 156)), ((9,),)],
)
def test_flex_table_of_documents(rows: tuple[tuple[int, ...], ...]) -> None:
    B, seq_len = len(rows), sum(rows[0])
    mask, M = documents_mask(first_positions(numbers(rows))), -(-seq_len // 128)
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    cut, whole = torch.zeros(B, M, M, dtype=torch.int), torch.zeros(B, M, M, dtype=torch.int)
    for b, row in itertools.product(range(B), range(M)):
        cut[b, row, mask.kv_indices[b, 0, row, : mask.kv_num_blocks[b, 0, row]].long()] += 1
        whole[b, row, mask.full_kv_indices[b, 0, row, : mask.full_kv_num_blocks[b, 0, row]].long()] += 1
    sees = torch.zeros(B, M * 128, M * 128, dtype=torch.bool)
    for b, where in spans(rows):
        sees[b, where, where] = torch.ones(where.stop - where.start, where.stop - where.start).tril().bool()
    tiles = sees.view(B, M, 128, M, 128).transpose(2, 3).flatten(3)
    # A block is listed once if anything in it is seen, and called whole only if everything is.
    assert torch.equal((cut + whole).bool(), tiles.any(-1)) and (cut + whole <= 1).all()
    assert torch.equal(whole.bool(), tiles.all(-1))
    assert mask.shape == (B, 1, seq_len, seq_len)
    at = torch.arange(seq_len)
    for b in range(B):
        assert torch.equal(
            mask.mask_mod(torch.tensor(b), torch.tensor(0), at[:, None], at), sees[b, :seq_len, :seq_len]
        )


@pytest.mark.parametrize("name", ["plain", "cap and sink"])
def test_flex_path_equals_the_formula(name: str) -> None:
    rows = ((70, 60, 20), (1, 149))
    maps, sink = CHANGES[name]
    tensors, _ = inputs(2, 4, 2, 150, 16, sink)
    low = [x.float() for x in tensors]
    core = torch.compile(flex_core, backend="eager", fullgraph=True, dynamic=False)
    got = core(*low[:3], maps.scale, maps.cap, low[3] if sink else None, first_positions(numbers(rows)))
    torch.testing.assert_close(got.double(), by_hand(name, rows)(*tensors), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_path_equals_the_cpu(name: str | None, compiled: bool) -> None:
    spec = apply_methods(replace(SPEC, seq_len=300, d_model=64, n_heads=2), [name] if name else [])
    rows = ((128, 100, 72), (1, 299))
    cpu = build(spec, seed=0)
    gpu = build(spec, seed=0).cuda()
    if compiled:
        gpu.compile_trunk()
    tokens_BT, targets_BT = ids(2, 300), ids(2, 300, seed=1)
    for model, where in ((cpu, "cpu"), (gpu, "cuda")):
        args = (x.to(where) for x in (tokens_BT, targets_BT))
        model(*args, documents_BT=numbers(rows).to(where)).loss.backward()
    for (at, a), b in zip(gpu.named_parameters(), cpu.parameters(), strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-2, atol=1e-4, msg=lambda m, at=at: f"{at}: {m}")


def test_paths_in_words() -> None:
    spec, bf16 = preset("7m"), torch.bfloat16
    assert "A mask of each row" in attention_path(spec, "cpu", bf16, 256, documents=True)
    assert "one call for each document" in attention_path(spec, documents=True)
    assert "flex_attention kernel" in attention_path(spec, "cuda", bf16, documents=True)
    assert "Blocks of scores" in attention_path(spec, "cuda", torch.float64, documents=True)
    for name in ("soft_cap", "soft_clip", "attention_sink"):
        other = apply_methods(spec, [name])
        for device in ("cpu", "cuda"):
            assert attention_path(other, device, bf16, documents=True) == attention_path(other, device, bf16)


# -- recomputed, compiled, sharded, listened to ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_recomputed_blocks_give_the_same_gradients(name: str | None, dtype: torch.dtype) -> None:
    plain, again = model_of(name, dtype), model_of(name, dtype)
    again.recompute_blocks()
    before, after = compute(plain, numbers()), compute(again, numbers())
    assert all(torch.equal(before[key], after[key]) for key in before)


def compiled_equals_eager(name: str | None, backend: str) -> None:
    torch.compiler.reset()
    eager, compiled = model_of(name, torch.float32), model_of(name, torch.float32)
    compiled.trunk.compile(backend=backend, fullgraph=True, dynamic=False)
    for seed, documents_BT in enumerate((numbers(), numbers().flip(1, 0), None)):
        before, after = compute(eager, documents_BT, seed), compute(compiled, documents_BT, seed)
        for key, value in before.items():
            torch.testing.assert_close(after[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, at=key: f"{at}: {m}")


@pytest.mark.filterwarnings("ignore")  # what the compiler warns of is its own
def test_a_packed_trunk_traces_as_one_graph() -> None:
    compiled_equals_eager(None, "eager")


def test_blocks_compile_to_one_graph_with_the_same_bits() -> None:
    maps, sink = CHANGES["all"]
    tensors, dout = inputs(2, 4, 2, 70, 8, sink)
    first_BT = first_positions(numbers(((30, 40), (5, 60, 5))))
    compiled = torch.compile(blockwise_attention, backend="aot_eager", fullgraph=True, dynamic=False)
    got, eager = (
        masked(lambda q, k, v, s, core=core: core(q, k, v, maps, s, first_BT=first_BT), tensors, dout)
        for core in (compiled, blockwise_attention)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, eager, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*SCORES, "logit_tap", "value_residual"])
def test_a_packed_trunk_compiles(name: str | None) -> None:
    compiled_equals_eager(name, "inductor")


def test_the_logit_tap_reads_within_documents() -> None:
    model = model_of("logit_tap")
    model.train()(ids(), ids(), documents_BT=numbers())
    packed = logit_tap.readings(model)
    logit_tap.reset(model)
    for b, where in spans():
        model(ids()[b : b + 1, where], ids()[b : b + 1, where])
    for name, wanted_H in logit_tap.readings(model).items():
        torch.testing.assert_close(packed[name], wanted_H)
    logit_tap.reset(model)
    model(ids(), ids())
    assert (logit_tap.readings(model)["block.1"] > packed["block.1"] + 1e-3).any(), "the mask does nothing"


def sharded_step(rank: int | None, dtype: torch.dtype, row: int | None = None) -> dict[str, Tensor]:
    """Gradients and queries of one step: of a rank with its row, or of one process with that row or both."""
    model, row = build(SPEC, seed=0, compute_dtype=dtype), row if rank is None else rank
    if rank is not None:
        sharding.shard(model, list(model.trunk.blocks), World(rank, 2, torch.device("cpu"), rank), dtype)
    mine = slice(0, 2) if row is None else slice(row, row + 1)
    seen: list[Tensor] = []
    model.taps()["block.1.q"].register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    model(ids()[mine], ids(seed=1)[mine], documents_BT=numbers()[mine]).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {n: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for n, g in grads.items()}
    return whole | {"queries": seen[0]}


def process(rank: int, folder: str) -> None:
    found = {dtype: sharded_step(rank, dtype) for dtype in (torch.float32, torch.bfloat16)}
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.mark.dist
def test_two_processes_compute_what_one_does(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(process, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for dtype, close in ((torch.float32, 2e-5), (torch.bfloat16, 5e-2)):
        whole = sharded_step(None, dtype)
        whole.pop("queries")
        for rank, found in enumerate(ranks):
            # Angles are not rounded by FSDP2 on the way into a block.
            assert torch.equal(found[dtype].pop("queries"), sharded_step(None, dtype, rank)["queries"])
            for name, value in whole.items():
                assert (found[dtype][name] - value).abs().max() <= close * value.abs().max(), (dtype, name)
