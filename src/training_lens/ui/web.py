"""What the routes share: the runs of one outputs folder by name, JSON bodies, and errors as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from training_lens.errors import CheckpointError, ConfigurationError, TrainingLensError
from training_lens.runs.run_folder import RunFolder, runs_folder
from training_lens.utils.files import replace_non_finite
from training_lens.utils.formatting import describe_error
from training_lens.utils.limits import load_bounded_json
from training_lens.utils.names import is_printable
from training_lens.utils.secrets import redact_text
from training_lens.web.body_limit import BodyTooLargeError


@dataclass(frozen=True)
class Outputs:
    """The folder whose runs are shown."""

    folder: Path

    def open_run(self, experiment: str, run_id: str) -> RunFolder:
        """The run of this name.

        Raises:
            HTTPException: there is none, or a name leads elsewhere.
        """
        run = RunFolder(runs_folder(str(self.folder), experiment) / run_id)
        if not (is_plain_name(experiment) and is_plain_name(run_id) and run.metadata.is_dir()):
            raise HTTPException(
                404, f"There is no run '{run_id}' in the experiment '{experiment}': deleted, or a wrong address."
            )
        return run

    def requested_run(self, request: Request) -> RunFolder:
        """The run that the path of a request names as `{experiment}/{run}`."""
        return self.open_run(request.path_params["experiment"], request.path_params["run"])


def is_plain_name(name: str) -> bool:
    """Whether a name of a request names a file or folder in one, and none elsewhere."""
    return is_printable(name) and name[0] != "." and not set(name) & set("/\\")


def json_response(values: Mapping[str, Any], status: int = 200) -> Response:
    """Values as JSON; numbers that are not finite are null."""
    text = json.dumps(replace_non_finite(dict(values)), ensure_ascii=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), status, media_type="application/json")


async def read_body(request: Request) -> dict[str, Any]:
    """The JSON object that a request brings.

    Raises:
        ConfigurationError: it is something else.
    """
    try:
        values = load_bounded_json(await request.body())
    except ValueError as error:
        raise ConfigurationError(f"the body is no JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"the body holds a {type(values).__name__}, expected an object.")
    return values


def read_number(request: Request, name: str, default: int, most: int) -> int:
    """A whole number of the query, from 0 to `most`."""
    text = request.query_params.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) > most:
        raise ConfigurationError(f"{name}: '{text[:40]}' is given; expected a whole number from 0 to {most}.")
    return int(text)


async def report_expected_error(request: Request, error: Exception) -> Response:
    """An expected error, as the command line would print it."""
    assert isinstance(error, TrainingLensError | OSError)
    status = 404 if isinstance(error, CheckpointError) else 400
    message = str(error) if isinstance(error, TrainingLensError) else describe_error(error)
    return json_response({"error": redact_text(message)}, status)


async def report_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def report_large_body(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "The request is too large."}, 413)


ERROR_HANDLERS = {
    TrainingLensError: report_expected_error,
    OSError: report_expected_error,
    HTTPException: report_http_error,
    BodyTooLargeError: report_large_body,
}
