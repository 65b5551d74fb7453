"""Make the virtual environment ``.venv`` and install the series into it: ``python3 setup_env.py``.

Needs Python's standard library alone. Where something is missing it says what, and what to do, and stops.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
TEMPORARY = VENV / "tmp"  # for what pip downloads, which is more than many a /tmp holds
OLDEST, NEWEST = (3, 11), (3, 13)  # the versions of Python that torch-xla 2.9 is made for
GB = 10**9
# Measured on Linux x86-64, where torch brings CUDA's libraries; elsewhere an estimate.
ENVIRONMENT, DOWNLOADS = (8.0, 4.3) if (platform.system(), platform.machine()) == ("Linux", "x86_64") else (2.0, 0.7)
NEEDED = int((ENVIRONMENT + DOWNLOADS) * GB)


def probe(python):
    """The version of an interpreter, (0,) where it does not run, and whether it can make virtual environments."""
    code = (
        "import sys, importlib.util as util;"
        "print(*sys.version_info[:3], int(bool(util.find_spec('venv') and util.find_spec('ensurepip'))))"
    )
    try:
        output = subprocess.check_output([str(python), "-c", code], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return (0,), False
    *version, makes_venvs = map(int, output.split())
    return tuple(version), bool(makes_venvs)


def suits(version):
    return OLDEST <= version[:2] <= NEWEST


def choose_python():
    """The interpreter for the environment: the one that runs this, or else the first on the PATH that suits."""
    this = ".".join(map(str, sys.version_info[:3]))
    found = {python: probe(python) for python in (sys.executable, "python3.13", "python3.12", "python3.11")}
    suitable = [python for python, (version, _) in found.items() if suits(version)]
    if not suitable:
        sys.exit(
            f"this is Python {this}; torch-xla 2.9 is made for 3.11 to 3.13, and none of these is on the PATH: "
            "install one and name it, as in: make series PYTHON=python3.12"
        )
    for python in suitable:
        if found[python][1]:
            if python != sys.executable:
                print(f"Python {this} will not do: taking {python}", flush=True)
            return python
    name = "python{}.{}".format(*found[suitable[0]][0])
    sys.exit(
        f"{name} cannot make virtual environments, its module ensurepip is missing: "
        f"on Debian and Ubuntu, apt install {name}-venv"
    )


def check_disk(free, installed):
    """Stop unless `free` bytes are enough for what is not among the `installed` bytes of the environment yet."""
    if free + installed < NEEDED:
        sys.exit(
            f"{free / GB:.1f} GB are free on the disk of {ROOT}, to install takes {(NEEDED - installed) / GB:.1f} GB "
            f"({ENVIRONMENT:.0f} GB in .venv, the rest for a while): make room, or move the project to another disk"
        )


def run(what, *command):
    print(f"== {what}", flush=True)
    # Whatever pip's configuration says: into the environment, not into the user's directory.
    if subprocess.call(command, cwd=str(ROOT), env={**os.environ, "TMPDIR": str(TEMPORARY), "PIP_USER": "0"}):
        sys.exit(f"FAILED: {what}. The reason stands above; once it is mended, the same command goes on from here.")


def main():
    free = shutil.disk_usage(str(ROOT)).free
    installed = sum(path.lstat().st_size for path in VENV.rglob("*"))
    check_disk(free, installed)
    if not suits(probe(VENV_PYTHON)[0]):
        run("make the environment .venv", choose_python(), "-m", "venv", "--clear", str(VENV))
    TEMPORARY.mkdir(exist_ok=True)
    install = [str(VENV_PYTHON), "-m", "pip", "install"]
    if free + installed < NEEDED + DOWNLOADS * GB:
        install.append("--no-cache-dir")  # there is no room for pip to keep what it downloads
    run("install requirements.txt", *install, "-r", "requirements.txt")
    run("install the series itself", *install, "--no-deps", "-e", ".")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
    finally:
        shutil.rmtree(str(TEMPORARY), ignore_errors=True)
