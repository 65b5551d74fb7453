"""What `pip install .` leaves: the helper, the package and the bundled models, to be imported from anywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_installed_series_is_imported_from_any_directory(tmp_path):
    source, target, elsewhere = tmp_path / "source", tmp_path / "installed", tmp_path / "elsewhere"
    apart = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, source, ignore=apart)
    elsewhere.mkdir()
    # What it needs is in this environment already; of setuptools alone pip fetches a fresh one.
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = """
import json, blip_helpers, inf2
model, processor = blip_helpers.load_blip()
blip_helpers.load_resnet()
print(json.dumps([blip_helpers.__file__, inf2.__file__, type(model).__name__]))
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("BLIP_MODEL", "RESNET_MODEL")}
    environment["PYTHONPATH"] = str(target)
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    *files, model = json.loads(ran.stdout.splitlines()[-1])
    assert all(Path(file).is_relative_to(target) for file in files) and model == "BlipForQuestionAnswering"
