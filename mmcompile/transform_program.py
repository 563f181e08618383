"""The passes on a program of `torch.export`: the boundaries become inputs of the program."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from mmcompile.backend import require_sparse
from mmcompile.errors import OptionError
from mmcompile.modality import unknown_boundaries
from mmcompile.options import Options
from mmcompile.passes.add_boundaries import BOUNDARY_NAMES, BoundaryInputs
from mmcompile.passes.decide import SiteRecord
from mmcompile.passes.exported_form import erase_empty_vmap, simplify
from mmcompile.passes.graph import copy_graph, erase_if_unused, expression, fake_value, output_node, placeholders
from mmcompile.passes.pipeline import Rewritten, run_passes
from mmcompile.prefill import tells_boundaries
from mmcompile.program_record import ProgramRecord, keep_record, record_of
from mmcompile.report import describe_records
from mmcompile.tables import PatternTable

log = logging.getLogger(__name__)

# What a program has one form of, or what compiles it, is no option here.
_OPTIONS = ("patterns", "density", "recall", "strict", "disable")


def transform(program: ExportedProgram, **options: Any) -> ExportedProgram:
    """Make the causal attentions of an exported prefill sparse, as the backend does it, with the same passes.

    program: from `torch.export.export`, not decomposed into core ATen (which takes attention apart).
    options: `patterns`, `density`, `recall`, `strict` and `disable` of `Options`.

    Returns a new program with three more keyword inputs, `modality_offsets` int32 [M + 1], `modality` int32 [M] and
    `modality_grid` int32 [M, 3] (`ModalityBoundaries.tensors` has them), M at least 2 and free otherwise; weights are
    shared with `program`. Where no attention can be sparse it is `program` itself. `explain` says why for each
    attention of either. A program has one form, the sparse one, which is right at any length: there is no dense form
    for short prefills.

    Raises OptionError, UnsupportedSitesError with `strict=True`, and TableError for a table that fits no attention.
    """
    parsed = program_options(options)
    rewritten, record = rewrite(program, parsed)
    log.info("attention sites:\n%s", describe_records(record.sites))
    if isinstance(parsed.patterns, PatternTable):
        parsed.patterns.require_sites(record.sites)
    if parsed.strict:
        require_sparse(record.sites)
    if rewritten.boundaries is None:
        return program
    _drop_figures(rewritten)
    erase_empty_vmap(rewritten.module)
    rewritten.module.recompile()
    keep_record(rewritten.module, record)
    return _program(program, rewritten.module, rewritten.boundaries)


def record_program(program: ExportedProgram, options: Options) -> ProgramRecord:
    """What `transform` decided for a program; of one that it has not seen, what it would decide."""
    return record_of(program) or rewrite(program, options)[1]


def rewrite(program: ExportedProgram, options: Options) -> tuple[Rewritten, ProgramRecord]:
    """The passes on a program's graph, and the record of it; the program stays as it is."""
    module = copy_graph(program.graph_module)
    simplify(module)
    arguments = options.for_passes | {"min_tokens": 0, "chunk": 0}
    rewritten = run_passes(module, **arguments, search_strides=not tells_boundaries(module))
    return rewritten, ProgramRecord.of(rewritten.records, _settings(options, rewritten.records))


def program_options(options: dict[str, Any]) -> Options:
    """Options that a program can have; OptionError for others."""
    for name in options:
        if name in ("min_tokens", "inner", "check", "check_bound", "chunk_tokens"):
            raise OptionError(
                f"option {name!r} is the backend's; an exported program has one form, the sparse one. "
                f"Options here are: {', '.join(_OPTIONS)}"
            )
    return Options.parse(options)


def _settings(options: Options, sites: Sequence[SiteRecord]) -> dict[str, Any]:
    patterns = dict.fromkeys(pattern for site in sites for pattern in site.patterns)
    passes = options.for_passes
    return {"patterns": "; ".join(patterns), "density": passes["density"], "recall": passes["recall"]}


def _drop_figures(rewritten: Rewritten) -> None:
    """Take back the outputs that tell density and recall of each site: a program returns what it returned before."""
    graph = rewritten.module.graph
    results = _results(graph)
    own = len(results) - 2 * len(rewritten.sparse)
    output_node(graph).args = (tuple(results[:own]),)
    erase_if_unused(graph, results[own:])


def _results(graph: fx.Graph) -> list[Any]:
    (results,) = output_node(graph).args
    assert isinstance(results, tuple | list)
    return list(results)


def _program(program: ExportedProgram, module: fx.GraphModule, boundaries: BoundaryInputs) -> ExportedProgram:
    args, kwargs = program.example_inputs or ((), {})
    examples = unknown_boundaries(fake_value(boundaries.offsets).device)
    calls = copy.deepcopy(program.module_call_graph)
    root = calls[0].signature
    assert root is not None
    signature = _signature(program.graph_signature, module.graph)
    root.in_spec = _with_boundaries(root.in_spec)
    root.inputs += [TensorArgument(name) for name in BOUNDARY_NAMES]
    if root.forward_arg_names is not None:
        root.forward_arg_names += BOUNDARY_NAMES
    user_outputs = iter([spec.arg for spec in signature.output_specs if spec.kind.name == "USER_OUTPUT"])
    root.outputs = [copy.copy(argument) for argument in user_outputs]
    result = ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints | _free_sizes(boundaries),
        module_call_graph=calls,
        example_inputs=(args, kwargs | dict(zip(BOUNDARY_NAMES, examples, strict=True))),
        constants=program.constants,
        verifiers=program.verifiers,
    )
    # Of one that was loaded, the guards are kept as text alone.
    result._guards_code = list(program._guards_code)
    return result


def _signature(before: ExportGraphSignature, graph: fx.Graph) -> ExportGraphSignature:
    """The signature with the boundaries, and with the names that inputs and outputs have in the new graph."""
    inputs, outputs = placeholders(graph), _results(graph)
    input_specs = [
        replace(spec, arg=_renamed(spec.arg, node)) for spec, node in zip(before.input_specs, inputs, strict=False)
    ]
    for node in inputs[len(input_specs) :]:
        input_specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
    output_specs = [
        replace(spec, arg=_renamed(spec.arg, node)) for spec, node in zip(before.output_specs, outputs, strict=True)
    ]
    return ExportGraphSignature(input_specs, output_specs)


def _renamed(argument: Any, node: Any) -> Any:
    if isinstance(argument, ConstantArgument) or not isinstance(node, fx.Node):
        return argument
    return replace(argument, name=node.name)


def _with_boundaries(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """The structure of (args, kwargs) with the boundaries among the latter."""
    args, kwargs = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    return pytree.tree_structure((args, kwargs | dict.fromkeys(BOUNDARY_NAMES, 0)))


def _free_sizes(boundaries: BoundaryInputs) -> dict[Any, ValueRanges[Any]]:
    sizes = [fake_value(node).shape[0] for node in boundaries.nodes]
    return {expression(size): ValueRanges(2, int_oo) for size in sizes if isinstance(size, torch.SymInt)}
