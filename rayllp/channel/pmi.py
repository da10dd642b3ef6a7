"""A process manager for MPI: it lets processes that something else has started (Ray's actors) form one MPI world.

It speaks PMI-1, the wire protocol by which MPICH and its kin (Intel MPI, MVAPICH, Cray MPICH) learn their ranks and each other's addresses:
lines of text over TCP, of which an MPI library uses ten kinds. (MPI's own way for such processes, in which each initialises alone and then
calls MPI_Comm_accept or MPI_Comm_connect, fails in MPICH 5.0.)

MPI itself does not notice that a process is lost: a receive from it waits for ever. So each worker also keeps a connection to the manager,
its lifeline. The manager closes all lifelines as soon as one process is gone.

A process is let in only with its own secret key. Once all are in, the manager accepts no more connections.
"""

import asyncio
import fcntl
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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

    writer: asyncio.StreamWriter
    rank: int | None = None  # None until the client has shown its key
    is_lifeline: bool = False
    has_finalized: bool = False  # if so, the end of the connection is no loss

    def reply(self, text: str) -> None:
        self.writer.write(text.encode() + b"\n")


class ProcessManager:
    """Serves the processes of one MPI world in a thread of its own, until it is closed or a process is lost.

    Args:
        host: the only address to listen on.
        nodes: the node of each rank. Ranks on the same node share memory.

    Attributes:
        rendezvous: what a process needs to join.
    """

    def __init__(self, host: str, nodes: Sequence[object]) -> None:
        listener = socket.create_server((host, 0))
        keys = tuple(secrets.randbits(KEY_BITS) for _ in nodes)
        self.rendezvous = Rendezvous(host, int(listener.getsockname()[1]), keys)
        self._size = len(nodes)
        self._clients: list[_Client] = []
        self._in_barrier: list[_Client] = []
        self._values = {"PMI_process_mapping": _process_mapping(nodes)}
        self._constants = {  # answers that are the same for all processes, by command
            "init": "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0",
            "get_maxes": "cmd=maxes kvsname_max=256 keylen_max=64 vallen_max=4096 rc=0",
            "get_appnum": "cmd=appnum appnum=0 rc=0",
            "get_universe_size": f"cmd=universe_size size={self._size} rc=0",
            # MPICH derives the name of its shared memory from this one
            "get_my_kvsname": f"cmd=my_kvsname kvsname=rayllp_{secrets.token_hex(8)} rc=0",
        }
        self._loop, self._is_over = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(listener,), name="process manager", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving. All lifelines end."""
        with suppress(RuntimeError):  # the thread has ended already: a process was lost
            self._loop.call_soon_threadsafe(self._is_over.set)
        self._thread.join(5)

    # In the serving thread ------------------------------------------------------------------------------------------------------

    def _run(self, listener: socket.socket) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        """Serve until the manager is closed or a process is lost; then close all connections."""
        self._server = await asyncio.start_server(self._handle, sock=listener, limit=LONGEST_LINE)
        await self._is_over.wait()
        self._server.close()
        for client in self._clients:
            client.writer.transport.abort()
        while self._clients:  # each leaves when it sees that its connection is closed
            await asyncio.sleep(0)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one client, line by line, until it hangs up or breaks the protocol."""
        client = _Client(writer)
        self._clients.append(client)
        try:
            while line := await reader.readline():
                self._answer(client, line.decode().removesuffix("\n"))
        except (OSError, ValueError, KeyError, IndexError):  # a broken connection, or a malformed message
            pass
        finally:
            self._clients.remove(client)
            writer.close()
            if client.rank is not None and not client.has_finalized:
                self._is_over.set()

    def _answer(self, client: _Client, line: str) -> None:
        """Answer one line of PMI-1.

        Raises:
            ValueError: the client has not shown its key, or the rank has joined before.
            KeyError: the command, or an argument of it, is unknown.
        """
        words = dict(part.split("=", 1) for part in line.split(" ") if "=" in part)
        command = words["cmd"]
        if command in ("initack", "lifeline"):
            self._admit(client, int(words["pmiid"]), is_lifeline=command == "lifeline")
        elif client.rank is None:
            raise ValueError(f"{command} before a key was shown")
        elif command == "put":
            self._values[words["key"]] = line.split(" value=", 1)[1]
            client.reply("cmd=put_result rc=0 msg=success")
        elif command == "get":
            value = self._values.get(words["key"])
            found = "rc=-1 msg=key_not_found value=unknown" if value is None else f"rc=0 msg=success value={value}"
            client.reply(f"cmd=get_result {found}")
        elif command == "barrier_in":
            self._in_barrier.append(client)
            if len(self._in_barrier) == self._size:
                for each in self._in_barrier:
                    each.reply("cmd=barrier_out rc=0")
                self._in_barrier = []
        elif command == "finalize":
            client.has_finalized = True
            client.reply("cmd=finalize_ack rc=0")
        else:
            client.reply(self._constants[command])

    def _admit(self, client: _Client, key: int, *, is_lifeline: bool) -> None:
        """Let a client in with its key. The listener is closed once all libraries and all lifelines are connected."""
        rank = self.rendezvous.keys.index(key)
        if client.rank is not None or any(each.rank == rank and each.is_lifeline == is_lifeline for each in self._clients):
            raise ValueError("this rank is there already")
        client.rank, client.is_lifeline = rank, is_lifeline
        if not is_lifeline:
            for answer in ("cmd=initack rc=0", f"cmd=set size={self._size}", f"cmd=set rank={rank}", "cmd=set debug=0"):
                client.reply(answer)
        if sum(each.rank is not None for each in self._clients) == 2 * self._size:
            self._server.close()


def _process_mapping(nodes: Sequence[object]) -> str:
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

    def is_intact(self) -> bool:
        """Return True if every worker is still there, as far as this one knows."""
        try:
            return self._connection.recv(1) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    @contextmanager
    def exit_on_loss(self) -> Iterator[None]:
        """Within this context, the loss of a worker ends this process at once: for calls to MPI that nothing else can interrupt.

        A signal ends the process (SIGIO, by its default action), since such calls may hold the GIL.
        """
        flags = fcntl.fcntl(self._connection, fcntl.F_GETFL)
        fcntl.fcntl(self._connection, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._connection, fcntl.F_SETFL, flags | os.O_ASYNC)
        try:
            if not self.is_intact():
                os.kill(os.getpid(), signal.SIGIO)
            yield
        finally:
            fcntl.fcntl(self._connection, fcntl.F_SETFL, flags)

    def close(self) -> None:
        """Leave the group: the lifelines of all other workers end, too."""
        self._connection.close()
