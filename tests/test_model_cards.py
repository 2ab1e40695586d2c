"""Model cards: rendered for every release, current, with metadata the Hub can read, and with snippets that run."""

import importlib.util
import re

import pytest
import yaml
from card_snippets import python_blocks, run_card
from huggingface_hub import ModelCard

import cinetok
from cinetok import model_cards
from cinetok.conversion import SYSTEMS, find_release, releases
from cinetok.conversion.releases import License, Metric, Release
from cinetok.model_cards.__main__ import main as render_command

AVAILABLE = [system for system in SYSTEMS if importlib.util.find_spec(f"cinetok.conversion.{system}")]
RELEASES = [release for system in AVAILABLE for release in releases(system)]


@pytest.mark.parametrize("system", AVAILABLE)
def test_committed_cards_are_current(system):
    committed = {path.name for path in (model_cards.FOLDER / system).glob("*.md")}
    expected = {}
    for path, text in model_cards.rendered_cards(system):
        expected[path.name] = text
        assert path.is_file() and path.read_text(encoding="utf-8") == text, (
            f"{path.name} is not current; run `python -m cinetok.model_cards --system {system}`"
        )
    assert committed == set(expected)


def _load(release):
    return ModelCard.load(model_cards.card_path(release), ignore_metadata_errors=False)


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_metadata(release):
    card = _load(release)
    raw = yaml.safe_load(card.content.split("---")[1])
    assert raw["library_name"] == "cinetok" and "cinetok" in raw["tags"]
    assert {release.hub_id, *release.base_models} - {""} == set(raw.get("base_model", []))
    assert raw["pipeline_tag"] == release.pipeline_tag and raw["license"] == release.license.id
    if release.license.id == "other":
        assert raw["license_name"] == release.license.name and raw["license_link"].startswith("https://")
    else:
        assert "license_name" not in raw
    assert f"arxiv.org/abs/{release.paper}" in card.text and f"arxiv:{release.paper}" in raw["tags"]
    assert f"# {release.title}" in card.text and "## Licence" in card.text
    assert f"--release {release.name}" in card.text
    results = card.data.eval_results or []
    assert sorted((r.metric_name, r.metric_value, r.dataset_config) for r in results) == sorted(
        (m.name, m.value, m.setting) for m in release.metrics
    )
    assert all(result.source_name and result.source_url.startswith("https://") for result in results)


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_body(release):
    text = model_cards.card_path(release).read_text(encoding="utf-8")
    blocks = python_blocks(text)
    assert blocks and "cinetok" in blocks[0] and release.name in blocks[0]
    for block in blocks:
        compile(block, release.name, "exec")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "{{" not in text and "{%" not in text and "None" not in prose and "\n\n\n" not in text
    for sentence in (*release.limits, *release.notes):
        assert sentence in text
    for metric in release.metrics:
        assert f"| {metric.name} | {metric.value} | {metric.dataset} | {metric.setting} |" in text


def test_probably_unpublished_releases_say_so():
    unpublished = [
        release.name for release in releases("vidtok") if "probably never released" in " ".join(release.notes)
    ]
    assert sorted(unpublished) == ["vidtok_fsq_causal_41616_262144_v1_1", "vidtok_kl_causal_488_4chn_v1_1"]
    assert all(not find_release(name).metrics for name in unpublished)


def _made_up(**changes):
    fields = {
        "name": "made_up",
        "system": "vidtok",
        "hub_id": "someone/made-up",
        "files": ["a/b.ckpt"],
        "config": releases("vidtok")[0].config,
        "card": "vidtok",
        "pipeline_tag": "video-to-video",
        "license": License("other", "Some License", "https://example.org/license", "Read it."),
        "paper": "1234.56789",
        "title": "A made up release",
        "metrics": [
            Metric("PSNR", 30.5, "A Set", "17 frames", "Table 1 (https://example.org/paper.pdf)"),
            Metric("PSNR", 29.5, "A Set", "33 frames", "the paper, Table 2"),
        ],
        "base_models": ["someone/base"],
    }
    return Release(**{**fields, **changes})


def test_everything_a_release_says_is_in_its_card():
    text = model_cards.render_card(_made_up(), model_id="me/repo")
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "Some License",
        "https://example.org/license",
    )
    assert data.base_model == ["someone/made-up", "someone/base"]
    by_setting = {result.dataset_config: result for result in data.eval_results}
    assert by_setting["17 frames"].source_url == "https://example.org/paper.pdf"
    assert by_setting["17 frames"].source_name == "Table 1"
    assert by_setting["33 frames"].source_url == "https://arxiv.org/abs/1234.56789"
    assert by_setting["33 frames"].source_name == "the paper, Table 2"
    assert 'from_pretrained("me/repo")' in text and "--output repo" in text and "Read it." in text
    assert "[someone/base](https://huggingface.co/someone/base)" in text


def test_numbers_are_not_shown_where_there_are_none():
    text = model_cards.render_card(_made_up(metrics=(), base_models=()))
    assert "Published results" not in text and ModelCard(text).data.eval_results is None


def test_a_release_without_a_template_is_an_error():
    with pytest.raises(ValueError, match="made_up: there is no card template nothing.md.jinja"):
        model_cards.render_card(_made_up(card="nothing"))


def test_the_command_writes_what_is_missing(tmp_path, monkeypatch, capsys):
    release = releases("vidtok")[0]
    monkeypatch.setattr(model_cards, "FOLDER", tmp_path)
    monkeypatch.setattr(model_cards, "render_card", lambda release: f"card of {release.name}\n")
    assert render_command(["--system", "vidtok", "--check"]) == 1 and not list(tmp_path.iterdir())
    assert render_command(["--system", "vidtok"]) == 0
    assert (tmp_path / "vidtok" / f"{release.name}.md").read_text() == f"card of {release.name}\n"
    assert render_command(["--system", "vidtok", "--check"]) == 0
    (tmp_path / "vidtok" / f"{release.name}.md").write_text("old")
    capsys.readouterr()
    assert render_command(["--system", "vidtok", "--check"]) == 1
    assert capsys.readouterr().out == f"not current: vidtok/{release.name}.md\n"


@pytest.mark.parametrize(
    "name", ["vidtok_kl_causal_488_4chn", "vidtok_fsq_causal_488_32768_v1_1", "vidtok_kl_noncausal_488_4chn"]
)
def test_vidtok_snippets_run(tmp_path, name):
    import numpy as np

    release = find_release(name)
    config = cinetok.VidTokConfig(**{**release.config, "base_channels": 4, "num_res_blocks": 1})
    cinetok.VidTokModel(config).save_pretrained(tmp_path / name)
    cinetok.VidTokVideoProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / name
    )
    frames = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
    cinetok.write_video(tmp_path / "clip.mp4", frames, fps=10)
    run_card(model_cards.card_path(release).read_text(encoding="utf-8"), tmp_path)
    made = cinetok.read_video(tmp_path / "reconstruction.mp4")
    assert made.frames.shape == (17 if config.is_causal else 16, 32, 32, 3)
