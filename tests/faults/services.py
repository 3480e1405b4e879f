"""A hub and an S3 server that go away while a run sends to them."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import s3fs
from bench import Bench, Tally  # type: ignore[import-not-found]
from cases import CASES, FOLDER, TRAIN  # type: ignore[import-not-found]

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
from hub_server import TOKEN, Hub  # type: ignore[import-not-found]
from s3_server import BUCKET, Server  # type: ignore[import-not-found]

REPO, WEIGHTS = "me/it", "artifacts/adapter/adapter_model.safetensors"
SENDING = (*TRAIN, f"tracking.hub.repo={REPO}", f"output.mirror=s3://{BUCKET}/path", "tracking.wait_seconds=2")


class Services:
    """Both servers; the fork server is started with `environment`, which is read at imports."""

    def __init__(self, place: Path) -> None:
        self.hub, self.s3 = Hub(place / "hub"), Server()
        self.environment = {
            **self.s3.environment, "HF_ENDPOINT": self.hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip

    @contextmanager
    def running(self) -> Iterator[None]:
        self.hub.start()
        self.s3.start()
        try:
            yield
        finally:
            self.hub.kill()
            self.s3.kill()

    def go_away(self) -> None:
        """The hub dies, and S3 answers no more: it would lose what it holds if it died."""
        self.hub.kill()
        os.kill(self.s3.pid, signal.SIGSTOP)

    def come_back(self) -> None:
        self.hub.start()
        os.kill(self.s3.pid, signal.SIGCONT)

    def hold(self, run: Path) -> bool:
        """Whether both have the adapter of the run."""
        s3 = s3fs.S3FileSystem(
            endpoint_url=self.s3.url, skip_instance_cache=True, use_listings_cache=False,
            key=self.s3.environment["AWS_ACCESS_KEY_ID"], secret=self.s3.environment["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip
        mirrored = s3.cat_file(f"{BUCKET}/path/experiments/default/runs/{run.name}/{WEIGHTS}")
        return bool((run / WEIGHTS).read_bytes() == mirrored == self.hub.files(REPO)[Path(WEIGHTS).name])


def lose_services(bench: Bench, services: Services, times: int, draw: random.Random) -> Tally:
    """The run trains on to the same result, and `sync` sends what is missing."""
    tally, case = Tally(), CASES["train"]
    bench.wanted(case)
    for _ in range(times):
        with services.running(), bench.sandbox(case.needs) as folder:
            seconds = draw.uniform(0.0, bench.seconds(case))
            leaving = threading.Timer(seconds, services.go_away)
            leaving.start()
            ended = bench.server.run(SENDING, folder)
            leaving.join()
            found = bench.judge(case, f"hub and S3 away after {seconds:.3f} s", ended, folder)
            services.come_back()
            if found.outcome == "same result":
                sent = bench.server.run(("sync", FOLDER), folder)
                if sent.code or not services.hold(folder / FOLDER):
                    found.outcome, found.text = "other result", sent.text[-3000:]
            tally.add(found)
    return tally
