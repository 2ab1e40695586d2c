"""What the benchmarks share: functions run in processes of their own, turns of a model and a matrix product, memory,
targets, and the files of results. The scripts lie beside this module: `from measuring import ...`.

torch is imported inside the functions, so that a script that only starts other processes stays small.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


# ----------------------------------------------------------------------------------------------------------- processes


def options(doc, files, repeats):
    """The parser with the options that every script has; `files` says what `--output` will hold."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small configurations; nothing is written")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"folder of {files}")
    return parser


def call(function, **arguments):
    """Runs a function of a script in a process of its own and returns its result, which JSON can hold.

    The script's `main` begins with `serve(function, ...)`.
    """
    command = [sys.executable, function.__globals__["__file__"], "--child", function.__name__, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr or f"{function.__name__}: the process ended with {done.returncode}")
    return json.loads(done.stdout.strip().rpartition("\n")[2])


def serve(*functions):
    """In a process started by `call`: runs the function, prints its result as the last line, and ends."""
    if sys.argv[1:2] != ["--child"]:
        return
    name, arguments = sys.argv[2:]
    function = {function.__name__: function for function in functions}[name]
    print(json.dumps(function(**json.loads(arguments))))
    sys.exit()


# ----------------------------------------------------------------------------------------------------------- measuring


def set_up(threads, dtype="float32"):
    """Sets the number of threads and says where the numbers come from."""
    import torch

    torch.set_num_threads(threads)
    return {
        "machine": processor_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "dtype": dtype,
        "torch": torch.__version__,
    }


def processor_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def matrix_product(side, device="cpu", dtype=None):
    """(function that multiplies two square matrices, its operations); it has run once."""
    import torch

    left, right, output = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))

    def product():
        torch.mm(left, right, out=output)

    product()
    return product, 2 * side**3


def take_turns(turns, repeats, device="cpu"):
    """Calls the functions of the list `turns` one after another, `repeats` times: function -> seconds of its calls.

    All of them so see the same machine. A function may be listed several times; warming up is the caller's.
    """
    seconds = {function: [] for function in turns}
    for _ in range(repeats):
        for function in turns:
            seconds[function].append(timed(function, device))
    return seconds


def timed(function, device="cpu"):
    """Seconds of one call."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def on_meta(model):
    """A model of the same configuration on the meta device, to count operations with."""
    import torch
    from transformers import PreTrainedModel

    kind = type(model)
    with torch.device("meta"):
        copy = kind(model.config) if issubclass(kind, PreTrainedModel) else kind.from_config(model.config)
    return copy.eval().requires_grad_(False).to("meta")  # diffusers' blending factors are made on the CPU regardless


def count_operations(run, without=()):
    """Operations of a call (multiply and add count as two), leaving out those named by a word of `without`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for name, count in counts.items() if not any(word in str(name) for word in without))


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def memory():
    """(bytes of this process that are resident now, the most there have been)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def peak_gb():
    """The most memory this process has held, imports and weights included, in GB."""
    return memory()[1] / 1e9


# ------------------------------------------------------------------------------------------------------------- targets


def at_least(limit):
    return {"at_least": limit}


def at_most(limit):
    return {"at_most": limit}


def judge(row, targets):
    """The measurements with `targets` added: name of the measurement -> its limit and whether it was met."""
    judged = {
        name: {**limit, "met": row[name] >= limit["at_least"] if "at_least" in limit else row[name] <= limit["at_most"]}
        for name, limit in targets.items()
    }
    return {**row, "targets": judged}


def verdict(row, name):
    """(target, whether it was met) as the two cells of a table; empty where there is no target."""
    target = row.get("targets", {}).get(name)
    if target is None:
        return "", ""
    limit = f"at least {target['at_least']:g}" if "at_least" in target else f"at most {target['at_most']:g}"
    return limit, "met" if target["met"] else "**not met**"


# ------------------------------------------------------------------------------------------------------------- results


def markdown(header, rows):
    """A table; cells are strings."""
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in (header, *rows)]
    lines.insert(1, "|" + len(header) * "---|")
    return "\n".join(lines) + "\n"


def earlier(path, record, key):
    """The measurements `record[key]` of an earlier run, if they come from the same machine, threads and torch."""
    if not path.exists():
        return {}
    old = json.loads(path.read_text())
    same = all(old.get(name) == record[name] for name in ("machine", "cores", "threads", "dtype", "torch"))
    return old.get(key, {}) if same else {}


def finish(arguments, stem, title, record, text):
    """Prints the tables; writes them, and the record as JSON, unless the configurations were small ones."""
    print(text)
    if arguments.quick:
        print("Small configurations: nothing is written, and nothing here tells about the released sizes.")
        return
    heading = f"{title} on {record['machine']}, {record['threads']} threads, {record['dtype']}, torch {record['torch']}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.output / f"{stem}.md").write_text(f"# {heading}\n\n{text}")
