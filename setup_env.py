"""Make the virtual environment ``.venv`` and install the series into it: ``python3 setup_env.py``.

On Linux x86-64 PyPI's torch brings 4 GB of CUDA, which nothing here uses. There torch comes from PyTorch's own index of
CPU builds, where that answers within a few seconds and has one that suits; otherwise from PyPI. The environment
variable ``TORCH_CPU_INDEX`` names another index of that kind (a mirror, say). Empty, it means PyPI's torch:
``make neuron`` sets it so, because AWS's instructions take torch from PyPI, and we never tried torch-neuronx beside a
CPU build.

Needs Python's standard library alone. Where something is missing it says what, and what to do, and stops.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
TEMPORARY = VENV / "tmp"  # for what pip downloads, which is more than many a /tmp holds
OLDEST, NEWEST = (3, 11), (3, 13)  # the versions of Python that torch-xla 2.9 is made for
GB = 10**9
LINUX_X86 = (platform.system(), platform.machine()) == ("Linux", "x86_64")
CPU_INDEX = os.environ.get("TORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")
PROBE_SECONDS = 8
# What stays in .venv, and what is there for a while. With CUDA: measured. With PyTorch's CPU build: the same less CUDA
# and its torch, plus the unpacked size of the CPU build of torch 2.13. Elsewhere (macOS, Arm): an estimate.
WITH_CUDA, WITH_CPU_BUILD, ELSEWHERE = (8.0, 4.3), (1.8, 0.6), (2.0, 0.7)


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


def installed_torch():
    """The version of torch 2.9 in the environment, "" where it has none or one whose installation broke off."""
    for record in VENV.glob("lib/python*/site-packages/torch-2.9.*.dist-info/RECORD"):
        return record.parent.name[len("torch-") : -len(".dist-info")]
    return ""


def find_cpu_build(python_version):
    """The newest CPU build of torch 2.9 for this Python that the index has, as "2.9.1+cpu"; "" without one.

    The index is asked in a thread: a time-out of urllib's bounds a wait for bytes, not that for a name, nor the whole.
    """
    pages = []

    def ask():
        try:
            with urllib.request.urlopen(CPU_INDEX.rstrip("/") + "/torch/", timeout=PROBE_SECONDS) as answer:
                pages.append(answer.read().decode(errors="replace"))
        except (OSError, ValueError):  # no such host, refused, 404, a certificate, no URL
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    tag = "cp{}{}".format(*python_version)
    wheel = rf"\btorch-(2\.9\.\d+)(?:\+|%2[Bb])cpu-{tag}-{tag}-(?:many)?linux\w*_x86_64\.whl"
    versions = re.findall(wheel, "".join(pages))
    return max(versions) + "+cpu" if versions else ""


def check_disk(needed):
    """Stop unless there is room for `needed`: (GB that stay, GB for a while). Gives pip's options for that room."""
    free = shutil.disk_usage(str(ROOT)).free
    installed = sum(path.lstat().st_size for path in VENV.rglob("*"))
    stays, for_a_while = needed
    total = int((stays + for_a_while) * GB)
    if free + installed < total:
        sys.exit(
            f"{free / GB:.1f} GB are free on the disk of {ROOT}, to install takes {(total - installed) / GB:.1f} GB "
            f"({stays:.0f} GB in .venv, the rest for a while): make room, or move the project to another disk"
        )
    # Without the option pip keeps what it downloads, for a next time.
    return ["--no-cache-dir"] if free + installed < total + for_a_while * GB else []


def succeeds(what, *command):
    print(f"== {what}", flush=True)
    # Whatever pip's configuration says: into the environment, not into the user's directory.
    return subprocess.call(command, cwd=str(ROOT), env={**os.environ, "TMPDIR": str(TEMPORARY), "PIP_USER": "0"}) == 0


def run(what, *command):
    if not succeeds(what, *command):
        sys.exit(f"FAILED: {what}. The reason stands above; once it is mended, the same command goes on from here.")


def main():
    made = suits(probe(VENV_PYTHON)[0])
    python = VENV_PYTHON if made else choose_python()
    torch, cpu_build = installed_torch() if made else "", ""
    if LINUX_X86 and CPU_INDEX and not torch:
        cpu_build = find_cpu_build(probe(python)[0])
        if not cpu_build:
            print(f"{CPU_INDEX} did not offer a CPU build of torch 2.9: taking PyPI's, with CUDA", flush=True)
    otherwise = WITH_CUDA if LINUX_X86 else ELSEWHERE
    options = check_disk(WITH_CPU_BUILD if (torch or cpu_build).endswith("+cpu") else otherwise)
    if not made:
        run("make the environment .venv", python, "-m", "venv", "--clear", str(VENV))
    TEMPORARY.mkdir(exist_ok=True)
    install = [str(VENV_PYTHON), "-m", "pip", "install"]
    if cpu_build:
        # By its full version, whatever other index pip is set to. What it needs comes from PyPI with the rest.
        one = ["--no-deps", "--index-url", CPU_INDEX, f"torch=={cpu_build}"]
        if not succeeds(f"install torch {cpu_build} from {CPU_INDEX}", *install, *options, *one):
            print("that failed: taking PyPI's torch, with CUDA", flush=True)
            options = check_disk(otherwise)
    run("install requirements.txt", *install, *options, "-r", "requirements.txt")
    run("install the series itself", *install, *options, "--no-deps", "-e", ".")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
    finally:
        shutil.rmtree(str(TEMPORARY), ignore_errors=True)
