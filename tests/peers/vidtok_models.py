"""transformers' own `ModelTesterMixin` on `VidTokModel`; `tests/peers.sh` puts this file beside the mixin and runs it."""

import unittest

from cinetok import VidTokConfig, VidTokModel

from ..test_modeling_common import ModelTesterMixin, floats_tensor


class VidTokModelTester:
    is_training = True
    batch_size = 2

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return VidTokConfig(version="1.1", base_channels=8, channel_multipliers=[1, 2, 2], num_res_blocks=1)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values_videos": floats_tensor([self.batch_size, 5, 3, 16, 16])}


class VidTokModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (VidTokModel,)
    all_generative_model_classes = ()
    has_attentions = False
    test_resize_embeddings = False
    is_encoder_decoder = False

    def setUp(self):
        self.model_tester = VidTokModelTester(self)

    @unittest.skip("an autoencoder without tokens has no embeddings")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("hidden states of many resolutions are not returned")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("hidden states of many resolutions are not returned")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    @unittest.skip("asks for output_hidden_states, which an autoencoder does not have")
    def test_model_outputs_equivalence(self):
        pass
