"""The frame of make_compat.py: cases, and how a directory is kept as what differs from a base.

A base is a function that fills an empty directory. A case is a function that changes a copy of its base. The reference
is asked about the changed copy; what is kept is case.json and the files that differ.
"""
import dataclasses
import filecmp
import json
import pathlib
import shutil
import tempfile

CASES, BASES = [], {}


@dataclasses.dataclass
class Case:
    name: str
    about: str  # one line
    base: str
    edit: object  # edit(directory) changes the copy of the base
    references: dict  # what case.json calls the answer ("model", "tokenizer"): function of the directory that gives it
    # Where dejavud refuses: words of its message, each of which must be there: file, field and reason.
    refused: tuple = ()
    # Where it refuses what the reference loads, or has other results: words of docs/models.md, which says why.
    decision: str = ""
    here: dict = dataclasses.field(default_factory=dict)  # the results that are others: fields of the answer


def base(make):
    """Names a base after its function."""
    BASES[make.__name__.replace("_", "-")] = make
    return make


def add(name, about, base, edit, references, refused=(), decision="", here=None):
    assert all(case.name != name for case in CASES), name
    CASES.append(Case(name, about, base, edit, references, tuple(refused), decision, here or {}))


def change_json(path, changes=(), drop=()):
    """Sets fields of a JSON file, which need not be there yet, and drops others."""
    document = json.loads(path.read_text()) if path.exists() else {}
    for key in drop:
        document.pop(key)
    path.write_text(json.dumps(document | dict(changes), indent=1))


def answer(reference, directory):
    """The reference's answer, or that it refuses, and with which words."""
    try:
        return reference(directory)
    except Exception as error:  # whatever it raises is its refusal
        lines = [line for line in str(error).replace(str(directory), "DIR").splitlines() if line.strip()]
        return {"error": f"{type(error).__name__}: {' '.join(lines)}"[:300]}


def files_of(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def keep(case, base_directory, made, out):
    """Writes `out`: case.json, and what `made` has that the base does not have."""
    record = {"about": case.about, "base": case.base}
    there, before = files_of(made), files_of(base_directory)
    if absent := [name for name in before if name not in there]:
        record["absent"] = absent
    copies = {}
    for name in there:
        if name in before and filecmp.cmp(made / name, base_directory / name, shallow=False):
            continue
        same = next((old for old in before if filecmp.cmp(made / name, base_directory / old, shallow=False)), None)
        if same is not None:
            copies[name] = same
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made / name, out / name)
    if copies:
        record["copies"] = copies  # files of the base under other names
    for kind, reference in case.references.items():
        record[kind] = answer(reference, made)
    if case.refused:
        record["refused"] = list(case.refused)
    if case.here:
        record["here"] = case.here
    if case.decision:
        record["decision"] = case.decision
    out.mkdir(parents=True, exist_ok=True)
    (out / "case.json").write_text(dumps(record) + "\n")
    return record


def dumps(record):
    """Indented, but for what lies two levels down: rows of numbers stay on one line."""
    lines = []
    for key, value in record.items():
        if isinstance(value, dict) and key != "copies":
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}"


def make(out, only):
    """Writes the bases to OUT/base-NAME and the cases to OUT/NAME. Says what stands out."""
    out.mkdir(parents=True, exist_ok=True)
    for name, fill in BASES.items():
        directory = out / f"base-{name}"
        if not only or not directory.exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            fill(directory)
    if not only:
        known = {case.name for case in CASES} | {f"base-{name}" for name in BASES}
        for stale in [path for path in out.iterdir() if path.name not in known]:
            shutil.rmtree(stale)
    for case in CASES:
        if only and not any(case.name.startswith(prefix) for prefix in only):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            made = pathlib.Path(scratch) / "model"
            shutil.copytree(out / f"base-{case.base}", made)
            case.edit(made)
            shutil.rmtree(out / case.name, ignore_errors=True)
            record = keep(case, out / f"base-{case.base}", made, out / case.name)
        errors = [record[kind]["error"] for kind in case.references if "error" in record[kind]]
        print(f"{case.name}: {'; '.join(errors) or 'loads'}" + (f" | here refused: {', '.join(case.refused)}" if case.refused else ""))
        if errors and not case.refused:
            print(f"  {case.name}: the reference refuses it; say with which words dejavud does")
        if not errors and case.refused and not case.decision:
            print(f"  {case.name}: the reference loads it; say which words of docs/models.md tell why dejavud does not")
