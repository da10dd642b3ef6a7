"""What a run asks of its workers, whatever starts their processes."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

from rayllp.config import TrainConfig
from rayllp.data import Batches
from rayllp.models import Architecture


class WorkerGroup(ABC):
    """All workers of one run, and calls to all at once.

    Attributes:
        config: settings of the network whose layers they have, or will have after `start`.
        device: cpu or cuda.
    """

    config: TrainConfig
    device: str

    @abstractmethod
    def start(self, architecture: Architecture | None, batches: Batches, kept: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Create, connect and build all workers; what each says of itself.

        Args:
            architecture: a LayerStack of the user's; None: what the settings name.
            batches: the data set, loaded once.
            kept: transformers' configuration of a run that goes on.

        Raises:
            ClusterError: the resources did not come free, or a worker failed to start.
        """

    @abstractmethod
    def rebuild(self, config: TrainConfig, architecture: Architecture | None, kept: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Give the workers the layers of other settings, which want as many workers, and drop those they have; else as `start`."""

    @abstractmethod
    def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        """Call `method` of `BlockWorker` on all workers and wait; their answers by rank.

        Raises:
            RayllpError: what a worker raised on purpose.
            WorkerLostError: workers died.
            ClusterError: a worker failed otherwise, or did not answer within the limit.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Let the workers go, and give the resources back, if they are not to stay for another run."""


class ElasticGroup(WorkerGroup):
    """Workers that outlive each other's loss, and whose number may change while they train."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Workers there are, those that were lost and not yet replaced among them."""

    @property
    @abstractmethod
    def keeps_processes(self) -> bool:
        """Whether workers can be connected anew. If not, all give up their layers to new processes when one is lost, or comes."""

    @abstractmethod
    def dismiss(self) -> None:
        """End all processes; `start` makes new ones."""

    # After a loss ---------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def replace(self, lost: Collection[int]) -> None:
        """New workers in place of lost ones, all connected anew. The others keep their layers and the states in their memory.

        Raises:
            WorkerLostError: more were lost meanwhile.
            ClusterError: the resources of the lost did not come back.
        """

    @abstractmethod
    def keep_spares(self) -> None:
        """Begin to start a spare on each node that has workers and no spare, where the settings want that. Waits for nothing."""

    @abstractmethod
    def reached(self, lost: Collection[int]) -> int:
        """Steps that some survivor has done."""

    @abstractmethod
    def report(self, lost: Collection[int], start: int, stop: int) -> list[list[dict[str, Any]]]:
        """What the steps from `start` up to `stop` did, as each survivor tells it."""

    @abstractmethod
    def roll_back(self, lost: frozenset[int]) -> int | None:
        """All blocks back to the last step that is held in memory everywhere; that step, or None where there is none.

        Args:
            lost: ranks whose workers are new, and get their state from a replica or from the next worker.
        """

    @abstractmethod
    def common_step(self, lost: frozenset[int]) -> int | None:
        """The last step that the states of all blocks are held of; None: there is none."""

    # Another number of workers ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def places(self, lost: frozenset[int]) -> int:
        """Workers that can go on at once: the survivors, and those whose place in the cluster outlived them."""

    @abstractmethod
    def leaving(self) -> tuple[frozenset[int], float]:
        """Ranks of workers on nodes that were told to go, and the seconds that the first of these has left."""

    @abstractmethod
    def start_standbys(self, most: int) -> None:
        """Begin to start workers, where the cluster has room, so that there are `most` with those at work. Waits for nothing."""

    @abstractmethod
    def count_standbys(self) -> int:
        """Standbys that are there."""

    @property
    @abstractmethod
    def is_halfway(self) -> bool:
        """Whether layers are between two ways of sharing them out, because workers were lost meanwhile: `reshape` goes on with that."""

    @abstractmethod
    def reshape(
        self,
        config: TrainConfig,
        lost: frozenset[int],
        architecture: Architecture | None,
        kept: dict[str, Any] | None,
        leaving: frozenset[int] = frozenset(),
    ) -> list[dict[str, Any]]:
        """Share the layers out anew, among as many workers as `config` says: survivors, standbys that are there, new ones for lost ones.

        Blocks are then at `common_step`, new ones if that is None.

        Args:
            leaving: workers that give their states, and get no layers.

        Returns: what each worker says of itself.
        """
