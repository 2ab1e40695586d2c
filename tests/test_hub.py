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
