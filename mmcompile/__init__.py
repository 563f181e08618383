"""torch.compile backend that makes the prefill of vision-language models sparse."""
