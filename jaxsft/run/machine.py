"""What the machine offers to a run: memory in huge pages, and a place for compiled programs.

XLA:CPU takes the temporary memory of a step from malloc and gives it back after the step, and a block of that size
comes from the kernel, which clears each page when it is first touched. In pages of 4 KB that took a fifth of the
processor time of a train step (75,000 pages, ResNet-18 on 64 images of 64 px); in pages of 2 MB 4 to 8 %. glibc asks
for them where the environment says so at the start of the process, which is why a command starts itself anew.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import warnings
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def announce_start() -> None:
    """Say on stdout that the command has begun, for the imports that come take seconds."""
    if not {"-h", "--help"} & set(sys.argv):
        with contextlib.suppress(OSError, ValueError):  # of a terminal that is gone
            print("starting ...", flush=True)


def keep_compilations() -> None:
    """Let JAX keep compiled programs in the user's cache, so that the next command of the kind starts faster.

    Not where the user says where they go, or the cache can't be written: JAX would warn of every program.
    """
    import jax

    from jaxsft import storage
    from jaxsft.cli import UserError, warn
    from jaxsft.models.weights import cache_dir, check_name

    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = cache_dir() / "compiled"
    try:
        check_name(folder)
        if isinstance(folder, Path):
            folder.mkdir(parents=True, exist_ok=True)
        storage.try_to_write(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    except UserError:
        return
    except OSError as error:
        if storage.is_remote(folder):
            warn(f"{folder} can't be written ({error.strerror}): compiled programs are not kept")
    # A program that can't be read or kept is compiled, and nothing is lost.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")


def ask_for_huge_pages() -> None:
    """Replace this process by the same command with huge pages, where the kernel gives them to whoever asks.

    To be called before anything is imported that takes time. Returns where there is nothing to gain: no Linux, huge
    pages for all or for none, or a variable that says what the user wants.
    """
    said = os.environ.get(VARIABLE, "")
    if TUNABLE in said or not is_madvise(ENABLED):
        return
    os.environ[VARIABLE] = ":".join(filter(None, (said, f"{TUNABLE}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def collect_seldom() -> None:
    """Let Python look for cyclic garbage when there are 50,000 new objects, not 700.

    Imports and traces make a million that stay, and a seventh of the time to a compiled program went to looking at
    them.
    """
    gc.set_threshold(50_000)


def is_madvise(enabled: Path) -> bool:
    """Whether the kernel's setting is to give huge pages to a process that asks for them, and only to it."""
    try:
        return "[madvise]" in enabled.read_text()
    except OSError:
        return False
