"""Spatial tiling with blended overlap, written once for every tokenizer.

Sizes carry their unit: `sample` sizes are pixels, `latent` sizes are latent positions; `ratio` is pixels per position.
"""

import torch


def tile_starts(length, tile_length, overlap):
    """Where tiles of `tile_length` begin on an axis of `length`: the last one ends at the end, all have the same size."""
    if length <= tile_length:
        return [0]
    stride = tile_length - overlap
    starts = list(range(0, length - tile_length, stride))
    return [*starts, length - tile_length]


def check_tiles(tile_sample_size, tile_sample_overlap, ratio):
    """Raises ValueError unless both are multiples of `ratio` and the overlap is smaller than the tile."""
    if tile_sample_size < ratio or tile_sample_size % ratio:
        raise ValueError(f"tile_size must be a positive multiple of {ratio} pixels, got {tile_sample_size}")
    if tile_sample_overlap % ratio or not 0 <= tile_sample_overlap < tile_sample_size:
        raise ValueError(
            f"tile_overlap must be a multiple of {ratio} pixels, at least 0 and below tile_size={tile_sample_size}, "
            f"got {tile_sample_overlap}"
        )


def _ramp(length, overlap, at_start, at_end, like):
    """Weights (length,) that rise over `overlap` positions where a neighbour overlaps, and are 1 elsewhere."""
    weights = like.new_ones(length)
    if overlap:
        rise = (torch.arange(overlap, device=like.device, dtype=like.dtype) + 0.5) / overlap
        if not at_start:
            weights[:overlap] = torch.minimum(weights[:overlap], rise)
        if not at_end:
            weights[-overlap:] = torch.minimum(weights[-overlap:], rise.flip(0))
    return weights


def run_tiled(run, inputs, tile_in, overlap_in, scale, states=None):
    """Runs a function on overlapping tiles of the last two axes and blends the results.

    Args:
        run: (tile (..., height, width), state) -> (result (..., height * scale, width * scale), state).
        inputs: tensor (..., height, width).
        tile_in, overlap_in: tile size and overlap in positions of `inputs`.
        scale: (numerator, denominator) of result positions per input position.
        states: list with one state per tile from an earlier call, or None.

    Returns:
        The blended result and the list of states.
    """
    up, down = scale
    height, width = inputs.shape[-2:]
    rows = tile_starts(height, tile_in, overlap_in)
    columns = tile_starts(width, tile_in, overlap_in)
    output, total, following = None, None, []
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            tile = inputs[..., top : top + tile_in, left : left + tile_in]
            result, state = run(tile, states[len(following)] if states is not None else None)
            following.append(state)
            if output is None:
                shape = (*result.shape[:-2], height * up // down, width * up // down)
                output = result.new_zeros(shape)
                total = result.new_zeros(shape[-2:])
            out_top, out_left = top * up // down, left * up // down
            out_height, out_width = result.shape[-2:]
            # Where tiles overlap by more than asked for (the last ones), the ramp still spans the asked overlap only:
            # weights are normalised by their sum below.
            overlap_out = overlap_in * up // down
            weights = _ramp(out_height, overlap_out, i == 0, i == len(rows) - 1, result)[:, None] * _ramp(
                out_width, overlap_out, j == 0, j == len(columns) - 1, result
            )
            window = (..., slice(out_top, out_top + out_height), slice(out_left, out_left + out_width))
            output[window] += result * weights
            total[window[1:]] += weights
    return output / total, following
