"""The Ray actor that owns a block of layers. It is called once a chunk of steps, never once a sweep."""

import gc
import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rayllp.channel.torch_dist import TorchChannel
from rayllp.checkpoint import Prolongation, load_pieces, write_pieces
from rayllp.config import TrainConfig
from rayllp.control import Accuracy, ProbePlan
from rayllp.data import Batches
from rayllp.engine import Engine
from rayllp.engine.decode import continue_text, translate
from rayllp.models import FAMILIES, Architecture, build_architecture


@dataclass(frozen=True)
class Plan:
    """What a worker needs besides settings and data to build a model that settings name.

    Attributes:
        families: where adapters are, those that the user's program registered among them.
        kept: transformers' configuration of a run that goes on.
    """

    families: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Any] | None = None


class BlockWorker:
    """One worker: replica `rank // P`, block `rank % P` of the layers."""

    def __init__(self, rank: int, config: TrainConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self.rank, self.config = rank, config
        self.engine: Engine | None = None
        self._listener: socket.socket | None = None
        self._mesh: DeviceMesh | None = None

    def place(self) -> tuple[str, str]:
        """The node this worker is on, and its address."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def listen(self, host: str) -> int:
        """Open the rendezvous port on `host`'s interface alone; the port."""
        self._listener = socket.create_server((host, 0))
        return int(self._listener.getsockname()[1])

    def connect(self, host: str, port: int, backend: str) -> None:
        """Join the process group."""
        config, timeout = self.config, timedelta(seconds=self.config.receive_timeout_s)
        if host == "127.0.0.1":  # all workers on this machine: keep their traffic off the network
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        if self._listener is not None:
            store = TCPStore(host, port, config.world, True, timeout, master_listen_fd=self._listener.detach())
        else:
            store = TCPStore(host, port, config.world, False, timeout)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=config.world, timeout=timeout)

    def build(self, architecture: Architecture | None, batches: Batches, device: str, plan: Plan) -> dict[str, Any]:
        """Make this worker's layers; its share of the model, in words and numbers."""
        config = self.config
        FAMILIES.update(plan.families)
        if self._mesh is None:
            self._mesh = init_device_mesh(device, (config.mesh.data, config.layer_workers), mesh_dim_names=("data", "layer"))
        mesh = self._mesh
        where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
        if architecture is None:
            facts = batches.facts  # type: ignore[attr-defined]  # a data set of ours, where the model is named by settings
            architecture = build_architecture(config, facts, plan.kept)
        layer = TorchChannel(mesh.get_group("layer"), config.receive_timeout_s)
        data = TorchChannel(mesh.get_group("data"), config.receive_timeout_s)
        self.engine = Engine(architecture, config, batches, layer, data, where)
        parameters = sum(p.numel() for p in self.engine.block.parameters.values())
        return {"rank": self.rank, "layers": sorted(self.engine.block.layers), "parameters": parameters, "pid": os.getpid()}

    def reconfigure(self, config: TrainConfig) -> None:
        """Give up this worker's layers; those that `build` makes next are of other settings, with the same mesh."""
        self.config, self.engine = config, None
        gc.collect()  # two networks at once may not fit, and an engine and its parts refer to each other

    def run(self, steps: list[tuple[int, Accuracy, ProbePlan | None]]) -> list[dict[str, Any]]:
        """A chunk of training steps; ends early after a step whose loss or gradient is not finite."""
        stats = []
        for step, accuracy, plan in steps:
            done = self._engine.train_step(step, accuracy, plan)
            stats.append(done.as_dict())
            if done.fault is not None or not _is_finite(done.loss, done.grad_norm):
                break
        return stats

    def evaluate(self, batches: int) -> dict[str, float]:
        """Held-out loss and metrics, exact forward."""
        return self._engine.evaluate(batches)

    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """A continuation of `prompt`, exact forward."""
        return continue_text(self._engine, prompt, tokens)

    def translate(self, sentences: int, beams: int, batch: int = 50) -> list[str]:
        """Translations of the first held-out sentences, exact forward."""
        data = self._engine.batches
        sources = data.encode_source(data.sources("validation")[:sentences])  # type: ignore[attr-defined]
        found = [tokens for part in sources.split(batch) for tokens in translate(self._engine, part, beams)]
        return [data.decode(tokens) for tokens in found]  # type: ignore[attr-defined]

    def save(self, folder: str) -> dict[str, dict[str, Any]]:
        """Write this worker's pieces of a checkpoint."""
        return write_pieces(self._engine, Path(folder))

    def load(self, folder: str, prolongation: Prolongation | None = None) -> None:
        """Load this worker's pieces of a checkpoint; with a prolongation, of a shallower network's."""
        load_pieces(self._engine, Path(folder), prolongation)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Copies of this worker's parameters by full name."""
        return {name: p.detach().cpu().clone() for name, p in self._engine.block.parameters.items()}

    def set_parameter(self, name: str, value: torch.Tensor) -> bool:
        """Overwrite one parameter, if it is this worker's."""
        parameter = self._engine.block.parameters.get(name)
        if parameter is not None:
            parameter.data.copy_(value)
        return parameter is not None

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None, "build() comes first"
        return self.engine


def _is_finite(*values: float) -> bool:
    return all(abs(value) < float("inf") for value in values)
