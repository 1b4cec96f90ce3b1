"""What every vLLM that is started here is told by its environment, and how and why one of them died."""

from __future__ import annotations

import itertools
import re
import signal

#: The CPU's key-value cache, in GiB.
CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"
#: No downloads, no telemetry; a small cache on a CPU. What the user has set stays.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    CPU_CACHE: "1",
}

#: Options of memory, cards and speed, which leave what an engine computes what it is but for rounding.
INDIFFERENT = frozenset(
    {
        "block_size",
        "compilation_config",
        "cpu_offload_gb",
        "disable_custom_all_reduce",
        "disable_log_stats",
        "distributed_executor_backend",
        "download_dir",
        "enable_chunked_prefill",
        "enable_expert_parallel",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "load_format",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "swap_space",
    }
)

# "(EngineCore pid=12) ERROR 01-02 03:04:05 [core.py:67] ValueError: why"
_LOG_PREFIX = re.compile(r"^(?:\([^)]*\)\s*)?(?:(INFO|WARNING|ERROR|DEBUG) \S+ \S+ \[[^\]]*\]\s?)?")
_LONGEST_LINE = 240
_ERROR_LINE = re.compile(r"^(?:[A-Za-z_][\w.]*)?(?:Error|Exception|Interrupt)\b.*")


def ending(code: int) -> str:
    """How a process that was started here ended, by its return code."""
    if code >= 0:
        return f"exited with code {code}"
    how = f"was killed by {signal.Signals(-code).name}"
    return how + " (out of memory?)" if code == -signal.SIGKILL else how


def last_words(log: str) -> str:
    """Why an engine died: the first error in its log, which is the cause of all others, and the last one.

    Of each the line itself and the indented ones that explain it; of a log without an error line the end.
    """
    lines: list[str] = []
    errors: list[int] = []
    for raw in log.splitlines():
        prefix = _LOG_PREFIX.match(raw)
        line = raw[prefix.end() :].rstrip() if prefix else raw.rstrip()
        if not line:
            continue
        # vLLM also logs the tracebacks of things that it can do without, as warnings.
        if _ERROR_LINE.match(line) and (prefix is None or prefix[1] in (None, "ERROR")):
            errors.append(len(lines))
        # It lists every architecture it knows, on one line.
        lines.append(line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + " ...")
    shown: list[str] = []
    for start in dict.fromkeys((errors[0], errors[-1])) if errors else ():
        explained = itertools.takewhile(lambda line: line.startswith(" "), lines[start + 1 : start + 3])
        shown += [line for line in (lines[start], *explained) if line not in shown]
    return "\n".join(f"  {line}" for line in shown or lines[-12:]) or "  (none)"
