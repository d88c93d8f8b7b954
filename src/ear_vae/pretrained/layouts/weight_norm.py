"""Weight norm as files hold it, folded into plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ear_vae.errors import EarVAEError
from ear_vae.pretrained.folder import unusable

# Direction and norm, of torch.nn.utils.weight_norm and of torch.nn.utils.parametrizations.weight_norm.
_DIRECTIONS = {
    ".weight_v": ".weight_g",
    ".parametrizations.weight.original1": ".parametrizations.weight.original0",
}


def folded(path: Path | str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with one plain weight for each pair of direction and norm; the rest as it is.

    Args:
        path: Where it came from, for messages.
        state: Tensors of convolutions and other layers.

    Raises:
        EarVAEError: A direction is without its norm or beside a plain weight, the two do not fit each other,
            or one is no dense tensor of finite numbers.
    """
    result = dict(state)
    for name in state:
        for direction, norm in _DIRECTIONS.items():
            if not name.endswith(direction):
                continue
            prefix = name.removesuffix(direction)
            if f"{prefix}.weight" in state:
                raise EarVAEError(
                    f"{path}: the weights are damaged: {prefix} has a weight beside its direction and norm"
                )
            v, g = result.pop(name), result.pop(prefix + norm, None)
            if g is None or v.ndim != 3 or g.shape != (v.shape[0], 1, 1):
                found = "missing" if g is None else f"{list(g.shape)}"
                raise EarVAEError(
                    f"{path}: the weights are damaged: {name} is {list(v.shape)}, {prefix}{norm} is {found}"
                )
            for part, tensor in ((name, v), (prefix + norm, g)):
                if problem := unusable(tensor):
                    raise EarVAEError(f"{path}: the weights are damaged: {part} {problem}")
            # In double precision: this runs once, and the folded weights then differ from the normalised ones
            # by the last rounding only.
            exact = v.double()
            result[f"{prefix}.weight"] = (exact * (g.double() / exact.norm(dim=(1, 2), keepdim=True))).float()
    return result
