"""Linear layers with their weights laid out once for the CPU's matrix kernels.

torch lays a weight matrix out anew for oneDNN at every call of a bfloat16 layer; kept packed, whole models
run some fifth faster. The operators are those that torch's own compiler emits. They are no public interface,
so they are tried on the layer itself, and a layer that they do not reproduce stays as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["pack_linear_layers"]

#: Rows that the layout is chosen for; any number can be multiplied.
_ROWS = 2048


class _PackedLinear(nn.Module):  # type: ignore[misc]
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.bias = layer.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)

    def forward(self, x: Any) -> Any:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack_linear_layers(module: nn.Module) -> int:
    """Replaces the linear layers below a module on the CPU by packed ones, in place, where those give the
    same up to rounding.

    Returns:
        The number of layers replaced.
    """
    replaced = 0
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            packed = _packed(child)
            if packed is not None:
                setattr(module, name, packed)
                replaced += 1
        else:
            replaced += pack_linear_layers(child)
    return replaced


def _packed(layer: nn.Linear) -> nn.Module | None:
    if layer.weight.device.type != "cpu":
        return None
    try:
        packed = _PackedLinear(layer)
        with torch.inference_mode():
            probe = torch.linspace(-1, 1, 3 * layer.in_features).reshape(3, -1).to(layer.weight.dtype)
            expected, found = layer(probe).float(), packed(probe).float()
            close = torch.allclose(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
    except (RuntimeError, AttributeError, NotImplementedError):
        return None
    return packed if close else None
