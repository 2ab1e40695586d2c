"""VidTok against diffusers' `AutoencoderVidTok`: `python benchmarks/vidtok.py [--quick]`.

Same weights, same input, same number of threads, one run, interleaved, medians: seconds to encode and decode, the share
of this machine's matrix-product and convolution rates, memory above the weights and what stays allocated afterwards
(each measured in a process of its own). Writes `benchmarks/results/vidtok.json` and `vidtok.md`.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
CONFIG = {"version": "1.1", "latent_channels": 4}  # the shape of kl_causal_488_4chn_v1_1
QUICK = {"base_channels": 32, "num_res_blocks": 1}


def build(name, quick):
    """One of the two implementations with random weights (the same for both) and its call video -> reconstruction."""
    from cinetok import VidTokConfig, VidTokModel

    torch.manual_seed(0)
    model = VidTokModel(VidTokConfig(**CONFIG, **(QUICK if quick else {}))).eval()
    if name == "cinetok":
        return lambda video: model(video, return_loss=False).reconstruction
    theirs = model.to_diffusers()

    def run(video):
        return theirs(video.transpose(1, 2), sample_posterior=False).sample.transpose(1, 2)

    return run


def seconds(run):
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def rates(repeats):
    """GFLOP/s of a matrix product and of a 3x3 convolution with 256 channels (channels-last), best of `repeats`."""
    size, channels, side = 2048, 256, 64
    a, b = torch.randn(size, size), torch.randn(size, size)
    x = torch.randn(8, channels, side, side).contiguous(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    matmul = min(seconds(lambda: a @ b)[0] for _ in range(repeats))
    conv = min(seconds(lambda: torch.nn.functional.conv2d(x, w, padding=1))[0] for _ in range(repeats))
    return 2 * size**3 / matmul / 1e9, 2 * 9 * channels**2 * 8 * side**2 / conv / 1e9


def resident():
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def measure_memory(name, shape, quick):
    """Run in a process of its own: bytes above the weights at the peak, and bytes still held after the call."""
    run = build(name, quick)
    video = torch.rand(shape) * 2 - 1
    with torch.no_grad():
        run(video[:, :5, :, :32, :32])  # libraries, workspaces
        gc.collect()
        before, _ = resident()
        Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
        result = run(video)
        _, peak = resident()
        del result
        gc.collect()
        trim()
        after, _ = resident()
    print(json.dumps({"peak": peak - before, "retained": after - before}))


def trim():
    """Gives freed memory back to the system, so that only what is still referenced counts."""
    import ctypes

    ctypes.CDLL("libc.so.6").malloc_trim(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a narrow model and a small clip, to try the script")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--memory", choices=("cinetok", "diffusers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    frames, side = (9, 64) if options.quick else (options.frames, options.side)
    shape = (1, frames, 3, side, side)
    if options.memory:
        return measure_memory(options.memory, shape, options.quick)

    memory = {}
    for name in ("cinetok", "diffusers"):
        command = [sys.executable, __file__, "--memory", name, "--frames", str(frames), "--side", str(side)]
        command += ["--threads", str(options.threads)] + (["--quick"] if options.quick else [])
        memory[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    torch.manual_seed(1)
    video = torch.rand(shape) * 2 - 1
    runs = {name: build(name, options.quick) for name in ("cinetok", "diffusers")}
    times, outputs, matmul, conv = {name: [] for name in runs}, {}, [], []
    with torch.no_grad():
        for name, run in runs.items():
            run(video[:, :5])
            if name == "diffusers":
                with FlopCounterMode(display=False) as counter:
                    run(video)
        for _ in range(options.repeats):
            rate = rates(3)
            matmul.append(rate[0])
            conv.append(rate[1])
            for name, run in runs.items():
                elapsed, outputs[name] = seconds(lambda run=run: run(video))
                times[name].append(elapsed)
    teraflops = counter.get_total_flops() / 1e12
    result = {
        "shape": shape,
        "threads": options.threads,
        "quick": options.quick,
        "teraflops_of_the_plain_algorithm": teraflops,
        "matmul_gflops": statistics.median(matmul),
        "conv_gflops": statistics.median(conv),
        "max_difference": (outputs["cinetok"] - outputs["diffusers"]).abs().max().item(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    for name in runs:
        median = statistics.median(times[name])
        result[name] = {
            "seconds": median,
            "all_seconds": times[name],
            "share_of_conv_rate": teraflops * 1e3 / median / result["conv_gflops"],
            "peak_above_weights_gb": memory[name]["peak"] / 1e9,
            "retained_gb": memory[name]["retained"] / 1e9,
        }
    result["speedup"] = result["diffusers"]["seconds"] / result["cinetok"]["seconds"]
    result["memory_ratio"] = memory["cinetok"]["peak"] / memory["diffusers"]["peak"]
    table = [
        f"VidTok `kl_causal_488_4chn_v1_1` shape, encode + decode of {frames} frames of {side}x{side}, float32, "
        f"{options.threads} threads, median of {options.repeats}; matrix products run at {result['matmul_gflops']:.0f}, "
        f"3x3 convolutions at {result['conv_gflops']:.0f} GFLOP/s here. "
        f"The plain algorithm takes {teraflops:.2f} TFLOP; exact algebra saves some of it, so a share can exceed 1.",
        "",
        "| | seconds | share of the convolution rate | peak above the weights | still held afterwards |",
        "|---|---|---|---|---|",
    ]
    for name in runs:
        row = result[name]
        table.append(
            f"| {name} | {row['seconds']:.2f} | {row['share_of_conv_rate']:.2f} | {row['peak_above_weights_gb']:.2f} GB | "
            f"{max(0.0, row['retained_gb']):.2f} GB |"
        )
    table.append(
        f"\nSpeed-up {result['speedup']:.2f}x, peak memory {result['memory_ratio']:.2f} of diffusers', outputs differ by at "
        f"most {result['max_difference']:.1e}."
    )
    print("\n".join(table))
    if not options.quick:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / "vidtok.json").write_text(json.dumps(result, indent=1) + "\n")
        (HERE / "results" / "vidtok.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
