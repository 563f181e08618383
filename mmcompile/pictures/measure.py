"""What a prefill shows of every head under given patterns, with pictures of some."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from mmcompile.architecture import Architecture
from mmcompile.errors import OptionError, TableError
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.passes.decide import Patterns
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pattern_search.score import LayerAttention, Score
from mmcompile.pictures.head_pictures import head_pictures
from mmcompile.pictures.layers import describe_sample, visit_layers
from mmcompile.pictures.page import Picture

Place = tuple[int, int]  # layer, head
MOST_DRAWN = 4  # heads, where nobody says which


@dataclass
class Measured:
    """What a prefill showed of its layers, filled as it runs.

    patterns: of each head. scores: of each layer. pictures: of the chosen heads. sample: what it was, in words.
    """

    patterns: list[tuple[HeadPattern, ...]] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    sample: str = ""

    def worst(self) -> tuple[float, int, int]:
        """The largest error, with its layer and head."""
        errors = [(score.error, layer) for layer, score in enumerate(self.scores)]
        return max((error, layer, head) for of_layer, layer in errors for head, error in enumerate(of_layer))


def measure(
    model: nn.Module,
    inputs: Mapping[str, Any],
    patterns: Patterns,
    density: float | None,
    chosen: Sequence[Place],
    step: Callable[[str], None],
) -> Measured:
    """Run a prefill, and measure and draw each layer as it comes: no more than one is kept.

    patterns, density: as the passes take them. chosen: heads to draw. step: called with the name of each layer and each
    chosen head as it begins.
    """
    found = Measured()

    def visit(layer: int, seen: SeenAttention) -> Tensor:
        step(f"layer {layer}")
        attention = LayerAttention(seen)
        of_head = of_layer(patterns, density, layer, seen.query.shape[1])
        found.patterns.append(of_head)
        found.scores.append(attention.score(of_head).read())
        found.sample = found.sample or describe_sample(seen)
        for head in (head for where, head in chosen if where == layer):
            step(f"pictures of layer {layer}, head {head}")
            name = f"Layer {layer}, head {head}: {of_head[head]}"
            found.pictures += head_pictures(seen, attention.arrange(of_head).plan(), head, name)
        return attention.output

    visit_layers(model, inputs, visit)
    return found


def of_layer(patterns: Patterns, density: float | None, layer: int, heads: int) -> tuple[HeadPattern, ...]:
    """The pattern of each head of a layer, under the cap of the whole prefill.

    Raises TableError where a table has no such layer, or another number of heads.
    """
    if density == 1.0:
        return (HeadPattern(),) * heads
    if isinstance(patterns, HeadPattern):
        own: Sequence[HeadPattern] = (patterns,) * heads
    elif layer >= len(patterns) or len(patterns[layer]) != heads:
        raise TableError(f"the pattern table has nothing for layer {layer} with {heads} heads")
    else:
        own = patterns[layer]
    if density is None:
        return tuple(own)
    return tuple(replace(pattern, density=min(density, pattern.density or density)) for pattern in own)


def choose_heads(wanted: str | None, architecture: Architecture, patterns: Patterns) -> list[Place]:
    """The heads to draw: those that `wanted` names as "LAYER:HEAD,..."; where it is None, the first of each pattern of
    a table, or some from the first layer to the last.

    Raises OptionError for what names no head of the model.
    """
    every = [(layer, head) for layer in range(architecture.layers) for head in range(architecture.heads)]
    if wanted is None:
        return _first_of_each(patterns) or every[:: -(-len(every) // MOST_DRAWN)]
    known = {f"{layer}:{head}": (layer, head) for layer, head in every}
    words = wanted.split(",") if wanted != "none" else []
    for word in words:
        if word not in known:
            last = f"{architecture.layers - 1}:{architecture.heads - 1}"
            raise OptionError(f"--draw {wanted}: {word!r} is no head; LAYER:HEAD from 0:0 to {last}, or none")
    return sorted({known[word] for word in words})


def _first_of_each(patterns: Patterns) -> list[Place]:
    first: dict[HeadPattern, Place] = {}
    for layer, heads in enumerate(() if isinstance(patterns, HeadPattern) else patterns):
        for head, pattern in enumerate(heads):
            first.setdefault(pattern, (layer, head))
    return sorted(list(first.values())[:MOST_DRAWN])
