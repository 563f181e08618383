"""Make a program of torch.export sparse that knows nothing of transformers, save it, load it, run it.

python examples/export_then_transform.py   # no network, no GPU, a few seconds
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

import mmcompile
from mmcompile import HeadPattern, ModalityBoundaries


class Layer(nn.Module):
    """Causal attention and a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.project(hidden).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return hidden + self.merge(attended.transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(64, 4), Layer(64, 4)).eval()
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(2, 256, 64),), dynamic_shapes=({0: Dim("batch", max=64), 1: Dim.AUTO(max=2**16)},)
        )
    pattern = HeadPattern("a_shape", sink=64, local=256, boundary="q")
    sparse = mmcompile.transform(program, patterns=pattern)
    exact = mmcompile.transform(program, density=1.0).module()  # every tile: dense attention
    print(mmcompile.explain(sparse))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sparse.pt2"
        torch.export.save(sparse, path)
        loaded = torch.export.load(path).module()

    for length, picture in ((300, 128), (1024, 700), (777, 64)):
        boundaries = ModalityBoundaries(
            offsets=torch.tensor([0, 32, 32 + picture, length], dtype=torch.int32),
            modality=torch.tensor([0, 1, 0], dtype=torch.int32),
        )
        names = ("modality_offsets", "modality", "modality_grid")
        given = dict(zip(names, boundaries.tensors("cpu"), strict=True))
        hidden = torch.randn(1, length, 64)
        with torch.no_grad():
            dense = model(hidden)
            errors = [float((run(hidden, **given) - dense).norm() / dense.norm()) for run in (exact, loaded)]
        print(f"{length} tokens, {picture} of them a picture's: error {errors[0]:.1e} exact, {errors[1]:.1e} sparse")
        assert errors[0] < 1e-5
    print("Next: mmcompile.package(sparse, 'model.pt2') compiles it ahead of time.")


if __name__ == "__main__":
    main()
