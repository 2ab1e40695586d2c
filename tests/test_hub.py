"""Pushing a converted folder, to a Hub on this machine. The client runs in a process of its own, because it reads its
endpoint and its offline switch when it is imported."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from loopback_hub import serve

CARD = "---\nlicense: mit\nlibrary_name: cinetok\n---\n\n# A model\n"


@pytest.fixture
def hub():
    server = serve()
    yield server
    server.shutdown()


def client(script, home, endpoint, *arguments, token="hf_token"):
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment.update({"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"})
    environment.pop("HF_TOKEN", None)
    if token:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "converted"
    (folder / "vae").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text('{"model_type": "vidtok"}')
    (folder / "vae" / "model.safetensors").write_bytes(bytes(100))
    (folder / ".hidden").write_text("not for others")
    return folder


PUSH = """
    import sys
    from cinetok.conversion.hub import push_folder
    print(push_folder(sys.argv[1], sys.argv[2], private=True))
"""


def test_card_goes_first_and_everything_arrives(hub, folder, tmp_path):
    result = client(PUSH, tmp_path / "home", hub.address, folder, "tester/model")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{hub.address}/tester/model"
    repository = hub.repositories["tester/model"]
    assert repository.private
    assert [commit["paths"] for commit in repository.commits] == [
        ["README.md"],
        ["config.json", "vae/model.safetensors"],
    ]
    assert repository.files["README.md"] == CARD.encode() and repository.files["vae/model.safetensors"] == bytes(100)


def test_pushing_again_updates(hub, folder, tmp_path):
    client(PUSH, tmp_path / "home", hub.address, folder, "tester/model")
    (folder / "config.json").write_text('{"model_type": "changed"}')
    result = client(PUSH, tmp_path / "home", hub.address, folder, "tester/model")
    assert result.returncode == 0, result.stderr
    assert json.loads(hub.repositories["tester/model"].files["config.json"])["model_type"] == "changed"


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (None, "has no README.md"),
        ("# No metadata\n", "states no license"),
        ("---\n: [\n---\nx", "metadata is not valid"),
    ],
)
def test_folders_without_a_proper_card_are_refused(hub, folder, tmp_path, card, message):
    (folder / "README.md").unlink()
    if card is not None:
        (folder / "README.md").write_text(card)
    result = client(PUSH, tmp_path / "home", hub.address, folder, "tester/model")
    assert result.returncode == 1 and "CheckpointError" in result.stderr and message in result.stderr, result.stderr
    assert hub.repositories == {}


def test_missing_folder_is_refused(hub, tmp_path):
    result = client(PUSH, tmp_path / "home", hub.address, tmp_path / "none", "tester/model")
    assert "CheckpointError" in result.stderr and "no such folder" in result.stderr
    assert hub.repositories == {}


CAUGHT = """
    import sys
    from cinetok import CheckpointError
    from cinetok.conversion.hub import push_folder
    try:
        push_folder(sys.argv[1], sys.argv[2])
    except CheckpointError as error:
        print("typed:", error)
"""


def test_refusals_of_the_hub_are_typed(folder, tmp_path):
    server = serve(read_only=True)
    for endpoint, name in (
        (server.address, "tester/model"),
        (server.address, "not a name"),
        ("http://127.0.0.1:9", "a/b"),
    ):
        result = client(CAUGHT, tmp_path / "home", endpoint, folder, name)
        assert result.returncode == 0 and result.stdout.startswith(f"typed: {name}: could not be pushed ("), (
            result.stdout + result.stderr
        )
    assert server.repositories == {}
    server.shutdown()


CONVERT_AND_LOAD = """
    import sys, torch
    import cinetok
    from transformers import AutoModel, AutoVideoProcessor
    from cinetok.conversion.vidtok import config_from_original

    checkpoint, original, output = sys.argv[1:4]
    cinetok.convert_checkpoint(
        "vidtok", checkpoint, output, original_config=original, keep_training_state=True, push_to_hub="tester/tokenizer"
    )
    model, info = AutoModel.from_pretrained("tester/tokenizer", output_loading_info=True)
    assert not any(info.values()), info
    expected = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    processor = AutoVideoProcessor.from_pretrained("tester/tokenizer")
    print(type(model).__name__, model.config.version, type(processor).__name__)
"""


def test_convert_push_and_load_from_the_hub(hub, tmp_path):
    import torch
    from test_vidtok_conversion import KINDS, make_checkpoint

    weights, training = make_checkpoint("v1.1 FSQ")
    torch.save({"state_dict": {**weights, **training}}, tmp_path / "x.ckpt")
    (tmp_path / "x.json").write_text(json.dumps(KINDS["v1.1 FSQ"]))
    arguments = (tmp_path / "x.ckpt", tmp_path / "x.json", tmp_path / "out")
    result = client(CONVERT_AND_LOAD, tmp_path / "home", hub.address, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["VidTokModel", "1.1", "VidTokVideoProcessor"]
    repository = hub.repositories["tester/tokenizer"]
    assert repository.commits[0]["paths"] == ["README.md"]
    assert b'from_pretrained("tester/tokenizer")' in repository.files["README.md"]
    assert "training_state.safetensors" in repository.files
