"""Loads saved models and pipelines in a process that has never built them: `python tests/fresh_process.py FOLDER`.

FOLDER holds `models.json` and `pipelines.json` (case name -> class name) and one saved folder per case. Everything is
loaded before the cases themselves are imported, as a user's first lines would; then every case is run on its inputs.
Results go to `results.pt`. Starting Python is slow, so the tests of one file share one run.
"""

import json
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from torchvision_shim import install as _install_torchvision_shim

_install_torchvision_shim()

import cinetok


def auto_class(class_name):
    """The Auto class of transformers that answers with this class, or None."""
    import transformers

    from cinetok._exports import AUTO_CLASSES

    roles = {"model": "AutoModel", "causal_lm": "AutoModelForCausalLM"}
    for classes in AUTO_CLASSES.values():
        for role, auto in roles.items():
            if classes.get(role) == class_name:
                return getattr(transformers, auto)
    return None


def state(module):
    """All parameters and buffers, also those that are not saved: name -> tensor."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def floats(output):
    """The tensors of a model's output, by name (nested outputs and caches left out)."""
    return {name: value.detach() for name, value in output.items() if isinstance(value, torch.Tensor)}


def load_model(folder, class_name):
    model, report = getattr(cinetok, class_name).from_pretrained(folder, output_loading_info=True)
    auto = auto_class(class_name)
    facts = {
        "report": {
            name: sorted(map(str, report.get(name) or ()))
            for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        },
        "auto": None if auto is None else type(auto.from_pretrained(folder)).__name__,
        "state": state(model),
        "training": model.training,
    }
    return model, facts


def load_pipeline(folder, class_name):
    from diffusers import DiffusionPipeline

    pipeline = getattr(cinetok, class_name).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    try:
        generic = type(DiffusionPipeline.from_pretrained(folder)).__name__
    except Exception as error:
        generic = f"{type(error).__name__}: {error}"
    return pipeline, {"generic": generic}


def main(folder):
    torch.set_num_threads(int(sys.argv[2]))
    loaded, results = {}, {}
    for kind, load in (("models", load_model), ("pipelines", load_pipeline)):
        listing = folder / f"{kind}.json"
        for name, class_name in json.loads(listing.read_text()).items() if listing.exists() else ():
            try:
                loaded[name], results[name] = load(folder / name, class_name)
            except Exception:
                results[name] = {"error": traceback.format_exc()}

    from model_cases import model_cases, pipeline_cases

    for case in [*model_cases(), *pipeline_cases()]:
        if case.name not in loaded:
            continue
        try:
            with torch.no_grad():
                output = loaded[case.name](**case.inputs(2))
            results[case.name]["output"] = case.result(output) if hasattr(case, "result") else floats(output)
        except Exception:
            results[case.name]["error"] = traceback.format_exc()
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
