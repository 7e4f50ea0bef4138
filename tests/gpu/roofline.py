#!/usr/bin/env python3
"""Writes the tables of docs/design/roofline.md: what `dejavu-bench launches --calculate` says of a step, beside what a
report of gpu-bench (--report) has measured; without one, beside the steps in docs/benchmarks/gpu.md. Needs
dejavu-bench, no GPU."""
import argparse
import json
import pathlib
import re
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs/design/roofline.md", ROOT / "docs/benchmarks/gpu.md"
BEGIN, END = "<!-- by tests/gpu/roofline.py, from here -->\n", "<!-- to here -->\n"
MODELS, BATCHES, TIERS = ("synthetic:opt-6.7b", "synthetic:opt-30b"), (1, 4, 16), ("dense", "exact", "balanced")
LEAST_SHARE = 0.005  # of a step's bytes; launches that read less are not listed


def calculate(model):
    bench = next(path for build in ("release", "gpu") if (path := ROOT / "build" / build / "bin/dejavu-bench").exists())
    with tempfile.TemporaryDirectory() as folder:
        figures = pathlib.Path(folder) / "figures.json"
        subprocess.run([bench, "launches", "--calculate", "--model", model, "--batch", ",".join(map(str, BATCHES)),
                        "--tier", ",".join(TIERS), "--json", figures], check=True, stdout=subprocess.DEVNULL)
        return json.loads(figures.read_text())


def steps_of_results():
    """{(model, batch, tier): ms} of the page's table of steps, and the line that says of what they are."""
    text = RESULTS.read_text()
    found = {}
    for match in re.finditer(r"^\| `([^`]+)`, (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE):
        for tier, ms in zip(TIERS, match.groups()[2:]):
            found[match[1], int(match[2]), tier] = float(ms)
    date, commit = re.search(r"(\d{4}-\d\d-\d\d), commit (\w+)", text).groups()
    return found, f"{date}, commit {commit}"


def measured_by(report):
    """The same of a report, and {(model, batch, tier, launch): us in the chain}."""
    steps, launches = {}, {}
    for part in report.get("launches", ()):
        for step in part["steps"]:
            steps[step["model"], step["batch"], step["tier"]] = step["us"] / 1000
        for row in part["rows"]:
            launches[row["model"], row["batch"], row["tier"], row["name"]] = row["us_in_chain"]
    return steps, launches, f"{report['made'][:10]}, commit {report['commit'][:7]}"


def table(heading, rows):
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def use(name):
    """What a launch is for: "LinearBF16 up" is for up. One without a weight of its own is named by its kernel."""
    kernel, _, of = name.partition(" ")
    return of or re.sub(r"(B?F\d+|I8)?((x|(?<=[a-z]))\d+)?$", "", kernel)


def step_table(model, calculated, measured):
    rows = []
    for step in calculated["steps"]:
        ms, found = step["us_at_ceiling"] / 1000, measured.get((model, step["batch"], step["tier"]))
        rows_of_step = f"{step['batch']} row{'s' * (step['batch'] > 1)}"
        rows.append([f"{step['tier'].upper()}, {rows_of_step}", step["launches"], f"{step['launches_per_layer']:g}",
                     f"{step['bytes'] / 1e6:,.0f}", f"{ms:.2f}", f"{found:.2f}" if found else "",
                     f"{100 * ms / found:.0f} %" if found else ""])
    return table(["step", "launches", "a layer", "MB", "ms, calculated", "ms, measured", "share"], rows)


def launch_table(model, calculated, measured):
    """Those of DENSE, and of the other tiers those that read something else."""
    totals = {(step["tier"], step["batch"]): step["bytes"] for step in calculated["steps"]}
    found = {}
    for row in calculated["rows"]:
        found.setdefault((row["tier"], use(row["name"])), {})[row["batch"]] = row
    rows = []
    for (tier, name), by_batch in found.items():
        of_step = [row["bytes"] * row["launches_per_step"] / totals[tier, batch] for batch, row in by_batch.items()]
        dense = found.get(("dense", name), {})
        if max(of_step) < LEAST_SHARE or (tier != "dense" and all(
                abs(row["bytes"] - dense.get(batch, {"bytes": 0})["bytes"]) < 0.01 * row["bytes"]
                for batch, row in by_batch.items())):
            continue
        kernels = ", ".join(dict.fromkeys(f"`{row['name'].split()[0]}`" for row in by_batch.values()))
        cells = [[], [], []]
        for batch in BATCHES:
            row = by_batch.get(batch)
            us = measured.get((model, batch, tier, row["name"])) if row else None
            cells[0].append(f"{row['bytes'] / 1e6:.1f}" if row else "")
            cells[1].append(f"{row['us_at_ceiling']:.1f}" if row else "")
            cells[2].append(f"{us:.1f}" if us else "")
        rows.append([f"{tier.upper()}: {name}, by {kernels}",
                     *(" / ".join(three) if any(three) else "" for three in cells)])
    return table(["launch", "MB at 1 / 4 / 16 rows", "µs, calculated", "µs, measured in the chain"], rows)


def main():
    parser = argparse.ArgumentParser(prog="roofline", description=__doc__)
    parser.add_argument("--report", type=pathlib.Path, help="of gpu-bench, with its part launches")
    options = parser.parse_args()
    launches = {}
    if options.report:
        steps, launches, of = measured_by(json.loads(options.report.read_text()))
    else:
        steps, of = steps_of_results()
    text = [f"Measured: {of}.\n"]
    for model in MODELS:
        calculated = calculate(model)
        text += [f"\n### `{model}`\n\n", step_table(model, calculated, steps), "\n",
                 launch_table(model, calculated, launches)]
    page = PAGE.read_text()
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(head + BEGIN + "".join(text) + END + tail)


if __name__ == "__main__":
    main()
