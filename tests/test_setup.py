"""`setup_env.py`: where torch comes from. The indexes are directories that a server on this machine gives out; their
wheels hold nothing but a name and a version."""

import functools
import http.server
import importlib.util
import inspect
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TAG = "cp{0}{1}-cp{0}{1}-linux_x86_64".format(*sys.version_info)
needs_linux = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="elsewhere PyPI's torch is a CPU build"
)


def make_wheel(directory, name, version, tag=TAG, requires=""):
    path = Path(directory) / f"{name}-{version}-{tag}.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        "METADATA": metadata + (f"Requires-Dist: {requires}\n" if requires else ""),
        "WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
        "RECORD": "".join(f"{info}/{file},,\n" for file in ("METADATA", "WHEEL", "RECORD")),
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(f"{info}/{file}", text)
    return path


# The build backend of the stand-in for the series, so that nothing is fetched to build it.
BACKEND = f"""
import zipfile
from pathlib import Path

TAG = {TAG!r}


{inspect.getsource(make_wheel)}


def build_editable(directory, config_settings=None, metadata_directory=None):
    return make_wheel(directory, "series", "1.0", "py3-none-any").name
"""


class Index(http.server.SimpleHTTPRequestHandler):
    """A simple index: each directory lists its files. Below the path `hangs` no answer comes, or with `drips` a byte
    now and then."""

    hangs, drips = None, False

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.hangs and self.path.startswith(self.hangs):
            if self.drips:
                self.send_response(200)
                self.end_headers()
                while not self.server.closing.wait(0.1):
                    self.wfile.write(b" ")
            self.server.closing.wait()
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(tmp_path):
    """Give out a directory of `tmp_path` as an index; returns its server, with `url`, and `asked`, the paths."""
    servers = []

    def start(name, **rules):
        (tmp_path / name).mkdir(exist_ok=True)
        handler = functools.partial(type("Index", (Index,), rules), directory=tmp_path / name)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.asked, server.closing = [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory):
    directory = tmp_path_factory.mktemp("environment") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    return directory


@pytest.fixture
def project(tmp_path, serve, empty_environment):
    """A project in which `setup_env.py` installs stand-ins; its `pypi` has torch 2.9.1 and what that needs."""
    root = tmp_path / "project"
    root.mkdir()
    shutil.copy(ROOT / "setup_env.py", root)
    shutil.copytree(empty_environment, root / ".venv", symlinks=True)
    (root / "requirements.txt").write_text("torch==2.9.*\n")
    (root / "backend.py").write_text(BACKEND)
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (root / "pyproject.toml").write_text(build)
    make_wheel(tmp_path / "pypi" / "torch", "torch", "2.9.1", requires="cuda")
    make_wheel(tmp_path / "pypi" / "cuda", "cuda", "12.8", "py3-none-any")
    return root


def environment(pypi, cpu_index):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    own = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": pypi.url, "PIP_RETRIES": "0"}
    return kept | own | {"TORCH_CPU_INDEX": cpu_index, "no_proxy": "127.0.0.1"}


def set_up(root, pypi, cpu_index, code="import setup_env; setup_env.main()"):
    """Run `setup_env.py` to its end: what it printed, and the exit status."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {code}"]
    done = subprocess.run(command, cwd=root, env=environment(pypi, cpu_index), capture_output=True, text=True)
    return done.stdout + done.stderr, done.returncode


def installed(root):
    """{name: version} of what the environment holds besides pip and setuptools."""
    names = [path.name for path in root.glob(".venv/lib/python*/site-packages/*.dist-info")]
    found = dict(re.fullmatch(r"(\w+)-(.+)\.dist-info", name).groups() for name in names)
    return {name: version for name, version in found.items() if name not in ("pip", "setuptools")}


FROM_PYPI = {"torch": "2.9.1", "cuda": "12.8", "series": "1.0"}
FROM_CPU_INDEX = {"torch": "2.9.1+cpu", "series": "1.0"}


@needs_linux
def test_torch_comes_from_the_cpu_index_where_that_answers(project, serve, tmp_path):
    for version in ("2.9.0+cpu", "2.9.1+cpu", "2.10.0+cpu"):
        make_wheel(tmp_path / "cpu" / "torch", "torch", version)
    pypi, cpu = serve("pypi"), serve("cpu")
    printed, status = set_up(project, pypi, cpu.url)
    assert status == 0, printed
    assert installed(project) == FROM_CPU_INDEX
    assert not any("torch" in path or "cuda" in path for path in pypi.asked)


@needs_linux
def test_what_is_installed_stays_and_the_cpu_index_is_not_asked_again(project, serve, tmp_path):
    make_wheel(tmp_path / "cpu" / "torch", "torch", "2.9.1+cpu")
    pypi, cpu = serve("pypi"), serve("cpu")
    printed, status = set_up(project, pypi, "")
    assert status == 0 and installed(project) == FROM_PYPI, printed
    printed, status = set_up(project, pypi, cpu.url)
    assert status == 0 and installed(project) == FROM_PYPI and cpu.asked == [], printed


@needs_linux
def test_where_the_cpu_index_hangs_torch_comes_from_pypi(project, serve):
    code = "import setup_env; setup_env.PROBE_SECONDS = 1; setup_env.main()"
    printed, status = set_up(project, serve("pypi"), serve("cpu", hangs="/").url, code)
    assert status == 0 and installed(project) == FROM_PYPI, printed
    assert "did not offer a CPU build of torch 2.9: taking PyPI's, with CUDA" in printed


@pytest.fixture
def find(monkeypatch):
    """What `setup_env.py` finds at this index, within a second, for the Python that runs this."""
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "setup_env.py")
    setup_env = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup_env)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(setup_env, "PROBE_SECONDS", 1)

    def find(url):
        monkeypatch.setattr(setup_env, "CPU_INDEX", url)
        return setup_env.find_cpu_build(sys.version_info[:3])

    return find


def test_the_newest_cpu_build_is_found(find, serve, tmp_path):
    for version in ("2.9.0+cpu", "2.9.1+cpu", "2.10.0+cpu", "2.9.1+cu128"):
        make_wheel(tmp_path / "cpu" / "torch", "torch", version, TAG.replace("linux", "manylinux_2_28"))
    assert find(serve("cpu").url) == find(serve("cpu").url + "/") == "2.9.1+cpu"


@pytest.mark.parametrize(
    "version, tag",
    [
        ("2.9.1+cpu", "cp39-cp39-linux_x86_64"),
        ("2.9.1+cpu", "cp{0}{1}-cp{0}{1}t-linux_x86_64".format(*sys.version_info)),
        ("2.9.1+cpu", TAG.replace("x86_64", "aarch64")),
        ("2.9.1+cpu", TAG.replace("linux_x86_64", "win_amd64")),
        ("2.9.1+cu128", TAG),
        ("2.9.1", TAG),
        ("2.10.0+cpu", TAG),
        ("2.8.0+cpu", TAG),
    ],
)
def test_a_build_that_does_not_suit_is_not_found(find, serve, tmp_path, version, tag):
    make_wheel(tmp_path / "cpu" / "torch", "torch", version, tag)
    assert find(serve("cpu").url) == ""


def test_an_index_that_does_not_answer(find, serve):
    server = serve("cpu")
    server.shutdown()
    server.server_close()
    assert find(server.url) == ""


def test_an_index_that_answers_404(find, serve):
    assert find(serve("cpu").url) == ""


@pytest.mark.parametrize("url", ["no URL", "http://no-such-host.invalid/whl", "file:///no/such/directory"])
def test_a_name_that_is_no_index(find, url):
    assert find(url) == ""


def test_an_index_that_sends_its_page_for_ever(find, serve, tmp_path):
    make_wheel(tmp_path / "cpu" / "torch", "torch", "2.9.1+cpu")
    server = serve("cpu", hangs="/", drips=True)
    started = time.monotonic()
    assert find(server.url) == "" and time.monotonic() - started < 30


@needs_linux
def test_an_index_whose_wheel_is_broken(project, serve, tmp_path):
    make_wheel(tmp_path / "cpu" / "torch", "torch", "2.9.1+cpu").write_bytes(b"no zip file")
    printed, status = set_up(project, serve("pypi"), serve("cpu").url)
    assert status == 0 and installed(project) == FROM_PYPI, printed
    assert "that failed: taking PyPI's torch, with CUDA" in printed


@needs_linux
@pytest.mark.parametrize("offered, needed", [(True, "2.4 GB (2 GB in .venv"), (False, "12.3 GB (8 GB in .venv")])
def test_too_little_space_names_what_this_way_takes(project, serve, tmp_path, offered, needed):
    if offered:
        make_wheel(tmp_path / "cpu" / "torch", "torch", "2.9.1+cpu")
    shutil.rmtree(project / ".venv")
    no_space = "import shutil; shutil.disk_usage = lambda path: type('', (), {'free': 10**9}); "
    printed, status = set_up(project, serve("pypi"), serve("cpu").url, no_space + "import setup_env; setup_env.main()")
    assert status == 1 and "1.0 GB are free" in printed and f"to install takes {needed}" in printed
    assert not (project / ".venv").exists()


@needs_linux
def test_after_an_interrupt_the_same_command_goes_on(project, serve, tmp_path):
    make_wheel(tmp_path / "cpu" / "torch", "torch", "2.9.1+cpu")
    pypi, hanging = serve("pypi"), serve("cpu", hangs="/torch/torch-")
    command = [sys.executable, "setup_env.py"]
    # In a process group of its own, which gets the signal as a terminal's gets Ctrl-C.
    process = subprocess.Popen(
        command,
        cwd=project,
        env=environment(pypi, hanging.url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while not any("torch-" in path for path in hanging.asked) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors.endswith("interrupted: the same command goes on from here\n")
    assert installed(project) == {} and not (project / ".venv" / "tmp").exists()
    printed, status = set_up(project, pypi, serve("cpu").url)
    assert status == 0 and installed(project) == FROM_CPU_INDEX, printed


@needs_linux
def test_the_requirements_for_neuron_replace_a_cpu_build(project, serve, tmp_path):
    make_wheel(tmp_path / "cpu" / "torch", "torch", "2.9.1+cpu")
    pypi = serve("pypi")
    set_up(project, pypi, serve("cpu").url)
    # As they are, less AWS's packages and index, which is not on this machine.
    lines = (ROOT / "requirements-neuron.txt").read_text().splitlines()
    own = [line for line in lines if not line.startswith(("#", "--extra", "torch-neuronx", "neuronx-cc"))]
    (project / "requirements-neuron.txt").write_text("\n".join(own))
    command = [".venv/bin/python", "-m", "pip", "install", "-r", "requirements-neuron.txt"]
    subprocess.run(command, cwd=project, env=environment(pypi, ""), check=True, capture_output=True)
    assert installed(project) == FROM_PYPI
