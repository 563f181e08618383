"""A package on the GPU computes what its program computes, at lengths that nothing was compiled for."""

import pytest
import torch

import mmcompile
from mmcompile import ModalityBoundaries
from mmcompile.passes.add_boundaries import BOUNDARY_NAMES
from mmcompile.tiny_qwen import tiny_qwen2_5_vl

pytestmark = pytest.mark.gpu


@torch.no_grad()
def test_a_package_equals_its_program_at_new_lengths_and_boundaries(tmp_path):
    model = tiny_qwen2_5_vl(layers=2, hidden_size=256, heads=4).bfloat16().cuda()

    def inputs(length, batch):
        hidden = torch.randn(batch, length, 256, device="cuda", dtype=torch.bfloat16)
        positions = torch.arange(length, device="cuda").repeat(3, batch, 1)
        return {"inputs_embeds": hidden, "position_ids": positions}

    program = mmcompile.export(model, kwargs=inputs(300, 1), density=0.3)
    package = torch._inductor.aoti_load_package(str(mmcompile.package(program, tmp_path / "model.pt2")))
    for length, batch, picture in ((300, 1, 64), (5000, 2, 3000), (40_000, 1, 39_000)):
        offsets = [0] + [row * length + end for row in range(batch) for end in (9, 9 + picture, length)]
        boundaries = ModalityBoundaries(
            torch.tensor(offsets, dtype=torch.int32), torch.tensor([0, 2, 0] * batch, dtype=torch.int32)
        )
        given = inputs(length, batch) | dict(zip(BOUNDARY_NAMES, boundaries.tensors("cuda"), strict=True))
        got, expected = package(**given), program.module()(**given)
        error = (got["logits"].float() - expected["logits"].float()).norm() / expected["logits"].float().norm()
        assert error < 0.05, (length, float(error))
        assert [keys.shape for keys in got["keys"]] == [keys.shape for keys in expected["keys"]]
