"""Exported prefills equal the compiled backend, with boundaries as inputs; what cannot be sparse is left as it is."""

import copy

import pytest
import torch
from torch import nn
from torch.export import Dim

import mmcompile
from mmcompile import HeadPattern, ModalityBoundaries, Reason
from mmcompile.passes.add_boundaries import BOUNDARY_NAMES
from mmcompile.passes.graph import op_count
from mmcompile.prefill_module import PrefillModule, prefill_shapes, two_batches
from mmcompile.program_record import record_of
from tests.models.families import FAMILIES

DECODERS = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "gemma3")
ALSO_COMPILED = ("qwen2_5_vl", "qwen3_vl", "gemma3")  # the decoders of the other two are of Qwen2.5-VL's kind
LENGTHS = (300, 411, 530)
AUTO = {"density": 0.3, "patterns": HeadPattern("top_p", order="auto", columns=1 / 64)}
A_SHAPE = {"density": 0.5, "patterns": HeadPattern("a_shape", sink=16, local=64, boundary="2d")}  # quick to plan here


def inputs_of(name, model, length, batch=2):
    """Embeddings, positions and a padded mask of random prompts; for Gemma 3 an image's span too."""
    hidden = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(length)
    positions = torch.arange(length).expand(batch, length)
    inputs = {
        "inputs_embeds": torch.randn(batch, length, hidden, generator=generator),
        "position_ids": (positions.expand(3, -1, -1) if "qwen" in name else positions).contiguous(),
        "attention_mask": torch.ones(batch, length, dtype=torch.int64),
    }
    if batch > 1:
        inputs["attention_mask"][0, :7] = 0
    if name == "gemma3":
        inputs["token_type_ids"] = torch.zeros(batch, length, dtype=torch.int64)
        inputs["token_type_ids"][:, 20:36] = 1
    return inputs


def boundaries_of(length, batch, video):
    """Text, a video of so many frames of 8 x 8 tokens, text; in each sequence."""
    offsets, modality, grid = [0], [], []
    for row in range(batch):
        ends = (9, 9 + 64 * video, length) if video else (length,)
        offsets += [row * length + end for end in ends]
        modality += [0, 2, 0] if video else [0]
        grid += [[0, 0, 0], [video, 8, 8], [0, 0, 0]] if video else [[0, 0, 0]]
    return ModalityBoundaries(*(torch.tensor(values, dtype=torch.int32) for values in (offsets, modality, grid)))


def run(program, inputs, boundaries):
    return program(**inputs, **dict(zip(BOUNDARY_NAMES, boundaries.tensors("cpu"), strict=True)))


def plain_program(model, inputs, **shapes):
    given = two_batches(inputs)
    with torch.no_grad():
        return torch.export.export(
            PrefillModule(model), (), given, dynamic_shapes=shapes or prefill_shapes(given), strict=False
        )


def assert_same(got, expected):
    torch.testing.assert_close(got["logits"], expected["logits"], atol=1e-5, rtol=0)
    for name in ("keys", "values"):
        for one, other in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_a_transformed_program_equals_the_compiled_backend_and_eager(name, tmp_path):
    model = FAMILIES[name].model()
    module = PrefillModule(model)
    plain = plain_program(model, inputs_of(name, model, 140))
    real = slice(7, None)  # a padded query's row means nothing
    options = AUTO if name == "qwen2_5_vl" else A_SHAPE
    with mmcompile.bind(boundaries_of(300, 2, 3)):  # grids are told: none is searched
        programs = [mmcompile.transform(plain, **options | changed) for changed in ({"density": 1.0}, {})]
    for program in programs:
        program.validate()
    torch.export.save(programs[1], tmp_path / "sparse.pt2")
    exact, sparse = programs[0].module(), torch.export.load(tmp_path / "sparse.pt2").module()
    options = options | {"min_tokens": 0, "inner": "eager"}
    compiled = torch.compile(module, backend="mminference", options=options, dynamic=True)
    for length, batch in zip(LENGTHS, (2, 3, 2), strict=True):
        inputs = inputs_of(name, model, length, batch)
        expected = module(**inputs)
        for video in (3, 0):
            boundaries = boundaries_of(length, batch, video)
            got = run(exact, inputs, boundaries)
            torch.testing.assert_close(got["logits"], expected["logits"], atol=1e-5, rtol=0)
            torch.testing.assert_close(got["keys"][-1][:, :, real], expected["keys"][-1][:, :, real], atol=1e-5, rtol=0)
            if name in ALSO_COMPILED:
                with mmcompile.bind(boundaries):
                    assert_same(run(sparse, inputs, boundaries), compiled(**inputs))
        assert not torch.allclose(run(sparse, inputs, boundaries)["logits"], expected["logits"], atol=1e-4)
    # The mask went with the attention: nothing has queries x keys.
    length = programs[0].graph.find_nodes(op="placeholder")[-4].meta["val"].shape[1]
    for node in programs[0].graph.nodes:
        shape = getattr(node.meta.get("val"), "shape", ())
        assert sum(size is length or str(size) == str(length) for size in shape) < 2, node


@torch.no_grad()
def test_export_takes_a_batch_of_one_features_of_a_video_and_room_in_the_cache():
    family = FAMILIES["qwen3_vl"]
    model = family.model()
    prompts = family.prompts(model)
    part = mmcompile.text_prefill(model, **prompts.first)
    assert part.module is model.get_decoder()  # features go into its layers
    program = mmcompile.export(*part[:1], kwargs=part.kwargs, cache_length=512, density=1.0).module()
    for inputs in (prompts.first, prompts.longer, prompts.padded):
        kwargs = mmcompile.text_prefill(model, **inputs).kwargs
        batch, length, _ = kwargs["inputs_embeds"].shape
        got = run(program, kwargs, boundaries_of(length, batch, 1))
        logits = model.lm_head(got["last_hidden_state"][:, -1])
        torch.testing.assert_close(logits, model(**inputs).logits[:, -1], atol=1e-5, rtol=0)
        assert [list(keys.shape[-2:]) for keys in got["keys"]] == [[512, 16]] * 2
        assert not got["keys"][0][:, :, length:].any()


def test_options_of_the_backend_are_refused_with_what_is_one():
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    with pytest.raises(mmcompile.OptionError, match="one form"):
        mmcompile.transform(program, min_tokens=4)
    with pytest.raises(mmcompile.OptionError, match="did you mean 'density'"):
        mmcompile.transform(program, denisty=1.0)


def test_pixels_are_refused_with_what_can_be_exported():
    model = FAMILIES["qwen2_5_vl"].model()
    inputs = FAMILIES["qwen2_5_vl"].prompts(model).first
    with pytest.raises(mmcompile.ExportError, match=r"pixel_values_videos, video_grid_thw.*text_prefill"):
        mmcompile.export(model, kwargs=inputs)


def test_code_that_depends_on_data_is_refused_with_what_can_be_exported():
    class DependsOnData(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum().item() > 0 else x

    with pytest.raises(mmcompile.ExportError, match=r"DependsOnData: its code depends on data.*text_prefill"):
        mmcompile.export(DependsOnData(), (torch.ones(3),))


def test_a_program_without_a_largest_size_is_not_packaged(tmp_path):
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(4, 2),), dynamic_shapes=({0: Dim.AUTO},))
    with pytest.raises(mmcompile.ExportError, match=r"input: no size is too large.*32 bits"):
        mmcompile.package(program, tmp_path / "model.pt2")
    with pytest.raises(mmcompile.ExportError, match=r"must end in \.pt2"):
        mmcompile.package(program, tmp_path / "model.zip")


class Attention(nn.Module):
    """One attention, with a mask that somebody else made."""

    def forward(self, query, key, value, mask):
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _attention_program(mask):
    query = torch.randn(1, 2, 256, 16)
    return torch.export.export(Attention(), (query, query, query, mask))


def test_an_opaque_mask_comes_back_unchanged_with_the_reason():
    program = _attention_program(torch.randn(1, 1, 256, 256))
    before = program.graph_module.code
    assert mmcompile.transform(program) is program
    assert program.graph_module.code == before
    (site,) = mmcompile.explain(program).sites
    assert not site.sparse and site.reason is Reason.OPAQUE_MASK
    with pytest.raises(mmcompile.UnsupportedSitesError, match="opaque mask"):
        mmcompile.transform(program, strict=True)


def test_a_graph_without_attention_comes_back_unchanged():
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    assert mmcompile.transform(program) is program
    assert mmcompile.explain(program).sites == ()


@torch.no_grad()
def test_attention_taken_apart_is_named():
    program = _attention_program(torch.ones(256, 256).tril().bool()).run_decompositions()
    assert mmcompile.transform(program) is program
    (site,) = mmcompile.explain(program).sites
    assert site.reason is Reason.UNREAD and site.detail == "written out as softmax and matmul"


@torch.no_grad()
def test_a_program_keeps_what_was_decided():
    model = mmcompile.compile(FAMILIES["internvl"].model())  # what is exported is the model, not what compiles it
    program = mmcompile.export(model, kwargs=inputs_of("internvl", model, 140), density=0.3)
    record = record_of(copy.copy(program))
    assert record.settings["density"] == 0.3 and "top_p" in record.settings["patterns"]
    assert record.versions["torch"] == torch.__version__
    assert mmcompile.explain(program).sites == record.sites
    assert [site.layer for site in record.sites] == [0, 1] and all(site.sparse for site in record.sites)
    assert op_count(program.graph_module, torch.ops.mminference.block_sparse_attention.default) == 2


@torch.no_grad()
def test_a_program_of_fixed_shapes_and_positional_inputs():
    class Causal(nn.Module):
        def forward(self, query, key, value):
            return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True), key

    query, key, value = torch.randn(3, 2, 2, 300, 16)
    program = mmcompile.export(Causal(), (query, key, value), dynamic_shapes=({2: Dim.AUTO},) * 3, density=1.0)
    got, kept = program.module()(query, key, value, **_examples(program))
    torch.testing.assert_close(got, Causal()(query, key, value)[0], atol=1e-5, rtol=0)
    assert torch.equal(kept, key)


def _examples(program):
    return {name: program.example_inputs[1][name] for name in BOUNDARY_NAMES}
