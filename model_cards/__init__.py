"""Model cards: one template per kind of release, filled from the releases tables.

A card is made of metadata for the Hub (from the `Release` alone) and a body rendered from
`model_cards/<release.card>.md.jinja`. Templates extend `_base.md.jinja`, which lays out everything a `Release` says by
itself (origin, facts, published results, limits, licence); a template only fills the blocks `about`, `usage` (one
self-contained, runnable ```python block) and `citation`.

Variables of every template:

- `release`: the `Release`; `license`: its `License`
- `model_id`: what the snippet loads: a Hub id or a folder
- `convert_command`: the command that makes the folder
- `facts`: (label, value) pairs for the table of computed facts
- whatever else `card_facts(release)` of the system's adapter returns (optional; a dict, its `facts` entry being the
  pairs)

`python -m cinetok.model_cards` renders the card of every release to `model_cards/<system>/<release>.md`.
"""

import re
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from ..conversion import adapter, releases

FOLDER = Path(__file__).resolve().parent
_URL = re.compile(r"https?://\S+")


def card_data(release):
    """The card's metadata as the Hub reads it (`huggingface_hub.ModelCardData`)."""
    return ModelCardData(
        license=release.license.id,
        # The Hub reads name and link only beside "other".
        license_name=release.license.name if release.license.id == "other" else None,
        license_link=(release.license.link or None) if release.license.id == "other" else None,
        library_name="cinetok",
        pipeline_tag=release.pipeline_tag,
        base_model=[name for name in (release.hub_id, *release.base_models) if name] or None,
        tags=["cinetok", release.system.replace("_", "-"), *([f"arxiv:{release.paper}"] if release.paper else [])],
        model_name=release.name if release.metrics else None,
        eval_results=[_eval_result(release, metric) for metric in release.metrics] or None,
        ignore_metadata_errors=False,
    )


def _eval_result(release, metric):
    # The Hub groups results by task and dataset configuration, so the setting has to be part of the latter.
    url, name = metric_source(release, metric)
    return EvalResult(
        task_type=release.pipeline_tag,
        dataset_type=re.sub(r"[^a-z0-9]+", "-", metric.dataset.lower()).strip("-"),
        dataset_name=metric.dataset,
        dataset_config=metric.setting,
        metric_type=re.sub(r"[^a-z0-9]+", "-", metric.name.lower()).strip("-"),
        metric_name=metric.name,
        metric_value=metric.value,
        source_name=name,
        source_url=url,
    )


def metric_source(release, metric):
    """(url, name) of where a metric was published: the link inside `Metric.source`, or else the paper."""
    found = _URL.search(metric.source)
    url = found.group().rstrip(".,;)") if found else f"https://arxiv.org/abs/{release.paper}"
    return url, _URL.sub("", metric.source).strip(" ,;:()") or "published results"


def convert_command(release, output):
    """The shell command that converts the release's files into the folder `output`."""
    files = " ".join(Path(name).name for name in release.files) or "CHECKPOINT"
    return f"cinetok convert {release.system} --checkpoint {files} --release {release.name} --output {output}"


def _environment():
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    environment.filters["basename"] = lambda name: Path(name).name
    return environment


def render_card(release, *, model_id=None, **facts):
    """The whole card (metadata and text) of a release.

    Args:
        release: a `Release`.
        model_id: Hub id or folder that the snippet loads; by default a folder called like the release.
        facts: template variables that override what the adapter's `card_facts(release)` computes.

    Returns:
        str, ending in a newline. The same input always gives the same text.

    Raises:
        ValueError: there is no template `model_cards/<release.card>.md.jinja`.
    """
    compute = getattr(adapter(release.system), "card_facts", None)
    variables = {"facts": [], **(compute(release) if compute else {}), **facts}
    model_id = model_id or release.name
    environment = _environment()
    try:
        template = environment.get_template(f"{release.card}.md.jinja")
    except jinja2.TemplateNotFound as error:
        raise ValueError(f"{release.name}: there is no card template {error.name} in model_cards/") from error
    body = template.render(
        release=release,
        license=release.license,
        model_id=model_id,
        convert_command=convert_command(release, model_id.split("/")[-1]),
        metric_source=metric_source,
        **variables,
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"---\n{card_data(release).to_yaml()}\n---\n\n{body}\n"


def write_card(folder, release, **facts):
    """Writes the card to `folder`/README.md (arguments as for `render_card`) and returns its path."""
    path = Path(folder) / "README.md"
    path.write_text(render_card(release, **facts), encoding="utf-8")
    return path


def card_path(release):
    """Where the rendered card of a release is committed."""
    return FOLDER / release.system / f"{release.name}.md"


def rendered_cards(system=None):
    """Yields (path, text) of the card of every release, of one system or of all."""
    for release in releases(system):
        yield card_path(release), render_card(release)


__all__ = ["card_data", "card_path", "render_card", "rendered_cards", "write_card"]
