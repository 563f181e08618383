"""What a pattern table was made for: the text decoder of a model, as far as head patterns depend on it."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """A decoder's kind and geometry. Weights are no part of it: a fine-tuned model keeps its patterns.

    model_type: of the text decoder's config, such as "qwen2_5_vl_text"; the class's name where there is no config.
    layers: whose attention is causal. head_dim, hidden_size: channels. rope: the kind of rotary positions with its
    base, "" where nothing tells.
    """

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    rope: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> "Architecture | None":
        """The architecture that a transformers model's config tells; None where it has no such config."""
        config: Any = getattr(model, "config", None)
        try:
            text = config.get_text_config() if hasattr(config, "get_text_config") else config
        except ValueError:  # several decoders, and nothing to choose by
            return None
        names = ("num_hidden_layers", "num_attention_heads", "hidden_size")
        layers, heads, hidden = (getattr(text, name, None) for name in names)
        if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
            return None
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        kind = getattr(text, "model_type", "") or type(model).__name__
        return cls(kind, layers, heads, kv_heads, head_dim, hidden, _rope(text))

    def differences(self, other: "Architecture") -> list[str]:
        """What differs, in words: `self` is what a table was made for, `other` what it is used on."""
        pairs = [(field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return [
            f"{name} is {theirs!r} here and {ours!r} in the table" for name, ours, theirs in pairs if ours != theirs
        ]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


def _rope(text: Any) -> str:
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return ""
    flat = {name: value for name, value in parameters.items() if isinstance(value, int | float | str | list | tuple)}
    return ", ".join(f"{name} {flat[name]}" for name in sorted(flat))
