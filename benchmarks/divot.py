"""Speed and memory of Divot's tokenizer and U-Net on the CPU in float32, as a share of the matrix-product rate.

    python benchmarks/divot.py                    # released sizes; about 10 GB of memory and some minutes
    python benchmarks/divot.py --quick            # small configurations, to see that it works
    python benchmarks/divot.py --only unet --repeats 5

Every model is saved with random weights and measured in a process of its own that loads it with `from_pretrained`, so
the peak memory is that of a user's process: imports, weights, activations. In it, runs of the model and of a large
float32 matrix product take turns, so that both see the same machine; rates are medians. Operations are counted on the
meta device (multiply and add count as two).
Results go to benchmarks/results/divot.json and divot.md (with --quick only to the screen).
"""

import tempfile
from statistics import median

from measuring import (
    at_least,
    at_most,
    call,
    count_operations,
    earlier,
    finish,
    judge,
    markdown,
    matrix_product,
    on_meta,
    options,
    parameter_count,
    peak_gb,
    serve,
    set_up,
    take_turns,
    verdict,
)

TARGETS = {
    "tokenizer": {"share_of_matrix_product_rate": at_least(0.95), "process_peak_gb": at_most(3.9)},
    "unet": {"share_of_matrix_product_rate": at_least(0.90), "process_peak_gb": at_most(7.4)},
}
# Operations of the original for one clip (5 frames) and one forward (16 frames of 32x32 latents). Shares refer to it:
# what this implementation saves (keys and values of the condition once instead of per frame) counts as speed.
ORIGINAL_TFLOP = {"tokenizer": 1.76, "unet": 4.94}
QUICK = {
    "tokenizer": {
        "vision_config": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 224,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
        "hidden_size": 128,
        "temporal_hidden_size": 96,
        "temporal_num_layers": 2,
    },
    "unet": {
        "block_out_channels": [32, 64],
        "attention_levels": [True, True],
        "attention_head_dim": 16,
        "cross_attention_dim": 64,
    },
}


def save_model(name, folder, quick):
    """Writes a model with random weights. Runs in a process of its own, to keep its memory out of the measurement."""
    import torch

    import cinetok

    torch.manual_seed(0)
    arguments = QUICK[name] if quick else {}
    if name == "tokenizer":
        model = cinetok.DivotTokenizerModel(cinetok.DivotTokenizerConfig(**arguments))
    else:
        model = cinetok.DivotUNet3DConditionModel(**arguments)
    model.save_pretrained(folder)


def forward(name, model, device="cpu"):
    """One run of a model."""
    import torch

    if name == "tokenizer":
        return model(torch.zeros(1, 5, 3, 256, 256, device=device)).features
    context = torch.zeros(1, 125, model.config.cross_attention_dim, device=device)
    return model(torch.zeros(1, 4, 16, 32, 32, device=device), torch.tensor([500], device=device), context).sample


def measure(name, folder, repeats, threads, quick):
    """(where, measurements). Runs in a process of its own."""
    import torch

    import cinetok

    record = set_up(threads)
    kind = cinetok.DivotTokenizerModel if name == "tokenizer" else cinetok.DivotUNet3DConditionModel
    model = kind.from_pretrained(folder).eval()

    def run():
        forward(name, model)

    with torch.no_grad():
        run()
        peak = peak_gb()  # before the products add to it
        product, operations = matrix_product(512 if quick else 4096)
        seconds = take_turns([product, run, product], repeats)
    meta = on_meta(model)
    counted = count_operations(lambda: forward(name, meta, "meta"))
    work = counted if quick else ORIGINAL_TFLOP[name] * 1e12
    model_seconds, rate = median(seconds[run]), operations / median(seconds[product])
    row = {
        "tflop": work / 1e12,
        "tflop_counted": counted / 1e12,
        "seconds": model_seconds,
        "matrix_product_gflop_per_s": rate / 1e9,
        "share_of_matrix_product_rate": work / model_seconds / rate,
        "process_peak_gb": peak,
        "parameters": parameter_count(model),
        "repeats": repeats,
    }
    return record, judge(row, TARGETS[name])


def table(rows):
    """The measurements as a markdown table."""
    share, peak = "share_of_matrix_product_rate", "process_peak_gb"
    header = ["model", "work, TFLOP", "time, s", "matrix products, GFLOP/s", "share of their rate", "target", ""]
    lines = [
        [
            name,
            f"{row['tflop']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['matrix_product_gflop_per_s']:.0f}",
            f"{row[share]:.3f}",
            *verdict(row, share),
            f"{row[peak]:.2f}",
            *verdict(row, peak),
        ]
        for name, row in rows.items()
    ]
    return markdown([*header, "process peak, GB", "target", ""], lines)


def main():
    serve(save_model, measure)
    parser = options(__doc__, "divot.json and divot.md", repeats=3)
    parser.add_argument("--only", choices=sorted(TARGETS), help="measure only this model")
    arguments = parser.parse_args()
    quick, rows = arguments.quick, {}
    for name in [arguments.only] if arguments.only else TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            call(save_model, name=name, folder=folder, quick=quick)
            record, rows[name] = call(
                measure,
                name=name,
                folder=folder,
                repeats=arguments.repeats,
                threads=arguments.threads,
                quick=quick,
            )
    if not quick:
        rows = {**earlier(arguments.output / "divot.json", record, "models"), **rows}
        rows = {name: rows[name] for name in TARGETS if name in rows}
    finish(arguments, "divot", "Divot", {**record, "models": rows}, table(rows))


if __name__ == "__main__":
    main()
