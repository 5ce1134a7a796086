"""The cluster that started this process, as JAX's own detection finds it: which process of how many, and who is first.

`jax.distributed.initialize()` finds and connects in one go. Here the same detectors are asked one question at a time:
the rendezvous needs the answers before anything is connected, a process that is alone must not wait for an address
that means nothing (Kaggle calls its only host "local"), and a process of several must never believe it is alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxsft.cli import Stop, UserError
from jaxsft.run.rendezvous import ProcessInfo

FLAGS = "or give all of --coordinator, --num-processes, --process-id"
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # of one slice, on GKE, Kaggle and Colab
METADATA = (
    "169.254.169.254"  # of every machine on Google's cloud; by its number, for a name may take long not to be found
)
METADATA_SECONDS = 3  # it is next to the machine and answers in milliseconds
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # Open MPI; MPICH, Intel, Cray; MVAPICH
MPI_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")  # on this machine
OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"  # where mpirun is; since version 5 only MPI itself tells


class Unknown(Exception):
    """This JAX keeps its detectors elsewhere."""


def find(timeout: int) -> ProcessInfo | None:
    """What JAX's detection says of the processes, in at most about `timeout` seconds; None where there is no cluster.

    A cluster of one is told without an address.

    Raises:
      Stop: there is a cluster, and it doesn't say which process this is.
      UserError: the package that could ask it isn't installed.
      Unknown: see there.
    """
    kind = detect()
    if kind is None:
        return None
    with one_line(kind):
        # A shell inside of an allocation is one task, of a job that may have more.
        is_one = kind.name == "slurm" and os.environ.get("SLURM_STEP_NUM_TASKS") == "1"
        count = 1 if is_one else kind.get_process_count()
        if count == 1:
            return ProcessInfo("", 0, 1, 0)
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = os.environ.get("JAX_COORDINATOR_ADDRESS") or kind.get_coordinator_address(
            timeout_secs=timeout, override_coordinator_port=port
        )
        host, _, port = address.rpartition(":")
        return ProcessInfo(host.strip("[]"), int(port), count, kind.get_process_id(), local_devices(kind))


def detect() -> Any:
    """The first of JAX's kinds of cluster that this process is in, None where it is in none. Raises as `find`."""
    of_mpi = next((os.environ[name] for name in MPI_SIZES if name in os.environ), "1")
    if "OMPI_COMM_WORLD_SIZE" in os.environ and OPEN_MPI_4 not in os.environ:
        return None if of_mpi == "1" else by_mpi4py(of_mpi)  # Slurm's variables, of what started mpirun's, are not ours
    for kind in kinds():
        if not kind.opt_in_only_method and is_asked(kind.__name__):
            with one_line(kind):
                if kind.is_env_present():
                    return kind
    return None if of_mpi == "1" else by_mpi4py(of_mpi)


def kinds() -> list[Any]:
    """JAX's kinds of cluster in the order in which it asks them."""
    try:
        from jax._src.clusters import ClusterEnv  # private: what is public connects at once

        return list(ClusterEnv._cluster_types)
    except (ImportError, AttributeError):
        raise Unknown from None


def is_asked(name: str) -> bool:
    """Whether there is a reason to ask JAX's kind of cluster of this name, for asking can take minutes."""
    if "Tpu" in name:
        return is_wanted("tpu") and not is_one_tpu_host(os.environ) and ("Gce" not in name or has_metadata())
    if "K8s" in name:
        if "JOB_COMPLETION_INDEX" not in os.environ:
            return False  # no pod of an indexed Job: nothing numbers it
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "this is a pod of a Kubernetes Job, and what JAX asks for the others is not installed",
                f"pip install kubernetes, {FLAGS}",
            )
    return True


def is_one_tpu_host(environment: Mapping[str, str]) -> bool:
    """Whether the environment names one host only; JAX would still ask the metadata server for more slices."""
    hosts = next((environment[name] for name in TPU_HOSTS if environment.get(name)), None)
    return hosts is not None and "," not in hosts and "MEGASCALE_NUM_SLICES" not in environment


def has_metadata() -> bool:
    """Whether Google's metadata server can be reached. If not, neither JAX nor the TPU's runtime shall wait for it."""
    if "TPU_SKIP_MDS_QUERY" in os.environ:
        return False
    host, _, port = os.environ.get("GCE_METADATA_IP", METADATA).partition(":")
    try:
        socket.create_connection((host, int(port or 80)), timeout=METADATA_SECONDS).close()
    except OSError:
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # as JAX sets it where it finds no TPU on the bus
        return False
    return True


def by_mpi4py(count: str) -> Any:
    """JAX's detection through mpi4py, which it makes only when it is told to."""
    for kind in kinds():
        if kind.name == "mpi4py" and kind.is_env_present():
            return kind
    raise UserError(
        f"MPI has started {count} processes, and what JAX asks for them is not installed",
        f"pip install mpi4py, {FLAGS}",
    )


def local_devices(kind: Any) -> tuple[int, ...] | None:
    """The devices that this process may see, None for all of its machine.

    JAX gives each of the processes that a launcher numbers on a machine one GPU. One that is alone there has all.
    """
    if kind.name == "slurm":
        tasks, nodes = (os.environ.get(f"SLURM_STEP_NUM_{of}") for of in ("TASKS", "NODES"))
        is_only = tasks is not None and tasks == nodes
    else:
        is_only = "1" in [os.environ.get(name) for name in MPI_LOCAL_SIZES]
    index = None if is_only else kind.get_local_process_id()
    return None if index is None else (index,)


def launcher() -> Any:
    """The kind of cluster whose launcher's variables are here; None where none are. Asks nobody."""
    with contextlib.suppress(Unknown):
        return next((kind for kind in kinds() if kind.name in ("ompi", "slurm") and kind.is_env_present()), None)


@contextlib.contextmanager
def one_line(kind: Any) -> Iterator[None]:
    """Tell as a Stop whatever the libraries below raise: JAX's, Kubernetes', MPI's, those of the network."""
    try:
        yield
    except Exception as error:
        said = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
        name = kind.__name__.removesuffix("Cluster")
        raise Stop(f"the cluster, {name}, does not say which process this is ({said})", f"mend that, {FLAGS}") from None


def is_wanted(platform: str) -> bool:
    """Whether JAX may use devices of this platform."""
    return platform in (os.environ.get("JAX_PLATFORMS", "") or platform)


def on_tpu(devices: tuple[str, ...] = TPU_DEVICES) -> bool:
    """Whether this machine has what may be a TPU, one of the files `devices`, and JAX may use it."""
    return is_wanted("tpu") and any(Path(device).exists() for device in devices)
