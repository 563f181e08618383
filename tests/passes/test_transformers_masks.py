"""Masks as transformers makes them, captured as models are: by Dynamo at a first and a later length, and by export."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, Qwen2Config
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)

from mmcompile.passes.confirm_mask import confirm_mask
from mmcompile.passes.find_attention import find_attention
from mmcompile.passes.graph import copy_graph
from mmcompile.passes.mask_spec import MaskSpec, OpaqueMask
from mmcompile.passes.read_mask import read_mask
from mmcompile.tiny_qwen import tiny_qwen2_5_vl

BATCH, LENGTH, WIDTH = 2, 7, 16
CONFIG = Qwen2Config(
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    sliding_window=4,
    use_sliding_window=True,
    layer_types=["full_attention", "sliding_attention"],
)
CONFIG._attn_implementation = "sdpa"


def attend(x, mask):
    x = x[:, None]
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def same_block(ids):
    return lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (ids[b, q] >= 0)


def causal(x, padding, ids, positions):
    return attend(x, create_causal_mask(CONFIG, x, padding, None))


def sliding(x, padding, ids, positions):
    return attend(x, create_sliding_window_causal_mask(CONFIG, x, padding, None))


def packed(x, padding, ids, positions):
    return attend(x, create_causal_mask(CONFIG, x, None, None, position_ids=positions))


def packed_sliding(x, padding, ids, positions):
    return attend(x, create_sliding_window_causal_mask(CONFIG, x, None, None, position_ids=positions))


def blocks(x, padding, ids, positions):
    return attend(x, create_causal_mask(CONFIG, x, padding, None, block_sequence_ids=ids))


def sliding_blocks(x, padding, ids, positions):  # gemma3's, written by vmap
    window = sliding_window_overlay(CONFIG.sliding_window)
    mask = create_causal_mask(CONFIG, x, padding, None, or_mask_function=same_block(ids), and_mask_function=window)
    return attend(x, mask)


def bidirectional(x, padding, ids, positions):
    return attend(x, create_bidirectional_mask(CONFIG, x, padding))


DESCRIBED = {
    causal: "causal+padding",
    sliding: "causal+padding, window 4",
    packed: "packed causal",
    packed_sliding: "packed causal, window 4",
    blocks: "causal|spans+padding",
    sliding_blocks: "causal|spans+padding, window 4",
    bidirectional: "bidirectional+padding",
}


def transformer_inputs(length=LENGTH):
    ids = torch.randint(-1, 2, (BATCH, length))
    positions = torch.arange(length).expand(BATCH, length)
    return torch.randn(BATCH, length, WIDTH), torch.ones(BATCH, length, dtype=torch.int64), ids, positions


def graphs_of(function, *calls, dynamic=None):
    """The graphs with attention that Dynamo hands a backend for these calls."""
    graphs = []

    def backend(module, example_inputs):
        graphs.append(copy_graph(module))
        return module.forward

    compiled = torch.compile(function, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        for arguments in calls:
            compiled(*arguments)
    return [graph for graph in graphs if find_attention(graph)]


def read_sites(module):
    """What is read and confirmed of each site's mask, described."""
    found = []
    for site in find_attention(module):
        if site.mask is None:
            continue
        spec = read_mask(site.mask, site.query_length, site.key_length)
        assert isinstance(spec, OpaqueMask) or confirm_mask(site.mask, spec) is None
        found.append(spec.describe() if isinstance(spec, MaskSpec) else spec.reason)
    return found


@pytest.mark.parametrize("function", DESCRIBED, ids=lambda function: function.__name__)
def test_masks_of_transformers_from_dynamo(function):
    (graph,) = graphs_of(function, transformer_inputs(), dynamic=True)  # static sizes: test_emit_mask.py
    assert read_sites(graph) == [DESCRIBED[function]]


class Exported(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


@pytest.mark.parametrize("function", [f for f in DESCRIBED if f is not sliding_blocks], ids=lambda f: f.__name__)
def test_masks_of_transformers_from_export(function):
    arguments = transformer_inputs()
    length = torch.export.Dim("length", min=2)
    program = torch.export.export(
        Exported(function), arguments, dynamic_shapes=(tuple({1: length} for _ in arguments),)
    )
    assert read_sites(program.graph_module) == [DESCRIBED[function]]


def test_vmap_under_export_is_opaque():
    program = torch.export.export(Exported(sliding_blocks), transformer_inputs())
    assert read_sites(program.graph_module) == ["operation torch.ops.higher_order.flat_apply"]


def test_the_text_model_of_qwen2_5_vl_at_its_first_and_later_lengths():
    model = tiny_qwen2_5_vl(layers=1).model.language_model
    calls = []
    for length in (40, 48):
        embeddings = torch.randn(1, length, model.config.hidden_size)
        padding = (torch.arange(length) > 2).long()[None]
        calls.append((None, padding, torch.arange(length).expand(3, 1, length), None, embeddings))
    graphs = graphs_of(model, *calls)
    assert [read_sites(graph) for graph in graphs] == [["causal+padding"]] * 2  # static, then dynamic


def test_a_prefix_in_the_cache_is_the_offset():
    def step(x, padding, cache):
        return attend_to(x, cache, create_causal_mask(CONFIG, x, padding, cache))

    def attend_to(x, cache, mask):
        key, value = cache.update(x[:, None], x[:, None], 0)
        return F.scaled_dot_product_attention(x[:, None], key, value, attn_mask=mask)

    calls = []
    for prefix, length in ((5, 4), (9, 6)):
        cache = DynamicCache()
        cache.update(torch.randn(BATCH, 1, prefix, WIDTH), torch.randn(BATCH, 1, prefix, WIDTH), 0)
        calls.append((torch.randn(BATCH, length, WIDTH), torch.ones(BATCH, prefix + length).long(), cache))
    found = [read_sites(graph) for graph in graphs_of(step, *calls)]
    assert found[0] == ["causal+padding (offset 5)"]
    assert len(found) == 2 and found[1][0].startswith("causal+padding (offset s")
