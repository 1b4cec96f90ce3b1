"""The store of a training run without what is damaged in it: one process looks for damage, the others are told."""

from __future__ import annotations

import datetime
from pathlib import Path

from accelerate import Accelerator
from torch import distributed

from eagle.errors import RequestError, WorkError
from eagle.store.damage import Damage
from eagle.store.reader import FeatureStore
from eagle.store.verify import skip_damaged

#: Looking for damage reads the whole store, which may take longer than other exchanges may: as long as it takes.
#: A little less than the most that gloo counts, 2^31 milliseconds.
_PATIENCE = datetime.timedelta(days=20)


def whole_store(folder: Path, flag: str, accelerator: Accelerator) -> FeatureStore:
    """As `eagle.store.verify.skip_damaged`, read by the first process of the run only; every process calls this.

    The damage names files relative to the folder, so that the others may have copies of the store.

    Raises: in every process what it raises in the first.
    """
    if accelerator.num_processes == 1:
        return skip_damaged(folder, flag)
    store: FeatureStore | None = None
    found: Damage | Exception | None = None
    if accelerator.is_main_process:
        try:
            store = skip_damaged(folder, flag)
            found = store.damage
        except (WorkError, RequestError, OSError) as error:
            found = error
    found = _told(found)
    if isinstance(found, Exception):
        raise found
    return store if store is not None else FeatureStore(folder, flag, without=found)


def _told(found: Damage | Exception | None) -> Damage | Exception | None:
    """What the first process has found, in every process. Between CPUs, whatever the processes compute on."""
    box = [found]
    # It stays: destroying it may hang (`eagle.train.accelerator.end_training`).
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    distributed.broadcast_object_list(box, src=0, group=group)
    return box[0]
