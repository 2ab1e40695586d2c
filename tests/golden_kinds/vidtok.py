"""Runners of VidTok's golden kinds: whole models, building blocks, regularizers (see each case.json for the calls)."""

import torch

from cinetok import VidTokConfig, VidTokModel
from cinetok.conversion.vidtok import config_from_original
from cinetok.modeling.vidtok.layers_vidtok import TemporalResnetBlock
from cinetok.modeling.vidtok.regularizers_vidtok import FiniteScalarQuantizer

from . import GoldenCase, defer, golden, vidtok_video  # noqa: F401

for _kind in ("loss", "disc", "lpips", "ema"):
    defer("vidtok", _kind, "belongs to the full trainer")
