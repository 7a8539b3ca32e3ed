"""What the torch runtime can do about attention: a few heads at a time, which is exact, and fewer tokens, which is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

AUTO_SLICE_BYTES = 256 << 20
"""With `auto`, the scores of a slice, were they computed at once, take at most this."""
_MERGING = ("UNet2DConditionModel", "ControlNetModel")


def SlicedAttention(heads: int | str) -> Any:  # noqa: ANN401, N802 - a context manager whose base needs torch
    """Return a context in which scaled_dot_product_attention runs on so many heads of batch × heads at a time.

    Exact: each head attends by itself anyway. Grouped-query attention and other than 4-D tensors run whole.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    whole = torch.nn.functional.scaled_dot_product_attention

    class Sliced(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
            options = kwargs or {}
            return _sliced(heads, whole, *args, **options) if func is whole else func(*args, **options)

    return Sliced()


def _sliced(
    count: int | str,
    whole: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,  # noqa: ANN401 - torch's own
    **options: Any,  # noqa: ANN401 - torch's own
) -> Tensor:
    """Attend with queries (B, H, L, D), a slice of B and H after the other."""
    import torch

    if query.ndim != 4 or key.shape[:2] != query.shape[:2]:  # noqa: PLR2004 - batch, heads, tokens, width
        return whole(query, key, value, attn_mask, *rest, **options)
    batch, heads = query.shape[:2]
    each = query.shape[2] * key.shape[2] * query.element_size()
    many = max(1, AUTO_SLICE_BYTES // each) if isinstance(count, str) else count
    rows, columns = max(1, many // heads), min(many, heads)
    output = torch.empty((*query.shape[:3], value.shape[3]), dtype=query.dtype, device=query.device)
    for row in range(0, batch, rows):
        for column in range(0, heads, columns):
            part = (slice(row, row + rows), slice(column, column + columns))
            mask = None if attn_mask is None else _mask_of(attn_mask, part)
            output[part] = whole(query[part], key[part], value[part], mask, *rest, **options)
    return output


def _mask_of(mask: Tensor, part: tuple[slice, slice]) -> Tensor:
    """Return the slice of a mask that broadcasts to (B, H, L, S)."""
    full = mask[(None,) * (4 - mask.ndim)]
    rows, columns = (slice(None) if size == 1 else each for size, each in zip(full.shape[:2], part, strict=True))
    return full[rows, columns]


def can_merge(config: Mapping[str, Any]) -> bool:
    """Say whether a module's self-attention can run on merged tokens: UNets with cross-attention."""
    return config.get("_class_name") in _MERGING and _finest_attention(config) is not None


def merge_tokens(module: nn.Module, ratio: float) -> bool:
    """Merge so large a share of tokens before self-attention where they are most; say whether there was a UNet to do it in.

    ToMe for SD (Bolya and Hoffman 2023, https://arxiv.org/abs/2303.17604), by its authors' `tomesd`. Tokens are merged
    into the first of each 2×2, not into one drawn at random, so that the same latents give the same picture.

    Raises:
        UnavailableError: tomesd isn't installed.
    """
    if not ratio:
        return False
    found: list[Any] = [each for each in module.modules() if type(each).__name__ in _MERGING]
    for each in found:
        _tomesd().apply_patch(each, ratio=ratio, max_downsample=_finest_attention(each.config), use_rand=False)
    return bool(found)


def _tomesd() -> Any:  # noqa: ANN401 - untyped
    try:
        import tomesd
    except ImportError as error:
        message = "token_merging needs tomesd, which is not installed"
        raise UnavailableError(message, fix="pip install 'bakeoff[tomesd]'") from error
    return tomesd


def _finest_attention(config: Mapping[str, Any]) -> int | None:
    """Return how many times narrower than the latents the first level with attention is."""
    kinds = config.get("down_block_types") or ()
    return next((2**level for level, kind in enumerate(kinds) if "CrossAttn" in kind), None)
