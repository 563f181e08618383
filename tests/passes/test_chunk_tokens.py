"""What works token by token, and a graph in chunks against the graph as it was."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from mmcompile.kernels.in_chunks import ALIGNED, even_chunk, in_chunks, register_stretch
from mmcompile.passes.chunk_tokens import chunk_tokens
from mmcompile.passes.graph import op_count
from mmcompile.passes.token_rows import TokenRows

TOKENS, WIDTH, HEADS = 150, 32, 4
CHUNK = 64
OP = torch.ops.mminference.in_chunks.default


class _Noting(fx.Interpreter):
    def run_node(self, node):
        node.meta["example_value"] = result = super().run_node(node)
        return result


def traced(function, *inputs):
    """The graph of a function with the values of one call, as a tracer would note them."""
    module = fx.symbolic_trace(function)
    with torch.no_grad():
        _Noting(module).run(*inputs)
    return module


def rows(batch=1):
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


WEIGHT = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)) / WIDTH**0.5)
HALF = WIDTH // 2

TOKEN_WISE = {
    "elementwise": lambda x, w: F.silu(x) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) - w[0],
    "rms norm": lambda x, w: F.rms_norm(x, (WIDTH,), w[0]),
    "layer norm": lambda x, w: F.layer_norm(x, (WIDTH,), w[0], w[1]),
    "linear": lambda x, w: F.linear(x, w, w[0]),
    "matmul": lambda x, w: x @ w,
    "a product with tokens last": lambda x, w: (w @ x.transpose(1, 2)).transpose(1, 2),
    "heads": lambda x, w: x.view(1, TOKENS, HEADS, -1).transpose(1, 2).softmax(-1),
    "heads by permute": lambda x, w: x.reshape(1, TOKENS, HEADS, -1).permute(0, 2, 1, 3) * 2,
    "merged": lambda x, w: x.view(TOKENS, WIDTH).unsqueeze(0).squeeze(0),
    "rotated halves": lambda x, w: torch.cat((-x[..., HALF:], x[..., :HALF]), dim=-1),
    "split": lambda x, w: x.split([HALF, HALF], dim=-1)[1] * 2,
    "chunk": lambda x, w: torch.stack(x.chunk(2, -1), 1)[:, 1],
    "unbind": lambda x, w: x.view(1, TOKENS, 2, HALF).unbind(2)[1],
    "top values": lambda x, w: torch.topk(x, 4, dim=-1)[0],
    "an empty cache": lambda x, w: torch.cat([w.new_empty(0), x], dim=1),
    "repeated": lambda x, w: x[:, :, None].expand(1, TOKENS, 3, WIDTH) + 1,
    "chosen": lambda x, w: torch.where(x > 0, x, w[0]).masked_fill(x < -1, 0.0),
    "means of heads": lambda x, w: x.view(1, TOKENS, HEADS, -1).mean(2),
}


@torch.no_grad()
@pytest.mark.parametrize("name", TOKEN_WISE)
def test_what_works_token_by_token_runs_in_chunks(name):
    def function(x, w):
        y = TOKEN_WISE[name](F.linear(x, w), w)
        return y, F.linear(x, w).sum(0)

    module = traced(function, rows(), WEIGHT)
    expected = module(rows(), WEIGHT)
    chunked = chunk_tokens(module, TOKENS, CHUNK, name)
    module.recompile()
    assert (chunked.stretches, op_count(module, OP)) == (1, 1)
    assert len(module.graph.nodes) < 12  # nothing of it is left
    for got, wanted in zip(module(rows(), WEIGHT), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


MIXING = {
    "softmax over tokens": lambda x, w: x.softmax(1),
    "cumsum": lambda x, w: x.cumsum(1),
    "mean over tokens": lambda x, w: x.mean(1, keepdim=True),
    "mean of all": lambda x, w: x.mean(),
    "roll": lambda x, w: x.roll(1, 1),
    "flip": lambda x, w: x.flip(1),
    "shift": lambda x, w: F.pad(x[:, 1:], (0, 0, 0, 1)),
    "scores": lambda x, w: x @ x.transpose(1, 2),
    "a norm over tokens": lambda x, w: F.layer_norm(x, (TOKENS, WIDTH)),
    "another order": lambda x, w: x.reshape(1, WIDTH, TOKENS),
    "joined tokens": lambda x, w: torch.cat([x, x], dim=1),
    "sorted": lambda x, w: x.sort(1)[0],
    "some rows": lambda x, w: x[:, 1:],
    "dropout": lambda x, w: F.dropout(x, 0.5, training=True),
    "one number a pair": lambda x, w: x[0, :, :1] + x[0, :, 0],
    "written in place": lambda x, w: x.mul_(2),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_tokens_does_not(name):
    module = traced(lambda x, w: MIXING[name](x * 1, w), rows(), WEIGHT)
    last = module.graph.find_nodes(op="output")[0].args[0]
    assert last not in TokenRows.of(module.graph, TOKENS).computed


class Layers(nn.Module):
    """Small decoder layers: norm, projection, rotary positions, something that mixes tokens, MLP."""

    def __init__(self, count):
        super().__init__()
        shapes = [(WIDTH, WIDTH), (3 * WIDTH, WIDTH), (WIDTH, 3 * WIDTH)] * count
        self.weights = nn.ParameterList([torch.randn(shape) / WIDTH**0.5 for shape in shapes])
        self.count = count

    def forward(self, x, positions):
        cos, caches = positions.cos(), []
        for index in range(self.count):
            project, up, down = self.weights[3 * index : 3 * index + 3]
            heads = F.linear(F.rms_norm(x, (WIDTH,)), project).view(-1, TOKENS, HEADS, WIDTH // HEADS).transpose(1, 2)
            heads = heads * cos.unsqueeze(1)
            x = x + heads.cumsum(2).transpose(1, 2).reshape(-1, TOKENS, WIDTH)
            x = x + F.linear(F.silu(F.linear(x, up)), down)
            caches.append(heads.contiguous())
        return x[:, -1], *caches


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_layers_that_are_alike_share_a_stretch_and_nothing_is_kept_for_later_ones(batch):
    inputs = (rows(batch), torch.randn(batch, TOKENS, WIDTH // HEADS))
    module = traced(Layers(4), *inputs)
    expected = module(*inputs)
    chunked = chunk_tokens(module, TOKENS, CHUNK, "layers")
    module.recompile()
    assert (chunked.stretches, len(chunked.kinds), chunked.left) == (5, 3, 0)
    for got, wanted in zip(module(*inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        assert got.stride() == wanted.stride()
    # Heads, and their cache; the rows that are added to. Cosines come from the first stretch, and the views of them,
    # one a layer, are made where they are used.
    stretches = module.graph.find_nodes(op="call_function", target=OP)
    assert [len(node.users) for node in stretches] == [3, 3, 3, 3, 1]


@torch.no_grad()
def test_memory_that_is_written_is_read_before_and_after_as_it_stands():
    def function(x, cache, w):
        before = F.linear(cache, w) * 2
        cache.add_(F.linear(x, w))
        return before, F.linear(cache, w) + F.linear(x * 2, w)

    module = traced(function, rows(), rows().clone(), WEIGHT)
    expected = module(rows(), rows().clone(), WEIGHT)
    chunked = chunk_tokens(module, TOKENS, CHUNK, "written")
    assert chunked.stretches > 0
    module.recompile()
    for got, wanted in zip(module(rows(), rows().clone(), WEIGHT), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_what_is_to_be_trained_stays_whole():
    module = fx.symbolic_trace(lambda x, w: F.linear(x, w))
    _Noting(module).run(rows(), WEIGHT)
    assert chunk_tokens(module, TOKENS, CHUNK, "trained").stretches == 0


@torch.no_grad()
def test_the_op():
    module = traced(
        lambda x, w: (F.linear(x, w).view(1, TOKENS, HEADS, -1).transpose(1, 2).contiguous(),), rows(), WEIGHT
    )
    chunked = chunk_tokens(module, TOKENS, CHUNK, "op")
    (name,) = chunked.kinds
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OP, ([rows(), WEIGHT], name, CHUNK), test_utils=tests)
    with pytest.raises(KeyError):
        in_chunks([rows(), WEIGHT], "nothing", CHUNK)


@torch.no_grad()
def test_a_stretch_is_known_as_long_as_it_is_kept():
    module = traced(lambda x, w: F.linear(x, w), rows(), WEIGHT)
    chunked = chunk_tokens(module, TOKENS, CHUNK, "kept")
    (kind,) = chunked.kinds.values()
    assert register_stretch(kind.name, "another") is kind.stretch
    name = kind.name
    del chunked, kind
    with pytest.raises(KeyError):
        in_chunks([rows(), WEIGHT], name, CHUNK)


@given(tokens=st.integers(2, 2**21), most=st.integers(1, 2**15))
def test_chunks_are_about_equal(tokens, most):
    size = even_chunk(tokens, most)
    assert size % ALIGNED == 0
    assert size <= -(-most // ALIGNED) * ALIGNED + ALIGNED
    assert -(-tokens // size) <= -(-tokens // most)
