"""Orbax checkpoints of a run: the newest few, written in the background, restored onto whatever devices there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxsft.state import TrainState


class Checkpoints:
    """WORKDIR/checkpoints/STEP/: the TrainState, and a JSON record of the host's share of the run."""

    def __init__(self, workdir: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").resolve(), options=options)

    def latest_step(self) -> int | None:
        """The newest step on disk, None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, host: dict[str, Any]) -> None:
        """Start writing `state` under `step`; it appears whole or not at all. A step that is there stays as it is."""
        if step != self.latest_step():
            arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
            self._manager.save(step, args=arguments)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of `step` with the shapes, dtypes and shardings of `like`, and the host's record."""
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target), host=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=arguments)
        return restored["state"], restored["host"]

    def restore_variables(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """What `TrainState.evaluated` was at `step`, on one device: variables shaped as `like`."""
        saved = self._manager.item_metadata(step)["state"]
        average = saved["average"] is not None
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeRestore({"average": target} if average else target, partial_restore=True)
        )
        restored = self._manager.restore(step, args=arguments)["state"]
        return restored["average"] if average else restored

    def wait(self) -> None:
        """Wait until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until all is written."""
        self.wait()
        self._manager.close()
