"""A process manager for MPI, by which processes that something else has started (Ray's actors) become one MPI world.

It speaks PMI-1, the wire protocol by which MPICH and its kin (Intel MPI, MVAPICH, Cray MPICH) learn their ranks and each other's addresses:
lines of text over TCP, of which an MPI library uses ten kinds. MPI itself does not notice that a process is lost: a receive from it waits
for ever. So each worker also keeps a connection to the manager, its lifeline. The manager closes all of them as soon as one process is
gone.

A process is let in only with its own secret key. Once all are in, the manager accepts no more connections.
"""

import fcntl
import os
import secrets
import selectors
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby

KEY_BITS = 31
"""Length of a key in bits: PMI-1 passes the key as a C int."""
LONGEST_LINE = 65536
"""The longest line, in bytes, that a client may send."""


@dataclass(frozen=True)
class Rendezvous:
    """Address of the process manager, and the key of each rank."""

    host: str
    port: int
    keys: tuple[int, ...]

    def environment(self, rank: int) -> dict[str, str]:
        """Return the environment variables by which an MPI library finds the manager."""
        return {"PMI_PORT": f"{self.host}:{self.port}", "PMI_ID": str(self.keys[rank])}


@dataclass(eq=False)
class _Client:
    """A connection to the manager: an MPI library's, or a lifeline."""

    connection: socket.socket
    rank: int | None = None
    lifeline: bool = False
    ended: bool = False  # whether the library has finalised, so that the end of the connection is no loss
    unread: bytes = b""


@dataclass
class ProcessManager:
    """Serves the processes of one MPI world in a thread of its own, until it is closed or a process is lost.

    Args:
        host: the only address to listen on.
        nodes: the node of each rank. Ranks on the same node share memory.

    Attributes:
        rendezvous: what a process needs to join.
    """

    host: str
    nodes: Sequence[object]
    rendezvous: Rendezvous = field(init=False)

    def __post_init__(self) -> None:
        self._listener = socket.create_server((self.host, 0))
        keys = tuple(secrets.randbits(KEY_BITS) for _ in self.nodes)
        self.rendezvous = Rendezvous(self.host, int(self._listener.getsockname()[1]), keys)
        self._name = f"rayllp_{secrets.token_hex(8)}"  # MPICH derives the name of its shared memory from it
        self._clients: list[_Client] = []
        self._waiting: list[_Client] = []  # clients that have reached the barrier
        self._values = {"PMI_process_mapping": _mapping(self.nodes)}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="process manager", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving. All lifelines end."""
        with suppress(OSError):
            self._wake.send(b"x")
        self._thread.join(5)

    # The serving thread ---------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Accept connections and answer requests, until the manager is closed or a process is lost. All connections are closed then."""
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj is self._woken:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif not self._hear(key.data):
                        return
        finally:
            for each in (*(client.connection for client in self._clients), self._listener, self._woken, self._wake):
                each.close()
            self._selector.close()

    def _accept(self) -> None:
        """Accept one connection."""
        try:
            connection, _ = self._listener.accept()
        except OSError:  # the listener has just been closed, or the client has gone again
            return
        connection.settimeout(10)
        client = _Client(connection)
        self._clients.append(client)
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _hear(self, client: _Client) -> bool:
        """Read and answer what a client has sent. Returns False if a process of the world is gone."""
        try:
            heard = client.connection.recv(4096)
        except OSError:
            heard = b""
        if not heard or len(client.unread) > LONGEST_LINE:
            return self._end(client)
        *lines, client.unread = (client.unread + heard).split(b"\n")
        try:
            for line in lines:
                self._answer(client, line.decode())
        except (OSError, ValueError, KeyError, IndexError):  # a malformed message, or a broken connection
            return self._end(client)
        return True

    def _end(self, client: _Client) -> bool:
        """Drop a connection. Returns False if that means that a process of the world is gone."""
        self._clients.remove(client)
        with suppress(KeyError, ValueError):
            self._selector.unregister(client.connection)
        client.connection.close()
        return client.rank is None or client.ended

    def _answer(self, client: _Client, line: str) -> None:
        """Answer one line of PMI-1.

        Raises:
            ValueError: the client has not shown its key, or the rank has joined before.
            KeyError: the command, or an argument of it, is unknown.
        """
        words = dict(part.split("=", 1) for part in line.split(" ") if "=" in part)
        command = words["cmd"]
        if command in ("initack", "lifeline"):
            self._enter(client, int(words["pmiid"]), lifeline=command == "lifeline")
        elif client.rank is None:
            raise ValueError(f"{command} before a key was shown")
        elif command == "put":
            self._values[words["key"]] = line.split(" value=", 1)[1]
            _say(client, "cmd=put_result rc=0 msg=success")
        elif command == "get":
            value = self._values.get(words["key"])
            found = "rc=-1 msg=key_not_found value=unknown" if value is None else f"rc=0 msg=success value={value}"
            _say(client, f"cmd=get_result {found}")
        elif command == "barrier_in":
            self._waiting.append(client)
            if len(self._waiting) == len(self.nodes):
                waiting, self._waiting = self._waiting, []
                for each in waiting:
                    _say(each, "cmd=barrier_out rc=0")
        elif command == "finalize":
            client.ended = True
            _say(client, "cmd=finalize_ack rc=0")
        else:
            _say(client, self._constants[command])

    @property
    def _constants(self) -> dict[str, str]:
        """Answers that are the same for all processes, by command."""
        return {
            "init": "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0",
            "get_maxes": "cmd=maxes kvsname_max=256 keylen_max=64 vallen_max=4096 rc=0",
            "get_appnum": "cmd=appnum appnum=0 rc=0",
            "get_universe_size": f"cmd=universe_size size={len(self.nodes)} rc=0",
            "get_my_kvsname": f"cmd=my_kvsname kvsname={self._name} rc=0",
        }

    def _enter(self, client: _Client, key: int, *, lifeline: bool) -> None:
        """Let a client in with its key. The listener is closed once all libraries and all lifelines are connected."""
        rank = self.rendezvous.keys.index(key)
        if client.rank is not None or any(each.rank == rank and each.lifeline == lifeline for each in self._clients):
            raise ValueError("this rank is there already")
        client.rank, client.lifeline = rank, lifeline
        if not lifeline:
            for answer in ("cmd=initack rc=0", f"cmd=set size={len(self.nodes)}", f"cmd=set rank={rank}", "cmd=set debug=0"):
                _say(client, answer)
        if sum(each.rank is not None for each in self._clients) == 2 * len(self.nodes):
            self._selector.unregister(self._listener)
            self._listener.close()


def _say(client: _Client, text: str) -> None:
    client.connection.sendall(text.encode() + b"\n")


def _mapping(nodes: Sequence[object]) -> str:
    """Return which ranks share a node, in MPICH's notation: blocks of (first node, number of nodes, ranks on each)."""
    number = {node: n for n, node in enumerate(dict.fromkeys(nodes))}
    blocks = [f"({number[node]},1,{len(list(ranks))})" for node, ranks in groupby(nodes)]
    return f"(vector,{','.join(blocks)})"


class Lifeline:
    """A worker's connection to the process manager, which lasts as long as all workers live.

    Raises:
        OSError: the manager cannot be reached.
    """

    def __init__(self, rendezvous: Rendezvous, rank: int, timeout_s: float) -> None:
        self._connection = socket.create_connection((rendezvous.host, rendezvous.port), timeout_s)
        self._connection.sendall(f"cmd=lifeline pmiid={rendezvous.keys[rank]}\n".encode())
        self._connection.setblocking(False)

    def holds(self) -> bool:
        """Return True if every worker is still there, as far as this one knows."""
        try:
            return self._connection.recv(1) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    @contextmanager
    def fatal(self) -> Iterator[None]:
        """Within this context, the loss of a worker ends this process at once: for calls to MPI that nothing else can interrupt.

        The process is ended by a signal (SIGIO, whose default action is that), since such calls may hold the GIL.
        """
        flags = fcntl.fcntl(self._connection, fcntl.F_GETFL)
        fcntl.fcntl(self._connection, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._connection, fcntl.F_SETFL, flags | os.O_ASYNC)
        try:
            if not self.holds():
                os.kill(os.getpid(), signal.SIGIO)
            yield
        finally:
            fcntl.fcntl(self._connection, fcntl.F_SETFL, flags)

    def cut(self) -> None:
        """Leave the group: the lifelines of all other workers end, too."""
        self._connection.close()
