"""A process is told by its environment which one of how many it is, or that it is alone; nothing else is asked."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster, k8s_cluster

from jaxsft.cli import Stop, UserError
from jaxsft.run import clusters, processes, sockets
from jaxsft.run.rendezvous import ProcessInfo
from tests import launched, small, strangers
from tests.conftest import ROOT

ONE = ProcessInfo("", 0, 1, 0)
GKE = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,10.0.0.2", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "true"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080"}
PORT, JAX_PORT = 61440 + 4099 % 4096, 61440 + 2024669184 // 4096 % 4096  # of a Slurm job, of an Open MPI job
ORTED = {**launched.slurm(1, 2, number=2), **launched.open_mpi(3, 4, 5)}  # mpirun's daemons are started by srun


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch, tmp_path: Path) -> None:
    """An environment that no launcher has touched, and JAX without what it remembers of Kubernetes."""
    for name in [name for name in clusters.os.environ if name.startswith(launched.PREFIXES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # as JAX leaves it where it finds no TPU
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("_pod", "_job", "_controller"):
        getattr(k8s_cluster.K8sCluster, name).__func__.cache_clear()
    monkeypatch.setattr(k8s_cluster.K8sCluster, "_namespace", lambda: "default")
    monkeypatch.setattr(k8s_cluster.socket, "gethostbyname", lambda name: "127.0.0.1")
    yield
    for name in ("mpi4py", "mpi4py.MPI", "kubernetes"):
        sys.modules.pop(name, None)


def enter(monkeypatch, environment: launched.Environment, tmp_path: Path, *packages: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for package in packages:
        launched.install(tmp_path, package)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (launched.slurm(3, 4, "node001"), ProcessInfo("node001", PORT, 4, 3, (3,))),
        (launched.slurm(3, 4, "node001,host2", number=2), ProcessInfo("node001", PORT, 4, 3, (1,))),
        (launched.slurm(3, 4, "node[001-0004],host2", number=4), ProcessInfo("node001", PORT, 4, 3)),
        (launched.slurm(0, 2, "n[01,07-9]", number=2), ProcessInfo("n01", PORT, 2, 0)),
        ({**launched.slurm(0, 2), "JAX_COORDINATOR_PORT": "77"}, ProcessInfo("localhost", 77, 2, 0, (0,))),
        ({**launched.slurm(0, 2), "JAX_COORDINATOR_ADDRESS": "[::1]:7"}, ProcessInfo("::1", 7, 2, 0, (0,))),
        (launched.slurm(0, 1), ONE),
        ({**launched.slurm(0, 1), "SLURM_NTASKS": "4"}, ONE),  # salloc's shell
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-4]"}, None),  # without srun
        (launched.open_mpi(1, 2), ProcessInfo("127.0.0.1", JAX_PORT, 2, 1, (1,))),
        (launched.open_mpi(3, 4, local=1), ProcessInfo("127.0.0.1", JAX_PORT, 4, 3)),
        (launched.open_mpi(0, 1), ONE),
        (launched.open_mpi(0, 1, 5), None),
        (launched.mpich(0, 1), None),
        ({**launched.mpich(1, 2), **launched.slurm(1, 2, "n")}, ProcessInfo("n", PORT, 2, 1, (1,))),  # srun --mpi=pmi2
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod of no indexed Job, such as a notebook's
    ],
)  # fmt: skip
def test_variables(monkeypatch, tmp_path: Path, environment, expected: ProcessInfo | None) -> None:
    enter(monkeypatch, environment, tmp_path)
    assert clusters.find(1) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (launched.open_mpi(1, 2, 5), ProcessInfo("first", 61441, 2, 1, (1,))),
        (launched.open_mpi(3, 4, 5, local=1), ProcessInfo("first", 61441, 4, 3)),
        (ORTED, ProcessInfo("first", 61441, 4, 3, (3,))),
        (launched.mpich(1, 2), ProcessInfo("first", 61441, 2, 1, (1,))),
    ],
)
def test_mpi_is_asked_through_mpi4py(monkeypatch, tmp_path: Path, environment, expected: ProcessInfo) -> None:
    enter(monkeypatch, environment, tmp_path)
    with pytest.raises(
        UserError, match=r"^MPI has started [24] processes, and .* not installed; pip install mpi4py, or"
    ):
        clusters.find(1)
    launched.install(tmp_path, "mpi4py")
    assert clusters.find(1) == expected


def test_kubernetes_is_asked_for_the_job(monkeypatch, tmp_path: Path) -> None:
    enter(monkeypatch, launched.kubernetes(1, 2), tmp_path)
    with pytest.raises(
        UserError, match=r"^this is a pod of a Kubernetes Job, .* not installed; pip install kubernetes"
    ):
        clusters.find(1)
    launched.install(tmp_path, "kubernetes")
    assert clusters.find(1) == ProcessInfo("train-0.pods", 55527, 2, 1)


def test_what_a_cluster_does_not_tell_is_one_line(monkeypatch, tmp_path: Path) -> None:
    environment = launched.kubernetes(1, 2)
    del environment["PODS_IN_TEST"]
    enter(monkeypatch, environment, tmp_path, "kubernetes")
    with pytest.raises(
        Stop, match=r"^the cluster, K8s, does not say .* 403 - Forbidden .*or give all of --coor"
    ) as found:
        clusters.find(1)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("environment", "attributes", "expected"),
    [
        ({}, {"agent-worker-number": "1", "worker-network-endpoints": "a:0:127.0.0.1,b:1:10.0.0.2"},
         ProcessInfo("127.0.0.1", 8482, 2, 1)),
        ({}, {"agent-worker-number": "2", "worker-network-endpoints": "localhost,b,c"},
         ProcessInfo("localhost", 8482, 3, 2)),
        ({}, {"agent-worker-number": "0", "worker-network-endpoints": "localhost"}, ONE),
        ({}, {"agent-worker-number": "1", "worker-network-endpoints": "a,b",
              "tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: 'c:1'\n"},
         ProcessInfo("c", 8482, 4, 3)),
        (GKE, {}, ProcessInfo("127.0.0.1", 8482, 2, 1)),
        ({**GKE, **SLICES}, None, ProcessInfo("localhost", 8482, 4, 3)),
        ({"TPU_PROCESS_ADDRESSES": "local"}, None, None),  # Kaggle
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None, None),  # Colab
        ({**GKE, "JAX_PLATFORMS": "cpu"}, None, None),
        ({"JAX_PLATFORMS": "cpu"}, None, None),
        ({}, None, None),
    ],
)  # fmt: skip
def test_tpus(monkeypatch, tmp_path: Path, environment, attributes, expected: ProcessInfo | None) -> None:
    """Where it has a TPU, by its variables and by a metadata server; with attributes None there is none."""
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    enter(monkeypatch, environment, tmp_path)
    with launched.metadata_server({"tpu-env": "", **(attributes or {})}) as place:
        monkeypatch.setenv("GCE_METADATA_IP", place if attributes is not None else "127.0.0.1:1")
        assert clusters.find(1) == expected


def test_a_metadata_server_that_is_absent_is_not_waited_for(monkeypatch) -> None:
    """One that takes no connection, as where a firewall drops them: neither by us, nor by JAX and the TPU's runtime."""
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(clusters, "METADATA_SECONDS", 0.5)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{deaf.getsockname()[1]}")
        full = [socket.socket() for _ in range(4)]  # no room is left in its queue
        for connection in full:
            connection.setblocking(False)
            connection.connect_ex(deaf.getsockname())
        began = time.monotonic()
        assert clusters.find(300) is None
        assert time.monotonic() - began < 2
        for connection in full:
            connection.close()
    assert clusters.os.environ["TPU_SKIP_MDS_QUERY"] == "1"


@pytest.mark.parametrize(
    ("platforms", "devices", "expected"),
    [("", ["vfio"], True), ("", [], False), ("tpu,cpu", ["other", "vfio"], True), ("cpu", ["vfio"], False)],
)
def test_what_may_be_a_tpu(monkeypatch, tmp_path: Path, platforms: str, devices: list[str], expected: bool) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    (tmp_path / "vfio").touch()
    assert clusters.on_tpu(tuple(str(tmp_path / name) for name in devices)) is expected


@pytest.mark.parametrize(("on_tpu", "said"), [(True, "one process, no cluster found: training alone on"), (False, "")])
def test_one_that_is_alone_trains_and_says_so(monkeypatch, capsys, on_tpu: bool, said: str) -> None:
    monkeypatch.setattr(clusters, "on_tpu", lambda: on_tpu)
    with processes.join({}, 1):
        assert not jax.distributed.is_initialized()
    assert capsys.readouterr().out.startswith(said) if said else capsys.readouterr().out == ""


@pytest.mark.parametrize("found", [True, False])
def test_a_jax_that_keeps_its_detection_elsewhere_connects_by_itself(monkeypatch, found: bool) -> None:
    def moved() -> None:
        raise clusters.Unknown

    def initialize(**keywords: object) -> None:
        asked.append(keywords)
        if not found:
            raise ValueError("coordinator_address should be defined.")

    asked: list[dict[str, object]] = []
    monkeypatch.setattr(clusters, "kinds", moved)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with processes.join({}, 7):
        asked.append({})
    assert asked == [{"initialization_timeout": 7}, {}]


def test_jax_is_told_what_was_found_and_asks_nobody(monkeypatch) -> None:
    """Also by the options: each of the processes that srun starts on a machine sees one GPU of it."""
    told: list[object] = []

    class Met:
        address, bind_address = "a:1", "a:2"

        def __init__(self, info: ProcessInfo, timeout: float):
            self.info = info

        def watch(self) -> None: ...
        def announce(self, word: str) -> None: ...

    monkeypatch.setattr(processes, "Rendezvous", Met)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *said, **named: told.extend([said, named]))
    for name, value in launched.slurm(1, 2).items():
        monkeypatch.setenv(name, value)
    for values in ({}, {"coordinator": "b:1", "num-processes": "2", "process-id": "1"}):
        with processes.join(values, 7):
            told.append("trains")
    named = {"cluster_detection_method": "deactivate", "initialization_timeout": 7, "coordinator_bind_address": "a:2"}
    assert told == [("a:1", 2, 1, (1,)), named, "trains"] * 2


# Joins the other process, and parts from it when both are told to.
JOIN = """
import sys
from jaxsft.run import processes
with processes.join({}, 60):
    print("joined", flush=True)
    sys.stdin.readline()
"""


def test_strangers_at_every_port_neither_block_nor_end_it(tmp_path: Path) -> None:
    """Neither where we meet nor where JAX's own service listens; it does so only where the coordinator is named."""

    def assert_unreached(port: int) -> None:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)

    port = sockets.free_port()
    group: list[subprocess.Popen[str]] = []

    def come(index: int) -> subprocess.Popen[str]:
        environment = {**clusters.os.environ, **launched.slurm(index, 2), "JAX_COORDINATOR_PORT": str(port)}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-c", JOIN]
        group.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes))  # type: ignore[call-overload]
        return group[-1]

    try:
        with strangers.at(come(0).pid) as visited:
            while port not in visited:
                time.sleep(0.05)
            assert_unreached(port)
            come(1)
            assert [process.stdout.readline() for process in group] == ["joined\n"] * 2  # type: ignore[union-attr]
            while len(visited) < 2:
                time.sleep(0.05)
            for jaxs in visited - {port}:
                assert_unreached(jaxs)
            for process in group:
                process.stdin.write("\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
            ended = [process.communicate(timeout=60) for process in group]
        assert [process.returncode for process in group] == [0, 0], ended
    finally:
        for process in group:
            process.kill()


def test_a_card_that_is_passed_through_is_no_cluster(namespace, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    command = [*namespace, launched.WITH_CARD, tmp_path / "dev", sys.executable, "-m", "jaxsft.train"]
    environment = {k: v for k, v in clusters.os.environ.items() if k not in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY")}
    arguments = [*small.ARGUMENTS, "--config.train.epochs=1", "--workdir", tmp_path / "run"]
    done = subprocess.run(list(map(str, [*command, *arguments])), check=False, cwd=ROOT, capture_output=True, text=True,
                          env={**environment, "XDG_CACHE_HOME": str(cache)}, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\none process, no cluster found: training alone on this machine's devices\n" in done.stdout
    assert "accuracy" in done.stdout
