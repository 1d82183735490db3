"""Stores on the Hugging Face Hub: pushed as a dataset repository, loaded by name.

What is uploaded is what a store is: manifest, shards, index, clusters, deletions; no locks, no
journals, no log of hosts. What comes back is compared with the checksums of its manifest.
"""

from pathlib import Path

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError, InputError, StoreError
from memlm.store.manifest import BUILD_LOG, JOURNAL
from memlm.store.reader import Datastore
from memlm.store.verify import Level, verify

_PREFIX = "hf://"
_LEFT_OUT = [BUILD_LOG, JOURNAL, "locks/*", "*.tmp", "*.lock", "**/building*", ".cache/*"]


def hub_name(source: str) -> tuple[str, str | None] | None:
    """Repository and revision of ``hf://USER/NAME[@REVISION]``; None if the source is no such name.

    Raises:
        InputError: if it begins so but names no repository.
    """
    if not source.startswith(_PREFIX):
        return None
    name, _, revision = source.removeprefix(_PREFIX).partition("@")
    check(
        name.count("/") == 1 and all(name.split("/")),
        f"a store on the Hub must be named hf://USER/NAME or hf://USER/NAME@REVISION, got {source}",
    )
    return name, revision or None


def push_store(
    store: Datastore,
    name: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a store with all that lies beside it; files that are there already are not sent again.

    Args:
        store: complete; its quick check must find it sound.
        name: ``USER/NAME`` of the dataset repository, created if it is not there.
        private: whether a new repository is private.
        revision: branch; None: the main one.
        token: of the Hub; None: the one this machine is logged in with.

    Returns:
        The address of the commit.

    Raises:
        CorruptStoreError: if the store is damaged.
        StoreError: if the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    _check_sound(store.path, "quick")
    api = HfApi(token=token)
    try:
        api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
        api.upload_file(
            path_or_fileobj=_card(store, name).encode(),
            path_in_repo="README.md",
            repo_id=name,
            repo_type="dataset",
            revision=revision,
        )
        commit = api.upload_folder(
            repo_id=name,
            folder_path=store.path,
            repo_type="dataset",
            revision=revision,
            ignore_patterns=_LEFT_OUT,
            commit_message=f"Datastore of {len(store):,} entries, {store.fingerprint}",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise StoreError(
            f"{name} must be a dataset repository of the Hub that can be written, but {error}; "
            "log in with `hf auth login`, or run the same command again to continue"
        ) from error
    return str(commit)


def fetch_store(
    name: str,
    *,
    revision: str | None = None,
    out: str | Path | None = None,
    token: str | None = None,
) -> Datastore:
    """A store from the Hub, by name; what is there already is not fetched again.

    Args:
        name: ``USER/NAME`` of the dataset repository.
        revision: branch, tag or commit; None: the main branch.
        out: directory to put it in; None: the cache of the Hub's client.
        token: of the Hub; None: the one this machine is logged in with.

    Raises:
        InputError: if there is no such repository, or it holds no store.
        CorruptStoreError: if a file is not what the manifest says.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = snapshot_download(
            name, repo_type="dataset", revision=revision, local_dir=out, token=token
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"{name} must be a dataset repository of the Hub that holds a store, but {error}; "
            "check name, revision and connection"
        ) from error
    _check_sound(Path(path), "full")
    return Datastore.open(path)


def _check_sound(path: Path, level: Level) -> None:
    report = verify(path, level)
    if not report.ok:
        raise CorruptStoreError("; ".join(report.problems))


def _card(store: Datastore, name: str) -> str:
    identity = store.manifest.identity
    return f"""---
tags: [memlm, datastore, knn-lm]
---
# A datastore for language models that remember

{len(store):,} entries of {store.dim} dimensions, made with the model `{identity.model}` (tap
`{identity.tap}`, {identity.model_hash or "fingerprint unknown"}). Fingerprint
`{store.fingerprint}`.

```python
from memlm.importers.hub import fetch_store

store = fetch_store("{name}")
```
"""
