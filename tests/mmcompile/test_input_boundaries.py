"""Boundaries and grids read from a call's inputs, against a slow reading of the same prompts in plain Python."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mmcompile.encode_first import encodes_first
from mmcompile.input_boundaries import IMAGE, TEXT, VIDEO, boundary_tensors_of
from tests.models.families import FAMILIES

IDS = {TEXT: 7, IMAGE: 500, VIDEO: 501}
MERGING = SimpleNamespace(image_token_id=500, video_token_id=501, vision_config=SimpleNamespace(spatial_merge_size=2))


def read(config, **inputs):
    """Segments as (modality, tokens, grid), and the batch's rows they start in, empty ones left out."""
    found = boundary_tensors_of(config, inputs)
    assert {tensor.dtype for tensor in found} == {torch.int32}
    lengths = found.offsets.diff().tolist()
    segments = zip(found.modality.tolist(), lengths, found.grid.tolist(), strict=True)
    return [(kind, length, tuple(grid)) for kind, length, grid in segments if length > 0]


# A part of a prompt: text of so many tokens, an image (rows, columns), a video (frames, rows, columns, timestamps).
sizes = st.integers(1, 4)
texts = st.tuples(st.just(TEXT), st.integers(1, 5))
pictures = st.tuples(st.just(IMAGE), sizes, sizes)
clips = st.tuples(st.just(VIDEO), sizes, sizes, sizes, st.booleans())
rows = st.lists(st.one_of(texts, pictures, clips), min_size=1, max_size=6)


def lay_out(parts):
    """Runs of one prompt, (modality, tokens, grid): two runs of text that touch are one."""
    runs = []
    for kind, *size in parts:
        if kind == TEXT:
            new = [(TEXT, size[0], (0, 0, 0))]
        elif kind == IMAGE:
            new = [(IMAGE, size[0] * size[1], (1, *size))]
        else:
            frames, height, width, stamped = size
            frame = (VIDEO, height * width, (1, height, width))
            whole = [(VIDEO, frames * height * width, (frames, height, width))]
            new = [(TEXT, 2, (0, 0, 0)), frame] * frames if stamped else whole
        for run in new:
            if run[0] == TEXT and runs and runs[-1][0] == TEXT:
                runs[-1] = (TEXT, runs[-1][1] + run[1], (0, 0, 0))
            else:
                runs.append(run)
    return runs


def batch_of(prompts):
    """The runs of a left-padded batch, its ids, and the grids in order of appearance, in patches of 2 x 2."""
    laid_out = [lay_out(parts) for parts in prompts]
    longest = max(sum(tokens for _, tokens, _ in runs) for runs in laid_out)
    expected, ids = [], []
    for runs in laid_out:
        padding = longest - sum(tokens for _, tokens, _ in runs)
        if padding:
            extra = runs.pop(0)[1] if runs[0][0] == TEXT else 0
            runs.insert(0, (TEXT, padding + extra, (0, 0, 0)))
        expected += runs
        ids.append([IDS[kind] for kind, tokens, _ in runs for _ in range(tokens)])
    grids = {IMAGE: [], VIDEO: []}
    for kind, *size in (part for parts in prompts for part in parts if part[0] != TEXT):
        frames, height, width = (1, *size) if kind == IMAGE else size[:3]
        grids[kind].append([frames, 2 * height, 2 * width])
    named = {
        f"{name}_grid_thw": torch.tensor(grids[kind])
        for name, kind in (("image", IMAGE), ("video", VIDEO))
        if grids[kind]
    }
    return expected, torch.tensor(ids), named


@given(st.lists(rows, min_size=1, max_size=3), st.booleans())
def test_patch_grids_give_every_image_video_and_frame_its_own(prompts, by_types):
    expected, ids, grids = batch_of(prompts)
    if by_types:
        kinds = (ids == IDS[IMAGE]) * IMAGE + (ids == IDS[VIDEO]) * VIDEO
        assert read(MERGING, mm_token_type_ids=kinds.int(), **grids) == expected
    else:
        assert read(MERGING, input_ids=ids, **grids) == expected


@given(st.lists(rows, min_size=1, max_size=2), st.integers(1, 3))
def test_grids_that_do_not_count_the_tokens_are_none(prompts, more):
    _, ids, grids = batch_of(prompts)
    for name, kind in (("image_grid_thw", IMAGE), ("video_grid_thw", VIDEO)):
        if name in grids:
            grids[name] = torch.cat([grids[name], torch.tensor([[1, 2, 2 * more]])])
            assert all(grid == (0, 0, 0) for of, _, grid in read(MERGING, input_ids=ids, **grids) if of == kind)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 6))
def test_frames_of_a_size_that_the_config_tells(frames, text, videos, padding):
    config = SimpleNamespace(video_token_id=501, vision_config=SimpleNamespace(image_size=56, patch_size=14))
    row = [*[7] * padding, *([501] * (16 * frames) + [7] * text) * videos]
    expected = [(TEXT, padding, (0, 0, 0))] + [(VIDEO, 16 * frames, (frames, 4, 4)), (TEXT, text, (0, 0, 0))] * videos
    assert read(config, input_ids=torch.tensor([row])) == expected
    row.insert(padding, 501)  # one token that is none of a frame's
    assert read(config, input_ids=torch.tensor([row]))[1] == (VIDEO, 16 * frames + 1, (0, 0, 0))


SIGLIP_384 = SimpleNamespace(image_size=384, patch_size=14)
CONFIGS = [
    # LLaVA: 336 / 14 patches a side
    ({"image_size": 336, "patch_size": 14}, {"image_seq_length": 576}, IMAGE, 576, (1, 24, 24)),
    # InternVL: pixels shuffled, here twelve tiles
    ({"image_size": [448, 448], "patch_size": [14, 14]}, {"downsample_ratio": 0.5}, IMAGE, 12 * 256, (12, 16, 16)),
    # Gemma 3: pooled to a count that the config names
    ({"image_size": 896, "patch_size": 14}, {"mm_tokens_per_image": 256}, IMAGE, 256, (1, 16, 16)),
    # Aya Vision, Idefics 3, PerceptionLM: sides divided
    ({"image_size": 364, "patch_size": 14}, {"downsample_factor": 2}, IMAGE, 169, (1, 13, 13)),
    ({"image_size": 364, "patch_size": 14}, {"scale_factor": 2}, IMAGE, 169, (1, 13, 13)),
    ({"image_size": 448, "patch_size": 14}, {"projector_pooling_ratio": 2}, VIDEO, 3 * 256, (3, 16, 16)),
    # LLaVA-NeXT-Video: frames pooled, images not
    ({"image_size": 336, "patch_size": 14}, {"spatial_pool_stride": 2}, VIDEO, 8 * 144, (8, 12, 12)),
    ({"image_size": 336, "patch_size": 14}, {"spatial_pool_stride": 2}, IMAGE, 576, (1, 24, 24)),
    # LongVILA and VideoChat-Flash: tokens that have no rows
    ({"image_size": 384, "patch_size": 14}, {"tokens_per_frame": 16}, VIDEO, 64 * 16, (64, 1, 16)),
    # any size: nothing to tell
    ({"patch_size": 14}, {}, IMAGE, 576, (0, 0, 0)),
    ({"image_size": 336, "patch_size": 14}, {}, IMAGE, 577, (0, 0, 0)),
]


@pytest.mark.parametrize(("vision", "fields", "kind", "tokens", "grid"), CONFIGS)
def test_configs_tell_the_grid_of_their_family(vision, fields, kind, tokens, grid):
    config = SimpleNamespace(image_token_id=500, video_token_id=501, vision_config=SimpleNamespace(**vision), **fields)
    ids = torch.tensor([[7, 7, *[IDS[kind]] * tokens, 7]])
    assert read(config, input_ids=ids) == [(TEXT, 2, (0, 0, 0)), (kind, tokens, grid), (TEXT, 1, (0, 0, 0))]


def test_llava_onevision_closes_a_video_with_one_token_that_is_in_no_frame():
    config = SimpleNamespace(
        image_token_id=500, video_token_id=501, vision_config=SIGLIP_384, image_grid_pinpoints=[[384, 384]]
    )
    ids = torch.tensor([[7, *[501] * (8 * 196 + 1), 7, *[500] * 729, 7, *[500] * (3 * 729), 7]])
    none = (0, 0, 0)
    assert read(config, input_ids=ids) == [
        (TEXT, 1, none),
        (VIDEO, 8 * 196, (8, 14, 14)),
        (VIDEO, 1, none),
        (TEXT, 1, none),
        (IMAGE, 729, (1, 27, 27)),
        (TEXT, 1, none),
        (IMAGE, 3 * 729, none),  # tiles and line ends
        (TEXT, 1, none),
    ]


def test_the_encoders_output_says_how_many_tokens_an_image_has():
    config = SimpleNamespace(image_token_id=500, vision_config=SimpleNamespace(image_size=56, patch_size=14))
    ids = torch.tensor([[7, *[500] * 32, 7]])
    for tokens, grid in ((16, (2, 4, 4)), (32, (0, 0, 0))):
        outputs = {"image": SimpleNamespace(pooler_output=torch.zeros(32 // tokens, tokens, 8))}
        assert read(config, input_ids=ids, mm_encoder_outputs=outputs)[1] == (IMAGE, 32, grid)


def test_positions_give_grids_to_segments_that_ids_tell():
    axes = torch.meshgrid(torch.arange(2), torch.arange(2), torch.arange(3), indexing="ij")
    vision = torch.stack([axis.reshape(-1) for axis in axes]) + 3
    text = torch.arange(3).expand(3, -1)
    positions = torch.cat([text, vision, text + 6], dim=1)[:, None]
    ids = torch.tensor([[7] * 3 + [501] * 12 + [7] * 3])
    none = (0, 0, 0)
    expected = [(TEXT, 3, none), (VIDEO, 12, (2, 2, 3)), (TEXT, 3, none)]
    with_text = torch.cat([torch.arange(18).expand(1, 1, -1), positions])
    for given_positions in (positions, with_text):
        assert read(MERGING, input_ids=ids, position_ids=given_positions) == expected
    shuffled = positions[:, :, torch.cat([torch.arange(3), 3 + torch.randperm(12), torch.arange(15, 18)])]
    assert read(MERGING, input_ids=ids, position_ids=shuffled)[1] == (VIDEO, 12, none)


def test_types_that_go_back_to_the_prefix_are_read_for_this_calls_tokens():
    types = torch.tensor([[0, 2, 2, 2, 0, 0, 1, 1]])
    assert read(MERGING, input_ids=torch.tensor([[7, 7, 500, 500]]), mm_token_type_ids=types) == [
        (TEXT, 2, (0, 0, 0)),
        (IMAGE, 2, (0, 0, 0)),
    ]
    embeddings = torch.zeros(1, 3, 8)
    assert read(MERGING, inputs_embeds=embeddings, mm_token_type_ids=types) == [
        (TEXT, 1, (0, 0, 0)),
        (IMAGE, 2, (0, 0, 0)),
    ]


def test_a_mask_of_placeholders_tells_images():
    mask = torch.tensor([[False, True, True, False]])
    expected = [(TEXT, 1, (0, 0, 0)), (IMAGE, 2, (0, 0, 0)), (TEXT, 1, (0, 0, 0))]
    assert read(SimpleNamespace(), images_seq_mask=mask) == expected
    assert read(SimpleNamespace(), visual_pos_masks=mask[..., None]) == expected
    assert boundary_tensors_of(SimpleNamespace(), {"attention_mask": mask}) is None


def test_nothing_waits_for_the_device_or_has_a_shape_that_depends_on_data():
    config = SimpleNamespace(
        image_token_id=500, video_token_id=501, vision_config=SIGLIP_384, image_grid_pinpoints=[[384, 384]]
    )
    with FakeTensorMode():  # has no values to read
        ids = torch.zeros(2, 40, dtype=torch.int64)
        grids = torch.ones(3, 3, dtype=torch.int64)
        for inputs in (
            {"input_ids": ids},
            {"input_ids": ids, "image_grid_thw": grids, "video_grid_thw": grids},
            {"mm_token_type_ids": ids, "video_grid_thw": grids, "video_merge_sizes": grids[:, 0]},
            {"input_ids": ids, "position_ids": ids.expand(3, -1, -1)},
            {"position_ids": ids.expand(3, -1, -1)},
        ):
            found = boundary_tensors_of(config, inputs)
            assert [tensor.shape[0] for tensor in found] == [81, 80, 80]


@pytest.mark.parametrize(
    ("family", "grid"),
    [
        ("llava", (1, 4, 4)),
        ("internvl", (1, 2, 2)),
        ("gemma3", (1, 2, 2)),
        ("qwen2_5_vl", (2, 2, 2)),
        ("qwen3_vl", (1, 2, 2)),
        ("llava_onevision", (2, 2, 2)),
        ("llava_next_video", (2, 2, 2)),
        ("aya_vision", (1, 2, 2)),
        ("videochat_flash", (4, 1, 16)),
    ],
)
def test_the_prompts_of_real_families(family, grid):
    model = FAMILIES[family].model()
    if family.startswith("llava_") and not encodes_first(model):
        pytest.skip("this version of transformers encodes videos in another way")
    inputs = FAMILIES[family].prompts(model).first
    vision = [segment for segment in read(model.config, **inputs) if segment[0] != TEXT]
    assert vision[0][2] == grid
    assert vision[0][1] == grid[0] * grid[1] * grid[2]
