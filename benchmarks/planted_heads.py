"""Random attention heads of which it is known what they look at.

A `Plant` says for every head which keys each query looks at. `plant_heads` makes queries, keys and values whose softmax
puts `mass` of every query's attention there and spreads the rest over all earlier keys. Keys carry codes in channels
of their own: one channel for a fixed set of keys, a random direction for a spatial site, waves of the position for
locality. A query is the code that it looks for, times the gain that gives its row the wanted mass. A random rotation
of each KV head's channels hides which is which, and queries and keys get noise.

`planted_mass` measures what came out, so that nobody has to believe the rest of this file.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

TEXT, VIDEO = 0, 2
TILE = 128  # keys of a raster tile

KEY_SCALE = 8.0  # length of one code in a key
KEY_NOISE = 0.25  # standard deviation in each channel
QUERY_NOISE = 0.2
LEAST_CHANNELS = 16  # with fewer, random codes are no longer told apart
GAIN_STEP, LARGEST_GAIN = 0.5, 32.0


@dataclass(frozen=True)
class Segment:
    """Tokens of one modality. grid: frames, rows, columns; zeros where the planner is not told."""

    modality: int
    tokens: int
    grid: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Look:
    """One set of earlier keys that a query looks at.

    kind: "site", the keys of the query's own site (a grid's slash lines); "lines", all keys of some sites, the same
        for every query (its vertical lines); "local", the latest keys; "columns", some random keys, the same for every
        query; "segment", the first segment of modality `keys`.
    fraction: of the sites ("lines"), of the tokens ("local", "columns").
    queries, keys: a modality, or None for all. share: of the head's planted mass.
    """

    kind: Literal["site", "lines", "local", "columns", "segment"]
    fraction: float = 0.01
    queries: int | None = None
    keys: int | None = None
    share: float = 1.0

    @property
    def fixed(self) -> bool:
        """Whether every query looks at the same keys."""
        return self.kind in ("lines", "columns", "segment")


@dataclass(frozen=True)
class Head:
    """What one head looks at.

    looks: the shares of those that serve a query, and have a key for it, are brought to 1. A key belongs to one look
        of a query: fixed sets come first, each without the keys of those before it.
    even: fraction of the sites whose queries look at all earlier keys alike (a grid's horizontal lines).
    """

    name: str
    looks: tuple[Look, ...]
    even: float = 0.0

    def groups(self) -> list[tuple[int | None, list[int]]]:
        """Each modality of queries (None: all), with the indices of the looks that serve them."""
        modalities = dict.fromkeys(look.queries for look in self.looks)
        return [(m, [i for i, look in enumerate(self.looks) if look.queries == m]) for m in modalities]


@dataclass(frozen=True)
class Plant:
    """Heads over one sequence.

    stride: tokens of a frame. A token's site is its distance from the first token of the latest segment that is not
        text (before any, of the first one), modulo the stride; text goes on counting, so that with one such segment
        tokens of the same site are a multiple of the stride apart.
    mass: planted share of each query's softmax. width: channels of a head.
    """

    segments: tuple[Segment, ...]
    heads: tuple[Head, ...]
    key_heads: int
    stride: int
    mass: float = 0.95
    width: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.heads) % self.key_heads:
            raise ValueError(f"{len(self.heads)} heads cannot share key_heads={self.key_heads} evenly")
        for head in self.heads:
            for modality, group in head.groups():
                moving = [head.looks[i].kind for i in group if not head.looks[i].fixed]
                if len(moving) > 1:
                    raise ValueError(f"head {head.name!r}: {moving} for queries of {modality}; one of them at most")

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return len(self.heads) // self.key_heads

    @property
    def starts(self) -> list[int]:
        """First token of each segment, and the end of the last."""
        starts = [0]
        for segment in self.segments:
            starts.append(starts[-1] + segment.tokens)
        return starts


class Boundaries(NamedTuple):
    """As the plan op takes them, int32."""

    offsets: Tensor  # [M + 1]
    modality: Tensor  # [M]
    grid: Tensor  # [M, 3]


@dataclass(frozen=True, eq=False)
class Planted:
    """The tensors of a plant and the truth about them.

    query: [1, H, S, D], key and value: [1, KV, S, D]; the scale of the softmax is D ** -0.5.
    """

    plant: Plant
    query: Tensor
    key: Tensor
    value: Tensor
    boundaries: Boundaries
    truth: "Truth"


class PlantedMass(NamedTuple):
    """float64 [H, R], of each head and measured query; NaN where nothing is planted for the query.

    Shares are of the earlier keys (its own among them), or of the raster tiles that hold them.
    """

    mass: Tensor  # softmax mass of the planted keys
    planted_keys: Tensor  # share of the keys that are planted
    needed_keys: Tensor  # least share of the keys that holds 95 % of the mass
    needed_tiles: Tensor  # least share of the tiles that holds 95 % of the mass


def plant_heads(plant: Plant, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Planted:
    """Queries, keys and values of a plant. The same plant gives the same tensors again on the same device."""
    generator = torch.Generator(device).manual_seed(plant.seed)
    truth = Truth(plant, generator)
    rows = (plant.tokens, plant.width)
    query = torch.empty(1, len(plant.heads), *rows, dtype=dtype, device=device)
    key, value = (torch.empty(1, plant.key_heads, *rows, dtype=dtype, device=device) for _ in range(2))
    for key_head in range(plant.key_heads):
        heads = range(key_head * plant.group, (key_head + 1) * plant.group)
        codes = _Codes(truth, heads, generator)
        key[0, key_head] = codes.keys()
        value[0, key_head] = torch.randn(rows, device=device, generator=generator)
        for head in heads:
            query[0, head] = codes.queries(head)
    offsets = torch.tensor(plant.starts, dtype=torch.int32)
    modality = torch.tensor([segment.modality for segment in plant.segments], dtype=torch.int32)
    grid = torch.tensor([segment.grid for segment in plant.segments], dtype=torch.int32)
    boundaries = Boundaries(offsets.to(device), modality.to(device), grid.to(device))
    return Planted(plant, query, key, value, boundaries, truth)


def sample_rows(tokens: int, count: int, device: torch.device | str = "cpu", last: int = 64) -> Tensor:
    """`count` queries: the `last` ones, the others spread evenly over all. Returns int64, sorted, each once."""
    even = torch.arange(1, count - last + 1, device=device) * tokens // (count - last) - 1
    return torch.cat([even, torch.arange(tokens - last, tokens, device=device)]).clamp(min=0).unique()


def softmax_rows(planted: Planted, rows: Tensor) -> Iterator[Tensor]:
    """For each head its true causal softmax in some queries, float64 [R, S]. rows: int64 [R]."""
    plant = planted.plant
    later = torch.arange(plant.tokens, device=rows.device) > rows[:, None]
    for head in range(len(plant.heads)):
        key = planted.key[0, head // plant.group].double()
        scores = planted.query[0, head, rows].double() @ key.T * plant.width**-0.5
        yield scores.masked_fill_(later, -math.inf).softmax(-1)


def planted_mass(planted: Planted, rows: Tensor) -> PlantedMass:
    """What the planted keys really hold. rows: int64 [R], some hundreds: several [R, S] in float64 live at once."""
    seen, tiles = rows + 1.0, rows // TILE + 1.0
    measured = []
    for head, weights in enumerate(softmax_rows(planted, rows)):
        mask = planted.truth.mask(head, rows)
        of_tiles = torch.nn.functional.pad(weights, (0, -weights.shape[1] % TILE)).unflatten(1, (-1, TILE)).sum(-1)
        columns = (
            (weights * mask).sum(-1),
            mask.sum(-1) / seen,
            _needed(weights) / seen,
            _needed(of_tiles) / tiles,
        )
        measured.append(torch.stack(columns).masked_fill(~mask.any(-1), math.nan))
    return PlantedMass(*torch.stack(measured, 1).unbind(0))


def video_like_mixture(
    tokens: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    text: int = 0,
    mass: float = 0.95,
) -> Planted:
    """28 heads on 4 KV heads over a video of 256 tokens per frame: 3/7 grid, 2/7 local, 2/7 columns.

    Local windows and columns are 1 % of the tokens, a site is 1/256. text: tokens of text before the video.
    """
    frames = (tokens - text) // 256
    video = Segment(VIDEO, frames * 256, (frames, 16, 16))
    segments = (Segment(TEXT, text), video, Segment(TEXT, tokens - text - video.tokens))
    seven = (
        *(Head("grid", (Look("site"),)) for _ in range(3)),
        *(Head("local", (Look("local"),)) for _ in range(2)),
        *(Head("columns", (Look("columns"),)) for _ in range(2)),
    )
    plant = Plant(tuple(s for s in segments if s.tokens), seven * 4, key_heads=4, stride=256, mass=mass, seed=seed)
    return plant_heads(plant, device, dtype)


# What a head of each kind looks at, and whether text and video take turns or one video stands in some text.
_KINDS: dict[str, tuple[Head, bool]] = {
    "grid s": (Head("grid s", (Look("site"),)), False),
    "grid v": (Head("grid v", (Look("lines"),)), False),
    "grid h": (Head("grid h", (Look("columns", 0.002),), even=0.01), False),
    "grid v+s": (Head("grid v+s", (Look("lines", share=0.5), Look("site", share=0.5))), False),
    "grid h+v": (Head("grid h+v", (Look("lines"),), even=0.01), False),
    "grid h+v+s": (
        Head("grid h+v+s", (Look("lines", share=0.5), Look("site", share=0.5)), even=0.01),
        False,
    ),
    "local": (Head("local", (Look("local"),)), False),
    "columns": (Head("columns", (Look("columns"),)), False),
    "grid and columns": (
        Head("grid and columns", (Look("columns", share=0.5), Look("site", share=0.5))),
        False,
    ),
    "local and columns": (Head("local and columns", (Look("columns", share=0.5), Look("local", share=0.5))), False),
    "none": (Head("none", (Look("columns", share=0.5), Look("local", share=0.5))), True),
    "k": (Head("k", (Look("columns", keys=VIDEO),)), True),
    "q": (Head("q", (Look("columns", queries=TEXT), Look("local", queries=VIDEO))), True),
    "2d": (
        Head(
            "2d",
            (
                Look("site", queries=VIDEO, keys=VIDEO, share=0.5),
                Look("segment", queries=VIDEO, keys=TEXT, share=0.5),
                Look("columns", queries=TEXT, keys=VIDEO, share=0.5),
                Look("local", queries=TEXT, keys=TEXT, share=0.5),
            ),
        ),
        True,
    ),
}
PLANT_KINDS = tuple(_KINDS)


def random_plant(kind: str, tokens: int = 4096, seed: int = 0, heads: int = 1, key_heads: int = 1) -> Plant:
    """A plant of one of `PLANT_KINDS` with a random stride, phase and segments; every head is of that kind.

    One video stands in text of random lengths, and half of the time its grid is not told; with the four boundary kinds
    text and video take turns, and it is told.
    """
    head, turns = _KINDS[kind]
    draw = random.Random(f"{kind} {tokens} {seed}")
    longest = 16 if tokens < 16384 else 32
    rows, columns = draw.randint(4, longest), draw.randint(4, longest)
    stride = rows * columns
    told = turns or draw.random() < 0.5
    segments: list[Segment] = []
    room = tokens
    for _ in range(draw.randint(2, 4) if turns else 1):
        room_here = room if not turns else min(room, tokens // 3)
        text = draw.randint(8, max(9, min(room_here // 8, 300)))
        frames = (room_here - text - draw.randint(8, 64)) // stride
        if frames < 2:
            break
        segments += [
            Segment(TEXT, text),
            Segment(VIDEO, frames * stride, (frames, rows, columns) if told else (0, 0, 0)),
        ]
        room -= text + frames * stride
    segments.append(Segment(TEXT, room))
    return Plant(tuple(segments), (head,) * heads, key_heads, stride, seed=draw.getrandbits(32))


class Truth:
    """Which keys each query of each head looks at."""

    def __init__(self, plant: Plant, generator: torch.Generator) -> None:
        self.plant = plant
        self.device = generator.device
        self.position = torch.arange(plant.tokens, device=self.device)
        self.modality, self.site = self._tokens()
        self.even: dict[int, Tensor] = {}  # head -> bool [S]: queries that look at everything
        self.keys: dict[tuple[int, int], Tensor] = {}  # head, look -> bool [S]: keys that the look may see
        for head, planted in enumerate(plant.heads):
            if planted.even:
                self.even[head] = self._some_sites(planted.even, generator)
            for _, looks in planted.groups():
                taken = torch.zeros_like(self.position, dtype=torch.bool)
                for index in sorted(looks, key=lambda i: not planted.looks[i].fixed):
                    self.keys[head, index] = self._keys(planted.looks[index], generator) & ~taken
                    taken = taken | self.keys[head, index]

    def window(self, look: Look) -> int:
        """Keys that a local look sees."""
        return max(4, round(look.fraction * self.plant.tokens))

    def serves(self, look: Look) -> Tensor:
        """The queries that a look is for, bool [S]."""
        return (
            torch.ones_like(self.modality, dtype=torch.bool) if look.queries is None else self.modality == look.queries
        )

    def mask(self, head: int, rows: Tensor) -> Tensor:
        """The planted keys of some queries of a head. rows: int64 [R]. Returns bool [R, S]."""
        mask = torch.zeros(len(rows), self.plant.tokens, dtype=torch.bool, device=rows.device)
        for index, look in enumerate(self.plant.heads[head].looks):
            keys = self.keys[head, index] & self.serves(look)[rows, None]
            if look.kind == "site":
                keys &= self.site == self.site[rows, None]
            elif look.kind == "local":
                keys &= self.position > rows[:, None] - self.window(look)
            mask |= keys
        if head in self.even:
            mask |= self.even[head][rows, None]
        return mask & (self.position <= rows[:, None])

    def _tokens(self) -> tuple[Tensor, Tensor]:
        """Modality and site of each token, int64 [S]."""
        seen = [start for start, part in zip(self.plant.starts, self.plant.segments, strict=False) if part.modality]
        starts = torch.tensor(seen or [0], device=self.device)
        latest = (torch.searchsorted(starts, self.position, right=True) - 1).clamp(min=0)
        lengths = torch.tensor([segment.tokens for segment in self.plant.segments], device=self.device)
        kinds = torch.tensor([segment.modality for segment in self.plant.segments], device=self.device)
        return kinds.repeat_interleave(lengths), (self.position - starts[latest]) % self.plant.stride

    def _keys(self, look: Look, generator: torch.Generator) -> Tensor:
        keys = torch.ones_like(self.modality, dtype=torch.bool) if look.keys is None else self.modality == look.keys
        if look.kind == "segment":
            first = next(i for i, segment in enumerate(self.plant.segments) if segment.modality == look.keys)
            start, end = self.plant.starts[first : first + 2]
            keys = (self.position >= start) & (self.position < end)
        elif look.kind == "lines":
            keys = keys & self._some_sites(look.fraction, generator)
        elif look.kind == "columns":
            places = keys.nonzero().squeeze(1)
            count = max(2, round(look.fraction * len(places)))
            chosen = torch.randperm(len(places), device=self.device, generator=generator)[: count - 1]
            # The first key is always one, as attention sinks are, so that every query has something to look at.
            keys = torch.zeros_like(keys).index_fill_(0, places[torch.cat([chosen.new_zeros(1), chosen])], True)
        return keys

    def _some_sites(self, fraction: float, generator: torch.Generator) -> Tensor:
        stride = self.plant.stride
        sites = torch.randperm(stride, device=self.device, generator=generator)[: max(1, round(fraction * stride))]
        return torch.isin(self.site, sites)


class _Codes:
    """The codes of one KV head's keys, and the queries of its heads that look for them."""

    def __init__(self, truth: Truth, heads: Iterable[int], generator: torch.Generator) -> None:
        self.truth, self.plant, self.generator = truth, truth.plant, generator
        looks = [(head, index) for head in heads for index in range(len(self.plant.heads[head].looks))]
        fixed = [which for which in looks if self._look(which).fixed]
        moving = [which for which in looks if which not in fixed]
        # Looks of different heads that see the same keys share their codes.
        self.sharer = {which: next(w for w in moving if self._same(w, which)) for which in moving}
        owners = list(dict.fromkeys(self.sharer.values()))
        width = (self.plant.width - len(fixed)) // max(1, len(owners)) // 2 * 2
        if width < LEAST_CHANNELS:
            raise ValueError(
                f"{len(fixed)} fixed and {len(owners)} moving looks of a KV head leave {width} channels each"
            )
        self.channel = {which: i for i, which in enumerate(fixed)}
        self.channels = {
            which: slice(len(fixed) + i * width, len(fixed) + (i + 1) * width) for i, which in enumerate(owners)
        }
        self.code = {which: self._code(which, width) for which in owners}
        self.rotation = torch.linalg.qr(self._noise(self.plant.width, self.plant.width))[0]

    def keys(self) -> Tensor:
        """float32 [S, D]."""
        keys = self._zeros()
        for which, channel in self.channel.items():
            keys[:, channel] = self.truth.keys[which].float()
        for which, channels in self.channels.items():
            keys[:, channels] = self._codes_of_tokens(which) * self.truth.keys[which][:, None]
        return KEY_SCALE * keys @ self.rotation + KEY_NOISE * self._noise(*keys.shape)

    def queries(self, head: int) -> Tensor:
        """float32 [S, D]: each row's codes, with the gains that give it the planted mass."""
        queries = self._zeros()
        planted = self.plant.heads[head]
        for _, indices in planted.groups():
            group = [(head, index) for index in indices]
            serves = self.truth.serves(self._look(group[0]))
            if head in self.truth.even:
                serves = serves & ~self.truth.even[head]
            for which, gain in zip(group, self._gains(group), strict=True):
                gain = gain.float() * serves
                if which in self.channel:
                    queries[:, self.channel[which]] += gain
                else:
                    shared = self.sharer[which]
                    queries[:, self.channels[shared]] += gain[:, None] * self._codes_of_tokens(shared)
        scale = self.plant.width**0.5 / KEY_SCALE
        return scale * queries @ self.rotation + QUERY_NOISE * self._noise(*queries.shape)

    def _gains(self, group: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The gain, float64 [S], of each look of one group: its share of the mass against all unplanted keys."""
        planted = [self._planted_keys(which) for which in group]  # each float64 [S]
        shares = torch.stack([self._look(which).share * (n > 0) for which, n in zip(group, planted, strict=True)])
        odds = shares / shares.sum(0).clamp(min=1e-30) * self.plant.mass / (1 - self.plant.mass)
        fixed = sum(
            (n for which, n in zip(group, planted, strict=True) if which in self.channel), torch.zeros_like(odds[0])
        )
        seen = self.truth.position + 1.0
        gains: dict[tuple[int, int], Tensor] = {}
        background = seen - fixed
        for which, wanted in zip(group, odds, strict=True):
            if which in self.sharer:
                # Keys without a code score 0.
                blank = background - self.truth.keys[which].double().cumsum(0)
                gains[which], background = self._moving_gain(which, blank, wanted)
        for which, wanted, count in zip(group, odds, planted, strict=True):
            if which in self.channel:
                gain = torch.log(wanted * background.clamp(min=1.0) / count)
                gains[which] = torch.where(count > 0, gain, 0.0).clamp(0.0, LARGEST_GAIN)
        return [gains[which] for which in group]

    def _moving_gain(self, which: tuple[int, int], blank: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Gain of a "site" or "local" look, and what all unplanted keys then hold (a key that scores 0 holds 1)."""
        solve = self._site_gain if self._look(which).kind == "site" else self._local_gain
        return solve(self.sharer[which], blank, wanted.clamp(min=1e-12))

    def _site_gain(self, which: tuple[int, int], blank: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Newton's method on the log odds, which are concave in the gain. All float64 [S]."""
        code, keys = self.code[which].double(), self.truth.keys[which].double()
        gain, background = torch.zeros_like(blank), torch.zeros_like(blank)
        before = code.new_zeros(self.plant.stride)
        for rows in self.truth.position.split(max(1, 2**20 // self.plant.stride)):
            site = self.truth.site[rows, None]
            # [R, stride]: earlier keys of each site, and how much its code looks like the row's own.
            count = code.new_zeros(len(rows), self.plant.stride).scatter_(1, site, keys[rows, None]).cumsum_(0) + before
            before = count[-1].clone()
            alike = code[self.truth.site[rows]] @ code.T
            own = count.gather(1, site).squeeze(1)
            count.scatter_(1, site, 0.0)
            start = torch.log(wanted[rows] * (count.sum(1) + blank[rows]).clamp(min=1.0) / own.clamp(min=1.0))
            g = start.clamp_(0.0, LARGEST_GAIN)
            for _ in range(8):
                others = count * torch.exp(g[:, None] * alike)
                total = (others.sum(1) + blank[rows]).clamp(min=1e-9)
                slope = 1 - (others * alike).sum(1) / total
                miss = own.clamp(min=1.0).log() + g - total.log() - wanted[rows].log()
                g = (g - (miss / slope.clamp(min=0.1)).clamp(-4, 4)).clamp(0.0, LARGEST_GAIN)
            g = torch.where(own > 0, g, 0.0)
            gain[rows] = g
            background[rows] = (count * torch.exp(g[:, None] * alike)).sum(1) + blank[rows]
        return gain, background

    def _local_gain(self, which: tuple[int, int], blank: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The least gain with the wanted odds: scores are of distances, so that sums over keys are convolutions."""
        distance, size = self.truth.position.double(), 2 * self.plant.tokens
        alike = (distance[:, None] * self.code[which].double()).cos_().mean(1)
        near = distance < self.truth.window(self._look(which))
        keys = torch.fft.rfft(self.truth.keys[which].double(), size)

        def held(weight: Tensor) -> Tensor:
            """For each row the sum over its earlier keys of a weight by distance."""
            return torch.fft.irfft(keys * torch.fft.rfft(weight, size), size)[: self.plant.tokens].clamp_(min=1e-9)

        gain, background = torch.full_like(blank, LARGEST_GAIN), torch.ones_like(blank)
        open_rows = torch.ones_like(near)
        earlier = None
        for step in range(int(LARGEST_GAIN / GAIN_STEP) + 1):
            weight = torch.exp(step * GAIN_STEP * alike)
            far = (held(weight * ~near) + blank).log_()
            odds = held(weight * near).log_() - far - wanted.log()
            last_odds, last_far = earlier or (odds - 1, far)
            part = (-last_odds / (odds - last_odds)).clamp(0.0, 1.0)
            found = open_rows & (odds >= 0)
            gain = torch.where(found, ((step - 1 + part) * GAIN_STEP).clamp(min=0.0), gain)
            background = torch.where(found | open_rows, torch.lerp(last_far, far, part).exp(), background)
            open_rows &= ~found
            earlier = odds, far
            if not open_rows.any():
                break
        return gain, background

    def _planted_keys(self, which: tuple[int, int]) -> Tensor:
        """How many keys a look gives to each query, float64 [S]."""
        keys, look = self.truth.keys[which].double(), self._look(which)
        if look.kind == "local":
            total = keys.cumsum(0)
            window = self.truth.window(look)
            return total - torch.nn.functional.pad(total, (window, 0))[: len(total)]
        if look.kind != "site":
            return keys.cumsum(0)
        order = self.truth.site.argsort(stable=True)  # site by site
        total = keys[order].cumsum(0)
        first = torch.searchsorted(self.truth.site[order], self.truth.site[order])  # where the row's site begins
        before = (total - keys[order])[first]
        return torch.empty_like(total).index_put_((order,), total - before)

    def _code(self, which: tuple[int, int], width: int) -> Tensor:
        """Of "site": unit vectors [stride, width]. Of "local": frequencies [width / 2] whose waves drift apart."""
        if self._look(which).kind == "site":
            return torch.nn.functional.normalize(self._noise(self.plant.stride, width), dim=1)
        jitter = torch.rand(width // 2, device=self.truth.device, generator=self.generator)
        quantile = (torch.arange(width // 2, device=self.truth.device) + jitter) / (width // 2)
        return math.sqrt(2) * torch.erfinv(quantile.clamp(max=0.999)) / (0.8 * self.truth.window(self._look(which)))

    def _codes_of_tokens(self, which: tuple[int, int]) -> Tensor:
        """float32 [S, width], of length 1."""
        code = self.code[which]
        if self._look(which).kind == "site":
            return code[self.truth.site]
        angle = self.truth.position.double()[:, None] * code.double()
        return (torch.cat([angle.cos(), angle.sin()], 1) / len(code) ** 0.5).float()

    def _look(self, which: tuple[int, int]) -> Look:
        return self.plant.heads[which[0]].looks[which[1]]

    def _same(self, one: tuple[int, int], other: tuple[int, int]) -> bool:
        """Whether two moving looks see the same keys with the same codes."""
        kinds = [(look.kind, look.kind == "local" and look.fraction) for look in map(self._look, (one, other))]
        return kinds[0] == kinds[1] and torch.equal(self.truth.keys[one], self.truth.keys[other])

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.truth.device, generator=self.generator)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.plant.tokens, self.plant.width, device=self.truth.device)


def _needed(weights: Tensor) -> Tensor:
    """How many of the weights, the largest first, hold 95 % of their sum. float64 [R, N] to [R]."""
    held = weights.sort(1, descending=True).values.cumsum_(1)
    return (held < 0.95 * held[:, -1:]).sum(1) + 1.0
