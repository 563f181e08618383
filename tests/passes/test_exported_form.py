"""What torch.export writes around operations goes, and nothing else."""

import torch
from torch import nn

from mmcompile.passes.exported_form import erase_empty_vmap, simplify
from mmcompile.passes.graph import copy_graph, op_count

_ATEN = torch.ops.aten


def _program(function, *inputs):
    class Module(nn.Module):
        def forward(self, *args):
            return function(*args)

    return torch.export.export(Module(), inputs)


def test_checks_of_made_tensors_go_and_those_of_inputs_stay():
    program = _program(lambda x: (x + 1).to(torch.float64) + x.to(torch.float64), torch.ones(3))
    module = copy_graph(program.graph_module)
    check = _ATEN._assert_tensor_metadata.default
    assert op_count(module, check) == 2
    simplify(module)
    (left,) = module.graph.find_nodes(op="call_function", target=check)
    assert left.args[0].op == "placeholder"
    module.graph.lint()


def test_a_vmap_with_something_inside_stays():
    program = _program(torch.vmap(lambda row: row * 2), torch.ones(3, 2))
    module = copy_graph(program.graph_module)
    before = len(module.graph.nodes)
    assert erase_empty_vmap(module) == 0 and len(module.graph.nodes) == before
    for node in reversed(list(module.graph.nodes)):  # as where a mask is gone
        if node.op == "output":
            node.args = ((module.graph.find_nodes(op="placeholder")[0],),)
        elif not node.users and any(word in str(node.target) for word in ("_remove_batch_dim", "mul")):
            module.graph.erase_node(node)
    assert erase_empty_vmap(module) > 0
    assert not [node for node in module.graph.nodes if "vmap" in str(node.target)]
    module.graph.lint()
