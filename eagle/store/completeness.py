"""Whether a store is all that its manifests promise, and of one piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from eagle.files import read_json
from eagle.store.manifest import DONE, NODES_SHARE
from eagle.store.record import RecordSource

#: Of a manifest: what a store lacked or mixed when it was resharded, which its files no longer show.
LACKED, MIXED = "missing_nodes", "differing_nodes"


def _node_jobs(manifests: Iterable[dict]) -> list[list[dict]]:
    """The manifests of jobs over several machines, job by job: those of one data file and number of nodes."""
    jobs: dict[tuple[str | None, int], list[dict]] = {}
    for manifest in manifests:
        nodes = manifest.get("options", {}).get("num_nodes", 1)
        if nodes > 1 and "resharded_into" not in manifest:
            jobs.setdefault((manifest["data"].get("digest"), nodes), []).append(manifest)
    return list(jobs.values())


def missing_nodes(manifests: Iterable[dict]) -> list[str]:
    """Which nodes of jobs over several machines are not there, in words."""
    manifests = list(manifests)
    found = [one for manifest in manifests for one in manifest.get(LACKED, [])]
    for job in _node_jobs(manifests):
        count = job[0]["options"]["num_nodes"]
        missing = set(range(count)) - {manifest["options"]["node_rank"] for manifest in job}
        if missing:
            found.append(f"{', '.join(map(str, sorted(missing)))} of {count}")
    return found


def differing_nodes(manifests: Iterable[dict]) -> list[str]:
    """In what the nodes of a job over several machines differ though it changes their records, in words."""
    manifests = list(manifests)
    found = [one for manifest in manifests for one in manifest.get(MIXED, [])]
    for job in _node_jobs(manifests):
        compared = [(manifest["options"]["node_rank"], _deciding(manifest)) for manifest in job]
        for name in _deciding(job[0]):
            nodes: dict[str, list[int]] = {}
            for rank, values in compared:
                nodes.setdefault(values[name], []).append(rank)
            if len(nodes) > 1:
                said = "; ".join(
                    f"{value} on node {', '.join(map(str, sorted(ranks)))}" for value, ranks in nodes.items()
                )
                found.append(f"{name} is {said}")
    return found


def _deciding(manifest: dict) -> dict[str, str]:
    """What decides the records of a job, by name, for people: alike on all of its nodes."""
    tokenizer = manifest.get("tokenizer", {})
    return {
        **{name: str(manifest["options"].get(name)) for name in NODES_SHARE},
        "tokenizer and template": str(tokenizer.get("digest"))[:12],
        "the date that the template writes": str(tokenizer.get("date")),
    }


def wrong_counts(root: Path, manifests: dict[Path, dict], sources: Iterable[RecordSource]) -> list[str]:
    """What finished jobs and workers below `root` promise and the files there do not hold, in words."""
    promises = []
    for path, manifest in manifests.items():
        folder = path.parent
        promises += [(file.parent, read_json(file, "a worker's counts")) for file in folder.glob(f"*/{DONE}")]
        if manifest.get("complete"):
            promises.append((folder, manifest))
    held: dict[Path, Counter[str]] = {}
    for source in sources:
        for place in source.path.parents:
            held.setdefault(place, Counter()).update(records=len(source), tokens=int(source.lengths.sum()))
            if place == root:
                break
    wrong = []
    for place, promised in promises:
        if place != root and root not in place.parents:
            continue  # of the store of which only a folder was named
        for name in ("records", "tokens"):
            count = held.get(place, Counter())[name]
            if promised.get(name) not in (None, count):
                wrong.append(f"{place} should hold {promised[name]:,} {name}, but {count:,} are there.")
    return wrong
