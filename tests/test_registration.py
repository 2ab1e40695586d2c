"""`import cinetok` is light, and the registries of transformers and diffusers know its classes whatever comes first."""

import json
import os
import subprocess
import sys

import pytest

import cinetok
from cinetok._exports import AUTO_CLASSES, DIFFUSERS_BASES, PIPELINES


def run_python(code, **environment):
    """Prints of `code` in a new process, parsed as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_import_loads_no_library():
    loaded = run_python(
        "import torch, sys, json, time\n"
        "before, start = set(sys.modules), time.perf_counter()\n"
        "import cinetok\n"
        "seconds = time.perf_counter() - start\n"
        "watched = {'transformers', 'diffusers', 'av', 'PIL', 'datasets', 'peft'}\n"
        "heavy = sorted(watched & (set(sys.modules) - before))\n"
        "print(json.dumps([heavy, seconds, cinetok.__version__]))"
    )
    heavy, seconds, version = loaded
    assert heavy == []
    assert seconds < 1
    assert version == cinetok.__version__


# Every class the Auto classes should answer with, asked for through the registries alone.
ASK = """
import json, sys
import diffusers, transformers
from diffusers.pipelines import pipeline_loading_utils
from transformers.models.auto import (
    image_processing_auto, modeling_auto, processing_auto, video_processing_auto,
)
found = {}
for model_type, classes in %(table)r.items():
    config_class = transformers.CONFIG_MAPPING[model_type]
    found[model_type] = {"config": config_class.__name__}
    for role, mapping in (
        ("model", modeling_auto.MODEL_MAPPING),
        ("causal_lm", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING),
        ("processor", processing_auto.PROCESSOR_MAPPING),
    ):
        if config_class in mapping:
            found[model_type][role] = mapping[config_class].__name__
    for role, mapping in (
        ("video_processor", video_processing_auto.VIDEO_PROCESSOR_MAPPING),
        ("image_processor", image_processing_auto.IMAGE_PROCESSOR_MAPPING),
    ):
        if config_class in mapping:
            entry = mapping[config_class]
            entry = entry if isinstance(entry, dict) else {"": entry}
            (found[model_type][role],) = {cls.__name__ for cls in entry.values()}
loadable = pipeline_loading_utils.LOADABLE_CLASSES.get("cinetok", {})
pipelines = [name for name in %(pipelines)r if getattr(diffusers, name).__name__ == name]
# what was there before must still be
assert transformers.CONFIG_MAPPING["llama"].__name__ == "LlamaConfig"
assert modeling_auto.MODEL_MAPPING[transformers.LlamaConfig].__name__ == "LlamaModel"
assert diffusers.DDIMScheduler.__name__ == "DDIMScheduler"
print(json.dumps([found, loadable, pipelines]))
"""

FIRST_LINES = {
    "cinetok-first": "import cinetok",
    "cinetok-last": (
        "import transformers, diffusers\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor\n"
        "from transformers.models.auto.video_processing_auto import AutoVideoProcessor\n"
        "from diffusers import DiffusionPipeline\n"
        "import cinetok"
    ),
    "in-between": "import transformers\nimport cinetok\nimport diffusers",
}


@pytest.mark.parametrize("first", FIRST_LINES)
def test_registries_know_every_class(first):
    ask = ASK % {"table": AUTO_CLASSES, "pipelines": list(PIPELINES)}
    found, loadable, pipelines = run_python(FIRST_LINES[first] + "\n" + ask)
    assert found == AUTO_CLASSES
    assert set(loadable) == set(DIFFUSERS_BASES)
    assert all(methods == ["save_pretrained", "from_pretrained"] for methods in loadable.values())
    assert pipelines == list(PIPELINES)


def test_loadable_classes_still_looks_as_assumed():
    """The dictionary is private to diffusers: library -> base class -> [how to save, how to load]."""
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    for library in ("diffusers", "transformers"):
        for methods in LOADABLE_CLASSES[library].values():
            assert len(methods) == 2
    assert LOADABLE_CLASSES["transformers"]["PreTrainedModel"] == ["save_pretrained", "from_pretrained"]
    assert LOADABLE_CLASSES["diffusers"]["ModelMixin"] == ["save_pretrained", "from_pretrained"]
    for name in LOADABLE_CLASSES["cinetok"]:
        assert isinstance(getattr(cinetok, name), type), "diffusers looks the base classes up in the library"


def test_importing_twice_changes_nothing():
    code = (
        "import importlib, json, sys, cinetok\n"
        "from cinetok import _registration\n"
        "count = lambda: sum(isinstance(f, _registration._RegistryFinder) for f in sys.meta_path)\n"
        "_registration.install()\n"
        "import transformers\n"
        "print(json.dumps([count(), transformers.CONFIG_MAPPING['vidtok'].__name__]))"
    )
    assert run_python(code) == [1, "VidTokConfig"]


def test_unregistered_names_still_raise():
    import diffusers
    import transformers

    with pytest.raises(AttributeError):
        diffusers.NoSuchPipeline  # noqa: B018
    with pytest.raises(KeyError):
        transformers.CONFIG_MAPPING["no_such_model"]
    with pytest.raises(ValueError, match="no_such_model"):
        transformers.AutoConfig.for_model("no_such_model")


def test_auto_video_processor(tmp_path):
    from transformers import AutoVideoProcessor

    from cinetok import VidTokVideoProcessor, VidTwinVideoProcessor

    for cls in (VidTokVideoProcessor, VidTwinVideoProcessor):
        folder = tmp_path / cls.__name__
        cls(size={"shortest_edge": 48}, fps=6.0).save_pretrained(folder)
        again = AutoVideoProcessor.from_pretrained(folder)
        assert type(again) is cls
        assert dict(again.size) == {"shortest_edge": 48} and again.fps == 6.0


def test_auto_video_processor_from_a_model_folder_without_its_type(tmp_path):
    """The configuration of the model beside it is enough."""
    from transformers import AutoVideoProcessor

    from cinetok import VidTokConfig, VidTokVideoProcessor

    VidTokVideoProcessor().save_pretrained(tmp_path)
    VidTokConfig(version="1.1").save_pretrained(tmp_path)
    for path in tmp_path.glob("*processor*.json"):
        settings = json.loads(path.read_text())
        settings.pop("video_processor_type", None)
        path.write_text(json.dumps(settings))
    assert type(AutoVideoProcessor.from_pretrained(tmp_path)) is VidTokVideoProcessor


@pytest.mark.parametrize("system", ["divot", "video_lavit"])
def test_auto_processor(system, tmp_path):
    from transformers import AutoProcessor

    if system == "divot":
        from model_cases.divot_llm import processor
    else:
        from model_cases.video_lavit_llm import processor
    ours = processor()
    ours.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(ours)
    assert type(again).__name__ == AUTO_CLASSES[system]["processor"]
    ids = again.tokenizer("a cat sits on the mat").input_ids
    assert ids == ours.tokenizer("a cat sits on the mat").input_ids
