"""The table of `./run compare`: a row as it comes, the whole for a terminal, and the part of a page between its markers."""
import os
import textwrap

from samples import Cell, span

NAMES = {"dejavud": "dejavud", "transformers": "Transformers", "openvino": "OpenVINO", "ctranslate2": "CTranslate2"}
COLUMNS = [Cell("decode", 1), Cell("decode", 4), Cell("decode", 16), Cell("prefill", 1)]
BEGIN, END = "<!-- ./run compare --write-docs: begin -->", "<!-- ./run compare --write-docs: end -->"
WIDTH = 128


def number(ms):
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def heading(prefill_tokens):
    names = [f"prefill {prefill_tokens}" if c.phase == "prefill" else f"batch {c.batch}" for c in COLUMNS]
    return ("| system | weights | tier | " + " | ".join(f"{name} | x" for name in names) + " | GB/s |\n"
            + "|---" * (4 + 2 * len(COLUMNS)) + "|")


def row(line, version, results):
    """`results` by cell; none for a cell that the line does not have."""
    system = NAMES[line.system] + (f" {version}" if version else "") + (", embedded model" if line.model == "embedded" else "")
    tier = line.tier.upper() + (" (synthetic)" if line.tier != "dense" and line.model == "shape" else "")
    cells, met = [], []
    for result in map(results.get, COLUMNS):
        if result is None or result.ms is None:
            cells.append(" | ")
            continue
        met.extend(result.bandwidth)
        cells.append(f"{number(result.ms)} | {result.words if result.ratio is None else f'{result.ratio:.2f}'}")
    bandwidth = span((min(met), max(met))) if met else ""
    return f"| {system} | {line.dtype} | {tier} | " + " | ".join(cells) + f" | {bandwidth} |"


def paragraph(text):
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def item(text):
    return textwrap.fill(text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False,
                         break_on_hyphens=False)


def whole(opening, table, notes):
    return "\n\n".join([paragraph(opening), table] + (["\n".join(map(item, notes))] if notes else []))


def parts(path):
    """What stands before and after the markers of a page. ValueError where they are not both there, once and in order."""
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after or END in before:
        raise ValueError(f"{path}: wants the lines '{BEGIN}' and '{END}', once each")
    return before, after


def write(path, text):
    """In the place of what stands between the markers."""
    before, after = parts(path)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    os.replace(aside, path)
