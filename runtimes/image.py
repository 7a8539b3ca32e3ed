"""Pictures and masks that `generate` starts from: checked, brought to one size, as float32 tensors in [0, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")


def pictures_of(name: str, value: Any, count: int) -> list[Image]:  # noqa: ANN401 - one picture or many, PIL's or arrays
    """Return a PIL picture a prompt: the one given, or one each.

    Raises:
        InputError: it is no picture, has an alpha channel, or their number or sizes don't fit.
    """
    many = list(value) if isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 4 else [value]  # noqa: PLR2004 - (B, H, W, C)
    pictures = [_picture(name, each) for each in many]
    if len(pictures) not in {1, count}:
        message = f"got {len(pictures)} pictures as {name}, expected one, or one for each of the {count} prompts"
        raise InputError(message)
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        message = f"got pictures of {len(sizes)} sizes as {name}, expected one size"
        raise InputError(message, fix="generate them apart, or resize them")
    return pictures if len(pictures) == count else pictures * count


def _picture(name: str, value: Any) -> Image:  # noqa: ANN401
    import numpy as np
    from PIL import Image

    if isinstance(value, np.ndarray):
        if value.dtype == bool:
            value = value.astype(np.uint8) * 255
        if value.dtype != np.uint8 or value.ndim not in {2, 3} or value.shape[2:] not in {(), (3,)}:
            message = f"got {name} of shape {value.shape} {value.dtype}, expected (H, W, 3) or (H, W) uint8"
            raise InputError(message)
        return Image.fromarray(value)
    if not isinstance(value, Image.Image):
        message = f"got {name} = {type(value).__name__}, expected a PIL image, or an array (H, W, 3) uint8"
        raise InputError(message, fix=f"{name}=PIL.Image.open('picture.png')")
    if value.mode in _TRANSPARENT or "transparency" in value.info:
        message = f"got {name} with an alpha channel ({value.mode}), which says nothing to the model"
        raise InputError(message, fix="flatten it: image.convert('RGB')")
    return value


def as_tensor(pictures: list[Image], size: tuple[int, int], *, mask: bool = False) -> Tensor:
    """Return (B, 3, H, W), or (B, 1, H, W) for masks, resized to (height, width) if they are of another size."""
    import numpy as np
    import torch
    from PIL.Image import Resampling

    height, width = size
    how = Resampling.NEAREST if mask else Resampling.LANCZOS
    arrays = []
    for picture in pictures:
        converted = picture.convert("L" if mask else "RGB")
        fitted = converted if converted.size == (width, height) else converted.resize((width, height), how)
        arrays.append(np.array(fitted).reshape(height, width, -1))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def as_pictures(tensor: Tensor) -> list[Image]:
    """Return PIL pictures of (B, 3, H, W) in [0, 1]: some pipelines take a tensor as normalized already."""
    from PIL import Image

    return [Image.fromarray(row) for row in (tensor * 255).round().byte().permute(0, 2, 3, 1).numpy()]
