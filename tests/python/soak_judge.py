"""What a soak's samples say: whether something grew. Pure functions; soak.py takes the samples.

A sample is a dict: t_s since the start, process (which one it is of), rss_mib, descriptors, threads, and where a load runs p50_ms and
p99_ms of the gaps between tokens.
"""
import statistics

MOST_RSS_GROWTH = 0.02
MOST_MORE = 2  # descriptors and threads
LEAST_SAMPLES = 5  # of a window
WINDOWS = 6  # of what follows the settling; the first and the last are compared


def windows(samples):
    """The samples in equal parts of their time."""
    begin, end = samples[0]["t_s"], samples[-1]["t_s"]
    length = (end - begin) / WINDOWS or 1
    parts = [[] for _ in range(WINDOWS)]
    for sample in samples:
        parts[min(WINDOWS - 1, int((sample["t_s"] - begin) / length))].append(sample)
    return parts


def growth_of(samples, settle_s):
    """Of one process: how much each of its numbers grew after `settle_s`, and what of that is too much. Descriptors and threads come
    and go with connections, so their floor is compared; memory by its median."""
    after = [sample for sample in samples if sample["t_s"] >= settle_s]
    if len(after) < LEAST_SAMPLES * WINDOWS:
        return {}, [f"{len(after)} samples after {settle_s:g} s are too few to judge by: {LEAST_SAMPLES * WINDOWS} are needed"]
    first, *_, last = windows(after)
    if min(len(first), len(last)) < LEAST_SAMPLES:
        return {}, ["the samples have a hole: nobody can judge by them"]

    def of(part, name, what):
        return what([sample[name] for sample in part])

    rss = [of(part, "rss_mib", statistics.median) for part in (first, last)]
    found = {"rss_mib": rss, "rss_growth": rss[1] / rss[0] - 1}
    reasons = []
    if found["rss_growth"] > MOST_RSS_GROWTH:
        reasons.append(f"memory grew by {found['rss_growth']:.1%} after {settle_s:g} s, from {rss[0]:.1f} to {rss[1]:.1f} MiB; "
                       f"{MOST_RSS_GROWTH:.0%} are allowed")
    for name in ("descriptors", "threads"):
        floor = [of(part, name, min) for part in (first, last)]
        found[name] = floor
        if floor[1] > floor[0] + MOST_MORE:
            reasons.append(f"{name} grew from {floor[0]} to {floor[1]} after {settle_s:g} s; {MOST_MORE} more are allowed")
    return found, reasons


def judge(samples, settle_s, load_errors, books):
    """(growth by process, reasons to fail). `load_errors`: what well-behaved callers met, text to count. `books`: (what, ours,
    theirs) that must be equal at the end."""
    growth, reasons = {}, []
    for process in dict.fromkeys(sample["process"] for sample in samples):
        growth[process], found = growth_of([sample for sample in samples if sample["process"] == process], settle_s)
        reasons += [f"{process}: {reason}" for reason in found]
    reasons += [f"{count} x {error}" for error, count in load_errors.items()]
    reasons += [f"the books do not balance: {what}: {theirs}, not {ours}" for what, ours, theirs in books if ours != theirs]
    return growth, reasons
