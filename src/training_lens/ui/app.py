"""The dashboard as an ASGI application: pages, and the values that they show as JSON."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from training_lens import display
from training_lens._version import __version__
from training_lens.ui.data_rows import build_data_routes
from training_lens.ui.guard import Access, Guard
from training_lens.ui.launcher import build_launch_routes
from training_lens.ui.playground import build_playground_routes
from training_lens.ui.run_routes import RunRoutes
from training_lens.ui.web import ERROR_HANDLERS, Outputs, json_response

STATIC = Path(display.__file__).parent / "static"


def build_app(outputs: Outputs, access: Access) -> Starlette:
    """The dashboard of the runs in one folder."""

    async def send_page(request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def describe_server(request: Request) -> Response:
        return json_response({"folder": str(outputs.folder), "version": __version__})

    routes = [
        Route("/", send_page),
        Route("/api/about", describe_server),
        *RunRoutes(outputs).routes(),
        *build_data_routes(outputs),
        *build_launch_routes(outputs),
        *build_playground_routes(outputs),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, access=access)],
        exception_handlers=ERROR_HANDLERS,
    )
