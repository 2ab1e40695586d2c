"""Makes the Auto classes of transformers and diffusers' generic pipeline loader know cinetok's classes, lazily.

Importing transformers' and diffusers' registries takes longer than `import cinetok` may, so nothing is imported here:
a registry that is already loaded is extended now, one that is not is extended right after its import. The entries
resolve to our classes when they are looked up. The registries' containers are private; `tests/test_registration.py`
guards every assumption made here.
"""

import importlib
import importlib.abc
import importlib.util
import sys

from ._exports import AUTO_CLASSES, EXPORTS, PIPELINES

_LOADING_METHODS = ["save_pretrained", "from_pretrained"]


def _resolve(name):
    return getattr(sys.modules[__package__], name)


class _LazyEntries(dict):
    """The dictionary of extra entries of a transformers registry; what is `_Pending` in it is looked up when it is
    asked for.

    Values may be pending, and so may keys: registries keyed by configuration class know ours by name until somebody
    asks. Importing them earlier would be circular, since a configuration with a transformers configuration inside
    imports the registries itself.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self._by_name = {}

    def add_by_name(self, name, value):
        self._by_name[name] = value

    def _find(self, key):
        name = getattr(key, "__name__", None)
        if name in self._by_name and _resolve(name) is key:
            super().__setitem__(key, self._by_name.pop(name))

    def _find_all(self):
        for name in list(self._by_name):
            self._find(_resolve(name))

    def __contains__(self, key):
        self._find(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self._find(key)
        value = super().__getitem__(key)
        if isinstance(value, _Pending):
            value = value.resolve()
            super().__setitem__(key, value)
        return value

    def __len__(self):
        return super().__len__() + len(self._by_name)

    def __iter__(self):
        self._find_all()
        return super().__iter__()

    def get(self, key, default=None):
        try:
            return self[key]
        except KeyError:
            return default

    def keys(self):
        self._find_all()
        return super().keys()

    def values(self):
        return [self[key] for key in self]

    def items(self):
        return [(key, self[key]) for key in self]


class _Pending:
    def __init__(self, resolve):
        self.resolve = resolve


def _entries(mapping):
    if not isinstance(mapping._extra_content, _LazyEntries):
        mapping._extra_content = _LazyEntries(mapping._extra_content)
    return mapping._extra_content


def _register_configs(module):
    for model_type, classes in AUTO_CLASSES.items():
        _entries(module.CONFIG_MAPPING)[model_type] = _Pending(lambda name=classes["config"]: _resolve(name))


def _extend_by_config(mapping, role, wrap=lambda cls: cls):
    for classes in AUTO_CLASSES.values():
        if role in classes:
            pending = _Pending(lambda name=classes[role]: wrap(_resolve(name)))
            _entries(mapping).add_by_name(classes["config"], pending)


def _register_models(module):
    _extend_by_config(module.MODEL_MAPPING, "model")
    _extend_by_config(module.MODEL_FOR_CAUSAL_LM_MAPPING, "causal_lm")


def _register_video_processors(module):
    # "torchvision" is the backend name transformers asks for; ours are torch-only.
    _extend_by_config(module.VIDEO_PROCESSOR_MAPPING, "video_processor", lambda cls: {"torchvision": cls})


def _register_image_processors(module):
    # The class is found under whichever of its backends transformers asks for.
    _extend_by_config(module.IMAGE_PROCESSOR_MAPPING, "image_processor", lambda cls: {"torchvision": cls, "pil": cls})


def _register_processors(module):
    _extend_by_config(module.PROCESSOR_MAPPING, "processor")


def _register_diffusers(module):
    # Index entries of saved pipelines then read ["cinetok", "VidTokModel"] and survive moves of our files.
    from ._exports import DIFFUSERS_BASES

    module.LOADABLE_CLASSES.setdefault("cinetok", {name: list(_LOADING_METHODS) for name in DIFFUSERS_BASES})
    diffusers = sys.modules["diffusers"]
    lazy_module = type(diffusers)

    class DiffusersModule(lazy_module):
        """`diffusers` with our pipelines as extra attributes: the generic loader looks class names up there."""

        def __getattr__(self, name):
            if name in PIPELINES:
                return _resolve(name)
            return super().__getattr__(name)

    diffusers.__class__ = DiffusersModule


_HOOKS = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.video_processing_auto": _register_video_processors,
    "transformers.models.auto.image_processing_auto": _register_image_processors,
    "transformers.models.auto.processing_auto": _register_processors,
    "diffusers.pipelines.pipeline_loading_utils": _register_diffusers,
}


class _HookedLoader(importlib.abc.Loader):
    def __init__(self, loader, hook):
        self._loader, self._hook = loader, hook

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        self._hook(module)

    def __getattr__(self, name):
        return getattr(self._loader, name)


class _RegistryFinder(importlib.abc.MetaPathFinder):
    def __init__(self):
        self._pending = dict(_HOOKS)

    def find_spec(self, fullname, path=None, target=None):
        hook = self._pending.pop(fullname, None)
        if hook is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            spec.loader = _HookedLoader(spec.loader, hook)
        return spec


def install():
    """Extends the registries that are loaded and arranges for the others. Called once by `cinetok/__init__.py`."""
    if any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        return
    finder = _RegistryFinder()
    for name in list(finder._pending):
        if name in sys.modules:
            finder._pending.pop(name)(sys.modules[name])
    sys.meta_path.insert(0, finder)


assert all(name in EXPORTS for classes in AUTO_CLASSES.values() for name in classes.values())
