"""Measurements: `python -m mmcompile bench kernels|plan|prefill`, and what makes their figures."""
