"""What a commit is checked for, `make lint` checks too."""

import subprocess

import yaml

from tests.support import ROOT


def test_make_lint_runs_every_hook():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    lint = subprocess.run(
        ["make", "--dry-run", "lint", "VENV=.venv"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    entries = [hook["entry"].removesuffix(" --force-exclude") for hook in repository["hooks"]]
    assert len(entries) == 5
    for entry in entries:
        assert f"{entry} " in lint or f"{entry}\n" in lint, entry
