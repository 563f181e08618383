"""Triton kernels of `kernels/probes.py`, and their launches: where probes stand, and what comes of what they attend to.

Samples of a row are numbered as `Probes.slots` has them. What a program adds up it adds in one order, so that every run
gives the same plan.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.patterns import MODALITIES, TILE
from mmcompile.kernels.probes import HORIZONTAL, HOT, MEASURING, PROBED, RASTER_LEAD, SPREAD, Measured, Probes
from mmcompile.kernels.scene import SCATTERED, Pair, Rows
from mmcompile.kernels.scores import BETWEEN, SAMPLES

BLOCK = 1024  # key tiles of one step
ROWS = 4  # samples, or probes, of one program
KEYS = 2048  # of one program
LISTED = 64  # tiles of a list, of each probe, in one step
# Sums and products apart, as torch has them. Named, because Triton 3.10 changes the default and 3.9 warns of it.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["heads", "query_orders", "key_orders", "query_length", "key_length"])
def _place_kernel(
    query_slots, query_tags, key_slots, last, query_row, key_row, slots, choosing, own_tiles, positions, weights,
    heads, query_orders, key_orders, query_length, key_length,
    SPREAD: tl.constexpr, MODALITIES: tl.constexpr, SAMPLES: tl.constexpr, BETWEEN: tl.constexpr,
    MEASURING: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The probes of one plan row."""
    PROBED: tl.constexpr = SPREAD + MODALITIES
    HALF: tl.constexpr = PROBED // 2
    CHOOSING: tl.constexpr = SAMPLES * PROBED
    row = tl.program_id(0).to(tl.int64)
    batch = row // heads
    query_order = batch * query_orders + tl.load(query_row + row)
    key_order = batch * key_orders + tl.load(key_row + row)
    query_tiles = tl.cdiv(query_length, TILE)
    query_slots += query_order * query_length
    query_tags += query_order * 3 * query_length
    key_slots += key_order * key_length
    last += batch * MODALITIES

    sample = tl.arange(0, PADDED)
    inside = sample < CHOOSING + PROBED
    chooses = sample < CHOOSING
    of_half = tl.where(chooses, sample % (SAMPLES * HALF), sample - CHOOSING)
    half = tl.where(chooses, sample // (SAMPLES * HALF), (sample - CHOOSING) // HALF)
    which = tl.where(chooses, of_half // HALF, SAMPLES)
    probed = of_half % HALF * 2 + half
    tile = tl.maximum((probed + 1) * query_tiles // SPREAD - 1, 0)
    is_last = inside & (probed >= SPREAD)
    query = tl.load(last + probed - SPREAD, mask=is_last, other=0)
    of_last = tl.load(query_slots + tl.maximum(query, 0), mask=is_last, other=0) // TILE
    tile = tl.where(is_last, tl.where(query < 0, 0, of_last), tile)
    moved = tl.where(which == SAMPLES, MEASURING, BETWEEN)
    place = tl.where(which == 0, 0, tl.where(which == 1, TILE - 1, (tile * STEP + moved) % TILE))
    slot = tl.minimum(tile * TILE + place, query_length - 1)
    tl.store(slots + row * (CHOOSING + PROBED) + sample, slot.to(tl.int64), mask=inside)
    tl.store(choosing + row * CHOOSING + sample, slot.to(tl.int64), mask=chooses)
    weight = tl.where(is_last & (query < 0), 0.0, 1.0)
    tl.store(weights + row * PROBED + sample - CHOOSING, weight, mask=inside & (sample >= CHOOSING))
    position = tl.load(query_tags + slot, mask=chooses, other=0)
    nearest = tl.minimum(tl.maximum(position, 0), key_length - 1)
    own = tl.load(key_slots + nearest, mask=chooses, other=0) // TILE
    tl.store(positions + row * CHOOSING + sample, position, mask=chooses)
    tl.store(own_tiles + row * CHOOSING + sample, own, mask=chooses)


@triton.jit
def _log_totals(log_mass, key_tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Logarithms of the sums of the exponentials of all tiles; -inf where there are none. log_mass: [ROWS], pointers to
    each first tile."""
    column = tl.arange(0, BLOCK)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, key_tiles, BLOCK):
        inside = (column < key_tiles - start)[None, :]
        some = tl.load((log_mass + start)[:, None] + column[None, :], mask=inside, other=float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(some, 1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(some - shift[:, None]), 1)
        maximum = new_maximum
    return tl.where(maximum == float("-inf"), maximum, maximum + tl.log(tl.maximum(total, 1.0)))


@triton.jit(do_not_specialize=["key_tiles"])
def _totals_kernel(
    log_mass, weights, every, counted, key_tiles,
    SAMPLES: tl.constexpr, PROBED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some samples: their totals, and, of those that choose, the same where their probes count."""
    EVERY: tl.constexpr = (SAMPLES + 1) * PROBED
    HALF: tl.constexpr = PROBED // 2
    row = (tl.program_id(0) // (EVERY // ROWS)).to(tl.int64)
    sample = tl.program_id(0) % (EVERY // ROWS) * ROWS + tl.arange(0, ROWS)
    total = _log_totals(log_mass + (row * EVERY + sample) * key_tiles, key_tiles, ROWS, BLOCK)
    tl.store(every + row * EVERY + sample, total)
    chooses = sample < SAMPLES * PROBED
    probe = sample // (SAMPLES * HALF) * HALF + sample % HALF
    counts = tl.load(weights + row * PROBED + probe, mask=chooses, other=0.0) > 0
    tl.store(counted + row * (SAMPLES * PROBED) + sample, tl.where(counts, total, float("-inf")), mask=chooses)


@triton.jit(do_not_specialize=["heads", "key_orders", "keys", "hot"])
def _hot_weight_kernel(
    mass, positions, counted, key_tags, key_row, output, heads, key_orders, keys, hot,
    CHOOSING: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The weight of some keys of one plan row. mass: float32 [N, 2, Sk]. output: float32 [N, Sk]."""
    blocks = tl.cdiv(keys, KEYS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
    inside = slot < keys
    one = tl.load(mass + row * 2 * keys + slot, mask=inside, other=0.0)
    other = tl.load(mass + (row * 2 + 1) * keys + slot, mask=inside, other=0.0)
    key_tags += (row // heads * key_orders + tl.load(key_row + row)) * 3 * keys
    position = tl.load(key_tags + slot, mask=inside, other=0)
    # The last position of a query that counts, of each half, -1 for none: keys before both are seen by both.
    sample = tl.arange(0, PADDED)
    log_total = tl.load(counted + row * CHOOSING + sample, mask=sample < CHOOSING, other=float("-inf"))
    query = tl.load(positions + row * CHOOSING + sample, mask=log_total > float("-inf"), other=-1)
    first = tl.max(tl.where(sample < CHOOSING // 2, query, -1))
    second = tl.max(tl.where(sample >= CHOOSING // 2, query, -1))
    weight = tl.where(position <= tl.minimum(first, second), tl.minimum(one, other), tl.maximum(one, other))
    tl.store(output + row * keys + slot, tl.where(weight * keys > hot, weight, 0.0), mask=inside)


@triton.jit(do_not_specialize=["wanted", "key_tiles"])
def _agreement_kernel(
    log_mass, every, weights, scratch, held, outside, weighed, wanted, key_tiles,
    SAMPLES: tl.constexpr, PROBED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some probes: what each measuring query has on the `wanted` tiles that the choosing ones attend to most."""
    EVERY: tl.constexpr = (SAMPLES + 1) * PROBED
    HALF: tl.constexpr = PROBED // 2
    row = (tl.program_id(0) // (PROBED // ROWS)).to(tl.int64)
    probe = tl.program_id(0) % (PROBED // ROWS) * ROWS + tl.arange(0, ROWS)
    log_mass += row * EVERY * key_tiles
    of_row = row * PROBED + probe
    first = probe // HALF * SAMPLES * HALF + probe % HALF  # of each probe's samples; others follow in steps of a half
    column = tl.arange(0, BLOCK)
    chosen = (scratch + of_row * key_tiles)[:, None] + column[None, :]
    for sample in range(SAMPLES):
        source = log_mass + (first + sample * HALF) * key_tiles
        total = _log_totals(source, key_tiles, ROWS, BLOCK)
        shift = tl.where(total == float("-inf"), 0.0, total)
        for start in range(0, key_tiles, BLOCK):
            inside = (column < key_tiles - start)[None, :]
            some = tl.load((source + start)[:, None] + column[None, :], mask=inside, other=float("-inf"))
            earlier = tl.load(chosen + start, mask=inside & (sample > 0), other=0.0)
            tl.store(chosen + start, earlier + tl.exp(some - shift[:, None]), mask=inside)
        tl.debug_barrier()  # what one thread wrote another may read
    # The greatest number that as many as are wanted reach, bit by bit: those of numbers from 0 on are ordered as these.
    bound = tl.zeros([ROWS], tl.int32)
    for step in range(31):
        higher = bound | (tl.full([], 1, tl.int32) << (30 - step))
        reach = tl.zeros([ROWS, BLOCK], tl.int32)
        for start in range(0, key_tiles, BLOCK):
            some = tl.load(chosen + start, mask=(column < key_tiles - start)[None, :], other=-1.0)
            reach += (some.to(tl.int32, bitcast=True) >= higher[:, None]).to(tl.int32)
        bound = tl.where(tl.sum(reach, 1) >= wanted, higher, bound)
    source = log_mass + (EVERY - PROBED + probe) * key_tiles
    total = _log_totals(source, key_tiles, ROWS, BLOCK)
    shift = tl.where(total == float("-inf"), 0.0, total)
    more = tl.zeros([ROWS], tl.int32)
    equal = tl.zeros([ROWS], tl.int32)
    of_more = tl.zeros([ROWS], tl.float32)
    of_equal = tl.zeros([ROWS], tl.float32)
    for start in range(0, key_tiles, BLOCK):
        inside = (column < key_tiles - start)[None, :]
        bits = tl.load(chosen + start, mask=inside, other=-1.0).to(tl.int32, bitcast=True)
        some = tl.load((source + start)[:, None] + column[None, :], mask=inside, other=float("-inf"))
        share = tl.exp(some - shift[:, None])
        is_more = bits > bound[:, None]
        is_equal = bits == bound[:, None]
        more += tl.sum(is_more.to(tl.int32), 1)
        equal += tl.sum(is_equal.to(tl.int32), 1)
        of_more += tl.sum(tl.where(is_more, share, 0.0), 1)
        of_equal += tl.sum(tl.where(is_equal, share, 0.0), 1)
    part = (wanted - more).to(tl.float32) / equal.to(tl.float32)
    tl.store(held + of_row, of_more + of_equal * part)
    of_every = tl.load(every + row * EVERY + EVERY - PROBED + probe)
    sees = of_every > float("-inf")
    within = tl.where(sees, tl.exp(total - tl.where(sees, of_every, 0.0)), 1.0)
    tl.store(outside + of_row, 1.0 - within)
    tl.store(weighed + of_row, tl.where(sees, tl.load(weights + of_row), 0.0))


@triton.jit(do_not_specialize=["heads", "lead", "site", "most", "searched", "query_orders", "query_length"])
def _choose_kernel(
    held, outside, weights, spread_out, searched_slots, query_sites, query_orders_of, key_orders_of,
    query_row, key_row, pair, chosen,
    heads, lead, site, most, searched, query_orders, query_length,
    PAIRS: tl.constexpr, PROBED: tl.constexpr, SEARCHED: tl.constexpr, HORIZONTAL: tl.constexpr,
):  # fmt: skip
    """The pair of orders of one head. site: the pair by site. most: share of the query tiles that may be exceptions."""
    plan = tl.program_id(0).to(tl.int64)
    batch = plan // heads
    first = batch * PAIRS * heads + plan % heads  # of the head's rows; those of other pairs follow in steps of `heads`
    probe = tl.arange(0, PROBED)
    # Horizontal lines. A query counts for as much as it and its neighbour both put outside other lines.
    pairs_searched = searched // 2
    order = batch * query_orders + tl.load(query_orders_of + site)
    tile = tl.arange(0, SEARCHED)
    inside = tile < pairs_searched
    outer = tl.full([SEARCHED], float("inf"), tl.float32)
    for neighbour in tl.static_range(2):
        index = neighbour * pairs_searched + tile
        slot = tl.load(searched_slots + index, mask=inside, other=0)
        # Text has no site.
        sited = tl.load(query_sites + order * query_length + slot, mask=inside, other=-1) >= 0
        share = tl.load(spread_out + plan * searched + index, mask=inside, other=0.0)
        outer = tl.minimum(outer, tl.where(sited, share, 0.0))
    tiles = pairs_searched.to(tl.float32)
    exceptions = tl.sum((outer > HORIZONTAL / 2).to(tl.float32)) / tiles
    lines = tl.sum(tl.where(outer > HORIZONTAL, outer, 0.0)) / tiles
    lines = tl.where(exceptions <= most, lines, 0.0)
    best = tl.full([], float("-inf"), tl.float32)
    found = tl.zeros([], tl.int32)
    for index in range(PAIRS):
        row = (first + index * heads) * PROBED + probe
        weight = tl.load(weights + row)
        within = weight * (1.0 - tl.load(outside + row))
        holds = tl.sum(tl.load(held + row) * within) / tl.maximum(tl.sum(within), 1e-6)
        mean = tl.sum(within) / tl.maximum(tl.sum(weight), 1e-6)
        holds += tl.where(index == 0, lead, 0.0)
        holds += tl.where(index == site, lines / tl.maximum(mean, 1e-6), 0.0)
        found = tl.where(holds > best, index, found)
        best = tl.maximum(best, holds)
    tl.store(query_row + plan, tl.load(query_orders_of + found))
    tl.store(key_row + plan, tl.load(key_orders_of + found))
    tl.store(pair + plan, batch * PAIRS + found)
    tl.store(chosen + plan, first + found * heads)


@triton.jit(do_not_specialize=["query_tiles", "entries", "key_tiles", "slot_stride", "mass_stride"])
def _recall_kernel(
    rows, slots, log_mass, every, outside, weights, counts, tiles, recall,
    query_tiles, entries, key_tiles, slot_stride, mass_stride,
    TILE: tl.constexpr, PROBED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """What one plan row computes of the attention of its probes."""
    plan = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + plan)
    probe = tl.arange(0, PROBED)
    query_tile = tl.load(slots + row * slot_stride + probe) // TILE
    counts += (plan * query_tiles + query_tile) * 5
    first = tl.load(counts)
    listed = tl.load(counts + 1) + tl.load(counts + 2)
    of_every = tl.load(every + row * PROBED + probe)
    shift = tl.where(of_every == float("-inf"), 0.0, of_every)
    held = tl.zeros([PROBED, LISTED], tl.float32)
    for start in range(0, tl.max(listed), LISTED):
        entry = start + tl.arange(0, LISTED)
        inside = entry[None, :] < listed[:, None]
        tile = tl.load(tiles + plan * entries + first[:, None] + entry[None, :], mask=inside, other=0)
        source = log_mass + row * mass_stride + (probe[:, None] * key_tiles + tile)
        held += tl.exp(tl.load(source, mask=inside, other=float("-inf")) - shift[:, None])
    weight = tl.load(weights + row * PROBED + probe)
    found = tl.sum(held, 1) + tl.load(outside + row * PROBED + probe)
    tl.store(recall + plan, tl.sum(found * weight) / tl.maximum(tl.sum(weight), 1e-6))


def place(rows: Rows, last: Tensor, query_slots: Tensor) -> Probes:
    """`Probes.of_cpu` for CUDA tensors."""
    scene, device = rows.scene, last.device
    query_tags, key_slots = scene.arrangement.query_tags, scene.key_slots()
    of_choosing = rows.rows, SAMPLES * PROBED
    slots = torch.empty(rows.rows, (SAMPLES + 1) * PROBED, dtype=torch.int64, device=device)
    choosing = torch.empty(of_choosing, dtype=torch.int64, device=device)
    own_tiles, positions = (torch.empty(of_choosing, dtype=torch.int32, device=device) for _ in range(2))
    weight = torch.empty(rows.rows, PROBED, dtype=torch.float32, device=device)
    with torch.cuda.device_of(slots):
        _place_kernel[(rows.rows,)](
            query_slots.contiguous(), query_tags.contiguous(), key_slots.contiguous(), last,
            rows.query_row.contiguous(), rows.key_row.contiguous(), slots, choosing, own_tiles, positions, weight,
            len(rows.heads), query_slots.shape[1], key_slots.shape[1], query_slots.shape[2], key_slots.shape[2],
            SPREAD, MODALITIES, SAMPLES, BETWEEN, MEASURING, SCATTERED, TILE,
            triton.next_power_of_2((SAMPLES + 1) * PROBED), **OPTIONS,
        )  # fmt: skip
    return Probes(slots, choosing, own_tiles, positions, weight)


def totals(log_mass: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`probes._totals_cpu` for CUDA tensors."""
    count, every, key_tiles = log_mass.shape
    result = log_mass.new_empty(count, every), log_mass.new_empty(count, SAMPLES * PROBED)
    with torch.cuda.device_of(log_mass):
        _totals_kernel[(count * every // ROWS,)](
            log_mass.contiguous(), weight.contiguous(), *result, key_tiles,
            SAMPLES, PROBED, ROWS, _block(key_tiles), **OPTIONS,
        )  # fmt: skip
    return result


def hot_weight(rows: Rows, positions: Tensor, counted: Tensor, mass: Tensor) -> Tensor:
    """`probes._hot_weight_cpu` for CUDA tensors."""
    key_tags = rows.scene.arrangement.key_tags
    count, _, keys = mass.shape
    result = mass.new_empty(count, keys)
    with torch.cuda.device_of(mass):
        _hot_weight_kernel[(count * triton.cdiv(keys, KEYS),)](
            mass.contiguous(), positions.contiguous(), counted.contiguous(), key_tags.contiguous(),
            rows.key_row.contiguous(), result, len(rows.heads), key_tags.shape[1], keys, HOT,
            SAMPLES * PROBED, triton.next_power_of_2(SAMPLES * PROBED), KEYS, **OPTIONS,
        )  # fmt: skip
    return result


def agreement(log_mass: Tensor, every: Tensor, weight: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """`probes._agreement_cpu` for CUDA tensors."""
    count, _, key_tiles = log_mass.shape
    scratch = log_mass.new_empty(count, PROBED, key_tiles)
    held, outside, weighed = (log_mass.new_empty(count, PROBED) for _ in range(3))
    with torch.cuda.device_of(log_mass):
        _agreement_kernel[(count * PROBED // ROWS,)](
            log_mass.contiguous(), every, weight.contiguous(), scratch, held, outside, weighed, wanted, key_tiles,
            SAMPLES, PROBED, ROWS, _block(key_tiles), **OPTIONS,
        )  # fmt: skip
    return held, outside, weighed


def choose(
    held: Tensor,
    outside: Tensor,
    weight: Tensor,
    spread_out: Tensor,
    searched: Tensor,
    query_site: Tensor,
    pairs: tuple[Pair, ...],
    site: int,
    most: float,
) -> tuple[Tensor, ...]:
    """`probes._choose_cpu` for CUDA tensors."""
    batch, query_orders, query_length = query_site.shape
    heads, device = held.shape[0] // (batch * len(pairs)), held.device
    query_row, key_row = (torch.empty(batch, heads, dtype=torch.int32, device=device) for _ in range(2))
    pair, row = (torch.empty(batch * heads, dtype=torch.int64, device=device) for _ in range(2))
    with torch.cuda.device_of(held):
        _choose_kernel[(batch * heads,)](
            held, outside, weight, spread_out.contiguous(), searched, query_site.contiguous(),
            *(head_indices(orders, device) for orders in zip(*pairs, strict=True)),
            query_row, key_row, pair, row,
            heads, RASTER_LEAD, site, most, searched.shape[0], query_orders, query_length,
            len(pairs), PROBED, triton.next_power_of_2(searched.shape[0] // 2), HORIZONTAL, **OPTIONS,
        )  # fmt: skip
    return query_row, key_row, pair, row


def recall(measured: Measured, counts: Tensor, tiles: Tensor) -> Tensor:
    """`Measured.recall_cpu` for CUDA tensors."""
    slot, log_mass, every, outside, weight, row = measured
    assert log_mass.stride()[1:] == (log_mass.shape[2], 1)
    result = every.new_empty(row.shape[0])
    with torch.cuda.device_of(every):
        _recall_kernel[(row.shape[0],)](
            row, slot, log_mass, every.contiguous(), outside.contiguous(), weight.contiguous(),
            counts.contiguous(), tiles.contiguous(), result,
            counts.shape[1], tiles.shape[1], log_mass.shape[2], slot.stride(0), log_mass.stride(0),
            TILE, PROBED, LISTED, **OPTIONS,
        )  # fmt: skip
    return result


def _block(key_tiles: int) -> int:
    return min(BLOCK, triton.next_power_of_2(key_tiles))
