"""The only file that knows pmap, shard_map, meshes and processes.

The state is one un-stacked, fully replicated pytree; batches are split along their first axis. Both back ends run the
same body: `jax.pmap` with `in_axes` / `out_axes` None for what is replicated, or `jax.jit(jax.shard_map(...))`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxsft import cli
from jaxsft.cli import UserError
from jaxsft.data.threads import cores
from jaxsft.models.platform import for_platform
from jaxsft.models.precision import DEFAULT, with_products

AXIS = "batch"
MOST_CORES = 16  # as devices: each has the whole state
IN_FLIGHT = 2  # calls dispatched beyond the one that is waited for: enough to keep a device busy
IMAGES_A_CORE = 4  # at least: each core also updates all parameters; where that ceases to pay was not measured


class BoundedDispatch:
    """A compiled function of which at most IN_FLIGHT calls run ahead of the host, counted over all such functions.

    The host may not run ahead without end. XLA:CPU executes for all devices on one pool of as many threads as there
    are cores or devices; once 32 computations of a device are in flight, the launch of the next keeps its thread until
    one ends. If that one waits in a collective for another device, whose half has no thread left to start on, all wait
    for ever, and XLA ends the process after a minute ("Termination timeout for all reduce"). A few calls never come
    near the 32, so no launch ever waits. The pool is the process's, and so is the count.
    """

    _dispatched: ClassVar[collections.deque[Any]] = collections.deque()

    def __init__(self, function: Any, donates: bool):
        """`function` is jitted or pmapped; with `donates` its first output goes to the next call, unawaited."""
        self._function, self._donates = function, donates
        self.lower = function.lower
        self._compilation: threading.Thread | None = None

    def compile_ahead(self, *args: Any) -> None:
        """Trace the function for such arguments, and compile it in a thread, for which the next call waits.

        What fails there is done again by the call, and raises. A process that ends does not wait (see `cli.run`).
        """
        lowered = self._function.lower(*args)

        def compile_it() -> None:
            with contextlib.suppress(Exception):
                lowered.compile()

        self._compilation = threading.Thread(target=compile_it, name=cli.DEAF, daemon=True)
        self._compilation.start()

    def __call__(self, *args: Any) -> Any:
        if self._compilation is not None:
            self._compilation.join()
            self._compilation = None
        result = self._function(*args)
        self._dispatched.append(result[1:] if self._donates else result)
        while len(self._dispatched) > IN_FLIGHT:
            jax.block_until_ready(self._dispatched.popleft())
        return result


@functools.cache
def cores_are_devices() -> bool:
    """Make each core of the CPU a JAX device, and whether that was done: not where the user says how many there are.

    XLA:CPU divides one operation after the other between its threads, and used 1.6 of two cores in a train step (a
    convolution to 64 channels runs in one thread, whatever there are). Devices divide the batch once, for all of them.
    Has an effect only before JAX first looks for devices; other kinds of devices are left as they are.
    """
    said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if said or jax.config.values["jax_num_cpu_devices"] > 0 or jax.distributed.is_initialized():
        return False
    try:
        jax.config.update("jax_num_cpu_devices", min(cores(), MOST_CORES))
    except RuntimeError:  # too late
        return False
    return True


def all_devices(config: ConfigDict) -> DataParallel:
    """What a run of `config` computes on: all devices, or as many cores of a CPU as its batches split over."""
    are_cores = cores_are_devices() and jax.devices()[0].platform == "cpu"
    devices = jax.devices()
    if are_cores:
        rows = config.data.batch_size // config.optim.accumulate
        most = min(len(devices), rows // IMAGES_A_CORE) if config.data.last_batch == "drop" else 1
        devices = devices[: max((n for n in range(1, most + 1) if rows % n == 0), default=1)]
    return DataParallel(config.parallel.backend, devices, are_cores, config.train.matmul_precision)


class DataParallel:
    """The devices of a run, and how a step body runs on them."""

    def __init__(
        self, backend: str = "pmap", devices: Any = None, are_cores: bool = False, matmul_precision: str = DEFAULT
    ):
        """With `are_cores` the devices are the cores of one CPU: one device to whom only the numbers matter.

        `matmul_precision` is that of the float32 products of all that is compiled for them: train.matmul_precision.
        """
        self.backend, self.matmul_precision = backend, matmul_precision
        self.devices = list(jax.devices() if devices is None else devices)
        self.are_cores = are_cores
        self.mesh = Mesh(np.array(self.devices), (AXIS,))
        # One device needs no collectives: the same body without them is the same step, compiled simpler.
        self.axis_name = AXIS if len(self.devices) > 1 else None

        self.process_count = len({device.process_index for device in self.devices})

    def __str__(self) -> str:
        kind = "cpu core" if self.are_cores else self.devices[0].device_kind
        processes = f" in {self.process_count} processes" if self.process_count > 1 else ""
        return f"{len(self.devices)} x {kind}{processes}, {self.backend}"

    def statistics_axis(self, batch_norm: str) -> str | None:
        """The axis over which batch norm takes its statistics: `batch_norm` is 'local' (None) or 'sync' (all devices).

        The cores of a CPU share theirs in any case: to torch, too, they are one device.
        """
        return self.axis_name if batch_norm == "sync" or self.are_cores else None

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes."""
        return jax.process_index() == 0

    @property
    def share(self) -> tuple[int, int]:
        """(this process, number of processes): it owns one of as many equal runs of the rows of a batch."""
        return jax.process_index(), self.process_count

    def check_batch(self, batch_size: int, accumulate: int = 1, what: str = "config.data.batch_size") -> None:
        """Raise a UserError when the global batch does not split evenly."""
        count = len(self.devices) * accumulate
        if batch_size % count:
            parts = f"{len(self.devices)} devices" + (f" x {accumulate} micro-batches" if accumulate > 1 else "")
            raise UserError(
                f"{what} {batch_size} is not divisible by {parts}",
                f"take {max(batch_size // count, 1) * count}",
            )

    def replicate(self, tree: Any) -> Any:
        """A copy of every leaf on every device; all processes hold the same values."""
        return self._put(tree, PartitionSpec())

    def split(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Host arrays [B, ...] on the devices, B / devices each, in the shape the back end wants.

        Every process names the whole batch and moves only the rows of its own devices.
        """
        if self.backend == "pmap":
            batch = {k: v.reshape(len(self.devices), -1, *v.shape[1:]) for k, v in batch.items()}
        return self._put(batch, PartitionSpec(AXIS))

    def any(self, flag: bool) -> jax.Array:
        """Whether `flag` holds in any process: a bool scalar on the devices, still on its way."""
        return self._any(self._put(np.full(len(self.devices), flag), PartitionSpec(AXIS)))

    @functools.cached_property
    def _any(self) -> Callable[[jax.Array], jax.Array]:
        return jax.jit(jnp.any, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def _put(self, tree: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(self.mesh, spec)
        if self.process_count == 1:
            return jax.device_put(tree, sharding)

        def place(leaf: Any) -> jax.Array:
            whole = np.asarray(jax.device_get(leaf))
            shares = sharding.addressable_devices_indices_map(whole.shape)
            pieces = [jax.device_put(whole[index], device) for device, index in shares.items()]
            return jax.make_array_from_single_device_arrays(whole.shape, sharding, pieces)

        return jax.tree.map(place, tree)

    def compile(self, body: Callable[..., Any], *, donate_first: bool = False, rows: bool = False) -> BoundedDispatch:
        """`body(replicated, replicated dataset, split batch)` on all devices; what it returns must be replicated.

        With `rows` it is of the rows of its batch, [B / devices, ...], and no device waits for another: `join` puts
        them together. With `donate_first` the memory of the first argument is given to the first of the results. The
        host waits in a call while more than IN_FLIGHT earlier ones are on their way (see `BoundedDispatch`).
        """
        donate = (0,) if donate_first else ()
        body = for_platform(with_products(body, self.matmul_precision), self.devices[0].platform)
        if rows and self.process_count > 1:  # each process wants them all
            body, rows = of_all_devices(body), False
        if self.backend == "pmap":
            out = 0 if rows else None
            mapped = jax.pmap(
                body, AXIS, in_axes=(None, None, 0), out_axes=out, donate_argnums=donate, devices=self.devices
            )
            return BoundedDispatch(mapped, donate_first)
        everywhere, split = PartitionSpec(), PartitionSpec(AXIS)
        # check_vma off: the body averages gradients itself, exactly as under pmap.
        mapped = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(everywhere, everywhere, split),
            out_specs=split if rows else everywhere,
            check_vma=False,
        )
        return BoundedDispatch(jax.jit(mapped, donate_argnums=donate), donate_first)

    def join(self, found: Any) -> Any:
        """What a function compiled for `rows` returned, on the host: each leaf [B, ...], in the order of its batch."""
        found = jax.device_get(found)
        if self.backend != "pmap" or self.process_count > 1:
            return found
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def of_all_devices(body: Callable[..., Any]) -> Callable[..., Any]:
    """`body`, which returns something of each row of its device's, and then of the rows of all devices."""
    return lambda *args: jax.lax.all_gather(body(*args), AXIS, tiled=True)
