"""The predicted memory of a graph against what running it allocates, and what a compiler writes of it."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mmcompile.kernels.patterns import HeadPattern
from mmcompile.passes.list_steps import Buffer, Step, Steps, list_steps
from mmcompile.passes.peak_memory import fuse, peak_memory
from mmcompile.passes.pipeline import run_passes

WIDTH, HEADS = 64, 4


class Layer(nn.Module):
    """A decoder's layer whose MLP is what it has most of."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, 32 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(32 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        query, key, value = self.qkv(norm(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        y = norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def traced(model, x, **options):
    """The graph of a call, after the passes where there are options."""
    graphs = []

    def keep(module, _inputs):
        graphs.append(run_passes(module, **options).module if options else module)
        return module

    torch._dynamo.maybe_mark_dynamic(x, 1)
    with torch.no_grad():
        torch.compile(model, backend=keep)(x)
    torch._dynamo.reset()
    return graphs[0]


def allocated(call):
    """The most bytes that a call allocates at once, on the CPU."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        result = call()
    del result
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def of_its_own(graph, tokens, traced_with, *, fused):
    """The predicted peak without the graph's inputs."""
    steps = list_steps(graph, tokens, traced_with)
    given = sum(steps.buffers[index].nbytes for index in set(steps.given) - set(steps.weights))
    return peak_memory(steps, fused=fused).nbytes - given


@pytest.mark.parametrize("tokens", [256, 384, 1024])
def test_without_a_compiler_it_is_what_is_allocated(tokens):
    model = nn.Sequential(Layer(), Layer()).eval()
    graph = traced(model, torch.randn(1, 256, WIDTH), patterns=HeadPattern("a_shape", local=128), min_tokens=0)
    compiled = torch.compile(
        model,
        backend="mminference",
        options={"patterns": HeadPattern("a_shape", local=128), "min_tokens": 0, "inner": "eager"},
    )
    x = torch.randn(1, tokens, WIDTH)
    torch._dynamo.maybe_mark_dynamic(x, 1)
    with torch.no_grad():
        measured = allocated(lambda: compiled(x))
    assert of_its_own(graph, tokens, 256, fused=False) == pytest.approx(measured, rel=0.02)


def test_under_inductor_it_is_what_is_allocated():
    model = nn.Sequential(Layer(), Layer(), Layer()).eval()
    graph = traced(model, torch.randn(1, 256, WIDTH))
    compiled = torch.compile(model)
    for tokens in (256, 1024):
        x = torch.randn(1, tokens, WIDTH)
        torch._dynamo.maybe_mark_dynamic(x, 1)
        with torch.no_grad():
            measured = allocated(lambda x=x: compiled(x))
        assert of_its_own(graph, tokens, 256, fused=True) == pytest.approx(measured, rel=0.1)


def test_nothing_runs_and_a_million_tokens_are_as_quick_as_few():
    graph = traced(Layer().eval(), torch.randn(1, 256, WIDTH))
    thousand, million = (of_its_own(graph, tokens, 256, fused=True) for tokens in (2**10, 2**20))
    assert million == 2**10 * thousand


def test_a_branch_that_nobody_reads_dies_at_once():
    class Unread(nn.Module):
        def forward(self, x):
            torch.mm(x[0], x[0].T)
            return x + 1

    x = torch.randn(1, 64, WIDTH)
    steps = list_steps(traced(Unread(), x), None, None)
    peak = peak_memory(steps, fused=True)
    assert peak.nbytes <= 2 * x.nbytes + 64 * 64 * 4


def steps_of(sizes, *steps, returned=()):
    """A list of steps by hand. sizes: bytes of each buffer, the first of which is given. steps: name, reads, makes."""
    buffers = [Buffer("", "", (size,), torch.uint8, size) for size in sizes]
    every = [
        Step(name, reads, makes, name != "mm", name == "mean", 7 if name == "mm" else 0) for name, reads, makes in steps
    ]
    return Steps(buffers, every, given=[0], returned=set(returned))


def test_a_run_of_pointwise_operations_writes_its_end():
    steps = steps_of([8, 8, 8, 8], ("mul", (0,), (1,)), ("add", (0, 1), (2,)), ("mm", (2,), (3,)), returned=[3])
    add, product = fuse(steps).steps
    assert (add.reads, add.makes) == ((0,), (2,))
    assert product.reads == (2,)
    assert peak_memory(steps, fused=True).nbytes == 8 * 3 + 7
    assert peak_memory(steps, fused=False).nbytes == 8 * 3 + 7


def test_a_reduction_is_written_and_its_input_computed_again():
    steps = steps_of([8, 8, 1, 8], ("add", (0,), (1,)), ("mean", (1,), (2,)), ("mul", (1, 2), (3,)), returned=[3])
    assert [(step.reads, step.makes) for step in fuse(steps).steps] == [((0,), (2,)), ((0, 2), (3,))]


def test_a_value_that_reads_much_is_written_once_it_has_several_readers():
    sizes, reads = [8] * 9, (0, 1, 2, 3, 4)
    make = [("mm", (0,), (index,)) for index in range(1, 5)]
    twice = [("add", reads, (5,)), ("mul", (5,), (6,)), ("neg", (5,), (7,))]
    once = [("add", reads, (5,)), ("mul", (5,), (6,))]
    assert len(fuse(steps_of(sizes, *make, *twice, returned=[6, 7])).steps) == 7
    assert len(fuse(steps_of(sizes, *make, *once, returned=[6])).steps) == 5


def test_a_copy_of_what_is_written_is_none():
    steps = steps_of([8, 8, 0, 8], ("mm", (0,), (1,)), ("cat", (2, 1), (3,)), ("mm", (3,), ()), returned=[3])
    fused = fuse(steps)
    assert [step.reads for step in fused.steps] == [(0,), (1,)]
    assert fused.returned == {1}


def test_a_kernel_writes_over_what_nobody_reads_again():
    steps = steps_of([8, 8, 8, 8], ("mm", (0,), (1,)), ("neg", (1,), (2,)), ("mm", (2,), (3,)), returned=[3])
    assert peak_memory(steps, fused=True).nbytes == 8 * 3 + 7
    assert peak_memory(steps, fused=False).nbytes == 8 * 3 + 7
    steps = steps_of([8, 8, 8, 1], ("mm", (0,), (1,)), ("neg", (1,), (2,)), ("mm", (2,), (3,)), returned=[3])
    assert peak_memory(steps, fused=True).nbytes == 8 * 2 + 1 + 7
    assert peak_memory(steps, fused=False).nbytes == 8 * 3
