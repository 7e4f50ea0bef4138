"""What the GPU scripts have in common: where the programs lie, and what is known of the machine. Standard library
only."""
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
# In the repository, or in a folder that `./run gpu-pack` made: there the programs lie beside the scripts.
PACKED = (HERE / "bin").is_dir()
ROOT = pathlib.Path.cwd() if PACKED else HERE.parents[1]
BIN = HERE / "bin" if PACKED else ROOT / "build/gpu/bin"
MODEL = ROOT / "deploy/models/opt-8m-books"

FACTS = ("name", "driver_version", "compute_cap", "memory.total", "clocks.max.sm", "clocks.max.mem", "power.limit",
         "ecc.mode.current", "mig.mode.current")
STATE = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def query(fields):
    """What nvidia-smi says of the first GPU, or {} where there is no nvidia-smi."""
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"],
                              capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.split(","))))


def commit():
    packed = HERE / "COMMIT"
    if packed.exists():
        return packed.read_text().strip()
    done = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--abbrev=40", "--dirty"], capture_output=True,
                          text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def check_files():
    """Ends the program where something is missing that no GPU would replace."""
    for path in (BIN / "dejavu-bench", BIN / "libdejavu_cuda.so", ROOT / "tests/testdata/opt", MODEL):
        if not path.exists():
            where = "; start this in the root of the repository" if PACKED and ROOT in path.parents else ""
            sys.exit(f"{pathlib.Path(sys.argv[0]).name}: there is no {path}{where}")
