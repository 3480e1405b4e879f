"""One repository of the Hugging Face hub: what is in it, and commits to it. All that goes over the network is here."""

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

SILENCE_SECONDS = 60.0  # of a service that was asked, until it counts as away
TOKENS = "https://huggingface.co/settings/tokens"
TRIED_AGAIN = (408, 429)  # by huggingface_hub itself, besides 5xx
_CLIENT = threading.Lock()  # held while huggingface_hub's client is ours
BUSY = (*TRIED_AGAIN, 409, 412, 423, 425)  # of the 4xx, those that pass


class Repository:
    """A repository of models.

    Args:
        name: owner/name.
        revision: the branch; None: the default one.
        private: whether it is, where it has to be made.
    """

    def __init__(self, name: str, revision: str | None = None, private: bool = True) -> None:
        self.name, self.revision, self.private = name, revision, private

    @staticmethod
    def require_token() -> None:
        """Make sure that there is a token, and that the user does not work offline; asks nobody.

        Raises:
            IntegrationError: says which, and what to do.
        """
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise IntegrationError("HF_HUB_OFFLINE is set, so nothing is sent; unset it to push.", lasting=True)
        if not get_token():
            raise IntegrationError(
                f"no token of the hub: log in with hf auth login, or set HF_TOKEN ({TOKENS}).", lasting=True
            )

    def list_files(self) -> dict[str, RemoteFile] | None:
        """What is in it, by path; None where there is no such repository or branch yet.

        Raises:
            IntegrationError: it cannot be looked at; with `lasting`, where trying again is useless.
        """
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
        """Whether only its owners see it.

        Raises:
            IntegrationError: see `list_files`.
        """
        with self._connect_client() as api:
            return bool(api.model_info(self.name, expand=["private"]).private)

    def create_repository(self) -> None:
        """Make it, and its branch; of one that is there, nothing changes.

        Raises:
            IntegrationError: see `list_files`.
        """
        with self._connect_client() as api:
            api.create_repo(self.name, private=self.private, exist_ok=True)
            if self.revision is not None:
                api.create_branch(self.name, branch=self.revision, exist_ok=True)

    def commit_plan(self, plan: PushPlan, message: str) -> str:
        """Send what `plan` says in one commit: all of it is there then, or nothing; gives the commit's URL.

        Large files are stored first; those that are stored already, as after a kill, are not sent again.

        Raises:
            IntegrationError: see `list_files`.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [CommitOperationDelete(folder, is_folder=True) for folder in plan.delete]
        operations += [CommitOperationAdd(file.path, file.source) for file in plan.send]
        with self._connect_client() as api:
            return api.create_commit(
                self.name, operations, commit_message=message, revision=self.revision
            ).commit_url  # fmt: skip

    @contextmanager
    def _connect_client(self) -> Iterator[HfApi]:
        """The hub's client; what it raises in the block is said in our words."""
        from huggingface_hub import HfApi, constants, get_token

        with _single_try_client():
            try:
                yield HfApi(endpoint=constants.ENDPOINT, token=get_token(), library_name="training-lens")
            except Exception as error:  # of many kinds: the client's, its transport's, its storage's
                raise explain_error(error, self.name) from error


@contextmanager
def _single_try_client() -> Iterator[None]:
    """Within the block huggingface_hub asks once and waits for no silent service: we try again, and later.

    By itself it tries a request six times, over half a minute, and waits without end for an answer. Its HTTP client is
    one for the process, perhaps of the user's own making: it is kept, with its connections, and other threads that use
    the library meanwhile share this manner.
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
    """`send` of an HTTP client, raising what huggingface_hub would try again."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    transport: Any = HfHubHTTPError.__mro__[1]  # the errors of the HTTP library that it uses: httpx, or its successor

    def send_once(request: Any, **options: Any) -> Any:
        try:
            response = send(request, **options)
        except OfflineModeIsEnabled:
            raise
        except transport as error:
            raise IntegrationError(f"{request.url.host} does not answer: {describe_error(error)}") from error
        if response.status_code in TRIED_AGAIN or response.status_code >= 500:
            raise _build_busy_error(response)
        return response

    return send_once


def _build_busy_error(response: Any) -> IntegrationError:
    """That a service wants to be asked later, and when."""
    what = "asks to be asked more slowly" if response.status_code == 429 else "has trouble"
    return IntegrationError(
        f"{response.request.url.host} {what} (HTTP {response.status_code}).", retry_after=_retry_after(response.headers)
    )


def _retry_after(headers: Any) -> float | None:
    """Seconds that a service asks to wait: the header Retry-After, or the hub's own."""
    from huggingface_hub.utils._http import parse_ratelimit_headers

    after = headers.get("retry-after", "")
    if after.isdigit():
        return float(after)
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and not limit.remaining else None


def explain_error(error: BaseException, repo: str) -> IntegrationError:
    """What a failure means for who pushes to `repo`, and what to do about it.

    `lasting` where the service refused; else it did not answer, or is busy.
    """
    from huggingface_hub.errors import HfHubHTTPError

    chain = list(_error_chain(error))
    ours = next((e for e in chain if isinstance(e, IntegrationError)), None)
    if ours is not None:
        return ours
    answered = next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
    status = getattr(getattr(answered, "response", None), "status_code", None)
    if status is None:
        told = dict.fromkeys(describe_error(e) for e in (error, chain[-1]))  # the first says where, the last why
        wrong = isinstance(error, ValueError) and not isinstance(error, JSONDecodeError)  # of what is sent
        return IntegrationError(" ".join(told), lasting=wrong)
    lasting = 400 <= status < 500 and status not in BUSY
    return IntegrationError(
        _explain_status(status, repo) or f"the hub refused: {describe_error(error)}", lasting=lasting
    )


def _explain_status(status: int, repo: str) -> str:
    """What to do about it; empty where the answer itself has to tell."""
    where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "hf auth login"
    known = {
        401: f"the hub does not accept the token of {where} (HTTP 401): make a new one at {TOKENS}.",
        403: f"the token of {where} may not write to '{repo}' (HTTP 403): give it that permission at {TOKENS}, or name "
        "a repository of your own.",
        404: f"there is no '{repo}', or this token may not see it (HTTP 404): correct the name, owner/name.",
    }  # fmt: skip
    return known.get(status, "")


def _error_chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
