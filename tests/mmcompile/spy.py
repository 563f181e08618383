"""An inner backend that runs the rewritten graph node by node and keeps what the arrangements were given.

A dispatch mode cannot do this: Dynamo compiles nothing while one is active.
"""

import torch
from torch import fx
from torch._dynamo.backends.registry import register_backend

arrange_arguments: list[dict] = []


class _Spy(fx.Interpreter):
    def call_function(self, target, args, kwargs):
        if target is torch.ops.mminference.arrange.default:
            names = [argument.name for argument in target._schema.arguments]
            arrange_arguments.append(dict(zip(names, args, strict=False)))
        return super().call_function(target, args, kwargs)


@register_backend
def spy_on_plans(module, example_inputs):
    return lambda *inputs: _Spy(module).run(*inputs)


def segments(arguments: dict) -> list[tuple[int, int]]:
    """(offset, modality) of the segments that hold tokens."""
    offsets, modality = arguments["offsets"], arguments["modality"]
    count = int((offsets < offsets[-1]).sum())
    return list(zip(offsets[:count].tolist(), modality[:count].tolist(), strict=True))
