"""Starts an engine beside this process (`eagle.generate.engine_server`), asks it for features, and ends it."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from eagle.child import end_group
from eagle.dtypes import dtype_name
from eagle.engines import ending, last_words
from eagle.entry import child_environment
from eagle.errors import WorkError
from eagle.generate.engine_server import ENDS_WITHIN, SOCKET
from eagle.generate.handover import Folder, clean_up
from eagle.generate.source_options import SourceOptions

#: Of the variables that launchers set for training processes, those that an engine would take for its own.
_LAUNCHER = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "PMI_", "OMPI_", "MV2_", "ROLE_", "GROUP_", "MASTER_")
_PLACE = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
#: Bytes that a socket's path may have on every system.
_LONGEST_PATH = 100
_LOOK_EVERY = 0.5
#: Seconds that a process leaves the one that started the engine to say how that ended, which it alone knows.
_STARTER_FIRST = 2.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine of this machine is asked. log: what it says, from that byte on."""

    folder: str
    log: str
    begin: int


class RemoteEngine:
    """The features of an engine at this address; any number of threads may ask. process: the engine, where it is this
    process's."""

    def __init__(self, address: Address, process: subprocess.Popen[bytes] | None = None) -> None:
        self.address, self.process, self._folder = address, process, Path(address.folder)
        self._free: queue.SimpleQueue[Connection] = queue.SimpleQueue()

    def features(self, sequences: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """On the CPU. Raises: WorkError with the engine's last words where it has ended."""
        try:
            with self._connection() as connection:
                connection.send_bytes(json.dumps([sequence.tolist() for sequence in sequences]).encode())
                while not connection.poll(_LOOK_EVERY):
                    # What it started may hold its end of the connection open.
                    if not self._is_there():
                        raise EOFError
                answer = json.loads(connection.recv_bytes())
            if "error" in answer:
                raise WorkError(
                    f"The engine could not hand features over: {answer['error']}. Make room there, or lower --bs."
                )
            path = self._folder / answer["file"]
            features = load_file(path)
            path.unlink()
        except (EOFError, OSError) as error:
            raise self.ended() from error
        return features

    def can_be_asked(self) -> bool:
        """Whether it is ready."""
        try:
            with self._connection():
                return True
        except OSError:
            return False

    def ended(self) -> WorkError:
        """The error of an engine that answers no more."""
        how = "has ended"
        if self.process is None:
            time.sleep(_STARTER_FIRST)
        else:
            try:
                how = ending(self.process.wait(ENDS_WITHIN))
            except subprocess.TimeoutExpired:
                how = "answers no more"
        with Path(self.address.log).open("rb") as log:
            log.seek(self.address.begin)
            said = log.read().decode("utf-8", "replace")
        return WorkError(
            f"The engine that computes the features {how}. Its last words, from {self.address.log}:\n{last_words(said)}"
        )

    def _is_there(self) -> bool:
        if self.process is not None:
            return self.process.poll() is None
        return (self._folder / SOCKET).exists()  # whoever started it takes that away

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """One that nobody else uses meanwhile; after an error it is not used again."""
        try:
            connection = self._free.get_nowait()
        except queue.Empty:
            connection = Client(str(self._folder / SOCKET), "AF_UNIX")
        yield connection
        self._free.put(connection)


class EngineProcess:
    """An engine that was started, and ends with this process however that ends; not yet ready.

    python: of the environment that has it. variables: of its environment, such as the cards it sees. log: where it is
    to say what it says, behind what is there. room: bytes of the features that are on their way at one time.
    """

    def __init__(
        self, options: SourceOptions, name: str, python: Path, variables: Mapping[str, str], log: Path, room: int = 0
    ) -> None:
        clean_up()
        self.folder = Folder(room).path
        if len(os.fsencode(self.folder / SOCKET)) > _LONGEST_PATH:
            raise WorkError(
                f"{self.folder} is too long a name for a socket in it. Have TMPDIR name a folder with a shorter path."
            )
        self.address = Address(str(self.folder), str(log), log.stat().st_size if log.exists() else 0)
        words = [str(python), "-m", "eagle.generate.engine_server", "--folder", str(self.folder), "--source", name]
        words += ["--model", str(options.model.resolve()), "--features", ",".join(options.features)]
        words += ["--dtype", dtype_name(options.dtype), "--device", options.device.type]
        words += ["--longest", str(options.longest), "--engine", json.dumps(dataclasses.asdict(options.engine))]
        inherited = {
            name: value
            for name, value in child_environment().items()
            if name not in _PLACE and not name.startswith(_LAUNCHER)
        }
        with log.open("ab") as said:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                env={**inherited, **variables, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C is for this process, which then ends that one
            )
        self.source = RemoteEngine(self.address, self.process)

    def wait_until_ready(self) -> None:
        """Raises: WorkError with its last words where it does not start."""
        while not self.source.can_be_asked():
            if self.process.poll() is not None:
                raise self.source.ended()
            time.sleep(0.05)

    def close(self) -> None:
        """End it and what it started, and leave nothing of it."""
        assert self.process.stdin
        self.process.stdin.close()
        end_group(self.process, 2 * ENDS_WITHIN)
        shutil.rmtree(self.folder, ignore_errors=True)
        clean_up()
