"""The optimizer, whose weights are more exact than the model's."""

import torch


class MasterWeights:
    """AdamW on float32 copies of a model's weights, so that the model itself is what will be kept: bfloat16."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights: list[torch.Tensor] = list(model.parameters())
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        groups = [
            {"params": [one for one in self.masters if one.dim() > 1], "weight_decay": 0.02},
            {"params": [one for one in self.masters if one.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=self.masters[0].is_cuda)

    def step(self, rate: float) -> bool:
        """Apply the gradients, clipped to norm 1; False where they are not finite, and nothing was done."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        if not torch.isfinite(norm):
            return False
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return True
