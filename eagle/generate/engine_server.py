"""An engine in a process of its own, which computes features for other processes of its machine.

    python -m eagle.generate.engine_server --folder F --model M ...     (started by `eagle.generate.engine_process`)

They ask over a socket in the folder F, in memory: a batch of sequences as JSON, ``[[5, 6, 7], [8, 9]]``. The answer,
``{"file": "12"}``, names a file in F with the batch's features, which who asked takes away; ``{"error": "why"}`` says
that there is none. Batches are computed as they were asked for and one after another, so a batch's features do not
depend on who else asks. Each is written while the next one is computed.

An error ends the process, and so does its stdin when it closes: it does not outlive the parent, which holds the other
end.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import itertools
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from eagle import device
from eagle.child import end_own_group, end_with_parent
from eagle.dtypes import parse_dtype
from eagle.entry import run
from eagle.generate.handover import remove_own
from eagle.generate.source_options import EngineOptions, FeatureSource, SourceOptions
from eagle.generate.sources import ENGINES, open_source

#: The socket, in the folder.
SOCKET = "socket"
#: Seconds that an engine takes to end in order.
ENDS_WITHIN = 10

Asked = tuple[Connection, list[list[int]]]


def serve(source: FeatureSource, folder: Path) -> None:
    """Answer whoever asks, until the source fails: raises what it raises."""
    asked: queue.SimpleQueue[Asked] = queue.SimpleQueue()
    listener = Listener(str(folder / SOCKET), "AF_UNIX", backlog=64)
    atexit.register(_close, listener)  # and not before this process has said why it ends: who asks may read that then
    threading.Thread(target=_accept, args=(listener, asked), daemon=True).start()
    with ThreadPoolExecutor(1, "writer") as writer:
        for number in itertools.count():
            connection, sequences = asked.get()
            found = source.features([np.array(sequence, dtype=np.int32) for sequence in sequences])
            features = {name: tensor.contiguous().cpu() for name, tensor in found.items()}
            writer.submit(_answer, connection, folder / str(number), features)


def _close(listener: Listener) -> None:
    with contextlib.suppress(OSError):
        listener.close()


def _accept(listener: Listener, asked: queue.SimpleQueue[Asked]) -> None:
    with contextlib.suppress(OSError):  # it was closed
        while True:
            threading.Thread(target=_listen, args=(listener.accept(), asked), daemon=True).start()


def _listen(connection: Connection, asked: queue.SimpleQueue[Asked]) -> None:
    while True:
        try:
            asked.put((connection, json.loads(connection.recv_bytes())))
        except (EOFError, OSError):  # it has ended
            return


def _answer(connection: Connection, path: Path, features: dict[str, torch.Tensor]) -> None:
    try:
        save_file(features, path)
        answer = {"file": path.name}
    except Exception as error:  # safetensors has its own for a full disk
        path.unlink(missing_ok=True)
        answer = {"error": f"{path.parent} takes no more features: {error}"}
    try:
        connection.send_bytes(json.dumps(answer).encode())
    except OSError:  # who asked has ended
        path.unlink(missing_ok=True)


def _end(folder: Path) -> None:
    """End in order where the engine lets that be, so that it takes away what is its own; leave nothing of ours."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(ENDS_WITHIN)
    remove_own()
    shutil.rmtree(folder, ignore_errors=True)
    end_own_group()


def _end_at_once() -> None:
    end_own_group()
    os._exit(1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eagle.generate.engine_server",
        description="An engine for other processes of this machine; training without a store starts it.",
    )
    parser.add_argument("--folder", type=Path, required=True, help="where its socket and the features go")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--features", required=True, help="names, with commas")
    parser.add_argument("--source", choices=ENGINES, default=ENGINES[0], help="the engine (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="what it computes in (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="npu, cuda, cpu or auto (default: auto)")
    parser.add_argument("--longest", type=int, default=0, help="tokens of the longest sequence (default: the model's)")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON: how the engine is started")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell behind it all made of that
    atexit.register(shutil.rmtree, args.folder, ignore_errors=True)
    end_with_parent(lambda: _end(args.folder))
    engine = EngineOptions(**args.engine)
    options = SourceOptions(
        args.model,
        parse_dtype(args.dtype),
        device.torch_device(device.choose_kind(args.device)),
        tuple(args.features.split(",")),
        cards=engine.cards,
        longest=args.longest,
        engine=engine,
    )
    try:
        serve(open_source(options, args.source), args.folder)
    finally:
        # An engine that failed may not end by itself, and those who ask wait for that.
        deadline = threading.Timer(ENDS_WITHIN, _end_at_once)
        deadline.daemon = True
        deadline.start()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
