class ExportTesterMixin:
    """Stands in for a module the source distribution lacks; export is not tested here."""
