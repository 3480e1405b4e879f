"""Two hosts, as two network namespaces with addresses of their own: one is killed or cut off, and comes back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from lost_runs import assert_same_results, complete, find_run, settings_of, wait_for_checkpoint  # type: ignore[import-not-found]

from training_lens.runs.run_folder import RunFolder

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and ip"),
]
ADDRESSES = ("10.177.0.1", "10.177.0.2")
PATIENCE = 20  # seconds until a host that is silent counts as lost


class Host:
    """A network namespace with one link to the other host."""

    def __init__(self, number: int) -> None:
        own = f"tl{os.getpid()}"  # of this worker
        self.name, self.link, self.address = f"{own}-h{number}", f"{own}e{number}", ADDRESSES[number]
        self.agent: subprocess.Popen[str] | None = None

    def start(self, folder: Path, run_id: str) -> subprocess.Popen[str]:
        """torchrun on this host, as on each of the two; the first is where they meet."""
        launch = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--monitor-interval=0.2"]
        launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400", f"--rdzv-id={run_id}"]
        # A namespace has no name by which torchrun could tell whose addresses these are.
        launch += [f"--local-addr={self.address}", f"--rdzv-conf=is_host={self.address == ADDRESSES[0]}"]
        settings = [*settings_of(folder), f"output.run_id={run_id}", f"distributed.timeout_seconds={PATIENCE}"]
        command = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "training_lens", "train", *settings]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.link,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see cli/torchrun.py
        }
        self.agent = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command], stderr=subprocess.PIPE, text=True, env=environment
        )
        return self.agent

    def kill(self) -> None:
        """As when the power fails."""
        if self.agent is not None and self.agent.returncode is None:
            with suppress(psutil.NoSuchProcess):
                for process in [*psutil.Process(self.agent.pid).children(recursive=True), self.agent]:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            self.agent.communicate()

    def set_link(self, state: str) -> None:
        run("ip", "-n", self.name, "link", "set", self.link, state)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    both = Host(0), Host(1)
    for host in both:
        subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)
        run("ip", "netns", "add", host.name)
        run("ip", "-n", host.name, "link", "set", "lo", "up")
    one, two = both
    run("ip", "link", "add", one.link, "netns", one.name, "type", "veth", "peer", "name", two.link, "netns", two.name)
    for host in both:
        run("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.link)
        host.set_link("up")
    yield both
    for host in both:
        host.kill()
        run("ip", "netns", "del", host.name)


def train_to_checkpoint(folder: Path, hosts: tuple[Host, Host]) -> RunFolder:
    """Start a run on both hosts; it has a checkpoint, and goes on."""
    run_folder = find_run(folder, "cut")
    for host in hosts:
        host.start(folder, "cut")
    wait_for_checkpoint(run_folder, 5)
    return run_folder


def finish(hosts: tuple[Host, Host]) -> None:
    for host in hosts:
        assert host.agent is not None
        complete(host.agent)


def test_a_host_that_is_killed_comes_back_and_the_run_ends_as_if_undisturbed(
    tmp_path: Path, undisturbed: RunFolder, hosts: tuple[Host, Host]
) -> None:
    run_folder = train_to_checkpoint(tmp_path, hosts)
    hosts[1].kill()
    hosts[1].start(tmp_path, "cut")
    finish(hosts)
    assert_same_results(run_folder, undisturbed)


def test_a_host_that_is_cut_off_ends_the_processes_and_comes_back(
    tmp_path: Path, undisturbed: RunFolder, hosts: tuple[Host, Host]
) -> None:
    run_folder = train_to_checkpoint(tmp_path, hosts)
    hosts[1].set_link("down")
    time.sleep(2 * PATIENCE)  # both have noticed
    hosts[1].kill()
    hosts[1].set_link("up")
    hosts[1].start(tmp_path, "cut")
    finish(hosts)
    assert_same_results(run_folder, undisturbed)
