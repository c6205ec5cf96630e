"""The agent that ``bigbatch launch`` starts and watches: torchrun's, for one attempt.

Differs from ``torchrun``: the rendezvous store, which unpickles what it is sent, listens on one address and not on all
of the machine's; the agent ends with the process that started it; and its exit code tells what went wrong.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bigbatch.cli import FAILED, OK, USAGE

from .watchdog import ALONE

PR_SET_PDEATHSIG = 1


def main(text: str, *command: str) -> int:
    """Workers that run ``python COMMAND``, and their exit code: 2 where the first that failed had it.

    ``text`` has a LaunchConfig's settings, in JSON, with ``parent``, the process to end with, ``host`` and ``port`` of
    the rendezvous and ``listen``: the address of this machine to offer it on, or null. Without a rendezvous the exit
    code is ALONE.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    settings = json.loads(text)
    parent, host, port, listen = (settings.pop(name) for name in ("parent", "host", "port", "listen"))
    if os.getppid() != parent:  # it ended before this one could ask to be told
        return FAILED
    try:
        store = _offer(listen, port) if listen else None
        at = f"{host}:{store.port if store else port}"
        # By default there are log directories, whose path is made of the run_id.
        logs = DefaultLogsSpecs(log_dir=os.devnull)
        config = LaunchConfig(**settings, rdzv_backend="c10d", rdzv_endpoint=at, max_restarts=0, logs_specs=logs)
        elastic_launch(config, sys.executable)(*command)
        return OK
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"bigbatch: rank {rank} failed first, with exit code {failure.exitcode}", file=sys.stderr)
        return USAGE if failure.exitcode == USAGE else FAILED
    except (DistError, OSError, RendezvousError) as error:
        print(f"bigbatch: no rendezvous at {host}: {error.__cause__ or error}", file=sys.stderr)
        return ALONE
    except SignalException:
        return FAILED


def _offer(address: str, port: int) -> TCPStore:
    """A store that listens on one address of this machine."""
    listener = socket.create_server((address, port))
    port = listener.getsockname()[1]
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
