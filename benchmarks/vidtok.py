"""VidTok against diffusers' `AutoencoderVidTok`: `python benchmarks/vidtok.py [--quick]`.

Same weights, same input, same number of threads, one run, interleaved, medians: seconds to encode and decode, the share
of this machine's matrix-product and convolution rates, memory above the weights and what stays allocated afterwards
(each measured in a process of its own). Writes `benchmarks/results/vidtok.json` and `vidtok.md`.
"""

import gc
from pathlib import Path
from statistics import median

from measuring import (
    call,
    count_operations,
    finish,
    markdown,
    matrix_product,
    memory,
    options,
    serve,
    set_up,
    take_turns,
)

CONFIG = {"version": "1.1", "latent_channels": 4}  # the shape of kl_causal_488_4chn_v1_1
QUICK = {"base_channels": 32, "num_res_blocks": 1}
NAMES = ("cinetok", "diffusers")


def build(name, quick):
    """One of the two implementations with random weights (the same for both) as a call video -> reconstruction."""
    import torch

    from cinetok import VidTokConfig, VidTokModel

    torch.manual_seed(0)
    model = VidTokModel(VidTokConfig(**CONFIG, **(QUICK if quick else {}))).eval()
    if name == "cinetok":
        return lambda video: model(video, return_loss=False).reconstruction
    theirs = model.to_diffusers()

    def run(video):
        return theirs(video.transpose(1, 2), sample_posterior=False).sample.transpose(1, 2)

    return run


def convolution():
    """(function that runs a 3x3 convolution with 256 channels, channels-last; its operations); it has run once."""
    import torch

    channels, side = 256, 64
    x = torch.randn(8, channels, side, side).contiguous(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)

    def run():
        torch.nn.functional.conv2d(x, w, padding=1)

    run()
    return run, 2 * 9 * channels**2 * 8 * side**2


def measure_memory(name, shape, threads, quick):
    """Run in a process of its own: bytes above the weights at the peak, and bytes still held after the call."""
    import torch

    set_up(threads)
    run = build(name, quick)
    video = torch.rand(shape) * 2 - 1
    with torch.no_grad():
        run(video[:, :5, :, :32, :32])  # libraries, workspaces
        gc.collect()
        before, _ = memory()
        Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
        result = run(video)
        _, peak = memory()
        del result
        gc.collect()
        trim()
        after, _ = memory()
    return {"peak": peak - before, "retained": after - before}


def trim():
    """Gives freed memory back to the system, so that only what is still referenced counts."""
    import ctypes

    ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure_speed(shape, repeats, threads, quick):
    """(where, measurements). Runs in a process of its own."""
    import torch

    record = set_up(threads)
    torch.manual_seed(1)
    video = torch.rand(shape) * 2 - 1
    implementations, outputs = {name: build(name, quick) for name in NAMES}, {}

    def ours():
        outputs["cinetok"] = implementations["cinetok"](video)

    def theirs():
        outputs["diffusers"] = implementations["diffusers"](video)

    with torch.no_grad():
        implementations["cinetok"](video[:, :5])
        work = count_operations(theirs)
        product, product_operations = matrix_product(2048)
        conv, conv_operations = convolution()
        seconds = take_turns([*3 * [product], *3 * [conv], ours, theirs], repeats)
    conv_rate = conv_operations / median(seconds[conv])
    result = {
        "shape": shape,
        "repeats": repeats,
        "teraflops_of_the_plain_algorithm": work / 1e12,
        "matrix_product_gflop_per_s": product_operations / median(seconds[product]) / 1e9,
        "convolution_gflop_per_s": conv_rate / 1e9,
        "max_difference": (outputs["cinetok"] - outputs["diffusers"]).abs().max().item(),
    }
    for name, function in (("cinetok", ours), ("diffusers", theirs)):
        middle = median(seconds[function])
        share = work / middle / conv_rate
        result[name] = {"seconds": middle, "all_seconds": seconds[function], "share_of_convolution_rate": share}
    return record, result


def report(result):
    """The measurements in words and as a markdown table."""
    _, frames, _, side, _ = result["shape"]
    text = (
        f"Shape of `kl_causal_488_4chn_v1_1`, encode + decode of {frames} frames of {side}x{side}, median of "
        f"{result['repeats']}; matrix products run at {result['matrix_product_gflop_per_s']:.0f}, 3x3 convolutions at "
        f"{result['convolution_gflop_per_s']:.0f} GFLOP/s here. The plain algorithm takes "
        f"{result['teraflops_of_the_plain_algorithm']:.2f} TFLOP; exact algebra saves some of it, so a share can exceed 1."
    )
    lines = [
        [
            name,
            f"{result[name]['seconds']:.2f}",
            f"{result[name]['share_of_convolution_rate']:.2f}",
            f"{result[name]['peak_above_weights_gb']:.2f} GB",
            f"{max(0.0, result[name]['retained_gb']):.2f} GB",
        ]
        for name in NAMES
    ]
    header = ["", "seconds", "share of the convolution rate", "peak above the weights", "still held afterwards"]
    summary = (
        f"Speed-up {result['speedup']:.2f}x, peak memory {result['memory_ratio']:.2f} of diffusers', outputs differ by at "
        f"most {result['max_difference']:.1e}."
    )
    return f"{text}\n\n{markdown(header, lines)}\n{summary}\n"


def main():
    serve(measure_memory, measure_speed)
    parser = options(__doc__, "vidtok.json and vidtok.md", repeats=3)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--side", type=int, default=128)
    arguments = parser.parse_args()
    frames, side = (9, 64) if arguments.quick else (arguments.frames, arguments.side)
    common = {"shape": [1, frames, 3, side, side], "threads": arguments.threads, "quick": arguments.quick}
    held = {name: call(measure_memory, name=name, **common) for name in NAMES}
    record, result = call(measure_speed, repeats=arguments.repeats, **common)
    for name in NAMES:
        result[name]["peak_above_weights_gb"] = held[name]["peak"] / 1e9
        result[name]["retained_gb"] = held[name]["retained"] / 1e9
    result["speedup"] = result["diffusers"]["seconds"] / result["cinetok"]["seconds"]
    result["memory_ratio"] = held["cinetok"]["peak"] / held["diffusers"]["peak"]
    finish(arguments, "vidtok", "VidTok beside diffusers", {**record, **result}, report(result))


if __name__ == "__main__":
    main()
