"""Make the modality boundaries inputs of the graph, so that new ones never recompile, and what a check draws by."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from mmcompile.passes.graph import fake_value, placeholders, set_fake_value

BOUNDARY_NAMES = ("modality_offsets", "modality", "modality_grid")
SEED_NAME = "check_seed"
# Any count above 1 will do: sizes 0 and 1 are the ones a tracer specialises on.
_SEGMENTS = 4


@dataclass(frozen=True)
class BoundaryInputs:
    """The three placeholders: offsets int32 [M + 1], modality int32 [M], grid int32 [M, 3] (frames, rows,
    columns), flattened over the batch."""

    offsets: fx.Node
    modality: fx.Node
    grid: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        return self.offsets, self.modality, self.grid


def add_boundaries(module: fx.GraphModule, device: torch.device) -> BoundaryInputs:
    """Append the boundary placeholders after the graph's own inputs, the number of segments M dynamic."""
    shapes = ((_SEGMENTS + 1,), (_SEGMENTS,), (_SEGMENTS, 3))
    mode = _fake_mode(placeholders(module.graph))
    examples = (_example(name, shape, device, mode) for name, shape in zip(BOUNDARY_NAMES, shapes, strict=True))
    nodes = [_append_input(module.graph, *one) for one in zip(BOUNDARY_NAMES, examples, strict=True)]
    return BoundaryInputs(*nodes)


def add_seed(module: fx.GraphModule, device: torch.device) -> fx.Node:
    """Append a placeholder, int64 [1]: which query tiles a prefill compares with dense attention."""
    mode = _fake_mode(placeholders(module.graph))
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    example = seed if mode is None else mode.from_tensor(seed, static_shapes=True, source=ConstantSource(SEED_NAME))
    return _append_input(module.graph, SEED_NAME, example)


def _append_input(graph: fx.Graph, name: str, example: torch.Tensor) -> fx.Node:
    with graph.inserting_after(placeholders(graph)[-1]):
        node = graph.placeholder(name)
    set_fake_value(node, example)
    node._dynamo_source = ConstantSource(name)
    return node


def _example(name: str, shape: tuple[int, ...], device: torch.device, mode: Any) -> torch.Tensor:
    if mode is None:
        return torch.zeros(shape, dtype=torch.int32, device=device)
    if mode.shape_env is None:
        return mode.from_tensor(torch.zeros(shape, dtype=torch.int32, device=device))
    first_is_dynamic = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (len(shape) - 1)
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        dynamic_sizes=first_is_dynamic, constraint_sizes=[None] * len(shape)
    )
    # A meta-device tensor would do, but from_tensor keeps the device of what it is given.
    real = torch.zeros(shape, dtype=torch.int32, device=device)
    return mode.from_tensor(real, source=ConstantSource(name), symbolic_context=context)


def _fake_mode(inputs: list[fx.Node]) -> Any:
    for node in inputs:
        value = fake_value(node)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None
