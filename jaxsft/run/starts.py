"""machines.json: where each start of a run computes, and with which versions, to be told long afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from jaxsft.data.threads import cores
from jaxsft.run.checkpoint import versions
from jaxsft.run.parallel import DataParallel
from jaxsft.storage import Location

MACHINES = "machines.json"
GIT = Path(__file__).parents[2] / ".git"


def note(workdir: Path, step: int, parallel: DataParallel, precision: str) -> None:
    """Note that the run (re)starts after `step` updates on this machine; starts that came after are forgotten.

    What can't be written is only missing in a report: a disk that is full is told where it matters.
    """
    entry = {
        "step": step,
        "time": time.time(),
        "devices": str(parallel),
        "device_kind": parallel.devices[0].device_kind,
        "device_count": len(parallel.devices),
        "processes": parallel.process_count,
        "precision": precision,
        **host(),
        "versions": versions(),
    }
    before = [start for start in read(workdir) if start["step"] < step]
    partial = workdir / f"{MACHINES}.partial"
    with contextlib.suppress(OSError):
        partial.write_text(json.dumps([*before, entry], indent=2) + "\n")
        partial.replace(workdir / MACHINES)


def read(workdir: Location) -> list[dict[str, Any]]:
    """The starts of a run, the first first; none of one that noted none, or whose file is damaged."""
    try:
        found = json.loads((workdir / MACHINES).read_text())
    except (OSError, ValueError, RecursionError):
        return []
    entries = found if isinstance(found, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)]


def host() -> dict[str, Any]:
    """This process's machine: name, processor, cores it may use, memory, operating system; this program's commit."""
    pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE") if name in os.sysconf_names}
    memory = pages["SC_PHYS_PAGES"] * pages["SC_PAGE_SIZE"] / 2**30 if len(pages) == 2 else None
    return {
        "host": platform.node(),
        "cpu": processor(),
        "cores": cores(),
        "memory_gib": memory,
        "system": platform.platform(),
        "commit": commit(GIT),
    }


def processor() -> str:
    """The processor's name, as Linux tells it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def commit(git: Path) -> str:
    """The commit that is checked out, where this program runs from a checkout; read from its files, '' where not."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        if git.is_file():  # of a worktree
            git = (git.parent / git.read_text().partition("gitdir:")[2].strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name, shared = head.removeprefix("ref: "), git
        if (git / "commondir").exists():
            shared = (git / (git / "commondir").read_text().strip()).resolve()
        if (shared / name).is_file():
            return (shared / name).read_text().strip()
        packed = (shared / "packed-refs").read_text().splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {name}"))
    return ""
