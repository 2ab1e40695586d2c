class GenerationTesterMixin:
    """Stands in for a module the source distribution lacks; our tokenizers do not generate."""
