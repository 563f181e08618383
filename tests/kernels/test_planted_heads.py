"""The planted heads of the benchmarks are what they say: mass, keys, boundaries, the same again."""

import pytest
import torch

from benchmarks.planted_heads import (
    PLANT_KINDS,
    TEXT,
    VIDEO,
    Head,
    Look,
    Plant,
    Segment,
    Truth,
    plant_heads,
    planted_mass,
    random_plant,
    sample_rows,
    softmax_rows,
    video_like_mixture,
)

TOKENS = 4096
TEXT_VIDEO_TEXT = (Segment(TEXT, 5), Segment(VIDEO, 12, (3, 2, 2)), Segment(TEXT, 3))


def truth_of(head, segments=TEXT_VIDEO_TEXT, stride=4):
    plant = Plant(segments, (head,), 1, stride)
    truth = Truth(plant, torch.Generator().manual_seed(1))
    return truth, truth.mask(0, torch.arange(plant.tokens))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", PLANT_KINDS)
def test_planted_keys_hold_the_mass(kind, seed):
    planted = plant_heads(random_plant(kind, TOKENS, seed))
    found = planted_mass(planted, sample_rows(TOKENS, 128))
    # Where most earlier keys are planted the mass may be anything above.
    mass = found.mass[0, found.planted_keys[0] < 0.5]
    assert len(mass) > 100
    assert 0.93 < mass.mean() < 0.97
    assert mass.quantile(0.02) > 0.90 and mass.max() < 0.99


@pytest.mark.parametrize("kind", PLANT_KINDS)
def test_few_keys_are_planted(kind):
    plant = random_plant(kind, TOKENS, seed=3)
    planted = plant_heads(plant)
    found = planted_mass(planted, sample_rows(TOKENS, 128))
    last = found.planted_keys[0, -64:]
    assert last[last < 1].mean() < 0.02 + 1 / plant.stride + (0.08 if kind == "2d" else 0.0)


def test_mixture_is_one_percent_of_the_keys_but_much_of_the_tiles():
    planted = video_like_mixture(TOKENS, dtype=torch.bfloat16, text=100)
    assert planted.query.shape == (1, 28, TOKENS, 128) and planted.key.shape == planted.value.shape == (
        1,
        4,
        TOKENS,
        128,
    )
    assert planted.query.dtype == planted.key.dtype == planted.value.dtype == torch.bfloat16
    names = [head.name for head in planted.plant.heads]
    assert [names.count(name) for name in ("grid", "local", "columns")] == [12, 8, 8]
    found = planted_mass(planted, torch.arange(TOKENS - 64, TOKENS))
    assert 0.94 < found.mass.mean() < 0.96
    by_kind = {
        name: torch.tensor([head for head, its in enumerate(names) if its == name]) for name in dict.fromkeys(names)
    }
    keys = {name: float(found.planted_keys[heads].mean()) for name, heads in by_kind.items()}
    assert keys == pytest.approx({"grid": 1 / 256, "local": 0.01, "columns": 0.01}, rel=0.1)
    tiles = {name: float(found.needed_tiles[heads].mean()) for name, heads in by_kind.items()}
    assert tiles["grid"] > 0.4 and tiles["local"] < 0.1 and tiles["columns"] > 0.4


def test_mass_is_as_asked():
    found = planted_mass(video_like_mixture(2048, mass=0.8), torch.arange(1500, 2048, 8))
    assert 0.78 < found.mass.mean() < 0.82


def test_softmax_is_torchs():
    planted = video_like_mixture(1024)
    dense = torch.nn.functional.scaled_dot_product_attention(
        planted.query, planted.key, planted.value, is_causal=True, enable_gqa=True
    )
    rows = sample_rows(1024, 32, last=8)
    for head, weights in enumerate(softmax_rows(planted, rows)):
        expected = (weights @ planted.value[0, head // 7].double()).float()
        torch.testing.assert_close(dense[0, head, rows], expected, atol=1e-4, rtol=1e-4)


def test_same_seed_gives_the_same_again():
    one, again, other = (plant_heads(random_plant("2d", 2048, seed)) for seed in (5, 5, 6))
    assert one.plant == again.plant != other.plant
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(one, name), getattr(again, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))


def test_heads_of_a_kv_group_may_differ():
    heads = (
        Head("grid", (Look("site"),)),
        Head("both", (Look("columns", share=0.5), Look("site", share=0.5))),
        Head("local", (Look("local"),)),
        Head("columns", (Look("columns"),)),
    )
    planted = plant_heads(Plant((Segment(TEXT, 30), Segment(VIDEO, 2018)), heads, 1, stride=64))
    mass = planted_mass(planted, torch.arange(200, 2048, 16)).mass.mean(1)
    torch.testing.assert_close(mass, torch.full_like(mass, 0.95), atol=0.02, rtol=0.0)


def test_site_mask_counts_from_the_video():
    _, mask = truth_of(Head("site", (Look("site"),)))
    position = torch.arange(20)
    same = (position[:, None] - position) % 4 == 0
    assert torch.equal(mask, same & (position[:, None] >= position))
    truth, _ = truth_of(Head("site", (Look("site"),)))
    assert truth.site[5] == 0 and truth.site[16] == 3 and truth.site[17] == 0


def test_site_starts_anew_in_each_video():
    segments = (Segment(VIDEO, 8, (2, 2, 2)), Segment(TEXT, 3), Segment(VIDEO, 4, (1, 2, 2)), Segment(TEXT, 1))
    truth, mask = truth_of(
        Head("site", (Look("site", queries=VIDEO, keys=VIDEO), Look("local", queries=TEXT))), segments
    )
    assert truth.site.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0]
    assert mask[12].nonzero().flatten().tolist() == [1, 5, 12]
    assert mask[15].nonzero().flatten().tolist() == [12, 13, 14, 15]


def test_pairs_of_modalities_look_at_their_own_keys():
    plant = random_plant("2d", 2048, seed=2)
    truth = Truth(plant, torch.Generator().manual_seed(0))
    mask = truth.mask(0, torch.arange(2048))
    video, text = truth.modality == VIDEO, truth.modality == TEXT
    first_text = plant.segments[0].tokens
    looked = mask[video][:, text].any(0).nonzero().flatten()
    assert looked.tolist() == list(range(first_text))
    assert (mask[text][:, video].sum(0) > 0).sum() <= 0.02 * video.sum()  # the same few columns for every text query
    assert not mask.triu(1).any()


def test_looks_of_one_query_share_no_key():
    plant = random_plant("grid v+s", 2048, seed=0)
    truth = Truth(plant, torch.Generator().manual_seed(0))
    assert not (truth.keys[0, 0] & truth.keys[0, 1]).any()


def test_boundaries_cover_the_tokens_and_may_hide_the_grid():
    told = set()
    for seed in range(6, 14):
        plant = random_plant("grid s", 2048, seed)
        boundaries = plant_heads(plant).boundaries
        assert boundaries.offsets[0] == 0 and boundaries.offsets[-1] == 2048
        assert (boundaries.offsets.diff() > 0).all()
        assert {tensor.dtype for tensor in boundaries} == {torch.int32}
        assert len(boundaries.modality) == len(boundaries.grid) == len(boundaries.offsets) - 1
        video = int((boundaries.modality == VIDEO).nonzero().item())
        grid = boundaries.grid[video]
        told.add(bool(grid.any()))
        assert not grid.any() or (grid.prod() == boundaries.offsets.diff()[video] and grid[1:].prod() == plant.stride)
    assert told == {True, False}


def test_refuses_what_it_cannot_plant():
    with pytest.raises(ValueError, match="one of them at most"):
        Plant((Segment(TEXT, 64),), (Head("two", (Look("site"), Look("local"))),), 1, stride=8)
    with pytest.raises(ValueError, match="key_heads=2"):
        Plant((Segment(TEXT, 64),), (Head("one", (Look("site"),)),) * 3, 2, stride=8)
    heads = (Head("local", (Look("local"),)), Head("site", (Look("site"),)))
    with pytest.raises(ValueError, match="channels"):
        plant_heads(Plant((Segment(TEXT, 64),), heads, 1, stride=8, width=16))
