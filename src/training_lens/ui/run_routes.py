"""The addresses of the list of runs, of one run, and of a comparison."""

from __future__ import annotations

import shlex
from typing import Any, Literal, get_args

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from training_lens.analysis.page.recording_cache import RecordingCache
from training_lens.analysis.page.run_compare import compare_layers, compare_runs
from training_lens.analysis.page.run_feed import FeedCache
from training_lens.analysis.page.run_page import describe_run, is_shown_file, read_log_end
from training_lens.errors import ConfigurationError
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_lookup import name_run
from training_lens.ui.run_events import stream_events
from training_lens.ui.run_index import RunIndex
from training_lens.ui.web import Outputs, json_response, read_number
from training_lens.utils.names import find_name_fault

Grouping = Literal["layer", "kind", "module"]
RUN = "/api/runs/{experiment}/{run}"
LARGEST = 10**15  # a step or a version
MOST_POINTS = 5000
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
# A page of a run is foreign: it opens without the origin of the dashboard, and reaches nothing.
PAGE_HEADERS = {
    "Content-Security-Policy": "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline' data:; "
    "style-src 'unsafe-inline'; img-src data:"
}
STREAM_HEADERS = {"X-Accel-Buffering": "no"}  # for proxies: send lines as they come


class RunRoutes:
    """The answers about runs; what was read stays in memory and is shared by all pages."""

    def __init__(self, outputs: Outputs) -> None:
        self._outputs, self._index, self._feeds = outputs, RunIndex(outputs.folder), FeedCache()
        self._recordings = RecordingCache()

    def routes(self) -> list[Route]:
        return [
            Route("/api/runs", self.list_runs),
            Route("/api/compare", self.compare),
            Route("/api/compare/layers", self.compare_layers),
            Route(RUN, self.show_run),
            Route(f"{RUN}/curves", self.send_curves),
            Route(f"{RUN}/events", self.send_events),
            Route(f"{RUN}/findings", self.show_findings),
            Route(f"{RUN}/layers", self.show_layers),
            Route(f"{RUN}/spectra", self.show_spectra),
            Route(f"{RUN}/log", self.send_log),
            Route(RUN + "/files/{path:path}", self.send_file),
        ]

    async def list_runs(self, request: Request) -> Response:
        is_known = request.query_params.get("index") == self._index.name
        since = read_number(request, "since", 0, LARGEST)
        return json_response(await run_in_threadpool(self._index.read_changes, since if is_known else 0))

    async def show_run(self, request: Request) -> Response:
        run = self._outputs.requested_run(request)
        return json_response(await run_in_threadpool(lambda: describe_run(run, self._feeds.open_feed(run))))

    async def send_curves(self, request: Request) -> Response:
        run, points = self._outputs.requested_run(request), read_number(request, "points", 600, MOST_POINTS)
        first, last = (
            read_number(request, name, default, LARGEST) for name, default in (("first", 0), ("last", LARGEST))
        )
        feed = await run_in_threadpool(self._feeds.open_feed, run)
        curves = await run_in_threadpool(feed.thin_curves, max(points, 10), first, last)
        shown = [line for line in feed.validations if first <= line["step"] <= last]
        values = {"first": first, "last": min(last, feed.last_step), "last_step": feed.last_step}
        return json_response({**values, "curves": curves, "validations": shown})

    async def send_events(self, request: Request) -> Response:
        run, since = self._outputs.requested_run(request), read_number(request, "since", 0, LARGEST)
        last = request.headers.get("last-event-id", "")
        since = int(last) if last.isascii() and last.isdigit() and len(last) < 16 else since
        events = stream_events(run, self._feeds, since)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)

    async def show_findings(self, request: Request) -> Response:
        from training_lens.analysis.findings.diagnosis import diagnose
        from training_lens.analysis.page.lens_page import describe_findings

        run = self._outputs.requested_run(request)

        def describe_all() -> dict[str, Any]:
            return describe_findings(diagnose(self._recordings.open(run)), shlex.quote(name_run(run)))

        return json_response(await run_in_threadpool(describe_all))

    async def show_layers(self, request: Request) -> Response:
        from training_lens.analysis.page.lens_page import describe_layers

        run, measure = self._outputs.requested_run(request), request.query_params.get("measure", "strength")
        by = _read_grouping(request)
        return json_response(await run_in_threadpool(lambda: describe_layers(self._recordings.open(run), measure, by)))

    async def show_spectra(self, request: Request) -> Response:
        from training_lens.analysis.page.lens_page import describe_spectra

        run = self._outputs.requested_run(request)
        return json_response(await run_in_threadpool(lambda: describe_spectra(self._recordings.open(run))))

    async def send_log(self, request: Request) -> Response:
        run = self._outputs.requested_run(request)
        return json_response({"text": await run_in_threadpool(read_log_end, run)})

    async def send_file(self, request: Request) -> Response:
        run, name = self._outputs.requested_run(request), request.path_params["path"]
        path = run.root / name
        if find_name_fault(name) or not is_shown_file(run, path):
            raise HTTPException(404, "There is no such file of this run.")
        if path.suffix == ".html":
            return FileResponse(path, media_type="text/html", headers=PAGE_HEADERS)
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)

    async def compare(self, request: Request) -> Response:
        runs = self._named_runs(request)
        return json_response(await run_in_threadpool(compare_runs, runs, self._feeds))

    async def compare_layers(self, request: Request) -> Response:
        runs = self._named_runs(request)
        return json_response(await run_in_threadpool(compare_layers, runs, self._recordings))

    def _named_runs(self, request: Request) -> list[RunFolder]:
        """The runs of a query `run=EXPERIMENT/ID&run=...`."""
        names = [name.partition("/") for name in dict.fromkeys(request.query_params.getlist("run"))]
        return [self._outputs.open_run(experiment, run_id) for experiment, _, run_id in names]


def _read_grouping(request: Request) -> Grouping:
    given = request.query_params.get("by", "layer")
    for name in GROUPINGS:
        if given == name:
            return name
    raise ConfigurationError(f"by: '{given[:40]}' is given; expected {', '.join(GROUPINGS)}.")
