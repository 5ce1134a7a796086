"""A study of Optuna's in study.db: trials proposed by its TPE sampler, ended early by its median pruner.

Several processes of one machine may work on one study. A trial is begun under a lock, with the process that has it
written down, so that the trial of a process that was killed is known, and no other is lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxsft import cli, storage
from jaxsft.buckets import BucketPath
from jaxsft.cli import UserError
from jaxsft.run.lease import Lease, is_alive, this_process
from jaxsft.storage import Location
from jaxsft.tune.space import CHOICE, Dimension

if TYPE_CHECKING:
    import optuna

DATABASE, LOCK = "study.db", "study.lock"
FIRST = 5  # trials that run to their end before any is pruned
BUSY = 100.0  # seconds that a process waits for another one's writing
BEAT, SILENT = 30.0, 600.0  # seconds: how often a trial says that it lives, and how long one elsewhere may be silent
OWNER, REASON, LOST = "owner", "reason", "lost"  # what is noted of a trial
SEEN = "seen"  # of its owner: when it last said that it lives, of time.time()


class Study:
    """Optuna's study in a folder of this machine, which several processes may share."""

    def __init__(self, folder: Path, dimensions: tuple[Dimension, ...], seed: int):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._lock, self._seed = folder / LOCK, seed
        self._me, self._beaten = this_process(), time.monotonic()
        self._distributions = {one.key: distribution(one) for one in dimensions}
        with self._alone():
            try:
                kept = optuna.storages.RDBStorage(
                    f"sqlite:///{folder.absolute() / DATABASE}", engine_kwargs={"connect_args": {"timeout": BUSY}}
                )
                self.study = optuna.create_study(
                    storage=kept,
                    study_name="jaxsft",
                    direction="maximize",
                    load_if_exists=True,
                    pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST),
                )
            except Exception as error:  # of SQLite, SQLAlchemy or Optuna
                what = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{folder / DATABASE} can't be used: {what}", "remove it, or give another --workdir"
                ) from None

    def begin(self, most: int) -> optuna.Trial | None:
        """A new trial, ours; None where there are `most`, the lost ones not counted. Says which are found lost."""
        import optuna

        with self._alone():
            self._find_lost()
            known = self.study.get_trials(deepcopy=False)
            if sum(LOST not in trial.user_attrs for trial in known) >= most:
                return None
            # A function of the seed and the number, so that a search that was interrupted proposes what it would have.
            number = zlib.crc32(f"{self._seed} {len(known)}".encode())
            self.study.sampler = optuna.samplers.TPESampler(seed=number, constant_liar=True)
            trial = self.study.ask(self._distributions)
            trial.set_user_attr(OWNER, {**self._me, SEEN: time.time()})
            return trial

    def beat(self, trial: optuna.Trial) -> None:
        """Note now and then that a trial lives, for processes of other machines."""
        if time.monotonic() - self._beaten > BEAT:
            self._beaten = time.monotonic()
            trial.set_user_attr(OWNER, {**self._me, SEEN: time.time()})

    def complete(self, trial: optuna.Trial, value: float) -> None:
        """The trial has come to its end."""
        self.study.tell(trial, value)

    def prune(self, trial: optuna.Trial) -> None:
        """The trial was ended early; its value is the last that it reported."""
        import optuna

        self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)

    def fail(self, trial: optuna.Trial, reason: str) -> None:
        """The trial could not be."""
        import optuna

        trial.set_user_attr(REASON, cli.printable(" ".join(reason.split())))
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def lose(self, number: int, reason: str) -> None:
        """The process of a trial has ended, and the trial with it: another will take its place."""
        import optuna

        (kept,) = [trial for trial in self.study.get_trials(deepcopy=False) if trial.number == number]
        storage_ = self.study._storage
        storage_.set_trial_user_attr(kept._trial_id, LOST, True)
        storage_.set_trial_user_attr(kept._trial_id, REASON, reason)
        self.study.tell(number, state=optuna.trial.TrialState.FAIL)

    def _find_lost(self) -> None:
        """Mark the running trials whose process is known to have ended. The lock is ours: none is just beginning."""
        import optuna

        for trial in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            owner = trial.user_attrs.get(OWNER, {})
            lives = is_alive(owner) if owner else False
            if lives is None:
                lives = time.time() - owner.get(SEEN, 0.0) < SILENT
            if not lives:
                self.lose(trial.number, "its process ended")
                cli.warn(f"trial {trial.number} was lost: its process ended")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While this lasts no other process of this machine begins a trial."""
        with self._lock.open("a") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def distribution(one: Dimension) -> Any:
    """A dimension as Optuna has it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if one.kind == CHOICE:
        return CategoricalDistribution([one.stored(value) for value in one.values])
    low, high = one.values
    kind = IntDistribution if isinstance(low, int) else FloatDistribution
    return kind(low, high, log=one.kind == "log")


@contextlib.contextmanager
def home(workdir: Location) -> Iterator[tuple[Path, Callable[[], None]]]:
    """The folder of this machine that has study.db, and a function that sends it to a workdir that is elsewhere.

    A workdir in a bucket is ours alone meanwhile: processes of several machines can't share a file there.

    Raises:
      UserError: it can't be written, or in a bucket another process has it.
    """
    if isinstance(workdir, BucketPath):
        with tempfile.TemporaryDirectory(prefix="jaxsft-") as folder, Lease(workdir) as lease:
            database = Path(folder) / DATABASE
            if (workdir / DATABASE).exists():
                (workdir / DATABASE).download(database)

            def send() -> None:
                lease.check()
                storage.write_file(workdir / DATABASE, database.read_bytes())

            yield Path(folder), send
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workdir} can't be written: {error.strerror}", "give another --workdir") from None
    yield workdir, lambda: None
