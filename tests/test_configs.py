"""All configurations: wrong types, contradictory and unknown values, and the way through JSON."""

import json

import pytest
from transformers import AutoConfig, PreTrainedConfig

import cinetok
from cinetok._exports import AUTO_CLASSES

NAMES = sorted(classes["config"] for classes in AUTO_CLASSES.values())
REQUIRED = {"VidTokConfig": {"version": "1.1"}}

WRONG_TYPES = {
    "DivotConfig": {"feature_dim": "256"},
    "DivotTokenizerConfig": {"pool_size": 2.5},
    "VidTokConfig": {"channel_multipliers": "1244"},
    "VidTwinConfig": {"temporal_causal": "yes"},
    "VideoLavitConfig": {"num_visual_codes": None},
    "VideoLavitMotionTokenizerConfig": {"codebook_size": [1024]},
    "VideoLavitVisualTokenizerConfig": {"hidden_size": "wide"},
}
CONTRADICTIONS = {
    "DivotConfig": ({"num_query_tokens": 3}, "query_token_ids"),
    "DivotTokenizerConfig": ({"num_attention_heads": 7}, "num_attention_heads"),
    "VidTokConfig": ({"temporal_compression_ratio": 8}, "temporal_compression_ratio"),
    "VidTwinConfig": ({"height": 225}, "patch size"),
    "VideoLavitConfig": ({"num_visual_codes": 5}, "vocab_size"),
    "VideoLavitMotionTokenizerConfig": ({"hidden_size": 30, "num_attention_heads": 8}, "num_attention_heads"),
    "VideoLavitVisualTokenizerConfig": ({"image_size": 225}, "patch_size"),
}
UNKNOWN_VALUES = [
    ("VidTokConfig", {"version": None}, "version"),
    ("VidTokConfig", {"version": "2.0"}, "version"),
    ("VidTokConfig", {"regularizer": "vq"}, "regularizer"),
    ("VidTokConfig", {"norm_type": "batchnorm"}, "norm_type"),
    ("VidTwinConfig", {"query_dropout": 1.5}, "query_dropout"),
    ("VideoLavitConfig", {"padding_side": "middle"}, "padding_side"),
    ("VideoLavitMotionTokenizerConfig", {"strides": [[3, 1, 1]]}, "strides"),
    ("DivotConfig", {"var_scale": -1.0}, "var_scale"),
    ("DivotTokenizerConfig", {"pool_size": 0}, "pool_size"),
    ("VideoLavitVisualTokenizerConfig", {"projection_dim": 0}, "projection_dim"),
]


def make(name, **values):
    return getattr(cinetok, name)(**{**REQUIRED.get(name, {}), **values})


def test_all_configurations_are_listed():
    assert set(WRONG_TYPES) == set(CONTRADICTIONS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_type(name):
    (field,) = WRONG_TYPES[name]
    with pytest.raises(TypeError, match=f"{name}.*{field}"):
        make(name, **WRONG_TYPES[name])
    config = make(name)
    with pytest.raises(TypeError, match=field):  # also when it is set later
        setattr(config, field, WRONG_TYPES[name][field])


@pytest.mark.parametrize("name", NAMES)
def test_contradiction(name, tmp_path):
    values, message = CONTRADICTIONS[name]
    with pytest.raises(ValueError, match=message):
        make(name, **values)
    config = make(name)
    for field, value in values.items():
        setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        config.save_pretrained(tmp_path)
    # A stored configuration is checked as well.
    stored = make(name).to_dict() | values
    (tmp_path / "config.json").write_text(json.dumps(stored, default=str))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name, values, message", UNKNOWN_VALUES)
def test_unknown_value(name, values, message):
    with pytest.raises(ValueError, match=message):
        make(name, **values)


@pytest.mark.parametrize("name", ["DivotConfig", "VideoLavitConfig"])
def test_bad_value_of_a_sub_configuration(name):
    with pytest.raises((ValueError, TypeError), match="hidden_size"):
        make(name, text_config={"hidden_size": "wide"})


@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip(name, tmp_path):
    config = make(name)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(config) and isinstance(again, PreTrainedConfig)
    again.name_or_path = config.name_or_path  # where it was loaded from is remembered, not stored
    assert again.to_json_string(use_diff=False) == config.to_json_string(use_diff=False)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()
