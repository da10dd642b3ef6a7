"""The interface through which a run uses its workers, whether Ray or an MPI launcher started their processes."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypedDict

from rayllp.checkpoint.states import StateLayout
from rayllp.config import TrainConfig
from rayllp.data import Batches
from rayllp.engine import StepStats
from rayllp.timeline import TimedStep
from rayllp.training.inputs import Network


class WorkerShare(TypedDict):
    """A worker's share of the network, as `BlockWorker.build` describes it.

    Attributes:
        rank: rank of the worker.
        pid: its process id.
        layers: numbers of the layers that it has.
        parameters: number of parameters that it has.
        network: the network's transformers configuration, if it has one; None on all ranks but 0.
        layout: layout of the worker's state.
        sources: names of the parameters that the state is made of when layers are redistributed.
    """

    rank: int
    pid: int
    layers: list[int]
    parameters: int
    network: dict[str, Any] | None
    layout: StateLayout
    sources: set[str]


@dataclass(frozen=True)
class StepReport:
    """What a worker reports of a training step.

    Attributes:
        stats: what the step did.
        timed: its timeline, if that was recorded.
        peak_memory: bytes in memory at most so far, resident and on the GPU, if the timeline was recorded.
        trace: its trace by torch.profiler, if the settings ask for that.
    """

    stats: StepStats
    timed: TimedStep | None = None
    peak_memory: tuple[int, int | None] | None = None
    trace: bytes | None = None

    @property
    def is_finite(self) -> bool:
        """True if loss and gradient are finite. If not, the weights have not been changed."""
        return self.stats.is_finite


class WorkerGroup(ABC):
    """All workers of a run. Calls go to all of them at once.

    Attributes:
        config: settings of the network whose layers the workers have.
        device: "cpu" or "cuda".
    """

    config: TrainConfig
    device: str

    @property
    @abstractmethod
    def is_started(self) -> bool:
        """True from `start`, if it succeeded, until the processes end."""

    @abstractmethod
    def start(self, config: TrainConfig, network: Network, batches: Batches) -> list[WorkerShare]:
        """Start and connect all workers, and have each build its layers.

        Args:
            config: the settings, with the number of workers that the group was made for.
            network: the network that they build, at the depth of `config`.
            batches: the data set; it is loaded once, by the driver.

        Returns: each worker's share of the network, by rank.

        Raises:
            ClusterError: the resources did not become available, or a worker failed to start.
        """

    @abstractmethod
    def rebuild(self, config: TrainConfig, network: Network) -> list[WorkerShare]:
        """Replace the layers of all workers by those of other settings, which have the same number of workers.

        The network and the result are as for `start`.
        """

    @abstractmethod
    def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        """Call `method` of `BlockWorker` on all workers and wait for all; return their answers by rank.

        Args:
            timeout_s: how long the call may take; None: without limit.

        Raises:
            RayllpError: a worker raised it.
            WorkerLostError: workers died.
            ClusterError: a worker raised another error, or did not answer within the limit.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Release the workers and their resources, unless they are kept for another run."""


class ElasticGroup(WorkerGroup):
    """Workers that survive the loss of others, and whose number can change while they train."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of workers, including lost ones that have not been replaced yet."""

    @property
    @abstractmethod
    def keeps_processes(self) -> bool:
        """True if existing processes can be connected again. If not, every loss or change of size needs new processes for all workers."""

    @abstractmethod
    def dismiss(self) -> None:
        """End all processes. `start` makes new ones."""

    # After a loss ---------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def replace(self, lost: Collection[int]) -> None:
        """Start new workers in place of lost ones and connect all workers again.

        The others keep their layers and the states in their memory. The new ones have no state until `restore_from_memory`.

        Raises:
            WorkerLostError: more workers were lost meanwhile.
            ClusterError: the resources of the lost workers did not become available again.
        """

    @abstractmethod
    def keep_spares(self) -> None:
        """Start a spare process on each node that has workers but no spare, if the settings ask for spares. Does not wait for them."""

    @abstractmethod
    def steps_done(self, lost: Collection[int]) -> int:
        """Return the largest number of steps that any survivor has done."""

    @abstractmethod
    def step_reports(self, lost: Collection[int], start: int, stop: int) -> list[list[StepReport]]:
        """Return each survivor's reports of the steps in [start, stop), as far as it remembers them."""

    @abstractmethod
    def restore_from_memory(self, lost: frozenset[int]) -> int | None:
        """Take all workers back to the last step whose state every block has in memory somewhere.

        Args:
            lost: ranks of new workers, which get their state from a replica or from another worker that holds a copy.

        Returns: that step; None if there is none, and then nothing has changed.
        """

    @abstractmethod
    def common_step(self, lost: frozenset[int]) -> int | None:
        """Return the last step at which the states of all blocks are held in memory; None if there is none."""

    # Another number of workers ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def count_available_workers(self, lost: frozenset[int]) -> int:
        """Return how many workers can go on at once: survivors, and lost ones whose bundle is still on a live node."""

    @abstractmethod
    def draining_ranks(self) -> tuple[frozenset[int], float]:
        """Return the ranks of workers on nodes that are about to shut down, and the seconds left until the first of them does."""

    @abstractmethod
    def start_standbys(self, most: int) -> None:
        """Start standby workers where the cluster has room, so that there are up to `most` workers with the active ones. Does not wait."""

    @abstractmethod
    def count_standbys(self) -> int:
        """Return how many standby workers are ready."""

    @property
    @abstractmethod
    def is_halfway(self) -> bool:
        """True if workers were lost while layers were being redistributed; calling `reshape` again continues from there."""

    @abstractmethod
    def reshape(
        self, config: TrainConfig, lost: frozenset[int], network: Network, leaving: frozenset[int] = frozenset()
    ) -> list[WorkerShare]:
        """Redistribute the layers among `config.world` workers: survivors, standby workers that are ready, then new ones.

        The blocks then have the state of `common_step`; if that is None, they are newly initialised.

        Args:
            config: settings with the new number of workers.
            lost: ranks of lost workers.
            network: as for `start`.
            leaving: ranks of workers that hand over their states and get no layers.

        Returns: each worker's share, as `start` does.
        """
