"""The renaming tables of `cinetok.conversion.mapping`, in both directions, without any weights of a real model."""

import pytest
import torch

from cinetok import CheckpointError
from cinetok.conversion.mapping import (
    Convert,
    Rename,
    StateDictMapping,
    append_ones,
    drop_ones,
    shorten,
    split_rows,
    transpose,
)


def assert_round_trip(mapping, original):
    """Both directions invert each other on `original`; returns our side."""
    ours = mapping.to_hf(dict(original))
    back = mapping.from_hf(dict(ours))
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(back[name], tensor), name
    again = mapping.to_hf(back)
    assert again.keys() == ours.keys() and all(torch.equal(again[name], ours[name]) for name in ours)
    return ours


def test_empty_mapping_is_the_identity():
    tensors = {"encoder.a.weight": torch.randn(2, 3), "b": torch.tensor(1)}
    assert assert_round_trip(StateDictMapping(), tensors).keys() == tensors.keys()


def test_wildcards_carry_what_they_matched():
    mapping = StateDictMapping(
        [Rename("blocks.*.attn.**", "layers.*.attention.**"), Rename("head.weight", "lm.weight")]
    )
    ours = assert_round_trip(
        mapping,
        {
            "blocks.0.attn.q.weight": torch.randn(2),
            "blocks.11.attn.out.0.bias": torch.randn(2),
            "head.weight": torch.randn(2),
        },
    )
    assert set(ours) == {"layers.0.attention.q.weight", "layers.11.attention.out.0.bias", "lm.weight"}


def test_single_star_does_not_cross_dots_and_dots_are_literal():
    mapping = StateDictMapping([Rename("a.*.w", "b.*.w")])
    ours = mapping.to_hf({"a.1.2.w": torch.ones(1), "aX1Xw": torch.ones(1), "a.1.w": torch.ones(1)})
    assert set(ours) == {"a.1.2.w", "aX1Xw", "b.1.w"}


def test_first_matching_rule_wins():
    mapping = StateDictMapping([Rename("a.special", "x.special"), Rename("a.*", "y.*")])
    assert set(assert_round_trip(mapping, {"a.special": torch.ones(1), "a.other": torch.ones(1)})) == {
        "x.special",
        "y.other",
    }


def test_split_rows_both_ways():
    mapping = StateDictMapping([split_rows("*.qkv.weight", "*.q.weight", "*.k.weight", "*.v.weight")])
    fused = torch.arange(18.0).reshape(6, 3)
    ours = assert_round_trip(mapping, {"0.qkv.weight": fused, "1.qkv.weight": fused + 100})
    assert torch.equal(ours["0.k.weight"], fused[2:4]) and torch.equal(ours["1.v.weight"], fused[4:] + 100)
    # the parts own their memory, so that they can be written to one file
    assert ours["0.q.weight"].untyped_storage().nbytes() == 2 * 3 * 4


def test_transpose_and_trailing_axes():
    mapping = StateDictMapping(
        [transpose("proj", "linear.weight"), append_ones("w", "conv.weight", 2), drop_ones("c.weight", "l.weight", 3)]
    )
    ours = assert_round_trip(
        mapping, {"proj": torch.randn(2, 5), "w": torch.randn(4, 3), "c.weight": torch.randn(4, 3, 1, 1, 1)}
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    assert shapes == {"linear.weight": (5, 2), "conv.weight": (4, 3, 1, 1), "l.weight": (4, 3)}
    assert ours["linear.weight"].is_contiguous()


def test_own_conversion_of_several_tensors_into_one():
    merge = Convert(
        ("*.weight_g", "*.weight_v"),
        ("*.weight",),
        lambda tensors: [torch.cat([tensors[0], tensors[1]])],
        lambda tensors: tensors[0].split([1, 2]),
    )
    mapping = StateDictMapping([merge])
    ours = assert_round_trip(mapping, {"a.weight_v": torch.randn(2), "a.weight_g": torch.randn(1)})
    assert set(ours) == {"a.weight"}


def test_runs_on_the_meta_device():
    mapping = StateDictMapping([split_rows("qkv", "q", "k", "v"), transpose("t", "u")])
    ours = mapping.to_hf({"qkv": torch.empty(9, 4, device="meta"), "t": torch.empty(2, 3, device="meta")})
    assert {name: tuple(t.shape) for name, t in ours.items()} == {"q": (3, 4), "k": (3, 4), "v": (3, 4), "u": (3, 2)}
    assert all(tensor.is_meta for tensor in ours.values())


def test_unknown_names_are_an_error_when_asked_for():
    mapping = StateDictMapping([Rename("a", "b")], keep_unmatched=False)
    assert set(mapping.to_hf({"a": torch.ones(1)})) == {"b"}
    with pytest.raises(CheckpointError, match="does not know: other, third"):
        mapping.to_hf({"a": torch.ones(1), "third": torch.ones(1), "other": torch.ones(1)})
    with pytest.raises(CheckpointError, match="does not know: a"):
        mapping.from_hf({"a": torch.ones(1)})


def test_incomplete_groups_name_what_is_missing():
    mapping = StateDictMapping([split_rows("*.qkv", "*.q", "*.k", "*.v")])
    with pytest.raises(CheckpointError, match=r"missing: 3\.k"):
        mapping.from_hf({"3.q": torch.ones(1), "3.v": torch.ones(1)})


def test_two_tensors_with_one_target_are_an_error():
    with pytest.raises(CheckpointError, match="map to b"):
        StateDictMapping([Rename("a", "b")]).to_hf({"a": torch.ones(1), "b": torch.ones(1)})


def test_rules_that_return_too_few_tensors_are_an_error():
    bad = Convert(("a",), ("b", "c"), lambda tensors: tensors, lambda tensors: tensors[:1])
    with pytest.raises(ValueError):
        StateDictMapping([bad]).to_hf({"a": torch.ones(1)})


def test_shorten_counts_the_rest():
    assert shorten(["b", "a"]) == "a, b"
    assert shorten([str(i) for i in range(9)], limit=3) == "0, 1, 2 and 6 more"
