"""Pushing converted folders to the Hub."""

from pathlib import Path

import yaml

from ..errors import CheckpointError


def push_folder(folder, repo_id, *, private=None, token=None, commit_message=None):
    """Uploads a converted folder (model, pipeline or processor) to the Hub.

    The repository is created if there is none. The model card goes first, so that a repository never shows weights
    whose licence and origin are not stated; then everything else follows in one commit.

    Args:
        folder: a folder with a README.md that has metadata.
        repo_id: "user/name" on the Hub.
        private: whether a new repository is private; None takes the account's default. An existing one stays as it is.
        token: access token; by default the one that is logged in.
        commit_message: title of the upload's commit.

    Returns:
        URL of the repository.

    Raises:
        CheckpointError: the folder is missing, or has no model card, or the Hub refuses (not logged in, no right to
            write, not reachable).
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HfHubHTTPError

    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder to push")
    readme = folder / "README.md"
    if not readme.is_file():
        raise CheckpointError(f"{folder}: has no README.md; write a model card with a licence before pushing")
    try:
        card = ModelCard(readme.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{readme}: its metadata is not valid ({_first_line(error)})") from error
    if not card.data.get("license"):
        raise CheckpointError(f"{readme}: its metadata states no license; add one before pushing")
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_file(
            path_or_fileobj=readme, path_in_repo="README.md", repo_id=url.repo_id, commit_message="Model card"
        )
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            ignore_patterns=["README.md", ".*"],
            commit_message=commit_message or f"Upload {folder.name}",
        )
    # Invalid ids are ValueErrors; the bases are the transport errors of whichever HTTP client the library uses.
    except (OSError, ValueError, *HfHubHTTPError.__bases__) as error:
        raise CheckpointError(f"{repo_id}: could not be pushed ({_first_line(error)})") from error
    return str(url)


def _first_line(error):
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
