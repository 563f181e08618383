"""Finding attention: every way to write repeat_kv, and the calls that only look like it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from mmcompile.passes.find_attention import find_attention, find_unread
from mmcompile.passes.graph import copy_graph, erase_if_unused, op_count, placeholders, size_key

HEADS, KV_HEADS, LENGTH, DIM = 4, 2, 6, 8


def capture(function, *inputs, dynamic=False):
    """The graph that Dynamo hands a backend for this call; dynamic: the second last dimension is a symbol."""
    graphs = []

    def backend(module, example_inputs):
        graphs.append(copy_graph(module))
        return module.forward

    torch.compiler.reset()
    for tensor in inputs if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, tensor.dim() - 2)
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return graphs[-1]


def operands(kv_heads=KV_HEADS):
    return (
        torch.randn(1, HEADS, LENGTH, DIM),
        torch.randn(1, kv_heads, LENGTH, DIM),
        torch.randn(1, kv_heads, LENGTH, DIM),
    )


def by_indexing(x):
    return x[:, :, None, :, :].expand(1, KV_HEADS, 2, x.shape[2], DIM).reshape(1, HEADS, x.shape[2], DIM)


def by_unsqueeze(x):
    return x.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(1, HEADS, x.shape[2], DIM)


def by_repeat_interleave(x):
    return x.repeat_interleave(2, dim=1)


def interleaved(x):  # heads 0 1 0 1: repeats, but not the layout of grouped-query attention
    return x[:, None].expand(1, 2, KV_HEADS, LENGTH, DIM).reshape(1, HEADS, LENGTH, DIM)


def scaled_twice(x):
    return (x[:, :, None] * torch.ones(1, 1, 2, 1, 1)).reshape(1, HEADS, LENGTH, DIM)


@pytest.mark.parametrize("repeat", [by_indexing, by_unsqueeze, by_repeat_interleave])
@pytest.mark.parametrize("dynamic", [False, True])
def test_repeat_kv_is_undone(repeat, dynamic):
    module = capture(
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True),
        *operands(),
        dynamic=dynamic,
    )
    (site,) = find_attention(module)
    assert (site.heads, site.kv_heads, site.head_dim) == (HEADS, KV_HEADS, DIM)
    assert site.key.op == site.value.op == "placeholder"


def unevenly(x):
    return x.repeat_interleave(torch.tensor([1, 3]), 1, output_size=HEADS)


def of_the_batch(x):
    return torch.repeat_interleave(x.transpose(0, 1), 2, 0).transpose(0, 1)


@pytest.mark.parametrize("repeat", [interleaved, scaled_twice, unevenly, of_the_batch])
def test_what_only_looks_like_repeat_kv_is_left_alone(repeat):
    module = capture(
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True), *operands()
    )
    (site,) = find_attention(module)
    assert site.kv_heads == HEADS


def test_gqa_flag_and_positional_arguments():
    module = capture(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=0.5, enable_gqa=True),
        *operands(),
    )
    (site,) = find_attention(module)
    assert (site.kv_heads, site.is_causal, site.scale, site.mask, site.dropout_p) == (
        KV_HEADS,
        True,
        0.5,
        None,
        0.0,
    )


def test_exported_graphs_give_the_same_sites():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, by_indexing(k), by_unsqueeze(v), is_causal=True)

    program = torch.export.export(Attention(), operands())
    (site,) = find_attention(program.graph_module)
    assert (site.heads, site.kv_heads, site.is_causal) == (HEADS, KV_HEADS, True)
    assert site.key.op == "placeholder"


def by_hand(q):
    scores = (q @ q.transpose(-1, -2)).softmax(-1)
    return F.dropout(scores, 0.0) @ q


def attend(q):
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


@pytest.mark.parametrize(
    ("function", "shape", "why"),
    [
        (attend, (2, 6, 8), "query, key and value are not all"),
        (by_hand, (1, 2, 6, 8), "written out as softmax and matmul"),
        (lambda q: flex_attention(q, q, q), (1, 2, 6, 8), "FlexAttention"),
        (torch.vmap(attend), (3, 1, 2, 6, 8), "inside vmap"),
    ],
)
def test_attention_in_another_form_is_no_site_but_is_told(function, shape, why):
    module = capture(function, torch.randn(shape))
    assert find_attention(module) == []
    (unread,) = find_unread(module)
    assert why in unread.why


def test_a_softmax_that_weighs_nothing_is_no_attention():
    assert find_unread(capture(lambda x: x.softmax(-1) * 2, torch.randn(1, 2, 6, 8))) == []


def test_heads_repeated_before_their_source_is_written_to_stay_repeated():
    def model(q, k, v):
        k = k.clone()
        repeated = by_indexing(k)
        k.zero_()
        return F.scaled_dot_product_attention(q, repeated, by_indexing(v), is_causal=True)

    (site,) = find_attention(capture(model, *operands()))
    assert site.kv_heads == HEADS


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(DIM, DIM)

    def forward(self, x):
        q = self.projection(x)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_module_path_layer_and_stack():
    sites = find_attention(capture(Decoder(), torch.randn(1, HEADS, LENGTH, DIM)))
    assert [site.module_path for site in sites] == ["layers.0", "layers.1"]
    assert [site.layer for site in sites] == [0, 1]
    assert {site.stack for site in sites} == {"layers.*"}


def test_lengths_are_symbols_in_a_dynamic_graph():
    (site,) = find_attention(capture(Layer(), torch.randn(1, HEADS, LENGTH, DIM), dynamic=True))
    assert size_key(site.query_length) == size_key(site.key_length)
    assert size_key(site.query_length).startswith("s")


def test_a_copied_graph_keeps_what_dynamo_attached():
    originals = []

    def backend(module, example_inputs):
        copy = copy_graph(module)
        originals.append((module, copy))
        return copy.forward

    layer = Layer()
    x = torch.randn(1, HEADS, LENGTH, DIM)
    with torch.no_grad():
        compiled = torch.compile(layer, backend=backend)(x)
        torch.testing.assert_close(compiled, layer(x))
    module, copy = originals[0]
    assert copy.graph is not module.graph
    assert copy._param_name_to_source is module._param_name_to_source
    for original, copied in zip(placeholders(module.graph), placeholders(copy.graph), strict=True):
        assert copied._dynamo_source == original._dynamo_source
        assert copied.meta["example_value"] is original.meta["example_value"]


def test_erasing_stays_inside_the_backward_slice():
    module = copy_graph(capture(lambda x: (x + 1, (x * 2).cos()), torch.randn(3)))
    with module.graph.inserting_before(next(iter(module.graph.find_nodes(op="output")))):
        x = placeholders(module.graph)[0]
        unused = module.graph.call_function(torch.neg, (x,))
        root = module.graph.call_function(torch.sin, (module.graph.call_function(torch.exp, (x,)),))
    assert erase_if_unused(module.graph, [root]) == 2
    assert unused in module.graph.nodes
    assert op_count(module, torch.neg) == 1
