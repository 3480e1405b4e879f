"""A repository of the Hugging Face hub: its files, and commits to it. All network access is here."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any

from training_lens.errors import IntegrationError
from training_lens.integrations.hub_files import PushPlan, RemoteFile
from training_lens.utils.formatting import describe_error

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SILENCE_SECONDS = 60.0  # without an answer, until the service counts as away
TOKENS = "https://huggingface.co/settings/tokens"
TRIED_AGAIN = (408, 429)  # HTTP statuses that huggingface_hub retries itself, besides 5xx
_CLIENT = threading.Lock()  # held while we have changed huggingface_hub's client
BUSY = (*TRIED_AGAIN, 409, 412, 423, 425)  # the 4xx that are temporary


class Repository:
    """A repository of models, owner/name, at a branch or the default one; a new one is private or not.

    Its methods raise an `IntegrationError`, `lasting` if trying again is useless.
    """

    def __init__(self, name: str, revision: str | None, private: bool) -> None:
        self.name, self.revision, self.private = name, revision, private

    @staticmethod
    def require_token() -> None:
        """Require a token, and that HF_HUB_OFFLINE is not set, without network."""
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise IntegrationError("HF_HUB_OFFLINE is set, so nothing is sent; unset it to push.", lasting=True)
        if not get_token():
            raise IntegrationError(
                f"no token of the hub: log in with hf auth login, or set HF_TOKEN ({TOKENS}).", lasting=True
            )

    def list_files(self) -> dict[str, RemoteFile] | None:
        """The files in the repository, by path; None if the repository or branch does not exist yet."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        with self._connect_client() as api:
            try:
                entries = list(api.list_repo_tree(self.name, recursive=True, revision=self.revision))
            except RevisionNotFoundError:
                return None
            except RepositoryNotFoundError as error:
                if error.response.status_code != 404:
                    raise
                return None
        found = (entry for entry in entries if isinstance(entry, RepoFile))
        return {f.path: RemoteFile(f.size, f.blob_id, f.lfs.sha256 if f.lfs else None) for f in found}

    def is_private(self) -> bool:
        """Whether only its owners see it."""
        with self._connect_client() as api:
            return bool(api.model_info(self.name, expand=["private"]).private)

    def create_repository(self) -> None:
        """Create the repository and its branch, unless they exist."""
        with self._connect_client() as api:
            api.create_repo(self.name, private=self.private, exist_ok=True)
            if self.revision is not None:
                api.create_branch(self.name, branch=self.revision, exist_ok=True)

    def commit_plan(self, plan: PushPlan, message: str) -> str:
        """Send the files of `plan` in one commit, all or none; returns the commit's URL.

        Large files are uploaded first; those of an interrupted upload are not sent again.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [CommitOperationDelete(folder, is_folder=True) for folder in plan.delete]
        operations += [CommitOperationAdd(file.path, file.source) for file in plan.send]
        with self._connect_client() as api:
            commit = api.create_commit(self.name, operations, commit_message=message, revision=self.revision)
        return commit.commit_url

    @contextmanager
    def _connect_client(self) -> Iterator[HfApi]:
        """The hub's client; its errors in the block become `IntegrationError`s."""
        from huggingface_hub import HfApi, constants, get_token

        with _single_try_client():
            try:
                yield HfApi(endpoint=constants.ENDPOINT, token=get_token(), library_name="training-lens")
            except Exception as error:  # of many kinds: the client's, its transport's, its storage's
                raise explain_error(error, self.name) from error


@contextmanager
def _single_try_client() -> Iterator[None]:
    """Within the block, huggingface_hub tries each request once, with a timeout: we retry later ourselves.

    By itself it tries six times within half a minute, and waits for an answer forever. Its HTTP client is shared by the
    process and may be the user's own, so it is changed in place; other threads that use it meanwhile see the change.
    """
    from huggingface_hub import get_session

    with _CLIENT:
        client = get_session()
        send, timeout = client.send, client.timeout
        client.send, client.timeout = _without_retries(send), SILENCE_SECONDS  # type: ignore[method-assign]
        try:
            yield
        finally:
            client.send, client.timeout = send, timeout  # type: ignore[method-assign]


def _without_retries(send: Any) -> Any:
    """`send` of an HTTP client, but raising an error where huggingface_hub would retry."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    transport: Any = HfHubHTTPError.__mro__[1]  # the base error of its HTTP library: httpx, or a successor

    def send_once(request: Any, **options: Any) -> Any:
        try:
            response = send(request, **options)
        except OfflineModeIsEnabled:
            raise
        except transport as error:
            raise IntegrationError(f"{request.url.host} does not answer: {describe_error(error)}") from error
        status = response.status_code
        if status in TRIED_AGAIN or status >= 500:
            what = "limits the rate of requests" if status == 429 else "has trouble"
            raise IntegrationError(
                f"{request.url.host} {what} (HTTP {status}).", retry_after=_retry_after(response.headers)
            )
        return response

    return send_once


def _retry_after(headers: Any) -> float | None:
    """Seconds to wait, from the header Retry-After or the hub's own header."""
    from huggingface_hub.utils._http import parse_ratelimit_headers

    after = headers.get("retry-after", "")
    if after.isdigit():
        return float(after)
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and not limit.remaining else None


def explain_error(error: BaseException, repo: str) -> IntegrationError:
    """An `IntegrationError` that says what went wrong in a push to `repo`, and what to do.

    `lasting` if the service refused; otherwise it did not answer, or is busy.
    """
    from huggingface_hub.errors import HfHubHTTPError

    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if our_error := next((e for e in chain if isinstance(e, IntegrationError)), None):
        return our_error
    answered = next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
    status = getattr(getattr(answered, "response", None), "status_code", None)
    if status is None:
        texts = dict.fromkeys(describe_error(e) for e in (error, chain[-1]))  # the first says where, the last why
        wrong = isinstance(error, ValueError) and not isinstance(error, JSONDecodeError)  # of what is sent
        return IntegrationError(" ".join(texts), lasting=wrong)
    where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "hf auth login"
    known = {
        401: f"the hub does not accept the token of {where} (HTTP 401): make a new one at {TOKENS}.",
        403: f"the token of {where} may not write to '{repo}' (HTTP 403): give it that permission at {TOKENS}, or name "
        "a repository of your own.",
        404: f"there is no '{repo}', or this token may not see it (HTTP 404): correct the name, owner/name.",
    }  # fmt: skip
    why = known.get(status) or f"the hub refused: {describe_error(error)}"
    return IntegrationError(why, lasting=400 <= status < 500 and status not in BUSY)
