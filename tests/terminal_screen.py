"""What a terminal shows of what a program writes, and what would have wrapped or scrolled on its alternate screen."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import termios
from multiprocessing.process import BaseProcess

from rich.cells import cell_len

TOKENS = re.compile(r"\x1b\[\?(?P<mode>\d+)(?P<set>[hl])|\x1b\[[\d;]*(?P<command>[A-Za-z])|(?P<other>.)", re.DOTALL)
INCOMPLETE = re.compile(r"\x1b(?:\[[0-9;?]*)?$")
ALTERNATE = "1049"


class TerminalScreen:
    """A screen of so many columns and lines, after everything that was fed to it."""

    def __init__(self, columns: int, lines: int, *, is_alternate: bool = False) -> None:
        self.columns, self.lines = columns, lines
        self.is_alternate, self.was_alternate = is_alternate, is_alternate
        self.faults: list[str] = []
        self.printed = ""  # on the normal screen
        self._rest = ""
        self._clear()

    def _clear(self) -> None:
        self._row, self._column = 0, 0
        self._cells = [""] * self.lines

    @property
    def text(self) -> str:
        """The alternate screen."""
        return "\n".join(line.rstrip() for line in self._cells)

    def feed(self, written: str) -> None:
        """Take what was written; a control sequence that is not complete yet waits for the rest."""
        written = self._rest + written
        cut = INCOMPLETE.search(written)
        self._rest = cut[0] if cut else ""
        written = written.removesuffix(self._rest)
        for token in TOKENS.finditer(written):
            if token["mode"] == ALTERNATE:
                self.is_alternate = token["set"] == "h"
                self.was_alternate |= self.is_alternate
                self._clear()
            elif token["command"] == "H":
                self._clear()
            elif token["command"] not in (None, "m"):
                self.faults.append(f"unexpected control sequence {token[0]!r}")
            elif token["other"]:
                self._put(token["other"])

    def _put(self, letter: str) -> None:
        if not self.is_alternate:
            self.printed += "" if letter == "\r" else letter
        elif letter == "\n":
            self._row += 1
            if self._row >= self.lines:
                self.faults.append(f"scrolled below line {self.lines}")
        elif letter == "\r":
            self._column = 0
        elif self._row < self.lines:
            assert letter.isprintable(), repr(letter)
            self._column += cell_len(letter)
            self._cells[self._row] += letter
            if self._column > self.columns:
                self.faults.append(f"wrapped after {self._cells[self._row]!r}")


class Terminal:
    """A pseudo-terminal: a program is started in `enter`, and what it writes is fed to `screen`."""

    def __init__(self, columns: int, lines: int) -> None:
        self._rest = ""
        self.ours, self.theirs = os.openpty()
        self.resize(columns, lines)
        self.screen = TerminalScreen(columns, lines)

    def enter(self) -> None:
        """In a new process: make this its terminal, with the keyboard, as a shell does."""
        os.close(self.ours)  # or the terminal would not hang up where the test closes it
        os.setsid()
        fcntl.ioctl(self.theirs, termios.TIOCSCTTY, 0)
        for number in range(3):
            os.dup2(self.theirs, number)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def read(self, seconds: float) -> str:
        """What is written within this time, as soon as something is."""
        if not select.select([self.ours], [], [], seconds)[0]:
            return ""
        return os.read(self.ours, 1 << 16).decode("utf-8", "ignore")

    def watch(self, process: BaseProcess, *, until: str = "", polls: int = 600) -> None:
        """Show what the process writes until its screen has a text, or else until it ends."""
        for _ in range(polls):
            self.screen.feed(self.read(0.1))
            if (until and until in self.screen.text) or (not until and not process.is_alive()):
                break
        else:
            raise AssertionError(f"no {until!r} on the screen:\n{self.screen.text}")
        while not until and (rest := self.read(0)):
            self.screen.feed(rest)

    def close(self) -> None:
        os.close(self.ours)
        os.close(self.theirs)
