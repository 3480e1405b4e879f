"""A PostgreSQL server of the tests: a new cluster in a folder of its own, on a free port of the loopback device."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg import sql

ADMIN = "admin"
SETTINGS = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
fsync = off
timezone = 'Pacific/Apia'
"""


def find_programs() -> Path | None:
    """The folder of initdb and pg_ctl: on the path, or where Debian keeps them."""
    found = shutil.which("initdb")
    places = [Path(found).resolve()] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return places[-1].parent if places else None


@dataclass(frozen=True)
class PostgresServer:
    """A running server. Its password has every character that a URL has a meaning for."""

    programs: Path
    folder: Path
    port: int
    password: str

    @property
    def secret(self) -> str:
        """The part of the password that is spelled alike everywhere."""
        return self.password.partition("@")[0]

    def url(self, database: str = "nothing", password: str | None = None, at: str | None = None) -> str:
        """As `sweep.storage` takes it."""
        spelled = quote(self.password if password is None else password, safe="")
        return f"postgresql://{ADMIN}:{spelled}@{at or f'127.0.0.1:{self.port}'}/{database}"

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user=ADMIN, password=self.password, dbname=database, autocommit=True
        )

    def create_database(self) -> str:
        """The name of a new and empty one."""
        name = f"sweeps_{secrets.token_hex(4)}"
        with self.connect() as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return name

    def start(self) -> None:
        self.run("pg_ctl", "-D", "data", "-l", "server.log", "-w", "start")

    def stop(self) -> None:
        """End it in the midst of everything, without waiting for its clients."""
        self.run("pg_ctl", "-D", "data", "-m", "immediate", "-w", "stop")

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs; not as root, which they refuse."""
        account: dict[str, Any] = {}
        if os.geteuid() == 0:
            entry = find_account()
            account = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
            os.chown(self.folder, entry.pw_uid, entry.pw_gid)
        with (self.folder / "programs.log").open("ab") as log:  # no pipe, which the server would keep open
            done = subprocess.run(
                [self.programs / program, *arguments], cwd=self.folder, stdout=log, stderr=log, check=False, **account
            )
        assert done.returncode == 0, (self.folder / "programs.log").read_text()


def find_account() -> pwd.struct_passwd:
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    return names.get("postgres") or names["nobody"]


@contextmanager
def run_server(programs: Path) -> Iterator[PostgresServer]:
    """A server that is deleted behind the context. Its databases have no encoding, as of an initdb in the C locale."""
    folder = Path(tempfile.mkdtemp(prefix="training-lens-postgresql-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = PostgresServer(programs, folder, port, f"planted{secrets.token_hex(8)}@: /?#%40{{x}}")
    try:
        (folder / "password").write_text(server.password)
        (folder / "password").chmod(0o644)
        server.run(
            "initdb", "-D", "data", "-U", ADMIN, "--auth=scram-sha-256", "--pwfile=password", "--no-sync", "--locale=C"
        )
        with (folder / "data/postgresql.conf").open("a") as settings:
            settings.write(SETTINGS.format(port=port))
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)
