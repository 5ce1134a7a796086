"""What the launchers of processes leave in the environment of each, and what answers where JAX asks further.

Open MPI's and MPICH's variables were looked at (4.1.8, 5.0.11; 5.0); Slurm's, Kubernetes' and Google's are those of
their manuals.
"""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

Environment = dict[str, str]
PREFIXES = ("SLURM_", "OMPI_", "PMI_", "MPI_", "KUBERNETES_", "JOB_COMPLETION_", "TPU_", "MEGASCALE_", "GCE_",
            "JAX_COORDINATOR_")  # fmt: skip


def slurm(index: int, count: int, nodes: str = "localhost", job: int = 4099, number: int = 1) -> Environment:
    """By `srun` on `number` nodes."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_NUM_NODES": str(number),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index // number),
    }


def open_mpi(index: int, count: int, version: int = 4, local: int | None = None) -> Environment:
    """By `mpirun`, `local` of them on this machine."""
    environment = {
        "OMPI_COMM_WORLD_SIZE": str(count),
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(count if local is None else local),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index if local is None else index % local),
        "PMIX_RANK": str(index),
    }
    if version == 4:
        return {**environment, "OMPI_MCA_orte_hnp_uri": "2024669184.0;tcp://127.0.0.1:52843;tcp6://[::1]:41275"}
    return {**environment, "OMPI_VERSION": f"{version}.0.11"}


def mpich(index: int, count: int) -> Environment:
    """By MPICH's `mpiexec`, all on this machine."""
    return {
        "PMI_RANK": str(index),
        "PMI_SIZE": str(count),
        "MPI_LOCALRANKID": str(index),
        "MPI_LOCALNRANKS": str(count),
    }


def kubernetes(index: int, count: int) -> Environment:
    """In a pod of an indexed Job of `count`; HOSTNAME is only here one that always resolves."""
    return {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "JOB_COMPLETION_INDEX": str(index),
        "HOSTNAME": "localhost",
        "PODS_IN_TEST": str(count),
    }


# What mpi4py tells, from the variables of both launchers.
MPI4PY = """
import os

class World:
    def _read(self, *names):
        return next(int(os.environ[name]) for name in names if name in os.environ)
    def Get_size(self):
        return self._read("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    def Get_rank(self):
        return self._read("OMPI_COMM_WORLD_RANK", "PMI_RANK")
    def bcast(self, value, root):
        return value if self.Get_rank() == root else "first:61441"
    def Split_type(self, kind):
        return Local()

class Local(World):
    def Get_rank(self):
        return self._read("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")

COMM_WORLD, COMM_TYPE_SHARED = World(), 0
"""

# What the client of Kubernetes tells of the Job `train` and this pod of it.
KUBERNETES = """
import os
from types import SimpleNamespace as Record

class ApiException(Exception):
    status, reason = 403, "Forbidden"

def ask():
    if "PODS_IN_TEST" not in os.environ:
        raise ApiException

class Api:
    def list_namespaced_pod(self, namespace, field_selector):
        ask()
        owner = Record(controller=True, kind="Job")
        metadata = Record(name="train-0", labels={"job-name": "train"}, owner_references=[owner])
        return Record(items=[Record(metadata=metadata, spec=Record(subdomain="pods"))])
    def read_namespaced_job(self, name, namespace):
        ask()
        metadata = Record(name=name, labels={})
        return Record(metadata=metadata, spec=Record(parallelism=int(os.environ["PODS_IN_TEST"])))

config = Record(load_incluster_config=lambda: None)
client = Record(CoreV1Api=Api, BatchV1Api=Api, exceptions=Record(ApiException=ApiException))
"""


def install(folder: Path, name: str) -> None:
    """Write the package `name` into a folder that is to be on Python's path."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(KUBERNETES if name == "kubernetes" else "")
    (folder / name / "MPI.py").write_text(MPI4PY)


@contextlib.contextmanager
def metadata_server(attributes: dict[str, str]) -> Iterator[str]:
    """Google's metadata server, of these attributes of the machine: its HOST:PORT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            self.send_response(200 if found is not None else 404)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


# In a mount namespace: a /dev with a card in it that somebody passed through; "$0" is an empty folder.
WITH_CARD = """
mount -t tmpfs none "$0"
for name in null zero full random urandom; do touch "$0/$name"; mount --bind "/dev/$name" "$0/$name"; done
ln -s /proc/self/fd "$0/fd"
mkdir "$0/shm" "$0/vfio"
touch "$0/vfio/0"
mount --rbind "$0" /dev
exec "$@"
"""
# What a pod has there: its namespace, and the name of the first pod.
AS_POD = """
mount -t tmpfs none /run
mkdir -p /run/secrets/kubernetes.io/serviceaccount
printf default > /run/secrets/kubernetes.io/serviceaccount/namespace
{ cat /etc/hosts; echo 127.0.0.1 train-0.pods; } > /run/hosts
mount --bind /run/hosts /etc/hosts
exec "$0" "$@"
"""
